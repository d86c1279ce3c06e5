"""Between text and tokens: prompts and chat templates, padding of ragged batches, and text printed while generated."""

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
        ValueError: if there is no chat template, if it refuses the conversation, or if there is no BOS token
            to stand for an empty prompt.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return rendered_tokens(tokenizer, render(tokenizer, messages, generation=True) + _plain(lead))
    check_characters(prompt, "the prompt")
    tokens = tokenizer(prompt + lead)["input_ids"]
    if not tokens and tokenizer.bos_token_id is None:
        raise ValueError("the prompt is empty, and the tokenizer has no BOS token to start a text with.")
    return tokens or [tokenizer.bos_token_id]


def check_characters(string: str, name: str) -> None:
    """Raise ValueError for a string that UTF-8 cannot encode: it holds a byte, or half a pair, that is no character."""
    try:
        string.encode()
    except UnicodeEncodeError as error:
        found = ord(string[error.start])
        what = f"the byte 0x{found - 0xDC00:02x}" if 0xDC80 <= found <= 0xDCFF else f"\\u{found:04x}"
        raise ValueError(f"{name} must be text in UTF-8, but holds {what} at character {error.start + 1}.") from None


QUOTE = ("\ue0f0", "\ue0f1")  # private characters, around a control token that stands in a message


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, generation: bool) -> str:
    """Return a conversation in the chat template, with control tokens inside of messages quoted.

    Args:
        generation: end with the beginning of the assistant's turn.

    Raises:
        ValueError: if the tokenizer has no chat template, or its template refuses the conversation.
    """
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template: it is not an instruct model.")
    quoted = [_quoted(tokenizer, dict(message)) for message in messages]
    try:
        return tokenizer.apply_chat_template(quoted, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, TypeError) as error:  # TypeError: as of a field that is undefined and added to a string
        raise ValueError(f"the chat template: {str(error).splitlines()[0]}") from error


def rendered_tokens(tokenizer: Any, string: str) -> list[int]:
    """Return the tokens of a text of `render`: control tokens are those of the template, not those of the messages."""
    tokens = []
    for index, part in enumerate(re.split("|".join(QUOTE), string)):  # every second part was quoted
        options = {"split_special_tokens": True} if index % 2 else {}
        tokens += tokenizer(part, add_special_tokens=False, **options)["input_ids"] if part else []
    return tokens  # the template has written BOS itself


def _quoted(tokenizer: Any, value: Any) -> Any:
    """Return a part of a message with its texts quoted, those in lists and objects too."""
    if isinstance(value, Mapping):
        return {name: _quoted(tokenizer, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(tokenizer, each) for each in value]
    return _quoted_text(tokenizer, value) if isinstance(value, str) else value


def _plain(string: str) -> str:
    """Return a string without the private characters of `QUOTE`."""
    return re.sub("|".join(QUOTE), "", string)


def control_ids(tokenizer: Any) -> dict[str, int]:
    """Return the id of each control token, such as `<|im_end|>`, by its content."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return ids | {token.content: number for number, token in added.items() if token.special}


def _quoted_text(tokenizer: Any, string: str) -> str:
    control = set(control_ids(tokenizer))
    string = _plain(string)
    if not any(token in string for token in control):
        return string
    longest_first = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
    return re.sub(longest_first, lambda match: QUOTE[0] + match[0] + QUOTE[1], string)


def eos_ids(tokenizer: Any, config: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a text: those of the tokenizer, of `config.json` and of `generation_config.json`.

    Small models often declare the EOS token of a larger vocabulary than theirs: it is left out.

    Args:
        tokenizer: of Hugging Face's kind, or None.
        config: with `vocab_size`; `generation_config` in it is the other file.

    Raises:
        ValueError: if an `eos_token_id` is not a token id or a list of them.
    """
    known = {getattr(tokenizer, "eos_token_id", None)}
    for declared in (config.get("eos_token_id"), (config.get("generation_config") or {}).get("eos_token_id")):
        ids = declared if isinstance(declared, list | tuple) else [declared]
        if wrong := [
            each for each in ids if each is not None and (isinstance(each, bool) or not isinstance(each, int))
        ]:
            raise ValueError(f"eos_token_id must be a token id or a list of them, but is {wrong[0]!r}.")
        known |= set(ids)
    return sorted(token for token in known if token is not None and 0 <= token < config["vocab_size"])


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
        unsearched: number of first tokens whose text is not searched for stop strings.
        reply: a text of its own, as a chat model's: a space that the tokenizer drops before its first word is dropped,
            after the search for stop strings.

    `stopped` says whether a stop string was found.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        unsearched: int = 0,
        reply: bool = False,
    ):
        self._tokenizer, self._stop, self.stopped = tokenizer, stop, False
        self._unsearched, self._reply, self._start = unsearched, reply, []  # the first tokens of a reply
        # Decoded anew at each push: some tokens that were read, on which the text of the next ones depends, and those.
        self._window = [int(token) for token in prompt]
        self._read = len(self._window)  # tokens of the window whose characters are complete
        self._seen = len(self._decoded().rstrip("\ufffd"))  # characters of the window's text that were taken
        self._held = ""  # taken, but not given yet: perhaps the beginning of a stop string

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that the new tokens complete."""
        first, rest = tokens[: self._unsearched], tokens[self._unsearched :]
        self._unsearched -= len(first)
        return (self._push(first, ()) if len(first) else "") + self._push(rest, self._stop)

    def _push(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        tokens = [int(token) for token in tokens]
        self._window += tokens
        self._start += tokens if self._reply else []
        text = self._decoded()
        # A character whose bytes are not all there yet decodes to U+FFFD at the end: it waits.
        complete = text.rstrip("\ufffd")
        self._take(complete, stop)
        if complete == text and (context := self._decoded(self._window[self._read :])):  # "": special tokens alone
            self._window = self._window[self._read :]
            self._read, self._seen = len(self._window), len(context)
        begun = [len(part) for part in _beginnings(stop) if self._held.endswith(part)]  # it waits too
        return self._give(0 if self.stopped else max(begun, default=0))

    def finish(self) -> str:
        """Return the rest, complete or not."""
        self._take(self._decoded(), () if self._unsearched else self._stop)
        return self._give(0)

    def _decoded(self, tokens: Sequence[int] | None = None) -> str:
        tokens = self._window if tokens is None else tokens
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _take(self, text: str, stop: Sequence[str]) -> None:
        """Take the characters of the window's text that are new, up to a stop string."""
        if self.stopped:
            return
        taken = self._held + text[self._seen :]
        self._seen = max(self._seen, len(text))
        self._held = trim_at_stop(taken, stop)
        self.stopped = len(self._held) < len(taken)

    def _give(self, waiting: int) -> str:
        end = len(self._held) - waiting
        given, self._held = self._held[:end], self._held[end:]
        if given and self._reply:
            self._reply = False
            given = given[given.startswith(" ") and not self._decoded(self._start).startswith(" ") :]
        return given


def _beginnings(strings: Sequence[str]) -> list[str]:
    return [string[:length] for string in strings for length in range(1, len(string))]
