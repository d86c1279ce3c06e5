"""What is known exactly of the reward-model losses: flow, bound, optimum and shift, in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.optimize import brentq

from experiments import ledger
from jaxrl_llm.objectives import reward_model

PAPER = "Ouyang et al. 2022, eq. 1"


def gradient_flow(config: Any) -> dict[str, Any]:
    """Two free scores from equality, down the loss's own gradient by Runge-Kutta: Δ(t) against e^Δ + Δ = 2t + 1."""
    step_size = config.end / config.flow_steps

    def velocity(scores: Array) -> Array:
        return -jnp.stack(reward_model.pairwise_loss_grad(scores[0], scores[1]))

    def step(scores: Array, _: None) -> tuple[Array, Array]:
        k1 = velocity(scores)
        k2 = velocity(scores + step_size / 2 * k1)
        k3 = velocity(scores + step_size / 2 * k2)
        k4 = velocity(scores + step_size * k3)
        scores = scores + step_size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return scores, scores[0] - scores[1]

    _, later = jax.jit(lambda start: jax.lax.scan(step, start, length=config.flow_steps))(jnp.zeros(2))
    margin = np.concatenate([[0.0], np.asarray(later)])
    time = step_size * np.arange(config.flow_steps + 1)
    residual = np.exp(margin) + margin - 2 * time - 1
    law = brentq(lambda x: math.exp(x) + x - 2 * config.end - 1, 0, 20, xtol=1e-14)
    shown = np.unique(np.geomspace(1, config.flow_steps, 120).astype(int))
    source = "dΔ/dt = 2 σ(−Δ): e^Δ + Δ = 2t + 1"
    return {
        "data": {"time": time[shown], "margin": margin[shown], "residual": np.abs(residual[shown])},
        "numbers": [
            ledger.number(
                f"Δ({config.end:g})", float(margin[-1]), expected=law, tolerance=1e-6, unit="log-odds", source=source
            ),
            ledger.number(
                "largest |e^Δ + Δ − 2t − 1| / (2t + 1) along the flow",
                float(np.max(np.abs(residual) / (2 * time + 1))),
                expected=0.0,
                tolerance=1e-6,
                unit="relative",
                source=source,
            ),
        ],
    }


def bounds(config: Any, key: Array) -> list[dict[str, Any]]:
    """The largest gradient of any answer: over random scores, and where the ranking is upside down."""
    results = []
    for size in config.sizes:
        ranks = jnp.arange(size)
        scale = jnp.asarray(np.geomspace(0.03, 100, 40))
        draws = jax.random.normal(jax.random.fold_in(key, size), (config.draws // 40, 40, size), jnp.float64)
        ranks_of_all = jnp.broadcast_to(ranks, draws.shape)
        (gradient,) = reward_model.k_choose_2_loss_grad(draws * scale[:, None], ranks_of_all)
        (upside_down,) = reward_model.k_choose_2_loss_grad(50.0 * ranks, ranks)
        largest, reached = jnp.abs(gradient).max(axis=(0, 2)), jnp.abs(upside_down).max()
        results.append(
            {
                "data": {"size": size, "scale": scale, "largest": largest},
                "number": ledger.number(
                    f"largest gradient of an answer, K = {size}",
                    float(jnp.maximum(largest.max(), reached)),
                    expected=2 / size,
                    tolerance=1e-12,
                    unit="per unit of the score",
                    source=f"(K − 1)/C(K, 2) = 2/K, {PAPER}",
                ),
            }
        )
    return results


def label_noise(config: Any) -> dict[str, Any]:
    """Gradient descent on Δ where the label holds with probability p, for each p."""
    probabilities = jnp.asarray(config.label_probabilities)

    def step(margin: Array, _: None) -> tuple[Array, None]:
        slope = jax.vmap(lambda lead, p: reward_model.pairwise_loss_grad(lead, 0.0 * lead, label_noise=1 - p)[0])
        return margin - slope(margin, probabilities), None

    found, _ = jax.jit(lambda start: jax.lax.scan(step, start, length=10_000))(jnp.zeros_like(probabilities))
    return {"probability": config.label_probabilities, "margin": found}


def optimum_numbers(optima: dict[str, Any]) -> list[dict[str, Any]]:
    """Δ* = logit p."""
    return [
        ledger.number(
            f"Δ* where the label holds with p = {p:g}",
            float(margin),
            expected=math.log(p / (1 - p)),
            tolerance=1e-9,
            unit="log-odds",
            source="Δ* = logit p",
        )
        for p, margin in zip(optima["probability"], optima["margin"], strict=True)
    ]


def free_shift(key: Array) -> list[dict[str, Any]]:
    """A constant on all scores changes no loss; the centring loss alone decides where they lie."""
    scores = 3 * jax.random.normal(key, (200, 9), jnp.float64)
    ranks = jnp.broadcast_to(jnp.arange(9), scores.shape)
    loss = reward_model.k_choose_2_loss(scores, ranks)
    shifts = jnp.asarray([-1000.0, -10.0, -1.0, 1.0, 10.0, 1000.0])
    moved = jax.vmap(lambda shift: reward_model.k_choose_2_loss(scores + shift, ranks))(shifts)

    @functools.partial(jax.jit, static_argnames="coefficient")
    def descend(coefficient: float) -> Array:
        def step(pair: Array, _: None) -> tuple[Array, Array]:
            slopes = jnp.stack(reward_model.pairwise_loss_grad(*pair, label_noise=0.27))
            slopes += jnp.stack(reward_model.centering_loss_grad(*pair, coefficient=coefficient))
            return pair - slopes, pair

        return jax.lax.scan(step, jnp.asarray([5.0, 5.0]), length=1000)[1]

    free, held = descend(0.0), descend(0.01)
    return [
        ledger.number(
            "largest change of the loss under a shift of all scores by up to 1000",
            float(jnp.abs(moved - loss).max()),
            expected=0.0,
            tolerance=1e-10,
            unit="nats",
            source=f"the loss knows differences alone, {PAPER}",
        ),
        ledger.number(
            "r_w + r_l without the centring loss, after a start at 10",
            float(free[-1].sum()),
            expected=10.0,
            tolerance=1e-9,
            unit="log-odds",
            source="the gradients of a pair sum to 0",
        ),
        ledger.number(
            "r_w + r_l with the centring loss",
            float(held[-1].sum()),
            expected=0.0,
            tolerance=1e-9,
            unit="log-odds",
            source="Eisenstein et al. 2023",
        ),
        ledger.number(
            "Δ* with the centring loss, p = 0.73",
            float(held[-1, 0] - held[-1, 1]),
            expected=math.log(0.73 / 0.27),
            tolerance=1e-9,
            unit="log-odds",
            source="the centring loss moves both scores alike",
        ),
    ]
