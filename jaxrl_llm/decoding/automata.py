"""Automata over bytes, compiled from regular expressions or strings, and their transitions by whole tokens.

A table [state, 256] gives the state after one more byte of a text in UTF-8; state 0 is the start. Regular expressions
are in the syntax of Python's `re` and read by its parser.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from re import _constants as op
from re import _parser
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

MAX_STATES = 10_000
MAX_ENTRIES = 2**28  # of a table over tokens: 1 GiB
CACHED = 2**18  # entries computed at once
MIN_STATES = 16  # tables are filled up to a power of two, at least this: one compiled program then serves many

Pieces = tuple[tuple[int, int], ...]  # (first code point, state after it), by rising code point
CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)  # not characters: UTF-8 cannot encode them

Ranges = tuple[tuple[int, int], ...]  # half-open, of code points

_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}
_FLAGS = re.IGNORECASE | re.ASCII | re.DOTALL  # the flags that change what a class contains
_UNSUPPORTED = {
    op.AT: "a word boundary",
    op.ASSERT: "a lookaround",
    op.ASSERT_NOT: "a negative lookaround",
    op.GROUPREF: "a back-reference",
    op.GROUPREF_EXISTS: "a conditional group",
    op.ATOMIC_GROUP: "an atomic group",
    op.POSSESSIVE_REPEAT: "a possessive repetition",
}
# The rest of a text is anything; after an anchor at the end a newline and anything, a newline at most, or nothing.
OPEN, LINE, LAST, OVER = range(4)
_ENDS = {op.AT_END_LINE: LINE, op.AT_END: LAST, op.AT_END_STRING: OVER}
# The character before an anchor at the beginning: none, or a newline.
_BEGINS = {op.AT_BEGINNING_LINE: (None, "\n"), op.AT_BEGINNING: (None,), op.AT_BEGINNING_STRING: (None,)}
NEWLINE = ((ord("\n"), ord("\n") + 1),)


def over_tokens(by_byte: Int[np.ndarray, "state byte"], token_bytes: Sequence[bytes]) -> Int[np.ndarray, "state vocab"]:
    """The state after all bytes of a token, from every state; a token without bytes keeps the state.

    Raises:
        ValueError: if the table would have more than 2²⁸ entries.
    """
    if len(by_byte) * len(token_bytes) > MAX_ENTRIES:
        raise ValueError(
            f"a table of {len(by_byte)} states by {len(token_bytes)} tokens has more than {MAX_ENTRIES} entries."
        )
    count = len(by_byte)
    order = np.argsort([-len(piece) for piece in token_bytes], kind="stable")  # those with a byte at a place: a slice
    lengths = np.asarray([len(token_bytes[token]) for token in order])
    padded = np.zeros((len(order), lengths.max(initial=0)), np.int32)
    for row, token in enumerate(order):
        padded[row, : lengths[row]] = np.frombuffer(token_bytes[token], np.uint8)
    after = np.ascontiguousarray(by_byte.T, dtype=np.int32).reshape(-1)
    result = np.empty((count, len(order)), np.int32)
    at_once = max(1, CACHED // count)
    for first in range(0, len(order), at_once):
        rows = slice(first, first + at_once)
        states = np.tile(np.arange(count, dtype=np.int32), (len(order[rows]), 1))
        for place in range(lengths[first]):
            inside = int(np.searchsorted(-lengths[rows], -place))
            states[:inside] = after[padded[rows][:inside, place, None] * count + states[:inside]]
        result[:, order[rows]] = states.T
    return result


def from_strings(strings: Sequence[bytes]) -> Int[np.ndarray, "state byte"]:
    """Transitions by byte between the prefixes of the strings; the last state is that of a match."""
    prefixes = sorted({string[:length] for string in strings for length in range(len(string))}, key=len)
    index = {prefix: number for number, prefix in enumerate(prefixes)}
    final = max(MIN_STATES, 1 << len(prefixes).bit_length()) - 1  # the states between are never reached
    onward: list[dict[int, int]] = [{} for _ in prefixes]
    for string in strings:
        for length in range(len(string)):
            onward[index[string[:length]]][string[length]] = index.get(string[: length + 1], final)
    for string in strings:  # a prefix that goes on may be a whole string itself
        onward[index[string[:-1]]][string[-1]] = final
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


def from_pattern(pattern: str) -> tuple[Int[np.ndarray, "state byte"], Bool[np.ndarray, "state"]]:
    """The table of the texts that a regular expression matches from end to end, and its accepting states.

    It is built over code points by the subset construction (Rabin and Scott 1959), minimised (Moore 1956), and then
    expanded to the bytes of UTF-8, with states in the middle of a character. The dead state is the last.

    Raises:
        ValueError: for a pattern that `re` cannot read, that looks around, refers back, is atomic or possessive, or
            has word boundaries; and for more than 10,000 states.
    """
    fragment = _parse(pattern)
    starts, symbols, steps = _symbols(fragment)
    table, accepting = _minimal(*_deterministic(fragment, steps, starts, symbols))
    return _over_bytes(table, accepting, starts, symbols)


def _symbols(fragment: Fragment) -> tuple[list[int], Int[np.ndarray, "interval"], dict]:
    """Merge code points that no class of the pattern tells apart into one symbol.

    Returns:
        The starts of the intervals, the symbol of each, and the steps (symbols, target) of each state.
    """
    classes = sorted({NEWLINE, *(ranges for moves in fragment.moves for ranges, _ in moves)})
    bounds = {0, *(bound for ranges in classes for pair in ranges for bound in pair)} - {CODE_POINTS}
    starts = sorted(bounds)
    inside = np.zeros((len(starts), len(classes)), bool)
    for column, ranges in enumerate(classes):
        for first, end in ranges:
            inside[bisect.bisect_left(starts, first) : bisect.bisect_left(starts, end), column] = True
    rows, symbols = np.unique(inside, axis=0, return_inverse=True)
    members = {ranges: np.flatnonzero(rows[:, column]) for column, ranges in enumerate(classes)}
    steps = [[(members[ranges], target) for ranges, target in moves] for moves in fragment.moves]
    return starts, symbols.reshape(-1), steps


def _deterministic(
    fragment: Fragment, steps: list, starts: list[int], symbols: Int[np.ndarray, "interval"]
) -> tuple[Int[np.ndarray, "state symbol"], Bool[np.ndarray, "state"]]:
    """The subset construction over (state, rest of the text by anchors); the empty set is the dead state."""
    newline = symbols[bisect.bisect_right(starts, ord("\n")) - 1]

    @functools.cache
    def closure(state: int, rest: int, before: str | None) -> frozenset[tuple[int, int]]:
        """The states without reading more; `before` is the last character, if it is a newline, None at the start."""
        found, pending = {(state, rest)}, [(state, rest)]
        while pending:
            state, rest = pending.pop()
            possible = [move for move in fragment.free[state] if before in _BEGINS.get(move[1], (before,))]
            new = {(target, max(rest, _ENDS.get(anchor, OPEN))) for target, anchor in possible} - found
            found |= new
            pending += new
        return frozenset((state, rest) for state, rest in found if steps[state] or state == fragment.end)

    start = closure(fragment.start, OPEN, None)
    index, pending, table = {start: 0}, [start], []
    for subset in pending:  # pending grows
        targets = [set() for _ in range(symbols.max() + 1)]
        for state, rest in subset:
            for members, target in steps[state]:
                for symbol in members:
                    if symbol == newline and rest != OVER:
                        targets[symbol] |= closure(target, OVER if rest == LAST else OPEN, "\n")
                    elif rest == OPEN:
                        targets[symbol] |= closure(target, OPEN, "")
        row = []
        for each in map(frozenset, targets):
            if each not in index:
                index[each] = len(index)
                pending.append(each)
            row.append(index[each])
        table.append(row)
        _check_size(len(index))
    return np.asarray(table), np.asarray([any(state == fragment.end for state, _ in subset) for subset in index])


def _minimal(
    table: Int[np.ndarray, "state symbol"], accepting: Bool[np.ndarray, "state"]
) -> tuple[Int[np.ndarray, "state symbol"], Bool[np.ndarray, "state"]]:
    """Merge states from which the same texts are accepted: partitions are refined until they are stable."""
    group, count = accepting.astype(int), 0
    while len(np.unique(group)) > count:
        count = len(np.unique(group))
        keys = np.concatenate([group[:, None], group[table]], axis=1)
        _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        group = group.reshape(-1)
    rank = np.argsort(np.argsort(first))  # in the order of first appearance: the start stays the first
    chosen = np.sort(first)
    return rank[group][table[chosen]], accepting[chosen]


def _over_bytes(
    table: Int[np.ndarray, "state symbol"],
    accepting: Bool[np.ndarray, "state"],
    starts: list[int],
    symbols: Int[np.ndarray, "interval"],
) -> tuple[Int[np.ndarray, "state byte"], Bool[np.ndarray, "state"]]:
    """Expand code points to bytes: within a character, a state maps the code points that can follow to targets."""
    dead = next(s for s in range(len(table)) if not accepting[s] and (table[s] == s).all())  # surrogates lead there
    index: dict[tuple[int, Pieces], int] = {}  # (continuation bytes to come, what they lead to)
    pending: list[tuple[int, Pieces]] = []

    def number(remaining: int, pieces: Pieces) -> int:
        if len(pieces) == 1 and (remaining == 0 or pieces[0][1] == dead):
            return pieces[0][1]
        if (remaining, pieces) not in index:
            index[remaining, pieces] = len(table) + len(index)
            pending.append((remaining, pieces))
        return index[remaining, pieces]

    rows = []
    for state in range(len(table)):
        row = np.full(256, dead)
        pieces = _merged(zip(starts, table[state][symbols].tolist(), strict=True))
        for byte in range(256):
            for remaining, lead, first, end in _LEADS:
                base = (byte - lead) << 6 * remaining
                if base >= 0 and max(base, first) < min(base + (1 << 6 * remaining), end):
                    window = _window(pieces, base, 1 << 6 * remaining, first, end, dead)
                    row[byte] = number(remaining, window)
                    break
        rows.append(row)
    for remaining, pieces in pending:  # pending grows
        row = np.full(256, dead)
        size = 1 << 6 * (remaining - 1)
        for low in range(64):
            row[0x80 + low] = number(remaining - 1, _window(pieces, low * size, size, 0, CODE_POINTS, dead))
        rows.append(row)
        _check_size(len(rows))
    return _dead_last(np.asarray(rows), np.append(accepting, np.zeros(len(pending), bool)), dead)


# The number of continuation bytes, the leading byte without its payload bits, and the range of code points.
_LEADS = ((0, 0x00, 0, 0x80), (1, 0xC0, 0x80, 0x800), (2, 0xE0, 0x800, 0x10000), (3, 0xF0, 0x10000, CODE_POINTS))


def _merged(pieces) -> Pieces:
    """The pieces, without those that lead to the same state as the one before."""
    merged: list[tuple[int, int]] = []
    for first, state in pieces:
        if not merged or merged[-1][1] != state:
            merged.append((first, state))
    return tuple(merged)


def _window(pieces: Pieces, base: int, size: int, first: int, end: int, dead: int) -> Pieces:
    """The pieces in [base, base + size), relative to base; dead outside [first, end)."""
    low, high = max(base, first), min(base + size, end)
    begin = bisect.bisect_right(pieces, low, key=lambda piece: piece[0]) - 1
    stop = bisect.bisect_left(pieces, high, key=lambda piece: piece[0])
    inner = [(max(start, low) - base, state) for start, state in pieces[begin:stop]]
    before = [(0, dead)] if low > base else []
    after = [(high - base, dead)] if high < base + size else []
    return _merged(before + inner + after)


def _dead_last(
    table: Int[np.ndarray, "state byte"], accepting: Bool[np.ndarray, "state"], dead: int
) -> tuple[Int[np.ndarray, "state byte"], Bool[np.ndarray, "state"]]:
    """Renumber the dead state as the last. If no text is accepted, it is also the start, and is kept there."""
    kept = np.flatnonzero((np.arange(len(table)) != dead) | (np.arange(len(table)) == 0))
    number = np.full(len(table), len(kept), np.int32)
    number[kept] = np.arange(len(kept))
    number[dead] = len(kept)
    alive = number[table[kept]]
    return np.append(alive, np.full((1, 256), len(kept), np.int32), axis=0), np.append(accepting[kept], False)


def _check_size(states: int) -> None:
    if states > MAX_STATES:
        raise ValueError(f"the pattern needs more than {MAX_STATES} states: shorten it, or use fewer repetitions.")


# Regular expressions as nondeterministic automata over code points ----------------------------------------------------


@dataclasses.dataclass
class Fragment:
    """An automaton over code points (Thompson 1968): the moves of each state by a class, and its free moves.

    A free move may have an anchor, which says where in the text it is possible.
    """

    moves: list[list[tuple[Ranges, int]]] = dataclasses.field(default_factory=list)
    free: list[list[tuple[int, Any]]] = dataclasses.field(default_factory=list)
    start: int = 0
    end: int = 0

    def new_state(self) -> int:
        """Add a state without moves."""
        self.moves.append([])
        self.free.append([])
        return len(self.moves) - 1


def _parse(pattern: str) -> Fragment:
    """The automaton of the texts that `re.fullmatch(pattern, text)` matches."""
    try:
        tree = _parser.parse(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error
    fragment = Fragment()
    fragment.start = fragment.new_state()
    fragment.end = _Builder(fragment, pattern).sequence(tree, fragment.start, tree.state.flags)
    return fragment


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Appends what a parsed item matches to a state, and returns the state after it."""

    fragment: Fragment
    pattern: str

    def sequence(self, items: Iterable[tuple[Any, Any]], state: int, flags: int) -> int:
        for code, argument in items:
            state = self.item(code, argument, state, flags)
        return state

    def item(self, code: Any, argument: Any, state: int, flags: int) -> int:
        if code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            after = self.fragment.new_state()
            self.fragment.moves[state].append((_ranges(_source(code, argument), flags & _FLAGS), after))
            return after
        if code is op.AT:
            anchor = op.AT_MULTILINE.get(argument, argument) if flags & re.MULTILINE else argument
            if anchor in _BEGINS or anchor in _ENDS:
                after = self.fragment.new_state()
                self.link(state, after, anchor)
                return after
        if code is op.SUBPATTERN:
            _, add, remove, items = argument
            return self.sequence(items, state, flags & ~remove | add)
        if code is op.BRANCH:
            return self.branch([functools.partial(self.sequence, items, flags=flags) for items in argument[1]], state)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, items = argument
            return self.repeat(functools.partial(self.sequence, items, flags=flags), int(least), most, state)
        raise ValueError(
            f"{self.pattern!r} uses {_UNSUPPORTED.get(code, str(code).lower())}, which has no finite automaton here."
        )

    def branch(self, ways: list[Callable[..., int]], state: int) -> int:
        end = self.fragment.new_state()
        for way in ways:
            self.link(way(state=self.linked(state)), end)
        return end

    def repeat(self, once: Callable[..., int], least: int, most: Any, state: int) -> int:
        for _ in range(least):
            state = once(state=state)
        end = self.fragment.new_state()
        if most is op.MAXREPEAT:
            state = self.linked(state)
            self.link(once(state=state), state)
        else:
            for _ in range(int(most) - least):
                self.link(state, end)
                state = once(state=self.linked(state))
        self.link(state, end)
        return end

    def link(self, state: int, target: int, anchor: Any = None) -> None:
        self.fragment.free[state].append((target, anchor))

    def linked(self, state: int) -> int:
        """A new state with a free move to it: loops and branches never share a state with what precedes them."""
        new = self.fragment.new_state()
        self.link(state, new)
        return new


