"""Checkpoints of a training run, by orbax: a crash at any moment leaves the last complete one."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxrl_llm import mesh as meshes

State = TypeVar("State")


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them."""

    def __init__(self, folder: Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, but is {keep}.")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.resolve(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Write `state` as the checkpoint of `step`, completely or not at all.

        Raises:
            OSError: if it cannot be written (for example on a full disk), naming the last good checkpoint.
        """
        reason = None
        with _quiet():
            try:
                self._manager.save(step, args=ocp.args.StandardSave(_storable(state)))
            except Exception as error:  # orbax and the libraries below it raise many kinds
                if meshes.is_lost(error):
                    raise
                reason = _reason(error)
            if reason is not None:
                gc.collect()  # orbax's tasks: each logs its own traceback where it is collected
        if reason is None:
            return
        for unfinished in self._folder.glob(f"{step}.orbax-checkpoint-tmp*") if jax.process_index() == 0 else ():
            shutil.rmtree(unfinished, ignore_errors=True)
        last = self.latest_step()
        remains = "and there is none yet" if last is None else f"the last good one is that of step {last}"
        raise OSError(f"the checkpoint of step {step} could not be written to {self._folder}: {reason}; {remains}.")

    def restore(self, like: State) -> State:
        """Return the newest checkpoint, with the structure, shapes, dtypes and shardings of `like`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is of another model or optimiser, naming the leaves that differ.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._folder}.")
        storable = _storable(like)
        self._check_same(self._manager.item_metadata(step), storable)
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(storable))
        return jax.tree.map(_as, like, restored)

    def _check_same(self, stored: PyTree, wanted: PyTree) -> None:
        found, expected = _shapes(stored), _shapes(wanted)
        shared = [path for path in expected if path in found and found[path] != expected[path]]
        differences = [f"{path} is {found[path]}, not {expected[path]}" for path in shared]
        differences += [f"{path} is missing" for path in expected if path not in found]
        differences += [f"{path} is unknown to this run" for path in found if path not in expected]
        if differences:
            more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ValueError(
                f"the checkpoint in {self._folder} is of another model or optimiser: "
                f"{', '.join(differences[:3])}{more}."
            )


def _reason(error: Exception) -> str:
    """Return the system's word for an error of orbax's, which stands behind the names of many temporary files."""
    told = re.search(r"([^:\n]+?) \[os_error_code", str(error)) or re.search(r"os_error_code='(\d+)'", str(error))
    if told:
        return os.strerror(int(told[1])) if told[1].isdigit() else told[1].strip()
    return str(error).splitlines()[0] if str(error) else repr(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracebacks of orbax's and tensorstore's threads from the terminal: the error itself is raised."""
    loggers = {name: logging.getLogger(name) for name in ("absl", "asyncio")}
    levels = {name: logger.level for name, logger in loggers.items()}
    of_threads, hook = threading.excepthook, sys.unraisablehook
    if getattr(hook, "func", None) is not _unless_late:  # it stays: tensorstore's threads are late
        sys.unraisablehook = functools.partial(_unless_late, hook)
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    threading.excepthook = lambda raised: None
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        threading.excepthook = of_threads


def _unless_late(hook: Callable[[Any], None], raised: Any) -> None:
    """Call the hook, but for a thread that says that nobody listens any more."""
    if str(raised.exc_value) != "Event loop is closed":
        hook(raised)


def _shapes(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _name(path: Any) -> str:
    """Return a leaf's path as one string, the same for tuples, named tuples and dicts."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def _storable(state: State) -> State:
    """Return the state with its keys as plain arrays."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _as(like: Any, restored: Any) -> Any:
    return jax.random.wrap_key_data(restored, impl=jax.random.key_impl(like)) if _is_key(like) else restored


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
