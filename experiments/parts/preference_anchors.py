"""Identities of the preference losses: at the reference, at their stated minimum, and between each other."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from experiments import ledger
from experiments.parts.preference_curves import at, evaluate


def identities(config: Any) -> list[dict[str, Any]]:
    """Compare the losses with their closed forms, in float64."""
    x = jnp.linspace(-5, 5, 101) / config.beta
    robust, clean, kto, apo = (
        evaluate(name, x / 2, -x / 2, config)[0] for name in ("robust_dpo", "dpo", "kto", "apo_zero")
    )
    flipped = evaluate("robust_dpo", -x / 2, x / 2, config)[0]
    debiased = (1 - config.smoothing) * robust + config.smoothing * flipped - clean
    value = max(abs(at(name, 0, config)[0] / expected - 1) for name, expected in at_the_reference(config).items())
    slope = max(abs(at(name, place, config)[1]) for name, place in flat_places(config))
    return [
        exact("largest relative difference of a loss from its closed form at the reference", value, unit=""),
        exact("largest |slope| where a loss is stated to be least or flat", slope, unit="per unit of βa"),
        exact("largest |mean of robust DPO over flipped labels − DPO|", jnp.abs(debiased).max(), unit="nats"),
        exact("largest |KTO − APO-zero|, equal weights, z = 0", jnp.abs(kto - apo).max(), unit=""),
    ]


def exact(name: str, value: Any, *, unit: str, source: str = "closed forms of objectives.preference") -> dict[str, Any]:
    """Return an identity of float64: 0 to rounding."""
    return ledger.identity(name, float(value), tolerance=1e-12, unit=unit, source=source)


def at_the_reference(config: Any) -> dict[str, float]:
    """Return each loss at Δ = 0."""
    smoothing, beta, log_two = config.smoothing, config.beta, math.log(2)
    return {
        "dpo": log_two,
        "cdpo": log_two,
        "robust_dpo": log_two,
        "f_dpo": log_two,
        "exo": -log_two - 0.5 * math.log(smoothing * (1 - smoothing)),
        "ipo": 1 / (4 * beta**2),
        "hinge": 1.0,
        "discopop": log_two / 2 + 0.5,
        "nca": 2 * log_two,
        "bco": 2 * log_two,
        "sppo": 1 / (2 * beta**2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "kto": 1.0,
    }


def flat_places(config: Any) -> list[tuple[str, float]]:
    """Return losses with a margin βΔ where their slope by the chosen reward is 0, on the path a = −b."""
    optimum = math.log((1 - config.smoothing) / config.smoothing)
    least = [("cdpo", optimum), ("exo", optimum), ("ipo", 0.5), ("sppo", 1.0), ("nca", 2 * math.log(2))]
    return [*least, ("apo_down", 0.0), ("hinge", 1.0), ("hinge", 5.0)]


def rising(config: Any) -> list[dict[str, Any]]:
    """Measure where DiscoPOP rises with the margin."""
    x = jnp.linspace(-1, 1, 20_001)
    _, by_chosen, _ = evaluate("discopop", x / config.beta / 2, -x / config.beta / 2, config)
    uphill = x[by_chosen > 0]
    return [
        ledger.measurement(
            f"DiscoPOP rises with the margin {word}",
            float(place),
            unit="βΔ",
            source=f"slope > 0 at temperature {config.temperature:g}; Lu et al. 2024: the loss is not convex",
        )
        for word, place in (("from", uphill.min()), ("up to", uphill.max()))
    ]
