"""Choose tokens from logits: the largest, one at random, several at random without replacement."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxrl_llm.numerics import wide


def greedy(logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """The token of the largest logit, the first of them in a tie."""
    # A maximum and a minimum: XLA's CPU backend runs them about 10 times faster than argmax.
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(largest, index, logits.shape[-1] - 1).min(axis=-1)


def greedy_log_prob(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """The log-probability of the token of `greedy`, for a sampler that always takes it: 0; −inf if none is possible."""
    return jnp.where(logits.max(axis=-1) > -jnp.inf, 0.0, -jnp.inf).astype(wide(logits).dtype)


def sample(keys: Key[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """One token of each row from softmax(logits), with a key for each row.

    Sampling by inversion, in two stages: first a block of about √V tokens, then a token in it. This takes two random
    numbers for each row, where the Gumbel trick takes V. Tokens of probability 0 are never drawn.
    """
    logits = wide(logits)
    batch, vocab = logits.shape
    width = math.isqrt(vocab - 1) + 1
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    blocks = jnp.pad(weights, ((0, 0), (0, width * width - vocab))).reshape(batch, width, width)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), logits.dtype))(keys)
    block = _invert(blocks.sum(axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * width + _invert(inside, uniform[:, 1])


def _invert(weights: Float[Array, "batch n"], uniform: Float[Array, "batch"]) -> Int[Array, "batch"]:
    """The first index with a positive weight where the cumulative weights exceed uniform · total."""
    cumulated = jnp.cumsum(weights, axis=-1)
    beyond = (cumulated > uniform[:, None] * cumulated[:, -1:]) & (weights > 0)
    # Rounding can leave no such index: take the largest weight.
    return jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), jnp.argmax(weights, axis=-1)).astype(jnp.int32)


def sample_distinct(
    keys: Key[Array, "batch"], logits: Float[Array, "batch vocab"], count: int
) -> Int[Array, "batch count"]:
    """`count` distinct tokens of each row, as if drawn one after the other without replacement from softmax(logits).

    The Gumbel-top-k trick (Kool et al. 2019): the largest of logits + Gumbel noise. If a row has fewer tokens of
    positive probability, these come first, followed by tokens of logit −inf.
    """
    logits = wide(logits)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
    return jax.lax.top_k(logits + noise, count)[1]
