"""Stop strings: a row ends when its text contains one of them, wherever the tokens' boundaries are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxrl_llm.decoding import automata

MIN_STATES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopStrings:
    """An automaton over tokens (Aho and Corasick 1975), as a table on the device; build it with `stop_strings`.

    State 0 is the start; the last state is that of a text that contains a stop string, and is never left. The number of
    states is a power of two, at least 16, so that one compiled program serves many stop strings.
    """

    transitions: Int[Array, "state vocab"]

    def start(self, batch: int) -> Int[Array, "batch"]:
        """The state of rows without new text."""
        return jnp.zeros(batch, jnp.int32)

    def advance(self, state: Int[Array, "batch"], token: Int[Array, "batch"]) -> Int[Array, "batch"]:
        """The state after one more token of each row; one outside the vocabulary adds no text."""
        inside = (token >= 0) & (token < self.transitions.shape[1])
        return jnp.where(inside, self.transitions[state, jnp.where(inside, token, 0)], state)

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
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"stop strings must be given in a sequence and not be empty, but are {strings!r}.")
    by_byte = _aho_corasick([string.encode() for string in strings])
    return StopStrings(jnp.asarray(automata.over_tokens(by_byte, token_bytes)))


def _aho_corasick(patterns: Sequence[bytes]) -> Int[np.ndarray, "state byte"]:
    """Transitions by byte between the prefixes of the patterns; the last state is that of a match."""
    prefixes = sorted({pattern[:length] for pattern in patterns for length in range(len(pattern))}, key=len)
    index = {prefix: number for number, prefix in enumerate(prefixes)}
    final = max(MIN_STATES, 1 << len(prefixes).bit_length()) - 1  # the states between are never reached
    onward: list[dict[int, int]] = [{} for _ in prefixes]
    for pattern in patterns:
        for length in range(len(pattern)):
            onward[index[pattern[:length]]][pattern[length]] = index.get(pattern[: length + 1], final)
    for pattern in patterns:  # a prefix that goes on may be a whole pattern itself
        onward[index[pattern[:-1]]][pattern[-1]] = final
    table = np.zeros((final + 1, 256), np.int32)
    table[final] = final
    fallback = np.zeros(final + 1, np.int32)  # the longest proper suffix that is a prefix; or the match in it
    for number, children in enumerate(onward):  # shorter ones first
        if number:
            table[number] = table[fallback[number]]
        for byte, child in children.items():
            fallback[child] = table[number, byte]
        for byte, child in children.items():
            table[number, byte] = final if table[number, byte] == final else child
    return table
