"""What the gradients of k1, k2 and k3 descend: as losses, as rewards, off-policy, and token by token.

    python -m experiments.kl_gradients --preset quick

Everything is exact: expectations over all sequences of a tabular model, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts.expected_gradients import (  # noqa: E402
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
from experiments.parts.kl_misspecified import misspecified  # noqa: E402
from jaxrl_llm import oracle  # noqa: E402
from jaxrl_llm.objectives import kl  # noqa: E402
from jaxrl_llm.tabular import TabularLM  # noqa: E402

MODES = ("loss", "reward", "off-policy loss", "constant ratio", "through the ratio")
REVERSE, FORWARD = "∇KL(π‖ref)", "∇KL(ref‖π)"
SOURCE = "the table in objectives.kl, by oracle.gradient_moments"


@dataclasses.dataclass(frozen=True)
class Config:
    """Lengths of the descents, and over how many random models the missing share is taken."""

    steps: int = 600
    learning_rate: float = 1.0
    tied_steps: int = 3_000
    tied_learning_rate: float = 0.3
    horizons: tuple[int, ...] = (1, 2, 3, 4, 5)
    models: int = 16
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """The table of gradients, the descents, the misspecified descents, the missing share."""
    laws_key, share_key = jax.random.split(jax.random.key(config.seed))
    with jax.enable_x64(True):
        policy, ref, sampler = (random_table(LM, key) for key in jax.random.split(laws_key, 3))
        table, numbers = gradient_table(policy, ref, sampler)
        curves, curve_numbers = descents(config, policy, ref)
        tied, tied_numbers = misspecified(config)
        share, share_numbers = missing_share(config, share_key)
    return {
        "claim": "As a loss, k1 descends nothing, k2 the divergence KL(π‖ref), and k3 the other one, KL(ref‖π); where "
        "the policy cannot reach the reference, k3 covers its modes and k2 picks one.",
        "numbers": [*numbers, *curve_numbers, *tied_numbers, *share_numbers],
        "data": rounded({"table": table, "descents": curves, "misspecified": tied, "missing": share}),
    }


@jax.jit
def compare(policy: Table, ref: Table, sampler: Table) -> dict[str, dict[str, jax.Array]]:
    """Each expected gradient against both divergences' gradients: cosine, relative error, size."""
    targets = {REVERSE: jax.grad(reverse_kl)(policy, ref), FORWARD: jax.grad(forward_kl)(policy, ref)}
    found = {}
    for name in ESTIMATORS:
        for mode in MODES:
            gradient = expected_gradient(name, mode, policy, ref, sampler)
            entry = {"size": jnp.abs(gradient).max()}
            for target, exact in targets.items():
                entry[f"cosine {target}"] = cosine(gradient, exact)
                entry[f"error {target}"] = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
            found[f"{name}, {mode}"] = entry
    return found


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


