"""Stop strings: a row ends when its text contains one of them, wherever the tokens' boundaries are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopStrings:
    """An automaton over tokens (Aho and Corasick 1975), as a table on the device; build it with `stop_strings`.

    State 0 is the start; the last state is that of a text that contains a stop string, and is never left.
    """

    transitions: Int[Array, "state vocab"]

    def start(self, batch: int) -> Int[Array, "batch"]:
        """The state of rows without new text."""
        return jnp.zeros(batch, jnp.int32)

    def advance(self, state: Int[Array, "batch"], token: Int[Array, "batch"]) -> Int[Array, "batch"]:
        """The state after one more token of each row."""
        return self.transitions[state, token]

    def reached(self, state: Int[Array, "batch"]) -> Bool[Array, "batch"]:
        """Which rows contain a stop string."""
        return state == self.transitions.shape[0] - 1


def stop_strings(token_bytes: Sequence[bytes], strings: Sequence[str]) -> StopStrings:
    """Compile stop strings for a vocabulary.

    Args:
        token_bytes: what each token adds to the text, in UTF-8; empty for special tokens (`text.token_bytes`).
        strings: any of them ends a row. The text that counts is that of the new tokens, not of the prompt.

    Raises:
        ValueError: if there is no string, or one is empty.
    """
    if not strings or not all(strings):
        raise ValueError(f"stop strings must be given and not be empty, but are {list(strings)!r}.")
    by_byte = _aho_corasick([string.encode() for string in strings])
    final = by_byte.shape[0] - 1
    lengths = np.asarray([len(each) for each in token_bytes])
    padded = np.zeros((len(token_bytes), max(1, lengths.max(initial=0))), np.uint8)
    for row, each in enumerate(token_bytes):
        padded[row, : len(each)] = np.frombuffer(each, np.uint8)
    states = np.repeat(np.arange(final + 1, dtype=np.int32)[:, None], len(token_bytes), axis=1)
    for place in range(padded.shape[1]):  # one byte of all tokens at a time, from every state
        inside = place < lengths
        states[:, inside] = by_byte[states[:, inside], padded[inside, place]]
    return StopStrings(jnp.asarray(states))


def _aho_corasick(patterns: Sequence[bytes]) -> Int[np.ndarray, "state byte"]:
    """Transitions by byte between the prefixes of the patterns; the last state is that of a match."""
    prefixes = sorted({pattern[:length] for pattern in patterns for length in range(len(pattern))}, key=len)
    index = {prefix: number for number, prefix in enumerate(prefixes)}
    final = len(prefixes)
    table = np.full((final + 1, 256), final, np.int32)
    for prefix, number in index.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if not any(text.endswith(pattern) for pattern in patterns):
                table[number, byte] = next(index[text[cut:]] for cut in range(len(text) + 1) if text[cut:] in index)
    return table
