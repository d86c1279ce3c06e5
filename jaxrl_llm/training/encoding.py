"""From records to tokens, once: prompts, completions and the tokens that are trained on. Imports no jax.

records  ->  Encoder (text to tokens that fit)  ->  Tokenised (all rows in a few arrays, kept in a cache)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from jaxrl_llm import runtime, text
from jaxrl_llm.data import records
from jaxrl_llm.data.records import BadLine, Fields, Message, Text
from jaxrl_llm.training.config import Cut, TrainOn

# From text to tokens --------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A prompt's tokens, those of each of its completions, and which of the latter are trained on."""

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]


class Turns(NamedTuple):
    """The text behind a prompt in parts: the assistant's turns, which are trained on, and what stands between them."""

    parts: list[str]
    trained: list[bool]


class TooLong(ValueError):
    """A row that does not fit."""


class Encoder:
    """Encodes prompts with their completions, each ending in EOS, in at most `max_length` tokens.

    Conversations go through the chat template. The tokens of a completion are those of the whole conversation behind
    its prompt, whose tokens are those that decoding gives it. Where a token would span the two, and always between
    strings, the completion is encoded by itself, without the space that SentencePiece puts before a text. If one of
    prompt and completions is a conversation, all are: see `records.alike`.

    Args:
        tokenizer: of Hugging Face's kind.
        max_length: most tokens of prompt and completion together.
        cut: what longer rows lose: "left", the beginning of the prompt, but not its BOS token; "right", the end of the
            completion, and EOS with it; "raise" refuses them, and "skip" leaves them out.
        train_on: "all", every turn of the assistant in a completion; "last", the last one; "completion", every token.
        chunk: cut plain text that is longer into parts instead, which share a token.
        ends: tokens beside EOS that end a completion, such as a template's end of a turn.

    `cut_prompts` and `cut_completions` count what was cut.

    Raises:
        ValueError: if `cut` or `train_on` is another one, or the tokenizer has no EOS token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        cut: Cut = "left",
        train_on: TrainOn = "all",
        chunk: bool = False,
        ends: Sequence[int] = (),
    ):
        for name, given, known in (("cut", cut, get_args(Cut)), ("train_on", train_on, get_args(TrainOn))):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, but is {given!r}.")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer must have an EOS token, which ends completions, but has none.")
        self._tokenizer, self.max_length, self.cut = tokenizer, max_length, cut
        self.train_on, self.chunk = train_on, chunk
        self._ends = {tokenizer.eos_token_id, *ends}
        self.cut_prompts = self.cut_completions = 0

    def identity(self) -> dict[str, Any]:
        """Return the options and the tokenizer as JSON can hold them.

        Raises:
            TypeError: for a tokenizer whose files are not known.
        """
        tokenizer = self._tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError("the tokenizer must be a fast one to be identified.")
        special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
        files = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), special, type(tokenizer).__name__]
        options = [self.max_length, self.cut, self.train_on, self.chunk, sorted(map(int, self._ends))]
        return {"tokenizer": files, "encoder": options}

    def checked(self, parse: Callable[[Fields], Any]) -> Callable[[Fields], Any]:
        """Return the parser for this tokenizer: of Alpaca's form, a chat model is given messages."""
        return Parser(parse, bool(self._tokenizer.chat_template))

    def prompt(self, asked: Text, *, room: int, template: Fields | None = None) -> list[int]:
        """Return a prompt's tokens, cut so that `room` more fit.

        Raises:
            ValueError: if it is too long and not to be cut on the left.
        """
        return _one(self.each([(asked, (), template or {})], room=room)).prompt

    def __call__(
        self, asked: Text, completions: Sequence[Text], *, template: Fields | None = None, whole: bool = False
    ) -> Encoded:
        """Return a prompt with its completions, which all follow the same tokens of the prompt.

        Args:
            template: variables of the chat template, such as `tools`.
            whole: encode each as one text, as a reward model reads it (`text.whole`). The prompt is then what all
                begin with.

        Raises:
            ValueError: for a row that does not fit and cannot be cut, or a chat template that changes the prompt when
                the completion follows.
        """
        asked, completions = records.alike(asked, completions)
        return _one(self.each([(asked, completions, template or {})], whole=whole))

    def each(
        self,
        rows: Sequence[tuple[Text, Sequence[Text], Fields]],
        *,
        room: int = 0,
        fit: bool = True,
        whole: bool = False,
    ) -> list[Encoded | ValueError]:
        """Return each of many prompts with its completions and template's variables as tokens, or why it cannot be.

        The tokenizer is called with lists, which is much faster than row by row.

        Args:
            room: tokens that a prompt without completions leaves for one.
            fit: cut what is too long.
            whole: as `__call__`.
        """
        if whole:
            return [self._whole(*row, fit=fit) for row in rows]
        found: list[Encoded | ValueError] = [ValueError("")] * len(rows)
        prompts: dict[int, str] = {}
        turns: dict[int, list[Turns]] = {}
        for place, (asked, completions, template) in enumerate(rows):
            try:
                if isinstance(asked, str):
                    prompts[place] = asked
                    turns[place] = [Turns([each], [True]) for each in completions]
                else:
                    prompts[place], turns[place] = self._turns(asked, completions, template)
            except ValueError as error:
                found[place] = error
        for encoded in self._tokens([place for place in prompts if isinstance(rows[place][0], str)], prompts, turns):
            found[encoded[0]] = encoded[1]
        chats = [place for place in prompts if not isinstance(rows[place][0], str)]
        for encoded in self._chat_tokens(chats, prompts, turns):
            found[encoded[0]] = encoded[1]
        for place, each in enumerate(found):
            if fit and isinstance(each, Encoded):
                try:
                    found[place] = self._fitting(each, room)
                except ValueError as error:
                    found[place] = error
        return found

    def _whole(self, asked: Text, completions: Sequence[Text], template: Fields, *, fit: bool) -> Encoded | ValueError:
        try:
            rows = [text.whole(self._tokenizer, asked, each, **template) for each in completions]
            alone = _one(self.each([(asked, (), template)], fit=False)).prompt if asked else []
            unlike = (place for place, column in enumerate(zip(alone, *rows, strict=False)) if len(set(column)) > 1)
            shared = next(unlike, min(len(alone), *(len(row) - 1 for row in rows)))
            behind = [row[shared:] for row in rows]
            found = Encoded(rows[0][:shared], behind, [[True] * len(each) for each in behind])
            return self._fitting(found, 0) if fit else found
        except ValueError as error:
            return error

    def chunks(self, whole: Encoded) -> Iterator[Encoded]:
        """Yield a text in parts of `max_length` tokens that share one, so that each is predicted once."""
        tokens, begins = [*whole.prompt, *whole.completions[0]], len(whole.prompt)
        for start in range(0, len(tokens) - 1, self.max_length - 1):
            part = tokens[start : start + self.max_length]
            shown = begins if start == 0 else 1
            yield Encoded(part[:shown], [part[shown:]], [[True] * (len(part) - shown)])

    # Strings

    def _tokens(
        self, places: list[int], prompts: Mapping[int, str], turns: Mapping[int, list[Turns]]
    ) -> Iterator[tuple[int, Encoded | ValueError]]:
        """Yield prompts and completions that are strings as tokens."""
        tokenizer = self._tokenizer
        without_bos = tokenizer.bos_token_id is None
        named = [place for place in places if prompts[place] or not without_bos]
        asked = dict(zip(named, text.encode_each(tokenizer, [prompts[place] for place in named]), strict=True))
        flat = [(place, turn.parts[0]) for place in places for turn in turns[place]]
        # Behind a prompt they continue it; behind none they are a text, which SentencePiece begins with a space.
        after = iter(text.continuations(tokenizer, [each for place, each in flat if prompts[place]]))
        begun = iter(
            text.ids(tokenizer, [each for place, each in flat if not prompts[place]], add_special_tokens=False)
        )
        for place in places:
            completions = [self._ended(next(after if prompts[place] else begun)) for _ in turns[place]]
            if place in asked:
                prompt = self._open(asked[place], prompts[place])
                if not prompts[place]:  # a text that is given with its BOS has one
                    completions = [each[1:] if each[0] in prompt and len(each) > 1 else each for each in completions]
            elif len(completions) == 1 and len(completions[0]) > 1:  # nothing can predict the first token of a text
                prompt, completions = completions[0][:1], [completions[0][1:]]
            else:
                yield place, ValueError("the prompt is empty, and the tokenizer has no BOS token to start a text with.")
                continue
            yield place, Encoded(prompt, completions, [[True] * len(each) for each in completions])

    def _open(self, tokens: list[int], prompt: str) -> list[int]:
        """Return a prompt's tokens without an EOS token that the tokenizer puts after every text."""
        eos = self._tokenizer.eos_token_id
        added = len(tokens) > 1 and tokens[-1] == eos and not prompt.endswith(self._tokenizer.eos_token)
        return tokens[:-1] if added else tokens

    def _ended(self, tokens: list[int]) -> list[int]:
        return tokens if tokens and tokens[-1] in self._ends else [*tokens, self._tokenizer.eos_token_id]

    # Conversations

    def _chat_tokens(
        self, places: list[int], prompts: Mapping[int, str], turns: Mapping[int, list[Turns]]
    ) -> Iterator[tuple[int, Encoded]]:
        """Yield conversations as tokens, those of a prompt as decoding gives them."""
        tokenizer = self._tokenizer
        asked = [each[0] for each in text.encode_parts(tokenizer, [[prompts[place]] for place in places])]
        flat = [[prompts[place], *turn.parts] for place in places for turn in turns[place]]
        behind = iter(text.encode_parts(tokenizer, flat))
        for place, prompt in zip(places, asked, strict=True):
            completions, masks = [], []
            for turn in turns[place]:
                parts = next(behind)[1:]
                tokens = self._ended([token for part in parts for token in part])
                mask = [trained for part, trained in zip(parts, turn.trained, strict=True) for _ in part]
                completions.append(tokens)
                masks.append(mask + [True] * (len(tokens) - len(mask)))
            yield place, Encoded(prompt, completions, masks)

    def _turns(
        self, asked: Sequence[Message], completions: Sequence[Sequence[Message]], template: Fields
    ) -> tuple[str, list[Turns]]:
        """Return the rendered prompt and, of each completion, what its conversation adds.

        The prompt is what decoding would be given. If a completion's conversation has another beginning of the turn,
        such as one without <think>, it is what both begin with, up to a control token or the end of a line.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("the data hold conversations, but the tokenizer has no chat template.")
        if self.train_on == "last" and completions:  # what precedes the last turn of all is prompt
            shared = 0
            while all(shared < len(each) - 1 and each[shared] == completions[0][shared] for each in completions):
                shared += 1
            asked, completions = (*asked, *completions[0][:shared]), [each[shared:] for each in completions]
        rendered = _Rendered(self._tokenizer, template)
        before = rendered((*asked,), True)
        wholes = [rendered((*asked, *each), False) for each in completions]
        starts = [rendered.start(whole, (*asked,), 0) for whole in wholes]
        shown = min(starts, default=len(before))
        found = []
        for whole, start, completion in zip(wholes, starts, completions, strict=True):
            if self.train_on == "completion":
                spans = [(start, len(whole.rstrip()))]
            else:
                spans = rendered.spans(whole, start, asked, completion)
                spans = spans[-1:] if self.train_on == "last" else spans
            found.append(_divide(whole, shown, spans))
        return (wholes[0][:shown] if wholes else before), found

    # Length

    def _fitting(self, row: Encoded, room: int) -> Encoded:
        prompt, completions, masks = row
        longest = max(map(len, completions), default=room)
        if len(prompt) + longest <= self.max_length:
            return row
        if self.cut in ("raise", "skip"):
            if not completions:
                raise TooLong(_leaves_no_room(len(prompt), room, self.max_length))
            raise TooLong(
                f"a prompt of {len(prompt)} tokens and a completion of {longest} are longer than {self.max_length}."
            )
        if self.cut == "left":
            most = self.max_length - longest
            if most <= self._begins(prompt):
                raise TooLong(
                    f"a completion of {longest} tokens leaves no token for its prompt in {self.max_length}."
                    if completions
                    else _leaves_no_room(len(prompt), room, self.max_length)
                )
            return row._replace(prompt=self._end_of(prompt, most))
        if not completions:
            raise TooLong(_leaves_no_room(len(prompt), room, self.max_length))
        left = self.max_length - len(prompt)
        if left < 1 or not all(any(mask[:left]) for mask in masks):
            raise TooLong(f"a prompt of {len(prompt)} tokens leaves no room for a completion in {self.max_length}.")
        self.cut_completions += sum(len(each) > left for each in completions)
        return Encoded(prompt, [each[:left] for each in completions], [each[:left] for each in masks])

    def _end_of(self, prompt: list[int], most: int) -> list[int]:
        """Return the end of a prompt after its BOS token, which stays: models attend to it much."""
        self.cut_prompts += 1
        begins = self._begins(prompt)
        return [*prompt[:begins], *prompt[len(prompt) - most + begins :]]

    def _begins(self, prompt: list[int]) -> int:
        return int(prompt[:1] == [self._tokenizer.bos_token_id])


def _leaves_no_room(length: int, room: int, most: int) -> str:
    return f"a prompt of {length} tokens leaves no room for {room} more in {most}."


def _one(found: list[Encoded | ValueError]) -> Encoded:
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


@dataclasses.dataclass(frozen=True)
class Parser:
    """A parser of `data.records` for a model with or without a chat template; it can be sent to another process."""

    parse: Callable[[Fields], Any]
    chat: bool

    def __call__(self, line: Fields) -> Any:
        """Parse a line."""
        return self.parse(records.canonical(line, chat=self.chat))


# Where the assistant's turns are in a rendered conversation -----------------------------------------------------------


class _Rendered:
    """Renders beginnings of a conversation, each once."""

    def __init__(self, tokenizer: Any, template: Fields):
        self._tokenizer, self._template = tokenizer, template
        self._control = text.control_tokens(tokenizer)
        self._found: list[tuple[tuple[Message, ...], bool, str]] = []

    def __call__(self, messages: tuple[Message, ...], generation: bool) -> str:
        for known, of, rendered in self._found:
            if of == generation and known == messages:
                return rendered
        rendered = text.render(self._tokenizer, messages, generation=generation, **self._template)
        self._found.append((messages, generation, rendered))
        return rendered

    def start(self, whole: str, before: tuple[Message, ...], after: int) -> int:
        """Return where the turn behind some messages starts in the whole text, later than `after`.

        It is where the text that decoding is given ends. Two rules follow for a template that writes the turn, or those
        before it, in another way when it is finished: it is behind what both begin the turn with, up to a control token
        or the end of a line; and of a later turn, behind the next beginning of a turn.
        """
        opening = self(before, True)
        if whole.startswith(opening):
            return len(opening)
        ended = self(before, False)
        if opening.startswith(ended):
            header = opening[len(ended) :]
            if whole.startswith(ended):
                cuts = [0, *(match.end() for match in re.finditer(f"{self._control.pattern}|\n", header))]
                return len(ended) + max(cut for cut in cuts if whole[len(ended) :].startswith(header[:cut]))
            if after and header and (place := whole.find(header, after)) >= 0:
                return place + len(header)
        raise ValueError("the chat template changes the prompt when a completion follows it.")

    def end(self, whole: str, messages: tuple[Message, ...], start: int) -> int:
        """Return where the turn of the last of these messages ends in the whole text.

        It is where the text of these messages ends, but for spaces. Of a template that changes a turn when others
        follow, it is behind the next control token that ends the turn otherwise.
        """
        closing = self(messages, False).rstrip()
        if whole.startswith(closing):
            return len(closing)
        last = [match for match in self._control.finditer(closing) if match.end() == len(closing)]
        if last:
            match = re.compile(f"(?<!{text.QUOTE[0]}){re.escape(last[0][0])}").search(whole, start)
            if match:
                return match.end()
        raise ValueError("the chat template changes the assistant's turn when others follow it.")

    def spans(
        self, whole: str, start: int, asked: Sequence[Message], completion: Sequence[Message]
    ) -> list[tuple[int, int]]:
        """Return the places of the assistant's turns of a completion, the first of which starts at `start`."""
        found: list[tuple[int, int]] = []
        for place, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            begins = start if place == 0 else self.start(whole, (*asked, *completion[:place]), found[-1][1])
            found.append((begins, self.end(whole, (*asked, *completion[: place + 1]), begins)))
        return found


