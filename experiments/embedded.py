"""The models that the package ships: their folders, which a training replaces only when told to, and their cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxrl_llm import models

EMBEDDED = Path(models.__file__).parent / "embedded"
CARDS = Path(__file__).parent / "cards"


def folder(config: Any, name: str) -> Path:
    """Return the folder of a run's model: that of the package, or one in `work_dir` for a training of one's own.

    Raises:
        ValueError: if the package's model is to be replaced without a training.
    """
    if config.replace_embedded and not config.train:
        raise ValueError("--replace-embedded must be given together with --train, but --train is missing.")
    return config.work_dir / name if config.train and not config.replace_embedded else EMBEDDED / name


def card(template: str, **values: Any) -> str:
    """Return a model card: a template of `experiments/cards` with its values."""
    return (CARDS / f"{template}.md").read_text(encoding="utf-8").format(**values)


def table_rows(rows: Any) -> str:
    """Return rows of cells as those of a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
