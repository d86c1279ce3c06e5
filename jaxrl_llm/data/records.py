"""Records of training data: the formats that a line may have, and files and lists of them, checked once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from tqdm import tqdm

Message = dict[str, str]  # {"role": ..., "content": ...}
Text = str | tuple[Message, ...]  # a string, or the messages of a conversation
Fields = Mapping[str, Any]
Record = TypeVar("Record")

# Formats --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to be completed; `fields` are the line's other entries, which a reward function can read."""

    prompt: Text
    fields: Fields = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
    """A prompt-completion example. Plain text has the prompt ""."""

    prompt: Text
    completion: Text


@dataclasses.dataclass(frozen=True)
class Ranked:
    """K completions with their ranks: 0 is best, equal ranks are ties; `fields` are the line's other entries."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]
    fields: Fields = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two completions of which the first is preferred; `fields` are the line's other entries."""

    prompt: Text
    chosen: Text
    rejected: Text
    fields: Fields = dataclasses.field(default_factory=dict)

    def ranked(self) -> Ranked:
        """Return it as a ranking of two."""
        return Ranked(self.prompt, (self.chosen, self.rejected), (0, 1), self.fields)


@dataclasses.dataclass(frozen=True)
class UnpairedPreference:
    """A completion that is desirable or not."""

    prompt: Text
    completion: Text
    label: bool


def prompt(line: Fields) -> Prompt:
    """Parse {"prompt"} with any further entries."""
    return Prompt(_text(line, "prompt"), _others(line, "prompt"))


def prompt_completion(line: Fields) -> PromptCompletion:
    """Parse {"prompt", "completion"} ("answer" is a synonym), {"messages"} that end in the assistant's, or {"text"}.

    A line of two formats is refused. A prompt may stand beside messages, which begin with it.
    """
    answer = "answer" if "answer" in line and "completion" not in line else "completion"
    formats = [name for name in ("messages", "text", answer) if name in line]
    formats += ["prompt"] if formats == ["text"] and "prompt" in line else []
    if len(formats) > 1:
        raise ValueError(f"it must have one format, but has {' and '.join(formats)}: leave all but one out")
    if "messages" in line:
        messages = _text(line, "messages")
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise ValueError("messages must end with one of the assistant, which is trained on")
        if len(messages) < 2:
            raise ValueError("messages must hold one before the assistant's last, as its prompt")
        return PromptCompletion(messages[:-1], messages[-1:])
    if "text" in line:
        if not isinstance(line["text"], str):
            raise ValueError(f"text must be a string, but is {str(line['text'])[:60]!r}")
        return PromptCompletion("", _text(line, "text"))
    completion = _text(line, answer)
    asked, (completion,) = alike(_text(line, "prompt"), (completion,))
    return PromptCompletion(asked, completion)


def preference(line: Fields) -> Preference:
    """Parse {"prompt", "chosen", "rejected"}; without a prompt, it is what the two conversations share.

    Strings and messages may be mixed: see `alike`.
    """
    chosen, rejected = _text(line, "chosen"), _text(line, "rejected")
    if "prompt" in line:
        asked = _text(line, "prompt")
    elif isinstance(chosen, tuple) and isinstance(rejected, tuple):
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        asked, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not asked:
            raise ValueError("there is no prompt, and the two conversations do not begin alike")
    else:
        raise ValueError(f"prompt is missing: there are {', '.join(line)}")
    asked, (chosen, rejected) = alike(asked, (chosen, rejected))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same completion")
    return Preference(asked, chosen, rejected, _others(line, "prompt", "chosen", "rejected"))


def unpaired_preference(line: Fields) -> UnpairedPreference:
    """Parse {"prompt", "completion" or "answer", "label"} or {"text", "label"}; the label is true, false, 1 or 0."""
    label = line.get("label")
    if label not in (True, False) or not isinstance(label, bool | int):
        raise ValueError(f"label must be true or false, but is {label!r}")
    shown = prompt_completion(_others(line, "label"))
    return UnpairedPreference(shown.prompt, shown.completion, bool(label))


