"""Transforms of the logits alone: temperature, and filters that cut the tail of the law."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.decoding import thresholds
from jaxrl_llm.decoding.transforms.base import Transform, check, per_row, pytree
from jaxrl_llm.numerics import wide
from jaxrl_llm.objectives.logprobs import entropy


@pytree
@dataclasses.dataclass(frozen=True)
class Temperature(Transform):
    """logits / t: below 1 sharper, above 1 flatter.

    Raises:
        ValueError: unless t is finite and positive; greedy decoding is `greedy=True`, not t = 0.
    """

    t: Float[Array, "..."] | float

    def __post_init__(self):
        check((self.t > 0) & (self.t < jnp.inf), "the temperature", "a finite number above 0", self.t)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return logits / per_row(self.t)


@pytree
@dataclasses.dataclass(frozen=True)
class TopK(Transform):
    """Keep the k most probable tokens (Fan et al. 2018), and all that tie with the k-th.

    A k above the vocabulary keeps all.

    Raises:
        ValueError: unless k is an integer of at least 1.
    """

    k: Int[Array, "..."] | int

    def __post_init__(self):
        k = jnp.asarray(self.k)
        check(jnp.issubdtype(k.dtype, jnp.integer) and k >= 1, "k", "an integer of at least 1", self.k)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return jnp.where(logits >= thresholds.top_k(logits, self.k)[..., None], logits, -jnp.inf)


@pytree
@dataclasses.dataclass(frozen=True)
class TopP(Transform):
    """Nucleus: keep the smallest set of most probable tokens with mass at least p (Holtzman et al. 2020, eq. 2).

    The token that crosses p is kept, and all that tie with it; p = 1 keeps every token of positive probability.

    Raises:
        ValueError: unless 0 < p ≤ 1.
    """

    p: Float[Array, "..."] | float

    def __post_init__(self):
        check((self.p > 0) & (self.p <= 1), "p", "in (0, 1]", self.p)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return jnp.where(logits >= thresholds.top_p(logits, self.p)[..., None], logits, -jnp.inf)


@pytree
@dataclasses.dataclass(frozen=True)
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


@pytree
@dataclasses.dataclass(frozen=True)
class Typical(Transform):
    """Locally typical: keep the smallest set of most typical tokens with mass at least p (Meister et al. 2023).

    A token is the more typical, the nearer its information −log p_i is to the entropy H of the law, both in nats:

        |−log p_i − H| = |z_i − Σ_v p_v z_v|,   z the logits

    The token that crosses p is kept, and all that are as typical; p = 1 keeps every token of positive probability. The
    most probable token may be removed.

    Raises:
        ValueError: unless 0 < p ≤ 1.
    """

    p: Float[Array, "..."] | float

    def __post_init__(self):
        check((self.p > 0) & (self.p <= 1), "p", "in (0, 1]", self.p)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(jax.lax.stop_gradient(logits))
        possible = given > -jnp.inf
        below = jnp.where(possible, given - _highest(given), 0)
        weights = jnp.where(possible, jnp.exp(below), 0)
        total = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)  # 0 where no token is possible
        expected = (weights * below).sum(axis=-1, keepdims=True) / total
        scores = jnp.where(possible, -jnp.abs(below - expected), -jnp.inf)
        return jnp.where(scores >= thresholds.by_mass(scores, weights, self.p)[..., None], logits, -jnp.inf)


@pytree
@dataclasses.dataclass(frozen=True)
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


@pytree
@dataclasses.dataclass(frozen=True)
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


@pytree
@dataclasses.dataclass(frozen=True)
class TopNSigma(Transform):
    """Top-nσ: keep the logits at most n standard deviations below the largest (Tang et al. 2024).

    σ is that of the row's logits, as a population; those of −inf do not count. What is kept does not depend on a
    temperature before it.

    Raises:
        ValueError: unless n is finite and not negative.
    """

    n: Float[Array, "..."] | float

    def __post_init__(self):
        check((self.n >= 0) & (self.n < jnp.inf), "n", "a finite number of at least 0", self.n)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        possible = given > -jnp.inf
        below = jnp.where(possible, given - _highest(given), 0)
        count = jnp.maximum(possible.sum(axis=-1, keepdims=True), 1)
        mean = below.sum(axis=-1, keepdims=True) / count
        variance = jnp.where(possible, jnp.square(below - mean), 0).sum(axis=-1, keepdims=True) / count
        return _at_least(logits, _highest(given) - per_row(self.n) * jnp.sqrt(jax.lax.stop_gradient(variance)))


def _check_interval(number: Float[Array, "..."] | float, name: str) -> None:
    check((number >= 0) & (number <= 1), name, "in [0, 1]", number)


def _log(number: Float[Array, "..."] | float, like: Float[Array, "*batch vocab"]) -> Float[Array, "*#batch 1"]:
    """The logarithm of a number, or of one number a row as a column; −inf of 0."""
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
