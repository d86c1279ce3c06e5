"""Logits transforms: pytrees whose numbers are leaves, so another temperature never recompiles.

Each is called as `transform(logits [..., V]) -> logits [..., V]`, with `-inf` where a token is removed. A filter keeps
ties (tokens of equal logits stand or fall together) and at least one token, and leaves the logits of what it keeps.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.decoding import thresholds
from jaxrl_llm.objectives.numerics import is_concrete


class Transform(Protocol):
    """What `generate` and the other decoders accept as `transform`."""

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]: ...


def _check(holds: bool | Array, name: str, expected: str, value: object) -> None:
    """Raise unless `holds`, where that can be known: a traced number was checked when it was made."""
    if is_concrete(holds) and not jnp.all(holds):
        raise ValueError(f"{name} must be {expected}, but is {value}.")


def _pytree(cls: type) -> type:
    """Register a dataclass whose fields are leaves; rebuilt unchecked, for its trees also hold gradients and shapes."""
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(self: Transform) -> tuple[list, None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    def unflatten(_: None, leaves: tuple) -> Transform:
        rebuilt = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(rebuilt, name, leaf)
        return rebuilt

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@_pytree
@dataclasses.dataclass(frozen=True)
class Temperature:
    """logits / t: below 1 sharper, above 1 flatter.

    Raises:
        ValueError: unless t is finite and positive; greedy decoding is `greedy=True`, not t = 0.
    """

    t: Float[Array, "..."] | float

    def __post_init__(self):
        _check((self.t > 0) & (self.t < jnp.inf), "the temperature", "a finite number above 0", self.t)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return logits / _per_row(self.t)


@_pytree
@dataclasses.dataclass(frozen=True)
class TopK:
    """Keep the k most probable tokens (Fan et al. 2018), and all that tie with the k-th.

    A k above the vocabulary keeps all.

    Raises:
        ValueError: unless k is an integer of at least 1.
    """

    k: Int[Array, "..."] | int

    def __post_init__(self):
        k = jnp.asarray(self.k)
        _check(jnp.issubdtype(k.dtype, jnp.integer) and k >= 1, "k", "an integer of at least 1", self.k)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return jnp.where(logits >= thresholds.top_k(logits, self.k)[..., None], logits, -jnp.inf)


@_pytree
@dataclasses.dataclass(frozen=True)
class TopP:
    """Nucleus: keep the smallest set of most probable tokens with mass at least p (Holtzman et al. 2020, eq. 2).

    The token that crosses p is kept, and all that tie with it; p = 1 keeps every token of positive probability.

    Raises:
        ValueError: unless 0 < p ≤ 1.
    """

    p: Float[Array, "..."] | float

    def __post_init__(self):
        _check((self.p > 0) & (self.p <= 1), "p", "in (0, 1]", self.p)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return jnp.where(logits >= thresholds.top_p(logits, self.p)[..., None], logits, -jnp.inf)


@_pytree
@dataclasses.dataclass(frozen=True)
class Chain:
    """The transforms one after the other, each seeing what the one before left."""

    transforms: tuple[Transform, ...]

    def __post_init__(self):
        object.__setattr__(self, "transforms", tuple(self.transforms))

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        for transform in self.transforms:
            logits = transform(logits)
        return logits


def _per_row(number: Array | float) -> Array | float:
    """A number as it is, one number a row as a column."""
    return number if jnp.ndim(number) == 0 else jnp.asarray(number)[..., None]
