"""10⁷ samples of k1, k2 and k3 for two Gaussians, random numbers included: one jitted call against numpy.

    python -m benchmarks.kl

Both return mean and mean square of each estimator, from float32 numbers. Times alternate; trust the ratio.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxrl_llm.objectives import kl

SAMPLES, CHUNK, ROUNDS, SHIFT = 10**7, 10**5, 7, 1.0
RESULTS = Path(__file__).parent / "results" / "kl.json"


@functools.partial(jax.jit, static_argnames="samples")
def in_one_call(key: jax.Array, *, samples: int) -> jax.Array:
    """[estimator, (mean, mean square)]; samples of N(0, 1), reference N(SHIFT, 1), in chunks that stay in the cache."""

    def add(total: jax.Array, chunk_key: jax.Array) -> tuple[jax.Array, None]:
        x = jax.random.normal(chunk_key, (CHUNK,))
        values = [k(-jnp.square(x) / 2, -jnp.square(x - SHIFT) / 2) for k in (kl.k1, kl.k2, kl.k3)]
        return total + jnp.stack([jnp.stack([value.mean(), jnp.square(value).mean()]) for value in values]), None

    chunks = samples // CHUNK
    return jax.lax.scan(add, jnp.zeros((3, 2)), jax.random.split(key, chunks))[0] / chunks


def in_numpy(rng: np.random.Generator, *, samples: int) -> np.ndarray:
    """The same, written as one would."""
    x = rng.standard_normal(samples, dtype=np.float32)
    d = -np.square(x) / 2 + np.square(x - SHIFT) / 2
    values = [d, np.square(d) / 2, np.expm1(-d) + d]
    return np.asarray([[value.mean(), np.square(value).mean()] for value in values])


def main() -> None:
    """Time both in turn, print and write the ratio."""
    rng = np.random.default_rng(0)
    calls = {
        "numpy": lambda round_: in_numpy(rng, samples=SAMPLES),
        "jax": lambda round_: jax.block_until_ready(in_one_call(jax.random.key(round_), samples=SAMPLES)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in tqdm(range(ROUNDS + 1), unit="round"):  # the first one compiles
        for name, call in calls.items():
            started = time.perf_counter()
            means = np.asarray(call(round_))[:, 0]
            seconds[name].append(time.perf_counter() - started)
            assert np.allclose(means[[0, 2]], SHIFT**2 / 2, atol=2e-3), (name, means)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    ratio = median["numpy"] / median["jax"]
    print(f"numpy {median['numpy'] * 1e3:.0f} ms, jax {median['jax'] * 1e3:.0f} ms: {ratio:.2f} times as fast")
    RESULTS.write_text(
        json.dumps({"samples": SAMPLES, "cpus": os.cpu_count(), "seconds": median, "ratio": ratio}) + "\n"
    )


if __name__ == "__main__":
    main()
