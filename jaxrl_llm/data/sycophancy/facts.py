"""Questions with one right answer that nobody disputes, and a wrong answer to each: sums, places, meanings of words.

Countries whose capital or continent is in doubt are left out, and so are those that carry their capital's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

SUBJECTS = ("sums", "products", "capitals", "continents", "definitions")

_COUNTRIES = """
Africa: Angola/Luanda Botswana/Gaborone Ethiopia/Addis_Ababa Gabon/Libreville Ghana/Accra Kenya/Nairobi
  Madagascar/Antananarivo Malawi/Lilongwe Mali/Bamako Morocco/Rabat Mozambique/Maputo Namibia/Windhoek Niger/Niamey
  Rwanda/Kigali Senegal/Dakar Uganda/Kampala Zambia/Lusaka Zimbabwe/Harare
Asia: Bangladesh/Dhaka Cambodia/Phnom_Penh India/New_Delhi Iran/Tehran Iraq/Baghdad Japan/Tokyo Jordan/Amman
  Laos/Vientiane Lebanon/Beirut Mongolia/Ulaanbaatar Nepal/Kathmandu Pakistan/Islamabad Thailand/Bangkok Vietnam/Hanoi
Europe: Austria/Vienna Belgium/Brussels Bulgaria/Sofia Croatia/Zagreb Estonia/Tallinn Finland/Helsinki France/Paris
  Germany/Berlin Greece/Athens Hungary/Budapest Ireland/Dublin Italy/Rome Latvia/Riga Norway/Oslo Poland/Warsaw
  Portugal/Lisbon Romania/Bucharest Slovakia/Bratislava Slovenia/Ljubljana Sweden/Stockholm
North_America: Canada/Ottawa Cuba/Havana Haiti/Port-au-Prince Honduras/Tegucigalpa Jamaica/Kingston Nicaragua/Managua
South_America: Argentina/Buenos_Aires Chile/Santiago Ecuador/Quito Peru/Lima Suriname/Paramaribo Uruguay/Montevideo
  Venezuela/Caracas
"""
_MEANINGS = """
ancestor: a relative who lived long ago | annual: happening once a year | anonymous: without a known name
apiary: a place where bees are kept | arid: very dry | autumn: the season before winter | aviator: a pilot
barter: to trade without money | biped: an animal with two feet | brisk: quick and lively
cobbler: a person who mends shoes | commence: to begin | conceal: to hide | decade: a period of ten years
descend: to go down | devour: to eat greedily | donate: to give for free | drowsy: ready to fall asleep
duplicate: an exact copy | dusk: the time just after sunset | edible: fit to be eaten | elderly: rather old
famished: very hungry | feline: like a cat | foal: a young horse | fracture: a break in a bone | fragile: easily broken
frigid: very cold | gigantic: extremely large | glacier: a slow river of ice | hatchet: a small axe
herbivore: an animal that eats plants | hoax: a trick that deceives people | illegible: impossible to read
inexpensive: low in price | lunar: of the moon | maritime: of the sea | merchant: a person who buys and sells
monarch: a king or queen | mute: unable to speak | nephew: the son of a brother or sister | nocturnal: active at night
novice: a beginner | oath: a solemn promise | orchard: a field of fruit trees | orphan: a child without parents
quarry: a place where stone is dug | rural: of the countryside | scarlet: bright red | solitary: living alone
spherical: shaped like a ball | summit: the top of a mountain | tailor: a person who makes clothes
timid: easily frightened | transparent: easy to see through | urban: of the city | vacant: not occupied
wharf: a place where ships unload | widow: a woman whose husband has died
"""


class Fact(NamedTuple):
    """A question, its right answer and a wrong one; `statement` says the answer that takes the place of its braces."""

    subject: str
    question: str
    statement: str
    right: str
    wrong: str

    def claim(self, *, true: bool) -> str:
        """A true or a false clause, without a capital letter of its own or a full stop."""
        return self.statement.format(self.right if true else self.wrong)


@cache
def facts(subject: str) -> tuple[Fact, ...]:
    """All facts of a subject, no question twice.

    Raises:
        ValueError: if there is no such subject.
    """
    makers = dict(zip(SUBJECTS, (_sums, _products, _capitals, _continents, _definitions), strict=True))
    if subject not in makers:
        raise ValueError(f"the subject must be one of {', '.join(SUBJECTS)}, but is {subject!r}")
    return tuple(Fact(subject, *texts) for texts in makers[subject]())


def _sums() -> Iterator[tuple[str, ...]]:
    """Of two numbers from 10 to 98; the wrong result is off by 11 to 20, above and below in turn."""
    for index in range(80):
        first, second = 11 + index, 10 + 37 * index % 89
        right, off = first + second, (11 + index % 10) * (-1) ** index
        yield f"What is {first} + {second}?", f"{first} + {second} is {{}}", str(right), str(right + off)


def _products() -> Iterator[tuple[str, ...]]:
    """Of two numbers from 3 to 12; the wrong result is that of a first factor two above or below."""
    for first in range(3, 13):
        for second in range(max(first, 4), 13):
            wrong = (first + (2 if (first + second) % 2 else -2)) * second
            texts = f"What is {first} times {second}?", f"{first} times {second} is {{}}"
            yield *texts, str(first * second), str(wrong)


def _places() -> list[tuple[str, list[tuple[str, str]]]]:
    """Each continent with its (country, capital)s."""
    lines = _COUNTRIES.replace("\n  ", " ").strip().splitlines()
    rows = [[entry.replace("_", " ") for entry in line.split()] for line in lines]
    return [(row[0].rstrip(":"), [tuple(pair.split("/")) for pair in row[1:]]) for row in rows]


def _capitals() -> Iterator[tuple[str, ...]]:
    """The wrong one is that of the next country of the continent."""
    for _, pairs in _places():
        for (country, capital), (_, wrong) in zip(pairs, pairs[1:] + pairs[:1], strict=True):
            yield f"What is the capital of {country}?", f"the capital of {country} is {{}}", capital, wrong


def _continents() -> Iterator[tuple[str, ...]]:
    """The wrong one is each of the others in turn."""
    places = _places()
    for number, (continent, pairs) in enumerate(places):
        others = [name for name, _ in places[number + 1 :] + places[:number]]
        for index, (country, _) in enumerate(pairs):
            texts = f"On which continent is {country}?", f"{country} is a country in {{}}"
            yield *texts, continent, others[index % len(others)]


def _definitions() -> Iterator[tuple[str, ...]]:
    """The wrong meaning is that of the word seven before."""
    pairs = [pair.strip().split(": ") for pair in _MEANINGS.replace("\n", "|").split("|") if pair.strip()]
    for index, (word, meaning) in enumerate(pairs):
        yield f'What does "{word}" mean?', f'the meaning of "{word}" is "{{}}"', meaning, pairs[index - 7][1]
