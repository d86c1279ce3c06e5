"""Bootstrap intervals: how far a number would move if the prompts, items or texts were drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

BLOCK = 2**22  # numbers gathered at once


class Interval(NamedTuple):
    """A statistic of all values, and the percentile interval of the same statistic of resamples."""

    estimate: Any
    low: Any
    high: Any


def bootstrap_interval(
    values: np.ndarray | Sequence[Any],
    statistic: Callable[..., Any] = np.mean,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """The percentile interval of a statistic: its (1 ± level)/2 quantiles over resamples with replacement.

    What is resampled must be independent: of several answers to each prompt, the prompts. So a row of an array, or an
    item of a list, is a whole prompt with all that belongs to it. The interval is the same for the same seed. It is
    too narrow for few values: of n, by about a factor √(1 − 1/n) for a mean, and tails are worse.

    For means over the values, and what is like them. Statistics of a *set*, such as self-BLEU, distinct-n or Zipf's
    exponent, count what occurs twice: resamples repeat texts, and the interval may not even hold the estimate. Take a
    jackknife over groups for those.

    Args:
        values: an array [N, ...], or a list of N items of any kind.
        statistic: of an array it is called as `statistic(samples, axis=1)` with samples [R, N, ...], and gives [R] or
            [R, ...]; of a list as `statistic(items)` with a list of N items, and gives a number or an array.

    Raises:
        ValueError: if there are no values, one is NaN, `resamples` is below 1, `level` is not in (0, 1), or a statistic
            of an array does not give one result for each resample.

    Source: Efron and Tibshirani 1993, chapter 13; level 0.95 means 2.5 per cent on either side.
    """
    return _interval([values], statistic, lambda one: one, seed, resamples, level)


def bootstrap_difference(
    first: np.ndarray | Sequence[Any],
    second: np.ndarray | Sequence[Any],
    statistic: Callable[..., Any] = np.mean,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """The interval of statistic(first) − statistic(second), paired: both are resampled at the same places.

    What the pairs have in common, such as a hard prompt, cancels; the interval is then narrower than that of two
    samples drawn apart. Arguments and errors are those of `bootstrap_interval`.

    Raises:
        ValueError: also if the two are not of the same length.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs need two samples of one length, but there are {len(first)} and {len(second)} values.")
    return _interval([first, second], statistic, lambda one, other: one - other, seed, resamples, level)


def _interval(
    samples: list, statistic: Callable, combine: Callable, seed: int, resamples: int, level: float
) -> Interval:
    if len(samples[0]) == 0:
        raise ValueError("there are no values to resample.")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 1 and level in (0, 1), but are {resamples} and {level}.")
    samples = [each if isinstance(each, list | tuple) else np.asarray(each) for each in samples]
    if any(isinstance(each, np.ndarray) and each.dtype.kind == "f" and np.isnan(each).any() for each in samples):
        raise ValueError("a value to resample is NaN.")
    size = len(samples[0])
    estimate = combine(*(_apply(statistic, each, np.arange(size)[None])[0] for each in samples))
    largest = max(each.size if isinstance(each, np.ndarray) else size for each in samples)
    rows = _rows(np.random.default_rng(seed), size, resamples, max(1, BLOCK // largest))
    draws = np.concatenate([combine(*(_apply(statistic, each, block) for each in samples)) for block in rows])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(*(each.item() if np.ndim(each) == 0 else each for each in (estimate, low, high)))


def _rows(rng: np.random.Generator, size: int, resamples: int, block: int) -> Iterator[np.ndarray]:
    """The places of each resample, [resamples, size], in blocks."""
    for start in range(0, resamples, block):
        yield rng.integers(0, size, (min(block, resamples - start), size))


def _apply(statistic: Callable, values: np.ndarray | Sequence[Any], rows: np.ndarray) -> np.ndarray:
    """The statistic of the values at each of the rows, [rows, ...]."""
    if not isinstance(values, np.ndarray):
        return np.asarray([statistic([values[place] for place in row]) for row in rows.tolist()], float)
    results = np.asarray(statistic(values[rows], axis=1))
    if results.shape[:1] != rows.shape[:1]:
        raise ValueError(
            f"the statistic of an array [resample, value, ...] must give one result for each of {len(rows)} resamples, "
            f"but gives the shape {list(results.shape)}."
        )
    return results
