"""Bootstrap intervals: the variability of a statistic when prompts, items or texts are resampled.

Those of corpus BLEU and chrF resample sentences (Koehn 2004). The n-grams of each sentence are counted once, and the
score of a resample is computed from the summed counts of its sentences: it is the score of a corpus, not a mean over
sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxrl_llm.analysis import bleu, chrf

BLOCK = 2**22  # numbers that are gathered at once


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
    """Compute the percentile interval of a statistic: its (1 ± level)/2 quantiles over resamples with replacement.

    The resampled units must be independent. With several completions a prompt the unit is the prompt, so a row of an
    array, or an item of a list, is a prompt with all its completions. Equal seeds give equal intervals. With few values
    n the interval is too narrow: for a mean by a factor of about √(1 − 1/n), and for tails by more.

    It is valid for means and similar statistics. Statistics of a *set* that count repetitions, such as self-BLEU,
    distinct-n or Zipf's exponent, are biased by resampling, for resamples repeat texts: the interval may not even
    contain the estimate. Use a jackknife over groups for those.

    Args:
        values: an array [N, ...], or a list of N items of any kind.
        statistic: for an array `statistic(samples, axis=1)` of samples [R, N, ...], which returns [R] or [R, ...]; for
            a list `statistic(items)` of a list of N items, which returns a number or an array.

    Raises:
        ValueError: if there are no values, one is NaN, `resamples` is below 1, `level` is not in (0, 1), or a statistic
            of an array does not return one result for each resample.

    Source: Efron and Tibshirani 1993, chapter 13.
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
    """Compute the paired interval of statistic(first) − statistic(second): both are resampled at the same indices.

    Variation that the pairs share, such as the difficulty of a prompt, cancels, so that the interval is narrower than
    one of independent samples. Arguments and errors are those of `bootstrap_interval`.

    Raises:
        ValueError: also if the two differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"paired samples must have one length, but have {len(first)} and {len(second)} values.")
    return _interval([first, second], statistic, lambda one, other: one - other, seed, resamples, level)


def _interval(
    samples: list, statistic: Callable, combine: Callable, seed: int, resamples: int, level: float
) -> Interval:
    if len(samples[0]) == 0:
        raise ValueError("there must be values to resample, but there are none.")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 1 and level in (0, 1), but are {resamples} and {level}.")
    samples = [each if isinstance(each, list | tuple) else np.asarray(each) for each in samples]
    if any(isinstance(each, np.ndarray) and each.dtype.kind == "f" and np.isnan(each).any() for each in samples):
        raise ValueError("values to resample must not be NaN, but one is.")
    size = len(samples[0])
    estimate = combine(*(_apply(statistic, each, np.arange(size)[None])[0] for each in samples))
    largest = max(each.size if isinstance(each, np.ndarray) else size for each in samples)
    rows = _rows(np.random.default_rng(seed), size, resamples, max(1, BLOCK // largest))
    draws = np.concatenate([combine(*(_apply(statistic, each, block) for each in samples)) for block in rows])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(*(each.item() if np.ndim(each) == 0 else each for each in (estimate, low, high)))


def _rows(rng: np.random.Generator, size: int, resamples: int, block: int) -> Iterator[np.ndarray]:
    """Yield the indices of each resample, [resamples, size], in blocks."""
    for start in range(0, resamples, block):
        yield rng.integers(0, size, (min(block, resamples - start), size))


def _apply(statistic: Callable, values: np.ndarray | Sequence[Any], rows: np.ndarray) -> np.ndarray:
    """Return the statistic of the values at each row of indices, [rows, ...]."""
    if not isinstance(values, np.ndarray):
        return np.asarray([statistic([values[place] for place in row]) for row in rows.tolist()], float)
    results = np.asarray(statistic(values[rows], axis=1))
    if results.shape[:1] != rows.shape[:1]:
        raise ValueError(
            f"the statistic of an array [resample, value, ...] must give one result for each of {len(rows)} resamples, "
            f"but gives the shape {list(results.shape)}."
        )
    return results


# Means of values of which those of a group, such as the items about one claim, are not independent.


def mean_interval(
    values: Float[np.ndarray, "value"], groups: Sequence[int], *, seed: int = 0, resamples: int = 1000
) -> dict[str, float | None] | None:
    """Return the mean of all values as `estimate`, and its 95% bootstrap interval over groups as `low` and `high`.

    Values of a group are drawn together. Of one group, `low` and `high` are None: it says nothing about others. NaN is
    missing; None is returned if all values are.

    Args:
        groups: the number of each value's group.
    """
    sums = _sums_of_groups(values, groups)

    def mean(samples: np.ndarray, axis: int = 0) -> np.ndarray:
        total = samples.sum(axis=axis)
        return total[..., 0] / total[..., 1]

    if not len(sums):
        return None
    if len(sums) == 1:
        return {"estimate": float(mean(sums)), "low": None, "high": None}
    return bootstrap_interval(sums, mean, seed=seed, resamples=resamples)._asdict()


def sign_test(values: Float[np.ndarray, "value"], groups: Sequence[int]) -> dict[str, Any]:
    """Return the two-sided exact binomial test on the signs of the groups' means.

    Returns:
        The number of groups whose mean is `positive`, `negative` and `zero` (to 1e-9; these are left out of the test),
        and `p`. NaN is missing.

    Source: Conover 1999, section 3.4.
    """
    sums = _sums_of_groups(values, groups)
    means = sums[:, 0] / sums[:, 1]
    positive, negative = int((means > 1e-9).sum()), int((means < -1e-9).sum())
    signs = positive + negative
    p = float(scipy.stats.binomtest(positive, signs).pvalue) if signs else 1.0
    return {"positive": positive, "negative": negative, "zero": len(means) - signs, "p": p}


def _sums_of_groups(values: Float[np.ndarray, "value"], groups: Sequence[int]) -> Float[np.ndarray, "group two"]:
    """Return the sum and the number of the values of each group that has any."""
    values = np.asarray(values, float)
    there = ~np.isnan(values)
    _, number = np.unique(np.asarray(groups)[there], return_inverse=True)
    return np.stack([np.bincount(number, values[there]), np.bincount(number)], axis=1).astype(float)


# Corpus BLEU and chrF.

Texts = Sequence[str]
References = Sequence[str] | Sequence[Sequence[str]]
BLEU_SCORE_OPTIONS = ("smoothing", "smooth_value", "effective_order")
CHRF_SCORE_OPTIONS = ("beta", "eps_smoothing")


def bleu_interval(
    hypotheses: Texts, references: References, *, seed: int, resamples: int = 1000, level: float = 0.95, **options: Any
) -> Interval:
    """Compute `corpus_bleu` with its percentile interval over resampled corpora, in [0, 100].

    Args:
        options: keyword arguments of `corpus_bleu`.

    Raises:
        ValueError: as `corpus_bleu` and `bootstrap_interval`.
    """
    (counts,), statistic = _bleu([hypotheses], references, options)
    return bootstrap_interval(counts, statistic, seed=seed, resamples=resamples, level=level)


def bleu_difference(
    first: Texts,
    second: Texts,
    references: References,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
    **options: Any,
) -> Interval:
    """Compute BLEU(first) − BLEU(second) of two translations of the same sentences, with its paired interval.

    Both are resampled at the same sentences, so that sentences that are hard for both do not widen the interval.
    Arguments and errors are those of `bleu_interval`.
    """
    counts, statistic = _bleu([first, second], references, options)
    return bootstrap_difference(*counts, statistic, seed=seed, resamples=resamples, level=level)


def chrf_interval(
    hypotheses: Texts, references: References, *, seed: int, resamples: int = 1000, level: float = 0.95, **options: Any
) -> Interval:
    """Compute `corpus_chrf` with its percentile interval over resampled corpora, in [0, 100].

    Args:
        options: keyword arguments of `corpus_chrf`.

    Raises:
        ValueError: as `corpus_chrf` and `bootstrap_interval`.
    """
    (counts,), statistic = _chrf([hypotheses], references, options)
    return bootstrap_interval(counts, statistic, seed=seed, resamples=resamples, level=level)


def chrf_difference(
    first: Texts,
    second: Texts,
    references: References,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
    **options: Any,
) -> Interval:
    """Compute chrF(first) − chrF(second) with its paired interval, as `bleu_difference` for BLEU."""
    counts, statistic = _chrf([first, second], references, options)
    return bootstrap_difference(*counts, statistic, seed=seed, resamples=resamples, level=level)


def _bleu(systems: list[Texts], references: References, options: dict[str, Any]) -> tuple[list[np.ndarray], Callable]:
    """Return the counts of each system, [sentence, 2 · order + 2], and the score of their sums as a statistic."""
    ratios, counting = _parted(options, BLEU_SCORE_OPTIONS)
    counts = [
        np.asarray([np.hstack(each) for each in bleu.count(hypotheses, references, **counting)], np.int64)
        for hypotheses in systems
    ]

    def score(sums: np.ndarray) -> float:
        matches, totals = np.split(sums[:-2], 2)
        return bleu.score(bleu.BleuCounts(matches.tolist(), totals.tolist(), *sums[-2:].tolist()), **ratios)

    return counts, _of_sums(score)


def _chrf(systems: list[Texts], references: References, options: dict[str, Any]) -> tuple[list[np.ndarray], Callable]:
    """Return the counts of each system, [sentence, order, 3], and the score of their sums as a statistic."""
    ratios, _ = _parted(options, CHRF_SCORE_OPTIONS)
    counts = [chrf.count(hypotheses, references, **options) for hypotheses in systems]
    return counts, _of_sums(lambda sums: chrf.score(sums, **ratios))


def _parted(options: dict[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the options into those with these names and the others."""
    return tuple({name: options[name] for name in options if (name in names) == named} for named in (True, False))


def _of_sums(score: Callable[[np.ndarray], float]) -> Callable[..., np.ndarray]:
    """Return the score of summed counts as a statistic of resamples [resample, sentence, ...]."""

    def statistic(samples: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray([score(sums) for sums in samples.sum(axis=axis)])

    return statistic
