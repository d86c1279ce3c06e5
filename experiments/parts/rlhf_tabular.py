"""The terms of RLHF's objective on a model of 81 sequences: every policy here is optimised, and measured, exactly."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxrl_llm import oracle
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.tabular import TabularLM

LM = TabularLM(vocab_size=3, horizon=4)


def instance(key: Array, *, forgetting: float) -> dict[str, Any]:
    """A pretrained model, the SFT model that has moved away from it, rewards, and the law of pretraining text."""
    pretrained_key, tuned_key, reward_key = jax.random.split(key, 3)
    pretrained = LM.init(pretrained_key)
    moved = jax.tree.map(lambda leaf, other: leaf + forgetting * other, pretrained, LM.init(tuned_key))
    rewards = jax.random.normal(reward_key, (LM.vocab_size**LM.horizon,))
    return {"ref": moved, "rewards": rewards, "pretraining": jnp.exp(oracle.sequence_log_probs(LM, pretrained))}


@functools.partial(jax.jit, static_argnames="steps")
def maximise(
    problem: dict[str, Any], betas: Float[Array, "point"], gammas: Float[Array, "point"], *, steps: int
) -> dict[str, Float[Array, "point ..."]]:
    """For each (β, γ) the policy that Adam finds from the SFT model along the exact gradient, and its terms."""

    def one(beta: Array, gamma: Array) -> dict[str, Array]:
        optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps), b2=0.99)
        knobs = {"beta": beta, "gamma": gamma, "pretraining": problem["pretraining"]}

        def step(state: tuple, _: None) -> tuple[tuple, None]:
            params, optimiser_state = state
            uphill = oracle.objective_grad(LM, params, problem["ref"], problem["rewards"], **knobs)
            downhill = jax.tree.map(jnp.negative, uphill)
            updates, optimiser_state = optimiser.update(downhill, optimiser_state)
            return (optax.apply_updates(params, updates), optimiser_state), None

        start = (problem["ref"], optimiser.init(problem["ref"]))
        (params, _), _ = jax.lax.scan(step, start, length=steps)
        slope = oracle.objective_grad(LM, params, problem["ref"], problem["rewards"], **knobs)
        return terms(problem, oracle.sequence_log_probs(LM, params)) | {"slope": jnp.abs(slope["logits"]).max()}

    return jax.vmap(one)(betas, gammas)


def terms(problem: dict[str, Any], log_probs: Float[Array, "sequences"]) -> dict[str, Array]:
    """What the objective weighs, of one policy: reward, KL from the SFT model, pretraining loss; and its entropy."""
    ref = oracle.sequence_log_probs(LM, problem["ref"])
    zero, rewards = jnp.zeros_like(log_probs), problem["rewards"]
    reward = rlhf.regularised_objective(log_probs, ref, rewards, beta=0.0)
    return {
        "log_probs": log_probs,
        "reward": reward,
        "kl": -rlhf.regularised_objective(log_probs, ref, zero, beta=1.0),
        "entropy": rlhf.regularised_objective(log_probs, zero, zero, beta=1.0),
        "best": jnp.exp(log_probs)[jnp.argmax(rewards)],
        "pretraining_loss": -(problem["pretraining"] * log_probs).sum(),
    }


def frontier(problem: dict[str, Any], *, draws: list[int]) -> dict[str, Any]:
    """Reward against KL of the Gibbs optima (β from large to small) and of best-of-n, with the bound on its KL."""
    ref, rewards = oracle.sequence_log_probs(LM, problem["ref"]), problem["rewards"]
    betas = jnp.asarray(np.geomspace(20, 0.02, 80))
    gibbs = jax.vmap(lambda beta: terms(problem, rlhf.gibbs_optimum(ref, rewards, beta=beta)))(betas)
    best_of = jax.vmap(lambda n: terms(problem, rlhf.best_of_n(ref, rewards, n=n)))(jnp.asarray(draws))
    return {
        "ceiling": -ref[jnp.argmax(rewards)],
        "best_reward": rewards.max(),
        "gibbs": {"beta": betas, "kl": gibbs["kl"], "reward": gibbs["reward"]},
        "best_of_n": {
            "n": draws,
            "kl": best_of["kl"],
            "reward": best_of["reward"],
            "bound": rlhf.best_of_n_kl_bound(jnp.asarray(draws)),
        },
    }
