"""From records to padded batches of tokens, in an order that depends on seed and step alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
from jaxtyping import Int, PyTree

from jaxrl_llm import text
from jaxrl_llm.data import records
from jaxrl_llm.data.records import Fields, Text, alike
from jaxrl_llm.scoring import Sequences, pad_completions
from jaxrl_llm.training.config import Cut
from jaxrl_llm.training.preference import PairBatch, UnpairedBatch
from jaxrl_llm.training.reward_model import RankedBatch
from jaxrl_llm.training.rollout import Prompts

Length = TypeVar("Length", int, Int[np.ndarray, "batch"])
Columns = bool | frozenset[str]  # numbers beside the text that a loss takes: all, none, or those of these names


# From text to tokens --------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A prompt's tokens and those of each of its completions."""

    prompt: list[int]
    completions: list[list[int]]


class Encoder:
    """Encodes prompts with their completions, each ending in EOS, in at most `max_length` tokens.

    A completion that is a string is encoded by itself, so that no token spans the boundary to its prompt, in training
    as in decoding. Conversations go through the chat template; a completion is what it adds to the prompt. If one of
    prompt and completions is a conversation, all are: see `records.alike`.

    Args:
        tokenizer: of Hugging Face's kind.
        max_length: most tokens of prompt and completion together.
        cut: what longer rows lose: "left", the beginning of the prompt, but not its BOS token; "right", the end of the
            completion, and EOS with it; "raise" refuses them.

    `cut_prompts` and `cut_completions` count what was cut.

    Raises:
        ValueError: if `cut` is another one, or the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, cut: Cut = "left"):
        if cut not in get_args(Cut):
            raise ValueError(f"cut must be one of {', '.join(get_args(Cut))}, but is {cut!r}.")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer must have an EOS token, which ends completions, but has none.")
        self._tokenizer, self.max_length, self._cut = tokenizer, max_length, cut
        self.cut_prompts = self.cut_completions = 0

    def checked(self, parse: Callable[[Fields], Any]) -> Callable[[Fields], Any]:
        """Return the parser with one more refusal, a prompt that the chat template refuses: as any bad line."""

        def parsed(fields: Fields) -> Any:
            record = parse(fields)
            if not isinstance(record.prompt, str):
                self._rendered(record.prompt, generation=True)
            return record

        return parsed

    def prompt(self, asked: Text, *, room: int) -> list[int]:
        """Return a prompt's tokens, cut so that `room` more fit.

        Raises:
            ValueError: if it is too long and not to be cut on the left.
        """
        tokens = self._prompt(asked)
        most = self.max_length - room
        if len(tokens) <= most:
            return tokens
        if self._cut != "left" or not self._can_be_cut(tokens, most):
            raise ValueError(f"a prompt of {len(tokens)} tokens leaves no room for {room} more in {self.max_length}.")
        return self._end_of(tokens, most)

    def __call__(self, asked: Text, completions: Sequence[Text]) -> Encoded:
        """Return a prompt with its completions, which all follow the same tokens of the prompt.

        Raises:
            ValueError: for a row that does not fit and cannot be cut, or a chat template that changes the prompt when
                the completion follows.
        """
        asked, completions = alike(asked, completions)
        prompt, found = self._prompt(asked), [self._completion(asked, each) for each in completions]
        longest = max(map(len, found))
        if len(prompt) + longest <= self.max_length:
            return Encoded(prompt, found)
        if self._cut == "raise":
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and a completion of {longest} are longer than {self.max_length}."
            )
        if self._cut == "left":
            most = self.max_length - longest
            if not self._can_be_cut(prompt, most):
                raise ValueError(
                    f"a completion of {longest} tokens leaves no token for its prompt in {self.max_length}."
                )
            return Encoded(self._end_of(prompt, most), found)
        room = self.max_length - len(prompt)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room for a completion in {self.max_length}.")
        self.cut_completions += sum(len(each) > room for each in found)
        return Encoded(prompt, [each[:room] for each in found])

    def _can_be_cut(self, prompt: list[int], most: int) -> bool:
        return most > self._begins(prompt)

    def _end_of(self, prompt: list[int], most: int) -> list[int]:
        """Return the end of a prompt after its BOS token, which stays: models attend to it much."""
        self.cut_prompts += 1
        begins = self._begins(prompt)
        return [*prompt[:begins], *prompt[len(prompt) - most + begins :]]

    def _begins(self, prompt: list[int]) -> int:
        return int(prompt[:1] == [self._tokenizer.bos_token_id])

    def _prompt(self, asked: Text) -> list[int]:
        if isinstance(asked, str):
            return text.encode(self._tokenizer, asked)
        return text.rendered_tokens(self._tokenizer, self._rendered(asked, generation=True))

    def _completion(self, asked: Text, completion: Text) -> list[int]:
        eos = self._tokenizer.eos_token_id
        if isinstance(completion, str):
            tokens = self._plain(completion)
        else:
            before = self._rendered(asked, generation=True)
            whole = self._rendered((*asked, *completion), generation=False)
            if not whole.startswith(before):
                raise ValueError("the chat template changes the prompt when a completion follows it.")
            tokens = text.rendered_tokens(self._tokenizer, whole.removeprefix(before).rstrip())
        return tokens if tokens and tokens[-1] == eos else [*tokens, eos]

    def _plain(self, string: str) -> list[int]:
        return self._tokenizer(string, add_special_tokens=False)["input_ids"]

    def _rendered(self, messages: Sequence[records.Message], *, generation: bool) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError("the data hold conversations, but the tokenizer has no chat template.")
        return text.render(self._tokenizer, messages, generation=generation)


class Rows(NamedTuple):
    """A record as tokens: a prompt, its completions, and their label or ranks."""

    prompt: list[int]
    completions: list[list[int]]
    label: Any = None
    mismatched: int | None = None  # of unpaired preferences: most tokens of the prompt with another's completion
    fields: Mapping[str, float] = {}  # numbers of the line beside its text

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of its sequences: the prompt with each completion, or the prompt alone."""
        return [len(self.prompt) + len(each) for each in self.completions or [[]]]

    @property
    def length(self) -> int:
        """Tokens of the longest of its sequences."""
        return max(self.lengths)

    @property
    def highest(self) -> int:
        """The largest id of its tokens."""
        return max(max(each, default=0) for each in (self.prompt, *self.completions))


