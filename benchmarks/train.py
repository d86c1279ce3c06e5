"""A DPO step of GPT-2 small against a plain PyTorch loop, and where the time of a GRPO step goes.

    make benchmark        # or: PYTHONPATH=.parity python -m benchmarks.train

GPT-2 small with random weights, AdamW, the reference's log-probabilities computed in the step. Each side has a process
of its own, so that its peak memory is its own; they take their steps in turns. Trust the ratios; times on a shared
machine drift.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tyro
from tqdm import tqdm

from jaxrl_llm import runtime

RESULTS = Path(__file__).parent / "results"
BETA, LEARNING_RATE = 0.1, 1e-6
Side = Literal["float32", "bfloat16", "torch float32", "torch bfloat16"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    pairs: int = 4
    length: int = 128
    rounds: int = 5
    prompts: int = 4
    answers: int = 4
    prompt_length: int = 32
    new_tokens: int = 32
    out: Path = RESULTS / "train.json"
    side: Side | None = None
    """Be one of the processes: a step for every line of standard input."""


def batch_of(config: Config) -> np.ndarray:
    """Chosen answers, then rejected ones; the first eighth of each row is its prompt."""
    return np.random.default_rng(0).integers(0, 50257, (2 * config.pairs, config.length))


def ours(config: Config, dtype: str) -> Callable[[], float]:
    """A step of this library, as `jaxrl-llm train dpo` makes it."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxrl_llm.models import GPT2
    from jaxrl_llm.scoring import Sequences
    from jaxrl_llm.training import steps
    from jaxrl_llm.training.preference import PairBatch, preference_loss

    lm = GPT2()
    tokens = jnp.asarray(batch_of(config))
    real = jnp.ones(tokens.shape, bool)
    answer = real & (jnp.arange(config.length) >= config.length // 8)
    sides = [Sequences(tokens[at], real[at], answer[at]) for at in (np.s_[: config.pairs], np.s_[config.pairs :])]
    optimizer = optax.adamw(LEARNING_RATE)
    view = steps.compute_in(dtype) if dtype == "bfloat16" else None
    step = steps.make_step(preference_loss(lm, "dpo", beta=BETA), optimizer, view=view)
    ref = lm.init(jax.random.key(1))
    if view is not None:
        ref = view(ref, None)
    # Built without a second copy of the parameters: the state owns what `init` gives.
    params = lm.init(jax.random.key(0))
    held = {"state": steps.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(2))}
    del params
    runtime.return_memory()

    def one() -> float:
        started = time.perf_counter()
        held["state"], metrics = step(held["state"], PairBatch(*sides), steps.Frozen(ref=ref))
        float(metrics["loss"])
        return time.perf_counter() - started

    return one


