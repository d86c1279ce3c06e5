"""A DPO epoch on pairs of mixed lengths: one text a row in random order, rows of like length together, and packed.

    python -m benchmarks.packing

Lengths are log-uniform, as most texts are short. All three take the same pairs, and batches of as many places; seconds
are those of all steps of an epoch, whose programs were compiled before. Trust the ratios; times on a shared machine
drift.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.scoring import pad_completions
from jaxrl_llm.training import steps
from jaxrl_llm.training.batches import EpochOrder
from jaxrl_llm.training.packing import PackedOrder, packed
from jaxrl_llm.training.preference import PairBatch, preference_loss

MULTIPLE = 32  # of padded lengths, as the trainers have it


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    pairs: int = 48
    shortest: int = 32
    longest: int = 512
    batch: int = 4
    """Pairs of a batch, and bins of two rows of the longest length."""
    layers: int = 2
    width: int = 128
    vocab: int = 2048
    rounds: int = 5
    out: Path = Path(__file__).parent / "results" / "packing.json"


def texts_of(config: Config) -> list[list[list[int]]]:
    """Chosen and rejected text of each pair."""
    rng = np.random.default_rng(0)
    bounds = np.log([config.shortest, config.longest + 1])
    lengths = np.exp(rng.uniform(*bounds, (config.pairs, 2))).astype(int)
    return [[rng.integers(0, config.vocab, length).tolist() for length in pair] for pair in lengths]


def collated(pairs: list[list[list[int]]], multiple: int) -> PairBatch:
    """Return the pairs as a batch; the first eight tokens of each text are its prompt."""
    longest = max(len(text) for pair in pairs for text in pair)
    sides = zip(*pairs, strict=True)
    return PairBatch(
        *(
            pad_completions([t[:8] for t in side], [t[8:] for t in side], multiple=multiple, length=longest)
            for side in sides
        )
    )


def loaders(config: Config) -> dict[str, list[Any]]:
    """Return all batches of an epoch of each form."""
    pairs = texts_of(config)
    lengths = [[len(text) for text in pair] for pair in pairs]
    random = np.random.default_rng(1).permutation(len(pairs)).reshape(-1, config.batch)
    alike = EpochOrder([max(each) for each in lengths], batch_size=config.batch, seed=0).epoch(0)
    order = PackedOrder(lengths, length=config.longest, batch_size=config.batch, seed=0)
    most = max(map(len, order.all))
    batches = []
    for bins in order.epoch(0):
        bins = [*bins, *[[]] * (config.batch - len(bins))]
        held = collated([pairs[each.record] for one in bins for each in one], MULTIPLE)
        batches.append(packed(held, bins, length=config.longest, most=most))
    unpacked = {"random order": random, "like lengths together": alike}
    return {
        **{name: [collated([pairs[i] for i in places], MULTIPLE) for places in all] for name, all in unpacked.items()},
        "packed": batches,
    }


def padding(batches: list[Any]) -> float:
    """Return the share of places that are padding."""
    masks = [leaf for batch in batches for leaf in jax.tree.leaves(batch) if leaf.dtype == bool and leaf.ndim > 1]
    places = sum(leaf.size for leaf in masks[::2])  # a mask of real tokens, then one of completions
    return 1 - sum(int(leaf.sum()) for leaf in masks[::2]) / places


def stepper(config: Config) -> Callable[[Any], None]:
    """Return a DPO step that keeps its state, the reference in it."""
    lm = GPT2(
        GPT2Config(vocab_size=config.vocab, n_embd=config.width, n_layer=config.layers, n_head=config.width // 64)
    )
    optimizer, ref = optax.adamw(1e-6), lm.init(jax.random.key(0))
    step = steps.make_step(preference_loss(lm, "dpo"), optimizer)
    held = {"state": steps.initial_state(ref, optimizer, jax.random.key(1))}

    def one(batch: Any) -> None:
        held["state"], metrics = step(held["state"], batch, steps.Frozen(ref=ref))
        metrics["loss"].block_until_ready()

    return one


def main(config: Config) -> None:
    """Time an epoch of each form in turn, print and write the ratios."""
    step, forms = stepper(config), loaders(config)
    rows = {name: {"steps": len(batches), "padding": padding(batches)} for name, batches in forms.items()}
    forms = {name: [jax.tree.map(jnp.asarray, batch) for batch in batches] for name, batches in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in tqdm(range(config.rounds + 1), unit="round"):  # the first one compiles
        total = dict.fromkeys(forms, 0.0)
        for batches in itertools.zip_longest(*forms.values()):  # in turns: the load of a shared machine drifts
            for name, batch in zip(forms, batches, strict=True):
                started = time.perf_counter()
                if batch is not None:
                    step(batch)
                total[name] += time.perf_counter() - started
        for name, each in total.items():
            seconds[name].append(each)
    tokens = sum(len(text) for pair in texts_of(config) for text in pair)
    for name, row in rows.items():
        row["programs"] = len({str(jax.tree.map(jnp.shape, batch)) for batch in forms[name]})
        row["seconds with compilation"] = seconds[name][0]
        row["seconds"] = statistics.median(seconds[name][1:])
        row["pairs per second"], row["tokens per second"] = config.pairs / row["seconds"], tokens / row["seconds"]
        row["steps per second"] = row["steps"] / row["seconds"]
        print(
            f"{name}: {row['steps']} steps, {row['padding']:.0%} padding, {row['programs']} programs; "
            f"{row['pairs per second']:.1f} pairs/s, {row['tokens per second']:.0f} tokens/s"
        )
    ratios = {name: row["seconds"] / rows["packed"]["seconds"] for name, row in rows.items() if name != "packed"}
    print("packed: " + ", ".join(f"{ratio:.2f} times the speed of {name}" for name, ratio in ratios.items()))
    about = {**dataclasses.asdict(config), "out": config.out.name, "cpus": os.cpu_count()}
    config.out.parent.mkdir(exist_ok=True)
    config.out.write_text(json.dumps({"config": about, "rows": rows, "speed of packed": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
