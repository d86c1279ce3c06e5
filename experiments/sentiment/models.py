"""The models of the sentiment experiment: one that writes reviews, and two scorers that share no weights.

The proxy is the writer itself, fine-tuned as a reward model on one half of the films. Gold is a logistic regression on
the words of reviews of the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special
from jaxtyping import Array, Bool, Float, Int

from experiments.optimisers import adam
from jaxrl_llm.data.reviews import Review
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.scoring import Sequences, pad_completions
from jaxrl_llm.training import steps
from jaxrl_llm.training.reward_model import RankedBatch, reward_loss
from jaxrl_llm.training.rollout import Prompts
from jaxrl_llm.training.supervised import sft_loss

BUCKETS = 2**16
"""Places for pairs of adjacent tokens, which are hashed into them."""


class Reviews(NamedTuple):
    """Reviews as tokens between BOS and EOS, cut at one length."""

    rows: Sequences
    positive: np.ndarray

    def take(self, rows: Any) -> Sequences:
        """Return some of the rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self.rows)


def encoded(tokenizer: Any, reviews: Sequence[Review], length: int) -> Reviews:
    """Return at most `length` tokens of each review, from BOS on; longer ones lose their end and EOS."""
    rows = [[*row, tokenizer.eos_token_id] for row in tokenizer([review.text for review in reviews])["input_ids"]]
    bos = [[tokenizer.bos_token_id]] * len(rows)
    packed = pad_completions(bos, [row[: length - 1] for row in rows], length=length)
    return Reviews(jax.tree.map(jnp.asarray, packed), np.asarray([review.positive for review in reviews]))


def prompts_of(tokenizer: Any, reviews: Sequence[Review], length: int) -> Prompts:
    """Return BOS and the first tokens, `length` in all, of every review that is longer."""
    rows = tokenizer([review.text for review in reviews])["input_ids"]
    kept = [[tokenizer.bos_token_id, *row[: length - 1]] for row in rows if len(row) > length]
    tokens = jnp.asarray(np.unique(np.asarray(kept, np.int32), axis=0))
    return Prompts(tokens, jnp.ones(tokens.shape, bool))


def fine_tuned(lm: Any, params: Params, data: Reviews, config: Any, key: Array) -> Params:
    """Fine-tune the model on all reviews of the training films, good and bad."""
    optimizer = adam(config.sft_learning_rate, config.sft_steps)
    order = epochs(key, len(data.positive), config.sft_steps, config.sft_batch)
    step = steps.make_step(sft_loss(lm), optimizer)

    def advance(state: steps.TrainState, rows: Array) -> tuple[steps.TrainState, Array]:
        state, metrics = step(state, data.take(rows))
        return state, metrics["loss"]

    state = steps.initial_state(params, optimizer, key)
    return jax.jit(lambda state: jax.lax.scan(advance, state, order))(state)[0].params


def proxy_scorer(head: ScalarHead, params: Params, data: Reviews, config: Any, key: Array) -> Params:
    """Train a reward model on pairs of a good and a bad review, drawn at random from one half of the films."""
    optimizer = adam(config.scorer_learning_rate, config.scorer_steps)
    step = steps.make_step(reward_loss(head), optimizer)
    good, bad = (np.flatnonzero(each) for each in (data.positive, ~data.positive))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shape = (config.scorer_steps, config.scorer_batch)
    pairs = jnp.asarray(np.stack([rng.choice(good, shape), rng.choice(bad, shape)], axis=-1))

    def advance(state: steps.TrainState, rows: Array) -> tuple[steps.TrainState, Array]:
        ranks = jnp.zeros(rows.shape, jnp.int32) + jnp.arange(2)
        state, metrics = step(state, RankedBatch(data.take(rows), ranks, jnp.ones(rows.shape, bool)))
        return state, metrics["accuracy"]

    state = steps.initial_state(head.init(key, params), optimizer, key)
    return jax.jit(lambda state: jax.lax.scan(advance, state, pairs))(state)[0].params


def word_features(
    vocab: int, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> tuple[Int[Array, "batch features"], Bool[Array, "batch features"]]:
    """Return the tokens and hashed pairs of adjacent tokens of each row, and a mask that counts each once a row.

    Repeating a word therefore adds nothing. The token 0, BOS and EOS, does not count.
    """
    real = mask & (tokens != 0)
    pairs = (tokens[:, :-1].astype(jnp.uint32) * 1000003 + tokens[:, 1:].astype(jnp.uint32) * 7919) % BUCKETS
    features = jnp.concatenate([tokens, vocab + pairs.astype(jnp.int32)], axis=1)
    counted = jnp.concatenate([real, real[:, :-1] & real[:, 1:]], axis=1)
    same = (features[:, :, None] == features[:, None, :]) & counted[:, None, :]
    return features, counted & ~jnp.tril(same, -1).any(axis=2)


def word_scores(
    vocab: int, weights: Float[Array, "features"], tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> Float[Array, "batch"]:
    """Return the log-odds, up to a constant, that a review is good: the sum of the weights of its words and pairs."""
    features, counted = word_features(vocab, tokens, mask)
    return jnp.where(counted, weights[features], 0).sum(axis=1)


def gold_scorer(vocab: int, data: Reviews, penalty: float) -> np.ndarray:
    """Fit the weights of `word_scores` by logistic regression with `penalty` / 2 times their squared norm."""
    parts = [word_features(vocab, data.rows.tokens[at : at + 512], data.rows.mask[at : at + 512])
             for at in range(0, len(data.positive), 512)]  # fmt: skip
    features, counted = (np.concatenate([np.asarray(part[k]) for part in parts]) for k in range(2))
    rows, places = np.nonzero(counted)
    shape = (len(features), vocab + BUCKETS)
    design = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, features[rows, places])), shape)
    sign = 2.0 * data.positive - 1

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (design @ weights[:-1] + weights[-1])
        slope = -sign * scipy.special.expit(-margin)
        value = np.logaddexp(0, -margin).sum() + penalty / 2 * weights[:-1] @ weights[:-1]
        return value, np.append(design.T @ slope + penalty * weights[:-1], slope.sum())

    start = np.zeros(shape[1] + 1)
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return found.x[:-1].astype(np.float32)


def in_parts(score: Any, rows: Sequences, *, batch: int = 256) -> np.ndarray:
    """Return the scores of many rows, `batch` at a time."""
    count = rows.tokens.shape[0]
    places = [np.minimum(np.arange(start, start + batch), count - 1) for start in range(0, count, batch)]
    found = [score(jax.tree.map(lambda leaf, at=at: leaf[at], rows)) for at in places]
    return np.concatenate([np.asarray(each) for each in found])[:count]


def area_under_curve(values: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a good review scores higher than a bad one, ties half."""
    order = np.concatenate([values[positive], values[~positive]])
    ranks = np.unique(order, return_inverse=True)[1]
    counts = np.bincount(ranks)
    middle = np.cumsum(counts) - (counts - 1) / 2
    good = positive.sum()
    return float((middle[ranks[:good]].sum() - good * (good + 1) / 2) / (good * (len(values) - good)))


def epochs(key: Array, rows: int, num_steps: int, batch: int) -> Int[Array, "step batch"]:
    """Return the rows of each batch: all of them in random order, epoch after epoch."""
    count = -(-num_steps * batch // rows)
    orders = [jax.random.permutation(each, rows) for each in jax.random.split(key, count)]
    return jnp.concatenate(orders)[: num_steps * batch].reshape(num_steps, batch)
