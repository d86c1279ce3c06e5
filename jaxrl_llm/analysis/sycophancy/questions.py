"""What every item is asked as: by its own user, by one of the opposite opinion, by nobody; each in both orders."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxrl_llm.analysis.sycophancy.checks import check_type
from jaxrl_llm.data.sycophancy.items import Item, single_spaced
from jaxrl_llm.data.sycophancy.opposites import opposites
from jaxrl_llm.data.sycophancy.parts import lettered, split_all, swapped, without_biography

OWN, OPPOSITE, NONE = 0, 1, 2  # places on the axis of users
USERS = ("own", "opposite", "none")
MATCHING, OTHER = 0, 1  # places on the axis of answers: of the item's own user


class Asked(NamedTuple):
    """A question as it is put; `user` says whether there is one whose opinion the item's matching answer is."""

    item: Item
    user: bool


class LeftOut(NamedTuple):
    """An item of which something cannot be asked, by its place (from 0) among those that were given, and the reason.

    What a reason quotes of the item stands behind a colon.
    """

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Variants:
    """The variants of items. What cannot be made is missing from `asked`, and named here with the reason.

    Attributes:
        items: as they came.
        asked: by (index of the item, user, order) the question; order 0 is the item's own, in 1 the options are
            exchanged. The matching answer is that of the variant's own user, so an opposite user's is the item's other.
        wordless: the keys of `asked` of which the question in words names an option by its letter, and so is none.
        claims: of each item a number that it shares with the items of the same query and options, in either order;
            of one that does not split, with those of the same question. White space and line ends do not matter.
        unsplit: the items without a biography that can be taken off.
        unpaired: the items that no user of the opposite opinion puts; the unsplit are among them.
        lettered: the items that are not asked in words by their own user or by the opposite one.
    """

    items: list[Item]
    asked: dict[tuple[int, int, int], Asked]
    wordless: frozenset[tuple[int, int, int]]
    claims: list[int]
    unsplit: list[LeftOut]
    unpaired: list[LeftOut]
    lettered: list[LeftOut]


def variants(items: Sequence[Item], chosen: Sequence[int] | None = None) -> Variants:
    """The variants of all items, or of those at the places `chosen`; opposite users are looked for among all.

    Raises:
        TypeError: if one is no `Item`.
    """
    items = list(items)
    for item in items:
        check_type("every item", item, Item, "an Item, such as parse_item(...) makes of a dict")
    places = list(range(len(items)) if chosen is None else chosen)
    parts, unsplit = split_all(items)
    found, unpaired = opposites(items)
    asked = {}
    for index, place in enumerate(places):
        asked |= _both_orders(index, OWN, Asked(items[place], True))
        if place in found:
            asked |= _both_orders(index, OPPOSITE, Asked(found[place].item, True))
        if place in parts:
            asked |= _both_orders(index, NONE, Asked(without_biography(items[place]), False))
    wordless = frozenset(key for key, each in asked.items() if lettered(each.item))
    users = {OPPOSITE: "the opposite user", OWN: "the user"}
    speak = {
        places[key[0]]: f"{users[key[1]]} names an option by its letter"
        for key in sorted(wordless, reverse=True)
        if key[1] in users
    }
    return Variants(
        [items[place] for place in places],
        asked,
        wordless,
        _numbered([parts[place].claim if place in parts else single_spaced(items[place].question) for place in places]),
        *(_left_out(items, places, dict(reasons)) for reasons in (unsplit, unpaired, speak)),
    )


def _both_orders(index: int, user: int, asked: Asked) -> dict[tuple[int, int, int], Asked]:
    """In the order that it has, and in the other one if its letters can be exchanged."""
    try:
        return {(index, user, 0): asked, (index, user, 1): asked._replace(item=swapped(asked.item))}
    except ValueError:  # then the item is among the unpaired, with the reason
        return {(index, user, 0): asked}


def _left_out(items: Sequence[Item], places: Sequence[int], reasons: Mapping[int, str]) -> list[LeftOut]:
    return [LeftOut(place, items[place].name, reasons[place]) for place in places if place in reasons]


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    """A number to each different key, in the order in which they come."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]
