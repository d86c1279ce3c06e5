"""The settings that every recipe has, what of them decides a run, and its keys."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Key

from jaxrl_llm.data.encoding import Cut
from jaxrl_llm.numerics import check_range


@dataclasses.dataclass(frozen=True)
class Run:
    """What every run has: where from, where to, how long, how fast."""

    model: str
    data: Path
    out: Path
    eval_data: Path | None = None
    steps: int = 1000
    batch_size: int = 16
    microbatches: int = 1
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_length: int | None = None
    cut: Cut = "left"
    on_bad: Literal["raise", "skip"] = "raise"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    checkpoint_blocks: bool = False
    log_every: int = 10
    save_every: int = 100
    keep: int = 2
    seed: int = 0
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "microbatches", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.batch_size % self.microbatches:
            raise ValueError(f"{self.microbatches} microbatches must divide batch_size, {self.batch_size}.")
        check_range(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay, lora_rank=self.lora_rank)
        check_range(0, 1, warmup=self.warmup)
        check_range(0, open_low=True, clip_norm=self.clip_norm, lora_alpha=self.lora_alpha)
        if self.max_length is not None:
            check_range(1, max_length=self.max_length)

    @property
    def pace(self) -> dict[str, Any]:
        """How often `loop.run` looks at it."""
        return {
            "evaluate_every": self.save_every,
            "log_every": self.log_every,
            "keep": self.keep,
            "tensorboard": self.tensorboard,
        }

    def identity(self, kind: str, **further: Any) -> dict[str, str]:
        """What decides what a run does; how often it is looked at does not. The data count by what they hold."""
        left_out = ("out", "resume", "log_every", "save_every", "keep", "tensorboard", "eval_data")
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
        said = {"kind": kind, **fields, "data_sha256": digest(self.data), **further}
        return {name: str(value) for name, value in said.items()}


class Keys(NamedTuple):
    """The keys of a run, one for each use."""

    state: Key[Array, ""]  # what every step derives its own from
    adapters: Key[Array, ""]
    head: Key[Array, ""]  # of a reward model or a critic


def keys_of(run: Run) -> Keys:
    """All keys of a run, from its seed."""
    return Keys(*jax.random.split(jax.random.key(run.seed), len(Keys._fields)))


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
