"""Speculative decoding: acceptance and tokens per round, measured against what the two distributions predict.

python -m experiments.speculative --preset quick
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import ledger
from experiments.frame import experiment
from experiments.statistics import student
from jaxrl_llm import models
from jaxrl_llm.decoding import DraftModel, PromptLookup, generate, speculative_generate
from jaxrl_llm.decoding.speculative import Speculation
from jaxrl_llm.language_model import LanguageModel

LEVIATHAN = "Leviathan et al. 2023"


@dataclasses.dataclass(frozen=True)
class Config:
    """A target, copies of it with noise on their weights as draft models, from good to bad, and look-up."""

    model: str = "tiny-gpt2"
    noises: tuple[float, ...] = (0.0, 0.06, 0.12, 0.25)
    """Noise of each draft model, times each tensor's own standard deviation."""
    num_draft: int = 4
    """Tokens drafted in a round, for all noises."""
    drafts: tuple[int, ...] = (1, 2, 8)
    """Other numbers of drafted tokens, for the first noise above 0."""
    rows: int = 128
    """Texts on which acceptance is measured."""
    new_tokens: int = 48
    timed_rows: int = 32
    """Texts on which look-up and time are measured."""
    timings: int = 5
    """Number of times that a program is timed."""
    seed: int = 0


@experiment(
    quick=Config(noises=(0.0, 0.06, 0.25), drafts=(1,), rows=16, timed_rows=16, timings=3), full=Config(), seeds=3
)
def run(config: Config) -> dict[str, Any]:
    """Measure every draft model at one length of draft, one of them at every length, and look-up."""
    loaded = models.load(config.model)
    names = ("noise", "target", "rounds")
    keys = dict(zip(names, jax.random.split(jax.random.key(config.seed), 3), strict=True))
    middle = config.noises[1]
    cases = [(noise, config.num_draft) for noise in config.noises] + [(middle, count) for count in config.drafts]
    asked = request(loaded, config, keys["rounds"], config.rows)
    sampled = sample_target(loaded, request(loaded, config, keys["target"], config.rows))
    rows = []
    for noise, count in tqdm(cases, unit="case"):
        draft = perturbed(loaded.params, noise, keys["noise"])
        predicted = dict(zip(("predicted", "predicted_se"), predicted_acceptance(loaded, draft, sampled), strict=True))
        found = speculation(loaded, asked, count, draft)()
        rows.append({"noise": noise, "drafts": count, **predicted, **acceptance(found), **per_round(config, found)})
        rows[-1] |= {"formula": formula(rows[-1]["accepted"], count)}
        rows[-1] |= {"formula_cut": formula_with_cut(rows[-1]["accepted"], count, config.new_tokens - 1)}
    timed = request(loaded, config, keys["rounds"], config.timed_rows)
    programs = {
        "plain": lambda: generate(loaded.model, loaded.params, **timed),
        "copy": speculation(loaded, timed, config.num_draft, loaded.params),
        "sampled": speculation(loaded, timed, config.num_draft, None),
        "greedy": speculation(loaded, timed, config.num_draft, None, greedy=True),
    }
    seconds = {name: seconds_of(program, config.timings) for name, program in programs.items()}
    look_up = {name: per_round(config, programs[name]()) for name in ("sampled", "greedy")}
    data = {"rows": rows, "look_up": look_up, "seconds": seconds, "middle": middle, "new_tokens": config.new_tokens}
    return {"claim": claim(rows), "numbers": numbers(rows, look_up, seconds), "data": data}


def claim(rows: list[dict[str, float]]) -> str:
    """Return the tested differences with their sizes."""
    return (
        f"A drafted token is accepted with probability Σ min(p, q): the rates of {len(rows)} settings differ from it "
        f"by {deviation(rows):.1f} standard errors at most. A round yields (1 − α^(γ+1))/(1 − α) tokens, minus those "
        f"that the end of a text cuts off: the prediction is off by {error_of_formula(rows):.1%} at most."
    )


def perturbed(params: Any, noise: float, key: jax.Array) -> Any:
    """Return the parameters with Gaussian noise, of `noise` times each tensor's standard deviation."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + noise * leaf.std() * jax.random.normal(each, leaf.shape, leaf.dtype)
        for leaf, each in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def request(loaded: models.Loaded, config: Config, key: jax.Array, rows: int) -> dict[str, Any]:
    """Return the arguments that all decoders share: the prompts, the number of new tokens, and the key."""
    prompts = jnp.full((rows, 1), loaded.tokenizer.bos_token_id, jnp.int32)
    return {"prompts": prompts, "max_new_tokens": config.new_tokens, "key": key}


def sample_target(loaded: models.Loaded, asked: dict[str, Any]) -> jax.Array:
    """Return texts of the target, on which both distributions are compared."""
    tokens = generate(loaded.model, loaded.params, **asked).tokens
    return jnp.concatenate([asked["prompts"], tokens], axis=1)


def predicted_acceptance(loaded: models.Loaded, draft: Any, texts: jax.Array) -> tuple[float, float]:
    """Return E Σ_v min(p_v, q_v) over the contexts of the target's own texts, with its standard error over texts."""
    found = np.asarray(_overlap(loaded.model, loaded.params, draft, texts), float)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found)))


