import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data import number_names
from jaxrl_llm.data.number_names import LIMIT, pair

NUMBERS = st.one_of(st.integers(0, LIMIT - 1), st.integers(0, 999), st.integers(0, 999).map(lambda n: 1000 * n))

# Written by hand, German as it is spelled.
KNOWN = re.findall(
    r"(\d+): (.+?)\s=\s(\w+)",
    """
0: zero = null; 1: one = eins; 2: two = zwei; 3: three = drei; 4: four = vier; 5: five = fünf; 6: six = sechs;
7: seven = sieben; 8: eight = acht; 9: nine = neun; 10: ten = zehn; 11: eleven = elf; 12: twelve = zwölf;
13: thirteen = dreizehn; 14: fourteen = vierzehn; 15: fifteen = fünfzehn; 16: sixteen = sechzehn;
17: seventeen = siebzehn; 18: eighteen = achtzehn; 19: nineteen = neunzehn; 20: twenty = zwanzig;
21: twenty-one = einundzwanzig; 22: twenty-two = zweiundzwanzig; 26: twenty-six = sechsundzwanzig;
27: twenty-seven = siebenundzwanzig; 30: thirty = dreißig; 31: thirty-one = einunddreißig;
33: thirty-three = dreiunddreißig; 40: forty = vierzig; 44: forty-four = vierundvierzig; 50: fifty = fünfzig;
55: fifty-five = fünfundfünfzig; 60: sixty = sechzig; 61: sixty-one = einundsechzig;
66: sixty-six = sechsundsechzig; 70: seventy = siebzig; 77: seventy-seven = siebenundsiebzig; 80: eighty = achtzig;
88: eighty-eight = achtundachtzig; 90: ninety = neunzig; 91: ninety-one = einundneunzig;
99: ninety-nine = neunundneunzig; 100: one hundred = einhundert; 101: one hundred one = einhunderteins;
110: one hundred ten = einhundertzehn; 111: one hundred eleven = einhundertelf;
116: one hundred sixteen = einhundertsechzehn; 121: one hundred twenty-one = einhunderteinundzwanzig;
200: two hundred = zweihundert; 217: two hundred seventeen = zweihundertsiebzehn;
330: three hundred thirty = dreihundertdreißig; 601: six hundred one = sechshunderteins;
777: seven hundred seventy-seven = siebenhundertsiebenundsiebzig;
999: nine hundred ninety-nine = neunhundertneunundneunzig; 1000: one thousand = eintausend;
1001: one thousand one = eintausendeins; 1011: one thousand eleven = eintausendelf;
1100: one thousand one hundred = eintausendeinhundert;
1984: one thousand nine hundred eighty-four = eintausendneunhundertvierundachtzig;
2024: two thousand twenty-four = zweitausendvierundzwanzig; 7017: seven thousand seventeen = siebentausendsiebzehn;
10000: ten thousand = zehntausend; 12012: twelve thousand twelve = zwölftausendzwölf;
21000: twenty-one thousand = einundzwanzigtausend; 30030: thirty thousand thirty = dreißigtausenddreißig;
66606: sixty-six thousand six hundred six = sechsundsechzigtausendsechshundertsechs;
100000: one hundred thousand = einhunderttausend; 100001: one hundred thousand one = einhunderttausendeins;
101000: one hundred one thousand = einhunderteintausend;
101101: one hundred one thousand one hundred one = einhunderteintausendeinhunderteins;
121021: one hundred twenty-one thousand twenty-one = einhunderteinundzwanzigtausendeinundzwanzig;
216017: two hundred sixteen thousand seventeen = zweihundertsechzehntausendsiebzehn;
345621: three hundred forty-five thousand six hundred twenty-one =
dreihundertfünfundvierzigtausendsechshunderteinundzwanzig;
700070: seven hundred thousand seventy = siebenhunderttausendsiebzig;
999999: nine hundred ninety-nine thousand nine hundred ninety-nine =
neunhundertneunundneunzigtausendneunhundertneunundneunzig
""",
)
KNOWN = {int(number): (english, german) for number, english, german in KNOWN}