# Formats of records: parse, encode, collate ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format of records: from a line to a record, from a record to tokens, from the rows of a batch to arrays."""

    parse: Callable[[Fields], Any]
    encode: Callable[[Encoder, Any, int], Rows]  # (encoder, record, tokens that a prompt alone leaves for a completion)
    collate: Callable[[list[Rows], int], PyTree]  # (rows, multiple of the padded length)


def prompts(rows: list[Rows], multiple: int) -> Prompts:
    """Return prompts, padded on the left."""
    longest = max(len(row.prompt) for row in rows)
    return Prompts(*text.left_pad([row.prompt for row in rows], length=rounded(longest, multiple)))


def prompt_completions(rows: list[Rows], multiple: int) -> Sequences:
    """Return prompts with the one completion of each."""
    return pad_completions([row.prompt for row in rows], [row.completions[0] for row in rows], multiple=multiple)


def preferences(rows: list[Rows], multiple: int) -> PairBatch:
    """Return chosen and rejected completions."""
    return PairBatch(
        *_of_one_length(rows, *([row.completions[side] for row in rows] for side in (0, 1)), multiple=multiple)
    )


def unpaired_preferences(rows: list[Rows], multiple: int) -> UnpairedBatch:
    """Return desirable and undesirable completions, and each prompt with the completion of the row before.

    The latter ends at the maximal length if it does not fit, independently of the padding of the other rows.
    """
    completions = [row.completions[0] for row in rows]
    others = [
        other if row.mismatched is None else other[: row.mismatched - len(row.prompt)]
        for row, other in zip(rows, [completions[-1], *completions[:-1]], strict=True)
    ]
    shown, mismatched = _of_one_length(rows, completions, others, multiple=multiple)
    return UnpairedBatch(shown, np.asarray([row.label for row in rows], bool), mismatched)