def _divide(whole: str, shown: int, spans: Sequence[tuple[int, int]]) -> Turns:
    """Return the text behind the first `shown` characters in parts, those at `spans` trained on."""
    parts, trained, place = [], [], shown
    for start, end in spans:
        parts += [whole[place:start], whole[start:end]]
        trained += [False, True]
        place = end
    return Turns(parts, trained)


# All rows in a few arrays ---------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A record as tokens: a prompt, its completions with the tokens trained on, and their label or ranks."""

    prompt: list[int]
    completions: list[list[int]]
    label: Any = None
    mismatched: int | None = None  # of unpaired preferences: most tokens of the prompt with another's completion
    fields: Mapping[str, float] = {}  # numbers of the line beside its text
    margins: Sequence[float] = ()  # of the completions of a ranking
    masks: Sequence[list[bool]] = ()  # of each completion, the tokens that are trained on; empty: all

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of its sequences: the prompt with each completion, or the prompt alone."""
        return [len(self.prompt) + len(each) for each in self.completions or [[]]]

    @property
    def length(self) -> int:
        """Tokens of the longest of its sequences."""
        return max(self.lengths)


class Tokenised(NamedTuple):
    """Rows of tokens, one after another: segment s holds `tokens[segments[s]:segments[s + 1]]`.

    Row r has the segments from `rows[r]` to `rows[r + 1]`: its prompt, and its completions.
    """

    tokens: Int[np.ndarray, "tokens"]
    mask: Bool[np.ndarray, "tokens"]  # tokens that are trained on
    segments: Int[np.ndarray, "segments+1"]
    rows: Int[np.ndarray, "rows+1"]
    labels: Int[np.ndarray, "segments"]  # of a completion its rank or label, of a prompt 0
    margins: Float[np.ndarray, "segments"]  # of a completion of a ranking
    records: Int[np.ndarray, "rows"]  # the record that each row is of
    numbers: Int[np.ndarray, "records"]  # of its line or row in the data
    places: Int[np.ndarray, "records"]
    fields: Float[np.ndarray, "rows columns"]  # the numbers beside the text; NaN where there is none
    columns: list[str]
    bad: list[BadLine]
    too_long: list[BadLine]  # left out as asked, with cut="skip"
    cut_prompts: int
    cut_completions: int
    others: dict[str, int]  # entries beside those of the format, and the number of records with each

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def lengths(self) -> Int[np.ndarray, "segments"]:
        """Tokens of every segment."""
        return np.diff(self.segments)

    def row(self, place: int) -> tuple[Encoded, list[int], list[float]]:
        """Return a row, and the labels and margins of its completions."""
        first, last = int(self.rows[place]), int(self.rows[place + 1])
        bounds = self.segments[first : last + 1].tolist()
        tokens, mask = (
            [leaf[start:end].tolist() for start, end in itertools.pairwise(bounds)] for leaf in (self.tokens, self.mask)
        )
        labels, margins = self.labels[first + 1 : last].tolist(), self.margins[first + 1 : last].tolist()
        return Encoded(tokens[0], tokens[1:], mask[1:]), labels, margins


ARRAYS = {  # of `Tokenised`, with the types that they are kept in
    "tokens": np.int32, "mask": bool, "segments": np.int64, "rows": np.int64, "labels": np.int32, "margins": np.float32,
    "records": np.int64, "numbers": np.int64, "places": np.int64, "fields": np.float64,
}  # fmt: skip
PART = 2048  # lines or rows that are encoded together


class Job(NamedTuple):
    """The way from lines to rows of tokens; it can be sent to another process."""

    encoder: Encoder
    parse: Callable[[Fields], Any] | None  # None: they are records already
    room: int
    vocab_size: int | None
    whole: bool = False  # prompt and completion are encoded as one text

    def part(self, raws: Sequence[tuple[int, int, Any]]) -> Tokenised:
        """Encode some lines or rows."""
        before = self.encoder.cut_prompts, self.encoder.cut_completions
        found, bad, too_long = [], [], []
        for number, place, raw in raws:
            try:
                found.append((number, place, raw if self.parse is None else records.record_of(raw, self.parse)))
            except ValueError as error:
                bad.append(BadLine(number, _reason(error)))
        rows, kept, others = [], [], Counter()
        for (number, place, record), encoded in zip(found, self._encoded([each[2] for each in found]), strict=True):
            try:
                made = self._checked(record, encoded)
            except TooLong as error:
                (too_long if self.encoder.cut == "skip" else bad).append(BadLine(number, _reason(error)))
                continue
            except ValueError as error:
                bad.append(BadLine(number, _reason(error)))
                continue
            others.update(record.fields.keys())
            rows += [(len(kept), each, record) for each in made]
            kept.append((number, place))
        bad.sort(key=lambda each: each.number)
        now = self.encoder.cut_prompts, self.encoder.cut_completions
        return _packed(rows, kept, bad, too_long, now[0] - before[0], now[1] - before[1], others)

    def _encoded(self, found: list[Any]) -> list[Encoded | ValueError]:
        rows = [(record.prompt, record.completions, record.template) for record in found]
        try:
            return self.encoder.each(rows, room=self.room, fit=False, whole=self.whole)
        except (ValueError, TypeError):  # such as half a surrogate pair, which no tokenizer takes: each by itself
            return [self._alone(row) for row in rows]

    def _alone(self, row: tuple[Text, Sequence[Text], Fields]) -> Encoded | ValueError:
        try:
            return self.encoder.each([row], room=self.room, fit=False, whole=self.whole)[0]
        except (ValueError, TypeError):
            return ValueError("its text must be Unicode that the tokenizer takes, which half a surrogate pair is not")

    def _checked(self, record: Any, encoded: Encoded | ValueError) -> list[Encoded]:
        """Return a record as rows that fit, or raise ValueError."""
        encoder = self.encoder
        if isinstance(encoded, ValueError):
            raise encoded
        judged = not isinstance(record, records.PromptCompletion | records.Prompt)
        if (
            judged
            and not self.whole
            and encoder.train_on == "completion"
            and not all(map(_of_assistant, record.completions))
        ):
            raise ValueError('train_on must be "all" or "last" here, as a completion holds others\' words.')
        highest = max(max(each, default=0) for each in (encoded.prompt, *encoded.completions))
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise ValueError(
                f"tokens must be below {self.vocab_size}, the model's vocabulary, but the tokenizer gives {highest}."
            )
        text_alone = isinstance(record, records.PromptCompletion) and not record.prompt
        if encoder.chunk and text_alone and len(encoded.prompt) + len(encoded.completions[0]) > encoder.max_length:
            return list(encoder.chunks(encoded))
        fitting = encoder._fitting(encoded, self.room)
        labels = record.labels
        for first, second in ((i, j) for j in range(len(labels)) for i in range(j)):
            if fitting.completions[first] == fitting.completions[second] and labels[first] != labels[second]:
                raise ValueError(
                    f"completions {first + 1} and {second + 1} must differ, but are equal in "
                    f"{encoder.max_length} tokens."
                )
        return [fitting]


def _reason(error: ValueError) -> str:
    return str(error).removesuffix(".")


def _of_assistant(completion: Text) -> bool:
    return isinstance(completion, str) or all(each["role"] == "assistant" for each in completion)


def _packed(
    rows: list[tuple[int, Encoded, Any]],
    kept: list[tuple[int, int]],
    bad: list[BadLine],
    too_long: list[BadLine],
    cut_prompts: int,
    cut_completions: int,
    others: Counter,
) -> Tokenised:
    """Return rows, each with the place of its record and the record, as arrays."""
    segments = [each for _, row, _ in rows for each in (row.prompt, *row.completions)]
    masks = [each for _, row, _ in rows for each in (None, *row.masks)]
    lengths = np.fromiter(map(len, segments), np.int64, len(segments))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.repeat(np.asarray([each is not None for each in masks], bool), lengths)
    for place, each in enumerate(masks):
        if each is not None and not all(each):
            mask[bounds[place] : bounds[place + 1]] = each
    numbers = [
        {name: float(value) for name, value in record.fields.items() if isinstance(value, int | float)}
        for _, _, record in rows
    ]
    columns = sorted({name for each in numbers for name in each})
    arrays = {
        "tokens": np.fromiter(itertools.chain.from_iterable(segments), np.int32, int(bounds[-1])),
        "mask": mask,
        "segments": bounds,
        "rows": np.cumsum([0, *(1 + len(row.completions) for _, row, _ in rows)]),
        "labels": [label for _, _, record in rows for label in (0, *record.labels)],
        "margins": [margin for _, _, record in rows for margin in _margins(record)],
        "records": [place for place, _, _ in rows],
        "numbers": [number for number, _ in kept],
        "places": [place for _, place in kept],
        "fields": np.reshape(
            [[each.get(name, np.nan) for name in columns] for each in numbers], (len(rows), len(columns))
        ),
    }
    typed = {name: np.asarray(value, ARRAYS[name]) for name, value in arrays.items()}
    rest = {"cut_prompts": cut_prompts, "cut_completions": cut_completions, "others": dict(others)}
    return Tokenised(**typed, columns=columns, bad=bad, too_long=too_long, **rest)


def _margins(record: Any) -> list[float]:
    """Return a margin for the prompt and each completion."""
    given = getattr(record, "margins", ())
    return [0.0, *(given or [0.0] * len(record.labels))]


def _joined(parts: list[Tokenised]) -> Tokenised:
    """Concatenate parts."""
    columns = sorted({name for part in parts for name in part.columns})
    others: Counter = Counter()
    for part in parts:
        others.update(part.others)
    shifts = {
        name: np.cumsum([0, *(len(of) for of in sizes)])
        for name, sizes in {
            "segments": [part.tokens for part in parts],
            "rows": [part.labels for part in parts],
            "records": [part.numbers for part in parts],
        }.items()
    }

    def fields(part: Tokenised) -> np.ndarray:
        found = np.full((len(part.records), len(columns)), np.nan)
        found[:, [columns.index(name) for name in part.columns]] = part.fields
        return found

    def column(name: str) -> np.ndarray:
        given = [fields(part) if name == "fields" else getattr(part, name) for part in parts]
        if name in shifts:
            given = [each + shift for each, shift in zip(given, shifts[name], strict=False)]
        if name in ("segments", "rows"):  # the end of a part is the beginning of the next
            given = [each if place == 0 else each[1:] for place, each in enumerate(given)]
        return np.concatenate(given)

    return Tokenised(
        **{name: column(name) for name in ARRAYS},
        columns=columns,
        bad=[each for part in parts for each in part.bad],
        too_long=[each for part in parts for each in part.too_long],
        cut_prompts=sum(part.cut_prompts for part in parts),
        cut_completions=sum(part.cut_completions for part in parts),
        others=dict(others),
    )


def tokenise(found: Sequence[Any], job: Job, *, say: Callable[[str], None] | None = None) -> Tokenised:
    """Return all rows of records as tokens, in parallel processes if it takes longer than a few seconds.

    Args:
        found: `Records`, or a list of records, whose numbers are their places.
        say: print how fast it went, if it took long.
    """
    raws = found.raw() if isinstance(found, records.Records) else ((i, i, each) for i, each in enumerate(found))
    start, made, parts = time.perf_counter(), [], _parts(raws)
    with tqdm(unit=" rows", disable=None, delay=2, desc="tokenising") as progress:

        def take(part: Tokenised, count: int) -> None:
            made.append(part)
            progress.update(count)

        for raw in parts:
            take(job.part(raw), len(raw))
            if time.perf_counter() - start > ALONE and _cores() > 1:
                break
        for part, count in _in_parallel(job, parts):
            take(part, count)
        count = progress.n if not progress.disable else sum(len(each.numbers) for each in made)
    seconds = time.perf_counter() - start
    if say is not None and seconds > SLOW:
        say(f"tokenised {count} rows in {seconds:.0f} s.")
    return _joined(made or [job.part([])])


ALONE = 2.0  # seconds until other processes are asked to help, which take about as long to start


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_parallel(job: Job, parts: Iterator[list[Any]]) -> Iterator[tuple[Tokenised, int]]:
    """Yield the parts that remain as tokens, in order, made by other processes."""
    first = next(parts, None)
    if first is None:
        return
    with _without_main():
        pool = multiprocessing.get_context("spawn").Pool(min(_cores(), MOST_PROCESSES), _begin_process, (job,))
    with pool:
        waiting: collections.deque = collections.deque()
        for part in itertools.chain([first], parts):
            waiting.append((pool.apply_async(_part_of_process, (part,)), len(part)))
            if len(waiting) > 2 * MOST_PROCESSES:
                result, count = waiting.popleft()
                yield result.get(), count
        while waiting:
            result, count = waiting.popleft()
            yield result.get(), count


MOST_PROCESSES = 16
_of_process: list[Job] = []  # the job of a process that `_in_parallel` has started


def _begin_process(job: Job) -> None:
    runtime.set_up()
    _of_process[:] = [job]


def _part_of_process(part: list[Any]) -> Tokenised:
    return _of_process[0].part(part)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep new processes from running the user's program again, which nothing here needs."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _parts(raws: Iterable[Any]) -> Iterator[list[Any]]:
    part: list[Any] = []
    for raw in raws:
        part.append(raw)
        if len(part) == PART:
            yield part
            part = []
    if part:
        yield part


# Kept from one run to the next ----------------------------------------------------------------------------------------

SLOW = 5.0  # seconds of tokenising from which on its result is kept
KEPT = 8  # results that are kept, those used last


def cached(found: records.Records, job: Job, *, say: Callable[[str], None] | None = None) -> Tokenised:
    """Return `tokenise`, read from the user's cache if the same data were tokenised in the same way before.

    The key is the SHA-256 of the contents of the data, of the tokenizer's, of the options and of this program. Data
    that JSON cannot hold, and tokenizers that are not fast ones, are tokenised every time.
    """
    try:
        key = _key(found, job)
    except TypeError:
        return tokenise(found, job, say=say)
    folder = runtime.cache() / "tokens" / key
    known = _load(folder)
    if known is not None:
        os.utime(folder)
        if say is not None:
            say(f"{found.source}: read from the cache of tokens; turn it off with cache=False (--no-cache).")
        return known
    start = time.perf_counter()
    made = tokenise(found, job, say=say)
    if time.perf_counter() - start > SLOW and _key(found, job) == key:  # nothing was changed meanwhile
        try:
            _save(folder, made)
        except OSError as error:  # such as a full disk: the run goes on
            if say is not None:
                say(f"the tokens cannot be kept in {folder}: {error}.")
    return made


def _key(found: records.Records, job: Job) -> str:
    parse = job.parse.parse if isinstance(job.parse, Parser) else job.parse
    parsed = [parse.__module__, parse.__qualname__, job.encoder.identity(), job.room, job.vocab_size, job.whole]
    code = [Path(module.__file__).read_text(encoding="utf-8") for module in (records, text)]
    code.append(Path(__file__).read_text(encoding="utf-8"))
    whole = json.dumps([found.digest(exact=True), found.unit, parsed, code], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _save(folder: Path, made: Tokenised) -> None:
    """Write arrays and a description, all at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    try:
        for name in ARRAYS:
            np.save(partial / f"{name}.npy", getattr(made, name))
        rest = {name: value for name, value in made._asdict().items() if name not in ARRAYS}
        bad = {name: [dataclasses.astuple(each) for each in rest[name]] for name in ("bad", "too_long")}
        (partial / "rest.json").write_text(json.dumps(rest | bad), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    known = sorted(folder.parent.glob("[0-9a-f]*"), key=lambda each: each.stat().st_mtime)
    for old in known[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _load(folder: Path) -> Tokenised | None:
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        rest = json.loads((folder / "rest.json").read_text(encoding="utf-8"))
        bad = {name: [BadLine(*each) for each in rest[name]] for name in ("bad", "too_long")}
        return Tokenised(**arrays, **rest | bad)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is broken
        return None
