"""Automata over symbols, compiled from regular expressions or strings, and their transitions by whole tokens.

A symbol is a set of characters that the pattern does not tell apart. The bytes that spell a symbol are the same in
every state, so the places within a character are numbered once for all states, and a class of thousands of characters
costs as much as one of two. Regular expressions are in the syntax of Python's `re` and read by its parser.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from re import _constants as op
from re import _parser
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

MAX_STATES = 10_000
MAX_PLACES = 2_000_000  # in the pattern, of all states together: seconds
MAX_ENTRIES = 2**28  # of a table over tokens
AT_ONCE = 2**20  # entries computed at once
MIN_SIZE = 16  # tables are filled up to a power of two, at least this: one compiled program then serves many
NOWHERE = -1  # no transition
WAY_OUT = "use fewer repetitions or smaller classes, such as (?a)\\w or [A-Za-z0-9_] for \\w"

Pieces = tuple[tuple[int, int], ...]  # (first code point, its code in a spelling), by rising code point
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
_ONE_CHARACTER = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
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


class OverSymbols(NamedTuple):
    """A deterministic automaton over symbols, and how bytes spell them. State 0 is the start, part 0 no character."""

    step: Int[np.ndarray, "state symbol"]
    """The state after a symbol, or NOWHERE."""
    accepting: Bool[np.ndarray, "state"]
    spelling: Int[np.ndarray, "part byte"]
    """After part of a character and one byte more: the symbol that is complete, `symbols` + the part, or NOWHERE."""


class OverTokens(NamedTuple):
    """Transitions by whole tokens. Class 0 and action 0 lead nowhere from any state."""

    classes: Int[np.ndarray, "vocab"]
    """Tokens of one class act alike in every state."""
    actions: Int[np.ndarray, "part class"]
    """The action of a class after part of a character: symbols, and part of a further one."""
    table: Int[np.ndarray, "state action"]
    """The state after the symbols of an action, or NOWHERE."""
    parts: Int[np.ndarray, "action"]
    """The part of a character with which an action ends."""


def padded(count: int) -> int:
    """The least power of two from this count on, at least 16."""
    return max(MIN_SIZE, 1 << (count - 1).bit_length())


def over_tokens(
    step: Int[np.ndarray, "state symbol"], spelling: Int[np.ndarray, "part byte"], token_bytes: Sequence[bytes]
) -> OverTokens:
    """Return the transitions by all bytes of a token, from every state; a token without bytes keeps the state.

    Tokens are read from every part of a character that they can continue, all of them at once, byte by byte. The
    functions from states to states that they compute are few, although the tokens are many: each is kept once.

    Raises:
        ValueError: if the table, filled up to powers of two, would have more than 2²⁸ entries.
    """
    (states, symbols), vocab = step.shape, len(token_bytes)
    step = np.append(step, np.full((1, symbols), NOWHERE), axis=0)  # the last row: NOWHERE stays there
    step = step.astype(np.int16 if states < 2**15 else np.int32)
    lengths = np.fromiter(map(len, token_bytes), np.int64, vocab)
    content = np.frombuffer(b"".join(token_bytes), np.uint8)
    starts = np.cumsum(lengths) - lengths
    token, began = _readings(spelling, content, starts, lengths)
    part, function = began.copy(), np.zeros(len(token), np.int64)
    functions = {np.arange(states, dtype=step.dtype).tobytes(): 0}  # the states that all states lead to

    place, reading = 0, np.flatnonzero(lengths[token] > 0)
    while reading.size:
        code = spelling[part[reading], content[starts[token[reading]] + place]]
        part[reading] = np.maximum(code - symbols, 0)
        function[reading[code == NOWHERE]] = NOWHERE
        whole = (code >= 0) & (code < symbols)
        function[reading[whole]] = _composed(functions, function[reading[whole]], code[whole], step)
        place += 1
        reading = reading[(function[reading] != NOWHERE) & (lengths[token[reading]] > place)]

    alive = function != NOWHERE
    token, began = token[alive], began[alive]
    pairs, action = np.unique(function[alive] * len(spelling) + part[alive], return_inverse=True)
    _check_entries(states, len(pairs) + 1)
    table = np.full((states, len(pairs) + 1), NOWHERE, step.dtype)
    rows = list(functions)
    for column, row in enumerate(pairs // len(spelling), 1):
        table[:, column] = np.frombuffer(rows[row], step.dtype)
    classes, actions = _classes(token, began, 1 + action, vocab, len(spelling))
    return OverTokens(classes, actions, table, np.append(0, pairs % len(spelling)).astype(np.int32))


def _readings(
    spelling: Int[np.ndarray, "part byte"],
    content: Int[np.ndarray, "byte"],
    starts: Int[np.ndarray, "vocab"],
    lengths: Int[np.ndarray, "vocab"],
) -> tuple[Int[np.ndarray, "reading"], Int[np.ndarray, "reading"]]:
    """Each token between characters, and after each part of a character that its first byte can continue."""
    every, continues = np.arange(len(lengths)), spelling[1:] != NOWHERE
    inner = np.flatnonzero(lengths)
    inner = inner[continues.any(axis=0)[content[starts[inner]]]]
    part, index = np.nonzero(continues[:, content[starts[inner]]])
    return np.append(every, inner[index]), np.append(np.zeros_like(every), 1 + part)


def _composed(
    functions: dict[bytes, int],
    function: Int[np.ndarray, "reading"],
    symbol: Int[np.ndarray, "reading"],
    step: Int[np.ndarray, "state+1 symbol"],
) -> Int[np.ndarray, "reading"]:
    """The functions of states that are followed by a symbol, added to those known; NOWHERE if no state is left."""
    states, symbols = step.shape[0] - 1, step.shape[1]
    pairs, inverse = np.unique(function * symbols + symbol, return_inverse=True)
    rows, numbers = list(functions), np.full(len(pairs), NOWHERE)
    at_once = max(1, AT_ONCE // states)
    for first in range(0, len(pairs), at_once):
        before, by = np.divmod(pairs[first : first + at_once], symbols)
        states_before = np.frombuffer(b"".join(rows[each] for each in before), step.dtype).reshape(len(before), states)
        after = step[states_before, by[:, None]]
        for row in np.flatnonzero((after != NOWHERE).any(axis=1)):
            numbers[first + row] = functions.setdefault(after[row].tobytes(), len(functions))
        _check_entries(states, len(functions))
    return numbers[inverse]


def _classes(
    token: Int[np.ndarray, "reading"],
    began: Int[np.ndarray, "reading"],
    action: Int[np.ndarray, "reading"],
    vocab: int,
    parts: int,
) -> tuple[Int[np.ndarray, "vocab"], Int[np.ndarray, "part class"]]:
    """The classes of tokens that have the same action after every part, and these actions."""
    alone = np.zeros(vocab, np.int64)
    alone[token[began == 0]] = action[began == 0]
    used, classes = np.unique(np.append(0, alone), return_inverse=True)
    classes, actions = classes[1:], np.append(used[None], np.zeros((parts - 1, len(used)), np.int64), axis=0)
    inner = np.unique(token[began > 0])
    if inner.size:
        columns = np.zeros((len(inner), parts), np.int64)
        columns[:, 0] = alone[inner]
        columns[np.searchsorted(inner, token[began > 0]), began[began > 0]] = action[began > 0]
        first, which = distinct(columns)
        classes[inner] = len(used) + which
        actions = np.append(actions, columns[first].T, axis=1)
    return classes, actions


def distinct(rows: Int[np.ndarray, "row column"]) -> tuple[Int[np.ndarray, "distinct"], Int[np.ndarray, "row"]]:
    """The first of each set of equal rows, and the number of each row's set."""
    numbers: dict[bytes, int] = {}
    which = np.fromiter((numbers.setdefault(row.tobytes(), len(numbers)) for row in rows), np.int64, len(rows))
    return np.unique(which, return_index=True)[1], which


