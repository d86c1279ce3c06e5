"""Which rows are in which batch: a function of the seed and the step alone, so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


class EpochOrder:
    """Batches of rows of like length, every row at most once an epoch.

    Each epoch is shuffled and cut into pools of `pool` batches, a pool is sorted by length, and the batches are
    shuffled. Where `batch_size` does not divide the rows, each epoch leaves out some, which chance chooses.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows of a batch.

    Raises:
        ValueError: unless there are as many rows as a batch has.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, pool: int = 16, unit: str = "rows"):
        if not 0 < batch_size <= len(lengths):
            raise ValueError(f"batch_size must be from 1 to the {len(lengths)} {unit}, but is {batch_size}.")
        self._lengths, self._batch_size = np.asarray(lengths), batch_size
        self._seed, self._pool = seed, pool
        self._epoch, self._order = -1, np.zeros((0, batch_size), int)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch; the rows that are left over are not in it."""
        return len(self._lengths) // self._batch_size

    @property
    def left_over(self) -> int:
        """Rows that each epoch leaves out, less than a batch of them."""
        return len(self._lengths) % self._batch_size

    def __call__(self, step: int) -> Int[np.ndarray, "batch"]:
        """Which rows are in the batch of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.epoch(epoch)
        return self._order[place]

    def epoch(self, number: int) -> Int[np.ndarray, "step batch"]:
        """Which rows are in the batches of an epoch, counted from 0."""
        return self._shuffled(np.random.default_rng([self._seed, number]))

    def _shuffled(self, rng: np.random.Generator) -> Int[np.ndarray, "step batch"]:
        order = rng.permutation(len(self._lengths))[: self.steps_per_epoch * self._batch_size]
        size = self._pool * self._batch_size
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        pools = [pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools]
        return rng.permutation(np.concatenate(pools).reshape(-1, self._batch_size))
