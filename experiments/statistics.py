"""Intervals, p-values and the tests of claims that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from experiments import ledger


def student(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of independent values and its two-sided interval of Student's t.

    Raises:
        ValueError: if there are fewer than two values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values must be at least two numbers, but have the shape {values.shape}.")
    mean = float(values.mean())
    half = float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def share(count: int, total: int) -> tuple[float, float, float]:
    """Return a share of independent cases and its 95% interval (Clopper and Pearson 1934)."""
    interval = scipy.stats.binomtest(int(count), total).proportion_ci(0.95, "exact")
    return count / total, float(interval.low), float(interval.high)


def above_zero(differences: Sequence[float]) -> float:
    """Return the one-sided p-value of paired differences: Wilcoxon's signed-rank test that their centre is not above 0.

    It is exact for fewer than 50 differences without ties, and needs at least 5 to reach 0.05.
    """
    differences = np.asarray(differences, np.float64)
    if not np.any(differences):
        return 1.0
    return float(scipy.stats.wilcoxon(differences, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for having looked at all of them (Holm 1979).

    The i-th smallest of m becomes min(1, max over j ≤ i of (m − j + 1) p_(j)).
    """
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, np.float64)[order] * (len(p_values) - np.arange(len(p_values)))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return adjusted.tolist()


def significant(p_values: Mapping[str, float], *, unit: str, source: str) -> list[ledger.Number]:
    """Return a test of each p-value after Holm's correction: at most 0.05, where 0.5 is what no effect would give."""
    adjusted = zip(p_values, holm(list(p_values.values())), strict=True)
    return [ledger.test(name, p, at_most=0.05, wrong=0.5, unit=unit, source=source) for name, p in adjusted]
