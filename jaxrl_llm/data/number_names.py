"""Number names of 0 to 999,999 in English and German, with the gold alignment of their words.

A translation task with a known answer and alignment. German writes such a name as one word, "einundzwanzigtausend".
Here its parts are joined by hyphens, "ein-und-zwanzig-tausend", so that every part is a word; without hyphens it is the
German spelling. English has its usual spelling, without "and". The order of words is the same, except that tens and
units of 21 to 99 are swapped: attention has to learn that.

The tokenizer has one vocabulary for both languages. A token is a word, so that indices of the gold alignment are
indices of tokens. Hyphens are not tokens, for they follow from the words; decoding restores them.

    >>> pair(21).source_text, pair(21).target_text, sorted(pair(21).sure)
    ('twenty-one', 'ein-und-zwanzig', [(0, 2), (1, 0)])
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxrl_llm import runtime

LIMIT = 1_000_000  # the first number without a name

_SMALL = {  # 0 to 19
    "zero": "null",
    "one": "eins",
    "two": "zwei",
    "three": "drei",
    "four": "vier",
    "five": "fünf",
    "six": "sechs",
    "seven": "sieben",
    "eight": "acht",
    "nine": "neun",
    "ten": "zehn",
    "eleven": "elf",
    "twelve": "zwölf",
    "thirteen": "dreizehn",
    "fourteen": "vierzehn",
    "fifteen": "fünfzehn",
    "sixteen": "sechzehn",
    "seventeen": "siebzehn",
    "eighteen": "achtzehn",
    "nineteen": "neunzehn",
}
_TENS = {  # 20 to 90
    "twenty": "zwanzig",
    "thirty": "dreißig",
    "forty": "vierzig",
    "fifty": "fünfzig",
    "sixty": "sechzig",
    "seventy": "siebzig",
    "eighty": "achtzig",
    "ninety": "neunzig",
}
_ENGLISH_SMALL, _GERMAN_SMALL = tuple(_SMALL), tuple(_SMALL.values())
_ENGLISH_TENS, _GERMAN_TENS = tuple(_TENS), tuple(_TENS.values())

ENGLISH_WORDS = (*_ENGLISH_SMALL, *_ENGLISH_TENS, "hundred", "thousand")
GERMAN_WORDS = (*_GERMAN_SMALL, "ein", "und", *_GERMAN_TENS, "hundert", "tausend")

Links = frozenset[tuple[int, int]]


class NumberPair(NamedTuple):
    """A number's English (source) and German (target) words, and the gold links (source index, target index).

    `sure` has one link for each English word, to the German word of the same meaning. German "und" has no English
    counterpart and no sure link. It joins a unit and a ten, and `possible` adds its links to both to the sure ones.
    These are S and P of the alignment error rate 1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|) (Och and Ney 2003): an attention
    row for "und" sums to 1 too, and weight on either word is not an error.
    """

    number: int
    source: tuple[str, ...]
    target: tuple[str, ...]
    sure: Links
    possible: Links

    @property
    def source_text(self) -> str:
        """Return the English spelling, "three hundred twenty-one"."""
        return join_english(self.source)

    @property
    def target_text(self) -> str:
        """Return the German spelling with hyphens between its words, "drei-hundert-ein-und-zwanzig"."""
        return join_german(self.target)


def pair(number: int) -> NumberPair:
    """Return both names of a number with their alignment.

    Raises:
        ValueError: if the number is not a whole number from 0 to 999,999.
    """
    number = _checked(number)
    if number == 0:
        return NumberPair(0, *_word(0, last=True))
    thousands, rest = divmod(number, 1000)
    pieces = [_below_thousand(thousands, last=False), _named("thousand", "tausend")] if thousands else []
    return NumberPair(number, *_concatenated([*pieces, _below_thousand(rest, last=True)]))


def join_english(words: Sequence[str]) -> str:
    """Join English words as in writing: with a hyphen between a ten and a unit, else with spaces."""
    text = ""
    for before, word in zip(("", *words), words, strict=False):
        hyphen = before in _ENGLISH_TENS and word in _ENGLISH_SMALL[1:10]
        text += ("-" if hyphen else " " if text else "") + word
    return text


def join_german(words: Sequence[str]) -> str:
    """Join German words with hyphens."""
    return "-".join(words)


def english_lengths(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the number of words, 1 to 9, of each number's English name.

    Raises:
        ValueError: if one is not a whole number from 0 to 999,999.
    """
    numbers = np.asarray(numbers)
    if numbers.dtype.kind not in "iu" or ((numbers < 0) | (numbers >= LIMIT)).any():
        for number in numbers.ravel().tolist():
            _checked(number)
    table = np.asarray([len(_below_thousand(n, last=True).source) for n in range(1000)])
    thousands, rest = np.divmod(numbers.astype(int), 1000)
    return np.maximum(table[thousands] + (thousands > 0) + table[rest], 1)


class Split(NamedTuple):
    """Disjoint training and held-out numbers, each in ascending order."""

    train: np.ndarray
    held_out: np.ndarray


