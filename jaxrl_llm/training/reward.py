"""Reward models: a scalar head on any language model, trained on ranked answers."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import reward_model
from jaxrl_llm.scoring import Sequences, rows_of
from jaxrl_llm.training.steps import Loss, LossFn


class RankedBatch(NamedTuple):
    """K answers to each of N prompts. A pair, K = 2, has the ranks 0 (chosen) and 1 (rejected)."""

    answers: Sequences  # leaves [prompts, K, time]
    ranks: Int[Array, "prompts K"]  # 0 is best, equal ranks are ties
    real: Bool[Array, "prompts K"]  # false where a prompt has fewer answers


def reward_loss(head: ScalarHead, *, centering: float = 0.0) -> LossFn:
    """K-choose-2: −log σ(r_better − r_worse) averaged over a prompt's pairs, then over prompts; for K = 2 pairwise.

    The batch is a `RankedBatch`; parameters are the head's; nothing is frozen. Metrics: `accuracy`, the share of the
    pairs in the right order (a tie of scores counts half), `margin`, their mean difference in score, and `score`.

    Args:
        centering: weight of (r_i + r_j)², averaged as the loss is; it holds the scores, which no comparison fixes,
            around 0.

    Source: Ouyang et al. 2022, eq. 1; centering: Eisenstein et al. 2023.
    """

    def loss(params: Params, batch: RankedBatch, frozen: PyTree, key: Array) -> Loss:
        scores = scores_of(head, params, batch.answers)
        per_prompt = reward_model.k_choose_2_loss(scores, batch.ranks, batch.real)
        pairs = ordered_pairs(batch)
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
        return Loss(value, scores.shape[0], metrics)

    return loss


def scores_of(head: ScalarHead, params: Params, answers: Sequences) -> Float[Array, "prompts K"]:
    """The scores of K answers to each of N prompts."""
    flat = rows_of(answers)
    return head.scores(params, flat.tokens, mask=flat.mask).reshape(answers.tokens.shape[:-1])


def ordered_pairs(batch: RankedBatch) -> Bool[Array, "prompts K K"]:
    """Where answer i ranks before answer j."""
    better = batch.ranks[:, :, None] < batch.ranks[:, None, :]
    return better & batch.real[:, :, None] & batch.real[:, None, :]


def _mean(values: Array, counted: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)
