"""Between text and tokens: ragged batches of prompts, and text that is printed while it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


def encode(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """The tokens of a prompt; with `chat`, of the prompt as a user's message in the model's chat template.

    An empty prompt is the beginning of a text: the tokenizer's BOS token.

    Raises:
        ValueError: if the tokenizer has no chat template, or no BOS token to stand for an empty prompt.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("this model has no chat template: it is not an instruct model.")
        message = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template has written BOS itself
    tokens = tokenizer(prompt)["input_ids"]
    if not tokens and tokenizer.bos_token_id is None:
        raise ValueError("the prompt is empty, and the tokenizer has no BOS token to start a text with.")
    return tokens or [tokenizer.bos_token_id]


def eos_ids(tokenizer: Any, config: dict[str, Any]) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's `config.json` (one or a list).

    Small models often declare the ending token of the large vocabulary that they were not given: it counts for nothing.
    """
    declared = config.get("eos_token_id")
    declared = declared if isinstance(declared, list) else [declared]
    known = {token for token in (tokenizer.eos_token_id, *declared) if token is not None}
    return sorted(token for token in known if token < config["vocab_size"])


def left_pad(
    rows: Sequence[Sequence[int]], *, pad_id: int = 0
) -> tuple[Int[np.ndarray, "batch time"], Bool[np.ndarray, "batch time"]]:
    """Rows of unequal length as one array, padded on the left, and its mask."""
    length = max(map(len, rows), default=0)
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask


class TextStream:
    """Turns tokens that come in pieces into text in pieces, never a part of a character.

    Args:
        prompt: the tokens before them, whose text is not given again. SentencePiece drops the space before the first
            word of a text; with the prompt in front, a continuation keeps its own.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = [int(token) for token in prompt]
        self._printed = len(self._text())

    def push(self, tokens: Sequence[int]) -> str:
        """The text that the new tokens complete."""
        self._tokens += [int(token) for token in tokens]
        # A character whose bytes are not all there yet decodes to U+FFFD at the end: it waits.
        return self._emit(self._text().rstrip("\ufffd"))

    def finish(self) -> str:
        """What is left, complete or not."""
        return self._emit(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _emit(self, text: str) -> str:
        new, self._printed = text[self._printed :], max(self._printed, len(text))
        return new
