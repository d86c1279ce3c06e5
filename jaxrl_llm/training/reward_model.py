"""Reward models: a scalar head on any language model, trained on ranked completions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.data import records
from jaxrl_llm.data.records import Fields, PromptCompletion, Ranked
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import LoadedReward, ScalarHead
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
    margins: Float[Array, "prompts K"] | None = None  # completion i should lead j by margins[i] − margins[j]


def reward_loss(head: ScalarHead, *, centering: float = 0.0, margin_scale: float = 1.0) -> LossFn:
    """Return the K-choose-2 loss, the mean over a prompt's pairs, then over prompts.

        L = −log σ(r_i − r_j − c (m_i − m_j)),   i better than j, m the batch's margins, c their scale

    The batch is a `RankedBatch`, whose field `margin` is m, else 0; the parameters are the head's. Metrics: `accuracy`,
    the share of pairs in the right order (a tie of scores counts half), `margin`, their mean difference in score, and
    `score`, the mean.

    Args:
        centering: weight of (r_i + r_j)², averaged as the loss is. It holds the scores around 0, as comparisons leave
            their level free.
        margin_scale: c.

    Source: Ouyang et al. 2022, eq. 1; margins: Touvron et al. 2023, eq. 2; centering: Eisenstein et al. 2023.
    """

    def loss(params: Params, batch: RankedBatch, frozen: Frozen | None, key: Array) -> Loss:
        scores = _scores(head, params, batch)
        batch = jax.tree.map(lambda leaf: leaf.reshape(scores.shape), batch._replace(completions=None))
        led = scores if batch.margins is None else scores - margin_scale * batch.margins
        per_prompt = reward_model.k_choose_2_loss(led, batch.ranks, batch.real)
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


# Scores of data -------------------------------------------------------------------------------------------------------

READ = 64  # batches whose lines are read at once


def scored_lines(
    reward: LoadedReward, data: Any, *, batch_size: int = 16, on_bad: records.OnBad = "raise"
) -> Iterator[dict[str, Any]]:
    """Yield each line of a file, or each dict, with the scores of its completions.

    They are its "score"; of a preference "score_chosen" and "score_rejected"; of answers "scores", a list.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `records.read`; or for a text that does not fit the context, naming
            its line.
    """
    chat = bool(getattr(reward.tokenizer, "chat_template", None))
    found = records.read(data, functools.partial(_with_texts, chat=chat), on_bad=on_bad)
    numbered = zip(found.numbers, found, strict=True)
    while part := list(itertools.islice(numbered, READ * batch_size)):
        rows = []
        for number, (_, record) in part:
            try:
                rows += [reward.tokens(record.prompt, each, template=record.template) for each in record.completions]
            except ValueError as error:
                raise ValueError(f"{found.source}, {found.unit} {number}: {error}") from error
        scores = iter(reward.score_tokens(rows, batch_size=batch_size))
        for _, (line, record) in part:
            given = [next(scores) for _ in record.completions]
            if "chosen" in line:
                yield line | dict(zip(("score_chosen", "score_rejected"), given, strict=True))
            else:
                yield line | ({"scores": given} if "answers" in line else {"score": given[0]})


def _with_texts(line: Fields, *, chat: bool) -> tuple[dict[str, Any], Ranked | PromptCompletion]:
    """Parse a line for a model with or without a chat template, and return it with its record."""
    read = records.canonical(line, chat=chat)
    parse = records.ranked if "chosen" in read or "answers" in read else records.prompt_completion
    return dict(line), parse(read)
