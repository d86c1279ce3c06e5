"""Exact expected gradients of estimators of the KL on a tabular model, and descent on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from jaxrl_llm import oracle
from jaxrl_llm.objectives import kl
from jaxrl_llm.objectives.policy_gradient import reinforce_loss
from jaxrl_llm.tabular import TabularLM

LM = TabularLM(vocab_size=3, horizon=3)
ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
Table = jax.Array  # one row of logits for each prefix


def random_table(lm: TabularLM, key: jax.Array) -> Table:
    """Return normal logits of standard deviation 1.5."""
    return 1.5 * jax.random.normal(key, (lm.num_prefixes, lm.vocab_size), jnp.float64)


def log_probs(table: Table) -> jax.Array:
    """Return the log-probability of every sequence."""
    return oracle.sequence_log_probs(LM, {"logits": table})


def reverse_kl(table: Table, ref: Table) -> jax.Array:
    """KL(π‖ref) of whole sequences."""
    return oracle.sequence_kl(LM, {"logits": table}, {"logits": ref})


def forward_kl(table: Table, ref: Table) -> jax.Array:
    """KL(ref‖π) of whole sequences."""
    return reverse_kl(ref, table)


def mean_gradient(loss: Callable[[Table], jax.Array], policy: Table, sampler: Table | None = None) -> Table:
    """E[∇loss] over sampled sequences, as a trainer that could take all of them would find it."""
    return oracle.gradient_moments(
        LM,
        {"logits": policy},
        lambda params, groups: loss(params["logits"])[groups[:, 0]],
        sampler_params=None if sampler is None else {"logits": sampler},
    ).mean["logits"]


def expected_gradient(
    which: int | jax.Array, mode: str, policy: Table, ref: Table, sampler: Table | None = None
) -> Table:
    """Compute what minimising this estimator, by its place among them, descends in this way, on average."""
    logp_ref = log_probs(ref)

    def loss(table):
        logp_policy = log_probs(table)
        value = jnp.stack([estimator(logp_policy, logp_ref) for estimator in ESTIMATORS.values()])[which]
        if mode == "reward":
            return reinforce_loss(logp_policy, -stop_gradient(value))
        if mode in ("loss", "off-policy loss"):
            return value
        ratio = jnp.exp(logp_policy - log_probs(sampler))
        return (stop_gradient(ratio) if mode == "constant ratio" else ratio) * value

    return mean_gradient(loss, policy, None if mode in ("loss", "reward") else sampler)


def cosine(a: Table, b: Table) -> jax.Array:
    """Return the cosine of two gradients as long vectors; 0 where one is 0."""
    length = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.where(length > 1e-12, (a * b).sum() / jnp.maximum(length, 1e-12), 0)


def descend(start: Any, gradient_of: Callable, learning_rate: float, *, steps: int, every: int) -> tuple[Any, Any]:
    """Descend by optax; return the parameters at the end, and every so many steps from the start."""
    optimiser = optax.sgd(learning_rate)

    def step(state, _):
        params, moments = state
        updates, moments = optimiser.update(gradient_of(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    def some(state, _):
        return jax.lax.scan(step, state, length=every)[0], state[0]

    (end, _), path = jax.lax.scan(some, (start, optimiser.init(start)), length=steps // every)
    return end, jax.tree.map(lambda whole, last: jnp.concatenate([whole, last[None]]), path, end)
