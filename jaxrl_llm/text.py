"""Between text and tokens: prompts and chat templates, padding of ragged batches, and text printed while generated."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.options import check_characters


def encode(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    chat: bool | Mapping[str, Any] = False,
    lead: str = "",
) -> list[int]:
    """Return the tokens of a prompt; with `chat`, of the prompt as a user's message in the model's chat template.

    With `chat` it may also be a conversation: messages with `role` and `content`. `chat` may be variables of the
    template, such as `tools`. An empty prompt is the beginning of a text: the tokenizer's BOS token. `lead` is the
    beginning of the completion.

    Raises:
        ValueError: if there is no chat template, if it refuses the conversation, or if there is no BOS token
            to stand for an empty prompt.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        variables = chat if isinstance(chat, Mapping) else {}
        return rendered_tokens(tokenizer, render(tokenizer, messages, generation=True, **variables) + _plain(lead))
    check_characters(prompt, "the prompt")
    return _begun(tokenizer, prompt + lead, tokenizer(prompt + lead)["input_ids"])


def encode_each(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return `encode` of many prompts in one call of the tokenizer, which is much faster.

    Raises:
        ValueError: as `encode`.
    """
    return [_begun(tokenizer, *each) for each in zip(prompts, ids(tokenizer, prompts), strict=True)]


def _begun(tokenizer: Any, prompt: str, tokens: list[int]) -> list[int]:
    """Return the tokens of a prompt with one BOS, though both its text and the tokenizer begin with it."""
    bos = tokenizer.bos_token_id
    if not tokens and bos is None:
        raise ValueError("the prompt is empty, and the tokenizer has no BOS token to start a text with.")
    if bos is not None and tokens[:2] == [bos, bos] and not prompt.startswith(2 * tokenizer.bos_token):
        return tokens[1:]
    return tokens or [bos]


def continuations(tokenizer: Any, strings: Sequence[str], **options: Any) -> list[list[int]]:
    """Return the tokens of texts that continue others: without the space that SentencePiece puts before a text.

    Args:
        options: of the tokenizer's call.
    """
    if not strings or not _puts_space(tokenizer):
        return ids(tokenizer, strings, add_special_tokens=False, **options)
    found = ids(tokenizer, [ANCHOR, *(ANCHOR + each for each in strings)], add_special_tokens=False, **options)
    before = found[0]
    return [tokens[len(before) :] if tokens[: len(before)] == before else tokens for tokens in found[1:]]


ANCHOR = "\n"  # a text that no SentencePiece token joins with what follows it


def ids(tokenizer: Any, strings: Sequence[str], **options: Any) -> list[list[int]]:
    """Return the tokens of texts, in one call of a tokenizer that takes lists.

    Args:
        options: of the tokenizer's call.
    """
    if not getattr(tokenizer, "is_fast", False) or options.keys() - {"add_special_tokens"}:
        return [tokenizer(each, **options)["input_ids"] for each in strings]
    return [each.ids for each in _backend(tokenizer).encode_batch_fast(list(strings), **options)]


def _backend(tokenizer: Any) -> Any:
    """Return the tokenizer's own implementation, which is without transformers' work on each text."""
    tokenizer("")  # sets truncation, padding and special tokens as for any call
    return tokenizer.backend_tokenizer


def _puts_space(tokenizer: Any) -> bool:
    """Return True for a tokenizer that puts a space before a text, as SentencePiece does."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return False
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"][:1])
    return bool(first) and str(first[0]).startswith(("▁", "Ġ"))


def encode_parts(tokenizer: Any, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Return the tokens of rendered texts, each given in parts, part by part: those of the text as a whole.

    If a token of the whole text would span two parts, the parts before and those after it are encoded by themselves,
    the latter as `continuations`.

    Args:
        texts: of `render`, each in one or more parts.
    """
    found: list[list[list[int]]] = [[]] * len(texts)
    simple, wholes = [], []
    for place, parts in enumerate(texts):
        if QUOTE[0] in (whole := "".join(parts)):
            found[place] = _quoted_parts(tokenizer, parts)
        else:
            simple.append(place)
            wholes.append(whole)
    if wholes and getattr(tokenizer, "is_fast", False):
        for place, encoding in zip(
            simple, _backend(tokenizer).encode_batch(wholes, add_special_tokens=False), strict=True
        ):
            found[place] = _divided(tokenizer, texts[place], encoding)
    else:
        for place, whole in zip(simple, wholes, strict=True):
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            found[place] = _divided_by_prefixes(tokenizer, texts[place], ids)
    return found


def _quoted_parts(tokenizer: Any, parts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of parts of a rendered text, each encoded by itself, control tokens of messages as words."""
    found, words = [], False  # words: within a quotation
    for part in parts:
        tokens: list[int] = []
        for index, piece in enumerate(re.split("|".join(QUOTE), part)):
            words = words != (index > 0)
            options = {"split_special_tokens": True} if words else {}
            if not piece:
                continue
            if found or tokens:
                tokens += continuations(tokenizer, [piece], **options)[0]
            else:
                tokens += tokenizer(piece, add_special_tokens=False, **options)["input_ids"]
        found.append(tokens)
    return found


def _divided(tokenizer: Any, parts: Sequence[str], encoding: Any) -> list[list[int]]:
    ids, cuts = encoding.ids, [0]
    for count, bound in enumerate(itertools.accumulate(map(len, parts[:-1])), 1):
        if not parts[count - 1]:
            cuts.append(cuts[-1])
            continue
        place = encoding.char_to_token(bound) if any(parts[count:]) else len(ids)
        if place is None or (place < len(ids) and _begin(encoding, place) != bound) or _spans(encoding, place, bound):
            return _separated(tokenizer, parts, count)
        cuts.append(place)
    return [ids[start:end] for start, end in itertools.pairwise([*cuts, len(ids)])]


def _begin(encoding: Any, place: int) -> int:
    return encoding.token_to_chars(place)[0]


def _spans(encoding: Any, place: int, bound: int) -> bool:
    return place > 0 and encoding.token_to_chars(place - 1)[1] > bound


def _divided_by_prefixes(tokenizer: Any, parts: Sequence[str], ids: list[int]) -> list[list[int]]:
    """Divide tokens without their places in the text: the tokens of each beginning must begin those of the whole."""
    cuts = [0]
    for count in range(1, len(parts)):
        before = tokenizer("".join(parts[:count]), add_special_tokens=False)["input_ids"]
        if ids[: len(before)] != before:
            return _separated(tokenizer, parts, count)
        cuts.append(len(before))
    cuts.append(len(ids))
    return [ids[start:end] for start, end in itertools.pairwise(cuts)]


def _separated(tokenizer: Any, parts: Sequence[str], count: int) -> list[list[int]]:
    """Return the tokens of the first parts and, encoded by themselves, of those that continue them."""
    before = encode_parts(tokenizer, [parts[:count]])[0]
    if parts[0] == ANCHOR or not _puts_space(tokenizer):  # the anchor joined with what follows it
        return before + encode_parts(tokenizer, [parts[count:]])[0]
    return before + encode_parts(tokenizer, [[ANCHOR, *parts[count:]]])[0][1:]


QUOTE = ("\ue0f0", "\ue0f1")  # private characters, around a control token that stands in a message


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, generation: bool, **options: Any) -> str:
    """Return a conversation in the chat template, with control tokens inside of messages quoted.

    Args:
        generation: end with the beginning of the assistant's turn.
        options: further variables of the template, such as `tools`.

    Raises:
        ValueError: if the tokenizer has no chat template, or its template refuses the conversation or does not read
            an option.
    """
    template = tokenizer.chat_template
    if not template:
        raise ValueError("this model has no chat template: it is not an instruct model.")
    for name in options:
        if name not in str(template):
            raise ValueError(f"{name} must be left out, as the chat template does not read it.")
    control = control_tokens(tokenizer)
    quoted = [_quoted(control, dict(message)) for message in messages]
    options = {name: _quoted(control, value) for name, value in options.items()}
    try:
        return tokenizer.apply_chat_template(quoted, tokenize=False, add_generation_prompt=generation, **options)
    except Exception as error:  # a template is a program: jinja2's errors, and Python's as of adding None to a string
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the chat template: {reason}") from error


def read_by(tokenizer: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the variables that the tokenizer's chat template reads."""
    return {name: value for name, value in variables.items() if name in str(tokenizer.chat_template)}


def rendered_tokens(tokenizer: Any, string: str) -> list[int]:
    """Return the tokens of a text of `render`: control tokens are those of the template, not those of the messages."""
    check_characters(string, "the conversation")
    return _quoted_parts(tokenizer, [string])[0]  # the template has written BOS itself


def whole(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    completion: str | Sequence[Mapping[str, Any]],
    **options: Any,
) -> list[int]:
    """Return the tokens of a prompt with its completion, read as one text: the tokens that a reward model scores.

    Of strings they are `tokenizer(prompt + completion)` with EOS at the end. Of messages they are all that the chat
    template writes, with what follows the end of the last turn, such as a newline, and nothing more.

    Args:
        options: variables of the chat template, such as `tools`.

    Raises:
        ValueError: if the chat template refuses the conversation, or there is none; if strings need an EOS token and
            there is none.
    """
    if not isinstance(completion, str):
        return rendered_tokens(tokenizer, render(tokenizer, [*prompt, *completion], generation=False, **options))
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer must have an EOS token, which ends texts, but has none.")
    tokens = _begun(tokenizer, prompt + completion, list(tokenizer(prompt + completion)["input_ids"]))
    return tokens if tokens and tokens[-1] == eos else [*tokens, eos]


def same_tokens(one: Any, other: Any) -> bool:
    """Return True if two tokenizers encode texts alike. Their padding tokens and chat templates may differ."""
    if one is other:
        return True
    if one is None or other is None:
        return False
    vocabularies = [
        {token: number for token, number in each.get_vocab().items() if token != each.pad_token}
        for each in (one, other)
    ]
    shared = vocabularies[0].keys() & vocabularies[1].keys()
    unpaired = (vocabularies[0].keys() ^ vocabularies[1].keys()) - {one.pad_token, other.pad_token}
    if unpaired or any(vocabularies[0][token] != vocabularies[1][token] for token in shared):
        return False
    parts = [_rules(each) for each in (one, other)]
    return parts[0] == parts[1]


def _rules(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer does before and beside its vocabulary, as data; nothing is known of slow ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    found = json.loads(backend.to_str())
    found["model"].pop("vocab", None)
    return {name: found.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "model")}


def _quoted(control: re.Pattern, value: Any) -> Any:
    """Return a part of a message with its texts quoted, those in lists and objects too."""
    if isinstance(value, Mapping):
        return {name: _quoted(control, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(control, each) for each in value]
    if not isinstance(value, str):
        return value
    return control.sub(lambda match: QUOTE[0] + match[0] + QUOTE[1], _plain(value))


def _plain(string: str) -> str:
    """Return a string without the private characters of `QUOTE`."""
    return re.sub("|".join(QUOTE), "", string)


def control_ids(tokenizer: Any) -> dict[str, int]:
    """Return the id of each control token, such as `<|im_end|>`, by its content."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return ids | {token.content: number for number, token in added.items() if token.special}


def control_tokens(tokenizer: Any) -> re.Pattern:
    """Return a pattern of the tokenizer's control tokens, such as EOS."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    return _control_pattern(tokenizer, size, tuple(tokenizer.all_special_tokens))


@functools.lru_cache(maxsize=8)
def _control_pattern(tokenizer: Any, size: int, special: tuple[str, ...]) -> re.Pattern:
    control = {*control_ids(tokenizer), *special}
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


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


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    r"""Return what each token contributes to a text, as a label: `token_bytes`, with a space where a word begins.

    A part of a character has its bytes as escapes, "\xe4". Special tokens have their names, and so have the tokens of
    a tokenizer that is neither byte-level BPE nor SentencePiece, such as WordPiece's "##ing". An id that the tokenizer
    does not know is "".
    """
    try:
        pieces = token_bytes(tokenizer)
    except ValueError:
        pieces = []
    names = tokenizer.convert_ids_to_tokens([int(token) for token in tokens])
    return [
        pieces[token].decode("utf-8", "backslashreplace") if token < len(pieces) and pieces[token] else name or ""
        for token, name in zip(tokens, names, strict=True)
    ]


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
        healed: number of the prompt's last tokens that are not read before, but whose text the new tokens write again.
            The tokens with which they do are not searched for stop strings either.
        pieces: the bytes of each token (`token_bytes`), needed if any are healed.
        ends: tokens that end a text. The text leaves them out, even if they are ordinary tokens of the tokenizer.

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
        healed: int = 0,
        pieces: Sequence[bytes] = (),
        ends: Collection[int] = (),
    ):
        self._ends = ends
        self._tokenizer, self._stop, self.stopped, self.healed = tokenizer, stop, False, healed
        self._unsearched, self._reply, self._start = unsearched, reply, []  # the first tokens of a reply
        self._pieces = pieces
        self._unwritten = sum(len(pieces[token]) for token in prompt[len(prompt) - healed :])  # bytes
        # Decoded anew at each push: some tokens that were read, on which the text of the next ones depends, and those.
        self._window = [int(token) for token in prompt]
        self._seen = len(self._decoded().rstrip("\ufffd"))  # characters of the window's text that were taken
        del self._window[len(self._window) - healed :]
        self._read = len(self._window)  # tokens of the window whose characters are complete
        self._held = ""  # taken, but not given yet: perhaps the beginning of a stop string

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that the new tokens complete."""
        tokens = [int(token) for token in tokens if token not in self._ends]
        count = 0
        while count < len(tokens) and (self._unsearched > 0 or self._unwritten > 0):
            self._unsearched -= 1
            self._unwritten -= len(self._pieces[tokens[count]]) if self._unwritten > 0 else 0
            count += 1
        first, rest = tokens[:count], tokens[count:]
        return (self._push(first, ()) if len(first) else "") + self._push(rest, self._stop)

    def _push(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        self._window += tokens
        self._start += tokens if self._reply else []
        text = self._decoded()
        # A character whose bytes are not all there yet decodes to U+FFFD at the end: it waits.
        complete = text.rstrip("\ufffd")
        self._take(complete, stop)
        if complete == text and (context := self._decoded(self._window[self._read :])):  # "": special tokens alone
            self._window = self._window[self._read :]
            self._read, self._seen = len(self._window), len(context) + self._seen - len(text)
        begun = [len(part) for part in _beginnings(stop) if self._held.endswith(part)]  # it waits too
        return self._give(0 if self.stopped else max(begun, default=0))

    def finish(self) -> str:
        """Return the rest, complete or not."""
        self._take(self._decoded(), () if self._unsearched > 0 or self._unwritten > 0 else self._stop)
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
