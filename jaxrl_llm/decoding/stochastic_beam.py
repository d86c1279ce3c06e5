"""Stochastic beam search: sequences drawn without replacement, in one pass from the root down."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.decoding import checks, search_loop
from jaxrl_llm.decoding.transforms import base as context
from jaxrl_llm.decoding.transforms.base import Context, Transform
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StochasticBeams:
    """Distinct continuations of each row, in the order in which they were drawn. EOS is in the mask, and counted.

    Where a row has fewer than K continuations, the mask of the others is false, and log_prob and perturbed are −inf.
    """

    tokens: Int[Array, "batch beam time"]  # `pad_id` where the mask is false
    mask: Bool[Array, "batch beam time"]
    log_prob: Float[Array, "batch beam"]  # Σ log q over the generated tokens, q the law they are drawn from, in nats
    perturbed: Float[Array, "batch beam"]  # log_prob + Gumbel noise, falling
    threshold: Float[Array, "batch"]  # κ: the perturbed log-probability of the first that was left out, or −inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """How sequences are drawn and when they end; leaves all."""

    transform: Transform | None
    keys: Key[Array, "batch"]
    eos_ids: Int[Array, "eos"]
    pad_id: Int[Array, ""]
    limits: Int[Array, "batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two steps. A beam that has ended stays among the beams as long as its perturbed value does."""

    cache: Cache
    parents: Int[Array, "row"]
    token: Int[Array, "row"]
    open: Bool[Array, "batch beam"]  # exists, and has not ended
    log_prob: Float[Array, "batch beam"]
    perturbed: Float[Array, "batch beam"]
    tokens: Int[Array, "batch beam time"]
    length: Int[Array, "batch beam"]
    time: Int[Array, ""]
    context: Context
    broken: Bool[Array, "batch"]


def stochastic_beam_search(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    *,
    num_beams: int,
    max_new_tokens: int | Int[Array, "batch"],
    key: Key[Array, "*#batch"],
    transform: Transform | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
) -> StochasticBeams:
    """Draw `num_beams` distinct continuations of each prompt, as if one after the other without replacement.

    The law q is that of sampling tokens from what `transform` leaves of the model's logits (without one: the model's).
    The sequences are the K largest of log q(y) + Gumbel noise (Kool et al. 2019). The noise of a prefix is the maximum
    over its continuations, so it is drawn from the root down: with φ the log-probability of a continuation by one token
    and G its parent's perturbed value,

        G̃ = φ + Gumbel noise,  Z = max G̃ over the siblings,  v = G − G̃ + log(1 − exp(G̃ − Z))
        perturbed = G − max(0, v) − log(1 + exp(−|v|))                    (Kool et al. 2019, appendix B)

    which makes the siblings' maximum G. The first sequence is a sample of q. One beam more than asked for is run, for
    the threshold κ; given it, see `inclusion_probability`.

    Args:
        num_beams: K.
        max_new_tokens: of all rows, or of each.
        key: one key, from which each row derives its own by its index, or one a row.
        transform: shapes the law; its numbers serve all rows.
        prompt_mask: false at padding, on either side.
        eos_id: the token, or any of the tokens, that ends a sequence.

    Raises:
        ValueError: for what `generate` refuses, or fewer than one beam.
        FloatingPointError: if the logits are NaN or no token is possible. (Under an outer `jit`, log_prob is NaN.)
    """
    search_loop.check_sizes(num_beams=(num_beams, 1))
    prompts, mask, limits, longest = search_loop.request(lm, prompts, prompt_mask, max_new_tokens, transform)
    keys = checks.row_keys(key, prompts.shape[0])
    rules = Rules(transform, keys, checks.eos_array(eos_id), jnp.asarray(pad_id, jnp.int32), limits)
    num_steps = search_loop.step_bucket(longest)
    beams = draw(lm, params, prompts, mask, rules, num_beams=num_beams, num_steps=num_steps)
    search_loop.check_law(beams.log_prob)
    return dataclasses.replace(beams, tokens=beams.tokens[..., :longest], mask=beams.mask[..., :longest])


