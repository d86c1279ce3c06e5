"""Passages of well-known works in the public domain: a prompt, and the human text that follows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm import text


class Passage(NamedTuple):
    """The beginning of a work, or of a part of it."""

    author: str
    title: str
    text: str


PASSAGES = tuple(Passage(**row) for row in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")))
# Authors in the corpus of tiny-gpt2; some of these passages may be in its held-out part.
IN_CORPUS = ("King James Bible", "John Milton", "William Shakespeare")


def chosen(count: int) -> tuple[Passage, ...]:
    """Return `count` passages, equally spaced in the list."""
    places = np.linspace(0, len(PASSAGES) - 1, count).round().astype(int)
    return tuple(PASSAGES[place] for place in places)


def first_tokens(tokenizer: Any, passages: tuple[Passage, ...], count: int) -> np.ndarray:
    """Return the first tokens of each passage, [passage, time].

    Raises:
        ValueError: if a passage has fewer.
    """
    tokens = [text.encode(tokenizer, passage.text) for passage in passages]
    short = [passage.title for passage, row in zip(passages, tokens, strict=True) if len(row) < count]
    if short:
        raise ValueError(f"passages must have at least {count} tokens, but these have fewer: {', '.join(short)}.")
    return np.asarray([row[:count] for row in tokens], np.int32)
