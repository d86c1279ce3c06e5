"""Tokens per second of `generate` against transformers + torch: the same weights, the same run, alternating.

    make benchmark        # or: PYTHONPATH=.parity python -m benchmarks.decode

GPT-2 small with random weights. torch gets its best setting: of one thread and all of them, with a passive wait policy,
what is faster in each case. Trust the ratios; times on a shared machine drift.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxrl_llm import models
from jaxrl_llm.decoding import beam_search, generate
from jaxrl_llm.decoding.transforms import Chain, TopK, TopP

RESULTS = Path(__file__).parent / "results"

Kind = Literal["greedy", "sampled", "beam"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    batches: tuple[int, ...] = (1, 8, 32)
    kinds: tuple[Kind, ...] = ("greedy", "sampled", "beam")
    beam_batch: int = 4
    num_beams: int = 4
    prompt: int = 32
    new_tokens: int = 32
    rounds: int = 5
    torch: bool = True
    out: Path = RESULTS / "decode.json"


def ours(folder: Path, dtype: jnp.dtype, config: Config) -> Callable[[int, Kind], None]:
    """A runner `(batch, kind)` of this library."""
    loaded = models.load(folder, dtype=dtype)

    def run(batch: int, kind: Kind) -> None:
        model, count = (loaded.model, loaded.params), {"max_new_tokens": config.new_tokens}
        prompts = jnp.asarray(make_prompts(batch, config))
        if kind == "beam":
            found = beam_search(*model, prompts, num_beams=config.num_beams, length_penalty=1.0, **count)
        elif kind == "sampled":
            found = generate(*model, prompts, transform=Chain((TopK(50), TopP(0.9))), key=jax.random.key(0), **count)
        else:
            found = generate(*model, prompts, greedy=True, **count)
        found.tokens.block_until_ready()

    return run


def theirs(folder: Path, dtype: str, config: Config) -> Callable[[int, Kind], None]:
    """A runner `(batch, kind)` of transformers + torch; the first run of a case finds the best number of threads."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    threads = {}

    def run(batch: int, kind: Kind) -> None:
        if (batch, kind) not in threads:
            times = {}
            for count in (1, os.cpu_count()):
                torch.set_num_threads(count)
                times[count] = min(seconds(call, batch, kind) for _ in range(3))
            threads[batch, kind] = min(times, key=times.get)
        torch.set_num_threads(threads[batch, kind])
        call(batch, kind)

    def call(batch: int, kind: Kind) -> None:
        chosen = {
            "greedy": {"do_sample": False},
            "sampled": {"do_sample": True, "top_k": 50, "top_p": 0.9},
            "beam": {"do_sample": False, "num_beams": config.num_beams, "early_stopping": "never"},
        }[kind]
        prompts = torch.tensor(make_prompts(batch, config))
        count = {"max_new_tokens": config.new_tokens, "min_new_tokens": config.new_tokens, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), **chosen, **count)

    return run


def make_prompts(batch: int, config: Config) -> np.ndarray:
    """Random prompts, the same for everyone."""
    return np.random.default_rng(0).integers(0, 50257, (batch, config.prompt))


def seconds(run: Callable[[int, Kind], None], batch: int, kind: Kind) -> float:
    """One timed call."""
    started = time.perf_counter()
    run(batch, kind)
    return time.perf_counter() - started


def main(config: Config) -> None:
    """Time everything, print a table, write the numbers."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lm = models.GPT2()
        models.save(folder, lm, lm.init(jax.random.key(0)))
        runners = {"float32": ours(folder, jnp.float32, config), "bfloat16": ours(folder, jnp.bfloat16, config)}
        if config.torch:
            runners |= {f"torch {dtype}": theirs(folder, dtype, config) for dtype in ("float32", "bfloat16")}
    plain = [kind for kind in config.kinds if kind != "beam"]
    cases = [(batch, kind) for batch in config.batches for kind in plain]
    cases += [(config.beam_batch, "beam")] if "beam" in config.kinds else []
    rows = []
    for batch, kind in tqdm(cases, unit="case"):
        times: dict[str, list[float]] = {name: [] for name in runners}
        for run in runners.values():
            seconds(run, batch, kind)  # compile, warm up
        for _ in range(config.rounds):
            for name, run in runners.items():
                times[name].append(seconds(run, batch, kind))
        speed = {name: batch * config.new_tokens / statistics.median(each) for name, each in times.items()}
        rows.append({"batch": batch, "kind": kind, "tokens_per_second": speed, "seconds": times})
        tqdm.write(describe(rows[-1]))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    rows += [row for row in measured_before(config.out) if (row["batch"], row["kind"]) not in cases]
    rows.sort(key=lambda row: (row["kind"], row["batch"]))
    settings = {"prompt": config.prompt, "new_tokens": config.new_tokens, "rounds": config.rounds}
    config.out.write_text(json.dumps({"config": settings, "cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n")


def measured_before(path: Path) -> list[dict]:
    """The rows of an earlier run, of which this one may repeat some."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def describe(row: dict) -> str:
    """One line of the table."""
    speed = row["tokens_per_second"]
    line = f"batch {row['batch']:3d} {row['kind']:7s}"
    line += "".join(f"  {name} {value:7.1f} tok/s" for name, value in speed.items())
    if len(speed) > 2:
        line += "".join(
            f"  {name}/torch {speed[name] / speed['torch ' + name]:.2f}" for name in ("float32", "bfloat16")
        )
    return line


if __name__ == "__main__":
    main(tyro.cli(Config))
