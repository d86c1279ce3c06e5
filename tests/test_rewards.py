"""Verifiable rewards: what passes, what does not, and what is not judged."""

import functools

import pytest

from jaxrl_llm import rewards
from jaxrl_llm.data.records import Prompt
from jaxrl_llm.training.reward_fns import check_entries, of_text, rewards_of
from tests.training.test_reward_fns import Words, drawn_of


def of(function, *texts, **columns):
    return function(["?"] * len(texts), list(texts), **columns)


def test_exact_match_is_of_the_answer_alone():
    texts = (" yes \n", "Yes", "so <answer> yes </answer> is it", "<answer>no</answer> <answer>yes</answer>", "y")
    assert of(rewards.exact_match, *texts, solution=["yes"] * 5) == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert of(rewards.exact_match, r"then \boxed{x^{2}} or", r"\boxed{1", solution=["x^{2}", r"\boxed{1"]) == [1.0, 1.0]
    assert of(rewards.exact_match, "4", "4", "4", solution=[None, 4, None], answer=[4, 5, None]) == [1.0, 1.0, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("it costs $1,234.50.", 1234.5),
        ("5-3", 3),
        ("1,2,3", 3),
        ("x = -4", -4),
        ("(−0.5)", -0.5),
        ("no", None),
        ("3.", 3),
        ("1e-3", 0.001),
        ("-.25", -0.25),
        ("1,234,567 or 12,34", 34),
        ("gpt-4", 4),
        ("... #### 42", 42),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert rewards.last_number(text) == value


def test_numbers_are_equal_up_to_a_tolerance():
    texts = ("it is 41.9, I think", "<answer>42</answer> of 43", "none", "42.00001")
    assert of(rewards.number, *texts, answer=["6 · 7 = 42"] * 4) == [0.0, 1.0, 0.0, 1.0]
    near = functools.partial(rewards.number, tolerance=0.01)
    assert of(near, *texts, solution=[42, 42, 42, None]) == [1.0, 1.0, 0.0, None]
    assert of(rewards.number, *texts[:2], solution=["42"] * 2, tolerance=[1.0, None]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="number: a solution must hold a number, but is 'many'"):
        of(rewards.number, "1", solution=["many"])


def test_the_last_choice_that_is_named():
    texts = ("Not A, but (B).", "B", "Both", "B? No: A")
    assert of(rewards.choice, *texts, solution=["B"] * 4) == [1.0, 1.0, 0.0, 0.0]
    lines = [["red", "dark red"], ["blue", "red"], None]
    found = of(rewards.choice, "it is dark red", "blue, or red", "C", solution=["dark red", "blue", "C"], choices=lines)
    assert found == [1.0, 0.0, 1.0]
    assert of(rewards.choice, "yes!", "no", solution=["yes", "yes"], choices=["yes", "no"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="choice: a solution must be one of A, B, C, D, E, but is 'F'"):
        of(rewards.choice, "F", solution=["F"])


def test_formats_are_of_the_whole_text_and_patterns_of_any_part():
    good = "<think>\n1 + 1\n</think>\n<answer>2</answer>\n"
    bad = (good + "so", good.replace("think", "thought"), "<answer>2</answer>", good + good)
    assert of(rewards.tags, good, *bad) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert of(functools.partial(rewards.tags, elements=["answer"]), *bad) == [0.0, 0.0, 1.0, 0.0]
    assert of(rewards.regex, "a\nb", "ab", "c", pattern=["a.b", "a.b", None]) == [1.0, 0.0, None]
    assert of(functools.partial(rewards.regex, pattern="^a"), "ab", "ba") == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"regex: the pattern '\(' is not a regular expression"):
        of(rewards.regex, "a", pattern="(")


def test_a_trainer_gives_them_the_entries_and_looks_for_them_before_it_begins():
    records = [Prompt("a", {"solution": "0 0"}), Prompt("b", {"solution": None})]
    found = rewards_of(of_text(rewards.exact_match, Words(), records=records), drawn_of(4))
    assert found.tolist()[:2] == [1.0, 1.0] and str(found[2]) == "nan"
    nothing = [Prompt("a", {"gold": 1})]
    for function in (rewards.exact_match, rewards.number, functools.partial(rewards.choice, choices=["x"])):
        with pytest.raises(ValueError, match="takes solution or answer, but the data have gold"):
            check_entries(function, nothing)
    check_entries(rewards.tags, nothing)
    check_entries(functools.partial(rewards.number, solution=[4]), nothing)
    with pytest.raises(ValueError, match="exact_match needs an entry `solution` or `answer` beside each prompt"):
        of(rewards.exact_match, "a")
