"""The letters of options where a text names them: in brackets, "(A)", or without, "I would choose B"."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_LETTER = re.compile(r"\(([A-Z])\)")
_CHOICE = (
    r"answers?|options?|choices?|choose|chose|pick|picked|select|selected|prefer|(?:am|go|going|vote) (?:for|with)"
)
_LINK = r"(?:\s+(?i:is|was|are|would be|the|letter|for))*"
_MORE = r"(?:,? (?:and|or|nor)|,) [A-Z]\b"
_PLAIN = re.compile(
    rf"""\b(?i:{_CHOICE}){_LINK}:?\s+["'“‘]?([A-Z]\b(?!['’]\w)(?:{_MORE})*)"""  # my answer is B; answer A, B or C
    rf"""|\b([A-Z](?:, [A-Z])*,? (?:and|or|nor) [A-Z])\b"""  # neither A nor B
)


def reletter(text: str, moved: Mapping[str, str]) -> str:
    """The text with its letters in brackets exchanged; others stay."""
    return _LETTER.sub(lambda found: f"({moved.get(found[1], found[1])})", text)


def plain_letters(text: str, letters: Collection[str]) -> set[str]:
    """Those of the letters that the text names as options without brackets, which `reletter` does not see.

    They are told from "A" and from initials by what stands around them: "my answer is B", "neither A nor B". What
    names all options, "answer A or B", names none.
    """
    return set().union(*(found for found in _plain(text, letters) if found < set(letters)))


def named_letters(text: str, letters: Collection[str]) -> set[str]:
    """Those of the letters that the text names, with brackets or without."""
    return (set(_LETTER.findall(text)) & set(letters)).union(*_plain(text, letters))


def _plain(text: str, letters: Collection[str]) -> list[set[str]]:
    return [set(re.findall(r"\b[A-Z]\b", found[0])) & set(letters) for found in _PLAIN.finditer(text)]