def theirs(config: Config, dtype: str) -> Callable[[], float]:
    """A plain loop of PyTorch and transformers, with AdamW and the reference under no_grad; bfloat16 is autocast."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, ref = (transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device).eval() for _ in range(2))
    ref.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    tokens = torch.as_tensor(batch_of(config), device=device)
    answer = torch.arange(1, config.length, device=device) >= config.length // 8

    def sums(model: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(tokens[:, :-1]).logits
        logp = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
        return (logp * answer).sum(-1)

    def one() -> float:
        started = time.perf_counter()
        with torch.no_grad():
            reference = sums(ref)
        ratios = sums(policy) - reference
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[: config.pairs] - ratios[config.pairs :])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        return time.perf_counter() - started

    return one


def be(side: Side, config: Config) -> None:
    """Answer every line of standard input with the seconds of a step, and the end of it with the peak memory."""
    library, _, dtype = side.rpartition(" ")
    step = theirs(config, dtype) if library else ours(config, dtype)
    step()  # compile, warm up
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, flush=True)


def dpo(config: Config) -> dict[str, dict[str, Any]]:
    """Seconds of each step and peak memory of each side."""
    sizes = ["--pairs", str(config.pairs), "--length", str(config.length)]
    sides = get_args(Side)
    found = {side: {"seconds": []} for side in sides}
    processes = {}
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.train", "--side", side, *sizes]
        processes[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while processes[side].stdout.readline().strip() != "ready":
            if processes[side].poll() is not None:
                raise RuntimeError(f"the side {side} ended with status {processes[side].returncode}.")
    for _ in tqdm(range(config.rounds), unit="round"):
        for side, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            found[side]["seconds"].append(float(process.stdout.readline()))
    for side, process in processes.items():
        process.stdin.close()
        found[side]["peak MiB"] = float(process.stdout.readline())
        process.wait()
    return found


def grpo(config: Config) -> dict[str, float]:
    """Median seconds of drawing answers, scoring them and updating, of GPT-2 small in float32."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxrl_llm.models import GPT2
    from jaxrl_llm.training import policy, steps
    from jaxrl_llm.training.policy import METHODS
    from jaxrl_llm.training.rollout import Prompts, Sampler

    lm, optimizer = GPT2(), optax.adamw(LEARNING_RATE)
    method = dataclasses.replace(METHODS["grpo"], group_size=config.answers)
    trainer = policy.online(lm, optimizer)
    ref = lm.init(jax.random.key(0))
    state = steps.initial_state(ref, optimizer, jax.random.key(1))
    shape = (config.prompts, config.prompt_length)
    prompts = Prompts(jax.random.randint(jax.random.key(2), shape, 0, lm.vocab_size), jnp.ones(shape, bool))
    sampler, frozen = Sampler(config.new_tokens), steps.Frozen(ref=ref)
    rewards = jnp.arange(config.prompts * config.answers) % 3 * 1.0
    seconds = {"rollout": [], "score": [], "update": []}
    for _ in range(config.rounds + 1):
        marks = [time.perf_counter()]
        drawn = trainer.draw(state, prompts, sampler, frozen, group_size=config.answers, critic=False)
        jax.block_until_ready(drawn)
        marks.append(time.perf_counter())
        batch, _ = jax.block_until_ready(trainer.score(state, drawn, rewards, method, frozen, 1.0))
        marks.append(time.perf_counter())
        state, _ = jax.block_until_ready(trainer.update(state, batch, method, frozen, None, 1.0))
        marks.append(time.perf_counter())
        for name, start, end in zip(seconds, marks, marks[1:], strict=False):
            seconds[name].append(end - start)
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first compiles
    tokens = config.prompts * config.answers * config.new_tokens
    return {
        "seconds": medians,
        "new tokens per second": tokens / sum(medians.values()),
        "device": str(jax.devices()[0]),
    }


def main(config: Config) -> None:
    """Time all, print the ratios, write the numbers."""
    if not str(config.side).startswith("torch"):
        runtime.keep_memory()
    if config.side is not None:
        be(config.side, config)
        return
    found = dpo(config)
    for side, each in found.items():
        each["median"] = statistics.median(each["seconds"])
        print(
            f"DPO, {config.pairs} pairs x {config.length} tokens, {side}: {each['median']:.2f} s, "
            f"peak {each['peak MiB']:.0f} MiB"
        )
    for dtype in ("float32", "bfloat16"):
        torch, here = found[f"torch {dtype}"], found[dtype]
        here["speed / torch"] = torch["median"] / here["median"]
        here["peak / torch"] = here["peak MiB"] / torch["peak MiB"]
        print(f"{dtype}: {here['speed / torch']:.2f} times torch's speed, {here['peak / torch']:.2f} of its peak")
    online = grpo(config)
    whole = sum(online["seconds"].values())
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in online["seconds"].items())
    print(f"GRPO on {online['device']}: {online['new tokens per second']:.1f} new tokens/s ({shares})")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"cpus": os.cpu_count(), "dpo": found, "grpo": online}
    config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
