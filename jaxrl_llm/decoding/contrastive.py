"""Contrastive search: a probable token whose state is unlike those before it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.decoding import checks, sampling
from jaxrl_llm.decoding.generate import STEP_BUCKET
from jaxrl_llm.decoding.loop import Generation
from jaxrl_llm.decoding.transforms.base import check
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import wide
from jaxrl_llm.objectives.logprobs import token_log_probs


def contrastive_search(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    *,
    top_k: int,
    alpha: float | Float[Array, "*#batch"],
    max_new_tokens: int | Int[Array, "batch"],
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
) -> Generation:
    """Continue each prompt by the most probable tokens that do not repeat (Su et al. 2022; Su and Xu 2022).

    Of the `top_k` most probable tokens v take the one with the highest (Su et al. 2022, eq. 5)

        (1 − α) p(v) − α max_j cos(h_v, h_j)

    where h are last hidden states, h_v that after v, and j runs over all real tokens of the row so far: padding never
    counts, and without any token there is no penalty. All candidates of all rows are one call of the model.

    Args:
        top_k: the number of candidates, which is compiled in; 1 is greedy decoding.
        alpha: from 0, greedy decoding, to 1, for all rows or for each; another value never recompiles.

    The other arguments, and what is compiled for, are those of `generate`. `logp_sampler` is 0: nothing is drawn.
    Infinite coordinates of a hidden state count as 0, as those of a table with impossible tokens.

    Raises:
        ValueError: for a `top_k` outside [1, vocabulary], an `alpha` outside [0, 1], and for what `generate` refuses.
        FloatingPointError: if the model's logits are NaN, or no token is possible.
    """
    prompts = jnp.asarray(prompts)
    if not isinstance(top_k, int | np.integer) or not 1 <= top_k <= lm.vocab_size:
        raise ValueError(f"top_k must be an integer in [1, {lm.vocab_size}], the vocabulary, but is {top_k!r}.")
    limits = checks.row_limits(max_new_tokens, prompts.shape[0] if prompts.ndim else 1)
    longest = int(np.max(max_new_tokens, initial=1))
    prompts, mask = checks.bucketed_prompts(lm, prompts, prompt_mask, max_new_tokens=limits)
    if jnp.shape(alpha) not in ((), prompts.shape[:1]):
        raise ValueError(f"alpha must be one number or one for each of {prompts.shape[0]} rows, but is {alpha}.")
    alpha = jnp.asarray(alpha, jnp.result_type(float))
    check((alpha >= 0) & (alpha <= 1), "alpha", "in [0, 1]", alpha)
    generation = decode(
        lm,
        params,
        prompts,
        mask,
        jnp.broadcast_to(alpha, prompts.shape[:1]),
        checks.eos_array(eos_id),
        jnp.asarray(pad_id, jnp.int32),
        jnp.asarray(limits),
        top_k=int(top_k),
        num_steps=-(-longest // STEP_BUCKET) * STEP_BUCKET,
    )
    return checks.check_finite(jax.tree.map(lambda leaf: leaf[:, :longest], generation))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two steps: all tokens are fed. Each row has a cache for every candidate; that of `chosen` is its own."""

    cache: Cache  # of batch · k rows
    chosen: Int[Array, "batch"]
    hidden: Float[Array, "batch width"]  # at the last token
    directions: Float[Array, "batch slot width"]  # of the hidden states at all tokens, of norm 1
    counts: Bool[Array, "batch slot"]  # which slots are real tokens
    done: Bool[Array, "batch"]
    time: Int[Array, ""]
    emitted: Generation