def ranked(line: Fields) -> Ranked:
    """Parse {"prompt", "answers"}, best first or with "ranks", 0 for the best; or a preference, as a ranking of two."""
    if "answers" not in line:
        return preference(line).ranked()
    answers = line["answers"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError("answers must be a list of two or more")
    asked, found = alike(_text(line, "prompt"), tuple(_text({"answers": each}, "answers") for each in answers))
    ranks = line.get("ranks", list(range(len(answers))))
    whole = isinstance(ranks, list) and all(isinstance(rank, int) and rank >= 0 for rank in ranks)
    if not whole or len(ranks) != len(answers):
        raise ValueError(f"ranks must be an integer from 0 for each of {len(answers)} answers, but are {ranks!r}")
    if len(set(ranks)) < 2:
        raise ValueError("all ranks are equal, so that no answer is preferred")
    for first in range(len(found)):
        if any(found[first] == found[other] and ranks[first] != ranks[other] for other in range(first)):
            raise ValueError(f"answer {first + 1} occurs twice with different ranks")
    return Ranked(asked, found, tuple(ranks), _others(line, "prompt", "answers", "ranks"))


def alike(asked: Text, completions: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """Return a prompt and its completions all as strings, or all as messages if one of them is a conversation.

    As messages, the prompt is the user's and a completion the assistant's. A completion that is the whole conversation
    begins with its prompt, which is removed from it.

    Raises:
        ValueError: for a completion that, without its prompt, does not begin with the assistant's message; or an empty
            prompt beside conversations.
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
    if len(completion) > len(asked) and completion[: len(asked)] == asked:
        completion = completion[len(asked) :]
    if completion[0]["role"] != "assistant":
        raise ValueError(
            f"a completion must begin with the assistant's message or with the whole prompt, "
            f"but begins with one of the role {completion[0]['role']!r}"
        )
    return completion


def _others(line: Fields, *names: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def _text(line: Fields, name: str) -> Text:
    """Return a string or a conversation, which must not be empty; a prompt may be."""
    if name not in line:
        raise ValueError(f"{name} is missing: there {'are ' + ', '.join(line) if line else 'is nothing'}")
    value = line[name]
    if isinstance(value, str):
        if not value and name != "prompt":
            raise ValueError(f"{name} is empty")
        return value
    if isinstance(value, Sequence) and value and all(map(_is_message, value)):
        return tuple(value)
    raise ValueError(f'{name} must be a string or a list of {{"role", "content"}}, but is {str(value)[:60]!r}')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


# Files and lists ------------------------------------------------------------------------------------------------------

NOT_JSON, NOT_OBJECT = "it is not JSON", "it must be a JSON object"  # how the reasons of bad lines begin
NAMED = 5  # bad lines that an error names; all are counted
LARGE = 2**24  # bytes of a file that is read with a progress bar
OnBad = Literal["raise", "skip"]


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line or row that is not a record, and the reason."""

    number: int
    reason: str


class Records(Sequence[Record], Generic[Record]):
    """Records that were all parsed and checked once; `numbers` are those of their lines or rows."""

    unit = "row"

    def __init__(self, source: str, on_bad: OnBad):
        if on_bad not in ("raise", "skip"):
            raise ValueError(f'on_bad must be "raise" or "skip", but is {on_bad!r}.')
        self.source, self.numbers, self.bad_lines = source, [], []
        self._check_all()
        if self.bad_lines and on_bad == "raise":
            raise ValueError(self._complaint())
        if not self.numbers:
            raise ValueError(f"{source} has no records{f': {self._complaint()}' if self.bad_lines else ''}.")

    def _check_all(self) -> None:
        raise NotImplementedError

    def digest(self) -> str:
        """Return the SHA-256 of the contents."""
        raise NotImplementedError

    def _complaint(self) -> str:
        shown = "; ".join(f"{self.unit} {bad.number}: {bad.reason}" for bad in self.bad_lines[:NAMED])
        more = f"; and {len(self.bad_lines) - NAMED} more" if len(self.bad_lines) > NAMED else ""
        no_objects = not self.numbers and self.bad_lines[0].reason.startswith((NOT_JSON, NOT_OBJECT))
        form = "; there must be one JSON object per line" if no_objects else ""
        several = "s" * (len(self.bad_lines) > 1)
        return f"{self.source} has {len(self.bad_lines)} bad {self.unit}{several}: {shown}{more}{form}"

    def __len__(self) -> int:
        return len(self.numbers)


class RecordList(Records[Record]):
    """The records of dicts in memory; their numbers are places from 0.

    Args:
        rows: any iterable of dicts.
        parse: maps a dict to a record; it raises ValueError for one that is not.
        on_bad: "raise" names the first bad rows; "skip" leaves them out and lists them in `bad_lines`.
        source: the name of the data in errors.

    Raises:
        ValueError: naming the number of each bad row and its reason, or if there is no record.
    """

    def __init__(
        self,
        rows: Iterable[Fields],
        parse: Callable[[Fields], Record],
        *,
        on_bad: OnBad = "raise",
        source: str = "data",
    ):
        self._rows, self._parse, self._found = list(rows), parse, []
        super().__init__(source, on_bad)

    def _check_all(self) -> None:
        for number, row in enumerate(self._rows):
            try:
                if not isinstance(row, Mapping):
                    raise ValueError(f"it must be a dict, but is a {type(row).__name__}")
                plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
                self._found.append(self._parse(plain))
                self.numbers.append(number)
            except ValueError as error:
                self.bad_lines.append(BadLine(number, str(error)))

    def digest(self) -> str:
        """Return the SHA-256 of the rows as JSON."""
        return hashlib.sha256(json.dumps(self._rows, sort_keys=True, default=str).encode()).hexdigest()

    def __getitem__(self, index: int) -> Record:
        return self._found[index]


class JsonLines(Records[Record]):
    """The records of a file of JSON lines, one a line; blank lines are skipped.

    Every line is parsed and checked when the file is opened. Only the place where each begins is kept, so that a file
    may be larger than the memory.

    Args:
        path: UTF-8, with or without a byte order mark.
        parse: maps a JSON object to a record; it raises ValueError for one that is not.
        on_bad: "raise" names the first bad lines; "skip" leaves them out and lists them in `bad_lines`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the number of each bad line and its reason, or if the file has no records.
    """

    unit = "line"

    def __init__(self, path: Path, parse: Callable[[dict[str, Any]], Record], *, on_bad: OnBad = "raise"):
        self.path, self._parse, self._starts = Path(path), parse, []
        super().__init__(str(path), on_bad)

    def _check_all(self) -> None:
        size = self.path.stat().st_size
        start = 0
        with (
            self.path.open("rb") as file,
            tqdm(total=size, unit="B", unit_scale=True, disable=size < LARGE) as progress,
        ):
            for number, line in enumerate(file, 1):
                if line.removeprefix(b"\xef\xbb\xbf").strip():
                    try:
                        self._record(line)
                        self._starts.append(start)
                        self.numbers.append(number)
                    except ValueError as error:
                        self.bad_lines.append(BadLine(number, str(error)))
                start += len(line)
                progress.update(len(line))

    def _record(self, line: bytes) -> Record:
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
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
        return self._parse(found)

    def digest(self) -> str:
        """Return the SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __getitem__(self, index: int) -> Record:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start = self._starts[index]
        with self.path.open("rb") as file:
            file.seek(start)
            return self._record(file.readline())


def read(
    data: Any, parse: Callable[[Fields], Record], *, on_bad: OnBad = "raise", name: str = "data"
) -> Records[Record]:
    """Return the records of a file of JSON lines (a path), or of dicts.

    Raises:
        TypeError: if `data`, called `name`, is neither.
        FileNotFoundError, ValueError: as `JsonLines` and `RecordList`.
    """
    if isinstance(data, str | os.PathLike):
        return JsonLines(Path(data), parse, on_bad=on_bad)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"{name} must be a path or an iterable of dicts, but is a {type(data).__name__}.")
    return RecordList(data, parse, on_bad=on_bad, source=name)


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
