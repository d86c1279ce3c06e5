"""The protocol of a logits transform, and `Chain`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.numerics import violated, wide


def pytree(cls: type) -> type:
    """Make a class a frozen dataclass and a pytree whose fields are its leaves, so that no number recompiles.

    JAX rebuilds it without its checks, for its trees also hold gradients and shapes.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(self: Any) -> tuple[list, None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    def unflatten(_: None, leaves: tuple) -> Any:
        rebuilt = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(rebuilt, name, leaf)
        return rebuilt

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


class Seen(NamedTuple):
    """The state of a transform that looks back: the tokens of each row, and which of them count."""

    tokens: Int[Array, "batch slot"]
    mask: Bool[Array, "batch slot"]
    end: Int[Array, "batch"]  # the slot of the next token


@typing.dataclass_transform(frozen_default=True)
class Transform:
    """Base class of all transforms. A subclass becomes a frozen dataclass and a pytree, whose fields are its leaves.

    There are three kinds:
    - A stateless transform defines `__call__(logits)`.
    - One that looks back sets `looks_back = True` and defines `__call__(logits, tokens, mask)`. It is given the tokens
      of each row so far, without those of the prompt if `sees_prompt = False`.
    - One with a state of its own, a tree of arrays [batch, ...], defines `init`, `apply` and `update`:

        class Cooling(Transform):
            \"\"\"Temperature t at the first new token of a row, multiplied by `rate` after each.\"\"\"

            t: float
            rate: float

            def init(self, prompts, mask, limits):
                return jnp.full(limits.shape, self.t)

            def apply(self, temperature, logits):
                return logits / temperature[:, None]

            def update(self, temperature, token, logits):
                return temperature * self.rate

        generate(lm, params, prompts, max_new_tokens=20, transform=[Cooling(2.0, 0.9), TopP(0.9)], key=key)

    A decoder calls `init` once, then `apply` and `update` for every token.
    """

    looks_back: ClassVar[bool] = False
    sees_prompt: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...] | None] = None  # fields that are one number, or one for each row; by default all

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        pytree(cls)

    def __call__(self, logits: Float[Array, "batch vocab"], *context: Array) -> Float[Array, "batch vocab"]:
        raise NotImplementedError(f"{type(self).__name__} has a state: give it to a decoder, or call `apply`.")

    def check(self, limits: Int[np.ndarray, "batch"], *, per_row: bool = True) -> None:
        """Raise a ValueError if rows that may have so many new tokens cannot be served; called before decoding.

        Args:
            per_row: whether the decoder takes numbers of one value for each row.
        """
        names = [field.name for field in dataclasses.fields(self)] if self.numbers is None else self.numbers
        for name in names:
            shape = jnp.shape(getattr(self, name))
            if shape and not (per_row and shape == limits.shape):
                wanted = f", or one for each of {len(limits)} rows" if per_row else " with beams"
                found = f"has the shape {list(shape)}"
                raise ValueError(f"{name} of {type(self).__name__} must be one number{wanted}, but {found}.")

    def init(
        self, prompts: Int[Array, "batch slot"], mask: Bool[Array, "batch slot"], limits: Int[Array, "batch"]
    ) -> PyTree[Array]:
        """The state before the first new token.

        Args:
            prompts: with free slots on the right, enough for all new tokens.
            mask: false at padding and at free slots.
            limits: the most new tokens of each row.
        """
        if not self.looks_back:
            return ()
        end = jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0).max(axis=1)
        return Seen(prompts, mask if self.sees_prompt else jnp.zeros_like(mask), end)

    def apply(self, state: PyTree[Array], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """The transformed logits."""
        return self(logits, state.tokens, state.mask) if self.looks_back else self(logits)

    def update(
        self, state: PyTree[Array], token: Int[Array, "batch"], logits: Float[Array, "batch vocab"]
    ) -> PyTree[Array]:
        """The state after one more token of each row, chosen where the *model* gave `logits`.

        For a row that has ended, decoders keep the state from before.
        """
        if not self.looks_back:
            return state
        here = jnp.arange(state.mask.shape[1]) == state.end[:, None]
        return Seen(jnp.where(here, token[:, None], state.tokens), state.mask | here, state.end + 1)

    def kept_mass(self, logits: Float[Array, "batch vocab"], *context: Array) -> Float[Array, "batch"]:
        """The probability, under softmax(logits), of the tokens that the transform keeps."""
        logits = wide(logits)
        kept = self(logits, *context) > -jnp.inf
        return jnp.where(kept, jax.nn.softmax(logits, axis=-1), 0).sum(axis=-1)


class Chain(Transform):
    """Apply transforms one after the other, each to what the one before left."""

    transforms: tuple[Transform, ...]

    def __post_init__(self):
        object.__setattr__(self, "transforms", tuple(map(as_transform, self.transforms)))

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """True if any of them does."""
        return any(transform.looks_back for transform in self.transforms)

    def __call__(self, logits: Float[Array, "*batch vocab"], *context: Array) -> Float[Array, "*batch vocab"]:
        for transform in self.transforms:
            logits = transform(logits, *context) if transform.looks_back else transform(logits)
        return logits

    def check(self, limits: Int[np.ndarray, "batch"], *, per_row: bool = True) -> None:
        for transform in self.transforms:
            transform.check(limits, per_row=per_row)

    def init(
        self, prompts: Int[Array, "batch slot"], mask: Bool[Array, "batch slot"], limits: Int[Array, "batch"]
    ) -> PyTree[Array]:
        return tuple(transform.init(prompts, mask, limits) for transform in self.transforms)

    def apply(self, state: PyTree[Array], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        for transform, own in zip(self.transforms, state, strict=True):
            logits = transform.apply(own, logits)
        return logits

    def update(
        self, state: PyTree[Array], token: Int[Array, "batch"], logits: Float[Array, "batch vocab"]
    ) -> PyTree[Array]:
        pairs = zip(self.transforms, state, strict=True)
        return tuple(transform.update(own, token, logits) for transform, own in pairs)


def as_transform(transform: Transform | Sequence[Transform] | None) -> Transform:
    """A transform as it is, a sequence of them as a chain, none as the empty chain.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(transform, Transform):
        return transform
    if transform is None or isinstance(transform, list | tuple):
        return Chain(transform or ())
    raise ValueError(f"transform must be a Transform or a sequence of them, but is {transform!r}.")


def update_alive(
    transform: Transform,
    state: PyTree[Array],
    token: Int[Array, "batch"],
    logits: Float[Array, "batch vocab"],
    alive: Bool[Array, "batch"],
) -> PyTree[Array]:
    """The state after one more token of the rows that are alive."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(alive.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, transform.update(state, token, logits), state)


def require(holds: bool | Array, name: str, expected: str, value: object) -> None:
    """Raise a ValueError unless `holds`, where that can be read: a traced number was checked when it was made."""
    if violated(holds):
        raise ValueError(f"{name} must be {expected}, but is {value}.")


def token_ids(name: str, ids: int | Sequence[int] | Int[Array, "*ids"] | None) -> Int[Array, "ids"]:
    """No token, one or several as an array. An id outside the vocabulary stands for no token.

    Raises:
        ValueError: naming the argument, if it holds anything but integers.
    """
    try:
        array = jnp.atleast_1d(jnp.asarray([] if ids is None else ids))
        integers = array.ndim == 1 and (not array.size or jnp.issubdtype(array.dtype, jnp.integer))
    except (TypeError, ValueError):  # no numbers, or not of one shape
        integers = False
    if not integers:
        raise ValueError(f"{name} must be a token id or several, but is {ids!r}.")
    return array.astype(jnp.int32)


def per_row(number: Array | float) -> Array | float:
    """A number as it is; one for each row as a column."""
    return number if jnp.ndim(number) == 0 else jnp.asarray(number)[..., None]


def keep(logits: Float[Array, "*batch vocab"], kept: Bool[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
    """The logits of what is kept, −inf elsewhere; a row in which nothing would be left stays as it is."""
    kept = kept | ~(kept & (logits > -jnp.inf)).any(axis=-1, keepdims=True)
    return jnp.where(kept, logits, -jnp.inf)
