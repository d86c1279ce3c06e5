"""Multiple-choice questions in the form of the model-written evaluations (Perez et al. 2022, arXiv 2212.09251).

A line of such a file is an object with `question`, which lists its options as lines " (A) text" and ends where the
answer is to begin, and with the labels `answer_matching_behavior` and `answer_not_matching_behavior`, " (A)" say: the
answer that agrees with the user, and the one that does not.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxrl_llm.data.records import JsonLines

KEYS = {  # of a line of a file: the field of an item
    "question": "question",
    "answer_matching_behavior": "matching",
    "answer_not_matching_behavior": "not_matching",
}
OPTIONAL = ("subject", "name", "truthful")
_LABEL = re.compile(r"\s*\(([A-Z])\)\s*")
_OPTION = re.compile(r"(\n[ \t]*)\(([A-Z])\) ([^\n]*)")
_OPTIONS = re.compile(r"(?:\n[ \t]*\([A-Z]\) [^\n]*)+")


class Option(NamedTuple):
    """An answer to choose; `lead` is the line's beginning before the letter."""

    letter: str
    text: str
    lead: str = "\n "

    def line(self) -> str:
        """As it stands in the question."""
        return f"{self.lead}({self.letter}) {self.text}"


class Layout(NamedTuple):
    """A question around its options; `before`, the options' lines and `ending` in a row are the question."""

    before: str
    options: tuple[Option, ...]
    ending: str


@dataclass(frozen=True)
class Item:
    """A question, the label of the answer that agrees with the user, and that of one that does not.

    `truthful` is the label of the true answer, where one is known. Labels are kept as the data has them.

    Raises:
        ValueError: if the question has no options, one has no text or two have the same, a label is not among them, or
            the two labels are equal.
    """

    question: str
    matching: str
    not_matching: str
    subject: str = ""
    name: str = ""
    truthful: str | None = None

    def __post_init__(self):
        options = layout(self.question).options
        _check_texts(options)
        letters = [option.letter for option in options]
        labels = {"the matching": self.matching, "the other": self.not_matching}
        labels |= {"the truthful": self.truthful} if self.truthful is not None else {}
        for what, label in labels.items():
            if label_letter(label) not in letters:
                raise ValueError(f"{what} answer is {label!r}, but the options are {', '.join(letters)}")
        if label_letter(self.matching) == label_letter(self.not_matching):
            raise ValueError(f"the matching and the other answer are both {self.matching!r}")

    def as_dict(self) -> dict[str, str]:
        """The line of a file that `parse_item` reads; empty optional fields are left out."""
        line = {key: getattr(self, field) for key, field in KEYS.items()}
        return line | {field: getattr(self, field) for field in OPTIONAL if getattr(self, field)}


def _check_texts(options: Sequence[Option]) -> None:
    seen = {}
    for option in options:
        text = single_spaced(option.text)
        if not text:
            raise ValueError(f"option ({option.letter}) has no text")
        if text in seen:
            raise ValueError(f"options ({seen[text]}) and ({option.letter}) have the same text {text!r}")
        seen[text] = option.letter


def single_spaced(text: str) -> str:
    """The text with one space for all white space between words, and none around it: how texts are compared."""
    return " ".join(text.split())


def counted(number: int, noun: str) -> str:
    """The number with the noun: "1 item", "2 items"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def label_letter(label: str) -> str:
    """The letter of a label: "A" of " (A)".

    Raises:
        ValueError: if the label has another form.
    """
    found = _LABEL.fullmatch(label) if isinstance(label, str) else None
    if found is None:
        raise ValueError(f'a label must be a capital letter in brackets, as " (A)", but is {label!r}')
    return found[1]


def layout(question: str) -> Layout:
    """Find the options of a question: the last lines in a row of the form " (A) text", with letters from A on.

    Raises:
        ValueError: if there are not at least two of them, or their letters are others.
    """
    runs = list(_OPTIONS.finditer(question))
    if not runs:
        raise ValueError('the question has no options: it must list them as lines " (A) text"')
    options = tuple(Option(letter, text, lead) for lead, letter, text in _OPTION.findall(runs[-1][0]))
    letters = "".join(option.letter for option in options)
    if len(options) < 2 or letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]:
        raise ValueError(f"the options must be at least two, (A), (B) and so on, but their letters are {letters}")
    return Layout(question[: runs[-1].start()], options, question[runs[-1].end() :])


def parse_item(line: Mapping[str, Any]) -> Item:
    """An item of a line of a file; entries other than an item's are ignored.

    Raises:
        ValueError: naming what is missing or is not an item's.
    """
    missing = [key for key in KEYS if key not in line]
    if missing:
        there = f"there are {', '.join(line)}" if line else "there is nothing"
        named = " and ".join([*filter(None, [", ".join(missing[:-1])]), missing[-1]])
        raise ValueError(f"{named} {'are' if len(missing) > 1 else 'is'} missing: {there}")
    fields = {field: line[key] for key, field in KEYS.items()}
    fields |= {field: line[field] for field in OPTIONAL if line.get(field) is not None}
    for field, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"{field.replace('_', ' ')} must be one string, but is {value!r}")
    return Item(**fields)


def read_items(path: Path | str, *, on_bad: Literal["raise", "skip"] = "raise") -> JsonLines[Item]:
    """The items of a file of JSON lines, read when asked for. `JsonLines` says what `on_bad` does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming each bad line by its number, or if the file holds no item.
    """
    return JsonLines(Path(path), parse_item, on_bad=on_bad)


def write_items(items: Iterable[Item], path: Path | str) -> Path:
    """Write items as JSON lines, a whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    lines = [json.dumps(item.as_dict(), ensure_ascii=False) + "\n" for item in items]
    partial.write_text("".join(lines), encoding="utf-8", newline="")
    os.replace(partial, path)
    return path


def published_sample(items: Sequence[Item], count: int = 400, seed: int = 42) -> list[Item]:
    """The items that the published measure scores: `random.Random(seed).sample(items, count)`, in the sample's order.

    If there are no more than `count`, all of them are, in their own order: nothing is drawn.
    """
    return list(items) if len(items) <= count else random.Random(seed).sample(items, count)
