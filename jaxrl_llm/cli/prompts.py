"""Prompts, from wherever they come, as tokens of a loaded model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Batch:
    """A loaded model and prompts for it, padded on the left."""

    loaded: Any
    rows: list[list[int]]
    tokens: Any
    mask: Any
    eos_ids: list[int]


def load_batch(model: str, prompts: list[str], *, dtype: str, chat: bool) -> Batch:
    """Load the model and encode the prompts."""
    from jaxrl_llm import models, text

    loaded = models.load(model, dtype=dtype)
    tokenizer = require_tokenizer(loaded, model)
    rows = [text.encode(tokenizer, prompt, chat=chat) for prompt in prompts]
    return Batch(loaded, rows, *text.left_pad(rows), text.eos_ids(tokenizer, loaded.config))


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """One prompt, or the lines of a file or of standard input."""
    if prompt is not None and file is not None:
        raise ValueError("give either a prompt or --prompts, not both.")
    if prompt is not None:
        return [prompt]
    if file is None and sys.stdin.isatty():
        raise ValueError("give a prompt, a file with --prompts, or lines on standard input.")
    source = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"no prompt in {'standard input' if file is None else file}.")
    return lines


def require_tokenizer(loaded: Any, name: str) -> Any:
    """The tokenizer of a loaded model, or a clear error."""
    if loaded.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer files, so that text cannot be turned into tokens.")
    return loaded.tokenizer
