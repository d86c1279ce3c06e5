"""From prompts and completions to tokens, and which of them are trained on. Imports no jax."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from jaxrl_llm import text
from jaxrl_llm.data import records
from jaxrl_llm.data.records import Fields, Message, Text
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
