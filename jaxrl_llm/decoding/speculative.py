"""Speculative decoding: cheap drafts, judged together by the target in one call, and the target's law kept exactly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.decoding import acceptance, checks, drafting, loop, rewinding, sampling
from jaxrl_llm.decoding.drafting import Drafts, LookUp, ModelDrafter, Trail
from jaxrl_llm.decoding.generate import STEP_BUCKET
from jaxrl_llm.decoding.loop import Generation, Rules
from jaxrl_llm.decoding.transforms import Transform
from jaxrl_llm.decoding.transforms.base import Context
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import is_concrete, wide
from jaxrl_llm.objectives.logprobs import token_log_probs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation:
    """What was generated, and how well the drafts did, for each row.

    In a round a row has up to `num_draft` drafts; they are judged one after the other up to the first rejected one.
    Drafts for which a row has no room, or after its end, count nowhere. The first token needs no round.
    """

    generation: Generation
    accepted: Int[Array, "batch"]  # drafts that became tokens
    judged: Int[Array, "batch"]  # drafts that were accepted or rejected
    drafted: Int[Array, "batch"]  # drafts made, among them those behind a rejected one
    rounds: Int[Array, "batch"]  # calls of the target

    @property
    def acceptance_rate(self) -> Float[Array, ""]:
        """Accepted among judged drafts of all rows: α of Leviathan et al. (2023); NaN if none was judged.

        If every draft were accepted with this probability, a round of γ drafts would bring (1 − α^(γ+1)) / (1 − α)
        tokens (their eq. 1).
        """
        return self.accepted.sum() / self.judged.sum()


def speculative_generate(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    *,
    draft_lm: LanguageModel | None = None,
    draft_params: Params | None = None,
    lookup_ngram: int | None = None,
    num_draft: int = 4,
    max_new_tokens: int | Int[Array, "batch"],
    transform: Transform | None = None,
    draft_transform: Transform | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
) -> Speculation:
    """Continue each prompt as `generate` does, with fewer calls of the model (Leviathan et al. 2023; Chen et al. 2023).

    In a round, `num_draft` tokens are proposed; the target scores all of them in one call, accepts some, and draws one
    more. The tokens follow the target's law after `transform`, whatever the drafts are; greedy ones are those of
    `generate`. (They are not its very draws for the same key.)

    Args:
        draft_lm: a cheaper model of the same vocabulary, with `draft_params`; or else
        lookup_ngram: drafts are what followed the last tokens, up to so many, when they stood in the row before.
        num_draft: drafts of a round. It and `lookup_ngram` are compiled in; memory is kept for rounds that accept none.
        transform: warps the target's logits, `draft_transform` the draft model's; it may be any other.

    The other arguments, and what makes programs compile, are those of `generate`.

    Raises:
        ValueError: for neither or both kinds of drafts, vocabularies that differ, `num_draft` or `lookup_ngram` below
            1, and for what `generate` refuses.
        FloatingPointError: if the target's or the draft model's logits are NaN, or no token is possible. (Under an
            outer `jit` a broken draft is none.)
    """
    prompts = jnp.asarray(prompts)
    _check_drafting(lm, draft_lm, draft_params, lookup_ngram, num_draft, draft_transform)
    limits = checks.row_limits(max_new_tokens, prompts.shape[0] if prompts.ndim else 1, transform)
    longest = int(np.max(max_new_tokens, initial=1))
    prompts, mask = checks.bucketed_prompts(lm, prompts, prompt_mask, max_new_tokens=limits)
    if draft_lm is not None:
        checks.check_room(draft_lm, mask, limits)
    rules = Rules(
        transform=transform,
        keys=None if greedy else checks.row_keys(key, prompts.shape[0]),
        eos_ids=checks.eos_array(eos_id),
        pad_id=jnp.asarray(pad_id, jnp.int32),
        limits=jnp.asarray(limits),
    )
    drafter = Drafter(draft_lm, lookup_ngram, num_draft)
    num_rounds = max(1, -(-(longest - 1) // STEP_BUCKET)) * STEP_BUCKET
    speculation, broken = decode(
        lm, params, prompts, mask, rules, draft_params, draft_transform, drafter=drafter, num_rounds=num_rounds
    )
    if is_concrete(broken) and broken.any():
        row = int(np.argmax(broken))
        raise FloatingPointError(f"the draft model's logits are NaN, +inf, or all −inf in row {row}.")
    generation = jax.tree.map(lambda leaf: leaf[:, :longest], speculation.generation)
    return dataclasses.replace(speculation, generation=checks.check_finite(generation))


class Drafter(NamedTuple):
    """What drafts are made by; compiled in."""

    lm: LanguageModel | None
    ngram: int | None
    num_draft: int


def _check_drafting(lm, draft_lm, draft_params, lookup_ngram, num_draft, draft_transform) -> None:
    if (draft_lm is None) == (lookup_ngram is None) or (draft_lm is None) != (draft_params is None):
        raise ValueError("drafts need either draft_lm with draft_params, or lookup_ngram.")
    for name, number in [("num_draft", num_draft), ("lookup_ngram", lookup_ngram)]:
        if number is not None and (not isinstance(number, int | np.integer) or number < 1):
            raise ValueError(f"{name} must be an integer of at least 1, but is {number!r}.")
    if draft_lm is None and draft_transform is not None:
        raise ValueError("draft_transform needs a draft model: looked-up drafts are not drawn from logits.")
    if draft_lm is not None and draft_lm.vocab_size != lm.vocab_size:
        raise ValueError(
            f"the draft model must share the target's vocabulary of {lm.vocab_size} tokens, "
            f"but has {draft_lm.vocab_size}."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two rounds: the last token of each row is emitted, and not yet fed to the models."""

    cache: Cache
    context: Context
    drafts: ModelDrafter | LookUp
    token: Int[Array, "batch"]
    done: Bool[Array, "batch"]
    count: Int[Array, "batch"]  # tokens emitted so far
    result: Speculation
    broken: Bool[Array, "batch"]
    round: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("lm", "drafter", "num_rounds"))
