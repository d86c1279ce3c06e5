"""Between text and tokens: ragged batches of prompts, and text that is printed while it is generated."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


def encode(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], *, chat: bool = False, lead: str = ""
) -> list[int]:
    """Return the tokens of a prompt; with `chat`, of the prompt as a user's message in the model's chat template.

    With `chat` it may also be a conversation: messages with `role` and `content`. An empty prompt is the beginning of a
    text: the tokenizer's BOS token. `lead` is the beginning of the completion.

    Raises:
        ValueError: if the tokenizer has no chat template, or no BOS token to stand for an empty prompt.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("this model has no chat template: it is not an instruct model.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(rendered + lead, add_special_tokens=False)["input_ids"]  # the template has written BOS itself
    tokens = tokenizer(prompt + lead)["input_ids"]
    if not tokens and tokenizer.bos_token_id is None:
        raise ValueError("the prompt is empty, and the tokenizer has no BOS token to start a text with.")
    return tokens or [tokenizer.bos_token_id]


def eos_ids(tokenizer: Any, config: dict[str, Any]) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's `config.json` (one or a list).

    Small models often declare the EOS token of a larger vocabulary than theirs: it is left out.

    Args:
        tokenizer: of Hugging Face's kind, or None.
        config: with `vocab_size`.
    """
    declared = config.get("eos_token_id")
    declared = declared if isinstance(declared, list) else [declared]
    known = {token for token in (getattr(tokenizer, "eos_token_id", None), *declared) if token is not None}
    return sorted(token for token in known if token < config["vocab_size"])


def left_pad(
    rows: Sequence[Sequence[int]], *, length: int = 0, pad_id: int = 0
) -> tuple[Int[np.ndarray, "batch time"], Bool[np.ndarray, "batch time"]]:
    """Return ragged rows as one array, padded on the left to the longest or to `length`, and its mask."""
    return _pad(rows, length, pad_id, left=True)


def right_pad(
    rows: Sequence[Sequence[int]], *, length: int = 0, pad_id: int = 0
) -> tuple[Int[np.ndarray, "batch time"], Bool[np.ndarray, "batch time"]]:
    """Return ragged rows as one array, padded on the right to the longest or to `length`, and its mask."""
    return _pad(rows, length, pad_id, left=False)


def _pad(rows: Sequence[Sequence[int]], length: int, pad_id: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    length = max(length, *map(len, rows), 0)
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


def token_bytes(tokenizer: Any, vocab_size: int | None = None) -> list[bytes]:
    """Return the bytes that each token contributes to a text, in UTF-8: a token may hold a part of a character.

    Special tokens contribute no bytes, nor do ids that the tokenizer does not know. The bytes are those of a
    continuation: SentencePiece drops the space before the first word of a whole text.

    Args:
        tokenizer: of Hugging Face's kind, byte-level BPE (GPT-2, Llama 3) or SentencePiece (Llama 2).
        vocab_size: of the model, which may be larger than the tokenizer's.

    Raises:
        ValueError: for a tokenizer of another kind.
    """
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    special |= {number for number, token in added.items() if token.special}
    spelling = _spelling({token for token, number in vocabulary.items() if number not in added})
    pieces = [b""] * max(size, vocab_size or 0)
    for token, number in vocabulary.items():
        if number not in special:
            pieces[number] = str(added[number]).encode() if number in added else spelling(token)
    return pieces[:vocab_size]


def _spelling(tokens: set[str]) -> Callable[[str], bytes]:
    """Return the spelling of tokens: GPT-2's stand-ins for bytes, or SentencePiece's ▁ for a space and <0x0A>."""
    if any("▁" in token for token in tokens):
        return lambda token: (
            bytes([int(token[3:5], 16)])
            if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
            else token.replace("▁", " ").encode()
        )
    stand_ins = _byte_stand_ins()
    if not tokens >= stand_ins.keys() and not any(token.startswith("Ġ") for token in tokens):
        raise ValueError(
            "the tokenizer must be byte-level BPE or SentencePiece to know its tokens' bytes, but is neither."
        )
    return lambda token: bytes(map(stand_ins.get, token)) if stand_ins.keys() >= set(token) else token.encode()


@functools.cache
def _byte_stand_ins() -> dict[str, int]:
    """Return the character of each byte in byte-level BPE (Radford et al. 2019): itself, where it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def trim_at_stop(text: str, strings: Sequence[str]) -> str:
    """Return the text before the stop string that is complete first, if it contains one (of several, the longest).

    The result contains no stop string, and does not depend on how the text was split into tokens.

    Raises:
        ValueError: if a stop string is empty.
    """
    if isinstance(strings, str) or not all(strings):
        raise ValueError(f"stop strings must be given in a sequence and not be empty, but are {strings!r}.")
    places = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
    return text[: min(places)[1]] if places else text


class TextStream:
    """Turns tokens that come in pieces into text in pieces, never a part of a character.

    Args:
        prompt: the tokens before them, whose text is not given again. SentencePiece drops the space before the first
            word of a text; with the prompt in front, a continuation keeps its own.
        stop: strings that end the text; as in `trim_at_stop`, neither they nor anything after them is given.

    `stopped` says whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = [int(token) for token in prompt]
        self._start, self._printed, self.stopped = len(self._text()), 0, False

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that the new tokens complete."""
        self._tokens += [int(token) for token in tokens]
        # A character whose bytes are not all there yet decodes to U+FFFD at the end: it waits.
        new = self._trimmed(self._text().rstrip("\ufffd"))
        begun = [len(part) for part in self._beginnings() if new.endswith(part)]  # of a stop string: it waits too
        return self._emit(new if self.stopped else new[: len(new) - max(begun, default=0)])

    def finish(self) -> str:
        """Return the rest, complete or not."""
        return self._emit(self._trimmed(self._text()))

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _trimmed(self, text: str) -> str:
        new = trim_at_stop(text[self._start :], self._stop)
        self.stopped = len(new) < len(text) - self._start
        return new

    def _beginnings(self) -> list[str]:
        return [string[:length] for string in self._stop for length in range(1, len(string))]

    def _emit(self, new: str) -> str:
        piece, self._printed = new[self._printed :], max(self._printed, len(new))
        return piece
