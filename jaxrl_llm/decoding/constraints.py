"""Constrained decoding without dead ends, and stop strings: automata over tokens, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.decoding import automata
from jaxrl_llm.decoding.automata import MIN_STATES
from jaxrl_llm.decoding.transforms import Transform, pytree, token_ids
from jaxrl_llm.numerics import is_concrete

UNREACHABLE = 2**30  # the distance of a state from which no accepting state can be reached
ENDED = -1  # the state of a row whose EOS has been emitted
LOST = -2  # the state after a token that was not allowed


@pytree
class Automaton:
    """A deterministic finite automaton over tokens, as tables on the device; state 0 is the start.

    Transitions into states from which no accepting state can be reached are removed.

    Raises:
        ValueError: unless there is a state, every transition leads to a state or is −1 (none), and `accepting` has one
            value for each state.
    """

    transitions: Int[Array, "state vocab"]
    accepting: Bool[Array, "state"]
    distance: Int[Array, "state"] = dataclasses.field(init=False)  # tokens to the nearest accepting state

    def __post_init__(self):
        if not (is_concrete(self.transitions) and is_concrete(self.accepting)):
            raise ValueError("an automaton must be built from concrete tables, outside jit, but they are traced.")
        table, accepting = np.asarray(self.transitions), np.asarray(self.accepting)
        if table.ndim != 2 or not table.shape[0] or not np.issubdtype(table.dtype, np.integer):
            raise ValueError(f"transitions must be integers [state, vocab], but are {table.dtype}{list(table.shape)}.")
        if accepting.shape != table.shape[:1] or accepting.dtype != bool:
            raise ValueError(
                f"accepting must be bool[{table.shape[0]}], one for each state, "
                f"but is {accepting.dtype}{list(accepting.shape)}."
            )
        if table.size and not -1 <= table.min() <= table.max() < table.shape[0]:
            raise ValueError(
                f"transitions must lead to a state in [0, {table.shape[0]}) or be -1, "
                f"but range from {table.min()} to {table.max()}."
            )
        distance = _distances(table, accepting)
        table = np.where((table >= 0) & (distance[table] < UNREACHABLE), table, -1)
        object.__setattr__(self, "transitions", jnp.asarray(table, jnp.int32))
        object.__setattr__(self, "accepting", jnp.asarray(accepting))
        object.__setattr__(self, "distance", jnp.asarray(distance, jnp.int32))

    def without(self, tokens: Int[np.ndarray, "token"]) -> Automaton:
        """The automaton in which these tokens lead nowhere."""
        table = np.asarray(self.transitions)
        if (table[:, tokens] < 0).all():
            return self
        table = table.copy()
        table[:, tokens] = -1
        return Automaton(table, np.asarray(self.accepting))


def from_regex(pattern: str, vocabulary: Sequence[bytes | str]) -> Automaton:
    """Return the automaton of all sequences of tokens whose text `re.fullmatch(pattern, text)` matches.

    Every way to split a text into tokens is allowed, also within the bytes of a character. The table is padded with
    unreachable states to a power of two, at least 16, so that one compiled program serves many patterns.

    Args:
        pattern: in the syntax of Python's `re`, without look-around, references back, atomic groups, possessive
            repetitions and word boundaries.
        vocabulary: the text of each token (`text.token_bytes`). Tokens without text, the special ones, are never
            allowed; EOS is for `Constrained`.

    Raises:
        ValueError: if the pattern cannot be compiled, needs too large a table, or matches no text that this vocabulary
            can spell.
    """
    pieces = [token.encode() if isinstance(token, str) else bytes(token) for token in vocabulary]
    by_byte, accepting = automata.from_pattern(pattern)
    table = automata.over_tokens(by_byte, pieces)[:-1]
    silent = np.asarray([not piece for piece in pieces], bool)
    table = np.where(silent | (table == len(table)), -1, table)
    more = max(MIN_STATES, 1 << (len(table) - 1).bit_length()) - len(table)
    automaton = Automaton(np.pad(table, ((0, more), (0, 0)), constant_values=-1), np.pad(accepting[:-1], (0, more)))
    if automaton.distance[0] == UNREACHABLE:
        raise ValueError(f"no text that {pattern!r} matches can be spelt in this vocabulary.")
    return automaton


def from_choices(strings: Sequence[str], vocabulary: Sequence[bytes | str]) -> Automaton:
    """Return the automaton of these texts and no others; see `from_regex`.

    Raises:
        ValueError: if there is no string, or this vocabulary can spell none of them.
    """
    if isinstance(strings, str) or not strings:
        raise ValueError(f"choices must be a sequence of strings, not empty, but are {strings!r}.")
    return from_regex("|".join(_literally(string) for string in strings), vocabulary)


def _literally(string: str) -> str:
    return "".join(f"\\U{ord(character):08x}" for character in string)


class Constrained(Transform):
    """Keep the tokens after which the row can still end with a text that the automaton accepts.

    A row ends by EOS, which is allowed in accepting states only and counts as a token, or at its limit, where its state
    must be accepting. Without `eos_ids` it ends at its limit only: the text has exactly as many tokens as the row may
    have. A token is kept if such an end can be reached with the tokens that remain, so at least one is always kept. The
    distribution is the model's, masked and renormalised at each token. (It is not the model's distribution of whole
    texts given that they are accepted.)

    In a chain, put it first: a filter keeps at least one of the tokens that it is given, and these are then allowed
    ones. If the model itself excludes all allowed tokens, the decoder raises. Give the decoder the same EOS: after it
    only EOS is kept. A stop string, or an EOS that only the decoder knows, cuts the text anywhere.

    Args:
        eos_ids: the token or tokens that end a row; they are not part of the text.
        max_tokens: the largest limit that can be served without `eos_ids`.

    Raises:
        ValueError: for an EOS outside the vocabulary, or an automaton that accepts no text. Before decoding, for a
            limit within which no accepted text ends.
    """

    reweighs: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, int]] = {"eos_ids": 1, "exact": 2}

    automaton: Automaton
    eos_ids: Int[Array, "eos"] | Sequence[int] | int | None = None
    max_tokens: dataclasses.InitVar[int] = 1024
    exact: Bool[Array, "remaining state"] = dataclasses.field(init=False)  # accepted after exactly so many tokens more

    def __post_init__(self, max_tokens: int):
        ids = token_ids("eos_ids", self.eos_ids)
        eos, vocab = np.asarray(ids), self.automaton.transitions.shape[1]
        if eos.size and not 0 <= eos.min() <= eos.max() < vocab:
            raise ValueError(f"eos_ids must lie in [0, {vocab}), the automaton's vocabulary, but are {eos.tolist()}.")
        automaton = self.automaton.without(eos)
        if automaton.distance[0] == UNREACHABLE:
            raise ValueError("the automaton accepts no text: no accepting state can be reached from state 0.")
        exact = np.zeros((0, len(automaton.accepting)), bool) if eos.size else _exactly(automaton, max_tokens)
        object.__setattr__(self, "automaton", automaton)
        object.__setattr__(self, "eos_ids", ids)
        object.__setattr__(self, "exact", jnp.asarray(exact))

    def check(self, limits: Int[np.ndarray, "batch"]) -> None:
        """Raise a ValueError if no accepted text ends within a row's limit; skipped if the tables are traced."""
        if not all(is_concrete(each) for each in (limits, self.automaton.distance, self.exact)):
            return
        limits = np.asarray(limits)
        if self.eos_ids.size:
            shortest = int(np.asarray(self.automaton.distance)[0])  # numpy: a surrounding jit traces operations of jax
            if limits.min(initial=shortest) < shortest:
                raise ValueError(
                    f"row {limits.argmin()} may have {limits.min()} new tokens, "
                    f"but the shortest text that the constraint accepts has {shortest}."
                )
            return
        most = len(self.exact) - 1
        if limits.max(initial=0) > most:
            raise ValueError(
                f"max_new_tokens must be at most {most}, the constraint's max_tokens, but is {limits.max()}."
            )
        possible = np.asarray(self.exact)[limits, 0]
        if not possible.all():
            row = int(np.argmin(possible))
            raise ValueError(
                f"row {row} has {limits[row]} new tokens, but the constraint accepts no text of exactly so many. "
                "Without eos_ids a row ends at its limit only."
            )

    def init(
        self, prompts: Array, mask: Array, limits: Int[Array, "batch"]
    ) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
        """The state of the automaton and the remaining tokens of each row."""
        return jnp.zeros_like(limits), limits

    def apply(
        self, state: tuple[Int[Array, "batch"], Int[Array, "batch"]], logits: Float[Array, "batch vocab"]
    ) -> Float[Array, "batch vocab"]:
        return jnp.where(self.allowed(*state, vocab=logits.shape[-1]), logits, -jnp.inf)

    def allowed(
        self, state: Int[Array, "batch"], remaining: Int[Array, "batch"], *, vocab: int
    ) -> Bool[Array, "batch vocab"]:
        """The tokens that are kept: all of them if the row is over, or has emitted one that was not allowed."""
        if vocab != self.automaton.transitions.shape[1]:
            raise ValueError(
                f"the model has {vocab} tokens, but the automaton was built for {self.automaton.transitions.shape[1]}."
            )
        here = jnp.maximum(state, 0)
        after, left = self.automaton.transitions[here], (remaining - 1)[:, None]
        if self.eos_ids.size:
            within = self.automaton.distance[after] <= left
        else:
            within = self.exact[jnp.maximum(left, 0), after]
        is_eos = (jnp.arange(vocab)[:, None] == self.eos_ids).any(axis=1)
        may_end = self.automaton.accepting[here] | (state == ENDED)
        kept = (within & (after >= 0) & (state >= 0)[:, None]) | (is_eos & may_end[:, None])
        return kept | ((state == LOST) | (remaining < 1))[:, None]

    def update(
        self, state: tuple[Int[Array, "batch"], Int[Array, "batch"]], token: Int[Array, "batch"], logits: Array
    ) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
        state, remaining = state
        after = jnp.where(state < 0, state, self.automaton.transitions[jnp.maximum(state, 0), token])
        after = jnp.where((state >= 0) & (after < 0), LOST, after)
        ends = (token[:, None] == self.eos_ids).any(axis=1)
        return jnp.where(ends & (state != LOST), ENDED, after), remaining - 1