def decode(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    rules: Rules,
    draft_params: Params | None,
    draft_transform: Transform | None,
    *,
    drafter: Drafter,
    num_rounds: int,
) -> tuple[Speculation, Bool[Array, "batch"]]:
    """The compiled whole: prefill, then rounds until all rows have ended; and in which rows the drafts broke down."""
    num_slots = prompts.shape[1] + num_rounds * (drafter.num_draft + 1)
    first, emitted = loop.prefill(lm, params, prompts, prompt_mask, rules, num_slots=num_slots)
    if drafter.lm is None:
        history = drafting.start_look_up(prompts, prompt_mask, num_slots=prompts.shape[1] + num_rounds + 1)
        drafts = drafting.append(history, first.token[:, None], first.fed[:, None])
    else:
        drafts = drafting.start_model(
            drafter.lm, draft_params, prompts, prompt_mask, draft_transform, rules.limits, num_slots=num_slots
        )

    def widen(leaf: Array, fill: Array | int = 0) -> Array:
        return jnp.concatenate([leaf[:, None], jnp.full((leaf.shape[0], num_rounds), fill, leaf.dtype)], axis=1)

    generation = dataclasses.replace(jax.tree.map(widen, emitted), tokens=widen(emitted.tokens, rules.pad_id))
    zeros = jnp.zeros(prompts.shape[0], jnp.int32)
    state = State(
        cache=first.cache,
        context=first.context,
        drafts=drafts,
        token=first.token,
        done=first.done,
        count=zeros + 1,
        result=Speculation(generation, accepted=zeros, judged=zeros, drafted=zeros, rounds=zeros),
        broken=zeros > 0,
        round=jnp.zeros((), jnp.int32),
    )
    task = Task(lm, params, rules, drafter, draft_params, draft_transform)
    state = jax.lax.while_loop(lambda state: ~state.done.all(), functools.partial(_round, task), state)
    return state.result, state.broken


class Task(NamedTuple):
    """What stays the same from round to round."""

    lm: LanguageModel
    params: Params
    rules: Rules
    drafter: Drafter
    draft_params: Params | None
    draft_transform: Transform | None


def _round(task: Task, state: State) -> State:
    """Draft, judge, emit, and forget what was rejected."""
    lm, params, rules = task.lm, task.params, task.rules
    alive, room, places = ~state.done, rules.limits - state.count, jnp.arange(task.drafter.num_draft + 1)
    keys = None
    if rules.keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.round + 1))(rules.keys)  # 0: the first token's
    drafts, trail = _draft(task, state, keys, alive, room)

    read = jnp.concatenate([state.token[:, None], drafts.tokens], axis=1)
    counts = jnp.concatenate([alive[:, None], drafts.exists], axis=1) & (places < room[:, None])
    hidden, cache = lm.hidden(params, read, state.cache, mask=counts)
    logits = wide(lm.logits(params, hidden))
    warped, here, memories = rewinding.warp_all(rules.transform, logits, drafts.tokens, counts[:, 1:], state.context)
    accepted, token = _judge(keys, drafts, warped)
    tokens, mask, ended = _emitted(rules, drafts, accepted, token, alive, room)

    count = mask.sum(axis=1, dtype=jnp.int32)
    seen = places[:-1] < jnp.minimum(accepted + 1, count)[:, None]  # the drafts that decided anything
    kept = counts & (places <= accepted[:, None])
    return State(
        cache=rewinding.rewind(lm, params, state.cache, cache, read, kept),
        context=rewinding.settle_context(
            rules.transform, state.context, here, memories, logits, accepted, token, alive
        ),
        drafts=_settle(task, state, trail, drafts, accepted, tokens, mask),
        token=jnp.where(alive, token, rules.pad_id),
        done=state.done | ended,
        count=state.count + count,
        result=Speculation(
            generation=_write(rules, state, tokens, mask, logits, warped),
            accepted=state.result.accepted + jnp.minimum(accepted, count),
            judged=state.result.judged + (drafts.exists & seen).sum(axis=1, dtype=jnp.int32),
            drafted=state.result.drafted + drafts.exists.sum(axis=1, dtype=jnp.int32),
            rounds=state.result.rounds + alive,
        ),
        broken=state.broken | (drafts.broken & seen).any(axis=1),
        round=state.round + 1,
    )


