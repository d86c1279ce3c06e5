"""Exact properties of the reward-model losses: flow, bound, optimum and shift, in float64."""

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


def gradient_flow(config: Any) -> tuple[dict[str, Any], ledger.Number]:
    """Follow two free scores from equality down the loss's own gradient, by Runge-Kutta."""
    step_size = config.end / config.flow_steps

    def velocity(scores: Array) -> Array:
        return -jnp.stack(reward_model.pairwise_loss.grad(scores[0], scores[1]))

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
    exact = brentq(lambda x: math.exp(x) + x - 2 * config.end - 1, 0, 20, xtol=1e-14)
    shown = np.unique(np.geomspace(1, config.flow_steps, 120).astype(int))
    number = ledger.identity(
        f"margin of one pair after t = {config.end:g}",
        float(margin[-1]),
        expected=exact,
        tolerance=1e-6,
        unit="log-odds",
        source="dΔ/dt = 2 σ(−Δ), so e^Δ + Δ = 2t + 1",
    )
    return {"time": time[shown], "margin": margin[shown]}, number


def bounds(config: Any, key: Array) -> tuple[list[dict[str, Any]], ledger.Number]:
    """Find the largest gradient of any answer: over random scores, and where the ranking is upside down."""
    curves, largest, gradient_of = [], [], jax.jit(lambda *args: reward_model.k_choose_2_loss.grad(*args)[0])
    for size in config.sizes:
        ranks = jnp.arange(size)
        scale = jnp.asarray(np.geomspace(0.03, 100, 40))
        draws = jax.random.normal(jax.random.fold_in(key, size), (config.draws // 40, 40, size), jnp.float64)
        upside_down = jnp.broadcast_to(50.0 * ranks, (1, 40, size))
        scores = jnp.concatenate([draws * scale[:, None], upside_down])
        gradient = jnp.abs(gradient_of(scores, jnp.broadcast_to(ranks, scores.shape)))
        curves.append({"size": size, "scale": scale, "largest": gradient[:-1].max(axis=(0, 2))})
        largest.append(float(gradient.max()) * size / 2)
    number = ledger.identity(
        f"largest gradient of an answer over 2/K, K = {', '.join(map(str, config.sizes))}: farthest from 1",
        max(largest, key=lambda value: abs(value - 1)),
        expected=1.0,
        tolerance=1e-12,
        unit="1",
        source=f"(K − 1)/C(K, 2) = 2/K, {PAPER}",
    )
    return curves, number


def label_noise(config: Any) -> tuple[dict[str, Any], ledger.Number]:
    """Descend on Δ where the label holds with probability p, for each p, and for the p behind labellers' agreement."""
    p_of_agreement = (1 + math.sqrt(2 * config.agreement - 1)) / 2  # two labellers agree with p² + (1 − p)²
    probabilities = jnp.asarray([*config.label_probabilities, p_of_agreement])

    def step(margin: Array, _: None) -> tuple[Array, None]:
        slope = jax.vmap(lambda lead, p: reward_model.pairwise_loss.grad(lead, 0.0 * lead, label_noise=1 - p)[0])
        return margin - slope(margin, probabilities), None

    found, _ = jax.jit(lambda start: jax.lax.scan(step, start, length=10_000))(jnp.zeros_like(probabilities))
    number = ledger.identity(
        "largest |Δ* − logit p| over label probabilities p",
        float(jnp.abs(found - jnp.log(probabilities / (1 - probabilities))).max()),
        tolerance=1e-9,
        unit="log-odds",
        source="the mean loss is least where σ(Δ) = p",
    )
    agreed = {"agreement": config.agreement, "probability": p_of_agreement, "margin": found[-1]}
    return {"probability": config.label_probabilities, "margin": found[:-1], "agreed": agreed}, number


def free_shift(key: Array) -> list[ledger.Number]:
    """Add a constant to all scores, which changes no loss; the centring loss alone decides where they lie."""
    scores = 3 * jax.random.normal(key, (200, 9), jnp.float64)
    ranks = jnp.broadcast_to(jnp.arange(9), scores.shape)
    shifts = jnp.asarray([0.0, -1000.0, -10.0, -1.0, 1.0, 10.0, 1000.0])
    loss, *moved = jax.jit(jax.vmap(lambda shift: reward_model.k_choose_2_loss(scores + shift, ranks)))(shifts)

    @functools.partial(jax.jit, static_argnames="coefficient")
    def descend(coefficient: float) -> Array:
        def step(pair: Array, _: None) -> tuple[Array, None]:
            slopes = jnp.stack(reward_model.pairwise_loss.grad(*pair, label_noise=0.27))
            slopes += jnp.stack(reward_model.centering_loss.grad(*pair, coefficient=coefficient))
            return pair - slopes, None

        return jax.lax.scan(step, jnp.asarray([5.0, 5.0]), length=1000)[0]

    return [
        ledger.identity(
            "largest change of the loss under a shift of all scores by up to 1000",
            float(jnp.abs(jnp.stack(moved) - loss).max()),
            tolerance=1e-10,
            unit="nats",
            source=f"only differences enter, {PAPER}",
        ),
        ledger.identity(
            "sum of a pair's scores, begun at 10, with the centring loss",
            float(descend(0.01).sum()),
            tolerance=1e-9,
            unit="log-odds",
            source="Eisenstein et al. 2023",
        ),
    ]
