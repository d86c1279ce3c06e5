"""Exact search: the sequence of the highest score, depth first, with a bound."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.core import Request
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.numerics import log_softmax, wide


class ExactSearch(NamedTuple):
    """The result of `exact_search`. EOS, if the sequence has one, is its last token, and counts."""

    tokens: Int[np.ndarray, "length"]
    log_prob: float  # Σ log p of the model over the generated tokens, in nats
    score: float  # log_prob / length**length_penalty
    num_nodes: int  # prefixes whose next-token distribution was computed, the prompt's included


class _Node(NamedTuple):
    """A prefix that is being continued: its tokens, its cache, and the continuations that are still to try."""

    tokens: tuple[int, ...]
    cache: Cache
    children: Iterator[tuple[int, float]]  # tokens and the sum of log-probabilities with them, best first


class _Goal:
    """The score, its bound, and the best sequence so far."""

    def __init__(self, max_new_tokens: int, length_penalty: float):
        self.max_new_tokens, self.length_penalty = max_new_tokens, length_penalty
        self.tokens, self.log_prob, self.score = (), -np.inf, -np.inf

    def offer(self, tokens: tuple[int, ...], log_prob: float) -> None:
        """Take a sequence that has ended, if it is better."""
        score = log_prob / len(tokens) ** self.length_penalty
        if score > self.score:
            self.tokens, self.log_prob, self.score = tokens, log_prob, score

    def in_reach(self, length: int, log_prob: float) -> bool:
        """True if a sequence that begins with a prefix of that length and log-probability could be better."""
        best_length = self.max_new_tokens if self.length_penalty > 0 else length
        return log_prob / best_length**self.length_penalty > self.score


def exact_search(
    lm: LanguageModel,
    params: Params,
    prompt: Int[Array, "prompt"] | Sequence[int],
    *,
    max_new_tokens: int,
    length_penalty: float = 0.0,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    max_nodes: int = 100_000,
) -> ExactSearch:
    """The continuation of the highest score among all that end with EOS or have `max_new_tokens` tokens.

        score(y) = log p(y | prompt) / |y|**length_penalty          (|y|: generated tokens, EOS counted)

    Depth first, the most probable token first (Stahlberg and Byrne 2019, algorithm 1). Log-probabilities are ≤ 0, so
    nothing that begins with a prefix of log-probability L and t tokens scores above `L / max_new_tokens**α` for α > 0,
    or `L / t**α` for α ≤ 0. A prefix whose bound is not above the best score so far is left out.

    The search runs on the host, with a compiled step of one token. Each depth keeps the cache that siblings share.

    Args:
        prompt: one sequence, without padding.
        length_penalty: α.
        eos_id: the token, or any of the tokens, that ends a sequence.
        max_nodes: the most prefixes that are continued.

    Raises:
        ValueError: for what `generate` refuses, a prompt that is not one sequence, a penalty that is not finite, or
            `max_nodes` below 1.
        FloatingPointError: if the model's logits are NaN or leave no token.
        RuntimeError: if `max_nodes` are not enough, so that the best sequence is not known.
    """
    core.check_size("max_nodes", max_nodes, 1)
    longest = core.check_size("max_new_tokens", max_new_tokens, 1)
    penalty = float(core.length_exponent(length_penalty, longest))
    request = core.request(lm, core.one_prompt(prompt), max_new_tokens=longest, greedy=True, eos_id=eos_id)
    eos = set(np.asarray(request.eos_ids).tolist())
    log_probs, cache = _read(lm, params, request)
    goal, num_nodes = _Goal(longest, penalty), 1
    path = [_Node((), cache, _children(log_probs, 0.0))]
    while path:
        node = path[-1]
        token, log_prob = next(node.children, (None, -np.inf))
        length = len(node.tokens) + 1
        if token is None or not goal.in_reach(length, log_prob):  # nor are less probable siblings
            path.pop()
        elif token in eos or length == longest:
            goal.offer((*node.tokens, token), log_prob)
        elif num_nodes == max_nodes:
            raise RuntimeError(
                f"max_nodes must be larger than {max_nodes}: the search is not over. The best score so far is "
                f"{goal.score:.6g}."
            )
        else:
            num_nodes += 1
            log_probs, cache = _step(lm, params, jnp.asarray([[token]], jnp.int32), node.cache)
            path.append(_Node((*node.tokens, token), cache, _children(log_probs, log_prob)))
    return ExactSearch(np.asarray(goal.tokens, np.int32), goal.log_prob, goal.score, num_nodes)


def _children(log_probs: Float[Array, "vocab"], before: float) -> Iterator[tuple[int, float]]:
    """The tokens by falling probability, with the sum of the log-probabilities up to and with them, in float64."""
    values = np.asarray(log_probs, np.float64)
    if np.isnan(values).any() or values.max() == -np.inf:
        raise FloatingPointError("the prompt could not be continued: the model's logits are NaN, +inf, or all −inf.")
    order = np.argsort(-values, kind="stable")
    return ((int(token), before + min(float(values[token]), 0.0)) for token in order)


@functools.partial(jax.jit, static_argnames="lm")
def _read(lm: LanguageModel, params: Params, request: Request) -> tuple[Float[Array, "vocab"], Cache]:
    prompt = core.prefill(lm, params, request, num_slots=request.prompts.shape[1] + request.num_steps)
    return everywhere(log_softmax(wide(lm.logits(params, prompt.last)))[0]), prompt.cache


@functools.partial(jax.jit, static_argnames="lm")
def _step(lm: LanguageModel, params: Params, token: Int[Array, "1 1"], cache: Cache) -> tuple[Array, Cache]:
    logits, cache = lm.apply(params, token, cache)
    return everywhere(log_softmax(wide(logits))[0, 0]), cache
