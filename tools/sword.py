"""Reader of SWORD zText Bible modules, the format of Debian's `sword-text-*` packages.

Each testament has three files. `.bzz` has zlib blocks of OSIS markup. `.bzs` locates them, with 12 bytes per block:
offset, compressed size and size, as little-endian 32-bit integers. `.bzv` has an entry of 10 bytes for every text:
block (32 bits), offset in the block (32) and size (16). Its order is that of the versification: two entries for module
and testament, then for each book one for its heading, and for each of its chapters one for the chapter's heading and
one for each verse. A missing text has size 0.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_CHAPTER = re.compile(r'<chapter\b[^>]*\bosisID="([^"]+)"[^>]*\bsID=[^>]*>')
_BOOK = re.compile(r'<div\b(?=[^>]*\bsID=)[^>]*\btype="book"[^>]*>')
_ASIDE = re.compile(r"<(title|note)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)
_PARAGRAPH = re.compile(r'<div\b[^>]*\bsID=[^>]*\btype="x-p"[^>]*/>')
_TAG = re.compile(r"<[^>]*>")
TYPOGRAPHY = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x00B6: None}  # ASCII quotation marks, no pilcrow
_HEADINGS_OF_TESTAMENT = 2


def read_blocks(index: bytes, blocks: bytes) -> list[bytes]:
    """Return the decompressed blocks of a testament, in order, from its `.bzs` and `.bzz`.

    Raises:
        ValueError: if the index is truncated, or a block is missing or has another size than in the index.
    """
    if len(index) % 12:
        raise ValueError(f"a .bzs index must have 12 bytes per block, but has {len(index)} bytes: it is truncated.")
    texts = []
    for offset, compressed_size, size in struct.iter_unpack("<III", index):
        try:
            texts.append(zlib.decompress(blocks[offset : offset + compressed_size]))
        except zlib.error as error:
            raise ValueError(f"the block at {offset} cannot be decompressed: {error}.") from error
        if len(texts[-1]) != size:
            raise ValueError(f"the block at {offset} must have {size} bytes, but has {len(texts[-1])}.")
    return texts


def read_chapters(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (chapter, markup) of every chapter below a folder; chapters are named "Gen.1"."""
    for index, blocks in _testaments(folder):
        for block in read_blocks(index.read_bytes(), blocks.read_bytes()):
            pieces = _CHAPTER.split(block.decode("utf-8"))
            yield from zip(pieces[1::2], pieces[2::2], strict=True)


def read_verses(folder: Path) -> dict[tuple[str, int], str]:
    """Return the markup of every verse below a folder by (chapter, verse), such as ("Gen.1", 1); "" if missing.

    A chapter's heading, such as the first letter of Psalm 119, is prepended to its first verse.

    Raises:
        ValueError: if a file is truncated, an entry lies outside its block, or the chapters of a book are not numbered
            1, 2, 3, ..., that is, entries are not in the order above.
    """
    verses: dict[tuple[str, int], str] = {}
    for index, blocks in _testaments(folder):
        texts = read_blocks(index.read_bytes(), blocks.read_bytes())
        verses |= _verses_of(_entries(index.with_suffix(".bzv").read_bytes(), texts))
    return verses


def plain_osis(markup: str) -> str:
    """Return the words of OSIS markup; paragraph marks become empty lines, titles and notes are dropped."""
    text = _TAG.sub("", _PARAGRAPH.sub("\n\n", _ASIDE.sub("", markup)))
    text = html.unescape(text).translate(TYPOGRAPHY)
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _testaments(folder: Path) -> Iterator[tuple[Path, Path]]:
    for index in sorted(folder.rglob("*.bzs"), reverse=True):  # ot before nt
        yield index, index.with_suffix(".bzz")


def _entries(table: bytes, texts: list[bytes]) -> Iterator[str]:
    """Yield the text of every entry of a `.bzv`."""
    if len(table) % 10:
        raise ValueError(f"a .bzv index must have 10 bytes per entry, but has {len(table)} bytes: it is truncated.")
    for place, (block, offset, size) in enumerate(struct.iter_unpack("<IIH", table)):
        if size and (block >= len(texts) or offset + size > len(texts[block])):
            raise ValueError(f"entry {place} of the .bzv index lies outside of block {block}.")
        yield texts[block][offset : offset + size].decode("utf-8") if size else ""


def _verses_of(entries: Iterator[str]) -> dict[tuple[str, int], str]:
    verses, chapter, verse, heading = {}, "", 0, ""
    for place, text in enumerate(entries):
        started = _CHAPTER.search(text)
        if started:
            _check_follows(started[1], chapter)
            chapter, verse, heading = started[1], 0, text[started.end() :]
        elif place >= _HEADINGS_OF_TESTAMENT and not _BOOK.search(text):
            verse += 1
            verses[chapter, verse] = heading + text if verse == 1 else text
    return verses


def _check_follows(chapter: str, before: str) -> None:
    book, _, number = chapter.rpartition(".")
    book_before, _, number_before = before.rpartition(".")
    expected = int(number_before) + 1 if book == book_before else 1
    if int(number) != expected:
        raise ValueError(
            f"after {before or 'the heading'} chapter {expected} of {book} was expected, but not {chapter}."
        )