@functools.partial(jax.jit, static_argnames=("lm", "top_k", "num_steps"))
def decode(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    alpha: Float[Array, "batch"],
    eos_ids: Int[Array, "eos"],
    pad_id: Int[Array, ""],
    limits: Int[Array, "batch"],
    *,
    top_k: int,
    num_steps: int,
) -> Generation:
    """The compiled whole: prefill, then a step a token until all rows have ended."""
    state = _prefill(lm, params, prompts, prompt_mask, pad_id, top_k=top_k, num_steps=num_steps)
    rows = jnp.arange(prompts.shape[0])

    def step(state: State) -> State:
        logits = wide(lm.logits(params, state.hidden))
        candidates = jax.lax.optimization_barrier(jax.lax.top_k(logits, top_k))
        hidden, cache = _try(lm, params, state, candidates[1])
        directions = _direction(hidden)
        scores = _scores(logits, candidates[0], directions, state, alpha)
        chosen = sampling.greedy(scores)
        token, alive = candidates[1][rows, chosen], ~state.done
        slot = prompts.shape[1] + state.time
        emitted = Generation(
            tokens=jnp.where(alive, token, pad_id),
            mask=alive,
            logp=jnp.where(alive, token_log_probs(logits, token), 0),
            logp_sampler=jnp.zeros_like(logits[:, 0]),
        )
        return State(
            cache=cache,
            chosen=chosen,
            hidden=hidden[rows, chosen],
            directions=state.directions.at[:, slot].set(directions[rows, chosen]),
            counts=state.counts.at[:, slot].set(alive),
            done=state.done | (token[:, None] == eos_ids).any(axis=1) | (state.time + 1 >= limits),
            time=state.time + 1,
            emitted=jax.tree.map(lambda old, new: old.at[:, state.time].set(new), state.emitted, emitted),
        )

    return jax.lax.while_loop(lambda state: ~state.done.all(), step, state).emitted


def _prefill(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    pad_id: Int[Array, ""],
    *,
    top_k: int,
    num_steps: int,
) -> State:
    """Read the prompts in one call, and make room for the candidates."""
    batch, length = prompts.shape
    cache = lm.init_cache(batch, length + num_steps, dtype=language_model.params_dtype(params))
    hidden, cache = lm.hidden(params, prompts, cache, mask=prompt_mask)
    last = jnp.where(prompt_mask, jnp.arange(length), 0).max(axis=1)  # of an empty prompt: any place, all are its root
    dtype = jax.eval_shape(lambda: wide(lm.logits(params, hidden[:, 0]))).dtype
    return State(
        cache=cache.take(jnp.repeat(jnp.arange(batch), top_k)),
        chosen=jnp.zeros(batch, jnp.int32),
        hidden=jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0],
        directions=jnp.pad(_direction(hidden), ((0, 0), (0, num_steps), (0, 0))),
        counts=jnp.pad(prompt_mask, ((0, 0), (0, num_steps))),
        done=jnp.zeros(batch, bool),
        time=jnp.zeros((), jnp.int32),
        emitted=Generation(
            tokens=jnp.full((batch, num_steps), pad_id),
            mask=jnp.zeros((batch, num_steps), bool),
            logp=jnp.zeros((batch, num_steps), dtype),
            logp_sampler=jnp.zeros((batch, num_steps), dtype),
        ),
    )


def _try(
    lm: LanguageModel, params: Params, state: State, candidates: Int[Array, "batch k"]
) -> tuple[Float[Array, "batch k width"], Cache]:
    """Feed every candidate to a copy of its row: its hidden state, and the caches of all."""
    batch, top_k = candidates.shape
    own = jnp.repeat(jnp.arange(batch) * top_k + state.chosen, top_k)
    alive = jnp.repeat(~state.done, top_k)
    hidden, cache = lm.hidden(params, candidates.reshape(-1, 1), state.cache.take(own), mask=alive[:, None])
    return hidden.reshape(batch, top_k, -1), cache


def _direction(hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """hidden / |hidden|, of 0 itself."""
    hidden = wide(hidden)
    hidden = jnp.where(jnp.isinf(hidden), 0, hidden)
    largest = jnp.abs(hidden).max(axis=-1, keepdims=True)  # taken out first, so that no square over- or underflows
    hidden = hidden / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.square(hidden).sum(axis=-1, keepdims=True))
    return hidden / jnp.where(norm > 0, norm, 1)


def _scores(
    logits: Float[Array, "batch vocab"],
    values: Float[Array, "batch k"],
    directions: Float[Array, "batch k width"],
    state: State,
    alpha: Float[Array, "batch"],
) -> Float[Array, "batch k"]:
    """(1 − α) p − α · the largest cosine with a state of the row; −inf for a token that is not possible."""
    probability = jnp.exp(values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    cosine = jnp.einsum("bkw,bsw->bks", directions, state.directions)
    penalty = jnp.where(state.counts[:, None], cosine, -jnp.inf).max(axis=-1)
    penalty = jnp.where(state.counts.any(axis=1)[:, None], penalty, 0)
    alpha = alpha[:, None].astype(probability.dtype)
    return jnp.where(values > -jnp.inf, (1 - alpha) * probability - alpha * penalty, -jnp.inf)
