"""`fused_token_log_probs` against the plain form: time and working memory of value and gradient, in one run.

    python -m benchmarks.logprobs

Working memory is what XLA allocates besides inputs and results (the gradient of the unembedding alone is as large as
the unembedding, in both forms). Times alternate; trust the ratios.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from jaxrl_llm.objectives.logprobs import fused_token_log_probs, token_log_probs


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    batch: int = 4
    time: int = 256
    vocab: int = 50257
    width: int = 768
    rounds: int = 7
    out: Path = Path(__file__).parent / "results" / "logprobs.json"


def plain_token_log_probs(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """The same through all logits at once."""
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    return token_log_probs(logits, tokens)


def compiled(form: Callable[..., jax.Array], *arrays: jax.Array) -> jax.stages.Compiled:
    """Value and both gradients of the sum."""
    step = jax.value_and_grad(lambda *given: form(*given).sum(), argnums=(0, 1))
    return jax.jit(step).lower(*arrays).compile()


def main(config: Config) -> None:
    """Time both forms in turn, print and write the ratios."""
    keys = dict(zip(("hidden", "unembedding", "tokens"), jax.random.split(jax.random.key(0), 3), strict=True))
    arrays = (
        jax.random.normal(keys["hidden"], (config.batch, config.time, config.width)),
        0.02 * jax.random.normal(keys["unembedding"], (config.vocab, config.width)),
        jax.random.randint(keys["tokens"], (config.batch, config.time), 0, config.vocab),
    )
    steps = {
        "plain": compiled(plain_token_log_probs, *arrays),
        "fused": compiled(fused_token_log_probs, *arrays),
    }
    memory = {name: step.memory_analysis().temp_size_in_bytes / 2**20 for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(config.rounds + 1), unit="round"):  # the first one warms up
        for name, step in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            seconds[name].append(time.perf_counter() - started)
    rows = [
        {"form": name, "seconds": statistics.median(seconds[name][1:]), "working_mebibytes": memory[name]}
        for name in steps
    ]
    for row in rows:
        print(f"{row['form']}: {row['seconds']:.2f} s, {row['working_mebibytes']:.0f} MiB of working memory")
    ratios = {field: rows[1][field] / rows[0][field] for field in ("seconds", "working_mebibytes")}
    print(
        f"fused / plain: {ratios['seconds']:.2f} of the time, {ratios['working_mebibytes']:.3f} of the working memory"
    )
    about = {**dataclasses.asdict(config), "out": config.out.name, "cpus": os.cpu_count()}
    config.out.parent.mkdir(exist_ok=True)
    config.out.write_text(json.dumps({"config": about, "rows": rows, "fused / plain": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
