"""Reward models: a scalar head on any language model, trained on ranked completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import reward_model
from jaxrl_llm.scoring import Sequences, rows_of
from jaxrl_llm.training.steps import Frozen, Loss, LossFn


class RankedBatch(NamedTuple):
    """K completions of each of N prompts. A pair, K = 2, has the ranks 0 (chosen) and 1 (rejected)."""

    completions: Sequences  # leaves [prompts, K, time]
    ranks: Int[Array, "prompts K"]  # 0 is best, equal ranks are ties
    real: Bool[Array, "prompts K"]  # false where a prompt has fewer completions
    fields: Mapping[str, Float[Array, "prompts"]] = {}  # `margin`, the lead that the better one should have


def reward_loss(head: ScalarHead, *, centering: float = 0.0) -> LossFn:
    """Return the K-choose-2 loss: −log σ(r_better − r_worse − m), the mean over a prompt's pairs, then over prompts.

    The batch is a `RankedBatch`, whose field `margin` is m, else 0; the parameters are the head's. Metrics: `accuracy`,
    the share of pairs in the right order (a tie of scores counts half), `margin`, their mean difference in score, and
    `score`, the mean.

    Args:
        centering: weight of (r_i + r_j)², averaged as the loss is. It holds the scores around 0, as comparisons leave
            their level free.

    Source: Ouyang et al. 2022, eq. 1; the margin: Touvron et al. 2023; centering: Eisenstein et al. 2023.
    """

    def loss(params: Params, batch: RankedBatch, frozen: Frozen | None, key: Array) -> Loss:
        scores = _scores(head, params, batch.completions)
        margin = batch.fields.get("margin", 0.0)
        per_prompt = reward_model.k_choose_2_loss(scores, batch.ranks, batch.real, margin=margin)
        pairs = _ordered_pairs(batch)
        value = per_prompt.mean()
        if centering:
            first, second = jnp.broadcast_arrays(scores[:, :, None], scores[:, None, :])
            squares = jnp.where(pairs, reward_model.centering_loss(first, second, coefficient=centering), 0)
            value += (squares.sum(axis=(1, 2)) / jnp.maximum(pairs.sum(axis=(1, 2)), 1)).mean()
        lead = scores[:, :, None] - scores[:, None, :]
        metrics = {
            "accuracy": _mean((lead > 0) + (lead == 0) / 2, pairs),
            "margin": _mean(lead, pairs),
            "score": _mean(scores, batch.real),
        }
        weights = {"accuracy": pairs.sum(), "margin": pairs.sum(), "score": batch.real.sum()}
        return Loss(value, scores.shape[0], metrics, weights)

    return loss


def _scores(head: ScalarHead, params: Params, completions: Sequences) -> Float[Array, "prompts K"]:
    flat = rows_of(completions)
    return head.scores(params, flat.tokens, mask=flat.mask).reshape(completions.tokens.shape[:-1])


def _ordered_pairs(batch: RankedBatch) -> Bool[Array, "prompts K K"]:
    """True where completion i ranks before completion j."""
    better = batch.ranks[:, :, None] < batch.ranks[:, None, :]
    return better & batch.real[:, :, None] & batch.real[:, None, :]


def _mean(values: Array, counted: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)
