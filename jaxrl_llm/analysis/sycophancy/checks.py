"""What was given instead of what was expected, said before it ends in an AttributeError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_type(what: str, value: Any, kind: type, expected: str) -> None:
    """Raise TypeError, naming what was expected and the type that was found; a class is not one of its instances."""
    if isinstance(value, type):
        raise TypeError(f"{what} must be {expected}, but is the class {value.__name__}.")
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {expected}, but is of type {type(value).__name__}.")


def check_some(what: str, values: Sequence[Any]) -> None:
    """Raise ValueError if there are none: no number can be taken of nothing."""
    if not len(values):
        raise ValueError(f"there are no {what}.")
