"""Speculative decoding: acceptance and tokens per round, measured against what the two laws predict.

python -m experiments.speculative --preset quick
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger  # noqa: E402
from jaxrl_llm import models  # noqa: E402
from jaxrl_llm.decoding import generate, speculative_generate  # noqa: E402

LEVIATHAN = "Leviathan et al. 2023"


@dataclasses.dataclass(frozen=True)
class Config:
    """tiny-gpt2 as the target; the same with noise on its weights as draft models, from good to bad, and look-up."""

    model: str = "tiny-gpt2"
    noises: tuple[float, ...] = (0.0, 0.06, 0.12, 0.25)  # times each tensor's own spread
    drafts: tuple[int, ...] = (1, 2, 4)  # tokens of a round, for the first noise above 0
    num_draft: int = 4  # for all noises
    rows: int = 32
    new_tokens: int = 48
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(rows=512)}


def run(config: Config) -> dict[str, Any]:
    """Every draft model at one length of draft, one of them at every length, and look-up."""
    loaded = models.load(config.model)
    names = ("noise", "target", "rounds")
    keys = dict(zip(names, jax.random.split(jax.random.key(config.seed), 3), strict=True))
    middle = config.noises[1]
    cases = [(noise, config.num_draft) for noise in config.noises]
    cases += [(middle, count) for count in config.drafts if count != config.num_draft]
    sampled = sample_target(loaded, config, keys["target"])
    rows = []
    for noise, count in tqdm(cases, unit="case"):
        draft = perturbed(loaded.params, noise, keys["noise"])
        expected = predicted_acceptance(loaded, draft, sampled)
        rows.append(
            {"noise": noise, "drafts": count, "predicted": expected} | measure(loaded, config, keys, count, draft)
        )
    look_up = {
        "sampled": measure(loaded, config, keys, config.num_draft, None),
        "greedy": measure(loaded, config, keys, config.num_draft, None, greedy=True),
    }
    plain = seconds_of(lambda: generate(loaded.model, loaded.params, **request(loaded, config, keys["rounds"])))
    worst = max(abs(row["accepted"] - row["predicted"]) / row["se"] for row in rows if row["se"] > 0)
    best, least = max(row["per_round"] for row in rows), min(row["per_round"] / row["formula"] for row in rows)
    return {
        "claim": f"A draft is accepted with probability Σ min(p, q), as measured in {len(rows)} settings, and a round "
        f"brings (1 − α^(γ+1))/(1 − α) tokens, less what the last round of a row is cut by: {best:.1f} at most, never "
        f"less than {100 * least:.0f} per cent of the formula.",
        "numbers": numbers(rows, look_up, worst, plain),
        "data": ledger.rounded({"rows": rows, "look_up": look_up, "plain_seconds": plain, "middle": middle}),
    }


def perturbed(params: Any, noise: float, key: jax.Array) -> Any:
    """The parameters with Gaussian noise, of `noise` times each tensor's standard deviation."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + noise * leaf.std() * jax.random.normal(each, leaf.shape, leaf.dtype)
        for leaf, each in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def request(loaded: models.Loaded, config: Config, key: jax.Array) -> dict[str, Any]:
    """The same task for every decoder: from the beginning of a text."""
    prompts = jnp.full((config.rows, 1), loaded.tokenizer.bos_token_id, jnp.int32)
    return {"prompts": prompts, "max_new_tokens": config.new_tokens, "key": key}


def sample_target(loaded: models.Loaded, config: Config, key: jax.Array) -> jax.Array:
    """Texts of the target, on which both laws are compared."""
    asked = request(loaded, config, key)
    tokens = generate(loaded.model, loaded.params, **asked).tokens
    return jnp.concatenate([asked["prompts"], tokens], axis=1)


def predicted_acceptance(loaded: models.Loaded, draft: Any, texts: jax.Array) -> float:
    """E Σ_v min(p_v, q_v) over the contexts of the target's own texts."""

    @jax.jit
    def overlap(params: Any, draft: Any) -> jax.Array:
        p, q = (jax.nn.softmax(loaded.model.apply(each, texts[:, :-1])[0]) for each in (params, draft))
        return jnp.minimum(p, q).sum(axis=-1).mean()

    return float(overlap(loaded.params, draft))


def measure(
    loaded: models.Loaded, config: Config, keys: dict[str, jax.Array], count: int, draft: Any, *, greedy: bool = False
) -> dict[str, float]:
    """Acceptance with its standard error over rows, tokens per round, and seconds."""
    drafting = {"lookup_ngram": 3} if draft is None else {"draft_lm": loaded.model, "draft_params": draft}
    asked = request(loaded, config, keys["rounds"])

    def call() -> Any:
        return speculative_generate(loaded.model, loaded.params, num_draft=count, greedy=greedy, **drafting, **asked)

    seconds, found = seconds_of(call), call()
    accepted, judged = (np.asarray(each, float) for each in (found.accepted, found.judged))
    rate = accepted.sum() / judged.sum()
    rows = len(accepted)
    error = np.sqrt(((accepted - rate * judged) ** 2).sum() * rows / (rows - 1)) / judged.sum()  # of a ratio of means
    emitted = float(found.generation.mask.sum() - rows)  # the first token comes with the prompt
    per_round = emitted / float(found.rounds.sum())
    full = (1 - rate ** (count + 1)) / (1 - rate) if rate < 1 else count + 1.0
    return {"accepted": rate, "se": error, "per_round": per_round, "formula": full, "seconds": seconds}


def seconds_of(call: Any) -> float:
    """Of the second call, compiled."""
    jax.block_until_ready(call())
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def numbers(
    rows: list[dict[str, float]], look_up: dict[str, dict[str, float]], worst: float, plain: float
) -> list[dict[str, Any]]:
    """What would prove the claim wrong."""
    equal = rows[0]
    entries = [
        ledger.number(
            "acceptance of a draft model that is the target",
            equal["accepted"],
            expected=1.0,
            tolerance=1e-3,
            unit="",
            source="p = q, up to rounding",
        ),
        ledger.number(
            "largest |measured − predicted acceptance|",
            worst,
            interval=(None, 4.0),
            unit="standard errors",
            source=f"E Σ min(p, q); {LEVIATHAN}, theorem 3.5",
        ),
    ]
    entries += [
        ledger.number(
            f"tokens per round over the formula's, noise {row['noise']:g}, {row['drafts']} drafts",
            row["per_round"] / row["formula"],
            interval=(0.9, 1.05),
            unit=f"of {row['formula']:.2f}",
            source=f"{LEVIATHAN}, eq. 1: for independent acceptances, and rounds that are not cut",
        )
        for row in rows
    ]
    entries += [
        ledger.number(
            f"tokens per round of look-up, {kind}", found["per_round"], interval=(1.0, None), unit="", source="measured"
        )
        for kind, found in look_up.items()
    ]
    entries += [
        ledger.number(
            "seconds of plain generation over those of speculation, look-up, sampled",
            plain / look_up["sampled"]["seconds"],
            unit="",
            source="measured on this machine; above 1 is faster",
        ),
        ledger.number(
            "the same for the draft model of the target's own size",
            plain / rows[0]["seconds"],
            unit="",
            source="measured; a draft model that costs as much as the target cannot win",
        ),
    ]
    return entries


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/speculative.json`."""
    ledger.run_and_write("speculative", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