def _check_entries(states: int, actions: int) -> None:
    if padded(states) * padded(actions) > MAX_ENTRIES:
        raise ValueError(
            f"the pattern needs a table of more than {MAX_ENTRIES} entries, {states} states by {actions} actions of "
            f"tokens: shorten it, or {WAY_OUT}."
        )


def from_strings(strings: Sequence[bytes]) -> Int[np.ndarray, "state byte"]:
    """Transitions by byte between the prefixes of the strings; the last state is that of a match."""
    prefixes = sorted({string[:length] for string in strings for length in range(len(string))}, key=len)
    index = {prefix: number for number, prefix in enumerate(prefixes)}
    final = padded(len(prefixes) + 1) - 1  # the states between are never reached
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


def from_pattern(pattern: str) -> OverSymbols:
    """The automaton of the texts that a regular expression matches from end to end.

    It is built by the subset construction (Rabin and Scott 1959) and minimised (Hopcroft 1971).

    Raises:
        ValueError: for a pattern that `re` cannot read, that looks around, refers back, is atomic or possessive, or
            has word boundaries; for more than 10,000 states, or repetitions of repetitions as large.
    """
    fragment = _parse(pattern)
    starts, symbols, steps = _symbols(fragment)
    step, accepting = _minimal(*_deterministic(fragment, steps, starts, symbols))
    first, which = distinct(step.T)
    alive = (step[:, first] != NOWHERE).any(axis=0)
    codes = np.where(alive, np.cumsum(alive) - 1, NOWHERE)[which]
    step = step[:, first[alive]]
    pieces = _merged(zip(starts, codes[symbols].tolist(), strict=True))
    return OverSymbols(step, accepting, _spelling(pieces, step.shape[1]))


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
    """The subset construction over (state, rest of the text by anchors)."""
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
    index, pending, table, places = {start: 0}, [start], [], 0
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
            if each and each not in index:
                index[each] = len(index)
                pending.append(each)
            row.append(index[each] if each else NOWHERE)
        table.append(row)
        places += len(subset)
        if len(index) > MAX_STATES or places > MAX_PLACES:
            raise ValueError(_too_many_states())
    return np.asarray(table), np.asarray([any(state == fragment.end for state, _ in subset) for subset in index])


