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
    """`label_tokens` of one letter."""
    return label_tokens(tokenizer, [letter])[letter]


def label_tokens(tokenizer: Any, letters: Sequence[str]) -> dict[str, int]:
    """The token by which a model goes on after " (" to name each label, in one form for all of them.

    The letter as it follows " (" is tried first, then with a space before it, then both by themselves: tokenizers of
    SentencePiece's kind write the first word of a text otherwise than one within.

    Raises:
        ValueError: if the tokenizer splits a letter or does not know it, or there is no one form for all.
    """
    forms = [(before, space) for before in (LETTER_LEAD, "") for space in ("", " ")]
    found = [{letter: _label(tokenizer, before, space + letter) for letter in letters} for before, space in forms]
    for tokens in found:
        if None not in tokens.values():
            return tokens
    for letter in letters:
        if all(tokens[letter] is None for tokens in found):
            pieces = _plain(tokenizer, letter)
            known = "does not know it" if len(pieces) < 2 else f"splits it into {len(pieces)}"
            raise ValueError(
                f"the label {letter} must be one token, with or without a space, but the tokenizer {known}."
            )
    raise ValueError(
        f"the labels {', '.join(letters)} must be one token each, but the tokenizer has no one form for all."
    )


def _label(tokenizer: Any, before: str, label: str) -> int | None:
    """The token of a label behind a text, None if it is none of its own."""
    given, joined = _plain(tokenizer, before) if before else [], _plain(tokenizer, before + label)
    tokens = joined[len(given) :]
    whole = joined[: len(given)] == given and len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id
    return tokens[0] if whole and tokenizer.decode(tokens).strip() == label.strip() else None


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
    return _answered(lambda answer: _unended(tokenizer, text.encode(tokenizer, probe.text() + answer)), probe.answers)


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
    return _unended(tokenizer, text.encode(tokenizer, question, chat=bool(tokenizer.chat_template), lead=lead))


def _unended(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Without the EOS that some tokenizers put behind every text: the answer is to go on."""
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id else tokens


def _plain(tokenizer: Any, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]
