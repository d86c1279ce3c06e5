"""The amplification law on a table of answers, some of which agree with the user: by exact optimisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from experiments.optimisers import minimum
from jaxrl_llm import oracle
from jaxrl_llm.objectives import preference, rlhf
from jaxrl_llm.tabular import TabularLM


class Found(NamedTuple):
    """The probability of agreement of each way to the optimum."""

    gibbs: Array  # in closed form
    dpo: Array  # DPO's minimum over the preferences of the whole population
    rlhf: Array  # the maximum of J, which policy gradients climb


def agreeing(lm: TabularLM) -> Bool[Array, "sequences"]:
    """Return the answers that agree: those whose tokens have an even sum, so that only the last token decides."""
    return oracle.enumerate_sequences(lm).sum(axis=1) % 2 == 0


def reference(lm: TabularLM, probability: Float[Array, ""], key: Array) -> dict[str, Array]:
    """A random table that agrees with exactly this probability."""
    agrees = agreeing(lm)
    raw = jax.random.normal(key, agrees.shape)

    def among(chosen: Array) -> Array:
        return raw - jax.nn.logsumexp(jnp.where(chosen, raw, -jnp.inf))

    return table_of(
        lm, jnp.where(agrees, jnp.log(probability) + among(agrees), jnp.log1p(-probability) + among(~agrees))
    )


def table_of(lm: TabularLM, log_probs: Float[Array, "sequences"]) -> dict[str, Array]:
    """The parameters whose law of sequences this is: each row holds the masses of its continuations."""
    masses = [
        jax.nn.logsumexp(log_probs.reshape(lm.vocab_size**length, -1), axis=1) for length in range(1, lm.horizon + 1)
    ]
    return {"logits": jnp.concatenate([mass.reshape(-1, lm.vocab_size) for mass in masses])}


def agreement(lm: TabularLM, params: dict[str, Array]) -> Float[Array, ""]:
    """π(agree), summed over all answers that do."""
    return jnp.where(agreeing(lm), jnp.exp(oracle.sequence_log_probs(lm, params)), 0).sum()


def optima(lm: TabularLM, ref_agreement: Array, share: Array, beta: Array, key: Array, *, steps: int) -> Found:
    """Agreement at the optimum that a share of annotators and a strength lead to, from one random reference."""
    ref_params = reference(lm, ref_agreement, key)
    ref = oracle.sequence_log_probs(lm, ref_params)
    rewards = jnp.where(agreeing(lm), jnp.log(share) - jnp.log1p(-share), 0)
    law = oracle.population_preferences(ref, rewards)

    def dpo(params: Any) -> Array:
        policy = oracle.sequence_log_probs(lm, params)
        chosen, ref_chosen = (jnp.broadcast_to(each[:, None], law.shape) for each in (policy, ref))
        rejected, ref_rejected = (jnp.broadcast_to(each, law.shape) for each in (policy, ref))
        return (law * preference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)).sum()

    def shortfall(params: Any) -> Array:
        return -oracle.objective(lm, params, ref_params, rewards, beta=beta)

    optimum = jnp.exp(rlhf.gibbs_optimum(ref, rewards, beta=beta))
    ends = [agreement(lm, minimum(loss, ref_params, steps=steps)[0]) for loss in (dpo, shortfall)]
    return Found(jnp.where(agreeing(lm), optimum, 0).sum(), *ends)


def on_grid(
    lm: TabularLM, references: Array, shares: Array, betas: Array, key: Array, *, steps: int
) -> tuple[tuple[Array, Array, Array], Found]:
    """Every reference with every share and strength, flat: what each was, and what each led to."""
    grid = tuple(each.ravel() for each in jnp.meshgrid(references, shares, betas, indexing="ij"))
    keys = jax.random.split(key, grid[0].size)
    run = jax.vmap(lambda *one: optima(lm, *one, steps=steps))
    return grid, jax.jit(run)(*grid, keys)


def best_of_n(lm: TabularLM, references: Array, key: Array, *, n: int) -> Float[Array, "references"]:
    """The probability that the best of n answers agrees, where those that do rank first, from a random reference."""

    def one(probability: Array, key: Array) -> Array:
        log_probs = oracle.sequence_log_probs(lm, reference(lm, probability, key))
        best = rlhf.best_of_n(log_probs, agreeing(lm).astype(log_probs.dtype), n=n)
        return jnp.where(agreeing(lm), jnp.exp(best), 0).sum()

    return jax.vmap(one)(references, jax.random.split(key, references.size))