def _too_many_states() -> str:
    return f"the pattern needs more than {MAX_STATES} states, or too many of them at once: shorten it, or {WAY_OUT}."


def _minimal(
    step: Int[np.ndarray, "state symbol"], accepting: Bool[np.ndarray, "state"]
) -> tuple[Int[np.ndarray, "state symbol"], Bool[np.ndarray, "state"]]:
    """Remove states from which no text is accepted, and merge those from which the same texts are."""
    before: list[dict[int, list[int]]] = [collections.defaultdict(list) for _ in step]
    for source, symbol in np.argwhere(step != NOWHERE).tolist():
        before[step[source, symbol]][symbol].append(source)
    final = set(np.flatnonzero(accepting).tolist())
    alive, pending = set(final), list(final)
    while pending:
        new = {source for sources in before[pending.pop()].values() for source in sources} - alive
        alive |= new
        pending += new
    blocks = [block for block in (final, alive - final) if block]
    block_of = {state: number for number, block in enumerate(blocks) for state in block}
    pending = list(range(len(blocks)))
    while pending:
        onto = collections.defaultdict(list)
        for state in blocks[pending.pop()]:
            for symbol, sources in before[state].items():
                onto[symbol] += sources
        for sources in onto.values():
            touched = collections.defaultdict(set)
            for source in sources:
                touched[block_of[source]].add(source)
            for number, part in touched.items():
                if len(part) == len(blocks[number]):
                    continue
                blocks[number] -= part
                smaller, blocks[number] = sorted((part, blocks[number]), key=len)
                block_of |= dict.fromkeys(smaller, len(blocks))
                pending.append(len(blocks))
                blocks.append(smaller)
    if 0 not in alive:
        return np.full((1, step.shape[1]), NOWHERE), np.asarray([False])
    blocks.sort(key=min)  # the start stays the first
    number = np.full(len(step) + 1, NOWHERE)
    for rank, block in enumerate(blocks):
        number[list(block)] = rank
    chosen = [min(block) for block in blocks]
    return number[step[chosen]], accepting[chosen]


def _spelling(pieces: Pieces, symbols: int) -> Int[np.ndarray, "part byte"]:
    """Return the bytes of each symbol in UTF-8. Two parts of characters are one if the same bytes may follow them."""
    index: dict[tuple[int, Pieces], int] = {}  # (continuation bytes to come, what they lead to)
    pending: list[tuple[int, Pieces]] = []

    def code(remaining: int, pieces: Pieces) -> int:
        if len(pieces) == 1 and (remaining == 0 or pieces[0][1] == NOWHERE):
            return pieces[0][1]
        if (remaining, pieces) not in index:
            index[remaining, pieces] = 1 + len(index)
            pending.append((remaining, pieces))
        return symbols + index[remaining, pieces]

    row = np.full(256, NOWHERE)
    for byte in range(256):
        for remaining, lead, first, end in _LEADS:
            size = 1 << 6 * remaining
            base = (byte - lead) * size
            if base >= 0 and max(base, first) < min(base + size, end):
                row[byte] = code(remaining, _window(pieces, base, size, first, end))
                break
    rows = [row]
    for remaining, inside in pending:  # pending grows
        row = np.full(256, NOWHERE)
        size = 1 << 6 * (remaining - 1)
        for low in range(64):
            row[0x80 + low] = code(remaining - 1, _window(inside, low * size, size, 0, CODE_POINTS))
        rows.append(row)
    return np.asarray(rows)


