"""31,079 English-Spanish sentence pairs: the King James Bible and the Reina-Valera of 1909, verse by verse.

    python -m jaxrl_llm.data.verses

fetches both texts with apt-get and writes `embedded/verses.tsv.xz` in this folder, one pair a line: reference, English
and Spanish, separated by tabs. It is part of the package, so that nobody else needs Debian, a network or this command.

Both texts are in the public domain (in the United Kingdom the King James Bible is printed under letters patent). They
are the electronic editions of eBible.org (King James: with the CrossWire Bible Society), from Debian's packages
`sword-text-kjv` 14.3 and `sword-text-sparv` 2.60. `verse_alignment` says what was done to them.
"""

from __future__ import annotations

import importlib.resources
import lzma
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl_llm.data import packages, sword
from jaxrl_llm.data.verse_alignment import VersePair, align, plain_verse, without_initial_capitals

FILE = importlib.resources.files("jaxrl_llm.data") / "embedded" / "verses.tsv.xz"


class Split(NamedTuple):
    """Pairs to train on, to choose by and to report on. No chapter is in two of them."""

    train: list[VersePair]
    validation: list[VersePair]
    test: list[VersePair]


def load() -> list[VersePair]:
    """All pairs, in the order of the Bible."""
    return unpack(FILE.read_bytes())


def split(pairs: Sequence[VersePair], *, held_out: int = 800, seed: int = 0) -> Split:
    """Whole chapters, drawn at random until validation and test have `held_out` pairs each; the rest is for training.

    Verses of one chapter tell one story in the same words, so they stay together. What is said again elsewhere, such as
    "And the LORD spake unto Moses, saying,", is left out of validation and test if either side of it stands in the
    training part, and belongs then to none.

    Raises:
        ValueError: if `held_out` is below 1, or so large that no chapter would be left to train on.
    """
    if held_out < 1:
        raise ValueError(f"held_out must be at least 1, but is {held_out}.")
    chapters: dict[str, list[VersePair]] = {}
    for pair in pairs:
        chapters.setdefault(pair.chapter, []).append(pair)
    names = list(chapters)
    order = [names[place] for place in np.random.default_rng(seed).permutation(len(names))]
    parts = [_drawn(order, chapters, held_out) for _ in range(2)]
    if not order:
        raise ValueError(f"two parts of {held_out} pairs leave none of {len(pairs)} to train on.")
    remaining = set(order)
    train = [pair for pair in pairs if pair.chapter in remaining]
    english, spanish = {pair.english for pair in train}, {pair.spanish for pair in train}
    new = [pair for pair in pairs if pair.english not in english and pair.spanish not in spanish]
    return Split(train, *([pair for pair in new if pair.chapter in part] for part in parts))


def pack(pairs: Sequence[VersePair]) -> bytes:
    """The pairs as xz-compressed lines; the same bytes for the same pairs.

    Raises:
        ValueError: if a field has a tab or a line break in it.
    """
    for pair in pairs:
        if any(set(field) & set("\t\n\r") for field in pair):
            raise ValueError(f"{pair.reference} has a tab or a line break in it.")
    text = "".join("\t".join(pair) + "\n" for pair in pairs)
    return lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)


def unpack(data: bytes) -> list[VersePair]:
    """What `pack` was given."""
    lines = lzma.decompress(data).decode("utf-8").removesuffix("\n").split("\n")
    return [VersePair(*line.split("\t")) for line in lines if line]


def read_packages(english: Path, spanish: Path) -> list[VersePair]:
    """The aligned pairs of the two unpacked Debian packages."""
    ours, theirs = (
        {place: plain_verse(markup) for place, markup in sword.read_verses(folder).items()}
        for folder in (english, spanish)
    )
    return align(ours, without_initial_capitals(theirs))


def fetch(out: Path) -> list[VersePair]:
    """Fetch both packages, write the file `out` (atomically) and return the pairs."""
    with tempfile.TemporaryDirectory() as scratch:
        names = ("sword-text-kjv", "sword-text-sparv")
        pairs = read_packages(*(packages.fetch_debian(name, Path(scratch) / name) for name in names))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_bytes(pack(pairs))
    os.replace(partial, out)
    return pairs


def _drawn(order: list[str], chapters: dict[str, list[VersePair]], size: int) -> set[str]:
    """Chapters off the end of `order` until they have `size` pairs."""
    drawn, pairs = set(), 0
    while order and pairs < size:
        chapter = order.pop()
        drawn.add(chapter)
        pairs += len(chapters[chapter])
    return drawn


if __name__ == "__main__":
    import tyro

    def main(out: Path = Path(str(FILE))) -> None:
        """Fetch and align the verse pairs.

        Args:
            out: The file to write.
        """
        pairs = fetch(out)
        print(f"wrote {len(pairs):,} pairs to {out}, {out.stat().st_size:,} bytes")

    tyro.cli(main)
