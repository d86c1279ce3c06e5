"""Token healing: the last tokens of a prompt are taken back, and their text is written again by the model.

A prompt that ends within what the model would write as one token, such as "http:" before "://", is continued badly.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.decoding.automata import padded
from jaxrl_llm.decoding.transforms import Transform
from jaxrl_llm.numerics import is_concrete


class Healing(Transform):
    """Keep the tokens that write a given text, or a part of it, or begin with it. Build it with `healing`.

    The distribution is the model's, masked and renormalised at each token, until the text is written; it is then the
    model's own. Within its limit a row always writes the whole text. Text before that is not searched for stop strings,
    nor is that of the token that completes it.

    Raises:
        ValueError: before decoding, for a limit within which the text cannot be written.
    """

    reweighs: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, int]] = {"place": 1, "whole": 2, "part": 2, "after": 2, "distance": 1}

    start: Int[Array, "..."] | int  # state of the row, or of each row: a rest of a text; 0 if nothing is left
    place: Int[Array, "vocab"]  # of the token's text among all in order; after them, if it has none
    whole: Int[Array, "state 2"]  # the places from and to which texts begin with the rest
    part: Int[Array, "state length"]  # the places of the texts that the rest begins with; −1 if there are no more
    after: Int[Array, "state length"]  # the state after each of them
    distance: Int[Array, "state"]  # the fewest tokens that write the rest

    def check(self, limits: Int[np.ndarray, "batch"]) -> None:
        """Raise a ValueError if a row's limit is too low; skipped if it is traced."""
        super().check(limits)
        if not all(map(is_concrete, (limits, self.start, self.distance))):
            return
        needed = np.broadcast_to(np.asarray(self.distance)[np.asarray(self.start)], np.shape(limits))
        if (needed > limits).any():
            row = int(np.argmax(needed > limits))
            raise ValueError(
                f"row {row} must have at least {needed[row]} new tokens to write the end of its prompt again, "
                f"but may have {limits[row]}."
            )

    def init(
        self, prompts: Array, mask: Array, limits: Int[Array, "batch"]
    ) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
        """Return the state and the remaining tokens of each row."""
        return jnp.broadcast_to(jnp.asarray(self.start, jnp.int32), limits.shape), limits

    def apply(
        self, state: tuple[Int[Array, "batch"], Int[Array, "batch"]], logits: Float[Array, "batch vocab"]
    ) -> Float[Array, "batch vocab"]:
        rest, remaining = state
        places, (start, end) = jnp.arange(self.place.shape[0] + 1), self.whole[rest].T
        kept = (places >= start[:, None]) & (places < end[:, None])
        in_time = (self.part[rest] >= 0) & (self.distance[self.after[rest]] < remaining[:, None])
        rows = jnp.arange(rest.shape[0])[:, None]
        kept = kept.at[rows, jnp.where(in_time, self.part[rest], len(places))].set(True, mode="drop")
        return jnp.where(kept[:, self.place] | (rest == 0)[:, None], logits, -jnp.inf)

    def update(
        self, state: tuple[Int[Array, "batch"], Int[Array, "batch"]], token: Int[Array, "batch"], logits: Array
    ) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
        rest, remaining = state
        is_part = self.part[rest] == self.place[token][:, None]
        return jnp.where(is_part, self.after[rest], 0).sum(axis=1), remaining - 1

    def may_end(self, state: tuple[Int[Array, "batch"], Int[Array, "batch"]]) -> Bool[Array, "batch"]:
        return state[0] == 0


def healing(token_bytes: Sequence[bytes], texts: Sequence[bytes]) -> Healing:
    """Return the transform by which each row begins with its text.

    Args:
        token_bytes: the text of each token (`text.token_bytes`).
        texts: of each row; an empty one leaves its row alone.

    Raises:
        ValueError: for a text that this vocabulary cannot spell.
    """
    rests = sorted({text[place:] for text in texts for place in range(len(text) + 1)} | {b""}, key=len)
    number = {rest: state for state, rest in enumerate(rests)}
    ordered = sorted({piece for piece in token_bytes if piece})
    place_of = {piece: place for place, piece in enumerate(ordered)}
    shape = padded(len(rests)), padded(len(rests[-1]))
    whole, distance = np.zeros((shape[0], 2), np.int32), np.zeros(shape[0], np.int32)
    part, after = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    for state, rest in enumerate(rests[1:], 1):
        start = end = bisect.bisect_left(ordered, rest)
        while end < len(ordered) and ordered[end].startswith(rest):
            end += 1
        whole[state] = start, end
        lengths = [length for length in range(1, len(rest)) if rest[:length] in place_of]
        for column, length in enumerate(lengths):
            part[state, column], after[state, column] = place_of[rest[:length]], number[rest[length:]]
        onwards = [0] if start < end else distance[after[state, : len(lengths)]].tolist()
        distance[state] = 1 + min(onwards, default=len(rests) + len(rests[-1]))
    for text in texts:
        if distance[number[text]] > len(text):
            raise ValueError(f"no tokens of this vocabulary spell the text {text!r}.")
    place = [place_of.get(piece, len(token_bytes)) for piece in token_bytes]
    return Healing(
        *map(jnp.asarray, ([number[text] for text in texts], place, whole, part, after, distance)),
    )


def beginnings(token_bytes: Sequence[bytes]) -> frozenset[bytes]:
    """Return the texts with which longer tokens begin."""
    return frozenset(piece[:end] for piece in token_bytes for end in range(1, len(piece)))


def taken_back(begun: Collection[bytes], token_bytes: Sequence[bytes], prompt: Sequence[int], *, least: int = 1) -> int:
    """Return the number of tokens to take back from the end of a prompt: the most whose text begins a longer token.

    Tokens without text are not taken back, and `least` tokens stay.

    Args:
        begun: `beginnings` of the vocabulary.
    """
    found, text, longest = 0, b"", max(map(len, begun), default=0)
    for count in range(1, len(prompt) - least + 1):
        piece = token_bytes[prompt[-count]]
        text = piece + text
        if not piece or len(text) > longest:
            break
        found = count if text in begun else found
    return found