# The number of continuation bytes, the leading byte without its payload bits, and the range of code points.
_LEADS = ((0, 0x00, 0, 0x80), (1, 0xC0, 0x80, 0x800), (2, 0xE0, 0x800, 0x10000), (3, 0xF0, 0x10000, CODE_POINTS))


def _merged(pieces) -> Pieces:
    """The pieces, without those of the same code as the one before."""
    merged: list[tuple[int, int]] = []
    for first, state in pieces:
        if not merged or merged[-1][1] != state:
            merged.append((first, state))
    return tuple(merged)


def _window(pieces: Pieces, base: int, size: int, first: int, end: int) -> Pieces:
    """The pieces in [base, base + size), relative to base; NOWHERE outside [first, end)."""
    low, high = max(base, first), min(base + size, end)
    begin = bisect.bisect_right(pieces, low, key=lambda piece: piece[0]) - 1
    stop = bisect.bisect_left(pieces, high, key=lambda piece: piece[0])
    inner = [(max(start, low) - base, state) for start, state in pieces[begin:stop]]
    before = [(0, NOWHERE)] if low > base else []
    after = [(high - base, NOWHERE)] if high < base + size else []
    return _merged(before + inner + after)


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
        """Add a state without moves; of ten times the states that an automaton may have, some would take minutes."""
        if len(self.moves) >= 10 * MAX_STATES:
            raise ValueError(_too_many_states())
        self.moves.append([])
        self.free.append([])
        return len(self.moves) - 1


def _read(pattern: str) -> Any:
    try:
        return _parser.parse(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error


def _not_regular(pattern: str, code: Any) -> ValueError:
    named = _UNSUPPORTED.get(code, str(code).lower())
    return ValueError(f"{pattern!r} uses {named}, which has no finite automaton here.")


def _parse(pattern: str) -> Fragment:
    """The automaton of the texts that `re.fullmatch(pattern, text)` matches."""
    tree = _read(pattern)
    fragment = Fragment()
    fragment.start = fragment.new_state()
    fragment.end = _Builder(fragment, pattern).sequence(tree, fragment.start, tree.state.flags)
    return fragment


def contained(pattern: str) -> list[int]:
    """The bytes with which the characters of the pattern's texts begin."""
    return np.flatnonzero(from_pattern(pattern).spelling[0] != NOWHERE).tolist()


def found(pattern: str, write: Callable[[Ranges], str], around: str) -> str:
    """A pattern for `re.fullmatch` of the texts in which `re.search` finds a pattern, its classes written anew.

    Args:
        write: gives the pattern of one character of a class.
        around: the pattern of the text that may stand before and after a match, where there is no anchor.

    Raises:
        ValueError: as `from_pattern`, and for anchors that are not at an end of the pattern or of an alternative.
    """
    tree = _read(pattern)
    multiline, top = tree.state.flags & re.MULTILINE, list(tree)

    def written(items: Iterable[tuple[Any, Any]], flags: int) -> str:
        return "".join(one(code, argument, flags) for code, argument in items)

    def one(code: Any, argument: Any, flags: int) -> str:
        if code in _ONE_CHARACTER:
            return write(_ranges(_source(code, argument), flags & _FLAGS))
        if code is op.SUBPATTERN:
            _, add, remove, items = argument
            return f"(?:{written(items, flags & ~remove | add)})"
        if code is op.BRANCH:
            return f"(?:{'|'.join(written(items, flags) for items in argument[1])})"
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, items = argument
            return f"(?:{written(items, flags)}){{{least},{'' if most is op.MAXREPEAT else most}}}"
        if code is op.AT and argument in (*_BEGINS, *_ENDS):
            raise ValueError(f"{pattern!r} has an anchor that is not at an end of it, which is not supported here.")
        raise _not_regular(pattern, code)

    ways = []
    for items in map(list, top[0][1][1] if len(top) == 1 and top[0][0] is op.BRANCH else [top]):
        begins = not multiline and items[:1] in ([(op.AT, op.AT_BEGINNING)], [(op.AT, op.AT_BEGINNING_STRING)])
        items = items[begins:]
        ends = not multiline and items[-1:] in ([(op.AT, op.AT_END)], [(op.AT, op.AT_END_STRING)])
        inner = written(items[: len(items) - ends], tree.state.flags)
        ways.append(("" if begins else around) + inner + ("" if ends else around))
    return f"(?:{'|'.join(ways)})"


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
        if code in _ONE_CHARACTER:
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
        raise _not_regular(self.pattern, code)

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
    characters = np.append(np.arange(SURROGATES.start), np.arange(SURROGATES.stop, CODE_POINTS))
    return characters.astype("<u4").tobytes().decode("utf-32-le")
