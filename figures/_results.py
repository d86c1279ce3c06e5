"""The results files and the figures that draw them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, GALLERY = HERE.parent / "results", HERE / "gallery"


class Problem(Exception):
    """A problem that the user can solve, in one sentence."""


def figure_names() -> set[str]:
    """Return the names of all figure modules."""
    return {path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_")}


def result_names(folder: Path) -> set[str]:
    """Return the names of all results files of a folder."""
    return {path.stem for path in folder.glob("*.json")}


def figure_of(name: str) -> str:
    """Return the figure of a results file: `x.json` and its variants `x.<variant>.json` are drawn by `figures/x.py`."""
    return name.split(".", maxsplit=1)[0]


def figure_module(name: str) -> ModuleType:
    """Return the module that draws the results file `name`."""
    if figure_of(name) not in figure_names():
        raise Problem(f"{name}.json has no figure: add figures/{figure_of(name)}.py with draw(results).")
    return importlib.import_module(f"figures.{figure_of(name)}")


def load(folder: Path, name: str) -> dict[str, Any]:
    """Read one results file, in the form that `experiments.ledger` writes."""
    path = folder / f"{name}.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{path} is missing: run python -m experiments.{name} to write it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Problem(f"{path} is not JSON: {error}.") from None
    if not isinstance(results, dict):
        raise Problem(f"{path} holds no results: expected an object, found a {type(results).__name__}.")
    missing = [field for field in ("claim", "holds", "numbers", "data") if field not in results]
    if missing:
        raise Problem(f"{path} is not in the ledger's form: it lacks {', '.join(missing)}.")
    for number in results["numbers"]:
        if not {"kind", "name", "value", "unit", "source"} <= set(number):
            raise Problem(f"{path} is not in the ledger's form: a number lacks its kind, name, value, unit or source.")
    return results
