"""Verifiable rewards: functions of text that check a completion against the entries of its prompt's line.

    jl.train.grpo(lm, [{"prompt": "2 + 2 =", "solution": "4"}] * 4, reward=jl.rewards.number)
    jaxrl-llm train grpo --data lines.jsonl --reward jaxrl_llm.rewards:number jaxrl_llm.rewards:tags ...

Each returns 1.0 for a completion that passes and 0.0 for one that does not. The right answer is the line's entry
`solution`, or `answer`; a completion whose line has none is not judged: its reward is None. Options in the signature
can be entries of the lines too, or be set by `functools.partial(number, tolerance=0.01)`.

A completion's own answer is the text in its last `<answer>` element, else in its last LaTeX box, else the whole text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

Rewards = list[float | None]
SIGN, THOUSANDS, DIGITS = r"(?:(?<![\w.])[-−])?", r"\d{1,3}(?:,\d{3})+(?![\d,])", r"\d+"
NUMBER = re.compile(rf"{SIGN}(?:(?<![\d.])(?:{THOUSANDS}|{DIGITS})(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<!\d)\.\d+)")
LETTERS = ("A", "B", "C", "D", "E")


def exact_match(
    prompts: Sequence[Any], completions: Sequence[str], *, solution: Any = None, answer: Any = None
) -> Rewards:
    """Reward a completion whose answer is the solution, apart from white space around both.

    Raises:
        ValueError: if no line has a solution.
    """
    return _judged("exact_match", completions, solution, answer, lambda given, right: given == right.strip())


def number(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    solution: Any = None,
    answer: Any = None,
    tolerance: float | Sequence[float | None] | None = None,
) -> Rewards:
    """Reward a completion in whose answer the last number is the last one of the solution.

    Thousands may be separated by commas. The entry `answer` of GSM8K, which ends in "#### 42", is such a solution.

    Args:
        tolerance: largest difference, relative to the larger of the two or absolute; by default 1e-6.

    Raises:
        ValueError: if no line has a solution, or a solution has no number.
    """

    def same(given: str, right: str, tolerance: float | None) -> bool:
        expected, found, within = last_number(right), last_number(given), 1e-6 if tolerance is None else tolerance
        if expected is None:
            raise ValueError(f"number: a solution must hold a number, but is {right!r}.")
        return found is not None and math.isclose(found, expected, rel_tol=within, abs_tol=within)

    return _judged("number", completions, solution, answer, same, tolerance=tolerance)


def choice(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    solution: Any = None,
    answer: Any = None,
    choices: Any = None,
) -> Rewards:
    """Reward a completion in whose answer the last of the choices that it names is the solution.

    A choice is named where it stands as words of their own: in "Not A, but (B)." the last one is B. Of two that end at
    the same place it is the longer one.

    Args:
        choices: strings, the same for all lines or a list for each line; by default the letters A to E.

    Raises:
        ValueError: if no line has a solution, or a solution is not one of the choices.
    """
    shared = choices is None or all(isinstance(each, str) for each in choices)
    of_lines = [LETTERS if choices is None else choices] * len(completions) if shared else choices

    def same(given: str, right: str, choices: Sequence[str] | None) -> bool:
        choices = LETTERS if choices is None else [str(each).strip() for each in choices]
        if right.strip() not in choices:
            raise ValueError(f"choice: a solution must be one of {', '.join(choices)}, but is {right!r}.")
        return last_choice(given, choices) == right.strip()

    return _judged("choice", completions, solution, answer, same, choices=of_lines)


def regex(prompts: Sequence[Any], completions: Sequence[str], *, pattern: str | Sequence[str | None]) -> Rewards:
    """Reward a completion in which a regular expression is found, by `re.search` with `re.DOTALL`.

    Args:
        pattern: in Python's syntax, the same for all lines or one for each line; None: the completion is not judged.

    Raises:
        ValueError: for a pattern that is not a regular expression.
    """
    try:
        return [
            None if each is None else float(re.search(each, completion, re.DOTALL) is not None)
            for completion, each in zip(completions, _column(pattern, len(completions)), strict=True)
        ]
    except re.error as error:
        raise ValueError(f"regex: the pattern {error.pattern!r} is not a regular expression: {error}.") from error


def tags(
    prompts: Sequence[Any], completions: Sequence[str], *, elements: Sequence[str] = ("think", "answer")
) -> Rewards:
    """Reward a completion that is `<think>...</think><answer>...</answer>` and nothing else but white space.

    Each tag must occur once. The end of the text may be the stop string "</answer>".

    Args:
        elements: names of the elements, in their order.
    """
    whole = re.compile(
        r"\s*" + r"\s*".join(f"<{each}>.*?</{each}>" for each in map(re.escape, elements)) + r"\s*", re.DOTALL
    )
    marks = [mark for each in elements for mark in (f"<{each}>", f"</{each}>")]
    return [
        float(whole.fullmatch(text) is not None and all(text.count(mark) == 1 for mark in marks))
        for text in completions
    ]


for _each in (exact_match, number, choice):
    _each.one_of = ("solution", "answer")  # a trainer looks for one of these entries before it begins


# Answers in texts -----------------------------------------------------------------------------------------------------


def answer_in(text: str) -> str:
    """Return the text in the last `<answer>` element, else in the last LaTeX box, else all, without space around."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL) or _boxed(text)
    return (found[-1] if found else text).strip()


def _boxed(text: str) -> list[str]:
    """Return what is in the last LaTeX box, whose braces may be nested; nothing if it is not closed."""
    start, depth = text.rfind("\\boxed{"), 0
    for place in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return [text[start + len("\\boxed{") : place]]
    return []


def last_number(text: str) -> float | None:
    """Return the last number in a text, such as 1234.5 in "it costs $1,234.50."; None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def last_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a text names last, as words of their own; None if it names none."""
    places = [
        (match.end(), len(each), each)
        for each in choices
        for match in re.finditer(rf"(?<!\w){re.escape(each)}(?!\w)", text)
    ]
    return max(places)[2] if places else None


def _judged(
    name: str, completions: Sequence[str], solution: Any, answer: Any, passes: Callable[..., bool], **columns: Any
) -> Rewards:
    """Return whether each completion's answer passes, None for those without a solution."""
    if solution is None and answer is None:
        raise ValueError(f"{name} needs an entry `solution` or `answer` beside each prompt, but there is none.")
    count = len(completions)
    solutions, answers = _column(solution, count), _column(answer, count)
    right = [second if first is None else first for first, second in zip(solutions, answers, strict=True)]
    further = {name: _column(column, count) for name, column in columns.items()}
    return [
        None
        if expected is None
        else float(passes(answer_in(text), str(expected), **{name: column[place] for name, column in further.items()}))
        for place, (text, expected) in enumerate(zip(completions, right, strict=True))
    ]


def _column(value: Any, count: int) -> Sequence[Any]:
    """Return one value for each completion."""
    return value if isinstance(value, list | tuple) else [value] * count
