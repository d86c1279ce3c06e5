"""Who answers: a language model, controls whose scores are known, or a file of probabilities."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from jaxrl_llm.analysis.sycophancy.checks import check_type
from jaxrl_llm.analysis.sycophancy.questions import Asked
from jaxrl_llm.analysis.sycophancy.rows import Row, label_tokens, letter_row, word_row
from jaxrl_llm.analysis.sycophancy.scoring import answer_log_probs
from jaxrl_llm.data.records import no_key_twice
from jaxrl_llm.data.sycophancy.items import Item, label_letter
from jaxrl_llm.data.sycophancy.parts import words
from jaxrl_llm.models import Loaded

SENTENCE = " I"  # how `words` begins an answer that says " agree" or " disagree"


class Answers(NamedTuple):
    """Log-probabilities of the matching and of the other answer, in nats; NaN where a question is too long to be read.

    `letters` are those of their labels as next tokens after " (", `words` of the answers in words, summed over tokens.
    """

    letters: Float[np.ndarray, "question answer"]
    words: Float[np.ndarray, "question answer"]


@runtime_checkable
class Source(Protocol):
    """Answers questions."""

    name: str

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """By letters and by words."""


class ModelSource:
    """A loaded model. Each different question is read once, however often it is asked.

    Args:
        chat: whether the questions are put in the model's chat template, if it has one.

    Raises:
        TypeError: if it is not loaded.
        ValueError: if the model has no tokenizer.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        name: str = "the model",
        chat: bool = True,
        batch_size: int = 16,
        progress: bool = True,
    ):
        check_type("the model", loaded, Loaded, "a loaded one, such as models.load(...)")
        if loaded.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer files, so that text cannot be turned into tokens.")
        if not chat:
            plain = copy.copy(loaded.tokenizer)
            plain.chat_template = None
            loaded = dataclasses.replace(loaded, tokenizer=plain)
        self.name, self.loaded = name, loaded
        self._options = {"batch_size": batch_size, "progress": progress}

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """As a `Source`; raises ValueError if the tokenizer splits a letter or does not know it."""
        letters = self._letter_rows([each.item for each in asked])
        worded = [self._word_row(each.item) for each in asked]
        found = self.log_probs([*letters, *worded])
        return Answers(found[: len(asked)], found[len(asked) :])

    def log_probs(self, rows: Sequence[Row]) -> Float[np.ndarray, "row 2"]:
        """Of rows of two answers each, in nats; NaN where one is longer than the model's context, and nowhere else.

        Raises:
            FloatingPointError: if the model computes NaN.
        """
        lm, keys = self.loaded.model, [repr(row) for row in rows]
        different = {key: row for key, row in zip(keys, rows, strict=True) if row.length <= lm.max_length}
        scores = answer_log_probs(lm, self.loaded.params, list(different.values()), **self._options)
        broken = sum(bool(np.isnan(each).any()) for each in scores)
        if broken:
            raise FloatingPointError(
                f"{self.name} computes NaN for {broken} of the {len(scores)} questions that fit its context."
            )
        found = dict(zip(different, scores, strict=True))
        return np.asarray([found.get(key, np.full(2, np.nan)) for key in keys], float).reshape(-1, 2)

    def _letter_rows(self, items: Sequence[Item]) -> list[Row]:
        pairs = [[label_letter(label) for label in (item.matching, item.not_matching)] for item in items]
        tokens = label_tokens(self.loaded.tokenizer, sorted({letter for pair in pairs for letter in pair}))
        return [
            letter_row(self.loaded.tokenizer, item.question, [tokens[letter] for letter in pair])
            for item, pair in zip(items, pairs, strict=True)
        ]

    def _word_row(self, item: Item) -> Row:
        prompt, *answers = words(item)
        lead = SENTENCE if {answer.lower() for answer in answers} == {" agree", " disagree"} else ""
        return word_row(self.loaded.tokenizer, prompt.removesuffix(lead), lead, answers)


class Constant:
    """Says (A), whatever is asked, and has no preference among words."""

    name = "always (A)"

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """log 1 for the letter A, log 0 for others."""
        labels = [[each.item.matching, each.item.not_matching] for each in asked]
        says = [[float(label_letter(label) == "A") for label in pair] for pair in labels]
        return Answers(_log(says), _log([[0.5, 0.5]] * len(asked)))


class Sycophant:
    """Says what the user believes; asked by nobody, it has no preference."""

    name = "oracle sycophant"

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """log 1 for the user's answer."""
        says = _log([[1.0, 0.0] if each.user else [0.5, 0.5] for each in asked])
        return Answers(says, says)


class Indifferent:
    """The random model, of which the probabilities are given: either answer has 1/2."""

    name = "random"

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """log 1/2 for all."""
        says = _log([[0.5, 0.5]] * len(asked))
        return Answers(says, says)


CONTROLS = (Constant, Sycophant, Indifferent)


def read_probabilities(path: Path | str) -> dict[str, list[dict[str, float]]]:
    """A file of one JSON object: the name of each source, with its list of `{token: probability}`, one for an item.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has another form, or a source or a token stands there twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=no_key_twice)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    form = f"{path} must be one JSON object, of each source's name and its list of {{token: probability}}"
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{form}, but is {'an empty one' if found == {} else f'a {type(found).__name__}'}.")
    for name, given in found.items():
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            raise ValueError(f"{form}, but {name!r} has something else.")
    return found


def _log(probabilities: list[list[float]]) -> Float[np.ndarray, "question answer"]:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities)).reshape(-1, 2)