@pytest.mark.parametrize("number", KNOWN)
def test_names_are_spelled_as_they_should_be(number):
    names = pair(number)
    assert (names.number, names.source_text, names.target_text.replace("-", "")) == (number, *KNOWN[number])


def test_hyphens_stand_between_the_parts_of_a_german_name():
    assert len(KNOWN) >= 60
    assert pair(21).target_text == "ein-und-zwanzig"
    assert pair(16).target_text == "sechzehn"
    assert pair(345_621).target_text == "drei-hundert-fünf-und-vierzig-tausend-sechs-hundert-ein-und-zwanzig"


# Back to the number ---------------------------------------------------------------------------------------------------

UNITS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
EINER = {"eins": 1, "zwei": 2, "drei": 3, "vier": 4, "fünf": 5, "sechs": 6, "sieben": 7, "acht": 8, "neun": 9}
ENGLISH = UNITS | {"zero": 0, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fifteen": 15, "eighteen": 18}
ENGLISH |= {f"{name}teen": 10 + UNITS[name] for name in ("four", "six", "seven", "nine")}
ENGLISH |= {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80}
ENGLISH |= {"ninety": 90}
GERMAN = EINER | {"null": 0, "ein": 1, "und": 0, "zehn": 10, "elf": 11, "zwölf": 12, "sechzehn": 16, "siebzehn": 17}
GERMAN |= {f"{name}zehn": 10 + EINER[name] for name in ("drei", "vier", "fünf", "acht", "neun")}
GERMAN |= {f"{name}zig": 10 * EINER[name] for name in ("vier", "fünf", "acht", "neun")}
GERMAN |= {"zwanzig": 20, "dreißig": 30, "sechzig": 60, "siebzig": 70}


def parsed(words, values, hundred, thousand):
    """The number that words name, by adding up: what stands before "hundred" or "thousand" is multiplied."""
    thousands = current = 0
    for word in words:
        if word == thousand:
            thousands, current = current, 0
        else:
            current = current * 100 if word == hundred else current + values[word]
    return 1000 * thousands + current


@given(NUMBERS)
def test_a_name_can_be_read_back(number):
    names = pair(number)
    assert parsed(names.source, ENGLISH, "hundred", "thousand") == number
    assert parsed(names.target, GERMAN, "hundert", "tausend") == number
    assert tuple(names.source_text.replace("-", " ").split()) == names.source
    assert tuple(names.target_text.split("-")) == names.target


@given(NUMBERS)
def test_eins_ends_a_name_and_ein_does_not(number):
    words = pair(number).target
    assert "eins" not in words[:-1] and words[-1] != "ein"
    assert (words[-1] == "eins") == (number % 100 == 1)


def test_the_vocabularies_are_the_words_that_occur():
    numbers = [*range(1000), *range(0, LIMIT, 1000)]
    for side, vocabulary in (("source", number_names.ENGLISH_WORDS), ("target", number_names.GERMAN_WORDS)):
        assert {word for n in numbers for word in getattr(pair(n), side)} == set(vocabulary)
        assert len(set(vocabulary)) == len(vocabulary)
    assert not set(number_names.ENGLISH_WORDS) & set(number_names.GERMAN_WORDS)


# Alignment ------------------------------------------------------------------------------------------------------------


@given(NUMBERS)
def test_links_join_words_of_one_meaning(number):
    names = pair(number)
    meanings = ENGLISH | {"hundred": 100, "thousand": 1000}, GERMAN | {"hundert": 100, "tausend": 1000}
    assert all(meanings[0][names.source[i]] == meanings[1][names.target[j]] for i, j in names.sure)
    assert sorted(i for i, _ in names.sure) == list(range(len(names.source)))  # each English word once
    aligned = {j for _, j in names.sure}
    assert {j for j, word in enumerate(names.target) if word != "und"} == aligned and len(aligned) == len(names.sure)


@given(NUMBERS)
def test_und_may_be_linked_to_what_it_joins(number):
    names = pair(number)
    assert names.sure <= names.possible
    joins = [j for j, word in enumerate(names.target) if word == "und"]
    expected = {(i, j) for j in joins for i, k in names.sure if k in (j - 1, j + 1)}
    assert names.possible - names.sure == expected and len(expected) == 2 * len(joins)


@given(NUMBERS)
def test_only_units_and_tens_cross(number):
    names = pair(number)
    links = sorted(names.sure)
    falls = [(i, j) for (i, j), (_, following) in itertools.pairwise(links) if following < j]
    inverted = [n % 100 for n in (number // 1000, number) if n % 100 > 20 and n % 10]
    assert len(falls) == len(inverted) == names.target.count("und")
    assert all(names.source[i].endswith("ty") for i, _ in falls)


def test_the_alignment_of_one_by_hand():
    names = pair(21_032)  # twenty one thousand thirty two, ein und zwanzig tausend zwei und dreißig
    assert names.sure == {(0, 2), (1, 0), (2, 3), (3, 6), (4, 4)}
    assert names.possible - names.sure == {(0, 1), (1, 1), (3, 5), (4, 5)}


@pytest.mark.parametrize("number", [-1, LIMIT, 2.0, "3", None])
def test_what_has_no_name_is_refused(number):
    with pytest.raises(ValueError, match=r"a whole one from 0 to 999,999, but is"):
        pair(number)


def test_numbers_of_numpy_have_names_too():
    assert pair(np.int64(21)) == pair(21)


# The split ------------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_names():
    numbers = [*KNOWN, *np.random.default_rng(0).integers(0, LIMIT, 300).tolist()]
    assert number_names.english_lengths(numbers).tolist() == [len(pair(n).source) for n in numbers]


def test_the_split_is_disjoint_whole_and_the_same_every_time():
    train, held_out = number_names.split()
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(LIMIT))
    assert np.array_equal(held_out, number_names.split().held_out)
    assert not np.array_equal(held_out, number_names.split(seed=1).held_out)


def test_every_length_is_in_both_parts():
    train, held_out = (np.bincount(number_names.english_lengths(part)) for part in number_names.split())
    assert held_out.tolist() == [0, 2, 10, 105, 200, 200, 200, 200, 200, 200]
    assert (train[1:] > 8 * held_out[1:]).all()
    assert 0 in number_names.split(share=0.9).train


def test_every_word_can_be_learnt_without_the_held_out():
    train, _ = number_names.split()
    words = {word for n in train[:2000].tolist() for word in (*pair(n).source, *pair(n).target)}
    assert words == {*number_names.ENGLISH_WORDS, *number_names.GERMAN_WORDS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_length": 0}, "per_length must be at least 1"),
        ({"share": 0.0}, r"share in \(0, 1\), but are 200 and 0.0"),
        ({"share": 0.01}, "share 0.01 holds out 0 of the 27 names of 1 words"),
    ],
)
def test_a_split_that_misses_a_length_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        number_names.split(**options)


@pytest.mark.parametrize(
    ("numbers", "found"),
    [([3, -1, -1000], "-1"), ([LIMIT], "1000000"), ([1.5], "1.5"), (["1"], "'1'"), ([10**30], str(10**30))],
)
def test_lengths_are_of_numbers_that_have_names(numbers, found):
    with pytest.raises(ValueError, match=f"a number must be a whole one from 0 to 999,999, but is {found}"):
        number_names.english_lengths(numbers)


def test_lengths_of_no_numbers_and_of_small_integers():
    assert number_names.english_lengths([]).shape == (0,)
    assert number_names.english_lengths(np.asarray([21, 255], np.uint8)).tolist() == [2, 4]
