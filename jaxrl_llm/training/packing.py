"""Packing: several texts in each row, so that little of a batch is padding (Krell et al. 2021).

The texts of a packed row do not see one another (`LanguageModel`, `segments`): losses and gradients are those of rows
with one text each. A bin is what a batch counts: one row, or of preferences and rankings as many rows as a record has
completions, so that a record is never split over two batches or microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, PyTree

from jaxrl_llm.scoring import Packed
from jaxrl_llm.training.batches import Batches, Rows
from jaxrl_llm.training.preference import PackedPairs
from jaxrl_llm.training.reward_model import RankedBatch

LENGTH = 1024  # tokens of a packed row, if no other number is asked for and all examples fit
CHUNK = 1024  # records that are packed together: more fill bins no better and take longer


class Placed(NamedTuple):
    """A record in a bin, and the row of the bin that each of its texts is in."""

    record: int
    rows: tuple[int, ...]


Bin = list[Placed]


def pack(lengths: Sequence[Sequence[int]], *, length: int, seed: int) -> list[Bin]:
    """Pack records into bins, every record into one: best fit, the longest records first (Johnson 1973).

    A bin has as many rows as a record has texts at most. Records are shuffled and packed by chunks of `CHUNK`.

    Args:
        lengths: tokens of the texts of each record, such as of the chosen and the rejected one.
        length: tokens of a row.

    Raises:
        ValueError: if a text is longer than a row.
    """
    longest = max(map(max, lengths))
    if longest > length:
        raise ValueError(f"length must be at least the {longest} tokens of the longest text, but is {length}.")
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows, bins = max(map(len, lengths)), []
    for start in range(0, len(order), CHUNK):
        chunk = sorted(order[start : start + CHUNK], key=lambda record: -sum(lengths[record]))
        free, opened = np.full((len(chunk), rows), length), []
        for record in chunk:
            place, at = _best_fit(free[: len(opened) + 1], lengths[record])  # the last one is empty
            if place == len(opened):
                opened.append([])
            opened[place].append(Placed(record, at))
            np.subtract.at(free[place], list(at), lengths[record])
        bins += opened
    return bins


def _best_fit(free: Int[np.ndarray, "bins rows"], sizes: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return the fullest bin that takes all texts, and the row for each: the fullest that takes it, longest first."""
    left, never = free.copy(), np.iinfo(free.dtype).max
    fits, at = np.ones(len(free), bool), np.zeros((len(sizes), len(free)), int)
    for text in sorted(range(len(sizes)), key=lambda text: -sizes[text]):
        room = np.where(left >= sizes[text], left, never)
        at[text] = room.argmin(axis=1)
        fits &= room.min(axis=1) < never
        left[np.arange(len(free)), at[text]] -= sizes[text]
    best = int(np.where(fits, free.sum(axis=1), never).argmin())
    return best, tuple(at[:, best].tolist())


