"""Beam search, diverse and sampled: a scan over steps, all beams of all rows in one batched call."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.core import Request
from jaxrl_llm.decoding.transforms import Transform, update_alive
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.numerics import largest, wide

NgramScope = Literal["sequence", "beam"]
Diversity = Literal["token", "hamming", "hamming-factor"]


@core.result
class Beams:
    """The hypotheses of each row, best first. EOS counts as a token: it is in the mask and in the length.

    Where there are fewer than K, the mask of the others is false, and log_prob and score are −inf.
    """

    tokens: Int[Array, "batch beam time"]  # `pad_id` where the mask is false
    mask: Bool[Array, "batch beam time"]
    logp: Float[Array, "batch beam time"]  # of each token under the model itself, at temperature 1, in nats; or 0
    log_prob: Float[Array, "batch beam"]  # Σ log p over the generated tokens, in nats; p: see `transform`
    score: Float[Array, "batch beam"]  # log_prob / length**length_penalty, over the generated tokens


class Penalties(NamedTuple):
    """Numbers of each row that steer the search; another value does not recompile."""

    length: Float[Array, "batch"]
    diversity: Float[Array, "batch"]


class Rules(NamedTuple):
    """The settings of the search that are compiled in."""

    num_groups: int
    no_repeat_ngram: int
    no_repeat_in: NgramScope
    diversity_by: Diversity


class Finished(NamedTuple):
    """The best hypotheses so far, best first; score −inf where there is none."""

    tokens: Int[Array, "batch group beam time"]
    logp: Float[Array, "batch group beam time"]
    length: Int[Array, "batch group beam"]
    log_prob: Float[Array, "batch group beam"]
    score: Float[Array, "batch group beam"]


class Options(NamedTuple):
    """The continuations of all beams by all tokens."""

    logits: Float[Array, "batch *group beam vocab"]  # −inf where a token is removed
    normaliser: Float[Array, "batch *group beam"]
    log_prob: Float[Array, "batch *group beam"]  # of the beams
    tokens: Int[Array, "batch *group beam time"]  # of the beams
    stops: Bool[Array, "batch *group beam vocab"] | None  # true where the token completes a stop string
    noise: Float[Array, "batch *group beam vocab"] | None  # added to the ranks

    def totals(self, logits: Float[Array, "batch *group beam some"]) -> Float[Array, "batch *group beam some"]:
        """The log-probabilities of continuations by tokens of these logits; −inf for those of dead beams."""
        alive, more = (self.log_prob > -jnp.inf)[..., None], logits - self.normaliser[..., None]
        return jnp.where(alive, self.log_prob[..., None] + more, -jnp.inf)

    def ends(self, request: Request) -> Bool[Array, "batch *group beam vocab"]:
        """True at tokens that end a hypothesis."""
        eos = request.ends(jnp.arange(self.logits.shape[-1]))
        return jnp.broadcast_to(eos if self.stops is None else eos | self.stops, self.logits.shape)


class Choice(NamedTuple):
    """The continuations that a step chose: the beam of the group, the token, and the log-probability."""

    beam: Int[Array, "batch *group beam"]
    token: Int[Array, "batch *group beam"]
    log_prob: Float[Array, "batch *group beam"]


@core.result
class Live:
    """The state between two steps: the last token of each beam is chosen, and not yet fed to the model.

    A beam that is dead (never started, blocked, or unable to win) has log_prob −inf. Rows of the model are beams in the
    order of [batch, group, beam].
    """

    cache: Cache
    parents: Int[Array, "row"]  # the row of the cache that each beam continues
    token: Int[Array, "row"]
    log_prob: Float[Array, "batch group beam"]
    tokens: Int[Array, "batch group beam time"]
    logp: Float[Array, "batch group beam time"]
    time: Int[Array, ""]  # tokens chosen so far
    transform: PyTree[Array]  # the state of the transform
    stop: Int[Array, "row"] | None  # how far each beam is into a stop string
    finished: Finished
    broken: Bool[Array, "batch"]  # whether the model's logits were NaN, or left no token

    @property
    def alive(self) -> Bool[Array, "row"]:
        """True for beams that go on."""
        return (self.log_prob > -jnp.inf).reshape(-1)


def beam_search(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    num_beams: int,
    max_new_tokens: int | Int[Array, "batch"],
    length_penalty: float | Float[Array, "*#batch"] = 0.0,
    num_groups: int = 1,
    diversity_penalty: float | Float[Array, "*#batch"] = 0.0,
    diversity_by: Diversity = "token",
    no_repeat_ngram: int = 0,
    no_repeat_in: NgramScope = "sequence",
    transform: Transform | Sequence[Transform] | None = None,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
) -> Beams:
    """Find the `num_beams` best continuations of each prompt, by a beam of that width.

        score(y) = log p(y | prompt) / |y|**length_penalty          (|y|: generated tokens, EOS counted)

    In each step the continuations of a row's K live beams are ranked by log-probability. A continuation that ends
    becomes a hypothesis if it is among the best K. The best K that do not end stay live; at `max_new_tokens` they
    become hypotheses too. The K hypotheses of the highest score are kept. A row stops when it has K and no live beam
    can beat them at any length: log-probabilities are ≤ 0, so a beam of log-probability L and t tokens scores at most
    `L / max_new_tokens**α` for α > 0, and `L / (t + 1)**α` for α ≤ 0.

    With groups it is diverse beam search (Vijayakumar et al. 2018). Each group has K / G beams and its own hypotheses,
    and the groups choose in turn. If live beams of earlier groups were continued by a token c times in this step, it
    ranks as if its log-probability were lower by `diversity_penalty` · c; `log_prob` and `score` do not include that.
    The hypotheses of all groups are merged at the end.

    Without groups, `diversity_by` compares whole sequences. The beams of a step are then chosen one after the other.
    With λ the diversity penalty, a continuation y of t new tokens and log-probability L ranks by

        "hamming"           L − λ a,  a = Σ_z (t − d(y, z))
        "hamming-factor"    L (1 + λ a / t)

    where z are the live beams that were chosen before it in this step and d is the Hamming distance, so that a counts
    the tokens in which they agree.

    With a key it is beam sampling. The continuations of a step are then drawn, one after the other without replacement,
    with probabilities in proportion to e^L (the Gumbel-top-k trick). Those that end among the first K drawn become
    hypotheses, and the first K that do not end stay live. A row stops when it has K hypotheses. One beam is a sample of
    `generate`'s distribution. This is not sampling sequences without replacement (`stochastic_beam_search`): every step
    draws anew.

    One compiled program serves all penalties, prompts and numbers of tokens of a bucket (see `generate`).

    Args:
        num_beams: K, the number of live beams and of hypotheses of a row.
        length_penalty: α, one number or one for each row; above 0 it favours long hypotheses.
        num_groups: G, a divisor of `num_beams`.
        diversity_penalty: λ, one number or one for each row.
        diversity_by: what is compared, as above: the token of the step, of groups; or whole sequences, without groups.
        no_repeat_ngram: n > 0 removes tokens that complete an n-gram which the prompt and the beam already contain. A
            beam without a possible token dies.
        no_repeat_in: "beam" also removes those that complete an n-gram of any other live beam of the row.
        transform: applied after `no_repeat_ngram`. One that only removes tokens leaves the others their `log_prob`,
            the model's. If one re-weighs them (`Transform.reweighs`: temperatures, penalties, biases), or if beams are
            sampled, p is the distribution after all transforms, and `log_prob` and `score` are of it. The tokens that
            `no_repeat_ngram` removes keep their share of p.
        key: one key or one for each row, as in `generate`; then beams are sampled, without groups.
        stop: strings that end a hypothesis, as in `generate`.

    The other arguments are those of `generate`.

    Raises:
        ValueError: for what `generate` refuses, sizes below 1, groups that do not divide the beams, penalties that are
            not finite (a diversity penalty: or negative), unknown rules, or rules that have no effect.
        FloatingPointError: if the model's logits are NaN or leave no token. (Under an outer `jit`, log_prob is NaN.)
            If the transform or the blocking leave a row no token, it has no hypothesis: all its masks are false.
    """
    core.check_size("num_beams", num_beams, 1)
    core.check_size("num_groups", num_groups, 1)
    core.check_size("no_repeat_ngram", no_repeat_ngram, 0)
    if num_beams % num_groups:
        raise ValueError(f"num_beams must be a multiple of num_groups, but they are {num_beams} and {num_groups}.")
    if key is not None and num_groups > 1:
        raise ValueError(f"num_groups must be 1 for beams that are sampled, but is {num_groups}.")
    alone = num_groups == 1 and key is None
    _check_rule("diversity_by", diversity_by, Diversity, needs="num_groups=1 and no key", given=alone)
    _check_rule("no_repeat_in", no_repeat_in, NgramScope, needs="no_repeat_ngram", given=no_repeat_ngram > 0)
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, greedy=key is None, key=key,
        eos_id=eos_id, pad_id=pad_id, stop=stop, align=True,
    )  # fmt: skip
    rows = request.limits.shape[0]
    penalties = Penalties(
        core.length_exponent(length_penalty, max_new_tokens, rows=rows),
        core.finite_number("diversity_penalty", diversity_penalty, low=0.0, rows=rows),
    )
    rules = Rules(num_groups, no_repeat_ngram, no_repeat_in, diversity_by)
    beams = search(lm, params, request, penalties, num_beams=num_beams, rules=rules)
    core.check_log_prob(beams.log_prob)
    length = core.longest(max_new_tokens)
    shortened = {name: getattr(beams, name)[..., :length] for name in ("tokens", "mask", "logp")}
    return dataclasses.replace(beams, **shortened)


def _check_rule(name: str, rule: str, known: type, *, needs: str, given: bool) -> None:
    """Raise ValueError for an unknown rule, or one that has no effect."""
    names = get_args(known)
    if rule not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, but is {rule!r}.")
    if rule != names[0] and not given:
        raise ValueError(f"{name}={rule!r} needs {needs}.")


@functools.partial(jax.jit, static_argnames=("lm", "num_beams", "rules"))
def search(
    lm: LanguageModel, params: Params, request: Request, penalties: Penalties, *, num_beams: int, rules: Rules
) -> Beams:
    """The compiled part of `beam_search`."""
    batch = request.limits.shape[0]
    every_beam = jnp.repeat(jnp.arange(batch), num_beams)
    prompt = core.prefill(lm, params, request, num_slots=request.prompts.shape[1] + request.num_steps)
    logits = lm.logits(params, prompt.last)
    shape = (batch, rules.num_groups, num_beams // rules.num_groups)
    start = _start(request, prompt.cache, every_beam, shape, wide(logits).dtype)
    request = dataclasses.replace(request, transform=request.transform.take(every_beam))

    def step(state: Live) -> tuple[Live, None]:
        cache = state.cache.take(state.parents, groups=batch)
        hidden, cache = lm.hidden(params, state.token[:, None], cache, mask=state.alive[:, None])
        state = dataclasses.replace(state, cache=cache)
        return _choose(request, penalties, rules, state, lm.logits(params, hidden[:, 0])), None

    first = _choose(request, penalties, rules, start, logits[every_beam])
    state, _ = core.run_blocks(step, first, lambda state: state.alive.any(), num_steps=request.num_steps)
    return everywhere(_merged(request, state))


def _start(
    request: Request, cache: Cache, every_beam: Int[Array, "row"], shape: tuple[int, ...], dtype: jnp.dtype
) -> Live:
    """One live beam in each group, of no tokens."""
    rows = every_beam.shape[0]
    nothing = jnp.zeros((*shape, request.num_steps + 1), jnp.int32)
    none = jnp.full(shape, -jnp.inf, dtype)
    return Live(
        cache=cache.take(every_beam, groups=shape[0]),
        parents=jnp.arange(rows),
        token=jnp.zeros(rows, jnp.int32),
        log_prob=none.at[..., 0].set(0),
        tokens=nothing,
        logp=nothing.astype(dtype),
        time=jnp.zeros((), jnp.int32),
        transform=jax.tree.map(lambda leaf: leaf[every_beam], request.initial_state()),
        stop=None if request.stop is None else request.stop.start(rows),
        finished=Finished(nothing, nothing.astype(dtype), jnp.zeros(shape, jnp.int32), none, none),
        broken=jnp.zeros(shape[0], bool),
    )


def _choose(
    request: Request, penalties: Penalties, rules: Rules, state: Live, logits: Float[Array, "row vocab"]
) -> Live:
    """Continue each beam by a token, and collect the hypotheses that are finished."""
    shape, logits = state.log_prob.shape, wide(logits)
    of_model = normaliser = jax.nn.logsumexp(logits, axis=-1)
    broken = (state.alive & ~jnp.isfinite(normaliser)).reshape(shape).any(axis=(1, 2))
    blocked = _blocked(request, rules, state, logits.shape[1]) if rules.no_repeat_ngram else None
    left = logits if blocked is None else jnp.where(blocked, -jnp.inf, logits)
    processed = request.transform.apply(state.transform, left)
    if request.transform.reweighs or request.keys is not None:
        whole = processed if blocked is None else request.transform.apply(state.transform, logits)
        left, normaliser = processed, jax.nn.logsumexp(whole, axis=-1)
        normaliser = jnp.where(normaliser > -jnp.inf, normaliser, 0)  # no token is left: the beam dies
    else:
        left = jnp.where(processed > -jnp.inf, left, -jnp.inf)
    searched = jnp.broadcast_to(request.transform.may_end(state.transform), state.token.shape)
    options = Options(
        logits=left.reshape(*shape, logits.shape[1]),
        normaliser=normaliser.reshape(shape),
        log_prob=state.log_prob,
        tokens=state.tokens,
        stops=_stops(request, state.stop, searched, (*shape, logits.shape[1])),
        noise=_noise(request, state.time, (*shape, logits.shape[1]), logits.dtype),
    )
    ended, live = _rank_groups(request, penalties, rules, options, state.time)
    first = jnp.arange(math.prod(shape[:2])).reshape(*shape[:2], 1) * shape[2]

    def continued(choice: Choice) -> tuple[Array, Array]:
        rows = first + choice.beam
        logp = logits[rows, choice.token] - of_model[rows]
        return _continued(state, state.tokens, choice, choice.token), _continued(state, state.logp, choice, logp)

    time, (tokens, logp) = state.time + 1, continued(live)
    finished = _finish(request, penalties, state, (ended, *continued(ended)), (live, tokens, logp))
    can_win = _can_win(request, penalties, finished, live.log_prob, time)
    log_prob = jnp.where(can_win[..., None], live.log_prob, -jnp.inf)
    parents, token = (first + live.beam).reshape(-1), live.token.reshape(-1)
    after, stop = jax.tree.map(lambda leaf: leaf[parents], (state.transform, state.stop))
    after = update_alive(request.transform, after, token, logits[parents], (log_prob > -jnp.inf).reshape(-1))
    if stop is not None:
        stop = jnp.where(searched[parents], request.stop.advance(stop, token), stop)
    broken |= state.broken
    return Live(state.cache, parents, token, log_prob, tokens, logp, time, after, stop, finished, broken)


def _stops(
    request: Request, state: Int[Array, "row"] | None, searched: Bool[Array, "row"], shape: tuple[int, ...]
) -> Bool[Array, "batch group beam vocab"] | None:
    """The tokens that complete a stop string."""
    if request.stop is None:
        return None
    after = jax.vmap(request.stop.advance, (None, 0), out_axes=1)(state, jnp.arange(shape[-1]))
    return (request.stop.reached(after) & searched[:, None]).reshape(shape)


def _noise(
    request: Request, time: Int[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "batch group beam vocab"] | None:
    """Gumbel noise, if continuations are drawn."""
    if request.keys is None:
        return None
    keys = jax.vmap(lambda key: jax.random.fold_in(key, time))(request.keys)
    return core.gumbel(keys, shape[1:], dtype)


def _rank_groups(
    request: Request, penalties: Penalties, rules: Rules, options: Options, time: Int[Array, ""]
) -> tuple[Choice, Choice]:
    """The continuations of each group that end, and those that do not; later groups see what earlier ones chose."""
    batch, groups, _, vocab = options.logits.shape
    factor = penalties.diversity.astype(options.logits.dtype)[:, None, None]
    if groups == 1:
        options = jax.tree.map(lambda leaf: leaf[:, 0], options)
        by_sequence = rules.diversity_by != "token"
        pair = _pick(request, factor, rules, options, time) if by_sequence else _rank(request, options, None)
        return jax.tree.map(lambda leaf: leaf[:, None], pair)

    def in_turn(counts: Array, options: Options) -> tuple[Array, tuple[Choice, Choice]]:
        ended, live = _rank(request, options, factor * counts[:, None])
        rows = jnp.arange(batch)[:, None]
        return counts.at[rows, live.token].add(live.log_prob > -jnp.inf), (ended, live)

    by_group = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), options)
    counts = jnp.zeros((batch, vocab), options.logits.dtype)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), jax.lax.scan(in_turn, counts, by_group)[1])


def _rank(
    request: Request, options: Options, penalty: Float[Array, "batch #beam vocab"] | None
) -> tuple[Choice, Choice]:
    """The continuations of K beams by rank: those of the best K that end, and the best K that do not.

    Without stop strings each beam can end in as many ways as there are EOS tokens, so the best K · (1 + EOS tokens)
    contain K that do not. Removed continuations and those of dead beams have −inf.
    """
    batch, width, vocab = options.logits.shape
    ranked, plain = options.logits, penalty is None and options.noise is None  # as logits do, within a beam
    if not plain:
        ranked = options.totals(options.logits)
        ranked = ranked if penalty is None else ranked - penalty
        ranked = ranked if options.noise is None else ranked + options.noise
    if options.stops is None:
        count = width * (1 + request.eos_ids.shape[0])
        values, tokens = largest(ranked, min(count, vocab))
    else:
        ends = options.ends(request)
        halves = [largest(jnp.where(each, ranked, -jnp.inf), min(width, vocab)) for each in (ends, ~ends)]
        values, tokens = (jnp.concatenate(pair, axis=-1) for pair in zip(*halves, strict=True))
        count = width * tokens.shape[2]
    each, flat = tokens.shape[2], (batch, width * tokens.shape[2])
    ranks = (options.totals(values) if plain else values).reshape(flat)
    ranks, order = largest(ranks, min(count, ranks.shape[1]))
    beam, token = order // each, jnp.take_along_axis(tokens.reshape(flat), order, axis=1)
    totals = ranks
    if not plain:
        totals = options.totals(jnp.take_along_axis(options.logits, tokens, axis=-1)).reshape(flat)
        totals = jnp.where(ranks > -jnp.inf, jnp.take_along_axis(totals, order, axis=1), -jnp.inf)
    ends = request.ends(token) if options.stops is None else order % each < each // 2
    every = Choice(beam, token, totals)
    ended = Choice(*(leaf[:, :width] for leaf in every._replace(log_prob=jnp.where(ends, totals, -jnp.inf))))
    onwards = jax.lax.top_k(jnp.where(ends, -jnp.inf, ranks), width)[1]
    live = every._replace(log_prob=jnp.where(ends, -jnp.inf, totals))
    return ended, Choice(*(jnp.take_along_axis(leaf, onwards, axis=1) for leaf in live))


def _pick(
    request: Request, factor: Float[Array, "batch 1 1"], rules: Rules, options: Options, time: Int[Array, ""]
) -> tuple[Choice, Choice]:
    """As `_rank`, where continuations are chosen one after the other, and rank lower if they are like those before."""
    batch, width, vocab = options.logits.shape
    rows, vocabulary = jnp.arange(batch), jnp.arange(vocab)
    written = jnp.arange(options.tokens.shape[-1]) < time
    common = ((options.tokens[:, :, None] == options.tokens[:, None]) & written).sum(axis=-1)  # of two beams
    ends = options.ends(request)

    def pick(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], tuple[Choice, Array]]:
        left, agreements = carry
        by_factor = left * (1 + factor * agreements / (time + 1).astype(left.dtype))
        ranks = by_factor if rules.diversity_by == "hamming-factor" else left - factor * agreements
        ranks = jnp.where(ends & (number >= width), -jnp.inf, ranks).reshape(batch, width * vocab)
        best = core.greedy(ranks)
        beam, token = best // vocab, best % vocab
        log_prob = jnp.where(ranks[rows, best] > -jnp.inf, left[rows, beam, token], -jnp.inf)
        live = ~ends[rows, beam, token] & (log_prob > -jnp.inf)
        same = common[rows, beam][..., None] + (vocabulary == token[:, None])[:, None]
        agreements += jnp.where(live[:, None, None], same, 0)
        return (left.at[rows, beam, token].set(-jnp.inf), agreements), (Choice(beam, token, log_prob), live)

    start = options.totals(options.logits), jnp.zeros_like(options.logits)
    picked = jax.lax.scan(pick, start, jnp.arange(2 * width))[1]  # of the first half, up to `width` end
    every, live = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), picked)
    ended = every._replace(log_prob=jnp.where(live, -jnp.inf, every.log_prob))
    order = jnp.argsort(~live, axis=1, stable=True)[:, :width]
    onwards = every._replace(log_prob=jnp.where(live, every.log_prob, -jnp.inf))
    return Choice(*(leaf[:, :width] for leaf in ended)), Choice(
        *(jnp.take_along_axis(leaf, order, axis=1) for leaf in onwards)
    )


def _continued(
    state: Live, values: Shaped[Array, "batch group beam time"], choice: Choice, new: Shaped[Array, "batch group beam"]
) -> Shaped[Array, "batch group beam time"]:
    """The tokens of the chosen continuations, or their log-probabilities."""
    values = jnp.take_along_axis(values, choice.beam[..., None], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(values, new[..., None], state.time, axis=3)


def _finish(
    request: Request,
    penalties: Penalties,
    state: Live,
    ended: tuple[Choice, Array, Array],
    live: tuple[Choice, Array, Array],
) -> Finished:
    """The best of the hypotheses so far, of those that just ended, and at the last step of the live beams.

    Args:
        ended, live: with their tokens and the log-probabilities of these.
    """
    time = state.time + 1
    last = (time >= request.limits)[:, None, None]
    tokens, logp = (jnp.concatenate(pair, axis=2) for pair in zip(ended[1:], live[1:], strict=True))
    log_prob = jnp.concatenate([ended[0].log_prob, jnp.where(last, live[0].log_prob, -jnp.inf)], axis=-1)
    score = log_prob / _to_power(time, penalties.length[:, None, None], log_prob.dtype)
    new = Finished(tokens, logp, jnp.full(log_prob.shape, time), log_prob, score)
    pool = Finished(*(jnp.concatenate(pair, axis=2) for pair in zip(state.finished, new, strict=True)))
    return _best(pool, state.log_prob.shape[2])


def _best(pool: Finished, count: int) -> Finished:
    """The hypotheses of the highest scores, best first; the first of equal ones."""
    best = jax.lax.top_k(pool.score, count)[1]

    def take(leaf: Array) -> Array:
        index = best if leaf.ndim == best.ndim else best[..., None]
        return jnp.take_along_axis(leaf, index, axis=best.ndim - 1)

    return Finished(*map(take, pool))


def _can_win(
    request: Request,
    penalties: Penalties,
    finished: Finished,
    log_prob: Float[Array, "batch group beam"],
    time: Int[Array, ""],
) -> Bool[Array, "batch group"]:
    """True where a live beam of the group could still displace a hypothesis; of sampled ones, where one is missing."""
    limits, penalty, worst = request.limits[:, None], penalties.length[:, None], finished.score.min(axis=-1)
    if request.keys is not None:
        return (time < limits) & (worst == -jnp.inf)
    best_length = jnp.where(penalty > 0, limits, time + 1)
    return (time < limits) & (log_prob.max(axis=-1) / _to_power(best_length, penalty, log_prob.dtype) > worst)


def _to_power(length: Array, exponent: Array, dtype: jnp.dtype) -> Array:
    return length.astype(dtype) ** exponent.astype(dtype)


def _blocked(request: Request, rules: Rules, state: Live, vocab_size: int) -> Bool[Array, "row vocab"]:
    """The tokens that would complete an n-gram which the prompt and the beam, or another live one, already contain.

    Prompts are padded on the left, so an n-gram is n slots from the prompt's first one on.
    """
    n, prompts, batch = rules.no_repeat_ngram, request.prompts, request.prompts.shape[0]
    copies, written = math.prod(state.log_prob.shape[1:]), prompts.shape[1] + state.time
    new = state.tokens.reshape(batch, copies, state.tokens.shape[-1])
    text = jnp.concatenate([jnp.broadcast_to(prompts[:, None], (*new.shape[:2], prompts.shape[1])), new], axis=2)
    windows = max(text.shape[2] - n + 1, 0)
    place = jnp.arange(windows)
    found = (place >= (~request.mask).sum(axis=1)[:, None]) & (place + n - 1 < written)
    found = found[:, None, None]  # [batch, beam, where it was looked for, window]
    looked_at = text[:, :, None]
    if rules.no_repeat_in == "beam":
        looked_at = text[:, None]
        found &= state.alive.reshape(batch, 1, copies, 1)
    for offset in range(n - 1):
        last = jnp.take(text, written - (n - 1) + offset, axis=2, mode="clip")
        found &= looked_at[..., offset : offset + windows] == last[..., None, None]
    token = jnp.where(found, looked_at[..., n - 1 :][..., :windows], vocab_size)
    rows = batch * copies
    token = jnp.broadcast_to(token, (batch, copies, *token.shape[2:])).reshape(rows, token.shape[2] * windows)
    return jnp.zeros((rows, vocab_size), bool).at[jnp.arange(rows)[:, None], token].set(True, mode="drop")


def _merged(request: Request, state: Live) -> Beams:
    """All groups' hypotheses, best first."""
    batch, groups, width = state.log_prob.shape
    every = Finished(*(leaf.reshape(batch, groups * width, *leaf.shape[3:]) for leaf in state.finished))
    best = _best(every, groups * width)
    mask = (jnp.arange(best.tokens.shape[2]) < best.length[..., None]) & (best.score > -jnp.inf)[..., None]
    log_prob, score = (jnp.where(state.broken[:, None], jnp.nan, each) for each in (best.log_prob, best.score))
    return Beams(
        tokens=jnp.where(mask, best.tokens, request.pad_id),
        mask=mask,
        logp=jnp.where(mask, best.logp, 0),
        log_prob=log_prob,
        score=score,
    )
