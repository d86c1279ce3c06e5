"""Attention in a training step over lengths: scores at once against a chunk of queries at a time, in one run.

    python -m benchmarks.attention

One layer of GPT-2 small's heads, value and gradient, a fixed number of tokens. Working memory is what XLA allocates
besides inputs and results. Times alternate; trust the ratios.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from jaxrl_llm.models import layers


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    tokens: int = 4096
    heads: int = 12
    head_dim: int = 64
    dtype: str = "bfloat16"
    rounds: int = 3
    out: Path = Path(__file__).parent / "results" / "attention.json"


FORMS = {"at once": 2**40, "in chunks": layers.CHUNK_SCORES}


def compiled(config: Config, length: int, scores: int) -> tuple[jax.stages.Compiled, tuple[jax.Array, ...]]:
    """Value and gradients of causal attention that holds so many scores, and its arguments."""
    layers.CHUNK_SCORES = scores
    shape = (config.tokens // length, config.heads, length, config.head_dim)
    given = tuple(jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
    mask = jnp.tril(jnp.ones((1, length, length), bool))

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        narrow = key.astype(config.dtype), value.astype(config.dtype)
        return jnp.square(layers.attention(query, narrow, mask, scale=config.head_dim**-0.5)).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))).lower(*given).compile(), given


def main(config: Config) -> None:
    """Time both forms of each length in turn, print and write the numbers."""
    rows = []
    for length in config.lengths:
        steps = {name: compiled(config, length, scores) for name, scores in FORMS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(config.rounds + 1):  # the first one warms up
            for name, (step, given) in steps.items():
                started = time.perf_counter()
                jax.block_until_ready(step(*given))
                seconds[name].append(time.perf_counter() - started)
        for name, (step, _) in steps.items():
            memory = step.memory_analysis().temp_size_in_bytes / 2**20
            row = {"length": length, "form": name, "seconds": statistics.median(seconds[name][1:])}
            rows.append(row | {"working_mebibytes": memory})
            print(f"{length} tokens, {name}: {row['seconds']:.2f} s, {memory:.0f} MiB of working memory", flush=True)
    about = {**dataclasses.asdict(config), "out": config.out.name, "cpus": os.cpu_count()}
    config.out.parent.mkdir(exist_ok=True)
    config.out.write_text(json.dumps({"config": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
