"""Stochastic beam search: sequences drawn without replacement, in one pass from the root down."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.core import Request
from jaxrl_llm.decoding.transforms import Transform, update_alive
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.numerics import largest, wide
from jaxrl_llm.objectives.logprobs import token_log_probs


@core.result
class StochasticBeams:
    """Distinct continuations of each row, in the order in which they were drawn. EOS counts: it is in the mask.

    Where a row has fewer than K continuations, the mask of the others is false, and the others' numbers are −inf.
    """

    tokens: Int[Array, "batch beam time"]  # `pad_id` where the mask is false
    mask: Bool[Array, "batch beam time"]
    logp: Float[Array, "batch beam time"]  # of each token under the model itself, at temperature 1, in nats; or 0
    log_prob: Float[Array, "batch beam"]  # Σ log q over the generated tokens, q the sampling distribution
    perturbed: Float[Array, "batch beam"]  # log_prob + Gumbel noise, falling
    threshold: Float[Array, "batch"]  # κ: the perturbed log-probability of the first sequence left out, or −inf


@core.result
class State:
    """The state between two steps. A beam that has ended stays until others have larger perturbed values."""

    cache: Cache
    parents: Int[Array, "row"]
    token: Int[Array, "row"]
    open: Bool[Array, "batch beam"]  # exists, and has not ended
    logp: Float[Array, "batch beam time"]
    log_prob: Float[Array, "batch beam"]
    perturbed: Float[Array, "batch beam"]
    tokens: Int[Array, "batch beam time"]
    length: Int[Array, "batch beam"]
    time: Int[Array, ""]
    transform: PyTree[Array]  # the state of the transform
    stop: Int[Array, "row"] | None  # how far each beam is into a stop string
    broken: Bool[Array, "batch"]


def stochastic_beam_search(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    num_beams: int,
    max_new_tokens: int | Int[Array, "batch"],
    key: Key[Array, "*#batch"],
    transform: Transform | Sequence[Transform] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
) -> StochasticBeams:
    """Draw `num_beams` distinct continuations of each prompt, as if one after the other without replacement.

    The distribution q is that of `generate`: tokens are sampled from the transformed logits, up to EOS, to the token
    that completes a stop string, or to `max_new_tokens`. The sequences are the K largest of log q(y) + Gumbel noise
    (Kool et al. 2019). The noise of a prefix is the maximum over its continuations, so it is drawn from the root down:
    with φ the log-probability of a continuation by one token and G its parent's perturbed value,

        G̃ = φ + Gumbel noise,  Z = max G̃ over the siblings,  v = G − G̃ + log(1 − exp(G̃ − Z))
        perturbed = G − max(0, v) − log(1 + exp(−|v|))                    (Kool et al. 2019, appendix B)

    which makes the siblings' maximum G. The first sequence is a sample of q. One more beam is run, for the threshold κ,
    which `inclusion_probability` takes.

    Args:
        num_beams: K.
        transform: shapes q.

    The other arguments are those of `generate`.

    Raises:
        ValueError: for what `generate` refuses, and for fewer than one beam.
        FloatingPointError: if the logits are NaN or no token is possible. (Under an outer `jit`, log_prob is NaN.)
    """
    core.check_size("num_beams", num_beams, 1)
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, key=key, eos_id=eos_id,
        pad_id=pad_id, stop=stop, align=True,
    )  # fmt: skip
    beams = draw(lm, params, request, num_beams=num_beams)
    core.check_log_prob(beams.log_prob)
    length = core.longest(max_new_tokens)
    return dataclasses.replace(
        beams, **{name: getattr(beams, name)[..., :length] for name in ("tokens", "mask", "logp")}
    )


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


@functools.partial(jax.jit, static_argnames=("lm", "num_beams"))
def draw(lm: LanguageModel, params: Params, request: Request, *, num_beams: int) -> StochasticBeams:
    """The compiled part of `stochastic_beam_search`."""
    prompt = core.prefill(lm, params, request, num_slots=request.prompts.shape[1] + request.num_steps)
    logits = lm.logits(params, prompt.last)
    every_beam = jnp.repeat(jnp.arange(request.limits.shape[0]), num_beams + 1)
    state = _start(request, prompt.cache, every_beam, num_beams + 1, wide(logits).dtype)
    request = dataclasses.replace(request, transform=request.transform.take(every_beam))

    def step(state: State) -> tuple[State, None]:
        cache = state.cache.take(state.parents, groups=state.open.shape[0])
        hidden, cache = lm.hidden(params, state.token[:, None], cache, mask=state.open.reshape(-1, 1))
        state = dataclasses.replace(state, cache=cache)
        return _choose(request, state, lm.logits(params, hidden[:, 0])), None

    state = _choose(request, state, logits[every_beam])
    state, _ = core.run_blocks(step, state, lambda state: state.open.any(), num_steps=request.num_steps)
    kept = slice(None, num_beams)
    exists = (state.perturbed[:, kept] > -jnp.inf)[..., None]
    mask = (jnp.arange(request.num_steps + 1) < state.length[:, kept, None]) & exists
    log_prob, perturbed = (
        jnp.where(state.broken[:, None], jnp.nan, each) for each in (state.log_prob, state.perturbed)
    )
    tokens, logp = jnp.where(mask, state.tokens[:, kept], request.pad_id), jnp.where(mask, state.logp[:, kept], 0)
    found = StochasticBeams(tokens, mask, logp, log_prob[:, kept], perturbed[:, kept], perturbed[:, -1])
    return everywhere(found)


def _start(request: Request, cache: Cache, every_beam: Int[Array, "row"], width: int, dtype: jnp.dtype) -> State:
    """The root of each row, whose perturbed value is a Gumbel's."""
    rows = every_beam.shape[0]
    shape = (request.limits.shape[0], width)
    none = jnp.full(shape, -jnp.inf, dtype)
    root = core.gumbel(jax.vmap(lambda key: jax.random.fold_in(key, 0))(request.keys), (), dtype)
    return State(
        cache=cache.take(every_beam, groups=shape[0]),
        parents=jnp.arange(rows),
        token=jnp.zeros(rows, jnp.int32),
        open=jnp.broadcast_to(jnp.arange(width) == 0, shape),
        logp=jnp.zeros((*shape, request.num_steps + 1), dtype),
        log_prob=none.at[:, 0].set(0),
        perturbed=none.at[:, 0].set(root),
        tokens=jnp.zeros((*shape, request.num_steps + 1), jnp.int32),
        length=jnp.zeros(shape, jnp.int32),
        time=jnp.zeros((), jnp.int32),
        transform=jax.tree.map(lambda leaf: leaf[every_beam], request.initial_state()),
        stop=None if request.stop is None else request.stop.start(rows),
        broken=jnp.zeros(shape[0], bool),
    )


