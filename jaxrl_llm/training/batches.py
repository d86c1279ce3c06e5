"""Batches of every kind of record, in an order that depends on seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, PyTree

from jaxrl_llm import text
from jaxrl_llm.data.encoding import Encoder
from jaxrl_llm.data.order import EpochOrder
from jaxrl_llm.data.records import Demonstration, Judged, Preference, Prompt, Ranked
from jaxrl_llm.training.preference import JudgedBatch, PairBatch
from jaxrl_llm.training.reward import RankedBatch
from jaxrl_llm.training.rollout import Prompts
from jaxrl_llm.training.sequences import Sequences, pad_answers, rows_of

Record = TypeVar("Record")


class Rows(NamedTuple):
    """A record as tokens: a prompt, its answers, and what is said of them."""

    prompt: list[int]
    answers: list[list[int]]
    said: Any = None

    @property
    def length(self) -> int:
        """Tokens of the longest of its sequences."""
        return len(self.prompt) + max(map(len, self.answers), default=0)


class Batches:
    """`batches(step)` is the batch of a step: encoded when asked for, padded to a multiple, of rows of like length.

    Args:
        records: a list, or `JsonLines`.
        encode: from a record to its tokens; see `encoder_of`.
        collate: from rows and a length to a batch; see `COLLATE`.
        multiple: padded lengths are multiples of it, so that few programs serve all batches.

    `pad_waste` is the share of places that are padding; `tokens(steps)` how many real ones the first steps hold.

    Raises:
        ValueError: for a record that cannot be encoded, naming its place, or a batch size that does not fit.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encode: Callable[[Record], Rows],
        collate: Callable[[list[Rows], int], PyTree],
        *,
        batch_size: int,
        seed: int,
        multiple: int = 32,
        most: int | None = None,
    ):
        self._records, self._encode, self._collate = records, encode, collate
        self._multiple, self._most = multiple, most
        self._lengths = np.asarray([self.rows(place).length for place in range(len(records))])
        self.order = EpochOrder(self._lengths, batch_size=batch_size, seed=seed, unit="records")

    def __call__(self, step: int) -> PyTree:
        """The batch of a step."""
        rows = [self.rows(place) for place in self.order(step)]
        length = -(-max(row.length for row in rows) // self._multiple) * self._multiple
        return self._collate(rows, length if self._most is None else min(length, self._most))

    def records(self, step: int) -> list[Record]:
        """The records of a step's batch."""
        return [self._records[place] for place in self.order(step)]

    def describe(self, step: int) -> str:
        """Which records are in the batch of a step, counted from 1."""
        return "records " + ", ".join(str(place + 1) for place in self.order(step))

    def tokens(self, steps: int) -> int:
        """Real tokens of the first so many steps."""
        whole, rest = divmod(steps, self.order.steps_per_epoch)
        epoch = sum(int(self._lengths[self.order(step)].sum()) for step in range(self.order.steps_per_epoch))
        return whole * epoch + sum(int(self._lengths[self.order(step)].sum()) for step in range(rest))

    @property
    def pad_waste(self) -> float:
        """The share of places that are padding, in the first epoch."""
        return self.order.pad_waste(multiple=self._multiple)

    def rows(self, place: Int[np.ndarray, ""] | int) -> Rows:
        """A record as tokens."""
        try:
            return self._encode(self._records[int(place)])
        except ValueError as error:
            raise ValueError(f"record {int(place) + 1}: {error}") from error


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
                return Rows(*encoder(record.prompt, [record.answer]), record.good)
            case Preference():
                return Rows(*encoder(record.prompt, [record.chosen, record.rejected]))
            case Ranked():
                return Rows(*encoder(record.prompt, record.answers), record.ranks)
        raise ValueError(f"{type(record).__name__} is no record.")

    return encode


def prompts(rows: list[Rows], length: int) -> Prompts:
    """Prompts, padded on the left."""
    tokens, mask = text.left_pad([row.prompt for row in rows])
    padding = ((0, 0), (length - tokens.shape[1], 0))
    return Prompts(np.pad(tokens, padding), np.pad(mask, padding))


def demonstrations(rows: list[Rows], length: int) -> Sequences:
    """Prompts with the one answer to each."""
    return _padded([row.prompt for row in rows], [row.answers[0] for row in rows], length)


def preferences(rows: list[Rows], length: int) -> PairBatch:
    """Chosen and rejected answers."""
    asked = [row.prompt for row in rows]
    return PairBatch(*(_padded(asked, [row.answers[side] for row in rows], length) for side in (0, 1)))


def judged(rows: list[Rows], length: int) -> JudgedBatch:
    """Good and bad answers, and each prompt with the answer to the one before, cut where it does not fit."""
    asked, answers = [row.prompt for row in rows], [row.answers[0] for row in rows]
    others = [answer[: length - len(prompt)] for prompt, answer in zip(asked, [answers[-1], *answers], strict=False)]
    good = np.asarray([row.said for row in rows], bool)
    return JudgedBatch(_padded(asked, answers, length), good, _padded(asked, others, length))


def ranked(rows: list[Rows], length: int) -> RankedBatch:
    """K answers to each prompt, K that of the longest ranking; the places that are left repeat the first answer."""
    most = max(len(row.answers) for row in rows)
    filled = [[*row.answers, *[row.answers[0]] * (most - len(row.answers))] for row in rows]
    flat = _padded([row.prompt for row in rows for _ in range(most)], [each for row in filled for each in row], length)
    answers = Sequences(*(leaf.reshape(len(rows), most, length) for leaf in rows_of(flat)))
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


def _padded(asked: list[list[int]], answers: list[list[int]], length: int) -> Sequences:
    return pad_answers(asked, answers, length=length)
