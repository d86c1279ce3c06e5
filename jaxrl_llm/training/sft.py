"""Supervised fine-tuning: the likelihood of given answers."""

from __future__ import annotations

from jaxtyping import Array, PyTree

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.objectives.aggregate import Mode, aggregate
from jaxrl_llm.scoring import Sequences, log_probs
from jaxrl_llm.training.steps import Loss, LossFn


def sft_loss(lm: LanguageModel, *, mode: Mode = "token_mean") -> LossFn:
    """−log π of the answers' tokens, by default on average over all of a batch, in nats a token.

    The batch is `Sequences`; nothing is frozen.

    Args:
        mode: as in `aggregate`; "token_mean", "sequence_mean" or "sequence_sum".
    """

    def loss(params: Params, batch: Sequences, frozen: PyTree, key: Array) -> Loss:
        per_token = -log_probs(lm, params, batch)
        value = aggregate(per_token, batch.completion_mask, mode)
        tokens = batch.completion_mask.sum()
        return Loss(value, tokens if mode == "token_mean" else batch.tokens.shape[0])

    return loss
