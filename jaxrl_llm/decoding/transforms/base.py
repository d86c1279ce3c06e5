"""What a logits transform is, and what decoders keep for those that look back or have a memory."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.numerics import is_concrete, wide


class History(NamedTuple):
    """The tokens of each row so far, in slots: all rows write at the same one, and the masks say which count."""

    tokens: Int[Array, "batch slot"]
    mask: Bool[Array, "batch slot"]  # real: prompt and generated tokens
    generated: Bool[Array, "batch slot"]  # of these the generated ones
    length: Int[Array, ""]  # slots written


class Transform:
    """Base of the transforms: a pytree, called as `transform(logits)`, or with `looks_back` also with what came before.

    A stateless transform defines `__call__(logits)`. One that looks back sets `looks_back = True` and defines
    `__call__(logits, tokens, mask)`. One with a memory, a tree of arrays [batch, ...], defines `start`, `warp` and
    `update` instead.
    """

    looks_back: ClassVar[bool] = False
    sees_prompt: ClassVar[bool] = True  # or the generated tokens alone; for those that look back
    numbers: ClassVar[tuple[str, ...] | None] = None  # fields that are one number, or one a row; by default all

    def __call__(self, logits: Float[Array, "batch vocab"], *context: Array) -> Float[Array, "batch vocab"]:
        raise NotImplementedError(f"{type(self).__name__} has a memory: give it to a decoder.")

    def check(self, limits: Int[np.ndarray, "batch"], *, per_row: bool = True) -> None:
        """Raise a ValueError if a row that may have so many new tokens cannot be served; called before decoding.

        Args:
            per_row: whether the decoder takes numbers of one value a row.
        """
        names = [field.name for field in dataclasses.fields(self)] if self.numbers is None else self.numbers
        for name in names:
            shape = jnp.shape(getattr(self, name))
            if shape and not (per_row and shape == limits.shape):
                wanted = f", or one for each of {len(limits)} rows" if per_row else " with beams"
                found = f"has the shape {list(shape)}"
                raise ValueError(f"{name} of {type(self).__name__} must be one number{wanted}, but {found}.")

    def start(self, limits: Int[Array, "batch"]) -> PyTree[Array]:
        """The memory before the first token; `limits` are the numbers of new tokens that the rows may have."""
        return ()

    def warp(
        self, logits: Float[Array, "batch vocab"], history: History | None, memory: PyTree[Array]
    ) -> Float[Array, "batch vocab"]:
        """The transformed logits, whatever this one needs to know."""
        if not self.looks_back:
            return self(logits)
        return self(logits, history.tokens, history.mask if self.sees_prompt else history.generated)

    def update(
        self,
        memory: PyTree[Array],
        logits: Float[Array, "batch vocab"],
        token: Int[Array, "batch"],
        alive: Bool[Array, "batch"],
    ) -> PyTree[Array]:
        """The memory after a token, chosen where the *model* gave `logits`; rows that are not alive emit none."""
        return memory

    def kept_mass(self, logits: Float[Array, "batch vocab"], *context: Array) -> Float[Array, "batch"]:
        """The probability, under softmax(logits), of the tokens that the transform keeps."""
        logits = wide(logits)
        kept = self(logits, *context) > -jnp.inf
        return jnp.where(kept, jax.nn.softmax(logits, axis=-1), 0).sum(axis=-1)


def pytree(cls: type) -> type:
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


def check(holds: bool | Array, name: str, expected: str, value: object) -> None:
    """Raise unless `holds`, where that can be known: a traced number was checked when it was made."""
    if is_concrete(holds) and not np.all(np.asarray(holds)):
        raise ValueError(f"{name} must be {expected}, but is {value}.")


def per_row(number: Array | float) -> Array | float:
    """A number as it is, one number a row as a column."""
    return number if jnp.ndim(number) == 0 else jnp.asarray(number)[..., None]


def keep(logits: Float[Array, "*batch vocab"], kept: Bool[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
    """The logits of what is kept, `-inf` elsewhere; where nothing would be left, all stay as they were."""
    kept = kept | ~(kept & (logits > -jnp.inf)).any(axis=-1, keepdims=True)
    return jnp.where(kept, logits, -jnp.inf)


@pytree
@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """The transforms one after the other, each seeing what the one before left."""

    transforms: tuple[Transform, ...]

    def __post_init__(self):
        object.__setattr__(self, "transforms", tuple(self.transforms))

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """Whether any of them does."""
        return any(transform.looks_back for transform in self.transforms)

    def __call__(self, logits: Float[Array, "*batch vocab"], *context: Array) -> Float[Array, "*batch vocab"]:
        for transform in self.transforms:
            logits = transform(logits, *context) if transform.looks_back else transform(logits)
        return logits

    def check(self, limits: Int[np.ndarray, "batch"], *, per_row: bool = True) -> None:
        for transform in self.transforms:
            transform.check(limits, per_row=per_row)

    def start(self, limits: Int[Array, "batch"]) -> PyTree[Array]:
        return tuple(transform.start(limits) for transform in self.transforms)

    def warp(
        self, logits: Float[Array, "batch vocab"], history: History | None, memory: PyTree[Array]
    ) -> Float[Array, "batch vocab"]:
        for transform, own in zip(self.transforms, memory, strict=True):
            logits = transform.warp(logits, history, own)
        return logits

    def update(
        self,
        memory: PyTree[Array],
        logits: Float[Array, "batch vocab"],
        token: Int[Array, "batch"],
        alive: Bool[Array, "batch"],
    ) -> PyTree[Array]:
        pairs = zip(self.transforms, memory, strict=True)
        return tuple(transform.update(own, logits, token, alive) for transform, own in pairs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a decoder keeps for its transform: the history, if it looks back, and its memory. Every leaf is a row's."""

    history: History | None
    memory: PyTree[Array]

    def take(self, rows: Int[Array, "rows"]) -> Context:
        """The context of `rows`, in that order; a row may be taken many times."""
        history = self.history
        if history is not None:
            history = History(*(leaf[rows] for leaf in history[:3]), history.length)
        return Context(history, jax.tree.map(lambda leaf: leaf[rows], self.memory))


