"""What can be lost: a language model's next tokens, a preference, a comparison of rewards, as functions of params."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.analysis.landscape.trees import LossFn
from jaxrl_llm.language_model import LanguageModel, Params, check_tokens
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import preference, reward_model
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.scoring import Sequences as Answers


def next_token_loss(
    lm: LanguageModel, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"] | None = None
) -> LossFn:
    """−log p of every real token after the first of its row, on average over them, in nats per token.

    Raises:
        ValueError: if the tokens are not ids of the model, or leave nothing to predict.
    """
    tokens = jnp.asarray(tokens)
    check_tokens(lm, tokens, mask)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    predicted = mask & (jnp.cumsum(mask, axis=1) > 1)
    if not predicted.any():
        raise ValueError("no row has two real tokens, so that there is nothing to predict.")

    def loss(params: Params) -> Float[Array, ""]:
        return -aggregate(_log_probs(lm, params, tokens, mask), predicted[:, 1:], "token_mean")

    return loss


def preference_loss(
    lm: LanguageModel,
    ref_params: Params,
    chosen: Answers,
    rejected: Answers,
    *,
    loss: Callable[..., Float[Array, "batch"]] = preference.dpo_loss,
    **knobs: Any,
) -> LossFn:
    """The mean over pairs of a loss of `objectives.preference` that takes a reference, DPO's for one, in nats.

    Args:
        chosen, rejected: row i of the one is preferred to row i of the other.
        loss: loss(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, **knobs) -> [batch].

    Raises:
        ValueError: if the answers do not match in number, are no tokens of the model, or one of them is empty.
    """
    _check_pairs(lm, chosen, rejected)
    of_reference = jax.jit(lambda params: [answer_log_probs(lm, params, answers) for answers in (chosen, rejected)])
    logp_ref = of_reference(ref_params)

    def pair_loss(params: Params) -> Float[Array, ""]:
        logp = [answer_log_probs(lm, params, answers) for answers in (chosen, rejected)]
        return loss(*logp, *logp_ref, **knobs).mean()

    return pair_loss


def reward_model_loss(lm: LanguageModel, chosen: Answers, rejected: Answers, **knobs: Any) -> LossFn:
    """The mean pairwise loss −log σ(r_chosen − r_rejected) of a reward model, in nats.

    Its parameters are {"model": the language model's, "head": [width]}; the reward of a row is the head's product
    with the hidden state at the row's last real token.

    Raises:
        ValueError: as `preference_loss`.
    """
    _check_pairs(lm, chosen, rejected)

    head = ScalarHead(lm)

    def scores(params: Params, answers: Answers) -> Float[Array, "batch"]:
        return head.scores(params, answers.tokens, mask=answers.mask)

    def pair_loss(params: Params) -> Float[Array, ""]:
        return reward_model.pairwise_loss(scores(params, chosen), scores(params, rejected), **knobs).mean()

    return pair_loss


def answer_log_probs(lm: LanguageModel, params: Params, answers: Answers) -> Float[Array, "batch"]:
    """log π(answer | prompt) of each row, summed over the answer's tokens, in nats."""
    logp = _log_probs(lm, params, answers.tokens, answers.mask)
    return jnp.where(answers.completion_mask[:, 1:], logp, 0).sum(axis=1)


def _log_probs(lm: LanguageModel, params: Params, tokens: Array, mask: Array) -> Float[Array, "batch time-1"]:
    logits, _ = lm.apply(params, tokens[:, :-1], mask=mask[:, :-1])
    return token_log_probs(logits, tokens[:, 1:])


def _check_pairs(lm: LanguageModel, chosen: Answers, rejected: Answers) -> None:
    for name, answers in (("chosen", chosen), ("rejected", rejected)):
        check_tokens(lm, jnp.asarray(answers.tokens), answers.mask, name=f"{name}.tokens")
        if answers.completion_mask.shape != answers.mask.shape or (answers.completion_mask & ~answers.mask).any():
            raise ValueError(f"{name}.completion_mask must mark real tokens in the shape of {name}.mask.")
        first = jnp.cumsum(answers.mask, axis=1) == 1
        if not answers.completion_mask.any(axis=1).all() or (answers.completion_mask & first).any():
            raise ValueError(f"every row of {name} needs an answer of a token or more, after a prompt of one or more.")
    if len(chosen.tokens) != len(rejected.tokens) or not len(chosen.tokens):
        raise ValueError(
            f"chosen and rejected must be pairs, but there are {len(chosen.tokens)} and {len(rejected.tokens)}."
        )
