"""Files of JSON lines as sequences of records, checked once and read when asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from tqdm import tqdm

Record = TypeVar("Record")
NO_JSON, NO_OBJECT = "it is not JSON", "it must be a JSON object"  # how the reasons of bad lines begin
NAMED = 5  # bad lines that an error names; all are counted
LARGE = 2**24  # bytes from which on reading shows its progress


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook`: JSON would keep the last of two entries of one key, and say nothing.

    Raises:
        ValueError: if a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {twice!r} more than once")
    return found


class BadLine(NamedTuple):
    """A line that is no record, and why."""

    number: int
    reason: str


class JsonLines(Sequence[Record], Generic[Record]):
    """The records of a file, one a line; blank lines are none.

    Every line is parsed and checked when the file is opened. What is kept is where each begins, so that a file may be
    larger than the memory.

    Args:
        path: UTF-8, with or without a byte order mark.
        parse: from a JSON object to a record; it raises ValueError for one that is not.
        on_bad: "raise" for the first bad lines, or "skip" them: they are then in `bad_lines`, for the caller to report.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the number of each bad line and its reason, or if the file holds no record.
    """

    def __init__(
        self, path: Path, parse: Callable[[dict[str, Any]], Record], *, on_bad: Literal["raise", "skip"] = "raise"
    ):
        if on_bad not in ("raise", "skip"):
            raise ValueError(f'on_bad must be "raise" or "skip", but is {on_bad!r}.')
        self.path, self._parse = Path(path), parse
        self._starts, self._numbers = [], []
        self.bad_lines: list[BadLine] = []
        self._open()
        if self.bad_lines and on_bad == "raise":
            raise ValueError(self._complaint())
        if not self._starts:
            raise ValueError(f"{self.path} holds no record{f': {self._complaint()}' if self.bad_lines else ''}.")

    def _open(self) -> None:
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
                        self._numbers.append(number)
                    except ValueError as error:
                        self.bad_lines.append(BadLine(number, str(error)))
                start += len(line)
                progress.update(len(line))

    def _record(self, line: bytes) -> Record:
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
            found = json.loads(text, object_pairs_hook=no_key_twice)
            if "\\u" in text:  # then JSON can hold half a surrogate pair, which is no character: no tokenizer takes it
                json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise ValueError(f"it holds \\u{half:04x}, half a surrogate pair, which is no character") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{NO_JSON}: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{NO_OBJECT}, but is a {type(found).__name__}")
        return self._parse(found)

    def _complaint(self) -> str:
        shown = "; ".join(f"line {bad.number}: {bad.reason}" for bad in self.bad_lines[:NAMED])
        more = f"; and {len(self.bad_lines) - NAMED} more" if len(self.bad_lines) > NAMED else ""
        no_objects = not self._starts and self.bad_lines[0].reason.startswith((NO_JSON, NO_OBJECT))
        form = "; there must be one JSON object per line" if no_objects else ""
        return f"{self.path} has {len(self.bad_lines)} bad line{'s' * (len(self.bad_lines) > 1)}: {shown}{more}{form}"

    def line(self, index: int) -> int:
        """The number of the line that a record stands in, from 1."""
        return self._numbers[index]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start = self._starts[index]
        with self.path.open("rb") as file:
            file.seek(start)
            return self._record(file.readline())
