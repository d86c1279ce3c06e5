"""Build `jaxrl_llm/data/embedded/verses.tsv.xz`: the King James Bible and the Reina-Valera of 1909, verse by verse.

    python -m tools.verses

fetches both texts with apt-get, cleans and aligns them, and writes the file.

Both modules have the verse numbers of the King James Bible, but the Spanish text is divided differently in places.
There its verses were moved to fill the numbers, and the rest was appended to a chapter's last verse. `MOVED` lists the
places. Elsewhere equal numbers are equal verses, up to a clause at a few borders.
"""

from __future__ import annotations

import collections
import html
import lzma
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxrl_llm.data import verses
from jaxrl_llm.data.verses import VersePair
from tools import packages, sword

Verses = dict[tuple[str, int], str]

# English verses and their Spanish translations. Ranges of equal length are paired verse by verse; others are one pair.
MOVED = (
    ("Num.12:16", "Num.13:1"),
    ("Num.13:1-31", "Num.13:2-32"),
    ("Num.13:32-33", "Num.13:33"),
    ("Num.29:40", "Num.30:1"),
    ("Num.30:1-14", "Num.30:2-15"),
    ("Num.30:15-16", "Num.30:16"),
    ("Judg.14:18", "Judg.14:18-19"),
    ("Judg.14:19-20", "Judg.14:20"),
    ("1Sam.23:29", "1Sam.24:1"),
    ("1Sam.24:1-20", "1Sam.24:2-21"),
    ("1Sam.24:21-22", "1Sam.24:22"),
    ("2Sam.20:25-26", "2Sam.20:25"),
    ("1Kgs.22:43", "1Kgs.22:43-44"),
    ("1Kgs.22:44-51", "1Kgs.22:45-52"),
    ("1Kgs.22:52-53", "1Kgs.22:53"),
    ("1Chr.1:30-31", "1Chr.1:30"),
    ("1Chr.1:32", "1Chr.1:31-32"),
    ("1Chr.21:15", "1Chr.21:15-16"),
    ("1Chr.21:16-28", "1Chr.21:17-29"),
    ("1Chr.21:29-30", "1Chr.21:30"),
    ("2Chr.33:10-11", "2Chr.33:10"),
    ("2Chr.33:12-25", "2Chr.33:11-24"),
    ("Job.35:15-16", "Job.35:15"),
    ("Job.38:39-41", "Job.39:1-3"),
    ("Job.39:1-26", "Job.39:4-29"),
    ("Job.40:6-24", "Job.40:1-19"),
    ("Hos.11:12", "Hos.12:1"),
    ("Hos.12:1-12", "Hos.12:2-13"),
    ("Hos.12:13-14", "Hos.12:14"),
    ("Jonah.1:17", "Jonah.2:1"),
    ("Jonah.2:1-8", "Jonah.2:2-9"),
    ("Jonah.2:9-10", "Jonah.2:10"),
    ("Acts.19:40-41", "Acts.19:40"),
    ("2Cor.13:12-13", "2Cor.13:12"),
    ("2Cor.13:14", "2Cor.13:13"),
)
# Nine English verses of two chapters are one Spanish verse: too long for a sentence pair.
LEFT_OUT = ("Job.39:27-30", "Job.40:1-5"), ("Job.39:30",)


def align(english: Verses, spanish: Verses) -> list[VersePair]:
    """Pair every verse of both texts but `LEFT_OUT`, in the order of the English verses.

    Raises:
        ValueError: if a verse that is not empty would be in no pair or in two, or a pair would have an empty side.
    """
    pairs, used = [], ({*_places(*LEFT_OUT[0])}, {*_places(*LEFT_OUT[1])})
    for ours, theirs in _links(english):
        texts = [" ".join(text[place] for place in places) for text, places in ((english, ours), (spanish, theirs))]
        if not all(texts):
            raise ValueError(f"{_reference(ours)} would be a pair of {texts[0]!r} and {texts[1]!r}.")
        if used[1].intersection(theirs):
            raise ValueError(f"{_reference(theirs)} would be in two pairs, the second for {_reference(ours)}.")
        used[0].update(ours)
        used[1].update(theirs)
        pairs.append(VersePair(_reference(ours), *texts))
    for name, text, places in zip(("English", "Spanish"), (english, spanish), used, strict=True):
        missing = [_reference([place]) for place in text if text[place] and place not in places]
        if missing:
            raise ValueError(f"these {name} verses are in no pair: {', '.join(missing)}.")
    return pairs


def plain_verse(markup: str) -> str:
    """Return the words of one verse on one line, without notes but with titles, which the other text has too."""
    text = _TAG.sub("", _set_apart(_WORD.sub("", _NOTE.sub("", markup))))
    text = html.unescape(_USFM.sub("", text)).translate(sword.TYPOGRAPHY)
    return " ".join(_HEBREW.sub("", text).split())


def without_initial_capitals(verses: Verses) -> Verses:
    """Return Spanish verses with the capitals of a chapter's first words, "EN el principio", as elsewhere: "En"."""
    names = _names(verses.values())

    def recased(match: re.Match) -> str:
        words = match[0].split(" ")
        if words == [match[0][:1]]:  # "Y", "Á", "O"
            return match[0]
        starts = re.search(r"(^|[.:?!])\W*$", match.string[: match.start()])
        return " ".join(
            word.capitalize() if (place == 0 and starts) or word.lower() in names else word.lower()
            for place, word in enumerate(words)
        )

    return {place: _CAPITALS.sub(recased, text) if place[1] == 1 else text for place, text in verses.items()}