def _draft(
    task: Task, state: State, keys: Key[Array, "batch"] | None, alive: Bool[Array, "batch"], room: Int[Array, "batch"]
) -> tuple[Drafts, Trail | None]:
    """The drafts of a round, and what is needed to take them back."""
    lm, ngram, num_draft = task.drafter
    if lm is None:
        return drafting.look_up(state.drafts, alive, room, ngram=ngram, num_draft=num_draft), None
    rest = (task.draft_params, state.drafts, task.draft_transform, keys, state.token, alive, room)
    return drafting.draft(lm, *rest, num_draft=num_draft)


def _settle(
    task: Task,
    state: State,
    trail: Trail | None,
    drafts: Drafts,
    accepted: Int[Array, "batch"],
    tokens: Int[Array, "batch draft+1"],
    mask: Bool[Array, "batch draft+1"],
) -> ModelDrafter | LookUp:
    """What drafts after the round."""
    if trail is None:
        return drafting.append(state.drafts, tokens, mask)
    return drafting.settle(task.drafter.lm, task.draft_params, state.drafts, trail, drafts, accepted)


def _judge(
    keys: Key[Array, "batch"] | None, drafts: Drafts, warped: Float[Array, "batch draft+1 vocab"]
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """How many drafts of each row the target accepts, and the token after them."""
    if keys is None:
        return acceptance.verify_greedy(drafts.tokens, drafts.exists, sampling.greedy(warped))
    p = jax.nn.softmax(warped, axis=-1)
    q = jax.nn.one_hot(drafts.tokens, p.shape[-1], dtype=p.dtype) if drafts.law is None else drafts.law
    keys = jax.vmap(lambda key: jax.random.fold_in(key, drafts.tokens.shape[1]))(keys)  # those before drew the drafts
    return acceptance.verify(keys, drafts.tokens, p, jnp.where(drafts.exists[..., None], q, 0))


def _emitted(
    rules: Rules,
    drafts: Drafts,
    accepted: Int[Array, "batch"],
    token: Int[Array, "batch"],
    alive: Bool[Array, "batch"],
    room: Int[Array, "batch"],
) -> tuple[Int[Array, "batch draft+1"], Bool[Array, "batch draft+1"], Bool[Array, "batch"]]:
    """The tokens of the round, which of them are emitted, EOS the last of them, and which rows end with it."""
    place = jnp.arange(drafts.tokens.shape[1] + 1)
    tokens = jnp.where(place < accepted[:, None], jnp.pad(drafts.tokens, ((0, 0), (0, 1))), token[:, None])
    ends = (tokens[..., None] == rules.eos_ids).any(axis=-1)
    after_end = jnp.cumsum(ends, axis=1) - ends > 0
    mask = alive[:, None] & (place <= accepted[:, None]) & (place < room[:, None]) & ~after_end
    return tokens, mask, (mask & ends).any(axis=1) | (mask.sum(axis=1) >= room)


def _write(
    rules: Rules,
    state: State,
    tokens: Int[Array, "batch draft+1"],
    mask: Bool[Array, "batch draft+1"],
    logits: Float[Array, "batch draft+1 vocab"],
    warped: Float[Array, "batch draft+1 vocab"],
) -> Generation:
    """The generation with the tokens of a round, each row's at its own place."""
    logp = token_log_probs(logits, tokens)
    logp_sampler = sampling.greedy_log_prob(warped) if rules.keys is None else token_log_probs(warped, tokens)
    generation = state.result.generation
    rows, slots = jnp.arange(tokens.shape[0])[:, None], state.count[:, None] + jnp.arange(tokens.shape[1])
    slots = jnp.where(mask, slots, generation.tokens.shape[1])  # what is not emitted is dropped
    piece = Generation(tokens, mask, logp, logp_sampler)
    return jax.tree.map(lambda old, new: old.at[rows, slots].set(new, mode="drop"), generation, piece)
