"""Log-probabilities of answers to many questions: batches of like length, no logits kept but those of the answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxrl_llm import text
from jaxrl_llm.analysis.sycophancy.rows import Row
from jaxrl_llm.language_model import LanguageModel, Params, params_dtype
from jaxrl_llm.objectives.numerics import log_softmax

BUCKET, ANSWER_BUCKET = 64, 4  # lengths are rounded up to multiples of these, so that few programs serve all batches


def answer_log_probs(
    lm: LanguageModel, params: Params, rows: Sequence[Row], *, batch_size: int = 16, progress: bool = True
) -> list[Float[np.ndarray, "answer"]]:
    """log p(answer | question) over the whole vocabulary, in nats: for each row one of each answer.

        Σ_t log softmax(logits(question, answer_{<t}))[answer_t]

    Questions are read once for all their answers, sorted by length, padded on the left. The logits of one position of
    one batch, [batch, vocab], are the most that is held at a time. Values do not depend on the batch, up to rounding.

    Args:
        progress: whether to draw a progress bar.

    Raises:
        ValueError: if `batch_size` is below 1, or a row is longer than the model's context.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    for place, row in enumerate(rows, 1):
        if row.length > lm.max_length:
            raise ValueError(
                f"question {place} comes to {row.length} tokens with its answers, "
                f"which do not fit the model's context of {lm.max_length}."
            )
    order = sorted(range(len(rows)), key=lambda place: (len(rows[place].given), place))
    batch_size, found = min(batch_size, max(len(rows), 1)), [np.zeros(0)] * len(rows)
    with tqdm(total=len(rows), unit="question", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = [rows[place] for place in places]
            scores = _batch(lm, params, batch + [batch[-1]] * (batch_size - len(batch)))
            for place, row, each in zip(places, batch, scores, strict=False):
                found[place] = each[: len(row.answers)]
            bar.update(len(places))
    return found


def _batch(lm: LanguageModel, params: Params, rows: list[Row]) -> Float[np.ndarray, "batch answer"]:
    tokens, mask = text.left_pad([row.given for row in rows])
    padding = ((0, 0), (-tokens.shape[1] % BUCKET, 0))
    longest = max(len(answer) for row in rows for answer in row.answers)
    time = 1 if longest == 1 else -(-longest // ANSWER_BUCKET) * ANSWER_BUCKET
    shape = (max(len(row.answers) for row in rows), len(rows), time)
    answers, scored = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        for k, answer in enumerate(row.answers):
            answers[k, i, : len(answer)], scored[k, i, : len(answer)] = answer, True
    return np.asarray(_score(lm, params, np.pad(tokens, padding), np.pad(mask, padding), answers, scored)).T


@functools.partial(jax.jit, static_argnames=("lm",))
def _score(
    lm: LanguageModel,
    params: Params,
    tokens: Int[Array, "batch question"],
    mask: Bool[Array, "batch question"],
    answers: Int[Array, "answer batch time"],
    scored: Bool[Array, "answer batch time"],
) -> Float[Array, "answer batch"]:
    slots = tokens.shape[1] + answers.shape[2] - 1
    cache = lm.init_cache(tokens.shape[0], slots, dtype=params_dtype(params)) if answers.shape[2] > 1 else None
    hidden, cache = lm.hidden(params, tokens, cache, mask=mask)
    last = hidden[:, -1:]
    first = log_softmax(lm.logits(params, last[:, 0]))  # [batch, vocab], once for all answers

    def position(inputs: tuple[Array, Array]) -> Array:
        state, token = inputs
        return jnp.take_along_axis(log_softmax(lm.logits(params, state)), token[:, None], axis=-1)[:, 0]

    def score(inputs: tuple[Array, Array]) -> Array:
        answer, counts = inputs
        total = jnp.take_along_axis(first, answer[:, :1], axis=-1)[:, 0]
        if answer.shape[1] > 1:
            after, _ = lm.hidden(params, answer[:, :-1], cache, mask=counts[:, :-1])
            later = jax.lax.map(position, (after.swapaxes(0, 1), answer[:, 1:].T))  # [time - 1, batch]
            total += jnp.where(counts[:, 1:].T, later, 0).sum(axis=0)
        return jnp.where(counts[:, 0], total, -jnp.inf)

    return jax.lax.map(score, (answers, scored))
