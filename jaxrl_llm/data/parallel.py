"""Parallel text: two plain files with one sentence per line, or one file of tab-separated or JSON lines.

No line is skipped or repaired. Malformed lines raise an error with file and line number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class SentencePair(NamedTuple):
    """A sentence and its translation, stripped of white space."""

    source: str
    target: str


def read_pairs(
    path: Path, target_path: Path | None = None, *, source_field: str = "source", target_field: str = "target"
) -> list[SentencePair]:
    """Read sentence pairs from one file, or from two files with one sentence per line.

    Args:
        path: the sentences, one per line, if `target_path` is given. Otherwise both sides: `.tsv` with two columns, or
            `.jsonl` with one object per line.
        target_path: the translations, one per line.
        source_field: field of the sentence in a JSON line; "translation.en" is a field of a nested object.
        target_field: field of its translation.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if the two files differ in their numbers of lines, a line is empty, not UTF-8 or malformed, or a
            file is empty.
    """
    path = Path(path)
    if target_path is not None:
        return _of_two_files(path, Path(target_path))
    if path.suffix not in (".tsv", ".jsonl"):
        raise ValueError(f"{path} must end in .tsv or .jsonl, or come with a second file of translations.")
    fields = (source_field, target_field)
    rows = (
        _columns(where, line) if path.suffix == ".tsv" else _fields(where, line, fields) for where, line in _lines(path)
    )
    return [SentencePair(*row) for row in rows]


def _of_two_files(source: Path, target: Path) -> list[SentencePair]:
    pairs, counts = [], [0, 0]
    for ours, theirs in itertools.zip_longest(_lines(source), _lines(target)):
        for side, line in enumerate((ours, theirs)):
            counts[side] += line is not None
        if ours and theirs:
            pairs.append(SentencePair(_sentence(*ours), _sentence(*theirs)))
    if counts[0] != counts[1]:
        raise ValueError(f"{source} has {counts[0]} lines, but {target} has {counts[1]}.")
    return pairs


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (location, text) of every line. Lines end with a line feed, optionally after a carriage return."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file, but does not exist.")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    if not data:
        raise ValueError(f"{path} is empty.")
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            yield f"line {number} of {path}", line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} of {path} must be UTF-8, but has {error.reason} at its byte {error.start}."
            ) from None


def _sentence(where: str, text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a sentence, but is {text!r}.")
    if not text.strip():
        raise ValueError(f"{where} is empty.")
    return text.strip()


def _columns(where: str, line: str) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) != 2:
        raise ValueError(f"{where} must have 2 columns with a tab between them, but has {len(columns)}.")
    source, target = (_sentence(f"column {number} of {where}", each) for number, each in enumerate(columns, 1))
    return source, target


def _fields(where: str, line: str, names: tuple[str, str]) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at its character {error.pos + 1}.") from None
    source, target = (_sentence(f"{name!r} in {where}", _field(where, row, name)) for name in names)
    return source, target


def _field(where: str, row: Any, name: str) -> Any:
    value = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{where} has no field {name!r}: {json.dumps(row, ensure_ascii=False)[:80]}")
        value = value[part]
    return value
