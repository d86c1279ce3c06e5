"""Rows of tokens: all records tokenised once, in a few arrays, and kept in a cache. Imports no jax."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from jaxrl_llm import runtime, text
from jaxrl_llm.data import records
from jaxrl_llm.data.records import BadLine, Fields, Text
from jaxrl_llm.training import encoding
from jaxrl_llm.training.encoding import Encoded, Encoder, Parser, TooLong


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
    code = [Path(module.__file__).read_text(encoding="utf-8") for module in (records, text, encoding)]
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
