"""The gradients of k1, k2 and k3 and what they descend: as losses, as rewards, off-policy, and token by token.

    python -m experiments.kl_gradients --preset quick

Everything is exact: expectations over all sequences of a tabular model, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binom

from experiments import command, ledger
from experiments.ledger import rounded
from experiments.parts.expected_gradients import (
    ESTIMATORS,
    LM,
    Table,
    cosine,
    descend,
    expected_gradient,
    forward_kl,
    random_table,
    reverse_kl,
)
from experiments.parts.kl_misspecified import misspecified
from jaxrl_llm import oracle
from jaxrl_llm.objectives import kl
from jaxrl_llm.tabular import TabularLM

MODES = ("loss", "reward", "off-policy loss", "constant ratio", "through the ratio")
REVERSE, FORWARD = "∇KL(π‖ref)", "∇KL(ref‖π)"
SOURCE = "the table in objectives.kl, by oracle.gradient_moments"


@dataclasses.dataclass(frozen=True)
class Config:
    """Lengths of the descents, and over how many random models the missing share is taken."""

    steps: int = 600
    learning_rate: float = 1.0
    tied_steps: int = 3_000  # of the policy of independent tokens
    tied_learning_rate: float = 0.3
    horizons: tuple[int, ...] = (1, 2, 4)
    models: int = 12  # at each horizon
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """Compute the table of gradients, the descents, the misspecified descents and the missing share."""
    laws_key, share_key = jax.random.split(jax.random.key(config.seed))
    with jax.enable_x64(True):
        policy, ref, sampler = (random_table(LM, key) for key in jax.random.split(laws_key, 3))
        table, numbers = gradient_table(policy, ref, sampler)
        curves, curve_numbers = descents(config, policy, ref)
        tied, tied_numbers = misspecified(config)
        share, share_numbers = missing_share(config, share_key)
    return {
        "claim": "As a loss, k1 descends nothing, k2 the divergence KL(π‖ref), and k3 the other one, KL(ref‖π). On a "
        "reference that a policy of independent tokens cannot reach, k3 covers both modes and k2 picks one. Summed "
        "over tokens, k2 misses a part of ∇KL.",
        "numbers": [*numbers, *curve_numbers, *tied_numbers, *share_numbers],
        "data": rounded({"table": table, "descents": curves, "misspecified": tied, "missing": share}),
    }


@jax.jit
def compare(policy: Table, ref: Table, sampler: Table) -> dict[str, dict[str, jax.Array]]:
    """Compare each expected gradient with both divergences' gradients: cosine, relative error, size."""
    targets = {REVERSE: jax.grad(reverse_kl)(policy, ref), FORWARD: jax.grad(forward_kl)(policy, ref)}

    def entry(mode: str, which: jax.Array) -> dict[str, jax.Array]:
        gradient = expected_gradient(which, mode, policy, ref, sampler)
        compared = {"size": jnp.abs(gradient).max()}
        for target, exact in targets.items():
            compared[f"cosine {target}"] = cosine(gradient, exact)
            compared[f"error {target}"] = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
        return compared

    found = {mode: jax.vmap(functools.partial(entry, mode))(jnp.arange(len(ESTIMATORS))) for mode in MODES}
    return {
        f"{name}, {mode}": {field: value[which] for field, value in found[mode].items()}
        for which, name in enumerate(ESTIMATORS)
        for mode in MODES
    }


EXPECTED = {
    "k1, loss": "0",
    "k2, loss": REVERSE,
    "k3, loss": FORWARD,
    "k1, reward": REVERSE,
    "k1, constant ratio": "0",
    "k2, constant ratio": REVERSE,
    "k3, constant ratio": FORWARD,
    "k1, through the ratio": REVERSE,
    "k3, through the ratio": REVERSE,
}


def gradient_table(policy: Table, ref: Table, sampler: Table) -> tuple[list[dict[str, Any]], list[ledger.Number]]:
    """Return each cell with what it equals, if anything, and the numbers that say so."""
    rows, on_policy, off_policy, others = [], [], [], []
    for cell, entry in compare(policy, ref, sampler).items():
        entry = {name: float(value) for name, value in entry.items()}
        errors = {"0": entry["size"], REVERSE: entry[f"error {REVERSE}"], FORWARD: entry[f"error {FORWARD}"]}
        equals = [target for target, error in errors.items() if error < 1e-10]
        estimator, mode = cell.split(", ")
        rows.append({"estimator": estimator, "mode": mode, "equals": equals[0] if equals else None} | entry)
        if cell not in EXPECTED:
            others.append(min(errors[REVERSE], errors[FORWARD]))
        elif "ratio" in mode:
            off_policy.append(errors[EXPECTED[cell]])
        else:
            target = EXPECTED[cell]
            about = {"unit": "nats" if target == "0" else "relative", "source": SOURCE}
            name = f"{cell}: distance of E∇ from {target}"
            on_policy.append(ledger.identity(name, errors[target], tolerance=1e-10, **about))
    about = {"unit": "relative", "source": SOURCE}
    return rows, [
        *on_policy,
        ledger.identity(
            f"off-policy with a ratio, {len(off_policy)} cells: largest distance of E∇ from what it equals",
            max(off_policy),
            tolerance=1e-10,
            **about,
        ),
        ledger.test(
            f"the other {len(others)} cells: smallest distance of E∇ from both divergences' gradients",
            min(others),
            at_least=0.05,
            wrong=0.0,
            **about,
        ),
    ]


