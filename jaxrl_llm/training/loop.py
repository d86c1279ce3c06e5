"""One loop for every training run: donated optimiser steps, checkpoints, a log, and a run that can be resumed."""

from __future__ import annotations

import functools
import time as clock
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxrl_llm.language_model import Params
from jaxrl_llm.training import run_config
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.run_log import RunLog


class TrainState(NamedTuple):
    """All that a run is: parameters, optimiser state, steps done."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


def initial_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(
    loss: Callable[..., Float[Array, ""]], optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Float[Array, ""]]]:
    """One jitted step `(state, *inputs) -> (state, loss)` for `loss(params, step, *inputs)`; the state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, *inputs: Any) -> tuple[TrainState, Array]:
        value, grads = jax.value_and_grad(loss)(state.params, state.step, *inputs)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

    return train_step


def run(
    state: TrainState,
    advance: Callable[[TrainState, int], tuple[TrainState, Float[Array, ""]]],
    *,
    steps: int,
    folder: Path,
    tokens: Callable[[int], int],
    evaluate: Callable[[Params], float],
    evaluate_every: int,
    config: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train for `steps` steps in `folder`, or go on from the last checkpoint there, with a progress bar.

    Every `evaluate_every` steps and at the end it writes a checkpoint and a line of `log.jsonl`: step, tokens, mean
    training loss since the last line, `evaluate(params)` (both in nats a token), seconds. A resumed run ends with the
    same parameters as an uninterrupted one, if `advance` depends on nothing but its arguments.

    Args:
        state: before the first step.
        advance: `(state, steps done) -> (state, loss)`, one step; it may donate the state.
        tokens: how many were predicted in so many steps.
        config: whatever decides what the run does, as JSON has it: kept in `run.json`, and a run is resumed only with
            the same one. Of `steps` it says nothing by itself: with them in `config` (as a schedule that ends with them
            needs) a run cannot be made longer, without them it can.

    Raises:
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
        ValueError: if the folder holds the checkpoint of a run with another configuration (its fields and both values
            are named), with none to compare, or of more steps; or if `config` is not JSON.
    """
    checkpoints, log = Checkpoints(folder / "checkpoints"), RunLog(folder / "log.jsonl")
    started_before = checkpoints.latest_step()
    if (started_before or 0) > steps:
        raise ValueError(f"{folder} holds a run of {started_before} steps already: steps must not be {steps}.")
    if config is not None:
        run_config.claim(folder / "run.json", config, resumed=started_before is not None)
    if started_before is not None:
        state = checkpoints.restore(state)
    done = int(state.step)
    log.truncate(done)
    losses, started = [], clock.perf_counter()
    progress = tqdm(range(done + 1, steps + 1), initial=done, total=steps, unit="step")
    for step in progress:
        state, loss = advance(state, step - 1)
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss became {losses[-1]} at step {step}.")
        if step % evaluate_every == 0 or step == steps:
            row = {"loss": float(np.mean(losses)), "held_out_loss": evaluate(state.params)}
            seconds = clock.perf_counter() - started
            # The row first: a run that stops between the two drops it and does these steps again.
            log.append(step=step, tokens=tokens(step), **row, seconds=round(seconds, 1))
            checkpoints.save(step, state)
            losses, started = [], clock.perf_counter()
    return state
