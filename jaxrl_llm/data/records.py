"""Records of training data: the formats that a line may have, and files and lists of them, checked once."""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

Message = dict[str, Any]  # {"role": ..., "content": ...}, and what else the chat template reads, such as tool_calls
Text = str | tuple[Message, ...]  # a string, or the messages of a conversation
Fields = Mapping[str, Any]
Record = TypeVar("Record")

# Formats --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to be completed."""

    prompt: Text
    fields: Fields = dataclasses.field(default_factory=dict)  # the line's other entries, of every kind of record
    template: Fields = dataclasses.field(default_factory=dict)  # variables of the chat template, such as tools

    completions = ()  # of every kind of record, those that follow the prompt
    labels = ()  # their labels or ranks


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
    """A prompt-completion example. Plain text has the prompt ""."""

    prompt: Text
    completion: Text
    fields: Fields = dataclasses.field(default_factory=dict)
    template: Fields = dataclasses.field(default_factory=dict)

    labels = (0,)

    @property
    def completions(self) -> tuple[Text, ...]:
        """The one completion."""
        return (self.completion,)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """K completions with their ranks: 0 is best, equal ranks are ties.

    Completion i should lead completion j, which ranks after it, by margins[i] − margins[j] or more.
    """

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]
    margins: tuple[float, ...] = ()  # of each completion; empty: all 0
    fields: Fields = dataclasses.field(default_factory=dict)
    template: Fields = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> tuple[int, ...]:
        """The ranks."""
        return self.ranks


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two completions of which the first is preferred."""

    prompt: Text
    chosen: Text
    rejected: Text
    fields: Fields = dataclasses.field(default_factory=dict)
    template: Fields = dataclasses.field(default_factory=dict)

    labels = (0, 1)

    @property
    def completions(self) -> tuple[Text, ...]:
        """The chosen and the rejected one."""
        return (self.chosen, self.rejected)

    def ranked(self) -> Ranked:
        """Return it as a ranking of two."""
        return Ranked(self.prompt, self.completions, self.labels, fields=self.fields, template=self.template)


@dataclasses.dataclass(frozen=True)
class UnpairedPreference:
    """A completion that is desirable or not."""

    prompt: Text
    completion: Text
    label: bool
    fields: Fields = dataclasses.field(default_factory=dict)
    template: Fields = dataclasses.field(default_factory=dict)

    @property
    def completions(self) -> tuple[Text, ...]:
        """The one completion."""
        return (self.completion,)

    @property
    def labels(self) -> tuple[int, ...]:
        """The label, 1 for a desirable completion."""
        return (int(self.label),)


def prompt(line: Fields) -> Prompt:
    """Parse {"prompt"}; all other entries stay in `fields`."""
    line = canonical(line)
    asked = _with_system(_text(line, "prompt"), line)
    return Prompt(asked, _others(line, "prompt"), _template(line))


def prompt_completion(line: Fields) -> PromptCompletion:
    """Parse {"prompt", "completion"} ("answer" is a synonym), {"messages"} that end in the assistant's, or {"text"}.

    The prompt of messages is what precedes the first answer. A line of two formats is refused. A prompt may stand
    beside messages, which begin with it.
    """
    line = canonical(line)
    answer = _answer(line)
    formats = [name for name in ("messages", "text", answer) if name in line]
    formats += ["prompt"] if formats == ["text"] and "prompt" in line else []
    if len(formats) > 1:
        raise ValueError(f"it must have one format, but has {' and '.join(formats)}: leave all but one out")
    others = _others(line, "prompt", "messages", "text", answer, *OF_TEMPLATE)
    if "messages" in line:
        messages = _text(line, "messages")
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise ValueError("messages must end with one of the assistant, which is trained on")
        if len(messages) < 2:
            raise ValueError("messages must hold one before the assistant's last, as its prompt")
        messages = _with_system(messages, line)
        first = next(i for i, each in enumerate(messages) if each["role"] == "assistant" and i > 0)
        asked, completion = messages[:first], messages[first:]
        if "prompt" in line:
            _check_prompt(_text(line, "prompt"), _text(line, "messages"))
    elif "text" in line:
        if not isinstance(line["text"], str):
            raise ValueError(f"text must be a string, but is {str(line['text'])[:60]!r}")
        asked, completion = "", _text(line, "text")
        others |= {name: line[name] for name in OF_TEMPLATE if name in line}
    else:
        completion = _text(line, answer)
        asked = _with_system(_text(line, "prompt"), line)
    asked, (completion,) = alike(asked, (completion,))
    return PromptCompletion(asked, completion, others, {} if "text" in line else _template(line))


def prompt_of_completion(line: Fields) -> Prompt:
    """Parse a line as `prompt_completion` does, and keep its prompt alone."""
    found = prompt_completion(line)
    return Prompt(found.prompt, found.fields, found.template)


def preference(line: Fields) -> Preference:
    """Parse {"prompt", "chosen", "rejected"}; without a prompt, it is what the two completions share.

    Of two conversations these are whole messages, of two strings whole words. Strings and messages may be mixed: see
    `alike`.
    """
    line = canonical(line)
    chosen, rejected = _text(line, "chosen"), _text(line, "rejected")
    if "prompt" in line:
        asked = _text(line, "prompt")
    elif isinstance(chosen, str) == isinstance(rejected, str):
        shared = _shared(chosen, rejected)
        asked, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not asked:
            kind = "strings" if isinstance(asked, str) else "conversations"
            raise ValueError(f"there must be a prompt, or a common beginning of the two {kind}, but there is neither")
    else:
        raise ValueError(f"prompt is missing: it has {', '.join(line)}")
    asked, (chosen, rejected) = alike(_with_system(asked, line), (chosen, rejected))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same completion")
    others = _others(line, "prompt", "chosen", "rejected", *OF_TEMPLATE)
    return Preference(asked, chosen, rejected, others, _template(line))


def unpaired_preference(line: Fields) -> UnpairedPreference:
    """Parse {"prompt", "completion" or "answer", "label"} or {"text", "label"}; the label is true, false, 1 or 0."""
    label = line.get("label")
    if label not in (True, False) or not isinstance(label, bool | int | float):
        raise ValueError(f"label must be true or false, but is {label!r}")
    shown = prompt_completion(_others(line, "label"))
    return UnpairedPreference(shown.prompt, shown.completion, bool(label), shown.fields, shown.template)


def ranked(line: Fields) -> Ranked:
    """Parse {"prompt", "answers"}, best first or with "ranks", 0 for the best; or a preference, as a ranking of two.

    A preference may have a "margin", the lead in score that the chosen completion should have.
    """
    line = canonical(line)
    if "answers" not in line:
        margins = (_number(line, "margin"), 0.0) if "margin" in line else ()
        found = preference(line).ranked()
        return dataclasses.replace(found, margins=margins, fields=_others(found.fields, "margin"))
    if "margin" in line:
        raise ValueError("margin must be that of a pair, chosen and rejected, but there are answers")
    answers = line["answers"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError("answers must be a list of two or more")
    asked = _with_system(_text(line, "prompt"), line)
    asked, found = alike(asked, tuple(_text({"answers": each}, "answers") for each in answers))
    ranks = line.get("ranks", list(range(len(answers))))
    whole = isinstance(ranks, list) and all(isinstance(rank, int) and rank >= 0 for rank in ranks)
    if not whole or len(ranks) != len(answers):
        raise ValueError(f"ranks must be an integer from 0 for each of {len(answers)} answers, but are {ranks!r}")
    if len(set(ranks)) < 2:
        raise ValueError("all ranks are equal, so that no answer is preferred")
    for first in range(len(found)):
        if any(found[first] == found[other] and ranks[first] != ranks[other] for other in range(first)):
            raise ValueError(f"answer {first + 1} occurs twice with different ranks")
    others = _others(line, "prompt", "answers", "ranks", *OF_TEMPLATE)
    return Ranked(asked, found, tuple(ranks), fields=others, template=_template(line))


def rated(line: Fields) -> Ranked:
    """Parse a ranking as `ranked`, with the scores that the data give its completions as `margins`.

    They are "score_chosen" and "score_rejected" of a preference, or "scores" of answers.
    """
    line = canonical(line)
    found = ranked(line)
    if "margin" in line:
        raise ValueError("it must have a margin or scores, but has both: leave one out")
    if "answers" not in line:
        scores = tuple(_number(line, name) for name in ("score_chosen", "score_rejected"))
    else:
        given = line.get("scores")
        if not isinstance(given, list) or len(given) != len(found.completions):
            raise ValueError(f"scores must be a number for each of {len(found.completions)} answers, but are {given!r}")
        scores = tuple(_number({"scores": each}, "scores") for each in given)
    fields = _others(found.fields, "score_chosen", "score_rejected", "scores")
    return dataclasses.replace(found, margins=scores, fields=fields)


def alike(asked: Text, completions: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """Return a prompt and its completions all as strings, or all as messages if one of them is a conversation.

    As messages, the prompt is the user's and a completion the assistant's. A completion that is the whole conversation
    begins with its prompt, which is removed from it.

    Raises:
        ValueError: for a completion that, without its prompt, does not begin and end with the assistant's message, or
            has an empty one; or an empty prompt beside conversations.
    """
    if all(isinstance(each, str) for each in (asked, *completions)):
        return asked, tuple(completions)
    if not asked:
        raise ValueError("the prompt is empty, but a completion is a conversation")
    asked = _messages(asked, "user")
    return asked, tuple(_without(asked, _messages(each, "assistant")) for each in completions)


def _messages(value: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": value},) if isinstance(value, str) else tuple(value)


def _without(asked: tuple[Message, ...], completion: tuple[Message, ...]) -> tuple[Message, ...]:
    for prompt in (asked, asked[1:] if asked[0]["role"] == "system" else ()):  # the system's may stand apart
        if prompt and len(completion) > len(prompt) and completion[: len(prompt)] == prompt:
            completion = completion[len(prompt) :]
            break
    if completion[0]["role"] != "assistant":
        raise ValueError(
            f"a completion must begin with the assistant's message or with the whole prompt, "
            f"but begins with one of the role {completion[0]['role']!r}"
        )
    if completion[-1]["role"] != "assistant":
        raise ValueError(
            f"a completion must end with the assistant's message, but ends with one of the role "
            f"{completion[-1]['role']!r}"
        )
    if any(each["role"] == "assistant" and not (each.get("content") or each.get("tool_calls")) for each in completion):
        raise ValueError("an assistant's message in the completion is empty")
    return completion


def _shared(chosen: Text, rejected: Text) -> int:
    """Return the length of the prompt that two completions begin with; neither is empty without it."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((place for place in range(most) if chosen[place] != rejected[place]), most)
    if isinstance(chosen, str):
        while shared > 0 and not chosen[shared].isspace():  # back to the last space, with which the completions begin
            shared -= 1
        while shared > 0 and chosen[shared - 1].isspace():
            shared -= 1
    return shared


