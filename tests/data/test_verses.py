import collections
import re

import numpy as np
import pytest

from jaxrl_llm.data import verses
from jaxrl_llm.data.verses import VersePair

PAIRS = verses.load()
BY_REFERENCE = {pair.reference: pair for pair in PAIRS}

# The committed file ---------------------------------------------------------------------------------------------------

# Read in both languages, one after the other: the first and last of books, Psalms with and without a title, the ends of
# chapters, and every place where the numbers do not agree.
KNOWN = {
    "Gen 1:1": (
        "In the beginning God created the heaven and the earth.",
        "En el principio crió Dios los cielos y la tierra.",
    ),
    "Num 12:16": ("And afterward the people removed from Hazeroth", "Y después movió el pueblo de Haseroth"),
    "Num 13:1": ("And the LORD spake unto Moses, saying,", "Y Jehová habló á Moisés, diciendo:"),
    "Num 14:1": ("And all the congregation lifted up", "Entonces toda la congregación alzaron"),
    "Num 29:40": ("And Moses told the children of Israel", "Y Moisés dijo á los hijos de Israel, conforme"),
    "Num 31:1": ("And the LORD spake unto Moses", "Y Jehová habló á Moisés"),
    "Judg 14:18": ("And the men of the city said unto him", "Y al séptimo día, antes que el sol se pusiese"),
    "Judg 15:1": ("But it came to pass within a while after", "Y aconteció después de días"),
    "1Sam 23:29": ("And David went up from thence", "Entonces David subió de allí"),
    "1Sam 25:1": ("And Samuel died", "Y murió Samuel"),
    "1Kgs 22:44": ("And Jehoshaphat made peace", "Y Josaphat hizo paz"),
    "1Chr 1:30-31": ("Mishma, and Dumah, Massa", "Misma, Duma, Maasa"),
    "1Chr 1:32": ("Now the sons of Keturah", "Y Cethura, concubina"),
    "1Chr 21:26": ("And David built there an altar", "Y edificó allí David un altar"),
    "2Chr 33:25": ("But the people of the land slew", "Mas el pueblo de la tierra hirió"),
    "Job 38:41": ("Who provideth for the raven his food?", "¿Quién preparó al cuervo su alimento"),
    "Job 39:26": ("Doth the hawk fly by thy wisdom", "¿Vuela el gavilán por tu industria"),
    "Job 40:6": ("Then answered the LORD unto Job", "Entonces respondió Jehová á Job"),
    "Job 40:24": ("He taketh it with his eyes", "¿Tomarálo alguno por sus ojos"),
    "Job 41:1": ("Canst thou draw out leviathan", "¿Sacarás tú al leviathán"),
    "Ps 1:1": ("Blessed is the man", "Bienaventurado el varón"),
    "Ps 23:1": (
        "A Psalm of David. The LORD is my shepherd; I shall not want.",
        "Salmo de David. Jehová es mi pastor; nada me faltará.",
    ),
    "Ps 51:1": ("To the chief Musician, A Psalm of David, when", "Al Músico principal: Salmo de David, cuando"),
    "Ps 119:1": ("ALEPH. Blessed are the undefiled", "Aleph. Bienaventurados los perfectos"),
    "Ps 119:176": ("I have gone astray like a lost sheep", "Yo anduve errante como oveja extraviada"),
    "Ps 150:6": ("Let every thing that hath breath", "Todo lo que respira"),
    "Hos 11:12": ("Ephraim compasseth me about with lies", "Cercóme Ephraim con mentira"),
    "Jonah 1:17": ("Now the LORD had prepared a great fish", "Mas Jehová había prevenido un gran pez"),
    "Mal 4:6": ("And he shall turn the heart", "El convertirá el corazón"),
    "Matt 1:1": ("The book of the generation of Jesus Christ", "Libro de la generación de Jesucristo"),
    "John 11:35": ("Jesus wept.", "Y lloró Jesús."),
    "Acts 19:40-41": ("For we are in danger", "Porque peligro hay"),
    "2Cor 13:14": ("The grace of the Lord Jesus Christ", "La gracia del Señor Jesucristo"),
    "3John 1:14": ("But I trust I shall shortly see thee", "Porque espero verte en breve"),
    "Rev 22:21": ("The grace of our Lord Jesus Christ", "La gracia de nuestro Señor Jesucristo"),
}


@pytest.mark.parametrize("reference", KNOWN)
def test_verses_that_were_read(reference):
    english, spanish = KNOWN[reference]
    assert BY_REFERENCE[reference].english.startswith(english)
    assert BY_REFERENCE[reference].spanish.startswith(spanish)


