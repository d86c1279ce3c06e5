"""Transforms that look back at the tokens of a row: penalties for repetition, and blocked n-grams.

Each is called as `transform(logits [..., V], tokens [..., L], mask [..., L])`. Tokens where the mask is false are
padding: they may be any number, and do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.decoding.transforms.base import Transform, keep, per_row, require
from jaxrl_llm.numerics import wide


def looking_back(look_back: Callable[..., Array]) -> Callable[..., Array]:
    """Make a method of (logits, tokens, mask) a `__call__` that checks them, and computes in float32 or wider."""

    def call(
        self: Transform,
        logits: Float[Array, "*batch vocab"],
        tokens: Int[Array, "*batch slot"],
        mask: Bool[Array, "*batch slot"],
    ) -> Float[Array, "*batch vocab"]:
        """The transformed logits, in their dtype.

        Raises:
            ValueError: if the shapes do not match, or the tokens are not integers.
        """
        tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
        shapes = f"{tokens.dtype}{list(tokens.shape)} and {mask.dtype}{list(mask.shape)}"
        rows = logits.shape[:-1]
        if tokens.shape != mask.shape or tokens.shape[:-1] != rows or tokens.ndim != logits.ndim:
            raise ValueError(
                f"tokens and mask must be {[*rows, 'slot']}, one row for each of logits, but are {shapes}."
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or mask.dtype != jnp.bool_:
            raise ValueError(f"tokens must be integers and mask boolean, but they are {shapes}.")
        return look_back(self, wide(logits), tokens, mask).astype(logits.dtype)

    return call


class RepetitionPenalty(Transform):
    """Make the tokens of the row, prompt included, less probable (Keskar et al. 2019).

    Their logits are divided by r if positive and multiplied by r if negative, once however often they occur. r < 1
    rewards repetition. Unlike all other transforms it is not invariant to a shift of the logits.

    Raises:
        ValueError: unless r is finite and positive.
    """

    looks_back: ClassVar[bool] = True

    r: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.r > 0) & (self.r < jnp.inf), "the repetition penalty", "a finite number above 0", self.r)

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        r = per_row(self.r)
        return jnp.where(
            count_tokens(tokens, mask, logits.shape[-1]) > 0, jnp.where(logits > 0, logits / r, logits * r), logits
        )


class PresencePenalty(Transform):
    """Subtract p, once, from the logit of every token that was generated; the prompt does not count.

    The penalty of that name in the OpenAI API. A negative one is a reward.

    Raises:
        ValueError: unless p is finite.
    """

    looks_back: ClassVar[bool] = True
    sees_prompt: ClassVar[bool] = False

    p: Float[Array, "..."] | float

    def __post_init__(self):
        require(jnp.abs(self.p) < jnp.inf, "the presence penalty", "finite", self.p)

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        return jnp.where(count_tokens(tokens, mask, logits.shape[-1]) > 0, logits - per_row(self.p), logits)


class FrequencyPenalty(Transform):
    """Subtract f from the logit of a token each time it was generated; the prompt does not count.

    The penalty of that name in the OpenAI API. A negative one is a reward.

    Raises:
        ValueError: unless f is finite.
    """

    looks_back: ClassVar[bool] = True
    sees_prompt: ClassVar[bool] = False

    f: Float[Array, "..."] | float

    def __post_init__(self):
        require(jnp.abs(self.f) < jnp.inf, "the frequency penalty", "finite", self.f)

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        return logits - per_row(self.f) * count_tokens(tokens, mask, logits.shape[-1])


class NoRepeatNgram(Transform):
    """Remove the tokens that would complete an n-gram that the row, prompt included, already contains.

    n = 1 removes every token of the row. Padding between two tokens does not separate them. A row in which no possible
    token would be left is unchanged: only there an n-gram repeats. (Paulus et al. 2018 block trigrams in beam search.)

    Raises:
        ValueError: unless n is an integer of at least 1.
    """

    looks_back: ClassVar[bool] = True

    n: Int[Array, "..."] | int

    def __post_init__(self):
        n = jnp.asarray(self.n)
        require(jnp.issubdtype(n.dtype, jnp.integer) and n >= 1, "n", "an integer of at least 1", self.n)

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        if tokens.shape[-1] == 0:
            return logits
        tokens, real = last_tokens(tokens, mask, tokens.shape[-1])
        repeats = real & _follows_repetition(tokens, real, per_row(jnp.asarray(self.n, jnp.int32)) - 1)
        return keep(logits, count_tokens(tokens, repeats, logits.shape[-1]) == 0)


def last_tokens(
    tokens: Int[Array, "*batch slot"], mask: Bool[Array, "*batch slot"], count: int
) -> tuple[Int[Array, "*batch count"], Bool[Array, "*batch count"]]:
    """The last `count` real tokens of each row without gaps, aligned to the right, and a mask of those that exist."""
    behind = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]  # real tokens from here to the end
    place = jnp.where(mask & (behind <= count), count - behind, count)  # the place `count` is dropped

    def write(place: Array, tokens: Array) -> tuple[Array, Array]:
        empty = jnp.zeros(count, tokens.dtype)
        return empty.at[place].set(tokens, mode="drop"), empty.astype(bool).at[place].set(True, mode="drop")

    return row_by_row(write, place, tokens)


def _follows_repetition(
    tokens: Int[Array, "*batch slot"], real: Bool[Array, "*batch slot"], length: Int[Array, "*#batch #1"]
) -> Bool[Array, "*batch slot"]:
    """True at tokens that follow a repetition of the row's last `length` tokens. Padding must be on the left."""
    slots = tokens.shape[-1]
    longest = jnp.minimum(length.max(initial=0), slots)

    def unsettled(carry: tuple[Array, Array, Array, Array]) -> Array:
        back, _, _, same = carry
        return (back <= longest) & same.any()

    def compare(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        back, shifted, exists, same = carry  # shifted[j] = tokens[j - back + 1]; the next one is compared now
        wanted = jnp.take(tokens, jnp.asarray(slots) - back, axis=-1)[..., None]
        shifted = jnp.roll(shifted, 1, axis=-1)
        exists = jnp.roll(exists, 1, axis=-1).at[..., 0].set(False)
        return back + 1, shifted, exists, same & ((exists & (shifted == wanted)) | (back > length))

    start = (jnp.ones((), jnp.int32), tokens, real, jnp.ones_like(real))
    return jax.lax.while_loop(unsettled, compare, start)[-1]


def count_tokens(
    tokens: Int[Array, "*batch slot"], mask: Bool[Array, "*batch slot"], vocab: int
) -> Int[Array, "*batch vocab"]:
    """The number of times that each token of the vocabulary occurs where the mask is true."""
    place = jnp.where(mask & (tokens >= 0) & (tokens < vocab), tokens, vocab)  # beyond the end, where it is dropped
    return row_by_row(lambda place: jnp.zeros(vocab, jnp.int32).at[place].add(1, mode="drop"), place)


def row_by_row(function, *arrays: Array):
    """`jax.vmap` over all axes but the last."""
    for _ in range(arrays[0].ndim - 1):
        function = jax.vmap(function)
    return function(*arrays)
