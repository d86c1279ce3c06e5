"""What is known in closed form of every preference loss: values, slopes and least points."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from experiments import ledger
from experiments.parts.preference_curves import at, evaluate


def anchored(title: str, value: float, expected: float, source: str, unit: str = "nats") -> dict[str, Any]:
    """A number with a closed form, to be met in float64."""
    return ledger.number(title, value, expected=expected, tolerance=1e-12, unit=unit, source=source)


def logistic_anchors(config: Any) -> list[dict[str, Any]]:
    """DPO and the forms of it that smooth or unsmooth its labels."""
    smoothing, slope = config.smoothing, "per unit of βΔ"
    optimum = math.log((1 - smoothing) / smoothing)
    rafailov, mitchell, ji = "Rafailov et al. 2023, eq. 7", "Mitchell 2023", "Ji et al. 2024, eq. 16"
    chowdhury = "Chowdhury et al. 2024"
    x = jnp.linspace(-5, 5, 101) / config.beta
    robust, clean = (evaluate(name, x / 2, -x / 2, config)[0] for name in ("robust_dpo", "dpo"))
    robust_flipped = evaluate("robust_dpo", -x / 2, x / 2, config)[0]
    debiased = (1 - smoothing) * robust + smoothing * robust_flipped - clean
    return [
        anchored("DPO at βΔ = 0", at("dpo", 0, config)[0], math.log(2), rafailov),
        anchored("slope of DPO at βΔ = 0", at("dpo", 0, config)[1], -0.5, rafailov, slope),
        anchored("slope of cDPO at βΔ = log((1 − ε)/ε)", at("cdpo", optimum, config)[1], 0.0, mitchell, slope),
        anchored("slope of cDPO at βΔ = 0", at("cdpo", 0, config)[1], smoothing - 0.5, mitchell, slope),
        anchored("robust DPO at βΔ = 0", at("robust_dpo", 0, config)[0], math.log(2), chowdhury),
        anchored(
            "slope of robust DPO at βΔ = 0",
            at("robust_dpo", 0, config)[1],
            -0.5 / (1 - 2 * smoothing),
            chowdhury,
            slope,
        ),
        anchored(
            "largest |mean of robust DPO over flipped labels − DPO|", float(jnp.abs(debiased).max()), 0.0, chowdhury
        ),
        anchored(
            "EXO at βΔ = 0",
            at("exo", 0, config)[0],
            -math.log(2) - 0.5 * math.log(smoothing * (1 - smoothing)),
            ji,
        ),
        anchored("EXO at βΔ = log((1 − ε)/ε)", at("exo", optimum, config)[0], 0.0, ji),
        anchored("slope of EXO at βΔ = log((1 − ε)/ε)", at("exo", optimum, config)[1], 0.0, ji, slope),
    ]


def other_anchors(config: Any) -> list[dict[str, Any]]:
    """The other losses at the reference, at their least, and where they are flat or turn back."""
    beta, slope = config.beta, "per unit of βΔ"
    x = jnp.linspace(-1, 1, 20_001)
    _, by_chosen, _ = evaluate("discopop", x / beta / 2, -x / beta / 2, config)
    uphill = x[by_chosen > 0]
    hinge_beyond = max(abs(at("hinge", lead, config)[1]) for lead in (1.0, 1.5, 5.0))
    return [
        anchored("IPO at Δ = 0", at("ipo", 0, config)[0], 1 / (4 * beta**2), "Azar et al. 2023, eq. 17", "nats²"),
        anchored("slope of IPO at Δ = 1/(2β)", at("ipo", 0.5, config)[1], 0.0, "Azar et al. 2023, eq. 17", slope),
        anchored("IPO at Δ = 1/(2β)", at("ipo", 0.5, config)[0], 0.0, "Azar et al. 2023, eq. 17", "nats²"),
        anchored("slope of the hinge at βΔ = 0", at("hinge", 0, config)[1], -1.0, "Zhao et al. 2023", slope),
        anchored("largest |slope| of the hinge from βΔ = 1 on", hinge_beyond, 0.0, "Zhao et al. 2023", slope),
        anchored("DiscoPOP at βΔ = 0", at("discopop", 0, config)[0], math.log(2) / 2 + 0.5, "Lu et al. 2024, eq. 5"),
        anchored("NCA at the reference", at("nca", 0, config)[0], 2 * math.log(2), "Chen et al. 2024"),
        anchored(
            "slope of NCA by the chosen reward at βa = log 2",
            at("nca", 2 * math.log(2), config)[1],
            0.0,
            "Chen et al. 2024",
            "per unit of βa",
        ),
        anchored("BCO at the reference", at("bco", 0, config)[0], 2 * math.log(2), "Jung et al. 2024, δ = 0"),
        anchored("SPPO at the reference", at("sppo", 0, config)[0], 1 / (2 * beta**2), "Wu et al. 2024", "nats²"),
        anchored("SPPO at a = −b = 1/(2β)", at("sppo", 1.0, config)[0], 0.0, "Wu et al. 2024", "nats²"),
        anchored(
            "APO-zero at the reference", at("apo_zero", 0, config)[0], 1.0, "D'Oosterlinck et al. 2024, eq. 7", "1"
        ),
        anchored(
            "APO-down at the reference", at("apo_down", 0, config)[0], 1.0, "D'Oosterlinck et al. 2024, eq. 8", "1"
        ),
        anchored(
            "slope of APO-down by the chosen reward at the reference",
            at("apo_down", 0, config)[1],
            0.0,
            "σ′(0) − σ′(0): the two terms cancel",
            "per unit of βa",
        ),
        anchored(
            "KTO's good and bad answer at the reference", at("kto", 0, config)[0], 1.0, "Ethayarajh et al. 2024", "1"
        ),
        ledger.number(
            "DiscoPOP rises with the margin from",
            float(uphill.min()) if uphill.size else -1.0,
            interval=(-0.5, 0.5),
            unit="βΔ",
            source="Lu et al. 2024: the loss is not convex",
        ),
        ledger.number(
            "DiscoPOP rises with the margin up to",
            float(uphill.max()) if uphill.size else -1.0,
            interval=(-0.5, 0.5),
            unit="βΔ",
            source="Lu et al. 2024: the loss is not convex",
        ),
    ]