def test_the_whole_is_there():
    assert len(PAIRS) == len(BY_REFERENCE) == 31_079
    assert len({pair.chapter for pair in PAIRS}) == 1189
    assert len({pair.chapter.partition(" ")[0] for pair in PAIRS}) == 66
    covered = 0
    for pair in PAIRS:
        first, _, last = pair.reference.partition(":")[2].partition("-")
        covered += int(last or first) - int(first) + 1
    assert covered == 31_102 - 9, "of the verses of the King James Bible"


def test_texts_are_plain():
    for pair in PAIRS:
        for text in pair[1:]:
            assert text == " ".join(text.split()) and not re.search(r"[<>&\\¶*#@_{}\d\ufffd]", text), pair
            assert not re.search(r" [,.;:?!]|[,;:?!][^\W\d_]", text), pair
    letters = collections.Counter("".join(pair.spanish for pair in PAIRS))
    assert letters["á"] > 40_000 and letters["ñ"] > 5000 and letters["¿"] == 3135
    assert set("".join(pair.english for pair in PAIRS)) <= set(map(chr, range(32, 127))) | set("æÆ—")


def test_chapters_do_not_start_in_capitals():
    shouted = re.compile(r"\b[A-ZÁÉÍÓÚÑ]{2,}\b")
    first = [pair.spanish for pair in PAIRS if pair.reference.endswith(":1")]
    assert not [text for text in first if shouted.search(text)]
    assert sum(bool(shouted.search(pair.spanish)) for pair in PAIRS) < 150, "and elsewhere it means something"


NAMES = {"David": "David", "Moses": "Moisés", "Jerusalem": "Jerusalem", "Babylon": "Babilonia", "Abraham": "Abraham"}


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_on_both_sides(name):
    """A shift by one verse in every hundredth chapter would show."""
    has = [pair for pair in PAIRS if re.search(rf"\b{name}\b", pair.english)]
    both = sum(bool(re.search(rf"\b{NAMES[name]}\b", pair.spanish)) for pair in has)
    assert len(has) > 200 and both / len(has) > 0.95


def test_both_sides_are_about_as_long():
    ratios = np.asarray([(len(pair.spanish) + 5) / (len(pair.english) + 5) for pair in PAIRS])
    assert 0.9 < np.median(ratios) < 0.95
    low, high = np.quantile(ratios, [0.01, 0.99])
    assert low > 0.65 and high < 1.28
    assert (ratios < 0.5).sum() < 10 and (ratios > 1.8).sum() < 12
    by_chapter = collections.defaultdict(list)
    for pair, ratio in zip(PAIRS, np.abs(np.log(ratios)), strict=True):
        by_chapter[pair.chapter].append(ratio)
    assert max(np.median(each) for each in by_chapter.values() if len(each) > 5) < 0.35, "no chapter is shifted"


# The split ------------------------------------------------------------------------------------------------------------


def test_no_chapter_and_no_text_is_on_both_sides():
    train, validation, test = verses.split(PAIRS)
    assert len(validation) >= 500 and len(test) >= 500 and len(train) > 29_000
    chapters = [{pair.chapter for pair in part} for part in (train, validation, test)]
    assert not (chapters[0] & chapters[1] or chapters[0] & chapters[2] or chapters[1] & chapters[2])
    for side in (1, 2):
        assert not {pair[side] for pair in train} & {pair[side] for pair in [*validation, *test]}
    assert len(PAIRS) - 30 < len(train) + len(validation) + len(test) < len(PAIRS)
    assert verses.split(PAIRS) == (train, validation, test) != verses.split(PAIRS, seed=1)
    assert len({pair.chapter.partition(" ")[0] for pair in test}) > 20, "of many books"


def test_the_split_of_a_few():
    pairs = [VersePair(f"A {chapter}:{verse}", f"e{verse}", f"s{verse}") for chapter in (1, 2, 3) for verse in (1, 2)]
    assert [len(part) for part in verses.split(pairs, held_out=1)] == [2, 0, 0]  # all said again
    pairs = [VersePair(each.reference, *(f"{text}, {each.reference}" for text in each[1:])) for each in pairs]
    train, validation, test = verses.split(pairs, held_out=2)
    assert sorted([*train, *validation, *test]) == pairs and len(train) == len(validation) == len(test) == 2
    with pytest.raises(ValueError, match="must leave pairs to train on, but two parts of 3 leave none of 6"):
        verses.split(pairs, held_out=3)
    with pytest.raises(ValueError, match="held_out must be at least 1, but is 0"):
        verses.split(pairs, held_out=0)


# The file and the packages --------------------------------------------------------------------------------------------
