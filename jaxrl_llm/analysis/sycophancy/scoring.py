"""Log-probabilities of answers to many questions: what they share is read once, and no logits are kept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxrl_llm import text
from jaxrl_llm.analysis.sycophancy.rows import Row
from jaxrl_llm.language_model import Cache, LanguageModel, Params, params_dtype
from jaxrl_llm.numerics import log_softmax

PREFIX_BUCKET, TAIL_BUCKET, SLOT_BUCKET = 128, 32, 256  # lengths are rounded up, so that few programs serve all batches
MOST = 4  # questions that share a prefix


class Group(NamedTuple):
    """Questions that begin alike, by their places, and how many tokens they share; each has at least one more."""

    shared: int
    places: list[int]


def answer_log_probs(
    lm: LanguageModel, params: Params, rows: Sequence[Row], *, batch_size: int = 16, progress: bool = True
) -> list[Float[np.ndarray, "answer"]]:
    """log p(answer | question) over the whole vocabulary, in nats: for each row one of each answer.

        Σ_t log softmax(logits(question, answer_{<t}))[answer_t]

    A beginning that questions share, such as the biography before both orders of the options, is read once, and a
    question once for all its answers. Batches are of like length; the logits of one position of one batch,
    [batch, vocab], are the most that is held. Values do not depend on the batch, up to rounding.

    Args:
        batch_size: beginnings of questions that are read at a time.
        progress: whether to draw a progress bar.

    Raises:
        ValueError: if `batch_size` is below 1, a question has no token, or one is longer than the model's context.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    for place, row in enumerate(rows, 1):
        if not row.given or row.length > lm.max_length:
            raise ValueError(
                f"question {place} comes to {row.length} tokens with its answers: the question must have at least "
                f"one, and all must fit the model's context of {lm.max_length}."
            )
    found = [np.zeros(0)] * len(rows)
    with tqdm(total=len(rows), unit="question", disable=not progress, leave=False) as bar:
        for groups, size in _batches(rows, batch_size):
            for place, scores in _score_batch(lm, params, rows, groups, size):
                found[place] = scores
                bar.update()
    return found


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows whose questions share at least half of their tokens, at most `MOST` together."""
    found = []
    for place in sorted(range(len(rows)), key=lambda place: rows[place].given):
        given = rows[place].given
        if found and len(found[-1].places) < MOST:
            shared, places = found[-1]
            others = [rows[other].given for other in places]
            common = min(_common(others[0][:shared], given), len(given) - 1)
            if 2 * common >= max(map(len, [given, *others])):
                found[-1] = Group(common, [*places, place])
                continue
        found.append(Group(len(given) - 1, [place]))
    return found


def _common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[tuple[list[Group], int]]:
    """Groups of like sizes and lengths, and to how many they are padded: the same for all batches."""
    groups = sorted(groups_of(rows), key=lambda group: (len(group.places), group.shared))
    size = min(batch_size, max(len(groups), 1))
    for start in range(0, len(groups), size):
        yield groups[start : start + size], size


def _score_batch(
    lm: LanguageModel, params: Params, rows: Sequence[Row], groups: list[Group], size: int
) -> Iterator[tuple[int, Float[np.ndarray, "answer"]]]:
    """Read what each group shares, then one question of each after the other; places and scores of all."""
    padded = groups + [groups[-1]] * (size - len(groups))
    asked = [(rows[place], len(rows[place].given) - group.shared) for group in groups for place in group.places]
    tail, time = _rounded(max(left for _, left in asked), TAIL_BUCKET), _answer_time([row for row, _ in asked])
    prefix, mask = text.left_pad([rows[group.places[0]].given[: group.shared] for group in padded])
    padding = ((0, 0), (_rounded(max(prefix.shape[1], 1), PREFIX_BUCKET) - prefix.shape[1], 0))
    prefix, mask = np.pad(prefix, padding), np.pad(mask, padding)
    cache = _read_prefix(lm, params, prefix, mask, _rounded(prefix.shape[1] + tail + time, SLOT_BUCKET))
    # Short answers first, so that those of a column are of like length; a group with fewer questions repeats its last.
    ordered = [sorted(group.places, key=lambda place: _answer_time([rows[place]])) for group in padded]
    for k in range(max(map(len, ordered))):
        places = [own[min(k, len(own) - 1)] for own in ordered]
        scores = _score_column(lm, params, cache, [rows[place] for place in places], padded)
        for place, own, each in zip(places, ordered[: len(groups)], scores, strict=False):
            if k < len(own):
                yield place, each[: len(rows[place].answers)]


def _score_column(
    lm: LanguageModel, params: Params, cache: Cache, rows: list[Row], groups: list[Group]
) -> Float[np.ndarray, "group answer"]:
    """One question of each group with all its answers."""
    tails = [row.given[group.shared :] for row, group in zip(rows, groups, strict=True)]
    law, read = _read_question(lm, params, cache, *_right_pad(tails, _rounded(max(map(len, tails)), TAIL_BUCKET)))
    time = _answer_time(rows)
    scores = []
    for answer in range(max(len(row.answers) for row in rows)):
        own = [row.answers[answer] if answer < len(row.answers) else [] for row in rows]
        scores.append(_read_answer(lm, params, read if time > 1 else None, law, *_right_pad(own, time)))
    return np.stack(scores, axis=1)


def _answer_time(rows: Sequence[Row]) -> int:
    """The length of the longest answer, rounded up to a power of 4."""
    longest = max(len(answer) for row in rows for answer in row.answers)
    return next(4**power for power in itertools.count() if 4**power >= longest)


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _right_pad(rows: list[list[int]], time: int) -> tuple[Int[np.ndarray, "row time"], Bool[np.ndarray, "row time"]]:
    tokens, mask = np.zeros((len(rows), time), np.int32), np.zeros((len(rows), time), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


# Three programs rather than one: each is compiled for few shapes, and a model's layers once in each.


@functools.partial(jax.jit, static_argnames=("lm", "slots"))
def _read_prefix(
    lm: LanguageModel, params: Params, tokens: Int[Array, "group time"], mask: Bool[Array, "group time"], slots: int
) -> Cache:
    cache = lm.init_cache(tokens.shape[0], slots, dtype=params_dtype(params))
    return lm.hidden(params, tokens, cache, mask=mask)[1]


@functools.partial(jax.jit, static_argnames=("lm",))
def _read_question(
    lm: LanguageModel, params: Params, cache: Cache, tokens: Int[Array, "group time"], mask: Bool[Array, "group time"]
) -> tuple[Float[Array, "group vocab"], Cache]:
    """The law of the first token of an answer, and the cache with the question."""
    hidden, cache = lm.hidden(params, tokens, cache, mask=mask)
    last = jnp.take_along_axis(hidden, mask.sum(axis=1)[:, None, None] - 1, axis=1)[:, 0]
    return log_softmax(lm.logits(params, last)), cache


@functools.partial(jax.jit, static_argnames=("lm",))
def _read_answer(
    lm: LanguageModel,
    params: Params,
    cache: Cache | None,
    law: Float[Array, "group vocab"],
    answer: Int[Array, "group time"],
    counts: Bool[Array, "group time"],
) -> Float[Array, "group"]:
    """The log-probability of one answer of each group, −inf where it has none; one token needs no cache."""

    def position(inputs: tuple[Array, Array]) -> Array:
        state, token = inputs
        return jnp.take_along_axis(log_softmax(lm.logits(params, state)), token[:, None], axis=-1)[:, 0]

    total = jnp.take_along_axis(law, answer[:, :1], axis=-1)[:, 0]
    if answer.shape[1] > 1:
        after, _ = lm.hidden(params, answer[:, :-1], cache, mask=counts[:, :-1])
        later = jax.lax.map(position, (after.swapaxes(0, 1), answer[:, 1:].T))  # [time - 1, group]
        total += jnp.where(counts[:, 1:].T, later, 0).sum(axis=0)
    return jnp.where(counts[:, 0], total, -jnp.inf)
