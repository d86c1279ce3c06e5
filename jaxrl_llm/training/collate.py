"""From records to tokens, and from those of many records to batches of their kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, PyTree

from jaxrl_llm import text
from jaxrl_llm.data.encoding import Encoder
from jaxrl_llm.data.records import Demonstration, Judged, Preference, Prompt, Ranked
from jaxrl_llm.scoring import Sequences, pad_completions
from jaxrl_llm.training.preference import JudgedBatch, PairBatch
from jaxrl_llm.training.reward import RankedBatch
from jaxrl_llm.training.rollout import Prompts

Length = TypeVar("Length", int, Int[np.ndarray, "batch"])


class Rows(NamedTuple):
    """A record as tokens: a prompt, its answers, and what is said of them."""

    prompt: list[int]
    answers: list[list[int]]
    said: Any = None
    mismatched: int | None = None  # if judged: how long the prompt with the answer to another one may be

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of its sequences: the prompt with each answer, or the prompt alone."""
        return [len(self.prompt) + len(answer) for answer in self.answers or [[]]]

    @property
    def length(self) -> int:
        """Tokens of the longest of its sequences."""
        return max(self.lengths)

    @property
    def highest(self) -> int:
        """The largest id of its tokens."""
        return max(max(each, default=0) for each in (self.prompt, *self.answers))


def encoder_of(encoder: Encoder, *, room: int = 0) -> Callable[[Any], Rows]:
    """From a record of any kind to its tokens.

    Args:
        room: tokens that a prompt alone has to leave for its answer.
    """

    def encode(record: Any) -> Rows:
        match record:
            case Prompt():
                return Rows(encoder.prompt(record.prompt, room=room), [])
            case Demonstration():
                return Rows(*encoder(record.prompt, [record.answer]))
            case Judged():
                return Rows(*encoder(record.prompt, [record.answer]), record.good, encoder.max_length)
            case Preference():
                return _ranked_rows(encoder, record.ranked())._replace(said=None)
            case Ranked():
                return _ranked_rows(encoder, record)
        raise ValueError(f"{type(record).__name__} is no record.")

    return encode


def _ranked_rows(encoder: Encoder, record: Ranked) -> Rows:
    """A ranking as tokens, in which answers of different ranks are still different."""
    rows = Rows(*encoder(record.prompt, record.answers), record.ranks)
    for first, second in itertools.combinations(range(len(rows.answers)), 2):
        if rows.answers[first] == rows.answers[second] and record.ranks[first] != record.ranks[second]:
            raise ValueError(
                f"answers {first + 1} and {second + 1} are the same in rows of {encoder.max_length} tokens or fewer."
            )
    return rows


def prompts(rows: list[Rows], multiple: int) -> Prompts:
    """Prompts, padded on the left."""
    tokens, mask = text.left_pad([row.prompt for row in rows])
    padding = ((0, 0), (rounded(tokens.shape[1], multiple) - tokens.shape[1], 0))
    return Prompts(np.pad(tokens, padding), np.pad(mask, padding))


def demonstrations(rows: list[Rows], multiple: int) -> Sequences:
    """Prompts with the one answer to each."""
    return pad_completions([row.prompt for row in rows], [row.answers[0] for row in rows], multiple=multiple)


def preferences(rows: list[Rows], multiple: int) -> PairBatch:
    """Chosen and rejected answers."""
    return PairBatch(
        *_of_one_length(rows, *([row.answers[side] for row in rows] for side in (0, 1)), multiple=multiple)
    )


def judged(rows: list[Rows], multiple: int) -> JudgedBatch:
    """Good and bad answers, and each prompt with the answer to the one before.

    That one ends where no row may be longer, if it does not fit: what padding the other rows need is nothing to it.
    """
    answers = [row.answers[0] for row in rows]
    others = [
        answer if row.mismatched is None else answer[: row.mismatched - len(row.prompt)]
        for row, answer in zip(rows, [answers[-1], *answers[:-1]], strict=True)
    ]
    shown, mismatched = _of_one_length(rows, answers, others, multiple=multiple)
    return JudgedBatch(shown, np.asarray([row.said for row in rows], bool), mismatched)


def ranked(rows: list[Rows], multiple: int) -> RankedBatch:
    """K answers to each prompt, K that of the longest ranking; the places that are left repeat the first answer."""
    most = max(len(row.answers) for row in rows)
    filled = [[*row.answers, *[row.answers[0]] * (most - len(row.answers))] for row in rows]
    asked = [row.prompt for row in rows for _ in range(most)]
    flat = pad_completions(asked, [each for row in filled for each in row], multiple=multiple)
    answers = Sequences(*(leaf.reshape(len(rows), most, -1) for leaf in flat))
    ranks = np.asarray([[*row.said, *[0] * (most - len(row.said))] for row in rows], np.int32)
    real = np.asarray([[place < len(row.answers) for place in range(most)] for row in rows])
    return RankedBatch(answers, ranks, real)


COLLATE: dict[str, Callable[[list[Rows], int], PyTree]] = {
    "prompts": prompts,
    "demonstrations": demonstrations,
    "preferences": preferences,
    "judged": judged,
    "ranked": ranked,
}


def _of_one_length(rows: list[Rows], *sides: list[list[int]], multiple: int) -> list[Sequences]:
    """The same prompts with several answers each, padded to what the longest of all needs."""
    asked = [row.prompt for row in rows]
    longest = max(len(prompt) + len(answer) for side in sides for prompt, answer in zip(asked, side, strict=True))
    return [pad_completions(asked, side, multiple=multiple, length=longest) for side in sides]


def rounded(length: Length, multiple: int) -> Length:
    """The next multiple of it, for a length or an array of them."""
    return -(-length // multiple) * multiple
