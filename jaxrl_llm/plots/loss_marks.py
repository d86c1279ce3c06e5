"""Marks that every picture of a loss landscape has: the origin, the lowest point, holes, axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke

from jaxrl_llm.plots import style

FIRST, SECOND = "direction 1 (× ‖d₁‖)", "direction 2 (× ‖d₂‖)"
ORIGIN: dict[str, Any] = {"marker": "o", "markersize": 6, "color": style.ACCENT, "markeredgecolor": "white"}
MINIMUM: dict[str, Any] = {"marker": "D", "markersize": 7, "color": "white", "markeredgecolor": style.INK}
HATCHED: dict[str, Any] = {"facecolor": "white", "edgecolor": style.EDGE, "hatch": "//////"}


def halo(width: float = 2.0) -> list[withStroke]:
    """A white rim, so that dark letters and lines are seen on any colour."""
    return [withStroke(linewidth=width, foreground="white")]


def span(steps: np.ndarray, *others: float) -> tuple[float, float]:
    """From the first step to the last, wide enough for zero and the other positions too."""
    low, high = min(steps[0], 0, *others), max(steps[-1], 0, *others)
    return float(low), float(high)
