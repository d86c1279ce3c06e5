"""The terms of RLHF's objective on random models of 81 sequences: every optimum is solved for and measured exactly.

A tabular model can be any distribution over its sequences, so the optimum for β and γ is where
r − β log(π/π_SFT) + γ p/π is the same number λ + β at each of them, p the distribution of pretraining text.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.special import logsumexp, wrightomega

from jaxrl_llm import oracle
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.tabular import TabularLM

LM = TabularLM(vocab_size=3, horizon=4)
Problems = dict[str, Any]


@functools.partial(jax.jit, static_argnames="count")
def draw_problems(key: Array, *, count: int, forgetting: float) -> Problems:
    """Draw pretrained models, the SFT models that have moved away from them, and rewards, as [problem, ...]."""

    def draw(key: Array) -> Problems:
        pretrained_key, tuned_key, reward_key = jax.random.split(key, 3)
        pretrained = LM.init(pretrained_key)
        ref = jax.tree.map(lambda leaf, other: leaf + forgetting * other, pretrained, LM.init(tuned_key))
        ref = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), ref)
        return {
            "ref": ref,
            "log_ref": oracle.sequence_log_probs(LM, ref),
            "rewards": jax.random.normal(reward_key, (LM.vocab_size**LM.horizon,), jnp.float64),
            "log_text": oracle.sequence_log_probs(LM, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), pretrained)),
        }

    return jax.vmap(draw)(jax.random.split(key, count))


def optimum(problems: Problems, beta: float, gamma: float) -> Float[np.ndarray, "problem sequence"]:
    """Solve for log π of every problem's optimum, by Newton's method in λ.

    With β > 0 and a = r + β log π_SFT, log π = (a − λ)/β + ω(log(γ p/β) + (λ − a)/β), where ω(z) + log ω(z) = z. The
    logarithm of the sum over sequences is convex and falls in λ, so Newton's method from the left cannot overshoot.
    """
    log_ref, rewards, log_text = (np.asarray(problems[name]) for name in ("log_ref", "rewards", "log_text"))
    if beta == gamma == 0:
        return np.where(rewards == rewards.max(axis=1, keepdims=True), 0.0, -np.inf)
    with np.errstate(divide="ignore"):
        log_pull = log_text + np.log(gamma)
    if beta > 0:
        tilted = rewards + beta * log_ref
        level = beta * logsumexp(tilted / beta, axis=1, keepdims=True)
    else:
        best = rewards.argmax(axis=1)[:, None]
        level = np.take_along_axis(rewards + np.exp(log_pull), best, axis=1)
    for _ in range(200):
        if beta > 0:
            pull = wrightomega(log_pull - np.log(beta) + (level - tilted) / beta)
            log_probs, slope = (tilted - level) / beta + pull, -1 / (beta * (1 + pull))
        else:
            log_probs, slope = log_pull - np.log(level - rewards), -1 / (level - rewards)
        total = logsumexp(log_probs, axis=1, keepdims=True)
        if np.abs(total).max() < 1e-13:
            break
        level = level - total / (np.exp(log_probs - total) * slope).sum(axis=1, keepdims=True)
    return log_probs - total


def terms(problems: Problems, log_probs: Float[np.ndarray, "problem sequence"]) -> dict[str, np.ndarray]:
    """Compute what the objective weighs, of one policy for each problem: pretraining loss, KL, entropy and more."""
    log_ref, rewards, log_text = (np.asarray(problems[name]) for name in ("log_ref", "rewards", "log_text"))
    probs, finite = np.exp(log_probs), np.where(np.isfinite(log_probs), log_probs, 0.0)
    with np.errstate(invalid="ignore"):
        loss = -np.where(np.exp(log_text) > 0, np.exp(log_text) * log_probs, 0).sum(axis=1)
    return {
        "reward": (probs * rewards).sum(axis=1),
        "kl": (probs * (finite - log_ref)).sum(axis=1),
        "entropy": -(probs * finite).sum(axis=1),
        "best": np.take_along_axis(probs, rewards.argmax(axis=1)[:, None], axis=1)[:, 0],
        "pretraining_loss": loss,
    }


def slope_at(problems: Problems, log_probs: Float[np.ndarray, "problem sequence"], beta: float, gamma: float) -> float:
    """Return the largest entry of the library's exact gradient of the objective at these policies."""
    return float(_slopes(problems, jnp.asarray(log_probs), beta, gamma).max())


@jax.jit
def _slopes(problems: Problems, log_probs: Array, beta: float, gamma: float) -> Array:
    def of_one(problem: Problems, log_probs: Array) -> Array:
        weights = {"beta": beta, "gamma": gamma, "pretraining": jnp.exp(problem["log_text"])}
        slope = oracle.objective_grad(LM, _logits(log_probs), problem["ref"], problem["rewards"], **weights)
        return jnp.abs(slope["logits"]).max()

    return jax.vmap(of_one)(problems, log_probs)


def _logits(log_probs: Float[Array, "sequence"]) -> dict[str, Array]:
    """The table of the tabular model that has these log-probabilities of sequences."""
    rows = []
    for length in range(1, LM.horizon + 1):
        summed = jax.nn.logsumexp(log_probs.reshape(LM.vocab_size**length, -1), axis=1)
        rows.append(summed.reshape(-1, LM.vocab_size))
    return {"logits": jnp.concatenate(rows)}


@functools.partial(jax.jit, static_argnames="steps")
def ascend_reward(problems: Problems, *, steps: int) -> Float[Array, "problem sequence"]:
    """Follow the exact gradient of the reward alone from the SFT model by Adam; return log π."""
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps), b2=0.99)

    def one(problem: Problems) -> Array:
        def step(state: tuple, _: None) -> tuple[tuple, None]:
            params, optimiser_state = state
            uphill = oracle.objective_grad(LM, params, problem["ref"], problem["rewards"], beta=0.0)
            updates, optimiser_state = optimiser.update(jax.tree.map(jnp.negative, uphill), optimiser_state)
            return (optax.apply_updates(params, updates), optimiser_state), None

        start = (problem["ref"], optimiser.init(problem["ref"]))
        (params, _), _ = jax.lax.scan(step, start, length=steps)
        return oracle.sequence_log_probs(LM, params)

    return jax.vmap(one)(problems)


def best_of_n(problems: Problems, draws: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Reward and KL of best-of-n's exact distribution as [draws, problem]."""
    of_all = jax.jit(jax.vmap(lambda ref, rewards, n: rlhf.best_of_n(ref, rewards, n=n), in_axes=(0, 0, None)))
    found = [terms(problems, np.asarray(of_all(problems["log_ref"], problems["rewards"], n))) for n in draws]
    return {name: np.stack([each[name] for each in found]) for name in ("kl", "reward")}
