"""Reward models: a scalar head on any language model, trained on ranked completions."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import reward_model
from jaxrl_llm.scoring import Packed, Sequences, by_text, rows_of
from jaxrl_llm.training.steps import Frozen, Loss, LossFn


class RankedBatch(NamedTuple):
    """K completions of each of N prompts. A pair, K = 2, has the ranks 0 (chosen) and 1 (rejected).

    Packed completions have leaves [bins, K, time]: of prompt j of a bin, completion k is text j K + k, in any of the
    bin's rows. Ranks are then [bins, prompts, K].
    """

    completions: Sequences | Packed  # leaves [prompts, K, time]
    ranks: Int[Array, "prompts K"]  # 0 is best, equal ranks are ties
    real: Bool[Array, "prompts K"]  # false where a prompt has fewer completions


def reward_loss(head: ScalarHead, *, centering: float = 0.0) -> LossFn:
    """Return the K-choose-2 loss: −log σ(r_better − r_worse), the mean over a prompt's pairs, then over prompts.

    The batch is a `RankedBatch`; the parameters are the head's. Metrics: `accuracy`, the share of pairs in the right
    order (a tie of scores counts half), `margin`, their mean difference in score, and `score`, the mean.

    Args:
        centering: weight of (r_i + r_j)², averaged as the loss is. It holds the scores around 0, as comparisons leave
            their level free.

    Source: Ouyang et al. 2022, eq. 1; centering: Eisenstein et al. 2023.
    """

    def loss(params: Params, batch: RankedBatch, frozen: Frozen | None, key: Array) -> Loss:
        scores = _scores(head, params, batch)
        ranks, real = (leaf.reshape(scores.shape) for leaf in (batch.ranks, batch.real))
        batch = RankedBatch(None, ranks, real)
        per_prompt = reward_model.k_choose_2_loss(scores, batch.ranks, batch.real)
        pairs = _ordered_pairs(batch)
        prompts = batch.real.any(axis=1).sum()  # packed bins have free places, of loss 0
        value = per_prompt.sum() / jnp.maximum(prompts, 1)
        if centering:
            first, second = jnp.broadcast_arrays(scores[:, :, None], scores[:, None, :])
            squares = jnp.where(pairs, reward_model.centering_loss(first, second, coefficient=centering), 0)
            value += (squares.sum(axis=(1, 2)) / jnp.maximum(pairs.sum(axis=(1, 2)), 1)).sum() / jnp.maximum(prompts, 1)
        lead = scores[:, :, None] - scores[:, None, :]
        metrics = {
            "accuracy": _mean((lead > 0) + (lead == 0) / 2, pairs),
            "margin": _mean(lead, pairs),
            "score": _mean(scores, batch.real),
        }
        weights = {"accuracy": pairs.sum(), "margin": pairs.sum(), "score": batch.real.sum()}
        return Loss(value, prompts, metrics, weights)

    return loss


def _scores(head: ScalarHead, params: Params, batch: RankedBatch) -> Float[Array, "prompts K"]:
    completions = batch.completions
    flat = rows_of(completions)
    if not isinstance(completions, Packed):
        return head.scores(params, flat.tokens, mask=flat.mask).reshape(batch.ranks.shape)
    values = head.values(params, flat.tokens, flat.mask, flat.segments)
    spread = functools.partial(by_text, packed=completions, count=math.prod(batch.ranks.shape[1:]))
    shape = completions.mask.shape
    values, real = (spread(each.reshape(shape)) for each in (values, flat.mask.astype(jnp.int32)))
    last = jnp.maximum(real.sum(axis=-1, keepdims=True) - 1, 0)
    return jnp.take_along_axis(values, last, axis=-1).reshape(-1, batch.ranks.shape[-1])


def _ordered_pairs(batch: RankedBatch) -> Bool[Array, "prompts K K"]:
    """True where completion i ranks before completion j."""
    better = batch.ranks[:, :, None] < batch.ranks[:, None, :]
    return better & batch.real[:, :, None] & batch.real[:, None, :]


def _mean(values: Array, counted: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)
