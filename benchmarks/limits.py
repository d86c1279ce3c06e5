"""The most that the machine can do: matrix products in XLA and in torch, in one run.

    make benchmark        # or: PYTHONPATH=.parity python -m benchmarks.limits

Products of 1, 8 and 32 rows with GPT-2 small's unembedding, which is read from memory, and of 1024 rows with a linear
layer. If all of the model ran at their rates, decoding would give `tokens/s at this rate`, and the DPO step of
`benchmarks.train`, whose products are 1.01 · 10¹² operations, would take `least seconds`. Each side has its best number
of threads for each product. Rounds alternate; the best counts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl_llm.models import layers
from jaxrl_llm.products import product

WIDTH, PARAMETERS = 768, 124_439_808
# Operations of a DPO step on 8 rows of 127 tokens: two for each parameter and token, forward with policy and reference,
# and twice as many for the gradient.
STEP = 2 * PARAMETERS * 8 * 127 * (1 + 1 + 2)
FEATURES = {1: 50257, 8: 50257, 32: 50257, 1024: 3072}  # of the product of so many rows


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    rounds: int = 15
    out: Path = Path(__file__).parent / "results" / "limits.json"


def ours(one: np.ndarray, two: np.ndarray, dtype: str) -> Callable[[], object]:
    """A product in XLA in the form that the models have for it, with float32 sums."""
    one, table, kernel = (jnp.asarray(each, dtype) for each in (one, two.T, two))
    if two.shape[1] == FEATURES[1]:
        form = jax.jit(layers.unembed)
        return lambda: form(one, table).block_until_ready()
    form = jax.jit(functools.partial(product, "ni,io->no"))
    return lambda: form(one, kernel).block_until_ready()


def theirs(one: np.ndarray, two: np.ndarray, dtype: str, threads: int) -> Callable[[], object]:
    """A product in torch, of kernels as it stores them."""
    import torch

    one, two = torch.as_tensor(one, dtype=getattr(torch, dtype)), torch.as_tensor(two.T, dtype=getattr(torch, dtype))
    two = two.contiguous()

    def call() -> None:
        torch.set_num_threads(threads)
        torch.nn.functional.linear(one, two)

    return call


def main(config: Config) -> None:
    """Time all in turn, print and write the rates."""
    rows = []
    for count, dtype in itertools.product(FEATURES, ("float32", "bfloat16")):
        rng, features = np.random.default_rng(0), FEATURES[count]
        one, two = (rng.normal(size=shape).astype(np.float32) for shape in ((count, WIDTH), (WIDTH, features)))
        calls = {("jax", 0): ours(one, two, dtype)}
        calls |= {("torch", n): theirs(one, two, dtype, n) for n in (1, os.cpu_count())}
        best = dict.fromkeys(("jax", "torch"), float("inf"))
        for _, (library, threads) in itertools.product(range(config.rounds), calls):
            started = time.perf_counter()
            calls[library, threads]()
            best[library] = min(best[library], time.perf_counter() - started)
        row = {"rows": count, "dtype": dtype, "jax / torch": best["torch"] / best["jax"]}
        for library, seconds in best.items():
            operations = 2 * count * WIDTH * features
            row[f"{library}, GFLOP/s"] = operations / seconds / 1e9
            if features == FEATURES[1]:
                row[f"{library}, GB/s"] = np.dtype(jnp.dtype(dtype)).itemsize * WIDTH * features / seconds / 1e9
                row[f"{library}, tokens/s at this rate"] = count * WIDTH * features / PARAMETERS / seconds
            else:
                row[f"{library}, least seconds"] = STEP * seconds / operations
        rows.append(row)
        print(
            ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items())
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
