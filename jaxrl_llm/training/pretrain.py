"""Next-token pretraining: the loss, one donated optimiser step, and held-out evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.objectives.logprobs import token_log_probs


class TrainState(NamedTuple):
    """All that a run is: parameters, optimiser state, steps done."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


def next_token_log_probs(
    lm: LanguageModel, params: Params, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time-1"]:
    """Log-probability in nats of each token but the first, given those before it."""
    logits, _ = lm.apply(params, tokens[:, :-1])
    return token_log_probs(logits, tokens[:, 1:])


def random_windows(key: Array, data: Int[Array, "total"], batch_size: int, time: int) -> Int[Array, "batch time"]:
    """`batch_size` windows of `time` consecutive tokens, at uniform places of `data`."""
    starts = jax.random.randint(key, (batch_size,), 0, data.shape[0] - time + 1)
    return data[starts[:, None] + jnp.arange(time)].astype(jnp.int32)


def make_train_step(
    lm: LanguageModel, optimizer: optax.GradientTransformation, *, batch_size: int, time: int
) -> Callable[[TrainState, Int[Array, "total"], Array], tuple[TrainState, Float[Array, ""]]]:
    """One jitted step `(state, data, key) -> (state, loss)`; the state is donated, key and step choose the batch."""

    def loss_fn(params: Params, tokens: Array) -> Array:
        return -next_token_log_probs(lm, params, tokens).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, data: Array, key: Array) -> tuple[TrainState, Array]:
        tokens = random_windows(jax.random.fold_in(key, state.step), data, batch_size, time + 1)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), loss

    return train_step


def held_out_nats(
    lm: LanguageModel, params: Params, data: np.ndarray, *, time: int, batch_size: int = 16
) -> tuple[float, int]:
    """Total −log p in nats of a token stream, and how many tokens were predicted.

    The stream is cut into windows that share one token, so that every token but the first is predicted once, with a
    context of at most `time` tokens.
    """

    @jax.jit
    def nats(tokens: Array, mask: Array) -> Array:
        return -jnp.where(mask, next_token_log_probs(lm, params, tokens), 0.0).sum()

    count = len(data) - 1
    windows = -(-count // time)
    rows = -(-windows // batch_size) * batch_size
    index = np.arange(rows)[:, None] * time + np.arange(time + 1)
    tokens = np.asarray(data, np.int32)[np.minimum(index, count)]
    total = 0.0
    for start in range(0, rows, batch_size):
        batch = slice(start, start + batch_size)
        total += float(nats(jnp.asarray(tokens[batch]), jnp.asarray(index[batch, 1:] <= count)))
    return total, count
