"""Next-token pretraining: the loss, one donated optimiser step, a run that can be resumed, held-out evaluation."""

from __future__ import annotations

import functools
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.run_log import RunLog


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
    if data.shape[0] < time:
        raise ValueError(f"data must hold at least one window of {time} tokens, but holds {data.shape[0]}.")
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
) -> TrainState:
    """Train for `steps` steps in `folder`, or go on from the last checkpoint there, with a progress bar.

    Every `evaluate_every` steps and at the end it writes a checkpoint and a line of `log.jsonl`: step, tokens, mean
    training loss since the last line, `evaluate(params)` (both in nats a token), seconds. A resumed run ends with the
    same parameters as an uninterrupted one.

    Raises:
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
    """
    params_key, batch_key = jax.random.split(key)
    params = lm.init(params_key)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    checkpoints, log = Checkpoints(folder / "checkpoints"), RunLog(folder / "log.jsonl")
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
    done = int(state.step)
    log.truncate(done)
    train_step = make_train_step(lm, optimizer, batch_size=batch_size, time=time)
    data, losses, started = jnp.asarray(data), [], clock.perf_counter()
    progress = tqdm(range(done + 1, steps + 1), initial=done, total=steps, unit="step")
    for step in progress:
        state, loss = train_step(state, data, batch_key)
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss became {losses[-1]} at step {step}.")
        if step % evaluate_every == 0 or step == steps:
            row = {"loss": float(np.mean(losses)), "held_out_loss": evaluate(state.params)}
            seconds = clock.perf_counter() - started
            # The row first: a run that stops between the two drops it and does these steps again.
            log.append(step=step, tokens=step * batch_size * time, **row, seconds=round(seconds, 1))
            checkpoints.save(step, state)
            losses, started = [], clock.perf_counter()
    return state


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