# Cleaning -------------------------------------------------------------------------------------------------------------

_NOTE = re.compile(r"<note\b[^>]*(?<!/)>.*?</note>", re.DOTALL)
_WORD = re.compile(r"</?w\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_USFM = re.compile(r"\\\+?[a-z]+\d*\*?")  # marks of an earlier format that the conversion to OSIS has left over
_HEBREW = re.compile("[\u0590-\u05ff]")  # the letters that number the parts of Psalm 119; their names follow
_ADDED = re.compile(r'(\w*)<transChange type="added">([^<]*)</transChange>(?=(\w?))')  # by the translators
_PRONOUNS = frozenset({"lo", "la", "los", "las", "le", "les", "me", "te", "nos", "os"})
_NO_VERBS = frozenset({"no", "como", "jehová", "josué", "gentes", "os", "cuánto", "ellos", "dios", "que"})
_CAPITALS = re.compile(r"(?<!\w)[A-ZÁÉÍÓÚÜÑ]+(?: [A-ZÁÉÍÓÚÜÑ]+)*(?!\w)")


def _set_apart(markup: str) -> str:
    """Insert spaces around added words that touch others, except in a verb with its pronoun, "tráemelo"."""

    def spaced(match: re.Match) -> str:
        before, added, after = match.groups()
        joined = added.split()[:1] and added.split()[0] in _PRONOUNS and before.lower() not in _NO_VERBS
        return before + (" " if before and not joined else "") + added + (" " if after else "")

    return _ADDED.sub(spaced, markup)


def _names(texts: Iterator[str]) -> set[str]:
    """Return words that are usually capitalised within a sentence."""
    seen = collections.Counter(word for text in texts for word in re.findall(r"(?<=[a-záéíóúñü,] )[^\W\d_]+", text))
    return {word.lower() for word in seen if word.istitle() and seen[word] > seen[word.lower()]}


# Places ---------------------------------------------------------------------------------------------------------------


def _places(*ranges: str) -> list[tuple[str, int]]:
    """Return [("Num.13", 32), ("Num.13", 33)] for "Num.13:32-33"."""
    places = []
    for each in ranges:
        chapter, _, verses = each.partition(":")
        first, _, last = verses.partition("-")
        places += [(chapter, verse) for verse in range(int(first), int(last or first) + 1)]
    return places


def _links(english: Verses) -> Iterator[tuple[list[tuple[str, int]], list[tuple[str, int]]]]:
    """Yield the places of each pair, in the order of the English verses."""
    moved = {}
    for ours, theirs in ((_places(ours), _places(theirs)) for ours, theirs in MOVED):
        runs = zip(([each] for each in ours), ([each] for each in theirs), strict=False)
        for pair in runs if len(ours) == len(theirs) else [(ours, theirs)]:
            moved[pair[0][0]] = pair
    later = {place for ours, _ in moved.values() for place in ours[1:]} | {*_places(*LEFT_OUT[0])}
    for place in english:
        if place not in later:
            yield moved.get(place, ([place], [place]))


def _reference(places: list[tuple[str, int]]) -> str:
    (chapter, first), (_, last) = places[0], places[-1]
    book, _, number = chapter.rpartition(".")
    return f"{book} {number}:{first}" + (f"-{last}" if last != first else "")


# The file -------------------------------------------------------------------------------------------------------------


def read_packages(english: Path, spanish: Path) -> list[VersePair]:
    """Return the aligned pairs of the two unpacked Debian packages."""
    ours, theirs = (
        {place: plain_verse(markup) for place, markup in sword.read_verses(folder).items()}
        for folder in (english, spanish)
    )
    return align(ours, without_initial_capitals(theirs))


def fetch(out: Path) -> list[VersePair]:
    """Fetch both packages, write the file `out` (atomically) and return the pairs."""
    with tempfile.TemporaryDirectory() as scratch:
        names = ("sword-text-kjv", "sword-text-sparv")
        pairs = read_packages(*(packages.fetch_debian(name, Path(scratch) / name) for name in names))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_bytes(pack(pairs))
    os.replace(partial, out)
    return pairs


def pack(pairs: Sequence[VersePair]) -> bytes:
    """Return the pairs as xz-compressed lines; equal pairs give equal bytes.

    Raises:
        ValueError: if a field has a tab or a line break in it.
    """
    for pair in pairs:
        if any(set(field) & set("\t\n\r") for field in pair):
            raise ValueError(f"{pair.reference} has a tab or a line break in it.")
    text = "".join("\t".join(pair) + "\n" for pair in pairs)
    return lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)


if __name__ == "__main__":
    import tyro

    def main(out: Path = Path(str(verses.FILE))) -> None:
        """Fetch and align the verse pairs.

        Args:
            out: The file to write.
        """
        pairs = fetch(out)
        print(f"wrote {len(pairs):,} pairs to {out}, {out.stat().st_size:,} bytes")

    tyro.cli(main)
