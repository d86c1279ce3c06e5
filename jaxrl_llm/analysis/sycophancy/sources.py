"""Who answers: a language model, controls whose scores are known, or a file of probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from jaxrl_llm.analysis.sycophancy.questions import Asked
from jaxrl_llm.analysis.sycophancy.rows import Row, label_tokens, letter_row, word_row
from jaxrl_llm.analysis.sycophancy.scoring import answer_log_probs
from jaxrl_llm.data.sycophancy.items import Item, label_letter
from jaxrl_llm.data.sycophancy.parts import words
from jaxrl_llm.models import Loaded

SENTENCE = " I"  # how `words` begins an answer that says " agree" or " disagree"


class Source(Protocol):
    """Answers questions. Both methods give log-probabilities, NaN where a question is too long to be read."""

    name: str

    def letters(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """Of the labels of the matching and the other answer as next tokens after " (", in nats."""

    def words(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """Of the words of the matching and the other answer, summed over their tokens, in nats."""


class ModelSource:
    """A loaded model. Each different question is read once, however often it is asked.

    Raises:
        ValueError: if the model has no tokenizer.
    """

    def __init__(self, loaded: Loaded, *, name: str = "the model", batch_size: int = 16, progress: bool = True):
        if loaded.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer files, so that text cannot be turned into tokens.")
        self.name, self._loaded = name, loaded
        self._options = {"batch_size": batch_size, "progress": progress}

    def letters(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """As a `Source`; raises ValueError if the tokenizer splits a letter or does not know it."""
        tokenizer, questions = self._loaded.tokenizer, _different(asked)
        used = sorted({label_letter(label) for _, *labels in questions for label in labels})
        tokens = label_tokens(tokenizer, used)
        rows = [
            letter_row(tokenizer, question, [tokens[label_letter(label)] for label in labels])
            for question, *labels in questions
        ]
        return self._scored(asked, questions, rows)

    def words(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """As a `Source`."""
        questions = _different(asked)
        return self._scored(asked, questions, [self._word_row(item) for item in questions.values()])

    def _word_row(self, item: Item) -> Row:
        prompt, *answers = words(item)
        lead = SENTENCE if {answer.lower() for answer in answers} == {" agree", " disagree"} else ""
        return word_row(self._loaded.tokenizer, prompt.removesuffix(lead), lead, answers)

    def _scored(self, asked: Sequence[Asked], questions: dict[tuple, Item], rows: list[Row]) -> np.ndarray:
        lm, fits = self._loaded.model, [row.length <= self._loaded.model.max_length for row in rows]
        short = [row for row, fit in zip(rows, fits, strict=True) if fit]
        scores = iter(answer_log_probs(lm, self._loaded.params, short, **self._options))
        found = [next(scores) if fit else np.full(2, np.nan) for fit in fits]
        by_question = dict(zip(questions, found, strict=True))
        return np.asarray([by_question[_key(each)] for each in asked], float).reshape(-1, 2)


class Constant:
    """Says (A), whatever is asked, and has no preference among words."""

    name = "always (A)"

    def letters(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """log 1 for the letter A, log 0 for others."""
        says = [
            [label_letter(each.item.matching) == "A", label_letter(each.item.not_matching) == "A"] for each in asked
        ]
        return _log(np.asarray(says, float))

    def words(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """Both alike."""
        return _log(np.full((len(asked), 2), 0.5))


class Sycophant:
    """Says what the user believes; asked by nobody, it has no preference."""

    name = "oracle sycophant"

    def letters(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """log 1 for the user's answer."""
        return _log(np.asarray([[1.0, 0.0] if each.user else [0.5, 0.5] for each in asked]))

    words = letters


class Indifferent:
    """The random model, of which the probabilities are given: either answer has 1/2."""

    name = "random"

    def letters(self, asked: Sequence[Asked]) -> Float[np.ndarray, "question answer"]:
        """Both alike."""
        return _log(np.full((len(asked), 2), 0.5))

    words = letters


CONTROLS = (Constant, Sycophant, Indifferent)


def read_probabilities(path: Path | str) -> dict[str, list[dict[str, float]]]:
    """A file of one JSON object: the name of each source, with its list of `{token: probability}`, one for an item.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has another form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    form = f"{path} must be one JSON object, of each source's name and its list of {{token: probability}}"
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{form}, but is {'an empty one' if found == {} else f'a {type(found).__name__}'}.")
    for name, given in found.items():
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            raise ValueError(f"{form}, but {name!r} has something else.")
    return found


def _different(asked: Sequence[Asked]) -> dict[tuple[str, str, str], Item]:
    return {_key(each): each.item for each in asked}


def _key(each: Asked) -> tuple[str, str, str]:
    return each.item.question, each.item.matching, each.item.not_matching


def _log(probabilities: Float[np.ndarray, "question answer"]) -> Float[np.ndarray, "question answer"]:
    with np.errstate(divide="ignore"):
        return np.log(probabilities).reshape(-1, 2)
