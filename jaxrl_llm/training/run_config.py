"""The configuration of a run, kept in its folder: a run is resumed as what it was begun."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax


def claim(path: Path, config: Mapping[str, Any], *, resumed: bool) -> None:
    """Write a new run's configuration to `path`, complete or not at all; compare that of a resumed one.

    Of several processes the first one writes.

    Raises:
        ValueError: if `config` is not JSON, or the resumed run was begun with another one or with none.
    """
    try:
        text = json.dumps(dict(config), indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a run's configuration must be a dict of what JSON can hold, but is {config!r}.") from error
    if resumed:
        _compare(path, json.loads(text))
        return
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def _compare(path: Path, config: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} holds a run that was begun without a {path.name}, so that nobody can tell whether it is "
            "the same: remove the folder to train anew, or write the configuration there."
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(stored).__name__}.")
    names = dict.fromkeys([*stored, *config])
    absent = object()
    pairs = [(name, stored.get(name, absent), config.get(name, absent)) for name in names]
    different = [
        f"{name} was {_shown(before, absent)} and is {_shown(now, absent)}"
        for name, before, now in pairs
        if before != now
    ]
    if different:
        raise ValueError(
            f"{path.parent} holds a run of another configuration: {'; '.join(different)}. "
            "Resume it with its own, or choose another folder."
        )


def _shown(value: Any, absent: object) -> str:
    return "absent" if value is absent else json.dumps(value)
