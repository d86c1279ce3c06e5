"""The ledger of claims: every experiment writes `results/<name>.json` in one form, atomically.

    {"claim", "holds", "seeds", "numbers": [{"kind", "name", "value", ..., "unit", "source"}],
     "data", "config", "preset", "seed", "versions", "seconds"}

There are three kinds of numbers:

- an `identity` holds exactly, to rounding: |value − expected| ≤ tolerance;
- a `test` has a bound that was written down before the run and that plausible data would break; `wrong` is such a
  value;
- a `measurement` has no verdict; it may have a confidence interval.

A claim holds if all of its identities and tests do, at every seed that was run. Without a test it is measured, and
`holds` is null. It is also null unless the preset is full, since smaller runs cannot decide. A claim that fails stays,
with `holds` false.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.files import replacing

RESULTS = Path(__file__).resolve().parent.parent / "results"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")

Number = dict[str, Any]


def identity(name: str, value: float, *, tolerance: float, unit: str, source: str, expected: float = 0.0) -> Number:
    """Return a number that mathematics fixes: |value − expected| ≤ tolerance, where tolerance allows for rounding.

    Raises:
        ValueError: if a value is not finite, or the tolerance is negative.
    """
    return _near("identity", name, value, expected, tolerance, unit, source)


def test(
    name: str,
    value: float,
    *,
    wrong: float,
    unit: str,
    source: str,
    expected: float | None = None,
    tolerance: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Number:
    """Return a number with a bound that could fail: expected ± tolerance, or at_least ≤ value ≤ at_most.

    Args:
        wrong: a plausible value that breaks the bound: what the number would be if the claim were false.

    Raises:
        ValueError: if a value is not finite, the bound is not one of the two forms, or `wrong` is within it.
    """
    by_distance, by_range = (any(x is not None for x in pair) for pair in ((expected, tolerance), (at_least, at_most)))
    if by_distance == by_range or (by_distance and None in (expected, tolerance)):
        raise ValueError(f"{name}: the bound must be expected and tolerance, or at_least or at_most.")
    if by_distance:
        number = _near("test", name, value, expected, tolerance, unit, source)
        breaks = abs(wrong - expected) > tolerance
    else:
        _check_finite(name, value, *(bound for bound in (at_least, at_most) if bound is not None))
        number = _number("test", name, value, unit, source, interval=[at_least, at_most])
        breaks = not _inside(wrong, number["interval"])
    if not (math.isfinite(wrong) and breaks):
        raise ValueError(f"{name}: the wrong value must break the bound, but {wrong} does not.")
    return number | {"wrong": _six(wrong)}


def measurement(
    name: str, value: float, low: float | None = None, high: float | None = None, *, unit: str, source: str
) -> Number:
    """Return a number without a verdict, and its 95% confidence interval if both of its ends are given.

    Raises:
        ValueError: if a value is not finite, or one end is given alone.
    """
    if (low is None) != (high is None):
        raise ValueError(f"{name}: low and high must be given together, but are {low} and {high}.")
    confidence = [] if low is None else [low, high]
    _check_finite(name, value, *confidence)
    number = _number("measurement", name, value, unit, source)
    return number | ({"confidence": [_six(end) for end in confidence]} if confidence else {})


def _near(kind: str, name: str, value: float, expected: float, tolerance: float, unit: str, source: str) -> Number:
    _check_finite(name, value, expected, tolerance)
    if tolerance < 0:
        raise ValueError(f"{name}: tolerance must be at least 0, but is {tolerance}.")
    error = abs(value - expected)
    bound = {"expected": _six(expected), "tolerance": tolerance, "error": error if error > tolerance else _six(error)}
    return _number(kind, name, value, unit, source, **bound)


def _number(kind: str, name: str, value: float, unit: str, source: str, **bound: Any) -> Number:
    return {"kind": kind, "name": name, "value": _six(value), **bound, "unit": unit, "source": source}


def _check_finite(name: str, *values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name}: a number and its bounds must be finite, but are {list(map(float, values))}.")


def _inside(value: float, interval: Sequence[float | None]) -> bool:
    low, high = interval
    return (low is None or value >= low) and (high is None or value <= high)


def holds(number: Number) -> bool | None:
    """Return whether a number lies within its bound, at every seed; None for a measurement."""
    if "tolerance" in number:
        return all(error <= number["tolerance"] for error in number.get("errors", [number["error"]]))
    if "interval" in number:
        return all(_inside(value, number["interval"]) for value in number.get("values", [number["value"]]))
    return None


def verdict(numbers: Sequence[Number]) -> bool | None:
    """Return whether a claim holds: False if a number is outside of its bound, None if nothing was tested."""
    kept = [holds(number) for number in numbers]
    if False in kept:
        return False
    return True if any(number["kind"] == "test" for number in numbers) else None


def merged(runs: Sequence[Sequence[Number]]) -> list[Number]:
    """Return the numbers of the first run, each with its values (and errors) in all of them.

    Raises:
        ValueError: if the runs do not have the same numbers.
    """
    names = [[(number["kind"], number["name"]) for number in run] for run in runs]
    if any(each != names[0] for each in names):
        differ = sorted({name for each in names for _, name in set(each) ^ set(names[0])})
        raise ValueError(f"every seed must give the same numbers, but these are not in all: {', '.join(differ)}.")
    if len(runs) == 1:
        return list(runs[0])
    several = []
    for same in zip(*runs, strict=True):
        for field in ("interval", "tolerance", "wrong", "unit"):
            if any(number.get(field) != same[0].get(field) for number in same):
                raise ValueError(f"{same[0]['name']}: {field} must be the same at every seed, but is {same}.")
        number = same[0] | {"values": [each["value"] for each in same]}
        several.append(number | ({"errors": [each["error"] for each in same]} if "error" in number else {}))
    return several


def _six(value: float) -> float:
    return int(value) if isinstance(value, int | np.integer) else float(f"{float(value):.6g}")


def rounded(value: Any) -> Any:
    """Return dicts, lists and arrays with every float at six significant digits, enough for a figure."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if hasattr(value, "shape"):
        return rounded(np.asarray(value).tolist())
    return _six(value) if isinstance(value, float) else value


