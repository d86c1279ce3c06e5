"""Losses as functions of parameters alone: next-token loss, preference losses, the loss of a reward model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.analysis.landscape.vectors import LossFn
from jaxrl_llm.language_model import LanguageModel, Params, check_tokens
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import preference, reward_model
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.scoring import Sequences, check_sequences, log_probs


def next_token_loss(
    lm: LanguageModel, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"] | None = None
) -> LossFn:
    """Return the mean −log p of the real tokens after the first of each row, in nats per token.

    Raises:
        ValueError: if the tokens are not ids of the model, or leave nothing to predict.
    """
    tokens = jnp.asarray(tokens)
    check_tokens(lm, tokens, mask)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    predicted = mask & (jnp.cumsum(mask, axis=1) > 1)
    if not predicted.any():
        raise ValueError("no row has two real tokens, so that there is nothing to predict.")
    sequences = Sequences(tokens, mask, predicted)

    def loss(params: Params) -> Float[Array, ""]:
        return -aggregate(log_probs(lm, params, sequences), predicted, "token_mean")

    return loss


def preference_loss(
    lm: LanguageModel,
    ref_params: Params,
    chosen: Sequences,
    rejected: Sequences,
    *,
    loss: Callable[..., Float[Array, "batch"]] = preference.dpo_loss,
    **hyperparameters: Any,
) -> LossFn:
    """Return the mean over pairs of a loss of `objectives.preference` with a reference, such as DPO's, in nats.

    Args:
        chosen, rejected: row i of the one is preferred to row i of the other.
        loss: of summed log-probabilities: loss(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen,
            logp_ref_rejected, **hyperparameters) -> [batch].

    Raises:
        ValueError: if the rows do not match in number, are not tokens of the model, or one has no completion.
    """
    _check_pairs(lm, chosen, rejected)

    def logp(params: Params) -> list[Float[Array, "batch"]]:
        return [log_probs(lm, params, each).sum(axis=1) for each in (chosen, rejected)]

    logp_ref = jax.jit(logp)(ref_params)

    def pair_loss(params: Params) -> Float[Array, ""]:
        return loss(*logp(params), *logp_ref, **hyperparameters).mean()

    return pair_loss


def reward_model_loss(lm: LanguageModel, chosen: Sequences, rejected: Sequences, **hyperparameters: Any) -> LossFn:
    """Return the mean pairwise loss −log σ(r_chosen − r_rejected) of a reward model, in nats.

    Its parameters are {"model": the language model's, "head": [width]}; the reward of a row is the head's product
    with the hidden state at the row's last real token.

    Raises:
        ValueError: as `preference_loss`.
    """
    _check_pairs(lm, chosen, rejected)
    head = ScalarHead(lm)

    def scores(params: Params, rows: Sequences) -> Float[Array, "batch"]:
        return head.scores(params, rows.tokens, mask=rows.mask)

    def pair_loss(params: Params) -> Float[Array, ""]:
        return reward_model.pairwise_loss(scores(params, chosen), scores(params, rejected), **hyperparameters).mean()

    return pair_loss


def _check_pairs(lm: LanguageModel, chosen: Sequences, rejected: Sequences) -> None:
    check_sequences(lm, chosen, name="chosen")
    check_sequences(lm, rejected, name="rejected")
    if len(chosen.tokens) != len(rejected.tokens) or not len(chosen.tokens):
        raise ValueError(
            f"chosen and rejected must be pairs, but there are {len(chosen.tokens)} and {len(rejected.tokens)}."
        )
