"""Exact answers on a tabular language model, by enumeration of every sequence."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.language_model import Params
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.tabular import TabularLM

MAX_SEQUENCES = 10**7


def enumerate_sequences(lm: TabularLM) -> Int[Array, "sequences horizon"]:
    """All `vocab**horizon` sequences, in lexicographic order: row i is i written in base `vocab`."""
    total = lm.vocab_size**lm.horizon
    if total > MAX_SEQUENCES:
        raise ValueError(f"{lm.vocab_size}**{lm.horizon} = {total} sequences are too many to enumerate.")
    place_values = lm.vocab_size ** jnp.arange(lm.horizon - 1, -1, -1)
    return (jnp.arange(total)[:, None] // place_values % lm.vocab_size).astype(jnp.int32)


def token_log_probs_of(
    lm: TabularLM, params: Params, sequences: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """log p(y_t | y_<t) of each token of the sequences, the first one included, in nats."""
    if sequences.ndim != 2 or sequences.shape[1] > lm.horizon:
        raise ValueError(f"sequences must be [batch, at most {lm.horizon}], but are {list(sequences.shape)}.")
    root = jnp.zeros((sequences.shape[0], 1), sequences.dtype)
    inputs = jnp.concatenate([root, sequences[:, :-1]], axis=1)  # a padded place reads the root's logits
    mask = jnp.broadcast_to(jnp.arange(inputs.shape[1]) > 0, inputs.shape)
    logits, _ = lm.apply(params, inputs, mask=mask)
    return token_log_probs(logits, sequences)


def sequence_log_probs(lm: TabularLM, params: Params) -> Float[Array, "sequences"]:
    """log p(y) = Σ_t log p(y_t | y_<t) of every sequence, in the order of `enumerate_sequences`, in nats.

    Differentiable in `params`; the exponentials sum to 1.
    """
    return token_log_probs_of(lm, params, enumerate_sequences(lm)).sum(axis=-1)


def expectation(
    lm: TabularLM, params: Params, function: Callable[[Int[Array, "sequences horizon"]], PyTree[Array]]
) -> PyTree[Array]:
    """E_{y ~ p}[f(y)] = Σ_y p(y) f(y), exactly, and differentiable in `params`.

    Args:
        function: from all sequences [N, horizon] to a value for each: an array, or a tree of arrays, [N, ...]. It is
            not differentiated through the choice of y, because there is none: the sum runs over all of them.
    """
    probabilities = jnp.exp(sequence_log_probs(lm, params))
    values = function(enumerate_sequences(lm))
    return _weighted_sum(probabilities, values)


def _weighted_sum(weights: Float[Array, "n"], values: PyTree[Array]) -> PyTree[Array]:
    def total(leaf: Array) -> Array:
        if leaf.shape[:1] != weights.shape:
            raise ValueError(
                f"the function must give a value for each of {weights.shape[0]} sequences, got {leaf.shape}."
            )
        # A sequence of probability 0 contributes 0, whatever its value.
        weight = weights.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(weight > 0, weight * jnp.where(weight > 0, leaf, 0), 0).sum(axis=0)

    return jax.tree.map(total, values)