def begin(
    transform: Transform | None,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    limits: Int[Array, "batch"],
    *,
    num_slots: int,
) -> Context:
    """The context after the prompts, with room for `num_slots` tokens in all."""
    if transform is None:
        return Context(None, ())
    history = None
    if transform.looks_back:
        room = ((0, 0), (0, num_slots - prompts.shape[1]))
        tokens, mask = jnp.pad(prompts, room), jnp.pad(prompt_mask, room)
        history = History(tokens, mask, jnp.zeros_like(mask), jnp.asarray(prompts.shape[1], jnp.int32))
    return Context(history, transform.start(limits))


def warp(
    transform: Transform | None, logits: Float[Array, "batch vocab"], context: Context
) -> Float[Array, "batch vocab"]:
    """The logits as the transform, if there is one, leaves them."""
    return logits if transform is None else transform.warp(logits, context.history, context.memory)


def remember(
    transform: Transform | None,
    context: Context,
    logits: Float[Array, "batch vocab"],
    token: Int[Array, "batch"],
    alive: Bool[Array, "batch"],
) -> Context:
    """The context after one more token; `logits` are the model's."""
    if transform is None:
        return context
    history = context.history
    if history is not None:

        def write(slots: Array, column: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, column[:, None], history.length, axis=1)

        tokens, mask, generated = (
            write(slots, column) for slots, column in zip(history[:3], (token, alive, alive), strict=True)
        )
        history = History(tokens, mask, generated, history.length + 1)
    return Context(history, transform.update(context.memory, logits, token, alive))


def require_stateless(transform: Any, *, decoder: str) -> None:
    """Raise if a decoder that has no history is given a transform that needs one, or a memory."""
    if isinstance(transform, Transform):
        parts = transform.transforms if isinstance(transform, Chain) else (transform,)
        for part in parts:
            if part.looks_back or type(part).warp is not Transform.warp:
                raise ValueError(
                    f"{decoder} takes transforms of the logits alone, but {type(part).__name__} needs more."
                )
