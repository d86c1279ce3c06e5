"""The ledger of claims: every experiment writes `results/<name>.json` in one form, atomically.

    {"claim", "holds", "numbers": [{"name", "value", "expected", "tolerance" | "interval", "unit", "source"}],
     "data", "config", "preset", "seed", "versions", "seconds"}

`data` is what the figure draws. A number with a tolerance holds if |value − expected| ≤ tolerance, one with an interval
if it lies inside; a number with neither is reported and bounds nothing. A claim that fails stays, with `holds` false.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent.parent / "results"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def number(
    name: str,
    value: float,
    *,
    unit: str,
    source: str,
    expected: float | None = None,
    tolerance: float | None = None,
    interval: tuple[float | None, float | None] | None = None,
) -> dict[str, Any]:
    """One number of a claim. `interval` bounds are inclusive; None leaves that side open.

    Raises:
        ValueError: if a value or bound is not finite, or both a tolerance and an interval are given.
    """
    if (tolerance is not None) and (interval is not None or expected is None):
        raise ValueError(f"{name}: give expected with tolerance, or interval, not both.")
    bounds = [bound for bound in (value, expected, tolerance, *(interval or ())) if bound is not None]
    if not all(math.isfinite(bound) for bound in bounds):
        raise ValueError(f"{name}: a number and its bounds must be finite, found {bounds}.")
    entry = {"name": name, "value": value, "unit": unit, "source": source}
    optional = {"expected": expected, "tolerance": tolerance, "interval": interval}
    return entry | {field: bound for field, bound in optional.items() if bound is not None}


def holds(entry: dict[str, Any]) -> bool:
    """Whether a number lies within its own bound; one without a bound does."""
    if "tolerance" in entry:
        return abs(entry["value"] - entry["expected"]) <= entry["tolerance"]
    low, high = entry.get("interval", (None, None))
    return (low is None or entry["value"] >= low) and (high is None or entry["value"] <= high)


def rounded(value: Any) -> Any:
    """Dicts, lists and arrays with every float at six significant digits, which is all that a figure needs."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if hasattr(value, "shape"):
        return rounded(np.asarray(value).tolist())
    return float(f"{value:.6g}") if isinstance(value, float) else value


def result_name(experiment: str, model: str) -> str:
    """The results file of an experiment on a model: another model than tiny-gpt2 makes a variant of it."""
    return experiment if model == "tiny-gpt2" else f"{experiment}." + re.sub(r"[^\w-]+", "-", model).strip("-")


def write(name: str, result: dict[str, Any], *, config: Any, preset: str, seconds: float, out: Path = RESULTS) -> Path:
    """Complete `result` (claim, numbers, data; optionally holds) and write it to `out/<name>.json`."""
    entry = {
        "claim": result["claim"],
        "holds": result.get("holds", all(holds(each) for each in result["numbers"])),
        "numbers": result["numbers"],
        "data": result["data"],
        "config": {field: _plain(value) for field, value in dataclasses.asdict(config).items()},
        "preset": preset,
        "seed": getattr(config, "seed", None),
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
        "seconds": round(seconds, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    path, partial = out / f"{name}.json", out / f"{name}.json.partial"
    partial.write_text(json.dumps(entry, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def run_and_write(
    name: str, run: Callable[[Any], dict[str, Any]], config: Any, preset: str, out: Path = RESULTS
) -> Path:
    """Run an experiment, write its results, print its numbers."""
    started = time.perf_counter()
    result = run(config)
    path = write(name, result, config=config, preset=preset, seconds=time.perf_counter() - started, out=out)
    print(result["claim"])
    for entry in result["numbers"]:
        mark = "" if holds(entry) else "   << outside its bound"
        print(f"  {entry['name']}: {entry['value']:.6g} {entry['unit']}{mark}")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