def inclusion_probability(
    log_prob: Float[Array, "batch beam"], threshold: Float[Array, "batch"]
) -> Float[Array, "batch beam"]:
    """The probability that a sequence's perturbed value exceeds κ: P(log q + Gumbel > κ) = 1 − exp(−exp(log q − κ)).

    For the beams of `stochastic_beam_search`, Σ_y p(y) f(y) / inclusion(y) over them estimates Σ_y p(y) f(y) over all
    sequences that q can draw, without bias (Kool et al. 2019; Duffield et al. 2007). 0 where log q is −inf.
    """
    possible = log_prob > -jnp.inf
    log_odds = jnp.where(possible, jnp.where(possible, log_prob, 0) - threshold[..., None], -jnp.inf)
    return -jnp.expm1(-jnp.exp(log_odds))


@functools.partial(jax.jit, static_argnames=("lm", "num_beams", "num_steps"))
def draw(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    rules: Rules,
    *,
    num_beams: int,
    num_steps: int,
) -> StochasticBeams:
    """The compiled whole of `stochastic_beam_search`, of prompts that are padded on the left."""
    batch, length = prompts.shape
    width = num_beams + 1
    every_beam = jnp.repeat(jnp.arange(batch), width)
    logits, cache = search_loop.prefill(lm, params, prompts, prompt_mask, num_slots=length + num_steps)
    state = _start(
        rules, prompts[every_beam], prompt_mask[every_beam], cache.take(every_beam), width, logits, num_steps
    )

    def step(state: State) -> State:
        cache = state.cache.take(state.parents)
        hidden, cache = lm.hidden(params, state.token[:, None], cache, mask=state.open.reshape(-1, 1))
        return _choose(rules, dataclasses.replace(state, cache=cache), lm.logits(params, hidden[:, 0]))

    state = _choose(rules, state, logits[every_beam])
    state = search_loop.run_blocks(step, state, lambda state: state.open.any(), num_steps=num_steps)
    kept = slice(None, num_beams)
    mask = (jnp.arange(num_steps + 1) < state.length[:, kept, None]) & (state.perturbed[:, kept] > -jnp.inf)[..., None]
    log_prob, perturbed = (
        jnp.where(state.broken[:, None], jnp.nan, each) for each in (state.log_prob, state.perturbed)
    )
    tokens = jnp.where(mask, state.tokens[:, kept], rules.pad_id)
    return StochasticBeams(tokens, mask, log_prob[:, kept], perturbed[:, kept], perturbed[:, -1])


def _start(
    rules: Rules, prompts: Array, prompt_mask: Array, cache: Cache, width: int, logits: Array, num_steps: int
) -> State:
    """The root of each row, whose perturbed value is a Gumbel's. `prompts`, mask and cache are those of every beam."""
    rows, length = prompts.shape
    shape, dtype = (rows // width, width), wide(logits).dtype
    none = jnp.full(shape, -jnp.inf, dtype)
    root = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, 0), (), dtype))(rules.keys)
    limits = jnp.repeat(rules.limits, width)
    return State(
        cache=cache,
        parents=jnp.arange(rows),
        token=jnp.zeros(rows, jnp.int32),
        open=jnp.broadcast_to(jnp.arange(width) == 0, shape),
        log_prob=none.at[:, 0].set(0),
        perturbed=none.at[:, 0].set(root),
        tokens=jnp.zeros((*shape, num_steps + 1), jnp.int32),
        length=jnp.zeros(shape, jnp.int32),
        time=jnp.zeros((), jnp.int32),
        context=context.begin(rules.transform, prompts, prompt_mask, limits, num_slots=length + num_steps + 1),
        broken=jnp.zeros(shape[0], bool),
    )


