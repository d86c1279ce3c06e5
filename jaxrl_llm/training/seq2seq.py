"""Training on pairs: the loss of targets given their sources, of a T5 or of a decoder-only model, in one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.data.order import EpochOrder
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.conditional import given
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.models.t5 import T5
from jaxrl_llm.numerics import is_concrete
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.training.steps import Loss, Metrics, TrainState, make_step

Rows = Sequence[Sequence[int]]


class PairBatch(NamedTuple):
    """Sources, padded on the left, and their targets with EOS, padded on the right. Masks are false at padding."""

    source: Int[np.ndarray, "batch source"]
    source_mask: Bool[np.ndarray, "batch source"]
    target: Int[np.ndarray, "batch target"]
    target_mask: Bool[np.ndarray, "batch target"]


def pad_pairs(sources: Rows, targets: Rows, *, multiple: int = 1, pad_id: int = 0) -> PairBatch:
    """Rows of tokens as one batch, its lengths rounded up to a multiple so that few programs serve many batches.

    Raises:
        ValueError: if there are no pairs, sources and targets differ in number, or a row is empty.
    """
    if not sources or len(sources) != len(targets):
        raise ValueError(f"each source needs its target, but there are {len(sources)} and {len(targets)}.")
    if not all(map(len, sources)) or not all(map(len, targets)):
        raise ValueError("a source or a target is empty.")
    return PairBatch(*_padded(sources, multiple, pad_id, left=True), *_padded(targets, multiple, pad_id, left=False))


def target_log_probs(model: Network, params: Params, batch: PairBatch) -> Float[Array, "batch target"]:
    """log p(target token | source, target tokens before it) in nats, of every target token, EOS included.

    Teacher forcing: the model reads what stands before (a T5's start token, or a decoder-only model's source) and the
    target without its last token. Values at padding mean nothing.

    Raises:
        ValueError: as `check_sources` does, where masks can be read: not inside `jit`.
    """
    check_sources(model, batch)
    source, source_mask, target, target_mask = map(jnp.asarray, batch)
    lm, params, prompts, mask = given(model, params, source, source_mask)
    tokens = jnp.concatenate([prompts, target[:, :-1]], axis=1)
    hidden, _ = lm.hidden(params, tokens, mask=jnp.concatenate([mask, target_mask[:, :-1]], axis=1))
    return token_log_probs(lm.logits(params, hidden[:, prompts.shape[1] - 1 :]), target)


def check_sources(model: Network, batch: PairBatch) -> None:
    """Raise if a decoder-only model would predict the first target token from padding behind the source.

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


def pair_loss(model: Network, params: Params, batch: PairBatch) -> Float[Array, ""]:
    """The cross-entropy of the targets, in nats: the mean over all real target tokens of the batch."""
    return -aggregate(target_log_probs(model, params, batch), jnp.asarray(batch.target_mask), "token_mean")


def make_pair_step(
    model: Network, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, PairBatch], tuple[TrainState, Metrics]]:
    """One jitted step `(state, batch) -> (state, metrics)`; the state is donated. Each shape of batches compiles once.

    The step raises ValueError as `check_sources` does.
    """
    step = make_step(lambda params, batch, frozen, key: Loss(pair_loss(model, params, batch)), optimizer)

    def checked(state: TrainState, batch: PairBatch) -> tuple[TrainState, Metrics]:
        check_sources(model, batch)
        return step(state, batch)

    return checked


def held_out_loss(model: Network, batches: Sequence[PairBatch]) -> Callable[[Params], float]:
    """The loss over all target tokens of some batches, in nats a token, as a function of the parameters.

    Raises:
        ValueError: as `check_sources` does.
    """
    for batch in batches:
        check_sources(model, batch)

    @jax.jit
    def nats(params: Params, batch: PairBatch) -> Array:
        return -jnp.where(batch.target_mask, target_log_probs(model, params, batch), 0.0).sum()

    count = sum(int(batch.target_mask.sum()) for batch in batches)
    return lambda params: sum(float(nats(params, batch)) for batch in batches) / count


class Epochs:
    """Batches of pairs, every pair at most once an epoch, in an order that depends on the seed alone: `EpochOrder`."""

    def __init__(self, sources: Rows, targets: Rows, *, batch_size: int, seed: int, multiple: int = 8, pool: int = 16):
        self._sources, self._targets, self._multiple = sources, targets, multiple
        lengths = [max(map(len, pair)) for pair in zip(sources, targets, strict=True)]
        self.rows = EpochOrder(lengths, batch_size=batch_size, seed=seed, pool=pool, unit="pairs")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch; the pairs that are left over are not in it."""
        return self.rows.steps_per_epoch

    def __call__(self, step: int) -> PairBatch:
        """The batch of a step."""
        rows = self.rows(step)
        sources, targets = ([side[row] for row in rows] for side in (self._sources, self._targets))
        return pad_pairs(sources, targets, multiple=self._multiple)

    def tokens(self, steps: int) -> int:
        """How many target tokens the first so many steps predict."""
        return sum(len(self._targets[row]) for step in range(steps) for row in self.rows(step))


def _padded(rows: Rows, multiple: int, pad_id: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    length = -(-max(map(len, rows)) // multiple) * multiple
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask
