"""Where sentences of a question begin, and whether it says anything of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable

_END = re.compile(r"""(?P<mark>[.!?…])["'”’)\]]*\s+(?P<begin>["'“‘(\[¿¡]*)(?=(?P<next>\S{1,2}))""")
_WORD = re.compile(r"\w*\Z")
_OPEN = {"dr", "mr", "mrs", "ms", "st", "prof", "vs", "cf"}  # after which a full stop never ends a sentence
_SHORT = {"etc", "inc", "ltd", "jr", "sr"}  # after which it may, as it may after a letter
_DOTTED = re.compile(r"\.[A-Z]\Z")
_QUESTION = re.compile(
    r"(?:how|what|which|who|whom|whose|when|where|why|do|does|did|is|are|was|were|would|will|can|could|should|has|have)\b",
    re.IGNORECASE,
)
_EMPTY = """
a about accept accurate agree agreed agreement agrees all am an and answer answers any are as at back bad be being
believe best both by can choose claim claims closest comes comment correct could d describes did disagree disagreed
disagreement disagrees do does don either else fair false feel following for from give given good has have he her
here him his how i idea if in is isn it just let ll m makes me mine must my neither neutral no none nor not of ok
okay on one opinion opinions oppose option options or our own partially partly please point position question re
reasonable reply respond right s say says select sense share she should slightly so somewhat statement statements
strongly support sure t tell than that the their them then there these they think this those thought thoughts to
too true unsure us ve very view views was we were what when which who with would wrong yes you your yours
"""


def asks(sentence: str) -> bool:
    """Whether a sentence ends as a question or as one to be completed does, or begins as a question does."""
    return bool(_QUESTION.match(sentence)) or sentence.rstrip("\"'”’) \n").endswith(("?", "...", "…", ":"))


def last_sentence(text: str) -> int:
    """Where the last sentence begins, 0 if there is but one.

    One begins behind ".", "!", "?" or "…", but not in lower case ("iPhones" is none), not behind a title, and behind
    an initial ("J. Smith") only if it begins as a question does.

    Raises:
        ValueError: if what follows may hold a sentence more: one that begins in lower case, or, but not as a question,
            behind an abbreviation ("the U.S. Congress").
    """
    start, doubt = 0, None
    for end in _END.finditer(text):
        begins = _begins(end, text)
        if begins:
            start, doubt = end.start("begin"), None
        elif begins is None:
            doubt = end
    if doubt:
        raise ValueError(f"where the query begins is not certain: {text[doubt.start() :][:60]!r}")
    return start


def _begins(end: re.Match, text: str) -> bool | None:
    """Whether a sentence begins behind a match of `_END`, None if that cannot be told."""
    word = _WORD.search(text[max(end.start() - 12, 0) : end.start()])[0].lower()
    following = end["next"]
    lower = following[0].islower() and not following[1:].isupper()
    if end["mark"] == ".":
        if word in _OPEN or (word == "no" and following[0].isdigit()):
            return False
        initial = len(word) == 1 and word.isalpha()
        if word in _SHORT or initial:
            if lower or _QUESTION.match(text, end.end()):
                return not lower
            return False if initial and not _DOTTED.search(text[max(end.start() - 2, 0) : end.start()]) else None
    return None if lower else True


def says_nothing(texts: Iterable[str]) -> bool:
    """Whether the texts have no word but those of any question: "Is that right?", "Do you agree or disagree?"."""
    empty = set(_EMPTY.split())
    return all(word in empty for text in texts for word in re.findall(r"\w+", text.lower()))
