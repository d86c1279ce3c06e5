"""A question taken apart: who the user is, what they ask, what there is to choose; and questions put together anew.

Where the query begins: at the last "Do you agree or disagree" or "Question:", or else at the last sentence before the
options, which must ask something (it ends with "?", "..." or ":", or begins as a question does). What stands before it
is the biography. The user's opinion stands nowhere else, and what it is of must be in the query or the options. An item
of which this is not true does not split: `split` says why, and `split_all` counts it. What such reasons quote stands
behind a colon.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxrl_llm.data.sycophancy.items import Item, Option, label_letter, layout, single_spaced
from jaxrl_llm.data.sycophancy.letters import named_letters, plain_letters, reletter
from jaxrl_llm.data.sycophancy.sentences import asks, last_sentence, says_nothing

_OPENER = re.compile(r"\b(?:Do you agree or disagree\b|Question:)")
_HEADING = re.compile(r"(?:answer )?(?:choices|options):\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Parts:
    """Biography, query, the lines of the options and ending in a row are the question, byte for byte.

    The white space between biography and query belongs to the biography, a heading as "Choices:" to the query.
    """

    biography: str
    query: str
    options: tuple[Option, ...]
    ending: str

    @property
    def claim(self) -> tuple[str, str, frozenset[str]]:
        """What the questions about one claim share, in whatever order the options are, and whatever white space."""
        texts = frozenset(single_spaced(option.text) for option in self.options)
        return single_spaced(self.query), single_spaced(self.ending), texts

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
        ValueError: if there is no biography before the query, the last sentence before the options asks nothing, it is
            not certain where that begins, neither it nor the options say anything ("Is that right?"), or the user's
            opinion stands behind the options.
    """
    before, options, ending = layout(item.question)
    asked = _without_heading(before)
    openers = list(_OPENER.finditer(asked))
    start = openers[-1].start() if openers else last_sentence(asked)
    query = asked[start:]
    if not openers and not asks(query):
        raise ValueError(f"what stands before the options is no question: {query[-60:]!r}")
    if not asked[:start].strip():
        raise ValueError(f"no sentence stands before the query, there is no biography: {query[:60]!r}")
    if says_nothing([query, *(option.text for option in options)]):
        raise ValueError(f"what the opinion is of is not in the query: {query[:60]!r}")
    if 0 < len(_named(ending, options)) < len(options):
        raise ValueError(f"an opinion stands behind the options: {ending.strip()[:60]!r}")
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

    A letter in brackets, "I think that (A) is true", goes with its text wherever it stands. The item need not split.

    Raises:
        ValueError: if the question names a letter of an option without brackets.
    """
    before, options, ending = layout(item.question)
    check_letters(item)
    moved = {option.letter: other.letter for option, other in zip(options, reversed(options), strict=True)}
    lines = [
        option._replace(text=reletter(other.text, moved)).line()
        for option, other in zip(options, reversed(options), strict=True)
    ]
    labels = {field: getattr(item, field) for field in ("matching", "not_matching", "truthful")}
    return replace(
        item,
        question="".join([reletter(before, moved), *lines, reletter(ending, moved)]),
        **{field: label and reletter(label, moved) for field, label in labels.items()},
    )


def check_letters(item: Item) -> None:
    """Raise ValueError if the question names a letter of an option without brackets, which then could not change."""
    found = plain_letters(item.question, letters(item))
    if found:
        raise ValueError(f"an option is named by its letter without brackets: {', '.join(sorted(found))}")


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
    texts = {option.letter: option.text.strip() for option in options}
    matching, other = (texts[label_letter(label)] for label in (item.matching, item.not_matching))
    prompt = _without_heading(before) + ending
    said = [text.removesuffix(".").lower() for text in (matching, other)]
    if set(said) == {"agree", "disagree"}:
        return WordItem(f"{prompt} I", f" {said[0]}", f" {said[1]}")
    return WordItem(prompt, f" {matching}", f" {other}")


def lettered(item: Item) -> bool:
    """Whether the question in words still names an option by its letter, which it does not show."""
    return bool(named_letters(words(item).prompt, letters(item)))


def letters(item: Item) -> list[str]:
    """Of the options."""
    return [option.letter for option in layout(item.question).options]


def _without_heading(before: str) -> str:
    """Without "Choices:" or the like at the end, and the white space around it."""
    heading = _HEADING.search(before.rstrip())
    return before[: heading.start()].rstrip() if heading else before


def _named(text: str, options: Sequence[Option]) -> set[str]:
    """The letters of the options that a text names, by letter or by their own text."""
    by_text = {
        option.letter
        for option in options
        if re.search(rf"(?<!\w){re.escape(option.text.strip().rstrip('.'))}(?!\w)", text, re.IGNORECASE)
    }
    return named_letters(text, [option.letter for option in options]) | by_text
