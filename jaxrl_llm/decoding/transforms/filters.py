"""Stateless transforms: temperature, and filters that remove the tail of the distribution.

The threshold of a filter, the k-th largest logit or the last score that fills a mass, is found without sorting the
vocabulary. A short sorted head answers most calls. Where it does not reach, bisection on the bits of the floats finds
the threshold exactly. The answer for a row never depends on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.decoding.transforms.base import Transform, per_row, require
from jaxrl_llm.numerics import wide
from jaxrl_llm.objectives.logprobs import entropy

HEAD = 128  # tokens that are sorted at once; this costs 1/50 of sorting a vocabulary of 50,000


class Temperature(Transform):
    """logits / t: below 1 sharper, above 1 flatter.

    Raises:
        ValueError: unless t is finite and positive; greedy decoding is `greedy=True`, not t = 0.
    """

    t: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.t > 0) & (self.t < jnp.inf), "the temperature", "a finite number above 0", self.t)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return logits / per_row(self.t)


class TopK(Transform):
    """Keep the k most probable tokens (Fan et al. 2018), and all that tie with the k-th.

    A k above the vocabulary keeps all.

    Raises:
        ValueError: unless k is an integer of at least 1.
    """

    k: Int[Array, "..."] | int

    def __post_init__(self):
        k = jnp.asarray(self.k)
        require(jnp.issubdtype(k.dtype, jnp.integer) and k >= 1, "k", "an integer of at least 1", self.k)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return jnp.where(logits >= kth_largest(logits, self.k)[..., None], logits, -jnp.inf)


class TopP(Transform):
    """Nucleus: keep the smallest set of most probable tokens with mass at least p (Holtzman et al. 2020, eq. 2).

    The token that crosses p is kept, and all that tie with it; p = 1 keeps every token of positive probability.

    Raises:
        ValueError: unless 0 < p ≤ 1.
    """

    p: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.p > 0) & (self.p <= 1), "p", "in (0, 1]", self.p)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return jnp.where(logits >= nucleus_threshold(logits, self.p)[..., None], logits, -jnp.inf)


class MinP(Transform):
    """Keep the tokens at least p times as probable as the most probable one (Nguyen et al. 2024).

    p = 0 keeps all, p = 1 only the most probable.

    Raises:
        ValueError: unless 0 ≤ p ≤ 1.
    """

    p: Float[Array, "..."] | float

    def __post_init__(self):
        _check_interval(self.p, "p")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        return _at_least(logits, given.max(axis=-1, keepdims=True) + _log(self.p, given))


class Typical(Transform):
    """Locally typical: keep the smallest set of most typical tokens with mass at least p (Meister et al. 2023).

    A token is more typical, the nearer its information −log p_i is to the entropy H of the distribution, both in nats:

        |−log p_i − H| = |z_i − Σ_v p_v z_v|,   z the logits

    The token that crosses p is kept, and all tokens as typical; p = 1 keeps every token of positive probability. The
    most probable token may be removed.

    Raises:
        ValueError: unless 0 < p ≤ 1.
    """

    p: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.p > 0) & (self.p <= 1), "p", "in (0, 1]", self.p)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(jax.lax.stop_gradient(logits))
        possible = given > -jnp.inf
        below = jnp.where(possible, given - _highest(given), 0)
        weights = jnp.where(possible, jnp.exp(below), 0)
        total = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)  # 0 where no token is possible
        expected = (weights * below).sum(axis=-1, keepdims=True) / total
        scores = jnp.where(possible, -jnp.abs(below - expected), -jnp.inf)
        return jnp.where(scores >= mass_threshold(scores, weights, self.p)[..., None], logits, -jnp.inf)


class Epsilon(Transform):
    """Keep the tokens of probability at least ε, or the most probable if there is none (Hewitt et al. 2022).

    Raises:
        ValueError: unless 0 ≤ ε ≤ 1.
    """

    e: Float[Array, "..."] | float

    def __post_init__(self):
        _check_interval(self.e, "ε")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        return _at_least(logits, _log(self.e, given) + jax.nn.logsumexp(given, axis=-1, keepdims=True))


class Eta(Transform):
    """Keep the tokens of probability at least η, or the most probable if there is none (Hewitt et al. 2022).

        η = min(ε, √ε e^{−H}),   H the entropy in nats

    Raises:
        ValueError: unless 0 ≤ ε ≤ 1.
    """

    e: Float[Array, "..."] | float

    def __post_init__(self):
        _check_interval(self.e, "ε")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        log_epsilon = _log(self.e, given)
        log_eta = jnp.minimum(log_epsilon, log_epsilon / 2 - entropy(given)[..., None])
        return _at_least(logits, log_eta + jax.nn.logsumexp(given, axis=-1, keepdims=True))


class TopNSigma(Transform):
    """Top-nσ: keep the logits at most n standard deviations below the largest (Tang et al. 2024).

    σ is that of the row's logits as a population, without those of −inf. The tokens that are kept do not depend on a
    temperature before it.

    Raises:
        ValueError: unless n is finite and not negative.
    """

    n: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.n >= 0) & (self.n < jnp.inf), "n", "a finite number of at least 0", self.n)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        possible = given > -jnp.inf
        below = jnp.where(possible, given - _highest(given), 0)
        count = jnp.maximum(possible.sum(axis=-1, keepdims=True), 1)
        mean = below.sum(axis=-1, keepdims=True) / count
        variance = jnp.where(possible, jnp.square(below - mean), 0).sum(axis=-1, keepdims=True) / count
        return _at_least(logits, _highest(given) - per_row(self.n) * jnp.sqrt(jax.lax.stop_gradient(variance)))


def _check_interval(number: Float[Array, "..."] | float, name: str) -> None:
    require((number >= 0) & (number <= 1), name, "in [0, 1]", number)


def _log(number: Float[Array, "..."] | float, like: Float[Array, "*batch vocab"]) -> Float[Array, "*#batch 1"]:
    """The logarithm of a number, or of one number for each row, as a column; log 0 = −inf."""
    return jnp.log(per_row(jnp.asarray(number, like.dtype)))


def _highest(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch 1"]:
    """The largest logit of each row; 0 where all are −inf, so that it can be subtracted."""
    highest = logits.max(axis=-1, keepdims=True)
    return jnp.where(highest > -jnp.inf, highest, 0)


def _at_least(
    logits: Float[Array, "*batch vocab"], threshold: Float[Array, "*batch 1"]
) -> Float[Array, "*batch vocab"]:
    """The logits that reach the threshold, and always the largest of each row; −inf elsewhere."""
    given = wide(logits)
    return jnp.where((given >= threshold) | (given >= given.max(axis=-1, keepdims=True)), logits, -jnp.inf)


# Thresholds -----------------------------------------------------------------------------------------------------------


def kth_largest(logits: Float[Array, "*batch vocab"], k: Int[Array, "*#batch"] | int) -> Float[Array, "*batch"]:
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


def nucleus_threshold(
    logits: Float[Array, "*batch vocab"], p: Float[Array, "*#batch"] | float
) -> Float[Array, "*batch"]:
    """The largest threshold with Σ softmax(logits)[logits ≥ threshold] ≥ p in each row (−inf if p = 1)."""
    logits = wide(logits)
    head = _head(logits)
    highest = logits.max(axis=-1, keepdims=True)
    return _fill(logits, jnp.exp(logits - highest), p, head, jnp.exp(head - highest))


def mass_threshold(
    scores: Float[Array, "*batch vocab"], weights: Float[Array, "*batch vocab"], p: Float[Array, "*#batch"] | float
) -> Float[Array, "*batch"]:
    """The largest threshold with Σ weights[scores ≥ threshold] ≥ p Σ weights in each row (−inf if p = 1).

    Like `nucleus_threshold`, with tokens that fill the mass in another order than that of their probabilities.
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
    """`mass_threshold`, given the largest scores in descending order and their weights."""
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
    """The largest float x for which `holds(logits >= x)`, a condition that fails from some x on; −inf always holds.

    Floats are ordered like the integers of their bits (reversed for negative numbers), so bisection over the integers
    finds x exactly, in as many halvings as there are bits.
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
    # Return a logit: on processors that flush subnormal numbers to 0, `found` may be one of them.
    return jnp.where(logits <= found[..., None], logits, -jnp.inf).max(axis=-1)
