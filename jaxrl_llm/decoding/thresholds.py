"""Where a filter cuts: the k-th largest logit, or the last score that fills a mass, without sorting the vocabulary.

A short sorted head answers most calls; where it does not reach, the threshold is found by bisection on the bits of the
floats, which is exact. A row's answer never depends on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.numerics import wide

HEAD = 128  # tokens sorted at once; sorting them costs 1/50 of sorting a vocabulary of 50,000


def top_k(logits: Float[Array, "*batch vocab"], k: Int[Array, "*#batch"] | int) -> Float[Array, "*batch"]:
    """The k-th largest logit of each row (the smallest, if k exceeds the vocabulary)."""
    logits = wide(logits)
    vocab = logits.shape[-1]
    k = jnp.broadcast_to(jnp.minimum(jnp.asarray(k, jnp.int32), vocab), logits.shape[:-1])
    head = _head(logits)
    size = head.shape[-1]
    fast = jnp.take_along_axis(head, jnp.minimum(k, size)[..., None] - 1, axis=-1)[..., 0]

    def slow() -> Array:
        return _largest(logits, lambda kept: kept.sum(axis=-1) >= k)

    return _fast_where(k <= size, fast, slow)


def top_p(logits: Float[Array, "*batch vocab"], p: Float[Array, "*#batch"] | float) -> Float[Array, "*batch"]:
    """The largest threshold with Σ softmax(logits)[logits ≥ threshold] ≥ p in each row (−inf if p = 1)."""
    logits = wide(logits)
    head = _head(logits)
    highest = logits.max(axis=-1, keepdims=True)
    return _fill(logits, jnp.exp(logits - highest), p, head, jnp.exp(head - highest))


def by_mass(
    scores: Float[Array, "*batch vocab"], weights: Float[Array, "*batch vocab"], p: Float[Array, "*#batch"] | float
) -> Float[Array, "*batch"]:
    """The largest threshold with Σ weights[scores ≥ threshold] ≥ p Σ weights in each row (−inf if p = 1).

    As `top_p`, where the order in which tokens fill the mass is not that of their probabilities.
    """
    scores, weights = wide(scores), wide(weights)
    head, places = jax.lax.optimization_barrier(jax.lax.top_k(scores, min(HEAD, scores.shape[-1])))
    return _fill(scores, weights, p, head, jnp.take_along_axis(weights, places, axis=-1))


def _fill(
    scores: Float[Array, "*batch vocab"],
    weights: Float[Array, "*batch vocab"],
    p: Float[Array, "*#batch"] | float,
    head: Float[Array, "*batch head"],
    head_weights: Float[Array, "*batch head"],
) -> Float[Array, "*batch"]:
    """`by_mass`, given the largest scores in descending order and their weights."""
    p = jnp.broadcast_to(jnp.asarray(p, weights.dtype), weights.shape[:-1])
    needed = p * weights.sum(axis=-1)
    enough = jnp.cumsum(head_weights, axis=-1) >= needed[..., None]
    fast = jnp.take_along_axis(head, jnp.argmax(enough, axis=-1)[..., None], axis=-1)[..., 0]

    def slow() -> Array:
        return _largest(scores, lambda kept: jnp.where(kept, weights, 0).sum(axis=-1) >= needed)

    threshold = _fast_where(enough[..., -1] | (p >= 1), fast, slow)
    return jnp.where(p >= 1, -jnp.inf, threshold)


def _head(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch head"]:
    """The largest logits of each row, in descending order."""
    head = jax.lax.top_k(logits, min(HEAD, logits.shape[-1]))[0]
    return jax.lax.optimization_barrier(head)  # else XLA may merge what follows into a sort of the whole vocabulary


def _fast_where(
    reached: Bool[Array, "*batch"], fast: Float[Array, "*batch"], slow: Callable[[], Array]
) -> Float[Array, "*batch"]:
    """`fast` where it is right, else `slow()`, which runs only if some row needs it."""
    return jax.lax.cond(reached.all(), lambda: fast, lambda: jnp.where(reached, fast, slow()))


def _largest(
    logits: Float[Array, "*batch vocab"], holds: Callable[[Bool[Array, "*batch vocab"]], Bool[Array, "*batch"]]
) -> Float[Array, "*batch"]:
    """The largest float x for which `holds(logits >= x)`, a condition that only fails as x rises; −inf holds always.

    Floats are ordered as the integers of their bits (those of negative numbers reversed), so halving an interval of
    integers as often as they have bits finds x exactly.
    """
    integer = jnp.int32 if logits.dtype == jnp.float32 else jnp.int64
    flip = jnp.iinfo(integer).max

    def to_float(order: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ flip, order), logits.dtype)

    def to_order(value: float) -> Int[Array, ""]:
        bits = jax.lax.bitcast_convert_type(jnp.asarray(value, logits.dtype), integer)
        return jnp.where(bits < 0, bits ^ flip, bits)

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval  # holds at low, not at high
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        inside = holds(logits >= to_float(middle)[..., None])
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    low = jnp.full(logits.shape[:-1], to_order(-jnp.inf))
    high = jnp.full(logits.shape[:-1], to_order(jnp.inf))
    found = to_float(jax.lax.fori_loop(0, jnp.iinfo(integer).bits, halve, (low, high))[0])
    # The logit itself: where the processor takes subnormal numbers for 0, `found` may be one of them.
    return jnp.where(logits <= found[..., None], logits, -jnp.inf).max(axis=-1)
