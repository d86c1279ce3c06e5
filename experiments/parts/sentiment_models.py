"""What the sentiment experiment stands on: a model that writes reviews, and two scorers of their sentiment."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxrl_llm.data.reviews import Halves, Review
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training import steps
from jaxrl_llm.training.reward import RankedBatch, reward_loss
from jaxrl_llm.training.rollout import Prompts
from jaxrl_llm.training.sequences import Sequences, pad_answers
from jaxrl_llm.training.sft import sft_loss


class Scorer(NamedTuple):
    """A reward model, its scores shifted so that what the fine-tuned model writes has the mean 0."""

    params: Params
    shift: Array


class Reviews(NamedTuple):
    """The reviews as tokens, BOS before and EOS behind, cut at one length."""

    rows: Sequences
    positive: np.ndarray

    def take(self, rows: Any) -> Sequences:
        """Some of the rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self.rows)


def encoded(tokenizer: Any, reviews: Sequence[Review], length: int) -> Reviews:
    """At most `length` tokens of each, after BOS; what is longer loses its end, EOS too."""
    rows = [tokenizer(review.text)["input_ids"] + [tokenizer.eos_token_id] for review in reviews]
    bos = [[tokenizer.bos_token_id]] * len(rows)
    packed = pad_answers(bos, [row[: length - 1] for row in rows], length=length)
    return Reviews(jax.tree.map(jnp.asarray, packed), np.asarray([review.positive for review in reviews]))


def prompts_of(tokenizer: Any, reviews: Sequence[Review], length: int) -> Prompts:
    """BOS and the first tokens of every review that is longer, `length` in all."""
    rows = [tokenizer(review.text)["input_ids"] for review in reviews]
    kept = [[tokenizer.bos_token_id, *row[: length - 1]] for row in rows if len(row) > length]
    tokens = jnp.asarray(np.unique(np.asarray(kept, np.int32), axis=0))
    return Prompts(tokens, jnp.ones(tokens.shape, bool))


def adam(peak: float, num_steps: int) -> optax.GradientTransformation:
    """Adam with clipped gradients: a short warm-up, then a cosine to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(0, peak, max(1, num_steps // 10), num_steps, peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def fine_tuned(lm: Any, params: Params, data: Reviews, config: Any, key: Array) -> tuple[Params, Array]:
    """The model fine-tuned on all reviews of the training films, whatever they say; and its losses."""
    optimizer = adam(config.sft_learning_rate, config.sft_steps)
    order = _order(key, len(data.positive), config.sft_steps, config.sft_batch)
    step = steps.make_step(sft_loss(lm), optimizer)

    def advance(state: steps.TrainState, rows: Array) -> tuple[steps.TrainState, Array]:
        state, metrics = step(state, data.take(rows))
        return state, metrics["loss"]

    state = steps.initial_state(params, optimizer, key)
    state, losses = jax.jit(lambda state: jax.lax.scan(advance, state, order))(state)
    return state.params, losses


def scorer(head: ScalarHead, params: Params, data: Reviews, config: Any, key: Array) -> Params:
    """A reward model trained on pairs of a good and a bad review, drawn at random from one half of the films."""
    optimizer = adam(config.scorer_learning_rate, config.scorer_steps)
    step = steps.make_step(reward_loss(head), optimizer)
    good, bad = (np.flatnonzero(each) for each in (data.positive, ~data.positive))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shape = (config.scorer_steps, config.scorer_batch)
    pairs = jnp.asarray(np.stack([rng.choice(good, shape), rng.choice(bad, shape)], axis=-1))

    def advance(state: steps.TrainState, rows: Array) -> tuple[steps.TrainState, Array]:
        state, metrics = step(state, ranked(data, rows))
        return state, metrics["accuracy"]

    state = steps.initial_state(head.init(key, params), optimizer, key)
    state, _ = jax.jit(lambda state: jax.lax.scan(advance, state, pairs))(state)
    return state.params


def ranked(data: Reviews, rows: Int[Array, "pairs 2"]) -> RankedBatch:
    """Pairs of reviews, the good one first."""
    return RankedBatch(data.take(rows), jnp.zeros(rows.shape, jnp.int32) + jnp.arange(2), jnp.ones(rows.shape, bool))


@functools.partial(jax.jit, static_argnums=0)
def _score(head: ScalarHead, params: Params, part: Sequences) -> Array:
    return head.scores(params, part.tokens, mask=part.mask)


def scores(head: ScalarHead, params: Params, rows: Sequences, *, batch: int = 256) -> np.ndarray:
    """The raw scores of many rows."""
    count = rows.tokens.shape[0]
    places = [np.minimum(np.arange(start, start + batch), count - 1) for start in range(0, count, batch)]
    found = [_score(head, params, jax.tree.map(lambda leaf, at=at: leaf[at], rows)) for at in places]
    return np.concatenate([np.asarray(each) for each in found])[:count]


def area_under_curve(values: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a good review scores higher than a bad one, ties half."""
    order = np.concatenate([values[positive], values[~positive]])
    ranks = np.unique(order, return_inverse=True)[1]
    counts = np.bincount(ranks)
    middle = np.cumsum(counts) - (counts - 1) / 2
    good = positive.sum()
    return float((middle[ranks[:good]].sum() - good * (good + 1) / 2) / (good * (len(values) - good)))


def parts_of(tokenizer: Any, halves: Halves, config: Any) -> dict[str, Reviews]:
    """Both halves, together and apart, and the films held out."""
    named = {"gold": halves.gold, "proxy": halves.proxy, "all": halves.gold + halves.proxy, "held_out": halves.held_out}
    return {name: encoded(tokenizer, part, config.review_tokens) for name, part in named.items()}


def _order(key: Array, rows: int, num_steps: int, batch: int) -> Int[Array, "step batch"]:
    """Epochs in random order, one after the other."""
    epochs = -(-num_steps * batch // rows)
    orders = [jax.random.permutation(each, rows) for each in jax.random.split(key, epochs)]
    return jnp.concatenate(orders)[: num_steps * batch].reshape(num_steps, batch)
