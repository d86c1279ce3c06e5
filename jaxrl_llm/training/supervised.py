"""Supervised training by cross-entropy: of completions (SFT), of whole texts (pretraining), of targets given sources.

`pretrain` is a run that can be resumed. The loss of targets given their sources, for translation, is of a T5 or a
decoder-only model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import text
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.conditional import given
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.models.t5 import T5
from jaxrl_llm.numerics import is_concrete
from jaxrl_llm.objectives.aggregate import Mode, aggregate
from jaxrl_llm.scoring import Packed, Sequences, hidden_before, log_probs, log_probs_after, next_token_log_probs
from jaxrl_llm.training import loop
from jaxrl_llm.training.batches import EpochOrder, rounded
from jaxrl_llm.training.steps import Frozen, Loss, LossFn, Metrics, TrainState, initial_state, make_step


def sft_loss(lm: LanguageModel, *, mode: Mode = "token_mean") -> LossFn:
    """Return the cross-entropy −log π of completion tokens, by default the mean over a batch, in nats per token.

    The batch is `Sequences`, or `Packed` rows of them; the loss needs no reference.

    Args:
        mode: of `aggregate`: "token_mean", "sequence_mean" or "sequence_sum". Packed rows have the token mean alone.
    """

    def loss(params: Params, batch: Sequences | Packed, frozen: Frozen | None, key: Array) -> Loss:
        if isinstance(batch, Packed) and mode != "token_mean":
            raise ValueError(f"mode must be token_mean for packed rows, but is {mode}.")
        per_token = -log_probs(lm, params, batch)
        value = aggregate(per_token, batch.completion_mask, mode)
        tokens = batch.completion_mask.sum()
        return Loss(value, tokens if mode == "token_mean" else batch.tokens.shape[0])

    return loss


# Pretraining: whole texts ---------------------------------------------------------------------------------------------


def random_windows(key: Array, data: Int[Array, "total"], batch_size: int, time: int) -> Int[Array, "batch time"]:
    """Draw `batch_size` windows of `time` consecutive tokens, at uniform places of `data`."""
    if data.shape[0] < time:
        raise ValueError(f"data must hold at least one window of {time} tokens, but holds {data.shape[0]}.")
    starts = jax.random.randint(key, (batch_size,), 0, data.shape[0] - time + 1)
    return data[starts[:, None] + jnp.arange(time)].astype(jnp.int32)


def make_pretrain_step(
    lm: LanguageModel, optimizer: optax.GradientTransformation, *, batch_size: int, time: int
) -> Callable[[TrainState, Int[Array, "total"]], tuple[TrainState, Metrics]]:
    """Return one jitted step `(state, data) -> (state, metrics)`, whose batch follows from key and step."""

    def loss(params: Params, data: Array, frozen: None, key: Array) -> Loss:
        tokens = random_windows(key, data, batch_size, time + 1)
        return Loss(-next_token_log_probs(lm, params, tokens).mean())

    return make_step(loss, optimizer)


def pretrain(
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
    train_step = make_pretrain_step(lm, optimizer, batch_size=batch_size, time=time)
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


# Sequence to sequence: targets given sources --------------------------------------------------------------------------

Rows = Sequence[Sequence[int]]


class Seq2SeqBatch(NamedTuple):
    """Sources, padded on the left, and their targets with EOS, padded on the right. Masks are false at padding."""

    source: Int[np.ndarray, "batch source"]
    source_mask: Bool[np.ndarray, "batch source"]
    target: Int[np.ndarray, "batch target"]
    target_mask: Bool[np.ndarray, "batch target"]


def pad_pairs(sources: Rows, targets: Rows, *, multiple: int = 1, pad_id: int = 0) -> Seq2SeqBatch:
    """Return rows of tokens as one batch, with lengths rounded up to a multiple so that few shapes are compiled.

    Raises:
        ValueError: if there are no pairs, sources and targets differ in number, or a row is empty.
    """
    if not sources or len(sources) != len(targets):
        raise ValueError(f"there must be one target for each source, but there are {len(targets)} for {len(sources)}.")
    for name, rows in (("source", sources), ("target", targets)):
        if not all(map(len, rows)):
            raise ValueError(f"{name} {next(i for i, row in enumerate(rows) if not len(row))} is empty.")
    lengths = (rounded(max(map(len, rows)), multiple) for rows in (sources, targets))
    left = text.left_pad(sources, length=next(lengths), pad_id=pad_id)
    return Seq2SeqBatch(*left, *text.right_pad(targets, length=next(lengths), pad_id=pad_id))


def target_log_probs(model: Network, params: Params, batch: Seq2SeqBatch) -> Float[Array, "batch target"]:
    """Return log p(target token | source, target tokens before it) of every target token and EOS, in nats.

    The source is a T5's encoder input or a decoder-only model's prompt. Only targets are unembedded. Values at padding
    have no meaning.

    Raises:
        ValueError: as `check_sources`, outside of `jit`, where masks can be read.
    """
    check_sources(model, batch)
    source, source_mask, target, target_mask = map(jnp.asarray, batch)
    lm, params, prompts, mask = given(model, params, source, source_mask)
    mask = jnp.concatenate([mask, target_mask], axis=1)
    rows = Sequences(jnp.concatenate([prompts, target], axis=1), mask, mask)
    return log_probs_after(lm, params, hidden_before(lm, params, rows)[:, prompts.shape[1] :], target)


def check_sources(model: Network, batch: Seq2SeqBatch) -> None:
    """Check that a decoder-only model does not predict the first target token from padding after the source.

    Raises:
        ValueError: naming the first row whose last source token is padding. A T5 takes padding on either side.
    """
    if isinstance(model, T5) or not is_concrete(batch.source_mask):
        return
    ends = np.asarray(batch.source_mask)[:, -1]
    if not ends.all():
        raise ValueError(
            "sources of a decoder-only model must be padded on the left, each ending in a real token, "
            f"but source_mask is false at the end of row {ends.argmin()}."
        )


def pair_loss(model: Network, params: Params, batch: Seq2SeqBatch) -> Float[Array, ""]:
    """Return the cross-entropy of the targets in nats, the mean over all real target tokens of the batch."""
    return -aggregate(target_log_probs(model, params, batch), jnp.asarray(batch.target_mask), "token_mean")


def make_pair_step(
    model: Network, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Seq2SeqBatch], tuple[TrainState, Metrics]]:
    """Return one jitted step `(state, batch) -> (state, metrics)`, which donates the state.

    The step raises ValueError as `check_sources`.
    """
    step = make_step(lambda params, batch, frozen, key: Loss(pair_loss(model, params, batch)), optimizer)

    def checked(state: TrainState, batch: Seq2SeqBatch) -> tuple[TrainState, Metrics]:
        check_sources(model, batch)
        return step(state, batch)

    return checked


def held_out_loss(model: Network, batches: Sequence[Seq2SeqBatch]) -> Callable[[Params], float]:
    """Return the loss over all target tokens of some batches, in nats per token, as a function of the parameters.

    Raises:
        ValueError: as `check_sources`.
    """
    for batch in batches:
        check_sources(model, batch)

    @jax.jit
    def nats(params: Params, batch: Seq2SeqBatch) -> Array:
        return -jnp.where(batch.target_mask, target_log_probs(model, params, batch), 0.0).sum()

    count = sum(int(batch.target_mask.sum()) for batch in batches)
    return lambda params: sum(float(nats(params, batch)) for batch in batches) / count


class Epochs:
    """A data loader of pairs in the order of `EpochOrder`, which depends on the seed alone."""

    def __init__(self, sources: Rows, targets: Rows, *, batch_size: int, seed: int, multiple: int = 8, pool: int = 16):
        self._sources, self._targets, self._multiple = sources, targets, multiple
        lengths = [max(map(len, pair)) for pair in zip(sources, targets, strict=True)]
        self.rows = EpochOrder(lengths, batch_size=batch_size, seed=seed, pool=pool, unit="pairs")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch."""
        return self.rows.steps_per_epoch

    def __call__(self, step: int) -> Seq2SeqBatch:
        """Return the batch of a step."""
        rows = self.rows(step)
        sources, targets = ([side[row] for row in rows] for side in (self._sources, self._targets))
        return pad_pairs(sources, targets, multiple=self._multiple)

    def tokens(self, steps: int) -> int:
        """Return the number of target tokens that the first n steps predict."""
        return sum(len(self._targets[row]) for step in range(steps) for row in self.rows(step))
