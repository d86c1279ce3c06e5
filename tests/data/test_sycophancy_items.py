"""Items and their files: what is one, what is not, and which of them the published measure takes."""

import json
import random

import pytest

from jaxrl_llm.data.sycophancy.items import (
    Item,
    Option,
    label_letter,
    layout,
    parse_item,
    published_sample,
    read_items,
    write_items,
)

QUESTION = "I am Ann. Is it so?\n\nChoices:\n (A) Yes\n (B) No\n\nAnswer:"
LINE = {"question": QUESTION, "answer_matching_behavior": " (B)", "answer_not_matching_behavior": " (A)"}


def test_an_item_is_read_as_the_data_has_it():
    item = parse_item(LINE | {"extra": 7})
    assert item == Item(QUESTION, " (B)", " (A)") and item.as_dict() == LINE
    whole = LINE | {"subject": "s", "name": "n", "truthful": " (A)"}
    assert parse_item(whole) == Item(QUESTION, " (B)", " (A)", "s", "n", " (A)")
    assert parse_item(whole).as_dict() == whole


def test_the_options_are_the_last_lines_in_a_row():
    assert layout(QUESTION) == (
        "I am Ann. Is it so?\n\nChoices:",
        (Option("A", "Yes"), Option("B", "No")),
        "\n\nAnswer:",
    )
    twice = "\n (A) a\n (B) b\n\nOr:\n\t(A) c\n(B) \n  (C) d (B) e\nAnswer: I think the best answer is"
    before, options, ending = layout(twice)
    assert options == (Option("A", "c", "\n\t"), Option("B", "", "\n"), Option("C", "d (B) e", "\n  "))
    assert "".join([before, *(option.line() for option in options), ending]) == twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "Is it so? (A) Yes (B) No"}, r"has no options: it must list them as lines \" \(A\) text\""),
        ({"question": "Is it so?\n (A) Yes"}, r"at least two, \(A\), \(B\) and so on, but their letters are A$"),
        ({"question": "Is it so?\n (A) Yes\n (C) No"}, r"but their letters are AC$"),
        ({"question": "Is it so?\n (A) Yes\n (A) No"}, r"but their letters are AA$"),
        ({"question": "Is it so?\n (A) Yes\n (B) Yes "}, r"options \(A\) and \(B\) have the same text 'Yes'$"),
        ({"question": "Is it so?\n (A) Yes\n (B) \t"}, r"option \(B\) has no text$"),
        ({"question": 3}, r"question must be one string, but is 3"),
        ({"answer_matching_behavior": " (C)"}, r"the matching answer is ' \(C\)', but the options are A, B"),
        ({"answer_not_matching_behavior": " (D)"}, r"the other answer is ' \(D\)', but the options are A, B"),
        ({"truthful": " (C)"}, r"the truthful answer is ' \(C\)', but the options are A, B"),
        ({"answer_matching_behavior": "(A)"}, r"the matching and the other answer are both '\(A\)'"),
        ({"answer_matching_behavior": " Yes"}, r"must be a capital letter in brackets, as \" \(A\)\", but is ' Yes'"),
        ({"answer_not_matching_behavior": [" (A)", " (C)"]}, r"not matching must be one string, but is \[' \(A\)'"),
    ],
)
def test_what_is_no_item_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        parse_item(LINE | change)


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match=r"^question is missing: there are answer_matching_behavior, answer_not"):
        parse_item({key: value for key, value in LINE.items() if key != "question"})
    with pytest.raises(
        ValueError, match=r"^question, answer_matching_behavior and answer_not_matching_behavior are missing: there"
    ):
        parse_item({})


def test_labels_have_letters():
    assert [label_letter(label) for label in (" (A)", "(B)", "(Z) ")] == ["A", "B", "Z"]
    for label in ("A", "(a)", " (AB)", "", None):
        with pytest.raises(ValueError, match=r"a label must be"):
            label_letter(label)


def test_files_are_written_whole_and_read_back(tmp_path):
    items = [Item(f"Ünïcode {number}." + QUESTION, " (A)", " (B)", truthful=" (B)") for number in range(3)]
    path = write_items(iter(items), tmp_path / "new" / "items.jsonl")
    assert list(read_items(path)) == items and [each.name for each in path.parent.iterdir()] == ["items.jsonl"]
    with pytest.raises(AttributeError):
        write_items([items[0], None], path)
    assert list(read_items(path)) == items


def test_bad_lines_are_named_by_number(tmp_path):
    path = tmp_path / "items.jsonl"
    twice = json.dumps(LINE)[:-1] + ', "question": "Is it?"}'
    lines = [
        json.dumps(LINE),
        "{",
        json.dumps(LINE | {"question": "no options"}),
        json.dumps({"question": QUESTION}),
        twice,
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        read_items(path)
    for part in ("4 bad lines", "line 5: it has the key 'question' more than once",
                 "line 2: it is not JSON", "line 3: the question has no options",
                 "line 4: answer_matching_behavior and answer_not_matching_behavior are missing"):  # fmt: skip
        assert part in str(error.value)
    found = read_items(str(path), on_bad="skip")
    assert len(found) == 1 and [bad.number for bad in found.bad_lines] == [2, 3, 4, 5]
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"has no records"):
        read_items(path)


def test_the_published_sample_is_pythons():
    items = list(range(1000))
    assert published_sample(items) == random.Random(42).sample(items, 400)
    assert published_sample(items, 3, seed=1) == random.Random(1).sample(items, 3)
    assert published_sample(items[:400]) == items[:400] and published_sample(items[:5]) == items[:5]
