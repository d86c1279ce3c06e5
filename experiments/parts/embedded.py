"""The folders of the models that the package ships, which a training replaces only when told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxrl_llm import models

EMBEDDED = Path(models.__file__).parent / "embedded"


def folder(config: Any, name: str) -> Path:
    """Return the folder of a run's model: that of the package, or one in `work_dir` for a training of its own.

    Raises:
        ValueError: if the package's model is to be replaced without a training.
    """
    if config.replace_embedded and not config.train:
        raise ValueError("--replace-embedded must be given together with --train, but --train is missing.")
    return config.work_dir / name if config.train and not config.replace_embedded else EMBEDDED / name