def _choose(request: Request, state: State, logits: Float[Array, "row vocab"]) -> State:
    """Keep the largest perturbed values among the open beams' continuations and the beams that have ended."""
    (batch, width), vocab = state.open.shape, logits.shape[-1]
    logits = wide(logits)
    # NaN logits must stay visible: a transform may hide them by removing them.
    sound = jnp.isfinite(jax.nn.logsumexp(logits, axis=-1)).reshape(batch, width)
    warped = request.transform.apply(state.transform, logits).reshape(batch, width, vocab)
    normaliser = jax.nn.logsumexp(warped, axis=-1)
    broken = state.broken | (state.open & ~(sound & jnp.isfinite(normaliser))).any(axis=1)
    tokens, log_prob, perturbed = _continue(request, state, warped, normaliser)
    ended = ~state.open[..., None]  # an ended beam is a candidate as its own continuation
    first = ended & (jnp.arange(tokens.shape[2]) == 0)
    perturbed = jnp.where(ended, jnp.where(first, state.perturbed[..., None], -jnp.inf), perturbed)
    log_prob = jnp.where(ended, state.log_prob[..., None], log_prob)
    flat = (batch, width * tokens.shape[2])
    perturbed, order = largest(perturbed.reshape(flat), width)
    parent = order // tokens.shape[2]
    token, log_prob = (jnp.take_along_axis(each.reshape(flat), order, axis=1) for each in (tokens, log_prob))
    return _kept(request, state, logits, parent, token, log_prob, perturbed, broken)


def _continue(
    request: Request, state: State, logits: Float[Array, "batch beam vocab"], normaliser: Float[Array, "batch beam"]
) -> tuple[Array, Array, Array]:
    """The continuations of each beam with the largest perturbed values: tokens, log-probabilities, perturbed values.

    Among siblings the perturbed value rises with G̃, so only the largest need be conditioned.
    """
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.time + 1))(request.keys)
    noise = core.gumbel(keys, logits.shape[1:], logits.dtype)
    values, tokens = largest(logits + noise, min(logits.shape[1], logits.shape[2]))
    above = (state.log_prob - normaliser)[..., None]
    log_prob = above + jnp.take_along_axis(logits, tokens, axis=-1)
    parent, top = state.perturbed[..., None], values[..., :1]
    possible = (values > -jnp.inf) & state.open[..., None]
    gap = jnp.where(possible, values - top, 0)  # G̃ − Z, where the shift by `above` cancels
    rest = parent - jnp.where(possible, values + above, 0) + jnp.log(-jnp.expm1(gap))
    perturbed = parent - jnp.maximum(0, rest) - jnp.log1p(jnp.exp(-jnp.abs(rest)))
    return tokens, jnp.where(possible, log_prob, -jnp.inf), jnp.where(possible, perturbed, -jnp.inf)


def _kept(
    request: Request,
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
    tokens, logp = (jnp.take_along_axis(each, parent[..., None], axis=1) for each in (state.tokens, state.logp))
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None], state.time, axis=2)
    ends = request.ends(token) | (time >= request.limits)[:, None]
    parents = (jnp.arange(batch)[:, None] * width + parent).reshape(-1)
    after, stop, logits = jax.tree.map(lambda leaf: leaf[parents], (state.transform, state.stop, logits))
    if stop is not None:
        searched = jnp.broadcast_to(request.transform.may_end(after), stop.shape)
        stop = jnp.where(searched, request.stop.advance(stop, token.reshape(-1)), stop)
        ends |= request.stop.reached(stop).reshape(ends.shape)
    after = update_alive(request.transform, after, token.reshape(-1), logits, grown.reshape(-1))
    new = jnp.where(grown, token_log_probs(logits, token.reshape(-1)).reshape(batch, width), 0)
    logp = jax.lax.dynamic_update_slice_in_dim(logp, new[..., None], state.time, axis=2)
    log_prob = jnp.where(exists, log_prob, -jnp.inf)
    return State(
        state.cache,
        parents,
        token.reshape(-1),
        grown & ~ends,
        logp,
        log_prob,
        perturbed,
        tokens,
        length,
        time,
        after,
        stop,
        broken,
    )