def ranked(rows: list[Rows], multiple: int) -> RankedBatch:
    """Return K completions of each prompt, K that of the longest ranking; free places repeat the first completion."""
    most = max(len(row.completions) for row in rows)
    filled = [[*row.completions, *[row.completions[0]] * (most - len(row.completions))] for row in rows]
    asked = [row.prompt for row in rows for _ in range(most)]
    flat = pad_completions(asked, [each for row in filled for each in row], multiple=multiple)
    completions = Sequences(*(leaf.reshape(len(rows), most, -1) for leaf in flat))
    ranks = np.asarray([[*row.label, *[0] * (most - len(row.label))] for row in rows], np.int32)
    real = np.asarray([[place < len(row.completions) for place in range(most)] for row in rows])
    return RankedBatch(completions, ranks, real)


def _of_one_length(rows: list[Rows], *sides: list[list[int]], multiple: int) -> list[Sequences]:
    """Return the same prompts with several completions each, padded to the longest of all."""
    asked = [row.prompt for row in rows]
    longest = max(len(prompt) + len(each) for side in sides for prompt, each in zip(asked, side, strict=True))
    return [pad_completions(asked, side, multiple=multiple, length=longest) for side in sides]


def rounded(length: Length, multiple: int) -> Length:
    """Return the next multiple of a length, or of an array of them."""
    return -(-length // multiple) * multiple


def _ranked_rows(encoder: Encoder, record: records.Ranked) -> Rows:
    """Return a ranking as tokens, in which completions of different ranks are still different."""
    rows = Rows(*encoder(record.prompt, record.completions), record.ranks, fields=_margin_of(record))
    for first, second in itertools.combinations(range(len(rows.completions)), 2):
        if rows.completions[first] == rows.completions[second] and record.ranks[first] != record.ranks[second]:
            raise ValueError(
                f"completions {first + 1} and {second + 1} must differ, but are equal in {encoder.max_length} tokens."
            )
    return rows


def _preference_rows(encoder: Encoder, record: records.Preference) -> Rows:
    numbers = {name: value for name, value in record.fields.items() if isinstance(value, int | float)}
    return _ranked_rows(encoder, record.ranked())._replace(label=None, fields=numbers | _margin_of(record))


def _margin_of(record: records.Preference | records.Ranked) -> dict[str, float]:
    """Return the margin of a pair, if it has one."""
    margin = record.fields.get("margin")
    if margin is None:
        return {}
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"margin must be a finite number, but is {margin!r}.")
    if isinstance(record, records.Ranked) and len(record.completions) > 2:
        raise ValueError(f"margin must be that of a pair, but there are {len(record.completions)} completions.")
    return {"margin": float(margin)}


def _unpaired_rows(encoder: Encoder, record: records.UnpairedPreference) -> Rows:
    return Rows(*encoder(record.prompt, [record.completion]), record.label, encoder.max_length)


KINDS: dict[str, Kind] = {  # by the names of TRL, where it has them
    "prompt-only": Kind(
        records.prompt, lambda encoder, record, room: Rows(encoder.prompt(record.prompt, room=room), []), prompts
    ),
    "prompt-of-completion": Kind(  # of the lines of prompt-completion the prompts alone
        records.prompt_completion,
        lambda encoder, record, room: Rows(encoder.prompt(record.prompt, room=room), []),
        prompts,
    ),
    "prompt-completion": Kind(
        records.prompt_completion,
        lambda encoder, record, room: Rows(*encoder(record.prompt, [record.completion])),
        prompt_completions,
    ),
    "preference": Kind(
        records.preference, lambda encoder, record, room: _preference_rows(encoder, record), preferences
    ),
    "unpaired-preference": Kind(
        records.unpaired_preference, lambda encoder, record, room: _unpaired_rows(encoder, record), unpaired_preferences
    ),
    "ranked": Kind(records.ranked, lambda encoder, record, room: _ranked_rows(encoder, record), ranked),
}