def _source(code: Any, argument: Any) -> str:
    """The pattern of one character, as source."""
    if code is op.ANY:
        return "."
    if code is op.LITERAL:
        return f"[{_escaped(argument)}]"
    if code is op.NOT_LITERAL:
        return f"[^{_escaped(argument)}]"
    parts = {
        op.NEGATE: lambda _: "^",
        op.LITERAL: _escaped,
        op.RANGE: lambda pair: f"{_escaped(pair[0])}-{_escaped(pair[1])}",
        op.CATEGORY: _CATEGORIES.__getitem__,
    }
    return f"[{''.join(parts[kind](value) for kind, value in argument)}]"


def _escaped(code_point: int) -> str:
    return f"\\U{code_point:08x}"


@functools.lru_cache(maxsize=512)
def _ranges(source: str, flags: int) -> Ranges:
    """The code points that a one-character pattern matches, found by matching all of them with `re`."""
    single = re.fullmatch(r"\[\\U([0-9a-f]{8})\]", source)
    if single and not flags & re.IGNORECASE:
        first = int(single[1], 16)
        return () if first in SURROGATES else ((first, first + 1),)
    pairs = [match.span() for match in re.finditer(f"{source}+", _all_characters(), flags)]
    gap = SURROGATES.start
    split = [(a, b) for pair in pairs for a, b in ((pair[0], min(pair[1], gap)), (max(pair[0], gap), pair[1])) if a < b]
    return tuple((a + len(SURROGATES), b + len(SURROGATES)) if a >= gap else (a, b) for a, b in split)


@functools.cache
def _all_characters() -> str:
    return "".join(chr(each) for each in range(CODE_POINTS) if each not in SURROGATES)
