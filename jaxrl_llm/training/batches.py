"""Batches of every kind of record, in an order that depends on seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int, PyTree

from jaxrl_llm.data.jsonl import JsonLines
from jaxrl_llm.data.order import EpochOrder
from jaxrl_llm.training.collate import COLLATE, Rows, encoder_of, rounded

__all__ = ["COLLATE", "Batches", "Rows", "encoder_of"]
Record = TypeVar("Record")


class Batches:
    """`batches(step)` is the batch of a step: encoded when asked for, padded to a multiple, of rows of like length.

    Args:
        records: a list, or `JsonLines`.
        encode: from a record to its tokens; see `encoder_of`.
        collate: from rows and the multiple to a batch; see `COLLATE`.
        multiple: padded lengths are multiples of it, so that few programs serve all batches.
        vocab_size: the model's; with it, a token that the model does not have is refused.

    `order.left_over` is how many records each epoch leaves out.

    Raises:
        ValueError: for a record that cannot be encoded or whose tokens the model lacks, naming its line; or a batch
            size that does not fit.
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
        vocab_size: int | None = None,
    ):
        self._records, self._encode, self._collate = records, encode, collate
        self._multiple, self._vocab_size = multiple, vocab_size
        self._mismatched = None
        sizes = np.asarray([self._size(self.rows(place)) for place in range(len(records))], int).reshape(-1, 4)
        self._prompts, self._longest, self._sequences, self._real = sizes.T
        self.order = EpochOrder(self._longest, batch_size=batch_size, seed=seed, unit="records")
        self._tokens = np.zeros(1, int)  # of the first so many steps, as far as they were asked for

    def __call__(self, step: int) -> PyTree:
        """The batch of a step."""
        return self._collate([self.rows(place) for place in self.order(step)], self._multiple)

    def records(self, step: int) -> list[Record]:
        """The records of a step's batch, row by row.

        Of prompts they hold what else stands in their lines, such as a known solution, for a function of rewards:
        `rewards.of_text(function, tokenizer, fields=[record.fields for record in batches.records(step)])`.
        """
        return [self._records[place] for place in self.order(step)]

    def describe(self, step: int) -> str:
        """Which records are in the batch of a step: the lines they stand in, or their places in a list from 1."""
        return self._named(self.order(step))

    def tokens(self, steps: int) -> int:
        """Real tokens of the first so many steps, in all their sequences."""
        while steps >= len(self._tokens):
            epoch = (len(self._tokens) - 1) // self.order.steps_per_epoch
            real, _ = self._counts(self.order.epoch(epoch))
            self._tokens = np.concatenate([self._tokens, self._tokens[-1] + np.cumsum(real)])
        return int(self._tokens[steps])

    @property
    def pad_waste(self) -> float:
        """The share of places that are padding in the first epoch; those that a ranking has no answer for are, too."""
        real, places = self._counts(self.order.epoch(0))
        return float(1 - real.sum() / places.sum())

    def _size(self, rows: Rows) -> tuple[int, int, int, int]:
        """Tokens of the prompt and of the longest sequence, the number of sequences, and the tokens of all of them."""
        self._mismatched = rows.mismatched
        return len(rows.prompt), rows.length, len(rows.lengths), sum(rows.lengths)

    def _counts(self, places: Int[np.ndarray, "step batch"]) -> tuple[Int[np.ndarray, "step"], Int[np.ndarray, "step"]]:
        """Real tokens of batches, and the places they take."""
        prompts, longest = self._prompts[places], self._longest[places]
        real, length, sequences = self._real[places].sum(axis=1), longest, self._sequences[places].max(axis=1)
        if self._mismatched is not None:
            others = np.minimum(prompts + np.roll(longest - prompts, 1, axis=1), self._mismatched)
            real, length, sequences = real + others.sum(axis=1), np.maximum(length, others), 2
        return real, rounded(length.max(axis=1), self._multiple) * sequences * places.shape[1]

    def rows(self, place: Int[np.ndarray, ""] | int) -> Rows:
        """A record as tokens."""
        place = int(place)
        try:
            rows = self._encode(self._records[place])
            if self._vocab_size is not None and rows.highest >= self._vocab_size:
                raise ValueError(f"the tokenizer writes token {rows.highest}, but the model has {self._vocab_size}.")
        except ValueError as error:
            raise ValueError(f"{self._named([place])}: {error}") from error
        return rows

    def _named(self, places: Sequence[int]) -> str:
        many = "s" if len(places) > 1 else ""
        if isinstance(self._records, JsonLines):
            lines = ", ".join(str(self._records.line(int(place))) for place in places)
            return f"record{many} of line{many} {lines}"
        return f"record{many} {', '.join(str(place + 1) for place in places)}"
