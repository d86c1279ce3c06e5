"""Questions as tokens: the model's chat template around them, how an answer begins, and what the answers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxrl_llm import text
from jaxrl_llm.data.sycophancy.probes import Probe

LETTER_LEAD = " ("  # what an answer by its letter begins with


class Row(NamedTuple):
    """The tokens of a question, and of each of its answers."""

    given: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the question with its longest answer, whose last one is not read."""
        return len(self.given) + max(map(len, self.answers)) - 1


def label_token(tokenizer: Any, letter: str) -> int:
    """The token by which a model goes on after " (" to name a label.

    The letter as it follows " (" is tried first, then with a space before it, then both by themselves: tokenizers of
    SentencePiece's kind write the first word of a text otherwise than one within.

    Raises:
        ValueError: if the tokenizer splits the letter or does not know it.
    """
    before = _plain(tokenizer, LETTER_LEAD)
    seen = []
    for form in (letter, f" {letter}"):
        joined = _plain(tokenizer, LETTER_LEAD + form)
        seen += [joined[len(before) :]] if joined[: len(before)] == before else []
    seen += [_plain(tokenizer, form) for form in (letter, f" {letter}")]
    for tokens in seen:
        if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id and tokenizer.decode(tokens).strip() == letter:
            return tokens[0]
    pieces = _plain(tokenizer, letter)
    known = "does not know it" if len(pieces) < 2 else f"splits it into {len(pieces)}"
    raise ValueError(f"the label {letter} must be one token, with or without a space, but the tokenizer {known}.")


def label_tokens(tokenizer: Any, letters: Sequence[str]) -> dict[str, int]:
    """`label_token` of each letter."""
    return {letter: label_token(tokenizer, letter) for letter in letters}


def letter_row(tokenizer: Any, question: str, tokens: Sequence[int]) -> Row:
    """The question in the chat template if there is one, `" ("` appended, and each label's token as an answer."""
    return Row(_opened(tokenizer, question, LETTER_LEAD), [[token] for token in tokens])


def word_row(tokenizer: Any, question: str, lead: str, answers: Sequence[str]) -> Row:
    """The question in the chat template if there is one, `lead` appended, and each text as an answer.

    Raises:
        ValueError: if an answer has no token of its own.
    """
    return _answered(lambda answer: _opened(tokenizer, question, lead + answer), answers)


def probe_row(tokenizer: Any, probe: Probe) -> Row:
    """A probe's conversation in the chat template, or as plain text, with its two answers."""
    if tokenizer.chat_template:
        return _answered(
            lambda answer: text.encode(tokenizer, probe.messages, chat=True, lead=probe.lead + answer), probe.answers
        )
    return _answered(lambda answer: text.encode(tokenizer, probe.text() + answer), probe.answers)


def _answered(tokens: Callable[[str], list[int]], answers: Sequence[str]) -> Row:
    """Each answer's tokens behind those of no answer; all begin where the first of them differs from it."""
    given, wholes = tokens(""), [tokens(answer) for answer in answers]
    while any(whole[: len(given)] != given for whole in wholes):  # a token reaches over the seam
        given = given[:-1]
    answered = [whole[len(given) :] for whole in wholes]
    if not all(answered):
        raise ValueError(f"an answer adds no token to the question: {answers[answered.index([])]!r}.")
    return Row(given, answered)


def _opened(tokenizer: Any, question: str, lead: str) -> list[int]:
    return text.encode(tokenizer, question, chat=bool(tokenizer.chat_template), lead=lead)


def _plain(tokenizer: Any, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]
