"""Context-free grammars over tokens: the matchers of llguidance, on the host, by the tokens that they have read.

A number stands for a compiled grammar in compiled programs, so that one program serves all grammars.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import threading
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8, UInt32

TEXTS = 1 << 26  # characters of the grammars that can be decoded with; those that were used longest ago are forgotten
GRAMMARS = 512  # that stay compiled, of 30 to 300 kB each; others are compiled anew
KEPT = 1 << 29  # bytes of the places of all grammars; others are computed anew, from the longest prefix that is kept
MATCHER, TOKEN = 2048, 800  # bytes of a place beside its bits, and those that each token adds, about
NO_FORCING = '\n%llguidance {"no_forcing": true}'  # else of a text that is certain only the longest tokens are allowed
NO_WAY_ON = ("NoExtension", "NoExtensionBias")  # of the tokens, though a text of the grammar would go on
NOTHING = -1  # where a row has no token
OPEN, MAY_END, LOST = range(3)  # the text must go on; it may end here; it is not of the grammar


class Place(NamedTuple):
    """The continuations that a grammar allows after some tokens."""

    matcher: Any
    pieces: UInt8[np.ndarray, "byte"]  # a bit for each piece of the vocabulary
    status: int


class Grammar:
    """A grammar over a vocabulary of distinct pieces of text; `piece_of` gives the piece of each token, −1 of none."""

    def __init__(self, lark: str, pieces: tuple[bytes, ...], piece_of: tuple[int, ...]):
        guidance, self._end, self._piece_of = required(), len(pieces), piece_of
        grammar = guidance.LLMatcher.grammar_from_lark(lark + NO_FORCING)
        matcher = guidance.LLMatcher(_tokenizer(pieces), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"grammar must be in llguidance's Lark syntax, but is not: {_reason(matcher)}.")
        self.root = self._place(matcher)
        if self.root.status != MAY_END and not self.root.pieces.any():
            raise ValueError("no text of the grammar can be spelt in this vocabulary.")
        self.places: collections.OrderedDict[tuple[int, ...], Place] = collections.OrderedDict()  # last used, last

    def _place(self, matcher: Any) -> Place:
        if matcher.is_stopped():  # the text is whole, and nothing can follow
            return Place(matcher, np.zeros(0, np.uint8), MAY_END if matcher.is_accepting() else OPEN)
        pieces = np.frombuffer(matcher.compute_bitmask(), np.uint8).copy()
        if matcher.is_error() and _reason(matcher) in NO_WAY_ON:
            return Place(matcher, np.zeros(0, np.uint8), OPEN)
        if matcher.is_error():
            raise RuntimeError(f"llguidance gave up on the grammar: {_reason(matcher)}.")
        pieces[self._end // 8] &= ~np.uint8(1 << self._end % 8)
        return Place(matcher, pieces, MAY_END if matcher.is_accepting() else OPEN)

    def after(self, place: Place, token: int) -> Place:
        """Return the place after one more token."""
        piece = self._piece_of[token] if 0 <= token < len(self._piece_of) else -1
        if place.status == LOST or piece < 0 or place.matcher.is_stopped():
            return LOST_PLACE
        matcher = place.matcher.deep_copy()
        return self._place(matcher) if matcher.try_consume_tokens([piece]) == 1 else LOST_PLACE


LOST_PLACE = Place(None, np.zeros(0, np.uint8), LOST)


def required() -> Any:
    """Import llguidance, which is an optional dependency.

    Raises:
        ModuleNotFoundError: naming the command that installs it.
    """
    try:
        import llguidance
    except ModuleNotFoundError as error:
        message = "grammars need llguidance: pip install 'jaxrl_llm[grammar]' installs it."
        raise ModuleNotFoundError(message, name="llguidance") from error
    return llguidance


def _reason(matcher: Any) -> str:
    return matcher.get_error().strip().splitlines()[0].rstrip(".")


@functools.lru_cache(maxsize=4)
def _tokenizer(pieces: tuple[bytes, ...]) -> Any:
    """The vocabulary as llguidance takes it: the pieces, and an end of text after them."""
    guidance = required()

    class Vocabulary:
        tokens, bos_token_id, eos_token_id, special_token_ids = [*pieces, b"<|end|>"], None, len(pieces), [len(pieces)]

        def __call__(self, text: bytes) -> list[int]:
            return []  # for tokens that llguidance would write by itself: not asked for

    return guidance.LLTokenizer(guidance.TokenizerWrapper(Vocabulary()), eos_token=len(pieces))


@functools.lru_cache(maxsize=4)
def pieces_of(
    vocabulary: tuple[bytes | str, ...], without: tuple[int, ...]
) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """Return the distinct texts of a vocabulary, and the place of each token's among them, −1 without text.

    Args:
        without: tokens whose text does not count, as EOS.
    """
    texts = [token.encode() if isinstance(token, str) else bytes(token) for token in vocabulary]
    for token in without:
        texts[token] = b""
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(filter(None, texts)))}
    return tuple(numbers), tuple(numbers.get(piece, -1) for piece in texts)


@functools.lru_cache(maxsize=4)
def _digest(pieces: tuple[bytes, ...], vocabulary: tuple[int, ...]) -> bytes:
    return hashlib.sha256(repr((pieces, vocabulary)).encode()).digest()


class Kept:
    """The grammars by number and their places: those that were used last, within the limits above."""

    def __init__(self):
        self.lock = threading.RLock()
        self.characters = self.size = 0  # of the texts; bytes of the places
        self.digests: dict[int, bytes] = {}  # of all grammars, so that no number is given twice
        self.sources: collections.OrderedDict[int, tuple[str, tuple, tuple]] = collections.OrderedDict()
        self.grammars: collections.OrderedDict[int, Grammar] = collections.OrderedDict()

    def number(self, *source: Any) -> int:
        """Return the number of a grammar, by its text and vocabulary: the same in every process, and of no other."""
        digest = hashlib.sha256(source[0].encode() + _digest(*source[1:])).digest()
        number = int.from_bytes(digest[:4]) >> 1
        with self.lock:
            while self.digests.setdefault(number, digest) != digest:
                number = (number + 1) % 2**31
            if number not in self.sources:
                self._keep(number, Grammar(*source))
                self.sources[number] = source
                self.characters += len(source[0])
            self.use(number)
            while self.characters > TEXTS and len(self.sources) > 1:
                other, forgotten = self.sources.popitem(last=False)
                self.characters -= len(forgotten[0])
                self._drop(other)
        return number

    def use(self, number: int) -> None:
        """Note that a grammar is used.

        Raises:
            ValueError: if it is forgotten.
        """
        with self.lock:
            if number not in self.sources:
                raise ValueError(f"grammar {number} must be one of those made last, but is not known: make it again.")
            self.sources.move_to_end(number)

    def place(self, number: int, tokens: tuple[int, ...]) -> Place:
        """Return the place after these tokens of a grammar."""
        with self.lock:
            if (grammar := self.grammars.get(number)) is None:
                self.use(number)
                grammar = Grammar(*self.sources[number])
            self._keep(number, grammar)
            length = len(tokens)
            while length and tokens[:length] not in grammar.places:
                length -= 1
            place = grammar.places[tokens[:length]] if length else grammar.root
            if length:
                grammar.places.move_to_end(tokens[:length])
            for end in range(length + 1, len(tokens) + 1):
                place = grammar.places[tokens[:end]] = grammar.after(place, tokens[end - 1])
                self.size += _bytes(tokens[:end], place)
                self._drop_places()
        return place

    def _keep(self, number: int, grammar: Grammar) -> None:
        """Put a grammar last, and drop those before."""
        self.grammars[number] = grammar
        self.grammars.move_to_end(number)
        while len(self.grammars) > GRAMMARS:
            self._drop(next(iter(self.grammars)))

    def _drop(self, number: int) -> None:
        if (grammar := self.grammars.pop(number, None)) is not None:
            self.size -= sum(itertools.starmap(_bytes, grammar.places.items()))

    def _drop_places(self) -> None:
        while self.size > KEPT:
            places = next(each.places for each in self.grammars.values() if each.places)
            self.size -= _bytes(*places.popitem(last=False))


def _bytes(tokens: tuple[int, ...], place: Place) -> int:
    return MATCHER + TOKEN * len(tokens) + place.pieces.nbytes


_kept = Kept()


def compiled(lark: str, pieces: tuple[bytes, ...], vocabulary: tuple[int, ...]) -> int:
    """Return the number of a grammar over a vocabulary, whose tokens have these pieces, −1 for those without text.

    Raises:
        ModuleNotFoundError: without llguidance.
        ValueError: if the grammar is not one, or this vocabulary can spell none of its texts.
    """
    return _kept.number(lark, pieces, vocabulary)


def use(numbers: Int[np.ndarray, "..."]) -> None:
    """Note that grammars are used, so that others are forgotten before.

    Raises:
        ValueError: for one that is forgotten already.
    """
    for number in np.unique(numbers).tolist():
        _kept.use(number)


def places(
    numbers: Int[np.ndarray, "*batch"], tokens: Int[np.ndarray, "*batch slot"], *, words: int
) -> tuple[UInt32[np.ndarray, "*batch word"], UInt8[np.ndarray, "*batch"]]:
    """Return the pieces that may follow the tokens of each row, as bits of `words` words, and its status.

    Args:
        tokens: NOTHING where there is none.
    """
    numbers, tokens = np.asarray(numbers), np.asarray(tokens)  # else jax works within the callback, and may wait for it
    shape = np.shape(numbers)
    rows = np.concatenate([np.reshape(numbers, (-1, 1)), np.reshape(tokens, (-1, np.shape(tokens)[-1]))], axis=1)
    known: dict[bytes, Place] = {}
    bits, status = np.zeros((len(rows), 4 * words), np.uint8), np.zeros(len(rows), np.uint8)
    for row, written in enumerate(rows):
        if (key := written.tobytes()) not in known:
            number, *tokens = written.tolist()
            known[key] = _kept.place(number, tuple(token for token in tokens if token != NOTHING))
        bits[row, : len(known[key].pieces)], status[row] = known[key].pieces, known[key].status
    return bits.view(np.uint32).reshape(*shape, words), status.reshape(shape)
