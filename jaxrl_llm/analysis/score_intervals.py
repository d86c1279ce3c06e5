"""Bootstrap intervals of corpus BLEU and chrF over resampled sentences (Koehn 2004).

The n-grams of each sentence are counted once. The score of a resample is computed from the summed counts of its
sentences: it is the score of a corpus, not a mean over sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.analysis import bleu, chrf
from jaxrl_llm.analysis.bootstrap import Interval, bootstrap_difference, bootstrap_interval

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
