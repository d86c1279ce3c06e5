"""Random inputs for every public objective, for the tests of its closed-form gradient."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrl_llm import objectives

TOOLS = {"fused", "objective"}  # modules that hold no objective
CONSTANTS = {"advantages"}  # modules whose results carry no gradient: a test checks that


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the arrays of a case, its β and its mask."""

    batch: int = 4
    time: int = 5
    vocab: int = 7
    beta: float = 0.3
    kept: float = 0.7  # share of a mask that is true


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call: differentiable ones, then constants (arrays too), then hyperparameters by keyword."""

    differentiable: tuple[np.ndarray, ...]
    constants: tuple[np.ndarray, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Builder = Callable[[np.random.Generator, Sizes], Case]


def public_functions(*, skip: set[str]) -> dict[str, Callable[..., Any]]:
    """`module.function` of every public function of `jaxrl_llm.objectives`."""
    found = {}
    for info in pkgutil.iter_modules(objectives.__path__):
        if info.name in skip:
            continue
        module = importlib.import_module(f"jaxrl_llm.objectives.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__.startswith(module.__name__) and not name.startswith("_"):
                found[f"{info.name}.{name}"] = function
    return found


def log_probs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Log-probabilities of some size."""
    return -rng.gamma(2.0, 0.5, shape)


def mask(rng: np.random.Generator, *shape: int, kept: float) -> np.ndarray:
    """A ragged mask."""
    return rng.random(shape) < kept
