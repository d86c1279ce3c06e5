"""Many prompts of mixed lengths: `generate_many`, `generate` on fixed batches, and transformers' continuous batching.

    PYTHONPATH=.parity python -m benchmarks.many

A GPT-2 with random weights. Texts are sampled at temperature 1 and end at random: one token in `mean` of the vocabulary
is an EOS, so that lengths are nearly geometric, and no way knows them ahead. All ways of this library draw the same
texts; torch draws others, of the same lengths by a limit for each, which its scheduler does not use. Fixed batches
come in random order, and sorted by the length of their prompts. Trust the ratios; times on a shared machine drift, and
those of the processor less than those of the clock.
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

import jax
import numpy as np
import tyro
from tqdm import tqdm

from jaxrl_llm import models
from jaxrl_llm.decoding import core, generate, generate_many, many
from jaxrl_llm.decoding.generate import decode
from jaxrl_llm.models import GPT2, GPT2Config

Texts = list[list[int]]
Way = Callable[[Texts, np.ndarray], Texts]  # of prompts and the most new tokens of each


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is timed."""

    prompts: int = 512
    shortest: int = 8
    longest: int = 256
    rows: int = 32
    mean: int = 48
    """Tokens of a text without the limit, on average."""
    new_tokens: int = 128
    """The limit."""
    layers: int = 4
    width: int = 256
    vocab: int = 8192
    rounds: int = 2
    torch: bool = True
    out: Path = Path(__file__).parent / "results" / "many.json"


def ours(lm: GPT2, config: Config) -> dict[str, Way]:
    """The ways of this library."""
    params = lm.init(jax.random.key(0))
    ends = np.random.default_rng(1).permutation(config.vocab)[: config.vocab // config.mean]

    def texts(found: core.Generation) -> Texts:
        arrays = zip(np.asarray(found.tokens), np.asarray(found.mask), strict=True)
        return [row[mask].tolist() for row, mask in arrays]

    def batches(prompts: Texts, limits: np.ndarray, order: np.ndarray) -> Texts:
        keys = core.row_keys(jax.random.key(1), len(prompts))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), config.rows):
            part = order[start : start + config.rows]
            some = generate(
                lm, params, [prompts[i] for i in part], max_new_tokens=limits[part], key=keys[part], eos_id=ends
            )
            found |= dict(zip(part.tolist(), texts(some), strict=True))
        return [found[row] for row in range(len(prompts))]

    def continuously(prompts: Texts, limits: np.ndarray) -> Texts:
        key = jax.random.key(1)
        return texts(generate_many(lm, params, prompts, max_new_tokens=limits, rows=config.rows, key=key, eos_id=ends))

    def in_batches(name: str) -> Way:
        return lambda prompts, limits: batches(prompts, limits, orders(prompts)[name])

    return {**{name: in_batches(name) for name in orders([[0]])}, "generate_many": continuously}


def orders(prompts: Texts) -> dict[str, np.ndarray]:
    """The orders of fixed batches."""
    return {"fixed batches": np.arange(len(prompts)), "sorted batches": np.argsort([len(each) for each in prompts])}


def theirs(lm: GPT2, config: Config) -> Way:
    """transformers' continuous batching, of as many rows."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        models.save(folder, lm, lm.init(jax.random.key(0)))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(os.cpu_count())
    page = 64
    setting = transformers.ContinuousBatchingConfig(
        page_size=page,
        num_blocks=config.rows * -(-(config.longest + config.new_tokens) // page),
        max_requests_per_batch=config.rows,
        max_batch_tokens=config.longest + config.rows,
    )
    sampling = transformers.GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)

    def run(prompts: Texts, limits: np.ndarray) -> Texts:
        with model.continuous_batching_context_manager(
            generation_config=sampling, continuous_batching_config=setting, timeout=5
        ) as manager:
            names = [
                manager.add_request(prompt, max_new_tokens=int(limit))
                for prompt, limit in zip(prompts, limits, strict=True)
            ]
            found: dict[str, list[int]] = {}
            while len(found) < len(names):
                each = manager.get_result(timeout=1)
                if each is None and not manager.is_running():
                    raise RuntimeError("the thread of transformers' continuous batching has ended.")
                if each is not None and each.is_finished():
                    found[each.request_id] = list(each.generated_tokens)
        return [found[name] for name in names]

    return run


def make_prompts(config: Config) -> Texts:
    """Random prompts of uniform lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(config.shortest, config.longest + 1, config.prompts)
    return [rng.integers(0, config.vocab, length).tolist() for length in lengths]


def main(config: Config) -> None:
    """Time every way in turn, print and write the ratios."""
    sizes = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.width // 64}
    lm = GPT2(GPT2Config(vocab_size=config.vocab, **sizes))
    prompts, limits = make_prompts(config), np.full(config.prompts, config.new_tokens)
    ways, programs = ours(lm, config), {}
    for name, way in ways.items():  # compiles all programs: of each batch, one text goes on
        before = decode._cache_size() + many.advance._cache_size()
        brief = np.ones_like(limits)
        brief[orders(prompts).get(name, np.arange(config.prompts))[:: config.rows]] = config.new_tokens
        way(prompts, brief)
        programs[name] = decode._cache_size() + many.advance._cache_size() - before
    if config.torch:
        ways["transformers"] = theirs(lm, config)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    texts: dict[str, Texts] = {}
    for _ in tqdm(range(config.rounds), unit="round"):
        for name, way in ways.items():
            lengths = np.asarray([len(text) for text in texts.get("generate_many", [])])
            started = time.perf_counter(), time.process_time()
            texts[name] = way(prompts, lengths if name == "transformers" else limits)
            seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    tokens = sum(map(len, texts["generate_many"]))
    rows = {
        name: {
            "seconds": statistics.median(wall for wall, _ in each),
            "processor seconds": statistics.median(cpu for _, cpu in each),
            "tokens": sum(map(len, texts[name])),
            "texts of generate_many": sum(map(list.__eq__, texts[name], texts["generate_many"])),
            "programs": programs.get(name),
        }
        for name, each in seconds.items()
    }
    for name, row in rows.items():
        row["tokens per second"] = tokens / row["seconds"]
        print(f"{name}: {row['seconds']:.1f} s, {row['processor seconds']:.1f} s of processors, {row['tokens']} tokens")
    ratios = {
        kind: {name: row[kind] / rows["generate_many"][kind] for name, row in rows.items() if name != "generate_many"}
        for kind in ("seconds", "processor seconds")
    }
    print("generate_many: " + ", ".join(f"{ratio:.2f} times {name}" for name, ratio in ratios["seconds"].items()))
    about = {**dataclasses.asdict(config), "out": config.out.name, "cpus": os.cpu_count()}
    config.out.parent.mkdir(exist_ok=True)
    config.out.write_text(
        json.dumps({"config": about, "rows": rows, "speed of generate_many": ratios}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
