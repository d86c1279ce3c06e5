"""Time of a loss surface against a plain PyTorch loop over the same grid, and time and memory on tiny-gpt2.

    make benchmark        # or: PYTHONPATH=.parity python -m benchmarks.landscape

GPT-2 small with random weights, "I have a dream", 20 x 20 points over [−1, 1]², the same directions for both, in the
same run. The grid is cut into bands that the two take in turns. Trust the ratio; times on a shared machine drift.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxrl_llm import models, text
from jaxrl_llm.analysis import landscape

RESULTS = Path(__file__).parent / "results"
TOKENS = (40, 423, 257, 4320)  # "I have a dream" in GPT-2's own tokens
TINY = "I have a dream"

Band = Callable[[np.ndarray, np.ndarray], np.ndarray]  # alphas, betas -> losses


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    points: int = 20
    bands: int = 4
    tiny_points: int = 21
    seed: int = 0
    out: Path = RESULTS / "landscape.json"
    tiny_only: bool = False
    """Only print time and peak memory of tiny-gpt2: a process of its own, so that its memory is its own."""


def ours(lm: Any, params: Any, directions: tuple[Any, Any]) -> Band:
    """A band of the surface by this library."""
    loss = landscape.next_token_loss(lm, jnp.asarray([TOKENS]))
    return lambda alphas, betas: landscape.loss_surface(loss, params, directions, alphas, betas, progress=False)


def theirs(folder: Path, direction_folders: list[Path]) -> Band:
    """A band by a plain loop: write the parameters, call the model, read the loss."""
    import torch
    import transformers
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    steps = [load_file(each / "model.safetensors") for each in direction_folders]
    named = [
        (parameter, parameter.clone(), *(step[name] for step in steps)) for name, parameter in model.named_parameters()
    ]
    tokens = torch.tensor([TOKENS])

    @torch.inference_mode()
    def band(alphas: np.ndarray, betas: np.ndarray) -> np.ndarray:
        losses = np.zeros((len(alphas), len(betas)))
        for i, alpha in enumerate(alphas):
            for j, beta in enumerate(betas):
                for parameter, origin, first, second in named:
                    parameter.copy_(origin).add_(first, alpha=float(alpha)).add_(second, alpha=float(beta))
                losses[i, j] = model(tokens, labels=tokens).loss.item()
        return losses

    return band


def compare(config: Config) -> dict[str, Any]:
    """Seconds of each band by both, and how far their losses are apart."""
    lm = models.GPT2()
    params = lm.init(jax.random.key(config.seed))
    directions = landscape.random_directions(params, jax.random.key(config.seed + 1))
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("model", "first", "second")]
        for folder, tree in zip(folders, (params, *directions), strict=True):
            models.save(folder, lm, tree)
        runners = {"jaxrl_llm": ours(lm, params, directions), "torch": theirs(folders[0], folders[1:])}
    axis = landscape.axis(1.0, config.points)
    for run in runners.values():
        run(axis[:1], axis)  # compile, warm up: a row, as long as those that are timed
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    apart = 0.0
    for alphas in tqdm(np.array_split(axis, config.bands), unit="band"):
        found = {}
        for name, run in runners.items():
            started = time.perf_counter()
            found[name] = run(alphas, axis)
            seconds[name].append(time.perf_counter() - started)
        apart = max(apart, float(np.abs(found["jaxrl_llm"] - found["torch"]).max()))
    ratios = [theirs / ours for ours, theirs in zip(seconds["jaxrl_llm"], seconds["torch"], strict=True)]
    return {"seconds": seconds, "torch over jaxrl_llm": statistics.median(ratios), "largest difference in nats": apart}


def tiny(config: Config) -> dict[str, float]:
    """Seconds, compilation included, and peak memory of the default surface of tiny-gpt2, all of this process."""
    started = time.perf_counter()
    loaded = models.load("tiny-gpt2")
    tokens = jnp.asarray([text.encode(loaded.tokenizer, TINY)])
    loss = landscape.next_token_loss(loaded.model, tokens)
    directions = landscape.random_directions(loaded.params, jax.random.key(config.seed))
    axis = landscape.axis(1.0, config.tiny_points)
    landscape.loss_surface(loss, loaded.params, directions, axis, axis, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": time.perf_counter() - started, "peak MiB": peak}


def main(config: Config) -> None:
    """Time both, print the ratio, write the numbers."""
    if config.tiny_only:
        print(json.dumps(tiny(config)))
        return
    command = [sys.executable, "-m", "benchmarks.landscape", "--tiny-only", "--tiny-points", str(config.tiny_points)]
    cold = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    alone = subprocess.run(command, check=True, capture_output=True, text=True, env=cold)
    results = {"tiny-gpt2": json.loads(alone.stdout), "gpt2 small": compare(config)}
    print(
        f"tiny-gpt2, {config.tiny_points} x {config.tiny_points} points: {results['tiny-gpt2']['seconds']:.1f} s with "
        f"compilation, peak {results['tiny-gpt2']['peak MiB']:.0f} MiB"
    )
    small = results["gpt2 small"]
    totals = {name: sum(each) for name, each in small["seconds"].items()}
    print(
        f"GPT-2 small, {config.points} x {config.points}: {totals['jaxrl_llm']:.1f} s, torch {totals['torch']:.1f} s, "
        f"ratio {small['torch over jaxrl_llm']:.2f}; losses apart by {small['largest difference in nats']:.1e} nats"
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"cpus": os.cpu_count(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
