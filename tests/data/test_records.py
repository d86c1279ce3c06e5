"""What a line may be, and what it may not."""

import pytest

from jaxrl_llm.data import records
from jaxrl_llm.data.records import Demonstration, Judged, Preference, Ranked

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "Hi"), ("assistant", "Hello"), ("assistant", "No")))  # fmt: skip


def test_demonstrations_have_four_forms():
    assert records.demonstration({"prompt": "a", "answer": "b"}) == Demonstration("a", "b")
    assert records.demonstration({"prompt": "a", "completion": "b"}) == Demonstration("a", "b")
    assert records.demonstration({"text": "b"}) == Demonstration("", "b")
    assert records.demonstration({"messages": [USER, GOOD]}) == Demonstration((USER,), (GOOD,))


def test_preferences_are_strings_or_conversations_with_or_without_their_prompt():
    assert records.preference({"prompt": "", "chosen": "b", "rejected": "c"}) == Preference("", "b", "c")
    explicit = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    implicit = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert records.preference(explicit) == records.preference(implicit) == Preference((USER,), (GOOD,), (BAD,))


def test_strings_and_messages_that_are_mixed_become_messages():
    """UltraFeedback's form among them: the prompt as a string, and whole conversations that begin with it."""
    for asked in ("Hi", [USER]):
        for chosen, rejected in [("Hello", [BAD]), ([GOOD], "No"), ([USER, GOOD], [USER, BAD]), ([USER, GOOD], "No")]:
            found = records.preference({"prompt": asked, "chosen": chosen, "rejected": rejected})
            assert found == Preference((USER,), (GOOD,), (BAD,))
    assert records.demonstration({"prompt": "Hi", "answer": [USER, GOOD]}) == Demonstration((USER,), (GOOD,))
    assert records.judged({"prompt": [USER], "answer": "No", "label": 0}) == Judged((USER,), (BAD,), False)
    assert records.ranked({"prompt": "Hi", "answers": ["Hello", [USER, BAD]]}) == Ranked(
        (USER,), ((GOOD,), (BAD,)), (0, 1)
    )


def test_answers_are_judged_or_ranked():
    assert records.judged({"prompt": "a", "completion": "b", "label": False}) == Judged("a", "b", False)
    assert records.judged({"text": "b", "label": 1}) == Judged("", "b", True)
    assert records.ranked({"prompt": "a", "answers": ["x", "y", "z"]}) == Ranked("a", ("x", "y", "z"), (0, 1, 2))
    assert records.ranked({"prompt": "a", "answers": ["x", "y"], "ranks": [1, 0]}).ranks == (1, 0)
    assert records.ranked({"prompt": "a", "chosen": "x", "rejected": "y"}) == Ranked("a", ("x", "y"), (0, 1))


@pytest.mark.parametrize(
    ("kind", "line", "said"),
    [
        ("prompts", {}, "prompt is missing: there is nothing"),
        ("prompts", {"prompt": 3}, 'must be a string or a list of {"role", "content"}, but is'),
        ("prompts", {"prompt": [{"role": "user"}]}, "must be a string or a list"),
        ("demonstrations", {"prompt": "a", "answer": ""}, "answer is empty"),
        ("demonstrations", {"messages": [USER]}, "must end with one of the assistant"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
        ("preferences", {"chosen": "b", "rejected": "c"}, "prompt is missing: there are chosen, rejected"),
        ("preferences", {"chosen": [GOOD], "rejected": [BAD]}, "do not begin alike"),
        ("preferences", {"prompt": "a", "chosen": "b"}, "rejected is missing"),
        ("preferences", {"prompt": "Hi", "chosen": "No", "rejected": [USER, BAD]}, "are the same answer"),
        ("preferences", {"prompt": "Who?", "chosen": [USER, GOOD], "rejected": "No"}, "one of the role 'user'"),
        ("preferences", {"prompt": "", "chosen": [GOOD], "rejected": [BAD]}, "prompt is empty"),
        ("demonstrations", {"messages": [GOOD]}, "one before the assistant's last"),
        ("demonstrations", {"text": [GOOD]}, "text must be a string"),
        ("ranked", {"prompt": "Hi", "answers": ["No", [USER, BAD]]}, "answer 2 stands there twice"),
        ("judged", {"text": "b", "label": "yes"}, "label must be true or false, but is 'yes'"),
        ("judged", {"text": "b"}, "label must be true or false, but is None"),
        ("ranked", {"prompt": "a", "answers": ["x"]}, "two or more"),
        ("ranked", {"prompt": "a", "answers": ["x", "y"], "ranks": [0]}, "a number from 0 for each of 2 answers"),
        ("ranked", {"prompt": "a", "answers": ["x", "y"], "ranks": [1, 1]}, "all ranks are equal"),
        ("ranked", {"prompt": "a", "answers": ["x", "y", "x"]}, "answer 3 stands there twice"),
    ],
)
def test_a_line_that_is_no_record_is_refused(kind, line, said):
    with pytest.raises(ValueError) as error:
        records.PARSERS[kind](line)
    assert said in str(error.value)
