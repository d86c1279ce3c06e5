"""Training on pairs of source and target: the loss of targets given their sources, of a T5 or a decoder-only model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import text
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.conditional import given
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.models.t5 import T5
from jaxrl_llm.numerics import is_concrete
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.scoring import Sequences, hidden_before
from jaxrl_llm.training.batches import EpochOrder, rounded
from jaxrl_llm.training.steps import Loss, Metrics, TrainState, make_step

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
    return token_log_probs(lm.logits(params, hidden_before(lm, params, rows)[:, prompts.shape[1] :]), target)


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
