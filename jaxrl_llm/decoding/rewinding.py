"""Caches and contexts that run ahead with drafts, and are taken back to what was accepted."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.decoding.transforms import base as context
from jaxrl_llm.decoding.transforms.base import Context, Transform
from jaxrl_llm.language_model import Cache, LanguageModel, Params


@functools.cache
def remembers_by_slot(lm: LanguageModel) -> bool:
    """Whether all that a model remembers stands in slots, so that a token is forgotten when its slot is not valid.

    It is read off the shapes of two caches of no rows: a leaf that does not grow with the slots is a running state.
    """
    short, long = (jax.tree.leaves(jax.eval_shape(lambda n=n: lm.init_cache(0, n)).memory) for n in (2, 3))
    return all(one.shape != other.shape for one, other in zip(short, long, strict=True))


def rewind(
    lm: LanguageModel,
    params: Params,
    before: Cache,
    after: Cache,
    tokens: Int[Array, "batch time"],
    kept: Bool[Array, "batch time"],
) -> Cache:
    """The cache `after` the tokens were appended to `before`, of which only those `kept` shall count.

    Slots are made invalid; a model with a running state reads the tokens that are kept once more.
    """
    if remembers_by_slot(lm):
        return dataclasses.replace(after, valid=_restrict(after.valid, before.length, kept))
    return lm.hidden(params, tokens, before, mask=kept)[1]


def rewind_context(
    before: Context,
    after: Context,
    memories: PyTree[Array],
    kept: Bool[Array, "batch time"],
    index: Int[Array, "batch"],
) -> Context:
    """The context whose history has of the tokens since `before` those `kept`, and whose memory is number `index`."""
    history = after.history
    if history is not None:
        start = before.history.length
        history = history._replace(
            mask=_restrict(history.mask, start, kept), generated=_restrict(history.generated, start, kept)
        )
    rows = jnp.arange(index.shape[0])
    return Context(history, jax.tree.map(lambda leaf: leaf[index, rows], memories))


def _restrict(
    flags: Bool[Array, "batch slot"], start: Int[Array, ""], kept: Bool[Array, "batch time"]
) -> Bool[Array, "batch slot"]:
    """The flags, false from slot `start` where not `kept`."""
    window = jax.lax.dynamic_slice_in_dim(flags, start, kept.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(flags, window & kept, start, axis=1)


def warp_all(
    transform: Transform | None,
    logits: Float[Array, "batch draft+1 vocab"],
    drafts: Int[Array, "batch draft"],
    counts: Bool[Array, "batch draft"],
    here: Context,
) -> tuple[Float[Array, "batch draft+1 vocab"], Context, tuple]:
    """The transformed logits before each draft, as if those before it were accepted, and after the last.

    Also the context after all, with one slot more than drafts, and the transform's memory at each place.
    """
    if transform is None:
        return logits, here, ()

    def step(here: Context, column: tuple[Array, Array, Array]) -> tuple[Context, tuple]:
        return context.remember(transform, here, *column), (context.warp(transform, column[0], here), here.memory)

    columns = (logits, jnp.pad(drafts, ((0, 0), (0, 1))), jnp.pad(counts, ((0, 0), (0, 1))))
    here, (warped, memories) = jax.lax.scan(step, here, tuple(jnp.moveaxis(each, 1, 0) for each in columns))
    return jnp.moveaxis(warped, 0, 1), here, memories


def settle_context(
    transform: Transform | None,
    before: Context,
    after: Context,
    memories: tuple,
    logits: Float[Array, "batch draft+1 vocab"],
    accepted: Int[Array, "batch"],
    token: Int[Array, "batch"],
    alive: Bool[Array, "batch"],
) -> Context:
    """The context after the accepted drafts and `token`, which takes the slot behind those of all drafts."""
    if transform is None:
        return before
    kept = jnp.arange(logits.shape[1]) < accepted[:, None]
    here = rewind_context(before, after, memories, kept, accepted)
    if here.history is not None:
        here = Context(here.history._replace(length=here.history.length - 1), here.memory)
    logits = jnp.take_along_axis(logits, accepted[:, None, None], axis=1)[:, 0]
    return context.remember(transform, here, logits, token, alive)
