"""What proposes tokens in speculative decoding: a smaller model, or the row's own history."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm import language_model
from jaxrl_llm.decoding import rewinding, sampling
from jaxrl_llm.decoding.transforms import base as context
from jaxrl_llm.decoding.transforms.base import Context, Transform
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """Tokens proposed after the last one of each row, and the law q that each was drawn from."""

    tokens: Int[Array, "batch draft"]
    law: Float[Array, "batch draft vocab"] | None  # None: point masses
    exists: Bool[Array, "batch draft"]  # a row may have fewer drafts: the first ones of it exist
    broken: Bool[Array, "batch draft"]  # where there was no law to draw from


# A model that drafts --------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """Between two rounds. The last token of each row has not been read, nor has the draft before it, if it was kept."""

    cache: Cache
    context: Context  # before the last token
    logits: Float[Array, "batch vocab"] | None  # those that the last token followed; for a transform with a memory
    skipped: Int[Array, "batch"]  # the last draft of the round before
    skipped_counts: Bool[Array, "batch"]  # whether it was accepted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trail:
    """What a round of drafting leaves, so that it can be rewound."""

    cache: Cache
    context: Context
    memories: PyTree[Array]  # [draft + 1, batch, ...]: before each draft, and after the last
    logits: Float[Array, "draft batch vocab"] | None
    read: Int[Array, "batch time"]  # the tokens that were read, and which of them count if all drafts are kept
    counts: Bool[Array, "batch time"]


def start_model(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    transform: Transform | None,
    limits: Int[Array, "batch"],
    *,
    num_slots: int,
) -> ModelDrafter:
    """Read the prompts."""
    batch = prompts.shape[0]
    cache = lm.init_cache(batch, num_slots, dtype=language_model.params_dtype(params))
    hidden, cache = lm.hidden(params, prompts, cache, mask=prompt_mask)
    begun = context.begin(transform, prompts, prompt_mask, limits, num_slots=num_slots)
    logits = None
    if jax.tree.leaves(begun.memory):
        last = jnp.where(prompt_mask, jnp.arange(prompts.shape[1]), 0).max(axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = wide(lm.logits(params, hidden))
    return ModelDrafter(cache, begun, logits, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))


def draft(
    lm: LanguageModel,
    params: Params,
    drafter: ModelDrafter,
    transform: Transform | None,
    keys: Key[Array, "batch"] | None,
    token: Int[Array, "batch"],
    alive: Bool[Array, "batch"],
    room: Int[Array, "batch"],
    *,
    num_draft: int,
) -> tuple[Drafts, Trail]:
    """`num_draft` tokens after `token`, one by one; greedy without keys.

    As many calls of the model: the first reads what it has not read yet, the last draft is not read. No row reads
    beyond its `room`, the number of tokens that it may still have.
    """
    read = jnp.stack([drafter.skipped, token], axis=1)
    counts = jnp.stack([drafter.skipped_counts & alive, alive], axis=1)
    hidden, cache = lm.hidden(params, read, drafter.cache, mask=counts)
    logits, followed = wide(lm.logits(params, hidden[:, 1])), drafter.logits
    if followed is not None:
        followed = jnp.where(counts[:, :1], wide(lm.logits(params, hidden[:, 0])), followed)
    here = context.remember(transform, drafter.context, followed, token, alive)

    def choose(logits: Array, here: Context, index: Array) -> tuple[Context, tuple]:
        token, law, broken = _choose(context.warp(transform, logits, here), keys, index)
        fed = alive & (index + 1 < room)
        trail = (here.memory, None if followed is None else logits)
        return context.remember(transform, here, logits, token, fed), (token, law, broken, fed, trail)

    def step(carry: tuple[Cache, Array, Context], index: Array) -> tuple[tuple, tuple]:
        cache, logits, here = carry
        here, chosen = choose(logits, here, index)
        hidden, cache = lm.hidden(params, chosen[0][:, None], cache, mask=chosen[3][:, None])
        return (cache, wide(lm.logits(params, hidden[:, 0])), here), chosen

    (cache, logits, here), chosen = jax.lax.scan(step, (cache, logits, here), jnp.arange(num_draft - 1))
    here, last = choose(logits, here, jnp.asarray(num_draft - 1))
    chosen = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), chosen, last)
    columns, (memories, logits) = chosen[:4], chosen[4]
    tokens, law, broken, fed = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), columns)
    memories = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), memories, here.memory)
    exists = alive[:, None] & (jnp.arange(num_draft) < room[:, None])
    exists &= jnp.cumsum(broken, axis=1) == 0
    read = jnp.concatenate([read, tokens[:, :-1]], axis=1)
    counts = jnp.concatenate([counts, fed[:, :-1]], axis=1)
    return Drafts(tokens, law, exists, broken), Trail(cache, here, memories, logits, read, counts)


def _choose(
    warped: Float[Array, "batch vocab"], keys: Key[Array, "batch"] | None, index: Int[Array, ""]
) -> tuple[Int[Array, "batch"], Float[Array, "batch vocab"] | None, Bool[Array, "batch"]]:
    """A token of each row, its law, and whether there was none."""
    broken = ~jnp.isfinite(warped.max(axis=-1))
    if keys is None:
        return sampling.greedy(warped), None, broken
    token = sampling.sample(jax.vmap(lambda key: jax.random.fold_in(key, index))(keys), warped)
    return token, jax.nn.softmax(warped, axis=-1), broken


def settle(
    lm: LanguageModel,
    params: Params,
    drafter: ModelDrafter,
    trail: Trail,
    drafts: Drafts,
    accepted: Int[Array, "batch"],
) -> ModelDrafter:
    """The drafter after a round of which the first `accepted` drafts of each row were kept."""
    num_draft = drafts.tokens.shape[1]
    order = jnp.arange(-1, num_draft)  # of what was read: the skipped draft, the last token, then the drafts
    kept = trail.counts & (order <= accepted[:, None])
    cache = rewinding.rewind(lm, params, drafter.cache, trail.cache, trail.read, kept)
    kept = jnp.arange(num_draft + 1) <= accepted[:, None]
    here = rewinding.rewind_context(drafter.context, trail.context, trail.memories, kept, accepted)
    logits = trail.logits
    if logits is not None:
        logits = logits[jnp.minimum(accepted, num_draft - 1), jnp.arange(accepted.shape[0])]
    return ModelDrafter(cache, here, logits, drafts.tokens[:, -1], accepted == num_draft)


# A row's own history that drafts --------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookUp:
    """The tokens of each row, prompt and new ones, from the left and without gaps."""

    tokens: Int[Array, "batch slot"]
    length: Int[Array, "batch"]


def start_look_up(
    prompts: Int[Array, "batch prompt"], prompt_mask: Bool[Array, "batch prompt"], *, num_slots: int
) -> LookUp:
    """The prompts, with room for `num_slots` tokens in all."""
    order = jnp.argsort(~prompt_mask, axis=1, stable=True)
    tokens = jnp.take_along_axis(prompts, order, axis=1)
    return LookUp(
        jnp.pad(tokens, ((0, 0), (0, num_slots - prompts.shape[1]))), prompt_mask.sum(axis=1, dtype=jnp.int32)
    )


def append(history: LookUp, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]) -> LookUp:
    """The history with the tokens of the mask, which stand at the left, appended."""
    rows, slots = jnp.arange(tokens.shape[0])[:, None], history.length[:, None] + jnp.arange(tokens.shape[1])
    slots = jnp.where(mask, slots, history.tokens.shape[1])
    written = history.tokens.at[rows, slots].set(tokens, mode="drop")
    return LookUp(written, history.length + mask.sum(axis=1, dtype=jnp.int32))


def look_up(
    history: LookUp, alive: Bool[Array, "batch"], room: Int[Array, "batch"], *, ngram: int, num_draft: int
) -> Drafts:
    """What followed the latest earlier place with the longest common suffix, of up to `ngram` tokens.

    The drafts go on into themselves where they reach the end of the history, so that a loop is continued. A row whose
    last token is new to it has no drafts.
    """
    tokens, last = history.tokens, history.length - 1
    place = jnp.arange(tokens.shape[1])
    same, common = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    for back in range(ngram):
        wanted = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0)[:, None], axis=1)
        shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        same &= (shifted == wanted) & (place >= back) & (last >= back)[:, None]
        common += same
    common = jnp.where(place < last[:, None], common, 0)
    longest = common.max(axis=1, keepdims=True)
    found = jnp.where((common == longest) & (longest > 0), place, -1).max(axis=1)
    period = jnp.maximum(last - found, 1)[:, None]
    follow = jnp.take_along_axis(tokens, jnp.maximum(found, 0)[:, None] + 1 + jnp.arange(num_draft) % period, axis=1)
    exists = (alive & (found >= 0))[:, None] & (jnp.arange(num_draft) < room[:, None])
    return Drafts(follow, None, exists, jnp.zeros(follow.shape, bool))
