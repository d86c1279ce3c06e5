"""Loss and gradient of the preference losses, as the experiment draws them; `config` is that of `preference_losses`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrl_llm.objectives import preference

OF_THE_MARGIN = ("dpo", "cdpo", "robust_dpo", "ipo", "hinge", "exo", "discopop")
OF_BOTH = ("nca", "bco", "sppo", "apo_zero", "apo_down", "kto", "f_dpo")
WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
PLANE = ("dpo", "simpo", "orpo")


def keywords(config: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return for every drawn loss its function's stem in `objectives.preference`, and its keyword arguments."""
    beta, of_averages = {"beta": config.beta}, {"beta": config.beta_without_reference}
    smoothed = beta | {"label_smoothing": config.smoothing}
    plain = {name: (name, beta) for name in (*OF_THE_MARGIN, *OF_BOTH)}
    plain |= {name: (name, of_averages) for name in WITHOUT_REFERENCE}
    discopop = ("discopop", beta | {"temperature": config.temperature})
    return (
        plain
        | {"cdpo": ("dpo", smoothed), "robust_dpo": ("robust_dpo", smoothed), "exo": ("exo", smoothed)}
        | {"discopop": discopop, "f_dpo": ("f_dpo", beta | {"divergence": "jensen_shannon"})}
    )


def evaluate(
    name: str,
    w: Array,
    l: Array,  # noqa: E741
    config: Any,
    reference: tuple[float, float] = (0.0, 0.0),
) -> tuple[Array, Array, Array]:
    """Return the loss and its derivatives by log π_w and log π_l; KTO sums a good and a bad answer, z = 0."""
    stem, settings = keywords(config)[name]
    loss = getattr(preference, f"{stem}_loss")
    ref_w, ref_l = (jnp.full_like(w, each) for each in reference)
    if name == "kto":
        good, bad = jnp.ones(w.shape, bool), jnp.zeros(w.shape, bool)
        of_good, of_bad = (w, ref_w, good, 0.0), (l, ref_l, bad, 0.0)
        total = loss(*of_good, **settings) + loss(*of_bad, **settings)
        return total, loss.grad(*of_good, **settings)[0], loss.grad(*of_bad, **settings)[0]
    arguments = (w, l) if name in WITHOUT_REFERENCE else (w, l, ref_w, ref_l)
    by_chosen, by_rejected, *_ = loss.grad(*arguments, **settings)
    return loss(*arguments, **settings), by_chosen, by_rejected


def curves(config: Any) -> dict[str, Any]:
    """Return the loss against x = βΔ, and its slope per unit of x: on a = −b = Δ/2, that is (∂L/∂a − ∂L/∂b)/(2β)."""
    x = jnp.linspace(-config.largest_margin, config.largest_margin, config.points)
    x = jnp.unique(
        jnp.concatenate([x, jnp.linspace(-0.5, 0.5, 41), jnp.asarray([1 - 1e-9, 1.0])])
    )  # DiscoPOP turns there, and the hinge at 1
    drawn = {"x": x}
    for name, (_, settings) in keywords(config).items():
        half = x / settings["beta"] / 2
        below = -config.largest_margin if name in WITHOUT_REFERENCE else 0.0  # log-probabilities are negative
        loss, by_chosen, by_rejected = evaluate(name, below + half, below - half, config)
        drawn[name] = {"loss": loss, "slope": (by_chosen - by_rejected) / (2 * settings["beta"])}
    return drawn


def arrows(name: str, config: Any) -> dict[str, Any]:
    """Return −gradient over the plane of log π_w and log π_l."""
    axis = jnp.linspace(config.deepest, -0.25, config.arrows)
    w, l = jnp.meshgrid(axis, axis)  # noqa: E741
    as_in_run = dataclasses.replace(config, beta=config.beta_of_run)
    _, by_chosen, by_rejected = evaluate(name, w, l, as_in_run, reference_of_run(config))
    return {"axis": axis, "chosen": -by_chosen, "rejected": -by_rejected}


def reference_of_run(config: Any) -> tuple[float, float]:
    """Return the log-probability of the chosen and the rejected response where the run of DPO starts."""
    return tuple(float(np.log(np.asarray(config.law)[list(response)]).sum()) for response in config.pair)


def at(name: str, x: float, config: Any) -> tuple[float, float, float]:
    """Return loss and derivatives per unit of βa and βb at βΔ = x, on the symmetric path."""
    half = jnp.asarray([x / config.beta / 2])
    loss, by_chosen, by_rejected = evaluate(name, half, -half, config)
    return float(loss[0]), float(by_chosen[0]) / config.beta, float(by_rejected[0]) / config.beta
