"""Stages of a long experiment, each kept in a file, so that a run that was cut goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file


def kept(path: Path | None, compute: Callable[[], Any]) -> Any:
    """Return what the file holds, or else what `compute` gives, which is then written to it whole.

    Args:
        path: of a safetensors file; None keeps nothing.
        compute: gives nested dicts of arrays, whose keys are names or numbers.
    """
    if path is not None and path.is_file():
        return _nested(load_file(path))
    found = jax.device_get(compute())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(_flat(found), partial)
        os.replace(partial, path)
    return found


def _flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): np.array(leaf, order="C") for path, leaf in leaves}


def _nested(flat: dict[str, np.ndarray]) -> Any:
    tree: dict[Any, Any] = {}
    for name, leaf in flat.items():
        *above, last = [int(part) if part.isdigit() else part for part in name.split("/")]
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree
