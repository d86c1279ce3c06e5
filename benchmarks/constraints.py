"""Regular expressions compiled for the vocabularies of SmolLM2 and Gemma 3, each in a process of its own.

    PYTHONPATH=.parity python -m benchmarks.constraints

The seconds are those of the first call. Trust the CPU seconds; the others on a shared machine drift.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from jaxrl_llm import text
from jaxrl_llm.decoding import constraints
from jaxrl_llm.models import gguf, loading

PATTERNS = {
    "word": r"\w{1,64}",
    "letters": r"[^\W\d_]{1,30}",
    "any": ".{0,1000}",
    "address": r"[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){1,3}",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The vocabularies, and where the results go."""

    models: tuple[str, ...] = ("smollm2-135m-instruct", "gemma-3-270m")
    out: Path = Path(__file__).parent / "results" / "constraints.json"


def vocabulary(name: str) -> list[bytes]:
    """Return the bytes of each token of a model."""
    file = gguf.read(loading.locate(name))
    return text.token_bytes(file.tokenizer(), file.config["vocab_size"])


def measured(pattern: str, pieces: list[bytes]) -> dict[str, float]:
    """Compile the pattern once."""
    jnp.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    automaton = constraints.from_regex(pattern, pieces)
    seconds = {"seconds": time.perf_counter() - wall, "CPU seconds": time.process_time() - cpu}
    leaves = jax.tree.leaves(automaton)
    return seconds | {
        "peak memory added, MiB": (peak() - before) / 2**10,
        "memory of the tables, MiB": sum(leaf.nbytes for leaf in leaves) / 2**20,
        "entries of the tables": sum(leaf.size for leaf in leaves),
        "vocabulary": len(pieces),
    }


def peak() -> int:
    """Return the peak memory of this process on Linux, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status[status.index("VmHWM") :].split()[1])


def run(config: Config) -> dict[str, dict[str, float]]:
    """Measure each pattern for each vocabulary."""
    rows = {}
    for model in config.models:
        pieces = vocabulary(model)
        for name, pattern in tqdm(PATTERNS.items(), desc=model):
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
                rows[f"{model}, {name}"] = {"pattern": pattern, **process.submit(measured, pattern, pieces).result()}
    return rows


def main(config: Config) -> None:
    """Measure, print and write the results."""
    rows = run(config)
    for name, row in rows.items():
        print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in row.items() if key != 'pattern')}")
    settings = dataclasses.asdict(config) | {"out": config.out.name, "cpus": os.cpu_count()}
    config.out.write_text(json.dumps({"config": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
