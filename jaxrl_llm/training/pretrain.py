"""Next-token pretraining: the loss, the batches, and a run that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.scoring import next_token_log_probs
from jaxrl_llm.training import loop
from jaxrl_llm.training.steps import Loss, Metrics, TrainState, initial_state, make_step


def random_windows(key: Array, data: Int[Array, "total"], batch_size: int, time: int) -> Int[Array, "batch time"]:
    """Draw `batch_size` windows of `time` consecutive tokens, at uniform places of `data`."""
    if data.shape[0] < time:
        raise ValueError(f"data must hold at least one window of {time} tokens, but holds {data.shape[0]}.")
    starts = jax.random.randint(key, (batch_size,), 0, data.shape[0] - time + 1)
    return data[starts[:, None] + jnp.arange(time)].astype(jnp.int32)


def make_train_step(
    lm: LanguageModel, optimizer: optax.GradientTransformation, *, batch_size: int, time: int
) -> Callable[[TrainState, Int[Array, "total"]], tuple[TrainState, Metrics]]:
    """Return one jitted step `(state, data) -> (state, metrics)`, whose batch follows from key and step."""

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
    """Train for `steps` steps in `folder`, or continue from the last checkpoint there, as `loop.run` does.

    Raises:
        FloatingPointError, ValueError: as `loop.run`.
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