def _distances(table: Int[np.ndarray, "state vocab"], accepting: Bool[np.ndarray, "state"]) -> Int[np.ndarray, "state"]:
    """The tokens from each state to the nearest accepting one, by breadth-first search against the transitions."""
    before = _edges(table)
    distance = np.where(accepting, 0, UNREACHABLE)
    frontier, steps = accepting, 0
    while frontier.any():
        steps += 1
        frontier = before[:, frontier].any(axis=1) & (distance == UNREACHABLE)
        distance[frontier] = steps
    return distance


def _exactly(automaton: Automaton, max_tokens: int) -> Bool[np.ndarray, "remaining state"]:
    """True if an accepting state can be reached from a state by exactly 0, 1, ..., max_tokens tokens."""
    edges = _edges(np.asarray(automaton.transitions)).astype(np.float32)
    reached = [np.asarray(automaton.accepting)]
    for _ in range(max_tokens):
        reached.append(edges @ reached[-1] > 0)
    return np.asarray(reached)


def _edges(table: Int[np.ndarray, "state vocab"]) -> Bool[np.ndarray, "state state"]:
    """True if some token leads from one state to another."""
    edges = np.zeros((len(table), len(table) + 1), bool)  # the last column: no transition
    np.put_along_axis(edges, table, True, axis=1)
    return edges[:, :-1]


# Stop strings ---------------------------------------------------------------------------------------------------------


@pytree
class StopStrings:
    """An automaton over tokens (Aho and Corasick 1975), as a table on the device; build it with `stop_strings`.

    State 0 is the start. The last state, which is never left, is that of texts that contain a stop string. The number
    of states is a power of two, at least 16, so that one compiled program serves many stop strings.
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
        """True for rows that contain a stop string."""
        return state == self.transitions.shape[0] - 1


def stop_strings(token_bytes: Sequence[bytes], strings: Sequence[str]) -> StopStrings:
    """Compile stop strings for a vocabulary.

    Args:
        token_bytes: the text of each token in UTF-8, empty for special tokens (`text.token_bytes`).
        strings: any of them ends a row. Only the text of the new tokens counts, not that of the prompt.

    Raises:
        ValueError: if there is no string, or one is empty.
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"stop strings must be given in a sequence and not be empty, but are {strings!r}.")
    by_byte = automata.from_strings([string.encode() for string in strings])
    return StopStrings(jnp.asarray(automata.over_tokens(by_byte, token_bytes)))
