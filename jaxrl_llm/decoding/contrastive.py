"""Contrastive search: probable tokens whose hidden states differ from those before."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.core import Generation, Request
from jaxrl_llm.decoding.transforms import require
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.numerics import largest, wide


def contrastive_search(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    top_k: int,
    alpha: float | Float[Array, "*#batch"],
    max_new_tokens: int | Int[Array, "batch"],
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
) -> Generation:
    """Continue each prompt by the most probable tokens that do not repeat (Su et al. 2022; Su and Xu 2022).

    Among the `top_k` most probable tokens, take the v that maximises (Su et al. 2022, eq. 5)

        (1 − α) p(v) − α max_j cos(h_v, h_j)

    Here h are last hidden states, h_v is the one after v, and j runs over all real tokens of the row so far. Padding
    never counts, and without any token there is no penalty. All candidates of all rows are scored in one call.

    Args:
        top_k: the number of candidates; it is compiled in. 1 is greedy decoding.
        alpha: in [0, 1], for all rows or for each; 0 is greedy decoding. Another value does not recompile.

    The other arguments, and what is compiled for, are those of `generate`. `logp_sampler` is 0: nothing is drawn.
    Infinite coordinates of a hidden state, such as a table's for impossible tokens, count as 0.

    Raises:
        ValueError: for a `top_k` outside [1, vocabulary], an `alpha` outside [0, 1], and for what `generate` refuses.
        FloatingPointError: if the model's logits are NaN, or no token is possible.
    """
    top_k = core.check_size("top_k", top_k, 1, lm.vocab_size)
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, greedy=True, eos_id=eos_id, pad_id=pad_id, stop=stop
    )
    batch, length = request.limits.shape[0], core.longest(max_new_tokens)
    if jnp.shape(alpha) not in ((), (batch,)):
        raise ValueError(f"alpha must be one number or one for each of {batch} rows, but is {alpha}.")
    alpha = jnp.asarray(alpha, jnp.result_type(float))
    require((alpha >= 0) & (alpha <= 1), "alpha", "in [0, 1]", alpha)
    alpha = jnp.broadcast_to(alpha, (batch,))
    generation = decode(lm, params, request, alpha, top_k=top_k, num_steps=core.step_bucket(length))
    return core.check_generation(jax.tree.map(lambda leaf: leaf[:, :length], generation))


@core.result
class State:
    """The state between two steps: all tokens are fed.

    Each row has a cache for every candidate; that of `chosen` is its own.
    """

    cache: Cache  # of batch · k rows
    chosen: Int[Array, "batch"]
    hidden: Float[Array, "batch width"]  # at the last token
    directions: Float[Array, "batch slot width"]  # of the hidden states at all tokens, of norm 1
    counts: Bool[Array, "batch slot"]  # which slots are real tokens
    done: Bool[Array, "batch"]
    time: Int[Array, ""]
    stop: Int[Array, "batch"] | None  # how far each row is into a stop string


@functools.partial(jax.jit, static_argnames=("lm", "top_k", "num_steps"))
def decode(
    lm: LanguageModel, params: Params, request: Request, alpha: Float[Array, "batch"], *, top_k: int, num_steps: int
) -> Generation:
    """The compiled part: prefill, then a step for each token until all rows have ended."""
    batch, length = request.limits.shape[0], request.prompts.shape[1]
    prompt = core.prefill(lm, params, request, num_slots=length + num_steps)
    rows = jnp.arange(batch)

    def step(state: State) -> tuple[State, Generation]:
        logits = wide(lm.logits(params, state.hidden))
        values, candidates = largest(logits, top_k)
        hidden, cache = _try(lm, params, state, candidates)
        directions = _direction(hidden)
        chosen = core.greedy(_scores(logits, values, directions, state, alpha))
        token, stop = candidates[rows, chosen], state.stop
        emitted, done = core.emit(request, logits, token, jnp.zeros_like(logits[:, 0]), state.done, state.time)
        if stop is not None:
            stop = jnp.where(emitted.mask, request.stop.advance(stop, token), stop)
            done |= request.stop.reached(stop)
        slot = length + state.time
        state = State(
            cache=cache,
            chosen=chosen,
            hidden=hidden[rows, chosen],
            directions=state.directions.at[:, slot].set(directions[rows, chosen]),
            counts=state.counts.at[:, slot].set(emitted.mask),
            done=done,
            time=state.time + 1,
            stop=stop,
        )
        return state, emitted

    state = State(
        cache=prompt.cache.take(jnp.repeat(rows, top_k), groups=batch),
        chosen=jnp.zeros(batch, jnp.int32),
        hidden=prompt.last,
        directions=jnp.pad(_direction(prompt.hidden), ((0, 0), (0, num_steps), (0, 0))),
        counts=jnp.pad(request.mask, ((0, 0), (0, num_steps))),
        done=jnp.zeros(batch, bool),
        time=jnp.zeros((), jnp.int32),
        stop=None if request.stop is None else request.stop.start(batch),
    )
    emitted = core.run_blocks(step, state, lambda state: ~state.done.all(), num_steps=num_steps, block=1)[1]
    return everywhere(core.by_row(request, emitted))


def _try(
    lm: LanguageModel, params: Params, state: State, candidates: Int[Array, "batch k"]
) -> tuple[Float[Array, "batch k width"], Cache]:
    """Feed every candidate to a copy of its row: its hidden state, and the caches of all."""
    batch, top_k = candidates.shape
    own = jnp.repeat(jnp.arange(batch) * top_k + state.chosen, top_k)
    alive = jnp.repeat(~state.done, top_k)
    hidden, cache = lm.hidden(
        params, candidates.reshape(-1, 1), state.cache.take(own, groups=batch), mask=alive[:, None]
    )
    return hidden.reshape(batch, top_k, hidden.shape[-1]), cache


def _direction(hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """hidden / |hidden|; 0 stays 0."""
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