def _check_prompt(asked: Text, messages: tuple[Message, ...]) -> None:
    begins = next((each.get("content") for each in messages if each["role"] == "user"), None)
    if asked not in (begins, "") if isinstance(asked, str) else asked != messages[: len(asked)]:
        raise ValueError("messages must begin with the prompt, but do not: leave the prompt out")


def _answer(line: Fields) -> str:
    if "answer" in line and "completion" in line:
        raise ValueError("it has completion and answer, which are synonyms: leave one out")
    return "answer" if "answer" in line else "completion"


def _others(line: Fields, *names: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def _number(line: Fields, name: str) -> float:
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, but {f'is {value!r}' if name in line else 'is missing'}")
    return float(value)


def _text(line: Fields, name: str) -> Text:
    """Return a string or a conversation, which must not be empty; a prompt may be."""
    if name not in line:
        raise ValueError(f"{name} is missing: it has {', '.join(line) or 'nothing'}")
    value = line[name]
    if isinstance(value, str):
        if not value and name != "prompt":
            raise ValueError(f"{name} is empty")
        return value
    value = [value] if isinstance(value, Mapping) else value
    if isinstance(value, Sequence) and value and all(isinstance(each, Mapping) for each in value):
        messages = tuple(map(_message, value))
        if all(messages):
            return messages
    raise ValueError(f'{name} must be a string or a list of {{"role", "content"}}, but is {str(line[name])[:60]!r}')


SHAREGPT = {  # the roles of ShareGPT's form, {"from", "value"}
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def _message(value: Fields) -> Message | None:
    """Return a message with its entries that are not null; None if it is not one. Content may be missing beside calls.

    Raises:
        ValueError: for an unknown role of ShareGPT's form.
    """
    if "from" in value and "value" in value and "role" not in value:
        if value["from"] not in SHAREGPT:
            raise ValueError(f"from must be one of {', '.join(SHAREGPT)}, but is {value['from']!r}")
        further = {name: each for name, each in value.items() if name not in ("from", "value")}
        value = {"role": SHAREGPT[value["from"]], "content": value["value"]} | further
    found = {name: each for name, each in value.items() if each is not None}
    if not isinstance(found.get("role"), str):
        return None
    called = "content" not in found and bool(found.get("tool_calls"))
    return found if called or isinstance(found.get("content"), str) else None


OF_TEMPLATE = ("system", "tools", "chat_template_kwargs")  # entries of a line that its conversation is rendered with


def _with_system(asked: Text, line: Fields) -> Text:
    """Return a prompt behind the line's system message; a string becomes a message if the line has one, or tools."""
    system = line.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"system must be a string, but is {str(system)[:60]!r}")
    if not system and not _template(line):
        return asked
    if not asked:
        raise ValueError("the prompt is empty, but there is a system message, tools or chat_template_kwargs")
    asked = _messages(asked, "user")
    if not system:
        return asked
    if asked[0]["role"] == "system":
        raise ValueError("it has system, but its messages begin with a system message too: leave one out")
    return ({"role": "system", "content": system}, *asked)


def _template(line: Fields) -> dict[str, Any]:
    """Return the variables of the chat template that a line sets: its tools, and chat_template_kwargs."""
    further, tools = line.get("chat_template_kwargs", {}), line.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools else None
        except json.JSONDecodeError:
            tools = 0
    if not (tools is None or (isinstance(tools, list) and all(isinstance(each, Mapping) for each in tools))):
        raise ValueError(f"tools must be a list of JSON schemas, but is {str(line['tools'])[:60]!r}")
    if not isinstance(further, Mapping):
        raise ValueError(f"chat_template_kwargs must be an object, but is {str(further)[:60]!r}")
    return {**further, **({"tools": tools} if tools else {})}


ALPACA = (  # the prompt of Taori et al. 2023, which a model without a chat template is given
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:"
)


def canonical(line: Fields, *, chat: bool = False) -> dict[str, Any]:
    """Return a line without null entries, ShareGPT's and Alpaca's forms as messages, prompts and completions.

    Args:
        chat: Alpaca's instruction becomes a user's message; otherwise the published prompt is written around it.
    """
    line = {name: value for name, value in line.items() if value is not None}
    if "conversations" in line:
        if "messages" in line:
            raise ValueError("it has messages and conversations, which are synonyms: leave one out")
        name = "prompt" if "chosen" in line and "prompt" not in line else "messages"
        line = {name if each == "conversations" else each: value for each, value in line.items()}
    if "instruction" in line and not {"prompt", "messages", "text"} & line.keys():
        instruction, further = line.pop("instruction"), line.pop("input", "")
        if not isinstance(instruction, str) or not isinstance(further, str):
            raise ValueError("instruction and input must be strings")
        if chat:
            asked = f"{instruction}\n\n{further}" if further else instruction
            line["prompt"] = [{"role": "user", "content": asked}]
        else:
            paired = ", paired with an input that provides further context" if further else ""
            line["prompt"] = ALPACA.format(paired, instruction, f"### Input:\n{further}\n\n" if further else "")
        if "output" in line and not {"chosen", "completion", "answer", "answers"} & line.keys():
            line["completion"] = line.pop("output")
    return line


# Files and lists ------------------------------------------------------------------------------------------------------

NOT_JSON, NOT_OBJECT = "it is not JSON", "it must be a JSON object"  # how the reasons of bad lines begin
NAMED = 5  # bad lines that an error names; all are counted
OnBad = Literal["raise", "skip"]


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line or row that is not a record, or cannot be trained on, and the reason."""

    number: int
    reason: str


class Records(Sequence[Record], Generic[Record]):
    """Records of a file or a list; `numbers` are those of their lines or rows, `bad_lines` those that are none.

    They are parsed when one is asked for, and none of them is kept. All are checked once, at the latest when their
    number is asked for.
    """

    unit = "row"

    def __init__(self, source: str, parse: Callable[[Fields], Record], on_bad: OnBad):
        if on_bad not in ("raise", "skip"):
            raise ValueError(f'on_bad must be "raise" or "skip", but is {on_bad!r}.')
        self.source, self.parse, self.on_bad = source, parse, on_bad
        self._found: tuple[Sequence[int], Sequence[int], list[BadLine]] | None = None

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of the lines or rows of the records."""
        return self._checked()[0]

    @property
    def places(self) -> Sequence[int]:
        """Their places, for `at`."""
        return self._checked()[1]

    @property
    def bad_lines(self) -> list[BadLine]:
        """The lines or rows that were skipped."""
        return self._checked()[2]

    def _checked(self) -> tuple[Sequence[int], Sequence[int], list[BadLine]]:
        return self._found if self._found is not None else self.check()._found

    def raw(self) -> Iterator[tuple[int, int, Any]]:
        """Yield every line or row with its number and place, as `at` returns it."""
        raise NotImplementedError

    def at(self, place: int) -> Any:
        """Return the line or row at a place."""
        raise NotImplementedError

    def digest(self, *, exact: bool = False) -> str:
        """Return the SHA-256 of the contents.

        Args:
            exact: refuse contents that JSON cannot hold, which otherwise count by their representation.

        Raises:
            TypeError: for such contents.
        """
        raise NotImplementedError

    def check(self) -> Records[Record]:
        """Parse all lines or rows, and return the same object.

        Raises:
            ValueError: for bad lines or rows, with their numbers and reasons, or for data without a record.
        """
        numbers, places, bad = [], [], []
        for number, place, raw in self.raw():
            try:
                record_of(raw, self.parse)
                numbers.append(number)
                places.append(place)
            except ValueError as error:
                bad.append(BadLine(number, str(error)))
        self.take(numbers, places, bad)
        return self

    def take(self, numbers: Sequence[int], places: Sequence[int], bad_lines: list[BadLine]) -> None:
        """Take the result of a check.

        Raises:
            ValueError: as `check`.
        """
        self._found = numbers, places, bad_lines
        if self.bad_lines and self.on_bad == "raise":
            raise ValueError(self._complaint())
        if not len(self.numbers):
            raise ValueError(f"{self.source} has no records{f': {self._complaint()}' if self.bad_lines else ''}.")

    def _complaint(self) -> str:
        shown = "; ".join(f"{self.unit} {bad.number}: {bad.reason}" for bad in self.bad_lines[:NAMED])
        more = f"; and {len(self.bad_lines) - NAMED} more" if len(self.bad_lines) > NAMED else ""
        no_objects = not len(self.numbers) and self.bad_lines[0].reason.startswith((NOT_JSON, NOT_OBJECT))
        form = "; there must be one JSON object per line" if no_objects and self.unit == "line" else ""
        several = "s" * (len(self.bad_lines) > 1)
        return f"{self.source} has {len(self.bad_lines)} bad {self.unit}{several}: {shown}{more}{form}"

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return record_of(self.at(int(self.places[index])), self.parse)


def record_of(raw: bytes | Any, parse: Callable[[Fields], Record]) -> Record:
    """Return the record of a line of JSON (bytes) or of a dict.

    Raises:
        ValueError: if it is not one.
    """
    try:
        if isinstance(raw, bytes):
            return parse(_object(raw))
        if not isinstance(raw, Mapping):
            raise ValueError(f"it must be a dict, but is a {type(raw).__name__}")
        return parse(_without_arrays(raw))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_arrays(value: Any) -> Any:
    """Return dicts and lists of them with NumPy's numbers and arrays as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _without_arrays(each) for name, each in value.items()}
    return [*map(_without_arrays, value)] if isinstance(value, list) else value


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.removeprefix(BOM).decode("utf-8")
        found = json.loads(text, object_pairs_hook=no_key_twice)
        if "\\u" in text:  # JSON can hold half a surrogate pair, which is not a character: no tokenizer takes it
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(f"it holds \\u{half:04x}, half a surrogate pair, which is not a character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{NOT_JSON}: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{NOT_OBJECT}, but is a {type(found).__name__}")
    return found


class RecordList(Records[Record]):
    """The records of dicts in memory; their numbers are places from 0.

    Args:
        rows: any iterable of dicts, or an object with a length and dicts at its indices, such as a `datasets.Dataset`.
        parse: maps a dict to a record; it raises ValueError for one that is not.
        on_bad: "raise" names the first bad rows; "skip" leaves them out and lists them in `bad_lines`.
        source: the name of the data in errors.
        path: the file that they were read from, if any.
    """

    def __init__(
        self,
        rows: Iterable[Fields],
        parse: Callable[[Fields], Record],
        *,
        on_bad: OnBad = "raise",
        source: str = "data",
        path: Path | None = None,
    ):
        super().__init__(source, parse, on_bad)
        by_index = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        self._rows, self._path = rows if by_index else list(rows), path

    def raw(self) -> Iterator[tuple[int, int, Any]]:
        """Yield every row with its number, twice."""
        yield from ((place, place, self.at(place)) for place in range(len(self._rows)))

    def at(self, place: int) -> Any:
        """Return a row."""
        return self._rows[place]

    def digest(self, *, exact: bool = False) -> str:
        """Return the SHA-256 of the file, or of the rows as JSON."""
        if self._path is not None:
            return _file_digest(self._path)
        found = hashlib.sha256()
        for _, _, row in self.raw():
            found.update(json.dumps(_without_arrays(row), default=_refuse if exact else repr).encode() + b"\n")
        return found.hexdigest()


def _refuse(value: Any) -> Any:
    raise TypeError(f"data must hold what JSON can, but hold a {type(value).__name__}")


class JsonLines(Records[Record]):
    """The records of a file of JSON lines, one a line; blank lines are skipped.

    Only the place where each line begins is kept, so that a file may be larger than the memory.

    Args:
        path: UTF-8, with or without a byte order mark.
        parse: maps a JSON object to a record; it raises ValueError for one that is not.
        on_bad: "raise" names the first bad lines; "skip" leaves them out and lists them in `bad_lines`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a folder or a pipe.
    """

    unit = "line"

    def __init__(self, path: Path, parse: Callable[[dict[str, Any]], Record], *, on_bad: OnBad = "raise"):
        self.path = Path(path)
        self.path.stat()
        if self.path.is_dir():
            raise ValueError(f"{path} must be a file, but is a folder.")
        if not self.path.is_file():
            raise ValueError(f"{path} must be a file, which is read more than once, but is a pipe or a device.")
        super().__init__(str(path), parse, on_bad)

    def raw(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield every line that is not blank with its number, from 1, and the byte it begins at."""
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(BOM).strip():
                    yield number, start, line
                start += len(line)

    def at(self, place: int) -> bytes:
        """Return the line that begins at a byte."""
        with self.path.open("rb") as file:
            file.seek(place)
            return file.readline()

    def digest(self, *, exact: bool = False) -> str:
        """Return the SHA-256 of the file."""
        return _file_digest(self.path)


BOM = b"\xef\xbb\xbf"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(
    data: Any, parse: Callable[[Fields], Record], *, on_bad: OnBad = "raise", name: str = "data", check: bool = True
) -> Records[Record]:
    """Return the records of a file (a path) or of dicts.

    A file is JSON lines, unless its name ends in .json and it begins with a bracket (a JSON list), or ends in .csv,
    .tsv or .parquet. Of them, JSON lines alone stay on disk.

    Args:
        data: a path, any iterable of dicts, or an object with a length and dicts at its indices.
        parse: maps a line to a record; it raises ValueError for one that is not.
        on_bad: "raise" names the first bad lines or rows; "skip" leaves them out and lists them in `bad_lines`.
        name: of the data, in errors.
        check: parse every line now.

    Raises:
        TypeError: if `data`, called `name`, is neither.
        FileNotFoundError: if the file does not exist.
        ModuleNotFoundError: for a Parquet file without pyarrow.
        ValueError: naming each bad line, or for a file that cannot be read.
    """
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # of pandas or Polars
        raise TypeError(
            f"{name} must be a path or an iterable of dicts, but is a {type(data).__name__}: give its rows, as "
            'to_dict("records") of pandas and to_dicts() of Polars return them.'
        )
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        reader = READERS.get(path.suffix.lower())
        if reader is None or (reader is _json_list and not _begins_with_bracket(path)):
            found = JsonLines(path, parse, on_bad=on_bad)
        else:
            found = RecordList(reader(path), parse, on_bad=on_bad, source=str(data), path=path)
    elif isinstance(data, Mapping | bytes) or not (isinstance(data, Iterable) or indexed):
        raise TypeError(f"{name} must be a path or an iterable of dicts, but is a {type(data).__name__}.")
    else:
        found = RecordList(data, parse, on_bad=on_bad, source=name)
    return found.check() if check else found


def _begins_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(BOM).lstrip()[:1] == b"["


def _json_list(path: Path) -> list[Any]:
    try:
        return json.loads(path.read_bytes().removeprefix(BOM), object_pairs_hook=no_key_twice)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON list: {error}") from None


TEXTS = ("prompt", "completion", "answer", "chosen", "rejected", "text", "instruction", "input", "output", "system")


def _csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table with a header.

    Cells that begin as messages do are read as these, from JSON or as Python writes them, which pandas does. Other
    cells of `TEXTS` are strings, all others JSON where they can be.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(rows, [])
            found = []
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path} must have {len(header)} cells in each row, but has {len(row)} in line {rows.line_num}"
                    )
                if row:
                    pairs = zip(header, row, strict=True)
                    found.append(
                        {name: _messages_of(cell) or (cell if name in TEXTS else _cell(cell)) for name, cell in pairs}
                    )
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table of comma-separated values: {error}") from None
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has a column more than once: {', '.join(header)}")
    return found


BEGINS_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def _messages_of(cell: str) -> list[Any] | None:
    """Return a cell that begins as messages do as these, or as a list that no record takes; None for other cells."""
    if not BEGINS_MESSAGES.match(cell):
        return None
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(cell)
    return [cell]


def _cell(cell: str) -> Any:
    try:
        return json.loads(cell) if cell else None
    except (ValueError, RecursionError):
        lower = cell.lower()
        return lower == "true" if lower in ("true", "false") else cell


def _parquet(path: Path) -> list[dict[str, Any]]:
    path.stat()
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Parquet files need the package pyarrow: pip install 'jaxrl_llm[parquet]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise ValueError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".json": _json_list,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict: an `object_pairs_hook`, without which JSON keeps the last of two equal keys.

    Raises:
        ValueError: if a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {twice!r} more than once")
    return found