def _choose(rules: Rules, state: State, logits: Float[Array, "row vocab"]) -> State:
    """Keep the largest perturbed values among the open beams' continuations and the beams that have ended."""
    (batch, width), vocab = state.open.shape, logits.shape[-1]
    logits = wide(logits)
    # A broken law stays visible: a transform may hide it by removing what is NaN.
    sound = jnp.isfinite(jax.nn.logsumexp(logits, axis=-1)).reshape(batch, width)
    warped = context.warp(rules.transform, logits, state.context).reshape(batch, width, vocab)
    normaliser = jax.nn.logsumexp(warped, axis=-1)
    broken = state.broken | (state.open & ~(sound & jnp.isfinite(normaliser))).any(axis=1)
    tokens, log_prob, perturbed = _continue(rules, state, warped, normaliser)
    ended = ~state.open[..., None]  # as a candidate an ended beam is its own, and only, continuation
    first = ended & (jnp.arange(tokens.shape[2]) == 0)
    perturbed = jnp.where(ended, jnp.where(first, state.perturbed[..., None], -jnp.inf), perturbed)
    log_prob = jnp.where(ended, state.log_prob[..., None], log_prob)
    perturbed, order = jax.lax.top_k(perturbed.reshape(batch, -1), width)
    perturbed, order = jax.lax.optimization_barrier((perturbed, order))
    parent = order // tokens.shape[2]
    token, log_prob = (jnp.take_along_axis(each.reshape(batch, -1), order, axis=1) for each in (tokens, log_prob))
    return _kept(rules, state, logits, parent, token, log_prob, perturbed, broken)


def _continue(
    rules: Rules, state: State, logits: Float[Array, "batch beam vocab"], normaliser: Float[Array, "batch beam"]
) -> tuple[Array, Array, Array]:
    """Of each beam, the continuations of the largest perturbed values: tokens, log-probabilities, perturbed values.

    Among siblings the perturbed value rises with G̃, so that only the largest need be made conditional.
    """
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.time + 1))(rules.keys)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    values, tokens = jax.lax.top_k(logits + noise, min(logits.shape[1], logits.shape[2]))
    values, tokens = jax.lax.optimization_barrier((values, tokens))
    above = (state.log_prob - normaliser)[..., None]
    log_prob = above + jnp.take_along_axis(logits, tokens, axis=-1)
    parent, largest = state.perturbed[..., None], values[..., :1]
    possible = (values > -jnp.inf) & state.open[..., None]
    gap = jnp.where(possible, values - largest, 0)  # G̃ − Z, where the shift by `above` cancels
    rest = parent - jnp.where(possible, values + above, 0) + jnp.log(-jnp.expm1(gap))
    perturbed = parent - jnp.maximum(0, rest) - jnp.log1p(jnp.exp(-jnp.abs(rest)))
    return tokens, jnp.where(possible, log_prob, -jnp.inf), jnp.where(possible, perturbed, -jnp.inf)


def _kept(
    rules: Rules,
    state: State,
    logits: Float[Array, "row vocab"],
    parent: Int[Array, "batch beam"],
    token: Int[Array, "batch beam"],
    log_prob: Float[Array, "batch beam"],
    perturbed: Float[Array, "batch beam"],
    broken: Bool[Array, "batch"],
) -> State:
    """The state with those continuations as its beams."""
    batch, width = parent.shape
    time = state.time + 1
    exists = perturbed > -jnp.inf
    grown = jnp.take_along_axis(state.open, parent, axis=1) & exists
    length = jnp.where(grown, time, jnp.take_along_axis(state.length, parent, axis=1))
    tokens = jnp.take_along_axis(state.tokens, parent[..., None], axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None], state.time, axis=2)
    ends = (token[..., None] == rules.eos_ids).any(axis=-1) | (time >= rules.limits)[:, None]
    parents = (jnp.arange(batch)[:, None] * width + parent).reshape(-1)
    after = state.context
    if rules.transform is not None:
        after = after.take(parents)
        after = context.remember(rules.transform, after, logits[parents], token.reshape(-1), grown.reshape(-1))
    log_prob = jnp.where(exists, log_prob, -jnp.inf)
    return State(
        state.cache,
        parents,
        token.reshape(-1),
        grown & ~ends,
        log_prob,
        perturbed,
        tokens,
        length,
        time,
        after,
        broken,
    )
