"""Transforms of the logits alone: temperature, and filters that cut the tail of the law."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.decoding import thresholds
from jaxrl_llm.decoding.transforms.base import Transform, check, per_row, pytree


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