def split(*, per_length: int = 200, share: float = 0.1, seed: int = 0) -> Split:
    """Split all numbers, holding out `per_length` names of each English length, at most this share of them.

    Uniform draws would rarely hold out a short name: 90 per cent of all numbers have 7 words or more. Zero is never
    held out, for its word occurs in no other name.

    Raises:
        ValueError: if `per_length` is below 1, or `share` so small or large that a length is missing on either side.
    """
    if per_length < 1 or not 0 < share < 1:
        raise ValueError(f"per_length must be at least 1 and share in (0, 1), but are {per_length} and {share}.")
    lengths, rng, held_out = english_lengths(np.arange(LIMIT)), np.random.default_rng(seed), []
    for length in range(1, lengths.max() + 1):
        numbers = np.flatnonzero(lengths == length)
        numbers = numbers[numbers > 0]
        count = min(per_length, int(share * len(numbers)))
        if not 0 < count < len(numbers):
            raise ValueError(f"share {share} holds out {count} of the {len(numbers)} names of {length} words.")
        held_out.append(rng.choice(numbers, count, replace=False))
    held_out = np.sort(np.concatenate(held_out))
    return Split(np.setdiff1d(np.arange(LIMIT), held_out, assume_unique=True), held_out)


# Pieces: some words of both languages and the links among them --------------------------------------------------------


class _Piece(NamedTuple):
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    sure: Links = frozenset()
    possible: Links = frozenset()


def _named(english: str, german: str) -> _Piece:
    """Return a pair of words of one meaning."""
    link = frozenset({(0, 0)})
    return _Piece((english,), (german,), link, link)


def _word(number: int, *, last: bool) -> _Piece:
    """Return 0 to 19: "eins" at the end of a name, "ein" before another word."""
    return _named(_ENGLISH_SMALL[number], "ein" if number == 1 and not last else _GERMAN_SMALL[number])


@functools.cache  # every name consists of these
def _below_thousand(number: int, *, last: bool) -> _Piece:
    """Return 1 to 999 as before "thousand" or, with `last`, as at the end; empty for 0."""
    hundreds, rest = divmod(number, 100)
    pieces = [_word(hundreds, last=False), _named("hundred", "hundert")] if hundreds else []
    if 0 < rest < 20:
        pieces.append(_word(rest, last=last))
    elif rest:
        pieces.append(_tens(*divmod(rest, 10)))
    return _concatenated(pieces)


def _tens(tens: int, unit: int) -> _Piece:
    """Return 20 to 99: "twenty-one" is "ein-und-zwanzig"."""
    english, german = _ENGLISH_TENS[tens - 2], _GERMAN_TENS[tens - 2]
    if unit == 0:
        return _named(english, german)
    ((unit_english,), (unit_german,), *_) = _word(unit, last=False)
    sure = frozenset({(0, 2), (1, 0)})
    return _Piece((english, unit_english), (unit_german, "und", german), sure, sure | {(0, 1), (1, 1)})


def _concatenated(pieces: Sequence[_Piece]) -> _Piece:
    """Concatenate pieces, with their links shifted."""
    whole = _Piece()
    for piece in pieces:
        at, to = len(whole.source), len(whole.target)
        sure, possible = ({(i + at, j + to) for i, j in links} for links in piece[2:])
        whole = _Piece(
            whole.source + piece.source, whole.target + piece.target, whole.sure | sure, whole.possible | possible
        )
    return whole


def _checked(number: int) -> int:
    try:
        whole = operator.index(number)
    except TypeError:
        whole = -1
    if not 0 <= whole < LIMIT:
        raise ValueError(f"a number must be a whole one from 0 to {LIMIT - 1:,}, but is {number!r}.")
    return whole


# The tokenizer --------------------------------------------------------------------------------------------------------

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # 0, 1, 2, as in T5; its decoder starts from pad
PAD_ID, EOS_ID, UNK_ID = range(3)


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer; it ignores case and Unicode form, and appends `</s>`.

    `decode(encode(text).ids)` restores every English and German name as this module writes it.
    """
    words = dict.fromkeys((PAD, EOS, UNK, *ENGLISH_WORDS, *GERMAN_WORDS))
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token=UNK))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, UNK)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s-]+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, EOS_ID)])
    tokenizer.decoder = _tokenizer_decoder()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, as transformers loads them, also for a T5."""
    runtime.quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special).save_pretrained(
        folder
    )


def _tokenizer_decoder() -> decoders.Decoder:
    """Return the decoder: words joined by spaces, some of which become hyphens."""
    units = "|".join(ENGLISH_WORDS[1:10])
    german = "|".join(GERMAN_WORDS)
    return decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),  # no word has this prefix: it only inserts spaces
            decoders.Fuse(),
            decoders.Replace(Regex(rf"(?<=ty) (?=(?:{units})\b)"), "-"),
            decoders.Replace(Regex(rf" (?=(?:{german})\b)"), "-"),
        ]
    )
