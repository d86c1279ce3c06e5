"""Checkpoints of a training run, with orbax: a crash at any moment leaves the last complete one."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import orbax.checkpoint as ocp

State = TypeVar("State")


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them."""

    def __init__(self, folder: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Write `state` as the checkpoint of `step`."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: State) -> State:
        """The newest checkpoint, with the structure, shapes and dtypes of `like`."""
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}.")
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))
