"""The same question by a user of the opposite opinion: what differs in the answer is then due to the user alone.

The biography is that of another item with the same query and options whose user likes the other answer. Where no item
has one, and the user says once that they agree or disagree with the claim, that word is exchanged. All other items are
reported with the reason, in which what is quoted stands behind a colon.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxrl_llm.data.sycophancy.items import Item, label_letter, single_spaced
from jaxrl_llm.data.sycophancy.letters import reletter
from jaxrl_llm.data.sycophancy.parts import Parts, check_letters, split_all, with_biography

_OPINION = re.compile(
    r"\bI ((?:(?:strongly|firmly|fully|also|would) )*)(do not agree|don't agree|agree|disagree)\b"
    r"( (?:with )?(?:(?:that|this|the) (?:claim|statement|view|idea)|that|this|it)\b)?"  # what is agreed with
)
_ALONE = "no item has the same query and the opposite opinion, and"


class Opposite(NamedTuple):
    """An item by a user of the opposite opinion, its labels exchanged.

    `partner` is the index of the item that the biography is from, None if it was made by exchanging a word.
    """

    item: Item
    partner: int | None


class Opposites(NamedTuple):
    """The opposite of each item that has one, by the item's index, and (index, reason) of each other item."""

    found: dict[int, Opposite]
    unpaired: list[tuple[int, str]]


def opposites(items: Sequence[Item]) -> Opposites:
    """Find or make the opposite of every item.

    The users of one opinion and of the other are paired in the order of the items; where one side has fewer, its
    biographies are used again. An item that does not split is among the unpaired, and so is one that names an option
    by its letter without brackets, since that could not be exchanged.
    """
    parts, unpaired = split_all(items)
    for index in list(parts):
        try:
            check_letters(items[index])
        except ValueError as error:
            del parts[index]
            unpaired.append((index, str(error)))
    users = defaultdict(list)  # of a query, its options and the answer that they like: the items
    for index, part in parts.items():
        users[_group(items[index], part, items[index].matching)].append(index)
    found = {}
    for index, part in parts.items():
        alike = users[_group(items[index], part, items[index].matching)]
        others = users.get(_group(items[index], part, items[index].not_matching))
        try:
            if others:
                partner = others[alike.index(index) % len(others)]
                found[index] = Opposite(_exchanged(items[index], _moved(parts[partner], part)), partner)
            else:
                found[index] = Opposite(_exchanged(items[index], reversed_opinion(items[index], part)), None)
        except ValueError as error:
            unpaired.append((index, str(error)))
    return Opposites(found, sorted(unpaired))


def reversed_opinion(item: Item, parts: Parts) -> str:
    """The biography with "agree" for "disagree" or the reverse; letters of options that it names are exchanged too.

    What else the user says stays, also what they say in favour of their opinion.

    Raises:
        ValueError: if the options are not agreement and disagreement, or the user does not say just once, of the claim,
            and as the item's label has it, which of them is theirs.
    """
    matching, other = (_text(parts, label).removesuffix(".").lower() for label in (item.matching, item.not_matching))
    if {matching, other} != {"agree", "disagree"}:
        raise ValueError(f"{_ALONE} the options are not agreement")
    said = list(_OPINION.finditer(parts.biography))
    if len(said) != 1:
        raise ValueError(
            f"{_ALONE} the user says {'more than once' if said else 'nowhere'} that they agree or disagree"
        )
    if said[0][3] is None:
        raise ValueError(f"{_ALONE} the user does not say that it is the claim that they agree or disagree with")
    if (said[0][2] == "agree") != (matching == "agree"):
        raise ValueError(f'{_ALONE} what the user says is not the matching answer, {matching}: "{said[0][0]}"')
    turned = "disagree" if said[0][2] == "agree" else "agree"
    biography = parts.biography[: said[0].start(2)] + turned + parts.biography[said[0].end(2) :]
    first, second = label_letter(item.matching), label_letter(item.not_matching)
    return reletter(biography, {first: second, second: first})


def _group(item: Item, parts: Parts, label: str) -> tuple:
    """What the items of users who like the same answer to the same query share, in whatever order the options are."""
    return *parts.claim, _text(parts, label)


def _text(parts: Parts, label: str) -> str:
    return {option.letter: single_spaced(option.text) for option in parts.options}[label_letter(label)]


def _moved(of: Parts, to: Parts) -> str:
    """The biography of one item for another; the letters that it names are those of the same texts there."""
    letters = {single_spaced(option.text): option.letter for option in to.options}
    return reletter(of.biography, {option.letter: letters[single_spaced(option.text)] for option in of.options})


def _exchanged(item: Item, biography: str) -> Item:
    return replace(with_biography(item, biography), matching=item.not_matching, not_matching=item.matching)
