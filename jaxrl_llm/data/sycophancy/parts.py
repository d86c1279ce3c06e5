"""A question taken apart: who the user is, what they ask, what there is to choose; and questions put together anew.

Where the query begins: at the last "Do you agree or disagree" or "Question:", or else at the last sentence before the
options, which must ask something (it ends with "?", "..." or ":", or begins as a question does). What stands before it
is the biography. An item of which this is not true does not split: `split` says why, and `split_all` counts it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxrl_llm.data.sycophancy.items import Item, Option, label_letter, layout

_OPENER = re.compile(r"\b(?:Do you agree or disagree\b|Question:)")
_TITLE = r"(?<!\bDr)(?<!\bMr)(?<!\bMs)(?<!\bSt)(?<!\bMrs)(?<!\bProf)"  # after which a full stop ends no sentence
_SENTENCE_END = re.compile(rf"""{_TITLE}[.!?…]["'”’)]*\s+(?=["'“‘(]?[A-Z])""")
_HEADING = re.compile(r"\s*(?:answer )?(?:choices|options):\s*$", re.IGNORECASE)
_ASKS = re.compile(
    r"(?:how|what|which|who|whom|whose|when|where|why|do|does|did|is|are|was|were|would|will|can|could|should|has|have)\b",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\(([A-Z])\)")


@dataclass(frozen=True)
class Parts:
    """Biography, query, the lines of the options and ending in a row are the question, byte for byte.

    The white space between biography and query belongs to the biography, a heading as "Choices:" to the query.
    """

    biography: str
    query: str
    options: tuple[Option, ...]
    ending: str

    def question(self) -> str:
        """The parts put together."""
        return "".join([self.biography, self.query, *(option.line() for option in self.options), self.ending])


class SplitItems(NamedTuple):
    """The parts of each item that splits, by its index, and (index, reason) of each that does not."""

    parts: dict[int, Parts]
    unsplit: list[tuple[int, str]]


class WordItem(NamedTuple):
    """A question without letters: `prompt` is continued by the words of either answer."""

    prompt: str
    matching: str
    not_matching: str


def split(item: Item) -> Parts:
    """Take a question apart.

    Raises:
        ValueError: if there is no biography before the query, or the last sentence before the options asks nothing.
    """
    before, options, ending = layout(item.question)
    asked = _HEADING.sub("", before)
    openers = list(_OPENER.finditer(asked))
    start = openers[-1].start() if openers else max((end.end() for end in _SENTENCE_END.finditer(asked)), default=0)
    query = asked[start:]
    if not openers and not (_ASKS.match(query) or query.rstrip("\"'”’) \n").endswith(("?", "...", "…", ":"))):
        raise ValueError(f"what stands before the options is no question: {query[-60:]!r}")
    if not asked[:start].strip():
        raise ValueError(f"no sentence stands before the query {query[:60]!r}: there is no biography")
    return Parts(before[:start], before[start:], options, ending)


def split_all(items: Sequence[Item]) -> SplitItems:
    """Take all questions apart; what does not split is named with its reason, never left out."""
    found, unsplit = {}, []
    for index, item in enumerate(items):
        try:
            found[index] = split(item)
        except ValueError as error:
            unsplit.append((index, str(error)))
    return SplitItems(found, unsplit)


def swapped(item: Item) -> Item:
    """The options in the opposite order: the texts change places and the labels go with them, (A) stays first.

    A letter that the user names, "I think that (A) is true", goes with its text too. The item need not split.
    """
    before, options, ending = layout(item.question)
    moved = {option.letter: other.letter for option, other in zip(options, reversed(options), strict=True)}
    lines = [option._replace(text=other.text).line() for option, other in zip(options, reversed(options), strict=True)]
    labels = {field: getattr(item, field) for field in ("matching", "not_matching", "truthful")}
    return replace(
        item,
        question="".join([reletter(before, moved), *lines, ending]),
        **{field: label and reletter(label, moved) for field, label in labels.items()},
    )


def without_biography(item: Item) -> Item:
    """The query alone. Its labels stay, and say which answer agreed with the user who is gone."""
    return replace(item, question=replace(split(item), biography="").question())


def with_biography(item: Item, biography: str) -> Item:
    """The same query by another user. The labels stay those of `item`: they are not judged anew."""
    if biography and not biography[-1].isspace():
        biography += " "
    return replace(item, question=replace(split(item), biography=biography).question())


def words(item: Item) -> WordItem:
    """The question without its options, to be answered in words: " agree" or " disagree", else the options' texts.

    Of agreement, the answer begins with "I", so that either word continues it as a sentence. The item need not split.
    """
    before, options, ending = layout(item.question)
    texts = {option.letter: option.text for option in options}
    matching, other = (texts[label_letter(label)] for label in (item.matching, item.not_matching))
    prompt = _HEADING.sub("", before) + ending
    if {matching.lower(), other.lower()} == {"agree", "disagree"}:
        return WordItem(f"{prompt} I", f" {matching.lower()}", f" {other.lower()}")
    return WordItem(prompt, f" {matching}", f" {other}")


def reletter(text: str, moved: Mapping[str, str]) -> str:
    """The text with its letters in brackets exchanged; others stay."""
    return _LETTER.sub(lambda found: f"({moved.get(found[1], found[1])})", text)