def result_name(experiment: str, model: str) -> str:
    """Return the name of an experiment's results on a model; every model but tiny-gpt2 is part of the name."""
    return experiment if model == "tiny-gpt2" else f"{experiment}." + re.sub(r"[^\w-]+", "-", model).strip("-")


def write(
    name: str,
    results: Sequence[dict[str, Any]],
    *,
    config: Any,
    preset: str,
    seconds: float,
    seeds: Sequence[int] = (),
    out: Path = RESULTS,
) -> Path:
    """Write `out/<name>.json` from the results at each seed; claim and data are those of the first."""
    first, numbers = results[0], merged([result["numbers"] for result in results])
    judged = [number for number in numbers if preset == "full" or number["kind"] == "identity"]
    settings = {field: _plain(value) for field, value in dataclasses.asdict(config).items() if field != "work_dir"}
    entry = {
        "claim": first["claim"],
        "holds": verdict(judged),
        "seeds": {"run": list(seeds), "held": [verdict(result["numbers"]) for result in results]} if seeds else None,
        "numbers": numbers,
        "data": rounded(first["data"]),
        "config": settings,
        "preset": preset,
        "seed": getattr(config, "seed", None),
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
        "seconds": round(seconds, 1),
    }
    text = compact(json.loads(json.dumps(entry, allow_nan=False))) + "\n"
    path = out / f"{name}.json"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def compact(value: Any, *, width: int = 120, indent: int = 0) -> str:
    """Return JSON with one line for what fits into `width` characters, and for every array of numbers."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict | list) or indent + len(line) <= width:
        return line
    if isinstance(value, list) and not any(isinstance(each, dict | list | str) for each in value):
        return line
    pad = " " * (indent + 1)
    if isinstance(value, list):
        parts = [compact(each, width=width, indent=indent + 1) for each in value]
        return "[\n" + ",\n".join(pad + part for part in parts) + f"\n{' ' * indent}]"
    keys = [json.dumps(key, ensure_ascii=False) + ": " for key in value]
    parts = [
        key + compact(each, width=width, indent=indent + 1) for key, each in zip(keys, value.values(), strict=True)
    ]
    return "{\n" + ",\n".join(pad + part for part in parts) + f"\n{' ' * indent}}}"


def digest(path: Path) -> str:
    """Return the SHA-256 of a results file, which its picture carries."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