def descents(config: Config, start: Table, ref: Table) -> tuple[dict[str, Any], list[ledger.Number]]:
    """Follow each expected gradient from the same start, and return KL(π‖ref) on the way."""
    every = max(1, config.steps // 60)

    def path(mode: str, which: int | jax.Array) -> jax.Array:
        gradient_of = functools.partial(_gradient_at, which, mode, ref)
        _, tables = descend(start, gradient_of, config.learning_rate, steps=config.steps, every=every)
        return jax.vmap(lambda table: reverse_kl(table, ref))(tables)

    as_losses = jax.jit(jax.vmap(functools.partial(path, "loss")))(jnp.arange(len(ESTIMATORS)))
    paths = {f"{name} as a loss": as_losses[which] for which, name in enumerate(ESTIMATORS)}
    paths["k1 as a reward"] = jax.jit(functools.partial(path, "reward", 0))()
    at_start = float(paths["k1 as a loss"][0])
    drift = float(jnp.abs(paths["k1 as a loss"] - at_start).max())
    apart = float(jnp.abs(paths["k1 as a reward"] - paths["k2 as a loss"]).max())
    zero = {"tolerance": 1e-10, "unit": "nats"}
    numbers = [
        ledger.identity("k1 as a loss: how far KL(π‖ref) moves", drift, source="descent on E∇k1 = 0", **zero),
        ledger.identity("k1 as a reward against k2 as a loss", apart, source="one expected gradient, one path", **zero),
        *(
            ledger.measurement(
                f"{name} as a loss: KL(π‖ref) after {config.steps} steps over that at the start",
                float(paths[f"{name} as a loss"][-1]) / at_start,
                unit="1",
                source="descent on the exact expected gradient",
            )
            for name in ("k2", "k3")
        ),
    ]
    return {"steps": [every * index for index in range(len(paths["k1 as a loss"]))], "kl": paths}, numbers


def _gradient_at(which: int | jax.Array, mode: str, ref: Table, policy: Table) -> Table:
    return expected_gradient(which, mode, policy, ref)


def missing_share(config: Config, key: jax.Array) -> tuple[dict[str, Any], list[ledger.Number]]:
    """Compute how much of ∇KL a loss over tokens leaves out, at each length of the sequences."""
    shares, medians = {}, {}
    for horizon in config.horizons:
        keys = jax.random.split(jax.random.fold_in(key, horizon), config.models)
        share = jax.jit(jax.vmap(functools.partial(_missing, TabularLM(LM.vocab_size, horizon))))(keys)
        shares[str(horizon)], medians[str(horizon)] = share, _median(np.asarray(share))
    longest = str(max(config.horizons))
    median, low, high = medians[longest]
    source = f"{config.models} random models; Tang and Munos 2025, arXiv 2506.09477"
    name = f"{longest} tokens: median share of ∇KL that Σ_t k2 misses"
    numbers = [
        ledger.identity(
            "one token: share of ∇KL that Σ_t k2 misses",
            float(shares["1"].max()),
            tolerance=1e-10,
            unit="1",
            source="a sequence of one token has no later ones",
        ),
        ledger.test(f"{name}, lower end of its 95% interval", low, at_least=0.05, wrong=0.01, unit="1", source=source),
        ledger.measurement(name, median, confidence=(low, high), unit="1", source=source),
    ]
    return {"share": shares, "median": medians}, numbers


def _median(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median of independent values, and its 95% interval by order statistics; 6 values at least."""
    ordered, count = np.sort(values), len(values)
    beyond = int(binom.ppf(0.025, count, 0.5))
    return float(np.median(values)), float(ordered[beyond - 1]), float(ordered[count - beyond])


def _missing(lm: TabularLM, key: jax.Array) -> jax.Array:
    """‖∇KL − E∇Σ_t k2_t‖/‖∇KL‖ of one random policy and reference."""
    policy, ref = (random_table(lm, each) for each in jax.random.split(key))
    sequences = oracle.enumerate_sequences(lm)

    def loss(params, groups):
        tokens = [oracle.token_log_probs_of(lm, each, sequences) for each in (params, {"logits": ref})]
        return kl.k2(*tokens).sum(axis=1)[groups[:, 0]]

    found = oracle.gradient_moments(lm, {"logits": policy}, loss).mean["logits"]
    exact = oracle.sequence_kl_grad(lm, {"logits": policy}, {"logits": ref})["logits"]
    return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)


PRESETS = {"quick": Config(), "full": Config(models=64, horizons=(1, 2, 3, 4, 5))}


if __name__ == "__main__":
    command.main("kl_gradients", run, PRESETS, seeds=5)
