"""Regular expressions, in the syntax of Python's `re` and read by its parser, as nondeterministic automata."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from re import _constants as op
from re import _parser
from typing import Any

CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)  # no characters: UTF-8 cannot write them

Ranges = tuple[tuple[int, int], ...]  # half-open, of code points

_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}
_FLAGS = re.IGNORECASE | re.ASCII | re.DOTALL  # those that say what a class contains
_EDGES = {op.AT_BEGINNING, op.AT_BEGINNING_STRING}, {op.AT_END, op.AT_END_STRING}


@dataclasses.dataclass
class Fragment:
    """An automaton over code points (Thompson 1968): of each state its moves by a class, and its free moves."""

    moves: list[list[tuple[Ranges, int]]] = dataclasses.field(default_factory=list)
    free: list[list[int]] = dataclasses.field(default_factory=list)
    start: int = 0
    end: int = 0

    def new_state(self) -> int:
        """One more state, without moves."""
        self.moves.append([])
        self.free.append([])
        return len(self.moves) - 1


def parse(pattern: str) -> Fragment:
    """The automaton of the texts that `re.fullmatch(pattern, text)` matches.

    Raises:
        ValueError: for a pattern that is not one, or that looks around, refers back, is atomic or possessive, or asks
            where it is (but `^` in front and `$` at the end say nothing new, and may stand there).
    """
    try:
        tree = _parser.parse(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error
    items = list(tree)
    if items and items[0][0] is op.AT and items[0][1] in _EDGES[0]:
        items = items[1:]
    if items and items[-1][0] is op.AT and items[-1][1] in _EDGES[1]:
        items = items[:-1]
    fragment = Fragment()
    fragment.start = fragment.new_state()
    fragment.end = _Builder(fragment, pattern).sequence(items, fragment.start, tree.state.flags)
    return fragment


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Adds what a parsed item matches behind a state, and returns the state after it."""

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
        if code is op.SUBPATTERN:
            _, add, remove, items = argument
            return self.sequence(items, state, flags & ~remove | add)
        if code is op.BRANCH:
            return self.branch([functools.partial(self.sequence, items, flags=flags) for items in argument[1]], state)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, items = argument
            return self.repeat(functools.partial(self.sequence, items, flags=flags), int(least), most, state)
        raise ValueError(f"{self.pattern!r} uses {str(code).lower()}, for which there is no finite automaton here.")

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

    def link(self, state: int, target: int) -> None:
        self.fragment.free[state].append(target)

    def linked(self, state: int) -> int:
        """A new state, free to go to: loops and branches never share one with what stands before."""
        new = self.fragment.new_state()
        self.link(state, new)
        return new


def _source(code: Any, argument: Any) -> str:
    """One character's pattern, written out again."""
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
    """The code points that a one-character pattern matches: `re` itself is asked about all of them."""
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
