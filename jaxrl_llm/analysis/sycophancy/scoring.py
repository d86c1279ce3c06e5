"""Answers of a language model: questions as tokens, and log-probabilities of their answers in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxrl_llm import text
from jaxrl_llm.analysis.sycophancy.questions import Asked, words
from jaxrl_llm.mesh import on_mesh_of
from jaxrl_llm.models import T5, Loaded
from jaxrl_llm.options import check_type
from jaxrl_llm.scoring import Choices, answer_log_probs

LETTER_LEAD = " ("  # the beginning of an answer by its letter
SPEAKERS = {"user": "Question", "assistant": "Answer"}  # of a conversation as plain text


class Answers(NamedTuple):
    """Log-probabilities of the matching answer and of the others together, in nats; NaN where a question is too long.

    `letters` are those of their labels as next tokens after " (", `words` of the answers in words, summed over tokens.
    """

    letters: Float[np.ndarray, "question answer"]
    words: Float[np.ndarray, "question answer"]


@dataclass
class ModelSource:
    """A loaded model that answers questions. Equal questions are read once.

    Raises:
        TypeError: if the model is not loaded.
        ValueError: if the model is an encoder-decoder, or has no tokenizer.
    """

    loaded: Loaded
    _: KW_ONLY
    name: str = "the model"
    chat: bool = True
    """Put questions in the model's chat template, if it has one."""
    batch_size: int = 16
    """Prefixes of questions that are read at a time."""
    progress: bool = True
    """Draw a progress bar."""

    def __post_init__(self):
        check_type("the model", self.loaded, Loaded, "a loaded one, such as models.load(...)")
        if isinstance(self.loaded.model, T5):
            raise ValueError(f"{self.name} must be a decoder-only model, but is an encoder-decoder, which translates.")
        if self.loaded.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer files, so that text cannot be turned into tokens.")

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """Return the log-probabilities of the answers by letters and by words.

        Raises:
            ValueError: if the tokenizer splits a letter or does not know it.
            FloatingPointError: if the model computes NaN.
        """
        tokenizer = self.loaded.tokenizer
        tokens = label_tokens(tokenizer, sorted({letter for each in asked for letter in each.item.letters}))
        letters = [
            Choices(
                encode(tokenizer, each.item.question, LETTER_LEAD, chat=self.chat),
                [[tokens[letter]] for letter in each.item.letters],
            )
            for each in asked
        ]
        found = self.log_probs([*letters, *(self.row(*words(each.item)) for each in asked)])
        return Answers(against_others(found[: len(asked)]), against_others(found[len(asked) :]))

    def row(self, prompt: str | Sequence[Mapping[str, str]], lead: str, answers: Sequence[str]) -> Choices:
        """Return the tokens of a question and of each answer after `lead`; all begin where the first one differs.

        Args:
            prompt: a question, or a conversation that ends with one.

        Raises:
            ValueError: if an answer has no token of its own.
        """
        given, *wholes = (
            encode(self.loaded.tokenizer, prompt, lead + answer, chat=self.chat) for answer in ("", *answers)
        )
        while any(whole[: len(given)] != given for whole in wholes):  # a token reaches over the seam
            given = given[:-1]
        tails = [whole[len(given) :] for whole in wholes]
        if not all(tails):
            raise ValueError(f"an answer adds no token to the question: {answers[tails.index([])]!r}.")
        return Choices(given, tails)

    def log_probs(self, rows: Sequence[Choices]) -> list[Float[np.ndarray, "answer"]]:
        """Return those of each row's answers, in nats; NaN where one is longer than the model's context.

        Raises:
            FloatingPointError: if the model computes NaN.
        """
        lm, params = self.loaded.model, self.loaded.params
        short = [row for row in rows if row.length <= lm.max_length]
        with on_mesh_of(params):
            found = answer_log_probs(lm, params, short, batch_size=self.batch_size, progress=self.progress)
        if broken := sum(bool(np.isnan(each).any()) for each in found):
            raise FloatingPointError(
                f"{self.name} computes NaN for {broken} of the {len(found)} questions that fit its context."
            )
        scores = iter(found)
        return [next(scores) if row.length <= lm.max_length else np.full(len(row.answers), np.nan) for row in rows]


def against_others(log_probs: Sequence[Float[np.ndarray, "answer"]]) -> Float[np.ndarray, "question 2"]:
    """Return the log-probability of the first answer to each question, and that of all others together."""
    with np.errstate(invalid="ignore"):  # of NaN
        pairs = [(row[0], np.logaddexp.reduce(row[1:])) for row in log_probs]
    return np.reshape(pairs, (-1, 2))


def label_tokens(tokenizer: Any, letters: Sequence[str]) -> dict[str, int]:
    """Return the token with which a model names each label after " (": the letter, or all letters after a space.

    Raises:
        ValueError: if there is no form in which the tokenizer has each letter as one token.
    """
    for space in ("", " "):
        found = text.continuations(tokenizer, [space + letter for letter in letters])
        if all(len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id for tokens in found) and all(
            tokenizer.decode(tokens).strip() == letter for tokens, letter in zip(found, letters, strict=True)
        ):
            return {letter: token for letter, (token,) in zip(letters, found, strict=True)}
    pieces = [[tokenizer.decode([token]) for token in tokens] for tokens in text.continuations(tokenizer, letters)]
    raise ValueError(
        f"the labels {', '.join(letters)} must be one token each, all with or all without a space, but are "
        f"{', '.join(map(str, pieces))}."
    )


def encode(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], lead: str, *, chat: bool = True) -> list[int]:
    """Return the tokens of a prompt in the chat template, if there is one, or as plain text, with `lead` appended.

    An EOS token that the tokenizer puts after every plain text is removed: the answer is to continue it.
    """
    if chat and tokenizer.chat_template:
        return text.encode(tokenizer, prompt, chat=True, lead=lead)
    if not isinstance(prompt, str):
        turns = [f"{SPEAKERS[message['role']]}: {message['content']}\n" for message in prompt]
        prompt = "".join(turns) + f"{SPEAKERS['assistant']}: "
    tokens = text.encode(tokenizer, prompt, lead=lead)
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id else tokens
