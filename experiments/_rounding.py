"""Numbers of a results file, short: what a figure draws needs no more than six digits."""

from __future__ import annotations

from typing import Any

import numpy as np


def rounded(value: Any) -> Any:
    """Dicts, lists and arrays with every float at six significant digits, ready for JSON."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if hasattr(value, "shape"):
        return rounded(np.asarray(value).tolist())
    return float(f"{value:.6g}") if isinstance(value, float) else value