class PackedOrder:
    """Batches of bins, every record exactly once an epoch, as a function of seed and step alone.

    Records are packed once. Each epoch shuffles the bins and deals them out to as few steps as batches of `batch_size`
    allow, evenly: if it does not divide them, some batches have fewer, and empty bins in their place.

    Raises:
        ValueError: as `pack`, or if there are fewer bins than a batch has.
    """

    left_over = 0  # records that an epoch leaves out

    def __init__(self, lengths: Sequence[Sequence[int]], *, length: int, batch_size: int, seed: int):
        self.all = pack(lengths, length=length, seed=seed)
        self.rows = max(map(len, lengths))  # of a bin
        if not 0 < batch_size <= len(self.all):
            bins = f"{f'bins of {self.rows} ' if self.rows > 1 else ''}rows of {length} tokens"
            raise ValueError(
                f"batch_size must be from 1 to {len(self.all)}, the {bins} that the packed records fill, "
                f"but is {batch_size}."
            )
        self._seed, self._batch_size = seed, batch_size
        self._epoch, self._steps = -1, []

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.all) // self._batch_size)

    def __call__(self, step: int) -> list[Bin]:
        """Return the bins of the batch of a step; at most `batch_size`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self.epoch(epoch)
        return self._steps[place]

    def epoch(self, number: int) -> list[list[Bin]]:
        """Return the bins of all batches of an epoch, counted from 0."""
        order = np.random.default_rng([self._seed, number]).permutation(len(self.all))
        return [[self.all[place] for place in part] for part in np.array_split(order, self.steps_per_epoch)]


class PackedBatches:
    """A data loader of packed batches: `batches(step)` is the batch of a step, always of one shape.

    Args:
        batches: the records, one a row; its own order is not used.
        kind: their format, one of `KINDS`.
        length: tokens of a row; None takes `LENGTH`, or the longest text if that is longer.
        batch_size: bins of a batch.

    Raises:
        ValueError: for a format that cannot be packed, or as `PackedOrder`.
    """

    def __init__(self, batches: Batches, kind: str, *, length: int | None, batch_size: int, seed: int):
        if kind not in COLLATE:
            raise ValueError(
                f"packing must be False for data of the format {kind}: {', '.join(COLLATE)} can be packed."
            )
        self._batches, self._collate, self._batch_size = batches, COLLATE[kind], batch_size
        self._lengths = [batches.rows(place).lengths for place in range(len(batches))]
        self.length = max(LENGTH, *map(max, self._lengths)) if length is None else length
        self.order = PackedOrder(self._lengths, length=self.length, batch_size=batch_size, seed=seed)
        self._most = max(map(len, self.order.all))  # records of a bin
        self._tokens = np.zeros(1, int)  # of the first n steps, as far as they were asked for
        self.rows = batches.rows

    def __call__(self, step: int) -> PyTree:
        """Return the batch of a step."""
        bins = self.order(step)
        bins = [*bins, *[[]] * (self._batch_size - len(bins))]
        rows = [[self._batches.rows(each.record) for each in each_bin] for each_bin in bins]
        packed = packed_rows(bins, rows, count=self.order.rows, length=self.length, most=self._most)
        return self._collate(rows, packed, self._most, self._batches.fields)

    def describe(self, step: int) -> str:
        """Return the lines or rows of the records of a step's batch, in words; of many, the first ones."""
        places = [each.record for each_bin in self.order(step) for each in each_bin]
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        return self._batches.named(places[:NAMED]) + more

    def tokens(self, steps: int) -> int:
        """Return the number of real tokens of the first n steps, in all their texts."""
        while steps >= len(self._tokens):
            epoch = self.order.epoch((len(self._tokens) - 1) // self.order.steps_per_epoch)
            real = [sum(sum(self._lengths[each.record]) for one in bins for each in one) for bins in epoch]
            self._tokens = np.concatenate([self._tokens, self._tokens[-1] + np.cumsum(real)])
        return int(self._tokens[steps])

    @property
    def pad_waste(self) -> float:
        """The share of places that are padding, those of empty bins included."""
        places = self.order.steps_per_epoch * self._batch_size * self.order.rows * self.length
        return 1 - sum(map(sum, self._lengths)) / places


NAMED = 8  # records of a batch that an error names


# From bins to arrays --------------------------------------------------------------------------------------------------


def packed_rows(bins: Sequence[Bin], rows: Sequence[Sequence[Rows]], *, count: int, length: int, most: int) -> Packed:
    """Return the texts of bins as arrays [bins, count, length]; text k of a bin's record j has the number j count + k.

    Padding ends each row, with the number of no text, most · count.
    """
    shape = (len(bins), count, length)
    tokens, segments = np.zeros(shape, np.int32), np.full(shape, most * count, np.int32)
    mask, scored = np.zeros(shape, bool), np.zeros(shape, bool)
    for place, (each_bin, records) in enumerate(zip(bins, rows, strict=True)):
        ends = [0] * count
        for number, (placed, record) in enumerate(zip(each_bin, records, strict=True)):
            for text, (row, completion) in enumerate(zip(placed.rows, record.completions, strict=True)):
                start, begins = ends[row], ends[row] + len(record.prompt)
                ends[row] = begins + len(completion)
                at = np.s_[place, row, start : ends[row]]
                tokens[at], mask[at] = [*record.prompt, *completion], True
                segments[at], scored[place, row, begins : ends[row]] = number * count + text, True
    return Packed(tokens, mask, scored, segments)


def _completions(rows: Sequence[Sequence[Rows]], packed: Packed, most: int, fields: set[str]) -> Packed:
    return Packed(*(leaf[:, 0] for leaf in packed))


def _pairs(rows: Sequence[Sequence[Rows]], packed: Packed, most: int, fields: set[str]) -> PackedPairs:
    weight = np.asarray([[place < len(records) for place in range(most)] for records in rows], np.float32)
    columns = {name: np.full(weight.shape, rows[0][0].fields[name], np.float32) for name in sorted(fields)}
    for name, column in columns.items():  # free places hold a number that the loss may have anyway
        column[weight > 0] = [each.fields[name] for records in rows for each in records]
    return PackedPairs(packed, weight, fields=columns)


def _ranked(rows: Sequence[Sequence[Rows]], packed: Packed, most: int, fields: set[str]) -> RankedBatch:
    shape = (len(rows), most, packed.tokens.shape[1])
    ranks, real = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for place, records in enumerate(rows):
        for number, record in enumerate(records):
            ranks[place, number, : len(record.label)] = record.label
            real[place, number, : len(record.completions)] = True
    return RankedBatch(packed, ranks, real)


COLLATE = {"prompt-completion": _completions, "preference": _pairs, "ranked": _ranked}
