"""Supervised fine-tuning: the cross-entropy of given completions."""

from __future__ import annotations

from jaxtyping import Array

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.objectives.aggregate import Mode, aggregate
from jaxrl_llm.scoring import Sequences, log_probs
from jaxrl_llm.training.steps import Frozen, Loss, LossFn


def sft_loss(lm: LanguageModel, *, mode: Mode = "token_mean") -> LossFn:
    """Return the cross-entropy −log π of completion tokens, by default the mean over a batch, in nats per token.

    The batch is `Sequences`; the loss needs no reference.

    Args:
        mode: of `aggregate`: "token_mean", "sequence_mean" or "sequence_sum".
    """

    def loss(params: Params, batch: Sequences, frozen: Frozen | None, key: Array) -> Loss:
        per_token = -log_probs(lm, params, batch)
        value = aggregate(per_token, batch.completion_mask, mode)
        tokens = batch.completion_mask.sum()
        return Loss(value, tokens if mode == "token_mean" else batch.tokens.shape[0])

    return loss
