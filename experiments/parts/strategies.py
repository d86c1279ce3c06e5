"""Every way to continue a prompt that `experiments/decoding_strategies.py` compares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.analysis.chrf import sentence_chrf
from jaxrl_llm.decoding import generate
from jaxrl_llm.decoding import transforms as t
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.decoding.contrastive import contrastive_search
from jaxrl_llm.decoding.core import Generation
from jaxrl_llm.decoding.reranking import best_of_n, minimum_bayes_risk
from jaxrl_llm.language_model import LanguageModel, Params

Texts = Callable[[], Any]


class Task(NamedTuple):
    """Prompts of one length, how much to write after each, and with what randomness."""

    lm: LanguageModel
    params: Params
    tokenizer: Any
    prompts: np.ndarray  # [batch, time]
    new_tokens: int
    key: jax.Array


SAMPLERS = {
    "pure sampling": None,
    "temperature 0.7": t.Temperature(0.7),
    "top-k 40": t.TopK(40),
    "top-p 0.95": t.TopP(0.95),
    "min-p 0.05": t.MinP(0.05),
    "typical 0.95": t.Typical(0.95),
    "ε 0.0006": t.Epsilon(6e-4),
    "η 0.0006": t.Eta(6e-4),
    "top-nσ, n = 1": t.TopNSigma(1.0),
    "mirostat, τ = 5 bits": t.Mirostat(5.0, 0.1),
}
FAMILIES = {  # of each strategy
    "greedy": "maximisation",
    "beam, k = 4": "maximisation",
    "diverse beam, k = 4": "maximisation",
    "greedy, repetition penalty 1.3": "penalised maximisation",
    "contrastive, k = 6, α = 0.6": "penalised maximisation",
    **dict.fromkeys(SAMPLERS, "sampling"),
    "best of 4 by log p": "choice among samples",
    "MBR of 8 by chrF": "choice among samples",
}


def mean_log_prob(samples: Generation) -> jax.Array:
    """Return the score of best-of-n: nats per token."""
    return jnp.where(samples.mask, samples.logp, 0).sum(axis=-1) / samples.mask.sum(axis=-1)


def searches(task: Task) -> dict[str, Texts]:
    """Return calls for the new tokens [batch, time] of each strategy without randomness."""
    model, options = (task.lm, task.params, task.prompts), {"max_new_tokens": task.new_tokens}
    diverse = {"num_beams": 4, "num_groups": 4, "diversity_penalty": 0.5}
    penalised = {"greedy": True, "transform": t.RepetitionPenalty(1.3)}
    return {
        "greedy": lambda: generate(*model, greedy=True, **options).tokens,
        "beam, k = 4": lambda: beam_search(*model, num_beams=4, **options).tokens[:, 0],
        "diverse beam, k = 4": lambda: beam_search(*model, **diverse, **options).tokens[:, 0],
        "greedy, repetition penalty 1.3": lambda: generate(*model, **penalised, **options).tokens,
        "contrastive, k = 6, α = 0.6": lambda: contrastive_search(*model, top_k=6, alpha=0.6, **options).tokens,
    }


def samples(task: Task) -> dict[str, Texts]:
    """Return the same for each strategy that samples. All draw with the same keys."""
    model, options = (task.lm, task.params, task.prompts), {"max_new_tokens": task.new_tokens, "key": task.key}

    @functools.cache
    def eight() -> tuple[np.ndarray, np.ndarray]:
        drawn = best_of_n(*model, n=8, score=mean_log_prob, **options)
        return np.asarray(drawn.samples.tokens), np.asarray(drawn.scores)

    def best_of_four() -> np.ndarray:
        rows, scores = eight()
        return rows[np.arange(len(rows)), scores[:, :4].argmax(axis=1)]  # the first samples are the same for every n

    return {
        **{
            name: functools.partial(_sample, model, options | {"transform": transform})
            for name, transform in SAMPLERS.items()
        },
        "best of 4 by log p": best_of_four,
        "MBR of 8 by chrF": lambda: np.stack([rows[_consensus(task, rows)] for rows in eight()[0]]),
    }


def _sample(model: tuple, options: dict[str, Any]) -> jax.Array:
    return generate(*model, **options).tokens


def _consensus(task: Task, rows: np.ndarray) -> int:
    """Return the sample that is most like the others."""
    texts = [task.tokenizer.decode(row) for row in rows.tolist()]
    return minimum_bayes_risk(texts, sentence_chrf).index