def gradient_table(policy: Table, ref: Table, sampler: Table) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each cell with what it equals, if anything, and the numbers of the cells that should equal something."""
    rows, numbers = [], []
    for cell, entry in compare(policy, ref, sampler).items():
        entry = {name: float(value) for name, value in entry.items()}
        errors = {"0": entry["size"], REVERSE: entry[f"error {REVERSE}"], FORWARD: entry[f"error {FORWARD}"]}
        equals = [target for target, error in errors.items() if error < 1e-10]
        estimator, mode = cell.split(", ")
        rows.append({"estimator": estimator, "mode": mode, "equals": equals[0] if equals else None} | entry)
        if cell in EXPECTED:
            target = EXPECTED[cell]
            unit = "nats" if target == "0" else "relative"
            name = f"{cell}: distance of E∇ from {target}"
            numbers.append(ledger.number(name, errors[target], expected=0.0, tolerance=1e-10, unit=unit, source=SOURCE))
        else:
            name = f"{cell}: distance from the nearest of both divergences' gradients"
            nearest = min(errors[REVERSE], errors[FORWARD])
            numbers.append(ledger.number(name, nearest, interval=(0.05, None), unit="relative", source=SOURCE))
    return rows, numbers


def descents(config: Config, start: Table, ref: Table) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """KL(π‖ref) while each expected gradient is followed from the same start."""
    every = max(1, config.steps // 60)
    arms = {f"{name} as a loss": (name, "loss") for name in ESTIMATORS} | {"k1 as a reward": ("k1", "reward")}
    paths, along = {}, jax.jit(jax.vmap(lambda table: reverse_kl(table, ref)))
    for label, (name, mode) in arms.items():
        gradient_of = functools.partial(_gradient_at, name, mode, ref)
        _, path = descend(start, gradient_of, config.learning_rate, steps=config.steps, every=every)
        paths[label] = along(path)
    at_start = float(paths["k1 as a loss"][0])
    drift = float(jnp.abs(paths["k1 as a loss"] - at_start).max())
    apart = float(jnp.abs(paths["k1 as a reward"] - paths["k2 as a loss"]).max())
    zero = {"expected": 0.0, "tolerance": 1e-10, "unit": "nats"}
    numbers = [
        ledger.number("k1 as a loss: how far KL(π‖ref) moves", drift, source="descent on E∇k1 = 0", **zero),
        ledger.number("k1 as a reward against k2 as a loss", apart, source="one expected gradient, one path", **zero),
        *(
            ledger.number(
                f"{label}: KL(π‖ref) after {config.steps} steps over that at the start",
                float(paths[label][-1]) / at_start,
                interval=(0.0, 0.05),
                unit="1",
                source="descent on the exact expected gradient",
            )
            for label in ("k2 as a loss", "k3 as a loss")
        ),
    ]
    return {"steps": [every * index for index in range(len(paths["k1 as a loss"]))], "kl": paths}, numbers


def _gradient_at(name: str, mode: str, ref: Table, policy: Table) -> Table:
    return expected_gradient(name, mode, policy, ref)


def missing_share(config: Config, key: jax.Array) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How much of ∇KL a loss over tokens leaves out, at each length of the sequences."""
    shares, cosines = {}, {}
    for horizon in config.horizons:
        keys = jax.random.split(jax.random.fold_in(key, horizon), config.models)
        share, cos = jax.jit(jax.vmap(functools.partial(_missing, TabularLM(LM.vocab_size, horizon))))(keys)
        shares[str(horizon)], cosines[str(horizon)] = share, cos
    longest = str(max(config.horizons))
    numbers = [
        ledger.number(
            "one token: share of ∇KL that Σ_t k2 misses",
            float(shares["1"].max()),
            expected=0.0,
            tolerance=1e-10,
            unit="1",
            source="a sequence of one token has no later ones",
        ),
        ledger.number(
            f"{longest} tokens: median share of ∇KL that Σ_t k2 misses",
            float(jnp.median(shares[longest])),
            interval=(0.05, None),
            unit="1",
            source="Tang and Munos 2025, arXiv 2506.09477",
        ),
    ]
    return {"share": shares, "cosine": cosines}, numbers


def _missing(lm: TabularLM, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """‖∇KL − E∇Σ_t k2_t‖/‖∇KL‖ of one random policy and reference, and the cosine of the two."""
    policy, ref = (random_table(lm, each) for each in jax.random.split(key))
    sequences = oracle.enumerate_sequences(lm)

    def loss(params, groups):
        tokens = [oracle.token_log_probs_of(lm, each, sequences) for each in (params, {"logits": ref})]
        return kl.k2(*tokens).sum(axis=1)[groups[:, 0]]

    found = oracle.gradient_moments(lm, {"logits": policy}, loss).mean["logits"]
    exact = oracle.sequence_kl_grad(lm, {"logits": policy}, {"logits": ref})["logits"]
    return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact), cosine(found, exact)


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/kl_gradients.json`.

    Args:
        preset: full takes the missing share over more random models.
    """
    ledger.run_and_write("kl_gradients", run, PRESETS[preset], preset)


PRESETS = {"quick": Config(), "full": Config(models=64)}

if __name__ == "__main__":
    tyro.cli(main)