@functools.partial(jax.jit, static_argnames="lm")
def _overlap(lm: LanguageModel, params: Any, draft: Any, texts: jax.Array) -> jax.Array:
    p, q = (jax.nn.softmax(lm.apply(each, texts[:, :-1])[0]) for each in (params, draft))
    return jnp.minimum(p, q).sum(axis=-1).mean(axis=1)


def speculation(
    loaded: models.Loaded, asked: dict[str, Any], count: int, draft: Any, *, greedy: bool = False
) -> Callable[[], Speculation]:
    """Return a call that generates, with the parameters of a draft model or, without, by look-up."""
    drafts = PromptLookup(3) if draft is None else DraftModel(loaded.model, draft)
    options = {"draft": drafts, "num_draft": count, "greedy": greedy, **asked}
    return lambda: speculative_generate(loaded.model, loaded.params, **options)


def acceptance(found: Speculation) -> dict[str, float]:
    """Return the share of accepted drafts, with its standard error over texts."""
    accepted, judged = (np.asarray(each, float) for each in (found.accepted, found.judged))
    rate, rows = accepted.sum() / judged.sum(), len(accepted)
    error = np.sqrt(((accepted - rate * judged) ** 2).sum() * rows / (rows - 1)) / judged.sum()  # of a ratio of means
    return {"accepted": rate, "se": error}


def per_round(config: Config, found: Speculation) -> dict[str, float]:
    """Return the tokens per round with a 95% interval over texts. The first token comes with the prompt."""
    mean, low, high = student(np.asarray(found.rounds, float))
    tokens = config.new_tokens - 1
    return {"per_round": tokens / mean, "per_round_low": tokens / high, "per_round_high": tokens / max(low, 1)}


def formula(rate: float, count: int) -> float:
    """Return the expected tokens of a round whose drafts are accepted independently."""
    return (1 - rate ** (count + 1)) / (1 - rate) if rate < 1 else count + 1.0


def formula_with_cut(rate: float, count: int, tokens: int) -> float:
    """Return the expected tokens per round of a text of `tokens` tokens, whose last round is cut off.

    With R(n) the expected rounds of n tokens, and P(j) the probability that a round brings j:
    R(n) = 1 + Σ_j P(j) R(max(n − j, 0)), R(0) = 0.
    """
    sizes = [rate ** (size - 1) * (1 - rate) for size in range(1, count + 1)] + [rate**count]
    rounds = [0.0]
    for left in range(1, tokens + 1):
        rounds.append(1 + sum(p * rounds[max(left - size, 0)] for size, p in enumerate(sizes, start=1)))
    return tokens / rounds[tokens]


def seconds_of(call: Callable[[], Any], count: int) -> list[float]:
    """Return the seconds of `count` calls, after compilation."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds


def deviation(rows: list[dict[str, float]]) -> float:
    """Return the largest difference of measured and predicted acceptance, in standard errors, of drafts with noise."""
    noisy = [row for row in rows if row["noise"] > 0]
    return max(abs(row["accepted"] - row["predicted"]) / np.hypot(row["se"], row["predicted_se"]) for row in noisy)


def error_of_formula(rows: list[dict[str, float]]) -> float:
    """Return the largest relative difference of measured and expected tokens per round."""
    return max(abs(row["per_round"] / row["formula_cut"] - 1) for row in rows)


def numbers(
    rows: list[dict[str, float]], look_up: dict[str, dict[str, float]], seconds: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Return the identity and tests of the claim, and measurements of speed."""
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    return [
        ledger.identity(
            "acceptance of a draft model that is the target",
            rows[0]["accepted"],
            expected=1.0,
            tolerance=1e-3,
            unit="",
            source="p = q, up to rounding",
        ),
        ledger.test(
            "largest |measured − predicted acceptance|",
            deviation(rows),
            at_most=4.0,
            wrong=10.0,
            unit="standard errors",
            source=f"E Σ min(p, q); {LEVIATHAN}, theorem 3.5; 4 is exceeded by chance once in 10,000",
        ),
        ledger.test(
            "largest relative error of the expected tokens per round",
            error_of_formula(rows),
            at_most=0.05,
            wrong=0.2,
            unit=f"over {len(rows)} settings",
            source=f"{LEVIATHAN}, eq. 1, for independent acceptances, with the last round cut; "
            "a round without the token that follows its drafts would be off by 0.2 or more",
        ),
        ledger.measurement(
            "tokens per round of look-up, sampled",
            *look_up["sampled"].values(),
            unit="",
            source="interval of Student's t over texts",
        ),
        ledger.measurement(
            "tokens per round of look-up, greedy", look_up["greedy"]["per_round"], unit="", source="one text"
        ),
        *(
            ledger.measurement(
                f"time of plain generation over that of speculation, {label}",
                medians["plain"] / medians[name],
                unit="",
                source=f"medians of {len(seconds[name])} runs on one machine; above 1 is faster",
            )
            for name, label in (("copy", "draft model as large as the target"), ("sampled", "look-up, sampled"))
        ),
    ]
