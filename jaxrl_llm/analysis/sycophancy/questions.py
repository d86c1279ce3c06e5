"""What every item is asked as: by its own user, by one of the opposite opinion, by nobody; each in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxrl_llm.data.sycophancy.items import Item
from jaxrl_llm.data.sycophancy.opposites import opposites
from jaxrl_llm.data.sycophancy.parts import Parts, split_all, swapped, without_biography

OWN, OPPOSITE, NONE = 0, 1, 2  # places on the axis of users
USERS = ("own", "opposite", "none")
MATCHING, OTHER = 0, 1  # places on the axis of answers: of the item's own user


class Asked(NamedTuple):
    """A question as it is put; `user` says whether there is one whose opinion the item's matching answer is."""

    item: Item
    user: bool


@dataclass(frozen=True)
class Variants:
    """The variants of items. What cannot be made is missing from `asked`, and named here with the reason.

    Attributes:
        items: as they came.
        asked: by (index of the item, user, order) the question; order 0 is the item's own, in 1 the options are
            exchanged. The matching answer is that of the variant's own user, so an opposite user's is the item's other.
        claims: of each item a number that it shares with the items of the same query and options, in either order.
        unsplit: (index, reason) of the items without a biography that can be taken off.
        unpaired: (index, reason) of the items that no user of the opposite opinion puts; the unsplit are among them.
    """

    items: list[Item]
    asked: dict[tuple[int, int, int], Asked]
    claims: list[int]
    unsplit: list[tuple[int, str]]
    unpaired: list[tuple[int, str]]


def variants(items: Sequence[Item], chosen: Sequence[int] | None = None) -> Variants:
    """The variants of all items, or of those at the places `chosen`; opposite users are looked for among all."""
    items = list(items)
    places = range(len(items)) if chosen is None else chosen
    parts, unsplit = split_all(items)
    found, unpaired = opposites(items)
    asked = {}
    for index, place in enumerate(places):
        put = {OWN: Asked(items[place], True)}
        if place in found:
            put[OPPOSITE] = Asked(found[place].item, True)
        if place in parts:
            put[NONE] = Asked(without_biography(items[place]), False)
        for user, each in put.items():
            asked[index, user, 0] = each
            asked[index, user, 1] = each._replace(item=swapped(each.item))
    among = {place: index for index, place in enumerate(places)}
    return Variants(
        [items[place] for place in places],
        asked,
        _claims([parts.get(place) for place in places]),
        *([(among[place], reason) for place, reason in each if place in among] for each in (unsplit, unpaired)),
    )


def _claims(parts: Sequence[Parts | None]) -> list[int]:
    """The number of each item's claim; what does not split is a claim of its own."""
    keys = [
        index if part is None else (part.query, part.ending, frozenset(option.text for option in part.options))
        for index, part in enumerate(parts)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]
