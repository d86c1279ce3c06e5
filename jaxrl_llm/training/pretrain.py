"""Next-token pretraining: the loss, the batches, a run that can be resumed, held-out evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.training import loop
from jaxrl_llm.training.steps import Loss, Metrics, TrainState, initial_state, make_step


def next_token_log_probs(
    lm: LanguageModel, params: Params, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time-1"]:
    """Log-probability in nats of each token but the first, given those before it."""
    logits, _ = lm.apply(params, tokens[:, :-1])
    return token_log_probs(logits, tokens[:, 1:])


def random_windows(key: Array, data: Int[Array, "total"], batch_size: int, time: int) -> Int[Array, "batch time"]:
    """`batch_size` windows of `time` consecutive tokens, at uniform places of `data`."""
    if data.shape[0] < time:
        raise ValueError(f"data must hold at least one window of {time} tokens, but holds {data.shape[0]}.")
    starts = jax.random.randint(key, (batch_size,), 0, data.shape[0] - time + 1)
    return data[starts[:, None] + jnp.arange(time)].astype(jnp.int32)


def make_train_step(
    lm: LanguageModel, optimizer: optax.GradientTransformation, *, batch_size: int, time: int
) -> Callable[[TrainState, Int[Array, "total"]], tuple[TrainState, Metrics]]:
    """One jitted step `(state, data) -> (state, metrics)`; the state is donated, its key and step choose the batch."""

    def loss(params: Params, data: Array, frozen: None, key: Array) -> Loss:
        tokens = random_windows(key, data, batch_size, time + 1)
        return Loss(-next_token_log_probs(lm, params, tokens).mean())

    return make_step(loss, optimizer)


def fit(
    lm: LanguageModel,
    optimizer: optax.GradientTransformation,
    data: np.ndarray,
    *,
    key: Array,
    steps: int,
    batch_size: int,
    time: int,
    folder: Path,
    evaluate: Callable[[Params], float],
    evaluate_every: int,
    config: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train for `steps` steps in `folder`, or go on from the last checkpoint there, as `loop.run` does.

    Raises:
        FloatingPointError, ValueError: as `loop.run` does.
    """
    params_key, batch_key = jax.random.split(key)
    train_step = make_train_step(lm, optimizer, batch_size=batch_size, time=time)
    data = jnp.asarray(data)
    return loop.run(
        initial_state(lm.init(params_key), optimizer, batch_key),
        lambda state, step: train_step(state, data),
        steps=steps,
        folder=folder,
        tokens=lambda step: step * batch_size * time,
        evaluate=lambda params: {"held_out_loss": evaluate(params)},
        evaluate_every=evaluate_every,
        config=config,
    )


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
