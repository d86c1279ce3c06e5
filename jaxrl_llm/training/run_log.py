"""The log of a run that can be resumed: JSON lines, and TensorBoard's events beside them if asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax


class RunLog:
    """Rows with a `step` each. A resumed run drops those of the steps that it will do again.

    Of several processes the first one writes.

    Args:
        path: of the JSON lines.
        tensorboard: a folder for the same numbers as events.

    Raises:
        ModuleNotFoundError: if events are asked for and tensorboardX is not installed.
    """

    def __init__(self, path: Path, *, tensorboard: Path | None = None):
        self.path = path
        self._tensorboard = tensorboard
        self._events, self._writes = None, jax.process_index() == 0
        if tensorboard is not None:
            _event_writer()  # found missing now, not after the first steps

    def rows(self) -> list[dict[str, float]]:
        """All rows so far; a last line that a crash cut short is none."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def truncate(self, step: int) -> None:
        """Keep the rows up to `step`."""
        if not self._writes:
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, self.path)
        if self._tensorboard is not None:
            self._events = _event_writer()(str(self._tensorboard), purge_step=step + 1)

    def append(self, **row: float | str) -> None:
        """Add a row; ValueError for a number that JSON cannot hold."""
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, str):
                    self._events.add_text(name, value, row["step"])
                elif name != "step":
                    self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def close(self) -> None:
        """No more rows will come."""
        if self._events is not None:
            self._events.close()


def _event_writer() -> type:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorBoard's events need the package tensorboardX: pip install 'jaxrl_llm[tensorboard]'"
        ) from error
    return SummaryWriter
