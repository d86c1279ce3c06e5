"""What the machine can do at most: matrix products and memory, in XLA and in torch, in one run.

    make benchmark        # or: PYTHONPATH=.parity python -m benchmarks.limits

The shapes are those of GPT-2 small: a linear layer of 8 rows of 128 tokens, and the unembedding of one token. From the
rates follow the least seconds of the DPO step of `benchmarks.train`, whose products are 1.01 · 10¹² operations, and the
most tokens a second of decoding at batch 1, which reads all parameters for each. Rounds alternate; the best counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

TOKENS, WIDTH, INNER, VOCAB = 1024, 768, 3072, 50257
STEP, PARAMETERS = 1.01e12, 124_439_808  # operations of a DPO step; numbers that decoding reads
Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    rounds: int = 20
    out: Path = Path(__file__).parent / "results" / "limits.json"


def ours(dtype: str) -> tuple[Call, Call]:
    """A matrix product, and a product of one row with a matrix, in XLA with float32 sums."""
    one, two, row, table = (jnp.asarray(each, dtype) for each in operands())
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: product(one, two).block_until_ready(), lambda: product(row, table).block_until_ready()


def theirs(dtype: str) -> tuple[Call, Call]:
    """The same in torch."""
    import torch

    one, two, row, table = (torch.as_tensor(each, dtype=getattr(torch, dtype)) for each in operands())
    table = table.T.contiguous()  # as torch stores it
    return lambda: one @ two, lambda: row @ table.T


def operands() -> list[np.ndarray]:
    """The factors of the two products."""
    shapes = [(TOKENS, WIDTH), (WIDTH, INNER), (1, WIDTH), (WIDTH, VOCAB)]
    return [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes]


def main(config: Config) -> None:
    """Time all in turn, print and write the rates."""
    calls = {}
    for library, make in (("jax", ours), ("torch", theirs)):
        for dtype in ("float32", "bfloat16"):
            calls[library, dtype, "product"], calls[library, dtype, "row"] = make(dtype)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(config.rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
    rows = []
    for library, dtype in dict.fromkeys(name[:2] for name in calls):
        size = 4 if dtype == "float32" else 2
        rate = 2 * TOKENS * WIDTH * INNER / best[library, dtype, "product"] / 1e9
        read = size * WIDTH * VOCAB / best[library, dtype, "row"] / 1e9
        rows.append({"library": library, "dtype": dtype, "GFLOP/s": rate, "GB/s": read})
        rows[-1] |= {"least seconds of a DPO step": STEP / rate / 1e9, "most tokens/s": read * 1e9 / size / PARAMETERS}
        print(f"{library:5s} {dtype:8s} {rate:6.0f} GFLOP/s, {read:5.1f} GB/s of one row's product")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
