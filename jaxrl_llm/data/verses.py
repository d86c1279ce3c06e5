"""31,079 English-Spanish sentence pairs: the King James Bible and the Reina-Valera of 1909, verse by verse.

`embedded/verses.tsv.xz` holds one pair a line: reference, English and Spanish, separated by tabs. `tools/verses.py`
made it. It is in the repository, not in the installed package.

Both texts are in the public domain (in the United Kingdom the King James Bible is printed under letters patent). They
are the electronic editions of eBible.org (King James: with the CrossWire Bible Society), from Debian's packages
`sword-text-kjv` 14.3 and `sword-text-sparv` 2.60.
"""

from __future__ import annotations

import importlib.resources
import lzma
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FILE = importlib.resources.files("jaxrl_llm.data") / "embedded" / "verses.tsv.xz"


class VersePair(NamedTuple):
    """A verse, or a few adjacent verses, in both languages, with the number of the King James Bible."""

    reference: str  # "Gen 1:1", "Num 13:32-33"
    english: str
    spanish: str

    @property
    def chapter(self) -> str:
        """Return the chapter, such as "Gen 1"."""
        return self.reference.partition(":")[0]


class Split(NamedTuple):
    """Training, validation and test pairs. No chapter is in two of them."""

    train: list[VersePair]
    validation: list[VersePair]
    test: list[VersePair]


def load() -> list[VersePair]:
    """Return all pairs in the order of the Bible.

    Raises:
        FileNotFoundError: outside a clone of the repository.
    """
    if not FILE.is_file():
        raise FileNotFoundError("verses.tsv.xz is not in the installed package: a clone of the repository has it.")
    return unpack(FILE.read_bytes())


def split(pairs: Sequence[VersePair], *, held_out: int = 800, seed: int = 0) -> Split:
    """Draw whole chapters until validation and test have `held_out` pairs each; the others are for training.

    Verses of a chapter share their words, so chapters are not divided. A repeated verse, such as "And the LORD spake
    unto Moses, saying,", is left out of validation and test if either side of it is in the training part.

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
        raise ValueError(
            f"held_out must leave pairs to train on, but two parts of {held_out} leave none of {len(pairs)}."
        )
    remaining = set(order)
    train = [pair for pair in pairs if pair.chapter in remaining]
    english, spanish = {pair.english for pair in train}, {pair.spanish for pair in train}
    new = [pair for pair in pairs if pair.english not in english and pair.spanish not in spanish]
    return Split(train, *([pair for pair in new if pair.chapter in part] for part in parts))


def unpack(data: bytes) -> list[VersePair]:
    """Return the pairs of xz-compressed lines, one pair a line, its fields separated by tabs."""
    lines = lzma.decompress(data).decode("utf-8").removesuffix("\n").split("\n")
    return [VersePair(*line.split("\t")) for line in lines if line]


def _drawn(order: list[str], chapters: dict[str, list[VersePair]], size: int) -> set[str]:
    """Take chapters off the end of `order` until they have `size` pairs."""
    drawn, pairs = set(), 0
    while order and pairs < size:
        chapter = order.pop()
        drawn.add(chapter)
        pairs += len(chapters[chapter])
    return drawn
