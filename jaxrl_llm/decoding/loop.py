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
from jaxrl_llm.decoding.transforms import Transform
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.objectives.numerics import wide

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two steps: the last token of each row is emitted, and not yet fed to the model."""

    cache: Cache
    token: Int[Array, "batch"]
    fed: Bool[Array, "batch"]  # whether that token will count in the cache
    done: Bool[Array, "batch"]
    time: Int[Array, ""]  # tokens emitted so far


def prefill(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    rules: Rules,
    *,
    num_slots: int,
) -> tuple[State, Generation]:
    """Read the prompts in one call, unembed their last tokens, and choose the first token of each row."""
    batch, length = prompts.shape
    cache = lm.init_cache(batch, num_slots, dtype=language_model.params_dtype(params))
    hidden, cache = lm.hidden(params, prompts, cache, mask=prompt_mask)
    last = jnp.where(prompt_mask, jnp.arange(length), 0).max(axis=1)  # of an empty prompt: any place, all are its root
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    time, done = jnp.zeros((), jnp.int32), jnp.zeros(batch, bool)
    return _emit(rules, lm.logits(params, hidden), cache, time, done)


def advance(
    lm: LanguageModel, params: Params, state: State, rules: Rules, max_new_tokens: Int[Array, ""], *, num_steps: int
) -> tuple[State, Generation]:
    """Up to `num_steps` more tokens: scans of `BLOCK` steps, until all rows have ended or have `max_new_tokens`.

    The end is looked for between the scans, not in each step: a `cond` in the step makes XLA copy the cache twice.
    """

    def step(state: State, _: None) -> tuple[State, Generation]:
        hidden, cache = lm.hidden(params, state.token[:, None], state.cache, mask=state.fed[:, None])
        return _emit(rules, lm.logits(params, hidden[:, 0]), cache, state.time, state.done)

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


def _emit(
    rules: Rules, logits: Float[Array, "batch vocab"], cache: Cache, time: Int[Array, ""], done: Bool[Array, "batch"]
) -> tuple[State, Generation]:
    """Choose the next token of each row that has not ended, and say how probable it was."""
    logits = wide(logits)
    warped = logits if rules.transform is None else rules.transform(logits)
    if rules.keys is None:
        token = sampling.greedy(warped)
        logp_sampler = jnp.zeros_like(logits[:, 0])
    else:
        token = sampling.sample(jax.vmap(lambda key: jax.random.fold_in(key, time))(rules.keys), warped)
        logp_sampler = token_log_probs(warped, token)
    alive = ~done
    emitted = Generation(
        tokens=jnp.where(alive, token, rules.pad_id),
        mask=alive,
        logp=jnp.where(alive, token_log_probs(logits, token), 0),
        logp_sampler=jnp.where(alive, logp_sampler, 0),
    )
    done |= (token[:, None] == rules.eos_ids).any(axis=1)
    return State(cache, emitted.tokens, alive, done, time + 1), emitted
