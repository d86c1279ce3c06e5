"""Constrained decoding without dead ends, and stop strings: automata over tokens, on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.decoding import automata, grammars, json_schema
from jaxrl_llm.decoding.automata import NOWHERE, padded
from jaxrl_llm.decoding.transforms import Transform, per_row, pytree, require, token_ids
from jaxrl_llm.mesh import by_host
from jaxrl_llm.numerics import is_concrete, wide

UNREACHABLE = 2**30  # the distance of a state from which no accepting state can be reached
ENDED = -1  # the state of a row whose EOS has been emitted
LOST = -2  # the state after a token that was not allowed


@pytree
class Automaton:
    """A deterministic finite automaton over tokens, as tables on the device; state 0 is the start.

    Transitions into states from which no accepting state can be reached are removed. The tables are factored: tokens of
    one class lead from every state to the same state, and a state is that between two characters, one of n, and the
    part of a character since then: state + n · part.

    Args:
        transitions: integers [state, vocab], the state after each token, or −1 (none).
        accepting: bool [state].

    Raises:
        ValueError: unless there is a state, every transition leads to a state or is −1 (none), and `accepting` has one
            value for each state.
    """

    classes: Int[Array, "vocab"]
    actions: Int[Array, "part class"]
    table: Int[Array, "whole action"]
    parts: Int[Array, "action"]
    accepting: Bool[Array, "state"]
    distance: Int[Array, "state"]
    """Tokens to the nearest accepting state."""

    def __init__(self, transitions: Int[Array, "state vocab"], accepting: Bool[Array, "state"]):
        if not (is_concrete(transitions) and is_concrete(accepting)):
            raise ValueError("an automaton must be built from concrete tables, outside jit, but they are traced.")
        table, accepting = np.asarray(transitions), np.asarray(accepting)
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
        table = table.astype(np.int32)
        first, which = automata.distinct(table.T)
        nowhere = np.full((len(table), 1), NOWHERE, np.int32)
        count = 1 + len(first)
        tables = (
            1 + which,
            np.arange(count)[None],
            np.append(nowhere, table[:, first], axis=1),
            np.zeros(count, np.int32),
        )
        self._set(automata.OverTokens(*tables), accepting)

    def _set(self, tables: automata.OverTokens, accepting: Bool[np.ndarray, "state"]) -> Automaton:
        """Set the fields, without the transitions from which no accepting state can be reached."""
        distance = _distances(tables, accepting)
        after = tables.parts * len(tables.table) + tables.table
        table = np.where((tables.table >= 0) & (distance[after] < UNREACHABLE), tables.table, NOWHERE)
        fields = {name: field.astype(np.int32) for name, field in tables._asdict().items()}
        fields |= {"table": table.astype(np.int16 if len(table) < 2**15 else np.int32)}
        for name, field in (fields | {"accepting": accepting, "distance": distance.astype(np.int32)}).items():
            object.__setattr__(self, name, jnp.asarray(field))
        return self

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.classes.shape[0]

    @property
    def transitions(self) -> Int[np.ndarray, "state vocab"]:
        """The state after each token, −1 (none), as one table: large for a large vocabulary."""
        actions = np.asarray(self.actions)[:, np.asarray(self.classes)]
        whole = np.asarray(self.table).astype(np.int32)[:, actions]
        after = np.where(whole >= 0, np.asarray(self.parts)[actions] * self.table.shape[0] + whole, NOWHERE)
        return after.swapaxes(0, 1).reshape(-1, self.vocab_size)

    def after_classes(self, state: Int[Array, "*batch"]) -> Int[Array, "*batch class"]:
        """The state after a token of each class, −1 (none)."""
        part, whole = jnp.divmod(state, self.table.shape[0])
        return self._after(whole[..., None], self.actions[part])

    def after(self, state: Int[Array, "*batch"], token: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The state after a token, −1 (none)."""
        part, whole = jnp.divmod(state, self.table.shape[0])
        return self._after(whole, self.actions[part, self.classes[token]])

    def _after(self, whole: Int[Array, "*batch"], action: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        after = self.table[whole, action].astype(jnp.int32)
        return jnp.where(after >= 0, self.parts[action] * self.table.shape[0] + after, NOWHERE)

    def without(self, tokens: Int[np.ndarray, "token"]) -> Automaton:
        """The automaton in which these tokens lead nowhere."""
        tables = _tables(self)
        if not tables.classes[tokens].any():
            return self
        classes = tables.classes.copy()
        classes[tokens] = 0
        return object.__new__(Automaton)._set(tables._replace(classes=classes), np.asarray(self.accepting))


def _tables(automaton: Automaton) -> automata.OverTokens:
    fields = automaton.classes, automaton.actions, automaton.table, automaton.parts
    return automata.OverTokens(*map(np.asarray, fields))


def from_regex(pattern: str, vocabulary: Sequence[bytes | str]) -> Automaton:
    """Return the automaton of all sequences of tokens whose text `re.fullmatch(pattern, text)` matches.

    Every way to split a text into tokens is allowed, also within the bytes of a character. The tables are filled up to
    powers of two with what is never reached, so that one compiled program serves many patterns.

    Args:
        pattern: in the syntax of Python's `re`, without look-around, references back, atomic groups, possessive
            repetitions and word boundaries.
        vocabulary: the text of each token (`text.token_bytes`). Tokens without text, the special ones, are never
            allowed; EOS is for `Constrained`.

    Raises:
        ValueError: if the pattern cannot be compiled, needs too large a table, or matches no text that this vocabulary
            can spell.
    """
    return _compiled(pattern, vocabulary, f"{pattern!r} matches")


def _compiled(pattern: str, vocabulary: Sequence[bytes | str], texts: str) -> Automaton:
    """`from_regex`; `texts` names the texts in an error."""
    pieces = [token.encode() if isinstance(token, str) else bytes(token) for token in vocabulary]
    step, accepting, spelling = automata.from_pattern(pattern)
    tables = automata.over_tokens(step, spelling, pieces)
    tables.classes[[not piece for piece in pieces]] = 0
    size = padded(max(tables.actions.shape[1], len(tables.parts)))  # of classes and of actions
    parts, states = 1 << (len(spelling) - 1).bit_length(), padded(len(step))
    filled = automata.OverTokens(
        tables.classes,
        _filled(tables.actions, (parts, size), 0),
        _filled(tables.table, (states, size), NOWHERE),
        _filled(tables.parts, (size,), 0),
    )
    automaton = object.__new__(Automaton)._set(filled, _filled(accepting, (parts * states,), False))
    if np.asarray(automaton.distance)[0] == UNREACHABLE:
        raise ValueError(f"no text that {texts} can be spelt in this vocabulary.")
    return automaton


def _filled(array: np.ndarray, shape: tuple[int, ...], value: int) -> np.ndarray:
    return np.pad(array, [(0, new - old) for new, old in zip(shape, array.shape, strict=True)], constant_values=value)


def from_choices(strings: Sequence[str], vocabulary: Sequence[bytes | str]) -> Automaton:
    """Return the automaton of these texts and no others; see `from_regex`.

    Raises:
        ValueError: if there is no string, or this vocabulary can spell none of them.
    """
    if isinstance(strings, str) or not strings:
        raise ValueError(f"choices must be a sequence of strings, not empty, but are {strings!r}.")
    return from_regex("|".join(_literally(string) for string in strings), vocabulary)


def from_json_schema(
    schema: Mapping[str, Any], vocabulary: Sequence[bytes | str], *, whitespace: str = " ?"
) -> Automaton:
    """Return the automaton of JSON texts that are valid by a JSON schema without recursion; see `from_regex`.

    Every text that it accepts is valid. Of the many ways to write a value these are accepted: the properties of an
    object in the order of the schema, then its additional ones; characters of strings as they are, or by an escape of
    one letter; numbers with bounds without an exponent. Additional properties and items are written only if the schema
    describes them.

    Supported are `type`, `enum`, `const`, `anyOf`, `allOf` of one schema, and `$ref` within the schema; `properties`,
    `required`, `additionalProperties`; `items`, `prefixItems`, `minItems`, `maxItems`; `minLength`, `maxLength`,
    `pattern` (in the syntax of `re`, found anywhere unless anchored), `format` (date, time, date-time, email, uuid,
    ipv4); `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`. Annotations such as `title` have no effect.

    Args:
        schema: parsed from JSON.
        whitespace: a regular expression of what may stand between brackets, names, values, commas and colons.

    Raises:
        ValueError: for any other keyword, a recursive schema, or one that allows any value; and as `from_regex`.
    """
    return _compiled(json_schema.pattern(schema, whitespace=whitespace), vocabulary, "is valid by the JSON schema")


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
        eos, vocab = np.asarray(ids), self.automaton.vocab_size
        if eos.size and not 0 <= eos.min() <= eos.max() < vocab:
            raise ValueError(f"eos_ids must lie in [0, {vocab}), the automaton's vocabulary, but are {eos.tolist()}.")
        automaton = self.automaton.without(eos)
        if np.asarray(automaton.distance)[0] == UNREACHABLE:
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
        if vocab != self.automaton.vocab_size:
            raise ValueError(
                f"the model has {vocab} tokens, but the automaton was built for {self.automaton.vocab_size}."
            )
        here = jnp.maximum(state, 0)
        after, left = self.automaton.after_classes(here), (remaining - 1)[:, None]
        if self.eos_ids.size:
            within = self.automaton.distance[after] <= left
        else:
            within = self.exact[jnp.maximum(left, 0), after]
        possible = within & (after >= 0) & (state >= 0)[:, None]
        columns = jnp.arange(possible.shape[1])  # a scatter: XLA would fuse all of the above into the gather by token
        possible = jnp.zeros_like(possible).at[:, columns].set(possible, unique_indices=True)
        is_eos = (jnp.arange(vocab)[:, None] == self.eos_ids).any(axis=1)
        may_end = self.automaton.accepting[here] | (state == ENDED)
        kept = possible[:, self.automaton.classes] | (is_eos & may_end[:, None])
        return kept | ((state == LOST) | (remaining < 1))[:, None]

    def update(
        self, state: tuple[Int[Array, "batch"], Int[Array, "batch"]], token: Int[Array, "batch"], logits: Array
    ) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
        state, remaining = state
        after = jnp.where(state < 0, state, self.automaton.after(jnp.maximum(state, 0), token))
        after = jnp.where((state >= 0) & (after < 0), LOST, after)
        ends = (token[:, None] == self.eos_ids).any(axis=1)
        return jnp.where(ends & (state != LOST), ENDED, after), remaining - 1


def _distances(tables: automata.OverTokens, accepting: Bool[np.ndarray, "state"]) -> Int[np.ndarray, "state"]:
    """The tokens from each state to the nearest accepting one, by breadth-first search against the transitions."""
    before = _before(tables)
    distance = np.where(accepting, 0, UNREACHABLE)
    reached, steps = accepting, 0
    while reached.any():
        steps += 1
        reached = before(reached) & (distance == UNREACHABLE)
        distance[reached] = steps
    return distance


def _exactly(automaton: Automaton, max_tokens: int) -> Bool[np.ndarray, "remaining state"]:
    """True if an accepting state can be reached from a state by exactly 0, 1, ..., max_tokens tokens."""
    most = automata.MAX_ENTRIES // len(automaton.accepting) - 1
    if max_tokens > most:
        raise ValueError(
            f"max_tokens must be at most {most} for an automaton of {len(automaton.accepting)} states without eos_ids, "
            f"but is {max_tokens}."
        )
    before = _before(_tables(automaton))
    reached = np.zeros((max_tokens + 1, len(automaton.accepting)), bool)
    reached[0] = automaton.accepting
    for tokens in range(max_tokens):
        reached[tokens + 1] = before(reached[tokens])
    return reached


def _before(tables: automata.OverTokens) -> Callable[[Bool[np.ndarray, "state"]], Bool[np.ndarray, "state"]]:
    """The function from a set of states to those from which some token leads into it."""
    actions = np.where(np.isin(np.arange(tables.actions.shape[1]), tables.classes), tables.actions, 0)  # of some token
    used = np.zeros((len(actions), len(tables.parts)), bool)
    np.put_along_axis(used, actions, True, axis=1)
    used[:, 0] = False
    part, action = np.nonzero(used)
    begun, first = np.unique(part, return_index=True)
    after = np.where(tables.table >= 0, tables.parts * len(tables.table) + tables.table, NOWHERE).T

    def before(states: Bool[np.ndarray, "state"]) -> Bool[np.ndarray, "state"]:
        result = np.zeros((len(actions), len(tables.table)), bool)
        if action.size:
            into = np.append(states, False)[after]  # the last entry: NOWHERE
            result[begun] = np.logical_or.reduceat(into[action], first)
        return result.reshape(-1)

    return before


# Grammars -------------------------------------------------------------------------------------------------------------


class InGrammar(Transform):
    """Keep the tokens that continue a text of a context-free grammar. Build it with `from_grammar`.

    EOS is allowed where the text is one of the grammar, and counts as a token. A row that reaches its limit before is
    cut there: how many tokens a text of the grammar still needs is not known, as it is for `Constrained`. After a token
    that was not allowed, as of a decoder without this transform, all are kept; after EOS only EOS.

    The masks are computed on the host, inside the compiled loop (`jax.pure_callback`), from the new tokens of a row.
    """

    looks_back: ClassVar[bool] = True
    sees_prompt: ClassVar[bool] = False
    reweighs: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, int]] = {"pieces": 1, "eos_ids": 1}

    number: Int[Array, "..."] | int  # of the compiled grammar; or one for each row
    pieces: Int[Array, "vocab"]  # of each token
    eos_ids: Int[Array, "eos"]

    def check(self, limits: Int[np.ndarray, "batch"]) -> None:
        """Raise a ValueError for a grammar that is forgotten; skipped if its number is traced."""
        super().check(limits)
        if is_concrete(self.number):
            grammars.use(np.asarray(self.number))

    def __call__(
        self, logits: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch slot"], mask: Bool[Array, "*batch slot"]
    ) -> Float[Array, "*batch vocab"]:
        vocab, rows = self.pieces.shape[0], logits.shape[:-1]
        if logits.shape[-1] != vocab:
            raise ValueError(f"the model has {logits.shape[-1]} tokens, but the grammar was compiled for {vocab}.")
        words = _words(vocab)
        shapes = jax.ShapeDtypeStruct((*rows, words), jnp.uint32), jax.ShapeDtypeStruct(rows, jnp.uint8)
        masks = functools.partial(grammars.places, words=words)
        asked = functools.partial(jax.pure_callback, masks, shapes, vmap_method="broadcast_all")
        given = jnp.broadcast_to(self.number, rows), jnp.where(mask, tokens, grammars.NOTHING)
        bits, status = by_host(asked, *given)
        follows = (bits[..., self.pieces // 32] >> (self.pieces % 32).astype(jnp.uint32)) & 1 == 1
        is_eos = (jnp.arange(vocab)[:, None] == self.eos_ids).any(axis=1)
        ended = (((tokens[..., None] == self.eos_ids).any(axis=-1)) & mask).any(axis=-1)[..., None]
        kept = follows | (is_eos & (status == grammars.MAY_END)[..., None]) | (status == grammars.LOST)[..., None]
        return jnp.where(jnp.where(ended, is_eos, kept), logits, -jnp.inf)


def from_grammar(lark: str, vocabulary: Sequence[bytes | str], eos_ids: Sequence[int] | int) -> InGrammar:
    """Return the transform that keeps the new text in a context-free grammar. It needs the package llguidance.

    Every way to split a text into tokens is allowed, as by `from_regex`. Where a token that the grammar allows leads
    to a text that this vocabulary cannot continue (one without all 256 bytes), the decoder raises.

    In a chain, put it first, as `Constrained`. For each row another one: `dataclasses.replace(one, number=[...])` with
    the numbers of several grammars over the same vocabulary.

    Args:
        lark: a grammar in llguidance's variant of Lark; its texts are those of the rule `start`. It may contain JSON
            schemas, recursive ones too: `start: %json {...}`.
        vocabulary: the text of each token (`text.token_bytes`); tokens without text are never allowed.
        eos_ids: the tokens that end a row; they are not part of the text.

    Raises:
        ModuleNotFoundError: without llguidance; `pip install 'jaxrl_llm[grammar]'` installs it.
        ValueError: if the grammar is not one, the vocabulary can spell none of its texts, there is no EOS token in the
            vocabulary.
    """
    eos = np.asarray(token_ids("eos_ids", eos_ids))
    if not eos.size or not 0 <= eos.min() <= eos.max() < len(vocabulary):
        raise ValueError(
            f"eos_ids must be tokens in [0, {len(vocabulary)}), the vocabulary, by which a text of the grammar ends, "
            f"but are {eos.tolist()}."
        )
    pieces, of_token = grammars.pieces_of(tuple(vocabulary), tuple(eos.tolist()))
    number = grammars.compiled(lark, pieces, of_token)
    nothing = 32 * _words(len(of_token)) - 1  # a bit that is never set
    return InGrammar(number, jnp.asarray([nothing if piece < 0 else piece for piece in of_token]), jnp.asarray(eos))


def _words(vocab: int) -> int:
    """Words of 32 bits for the pieces of a vocabulary, for llguidance's end of text, and for one that never is."""
    return -(-(vocab + 2) // 32)


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
    if len(by_byte) * len(token_bytes) > automata.MAX_ENTRIES:
        raise ValueError(
            f"stop strings must need a table of at most {automata.MAX_ENTRIES} entries, "
            f"but need {len(by_byte)} states by {len(token_bytes)} tokens."
        )
    return StopStrings(jnp.asarray(_by_tokens(by_byte, token_bytes)))


def _by_tokens(by_byte: Int[np.ndarray, "state byte"], token_bytes: Sequence[bytes]) -> Int[np.ndarray, "state vocab"]:
    """The transitions by all bytes of a token."""
    tables = automata.over_tokens(by_byte, np.arange(256)[None], token_bytes)
    return tables.table[:, tables.actions[0, tables.classes]].astype(np.int32)


class BannedText(Transform):
    """Remove the tokens that complete a string in the new text. Build it with `banned_text`.

    Decoders raise where no token is left.
    """

    reweighs: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, int]] = {"completes": 2, "transitions": 2}

    completes: Bool[Array, "state vocab"]  # after the first n bytes of the string, n the state
    transitions: Int[Array, "state vocab"]  # to the most bytes of the string that the text then ends with

    def init(self, prompts: Array, mask: Array, limits: Int[Array, "batch"]) -> Int[Array, "batch"]:
        """Return the state of every row, the start of the string."""
        return jnp.zeros_like(limits)

    def apply(self, state: Int[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        return jnp.where(self.completes[state], -jnp.inf, logits)

    def update(self, state: Int[Array, "batch"], token: Int[Array, "batch"], logits: Array) -> Int[Array, "batch"]:
        return self.transitions[state, jnp.clip(token, 0, self.transitions.shape[1] - 1)]


class TextBias(BannedText):
    """Add a bias to the logits of the tokens that complete a string in the new text. Build it with `text_bias`.

    Raises:
        ValueError: unless the bias is a finite number.
    """

    reweighs: ClassVar[bool] = True

    bias: float

    def __post_init__(self):
        require(jnp.isfinite(jnp.asarray(self.bias)), "the bias", "a finite number", self.bias)

    def apply(self, state: Int[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        return (wide(logits) + jnp.where(self.completes[state], per_row(self.bias), 0)).astype(logits.dtype)


def banned_text(token_bytes: Sequence[bytes], string: str) -> BannedText:
    """Return the transform that keeps a string out of the new text, however it is cut into tokens.

    " king" is then not written within " kingdom" either.

    Args:
        token_bytes: as in `stop_strings`.

    Raises:
        ValueError: if the string is empty.
    """
    return BannedText(*_occurrences(token_bytes, string))


def text_bias(token_bytes: Sequence[bytes], string: str, bias: float) -> TextBias:
    """Return the transform that biases a string, however it is cut into tokens.

    Args:
        token_bytes: as in `stop_strings`.
        bias: added to the logit of each token after which the string stands once more in the new text.

    Raises:
        ValueError: if the string is empty, or the bias is not finite.
    """
    return TextBias(*_occurrences(token_bytes, string), bias)


def _occurrences(
    token_bytes: Sequence[bytes], string: str
) -> tuple[Bool[Array, "state vocab"], Int[Array, "state vocab"]]:
    """Return the tokens that complete the string, and the transitions; in state n, n bytes of it are read."""
    stops, whole = stop_strings(token_bytes, [string]), string.encode()
    by_byte = automata.from_strings([whole])
    border = max(length for length in range(len(whole)) if whole.endswith(whole[:length]))
    onward = np.where(by_byte == len(by_byte) - 1, border, by_byte)  # an occurrence may begin within the one before
    return stops.transitions == len(by_byte) - 1, jnp.asarray(_by_tokens(onward, token_bytes))