# Order and batches ----------------------------------------------------------------------------------------------------


class EpochOrder:
    """Batches of rows of similar length, every row at most once an epoch, as a function of seed and step alone.

    Each epoch is shuffled and cut into pools of `pool` batches, each pool is sorted by length, and the batches are
    shuffled. If `batch_size` does not divide the rows, each epoch leaves out a random few.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows of a batch.

    Raises:
        ValueError: if there are fewer rows than a batch has.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, pool: int = 16, unit: str = "rows"):
        if not 0 < batch_size <= len(lengths):
            raise ValueError(f"batch_size must be from 1 to the {len(lengths)} {unit}, but is {batch_size}.")
        self._lengths, self._batch_size = np.asarray(lengths), batch_size
        self._seed, self._pool = seed, pool
        self._epoch, self._order = -1, np.zeros((0, batch_size), int)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch."""
        return len(self._lengths) // self._batch_size

    @property
    def left_over(self) -> int:
        """Rows that each epoch leaves out, fewer than a batch."""
        return len(self._lengths) % self._batch_size

    def __call__(self, step: int) -> Int[np.ndarray, "batch"]:
        """Return the rows of the batch of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.epoch(epoch)
        return self._order[place]

    def epoch(self, number: int) -> Int[np.ndarray, "step batch"]:
        """Return the rows of all batches of an epoch, counted from 0."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(len(self._lengths))[: self.steps_per_epoch * self._batch_size]
        size = self._pool * self._batch_size
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        pools = [pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools]
        return rng.permutation(np.concatenate(pools).reshape(-1, self._batch_size))


