"""The decoding loop: prefill, then a step a token, as scans. It knows nothing of what model is behind."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm import language_model
from jaxrl_llm.decoding import sampling
from jaxrl_llm.decoding.stopping import StopStrings
from jaxrl_llm.decoding.transforms import base as context
from jaxrl_llm.decoding.transforms.base import Context, Transform
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import log_softmax, wide
from jaxrl_llm.objectives.logprobs import token_log_probs

BLOCK = 8  # steps between two looks at whether all rows have ended


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """The tokens after the prompts. EOS is an action: it is in the mask, and its log-probability counts.

    Where the mask is false the token is `pad_id` and the log-probabilities are 0.
    """

    tokens: Int[Array, "batch time"]
    mask: Bool[Array, "batch time"]
    logp: Float[Array, "batch time"]  # of the model itself, at temperature 1, in nats
    logp_sampler: Float[Array, "batch time"]  # of the law the token was drawn from; 0 where the choice was greedy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """How tokens are chosen and when a row ends; leaves all, so that none of their values recompiles."""

    transform: Transform | None
    keys: Key[Array, "batch"] | None  # None: greedy
    eos_ids: Int[Array, "eos"]
    pad_id: Int[Array, ""]
    limits: Int[Array, "batch"]  # new tokens that each row may have
    stop: StopStrings | None = None
    guidance_scale: Float[Array, ""] | None = None  # the second half of the model's rows are then the unguided ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two steps: the last token of each row is emitted, and not yet fed to the model."""

    cache: Cache
    token: Int[Array, "batch"]
    fed: Bool[Array, "batch"]  # whether that token will count in the cache
    done: Bool[Array, "batch"]
    time: Int[Array, ""]  # tokens emitted so far
    context: Context  # what the transform has to know
    stop: Int[Array, "batch"] | None  # how far each row is into a stop string


def prefill(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    rules: Rules,
    *,
    num_slots: int,
) -> tuple[State, Generation]:
    """Read the prompts in one call, unembed their last tokens, and choose the first token of each row.

    With guidance the prompts of the second half of the batch are those of the unguided rows.
    """
    length, batch = prompts.shape[1], rules.limits.shape[0]
    cache = lm.init_cache(batch, num_slots, dtype=language_model.params_dtype(params))
    if rules.guidance_scale is not None:
        cache = cache.take(jnp.tile(jnp.arange(batch), 2))  # what a row was given, its unguided twin is given too
    hidden, cache = lm.hidden(params, prompts, cache, mask=prompt_mask)
    last = jnp.where(prompt_mask, jnp.arange(length), 0).max(axis=1)  # of an empty prompt: any place, all are its root
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    start = State(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        fed=jnp.zeros(batch, bool),
        done=jnp.zeros(batch, bool),
        time=jnp.zeros((), jnp.int32),
        context=context.begin(
            rules.transform, prompts[:batch], prompt_mask[:batch], rules.limits, num_slots=num_slots + 1
        ),
        stop=None if rules.stop is None else rules.stop.start(batch),
    )
    return _emit(rules, lm.logits(params, hidden), start)


def advance(
    lm: LanguageModel, params: Params, state: State, rules: Rules, max_new_tokens: Int[Array, ""], *, num_steps: int
) -> tuple[State, Generation]:
    """Up to `num_steps` more tokens: scans of `BLOCK` steps, until all rows have ended or have `max_new_tokens`.

    The end is looked for between the scans, not in each step: a `cond` in the step makes XLA copy the cache twice.
    """

    def step(state: State, _: None) -> tuple[State, Generation]:
        copies = 1 if rules.guidance_scale is None else 2
        token, fed = jnp.tile(state.token, copies), jnp.tile(state.fed, copies)
        hidden, cache = lm.hidden(params, token[:, None], state.cache, mask=fed[:, None])
        return _emit(rules, lm.logits(params, hidden[:, 0]), dataclasses.replace(state, cache=cache))

    block = math.gcd(num_steps, BLOCK)
    emitted = jax.tree.map(
        lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), jax.eval_shape(step, state, None)[1]
    )
    emitted = dataclasses.replace(emitted, tokens=jnp.full_like(emitted.tokens, rules.pad_id))

    def unfinished(carry: tuple[State, Generation, Array]) -> Array:
        state, _, index = carry
        return (index < num_steps) & (state.time < max_new_tokens) & ~state.done.all()

    def run_block(carry: tuple[State, Generation, Array]) -> tuple[State, Generation, Array]:
        state, emitted, index = carry
        state, piece = jax.lax.scan(step, state, length=block)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=0)
        return state, jax.tree.map(write, emitted, piece), index + block

    state, emitted, _ = jax.lax.while_loop(unfinished, run_block, (state, emitted, jnp.zeros((), jnp.int32)))
    return state, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), emitted)


def _emit(rules: Rules, logits: Float[Array, "rows vocab"], state: State) -> tuple[State, Generation]:
    """Choose the next token of each row that has not ended, and say how probable it was."""
    logits, guided = _guide(wide(logits), rules.guidance_scale)
    warped = context.warp(rules.transform, guided, state.context)
    if rules.keys is None:
        token = sampling.greedy(warped)
        logp_sampler = sampling.greedy_log_prob(warped)
    else:
        token = sampling.sample(jax.vmap(lambda key: jax.random.fold_in(key, state.time))(rules.keys), warped)
        logp_sampler = token_log_probs(warped, token)
    alive = ~state.done
    emitted = Generation(
        tokens=jnp.where(alive, token, rules.pad_id),
        mask=alive,
        logp=jnp.where(alive, token_log_probs(logits, token), 0),
        logp_sampler=jnp.where(alive, logp_sampler, 0),
    )
    time = state.time + 1
    done = state.done | (token[:, None] == rules.eos_ids).any(axis=1) | (time >= rules.limits)
    stop = state.stop
    if stop is not None:
        stop = jnp.where(alive, rules.stop.advance(stop, token), stop)
        done |= rules.stop.reached(stop)
    after = context.remember(rules.transform, state.context, guided, token, alive)
    return State(state.cache, emitted.tokens, alive, done, time, after, stop), emitted


def _guide(
    logits: Float[Array, "rows vocab"], scale: Float[Array, ""] | None
) -> tuple[Float[Array, "batch vocab"], Float[Array, "batch vocab"]]:
    """The model's own logits of each row, and those that guidance makes of them and of the unguided row's.

    log p_u + s (log p − log p_u)              (Ho and Salimans 2022; Sanchez et al. 2023, eq. 7)
    """
    if scale is None:
        return logits, logits
    own, unguided = jnp.split(logits, 2)
    log_probs, base = log_softmax(own), log_softmax(unguided)
    # Where either excludes a token it is excluded, for −inf has no multiples; but scale 1 leaves the other law out.
    possible = (log_probs > -jnp.inf) & (base > -jnp.inf)
    guided = jnp.where(possible, base, 0) + scale * (jnp.where(possible, log_probs, 0) - jnp.where(possible, base, 0))
    guided = jnp.where(possible, guided, -jnp.inf)
    return own, jnp.where(scale == 1, log_probs, guided)
