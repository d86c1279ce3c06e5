"""The log of a run that can be resumed: JSON lines, one an evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path


class RunLog:
    """Rows with a `step` each. A resumed run drops those of the steps that it will do again."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, float]]:
        """All rows so far; a last line that a crash cut short is none."""
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def truncate(self, step: int) -> None:
        """Keep the rows up to `step`."""
        kept = [row for row in self.rows() if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)

    def append(self, **row: float) -> None:
        """Add a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
