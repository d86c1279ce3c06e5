"""Answers of a language model: questions as tokens, and log-probabilities of their answers in batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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
    """Log-probabilities of the measured answer and of the others together, in nats; NaN where a question is too long.

    `letters` are those of their labels as next tokens after " (", `words` of the answers in words, summed over tokens.
    """

    letters: Float[np.ndarray, "question answer"]
    words: Float[np.ndarray, "question answer"]


class ModelSource:
    """A loaded model that answers questions. Equal questions are read once.

    Args:
        chat: whether questions are put in the model's chat template, if it has one.
        batch_size: prefixes of questions that are read at a time.
        progress: whether to draw a progress bar.

    Raises:
        TypeError: if the model is not loaded.
        ValueError: if the model is an encoder-decoder, or has no tokenizer.
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
        if isinstance(loaded.model, T5):
            raise ValueError(f"{name} must be a decoder-only model, but is an encoder-decoder, which translates.")
        if loaded.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer files, so that text cannot be turned into tokens.")
        self.name, self.loaded, self.chat = name, loaded, chat
        self.batch_size, self.progress = batch_size, progress

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """Return the log-probabilities of the answers by letters and by words.

        Raises:
            ValueError: if the tokenizer splits a letter or does not know it.
            FloatingPointError: if the model computes NaN.
        """
        tokens = label_tokens(self.loaded.tokenizer, sorted({letter for each in asked for letter in each.item.letters}))
        letters = [
            Choices(
                encode(self.loaded.tokenizer, each.item.question, LETTER_LEAD, chat=self.chat),
                [[tokens[letter]] for letter in each.item.letters],
            )
            for each in asked
        ]
        worded = [self.row(*words(each.item)) for each in asked]
        found = self.log_probs([*letters, *worded])
        return Answers(*(against_others(part, asked) for part in (found[: len(asked)], found[len(asked) :])))

    def row(self, prompt: str | Sequence[Mapping[str, str]], lead: str, answers: Sequence[str]) -> Choices:
        """Return a question or conversation, and texts that answer it, as tokens; an answer begins with `lead`."""
        return answered_row(self.loaded.tokenizer, prompt, lead, answers, chat=self.chat)

    def log_probs(self, rows: Sequence[Choices]) -> list[Float[np.ndarray, "answer"]]:
        """Return those of each row's answers, in nats; NaN where one is longer than the model's context.

        Raises:
            FloatingPointError: if the model computes NaN.
        """
        lm, params = self.loaded.model, self.loaded.params
        short = [row for row in rows if row.length <= lm.max_length]
        with on_mesh_of(params):
            found = answer_log_probs(lm, params, short, batch_size=self.batch_size, progress=self.progress)
        broken = sum(bool(np.isnan(each).any()) for each in found)
        if broken:
            raise FloatingPointError(
                f"{self.name} computes NaN for {broken} of the {len(found)} questions that fit its context."
            )
        scores = iter(found)
        return [next(scores) if row.length <= lm.max_length else np.full(len(row.answers), np.nan) for row in rows]


def against_others(
    log_probs: Sequence[Float[np.ndarray, "answer"]], asked: Sequence[Asked]
) -> Float[np.ndarray, "question 2"]:
    """Return the log-probabilities of the measured answers, and of the sums of all others.

    Args:
        log_probs: of each question's answers with the item's letters, in their order.
    """
    pairs = []
    for row, each in zip(log_probs, asked, strict=True):
        place = each.item.letters.index(each.letter)
        with np.errstate(invalid="ignore"):  # of NaN
            pairs.append([row[place], np.logaddexp.reduce(np.delete(row, place))])
    return np.asarray(pairs, float).reshape(-1, 2)


def label_tokens(tokenizer: Any, letters: Sequence[str]) -> dict[str, int]:
    """Return the token with which a model continues " (" to name each label, in one form for all of them.

    The letter as it follows " (" is tried first, then with a space before it, then both by themselves: SentencePiece
    tokenizers write the first word of a text differently from later ones.

    Raises:
        ValueError: if there is no form in which the tokenizer has each letter as one token.
    """
    for before, space in itertools.product((LETTER_LEAD, ""), ("", " ")):
        tokens = {letter: _label_token(tokenizer, before, space + letter) for letter in letters}
        if None not in tokens.values():
            return tokens
    pieces = [[tokenizer.decode([token]) for token in _plain(tokenizer, letter)] for letter in letters]
    raise ValueError(
        f"the labels {', '.join(letters)} must be one token each, all with or all without a space, but are "
        f"{', '.join(map(str, pieces))}."
    )


def _label_token(tokenizer: Any, before: str, label: str) -> int | None:
    """Return the token of a label after a text, None if it has none of its own."""
    given, joined = _plain(tokenizer, before) if before else [], _plain(tokenizer, before + label)
    tokens = joined[len(given) :]
    whole = joined[: len(given)] == given and len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id
    return tokens[0] if whole and tokenizer.decode(tokens).strip() == label.strip() else None


def _plain(tokenizer: Any, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def answered_row(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], lead: str, answers: Sequence[str], *, chat: bool = True
) -> Choices:
    """Return the tokens of a question and of each answer after `lead`; all begin where the first one differs.

    Raises:
        ValueError: if an answer has no token of its own.
    """
    given = encode(tokenizer, prompt, lead, chat=chat)
    wholes = [encode(tokenizer, prompt, lead + answer, chat=chat) for answer in answers]
    while any(whole[: len(given)] != given for whole in wholes):  # a token reaches over the seam
        given = given[:-1]
    tails = [whole[len(given) :] for whole in wholes]
    if not all(tails):
        raise ValueError(f"an answer adds no token to the question: {answers[tails.index([])]!r}.")
    return Choices(given, tails)


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