class Batches:
    """A data loader: `batches(step)` is the batch of a step, encoded on demand, of rows of similar length.

    Args:
        records: of one kind; numbers in errors are those of `data.records.Records`, or places in a list.
        kind: one of `KINDS`.
        multiple: padded lengths are multiples of it, so that few programs serve all batches.
        room: tokens that a prompt alone leaves for its completion.
        vocab_size: of the model; with it, tokens that the model does not have are refused.
        fields: carry the numbers beside the text that every record has into the batch's `fields`, all or those named.

    `order.left_over` is the number of records that each epoch leaves out.

    Raises:
        ValueError: for a record that cannot be encoded or whose tokens the model lacks, naming its line; or a batch
            size that does not fit.
    """

    def __init__(
        self,
        records: Sequence[Any],
        kind: Kind,
        encoder: Encoder,
        *,
        batch_size: int,
        seed: int,
        multiple: int = 32,
        room: int = 0,
        vocab_size: int | None = None,
        fields: Columns = False,
    ):
        self._records, self._kind, self._encoder = records, kind, encoder
        self._multiple, self._room, self._vocab_size = multiple, room, vocab_size
        self._mismatched, self._fields = None, None
        self._takes, self.columns = fields, set()  # the numbers beside the text of some records
        self.added: Mapping[str, np.ndarray] = {}  # arrays [records, ...] that batches receive by name, row by row
        sizes = np.asarray([self._size(self.rows(place)) for place in range(len(records))], int).reshape(-1, 4)
        self._prompts, self._longest, self._sequences, self._real = sizes.T
        self.order = EpochOrder(self._longest, batch_size=batch_size, seed=seed, unit="records")
        self._tokens = np.zeros(1, int)  # of the first n steps, as far as they were asked for

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, step: int) -> PyTree:
        """Return the batch of a step."""
        return self.collate(self.order(step))

    def collate(self, places: Sequence[int]) -> PyTree:
        """Return the batch of these records."""
        rows = [self.rows(place) for place in places]
        batch = self._kind.collate(rows, self._multiple)
        if self.added:
            batch = batch._replace(**{name: values[np.asarray(places)] for name, values in self.added.items()})
        if not self._fields:
            return batch
        columns = {name: np.asarray([row.fields[name] for row in rows], np.float32) for name in sorted(self._fields)}
        return batch._replace(fields=columns)

    def records(self, step: int) -> list[Any]:
        """Return the records of a step's batch, row by row."""
        return [self._records[int(place)] for place in self.order(step)]

    def describe(self, step: int) -> str:
        """Return the lines or rows of the records of a step's batch, in words."""
        return self._named(self.order(step))

    def tokens(self, steps: int) -> int:
        """Return the number of real tokens of the first n steps, in all their sequences."""
        while steps >= len(self._tokens):
            epoch = (len(self._tokens) - 1) // self.order.steps_per_epoch
            real, _ = self._counts(self.order.epoch(epoch))
            self._tokens = np.concatenate([self._tokens, self._tokens[-1] + np.cumsum(real)])
        return int(self._tokens[steps])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._longest.max())

    @property
    def pad_waste(self) -> float:
        """The share of places that are padding in the first epoch, free places of rankings included."""
        real, places = self._counts(self.order.epoch(0))
        return float(1 - real.sum() / places.sum())

    @property
    def left_out(self) -> set[str]:
        """The columns that are numbers in some rows only, which a loss of one's own does not receive."""
        return self._taken(self.columns) - (self._fields or set())

    def _taken(self, columns: Iterable[str]) -> set[str]:
        return set(columns) if self._takes is True else set(columns) & set(self._takes or ())

    def _size(self, rows: Rows) -> tuple[int, int, int, int]:
        """Return tokens of the prompt and of the longest sequence, the number of sequences, and the tokens of all."""
        self._mismatched = rows.mismatched
        taken = self._taken(rows.fields)
        self._fields = taken if self._fields is None else self._fields & taken
        self.columns |= set(rows.fields)
        return len(rows.prompt), rows.length, len(rows.lengths), sum(rows.lengths)

    def _counts(self, places: Int[np.ndarray, "step batch"]) -> tuple[Int[np.ndarray, "step"], Int[np.ndarray, "step"]]:
        """Return the real tokens of batches, and the places they take."""
        prompts, longest = self._prompts[places], self._longest[places]
        real, length, sequences = self._real[places].sum(axis=1), longest, self._sequences[places].max(axis=1)
        if self._mismatched is not None:
            others = np.minimum(prompts + np.roll(longest - prompts, 1, axis=1), self._mismatched)
            real, length, sequences = real + others.sum(axis=1), np.maximum(length, others), 2
        return real, rounded(length.max(axis=1), self._multiple) * sequences * places.shape[1]

    def rows(self, place: Int[np.ndarray, ""] | int) -> Rows:
        """Return a record as tokens."""
        place = int(place)
        try:
            rows = self._kind.encode(self._encoder, self._records[place], self._room)
            if self._vocab_size is not None and rows.highest >= self._vocab_size:
                raise ValueError(
                    f"tokens must be below {self._vocab_size}, the model's vocabulary, but the tokenizer gives "
                    f"{rows.highest}."
                )
        except ValueError as error:
            raise ValueError(f"{self._named([place])}: {error}") from error
        return rows

    def _named(self, places: Sequence[int]) -> str:
        unit, numbers = getattr(self._records, "unit", "row"), getattr(self._records, "numbers", None)
        named = ", ".join(str(int(place) if numbers is None else numbers[place]) for place in places)
        return f"{unit}{'s' if len(places) > 1 else ''} {named}"
