"""Continuous batching: many prompts in a few rows; a row whose text has ended takes the next prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from jaxrl_llm import language_model, runtime
from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.core import BLOCK, Generation, Request
from jaxrl_llm.decoding.generate import State, begin, decode, start, step
from jaxrl_llm.decoding.transforms import Transform
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import is_concrete

CHUNK = 32  # tokens of a prompt that are read at once
GROUP = 8  # a refill waits until 1 / GROUP of the rows have ended
FREE_SLOTS = 64  # of the cache, beyond the longest text; it is moved when they are full
PIECE = 8  # blocks of steps between two looks at the progress


def generate_many(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Int[Array, "batch"],
    rows: int = 32,
    transform: Transform | Sequence[Transform] | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
    progress: bool = False,
) -> Generation:
    """Continue thousands of prompts as `generate` does, `rows` of them at a time, and keep the rows busy.

    The result is that of `generate` on all prompts at once, in their order: prompt i draws with the i-th key, or with
    `jax.random.fold_in(key, i)`, wherever and whenever it is decoded. So its tokens depend neither on `rows` nor on the
    other prompts, as far as rounding lets them.

    Long prompts come first. A row whose text has ended takes the next prompt between two blocks of steps, as soon as an
    eighth of the rows are free; a prompt is read in chunks of 32 tokens, without those that are padding alone. One
    compiled program, with the cache of `rows` rows on the device, serves all numbers of prompts up to the next power of
    two, and the buckets of `generate`. The cache has slots for the longest prompt, `max_new_tokens` and 64 more (and by
    their number LongRoPE chooses its frequencies).

    Args:
        rows: texts that are decoded together.
        progress: show a progress bar.

    The other arguments are those of `generate`; there is no `guidance`.

    Raises:
        ValueError: as `generate` does; if rows is below 1, or each row of the model has a source (T5).
        FloatingPointError: as `generate` does.
    """
    core.check_size("rows", rows, 1)
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, greedy=greedy, key=key,
        eos_id=eos_id, pad_id=pad_id, stop=stop, align=True,
    )  # fmt: skip
    if jax.eval_shape(lambda: lm.init_cache(request.limits.shape[0], 1)).given is not None:
        raise ValueError(f"generate_many takes models of one text, but {type(lm).__name__} has a source for each row.")
    if request.limits.shape[0] <= rows:
        found = decode(lm, params, request)
    else:
        found = decode_many(lm, params, request, rows=rows, progress=progress)
    length = core.longest(max_new_tokens)
    return core.check_generation(jax.tree.map(lambda leaf: leaf[:, :length], found))


@core.result
class Work:
    """The state between two blocks of steps."""

    state: State  # of the rows; `time` is that of each
    number: Int[Array, "rows"]  # of each row's prompt; beyond the last before a row's first prompt
    taken: Int[Array, ""]  # prompts that have had a row
    found: Generation  # of all prompts


def decode_many(lm: LanguageModel, params: Params, request: Request, *, rows: int, progress: bool) -> Generation:
    """Decode the prompts of a request in fewer rows."""
    batch = request.limits.shape[0]
    order, ordered = _sorted(request)
    work = _begin(lm, params, ordered, rows=rows)
    readable = all(map(is_concrete, jax.tree.leaves((params, request))))  # else in one piece, under an outer `jit`
    with tqdm(total=batch, unit="prompt", disable=not progress or runtime.is_file()) as bar:
        ended = 0
        while ended < batch:
            work = advance(lm, params, ordered, work, np.int32(batch), PIECE if readable else np.iinfo(np.int32).max)
            ended = int(work.taken - (~work.state.done).sum()) if readable else batch
            bar.update(ended - bar.n)
    return _as_given(work.found, order)


@jax.jit
def _sorted(request: Request) -> tuple[Int[Array, "batch"], Request]:
    """Return the order of the prompts, and a bucket of them in that order."""
    batch = request.limits.shape[0]
    chunks = -(-request.mask.sum(axis=1) // CHUNK)
    order = jnp.lexsort((-request.limits, -chunks))  # those of a refill have as many chunks
    bucket = 1 << (batch - 1).bit_length()
    return order, request.take(order[jnp.minimum(jnp.arange(bucket), batch - 1)])


@jax.jit
def _as_given(found: Generation, order: Int[Array, "batch"]) -> Generation:
    """Return the rows in the order of the prompts as they were given."""
    place = jnp.argsort(order)
    return jax.tree.map(lambda leaf: leaf[place], found)


@functools.partial(jax.jit, static_argnames=("lm", "rows"))
def _begin(lm: LanguageModel, params: Params, request: Request, *, rows: int) -> Work:
    """All rows free, and the first slots of the cache left for the prompts."""
    bucket, width = request.prompts.shape
    mine = request.take(jnp.zeros(rows, jnp.int32))
    cache = lm.init_cache(rows, width + request.num_steps + FREE_SLOTS, dtype=language_model.params_dtype(params))
    state = State(
        cache=dataclasses.replace(cache, length=jnp.full_like(cache.length, width)),
        token=jnp.zeros(rows, jnp.int32),
        fed=jnp.zeros(rows, bool),
        done=jnp.ones(rows, bool),
        time=jnp.zeros(rows, jnp.int32),
        transform=mine.initial_state(),
        stop=None if request.stop is None else request.stop.start(rows),
    )
    first = jax.eval_shape(lambda: begin(lm, params, mine, num_slots=cache.max_length))[1]
    found = jax.tree.map(lambda leaf: jnp.zeros((bucket, request.num_steps + 1), leaf.dtype), first)
    found = dataclasses.replace(found, tokens=jnp.full_like(found.tokens, request.pad_id))
    return Work(state, jnp.full(rows, bucket, jnp.int32), jnp.zeros((), jnp.int32), found)


@functools.partial(jax.jit, static_argnames="lm", donate_argnames="work")
def advance(
    lm: LanguageModel, params: Params, request: Request, work: Work, count: Int[Array, ""], blocks: int
) -> Work:
    """Refill rows and run blocks of steps, up to so many blocks, until the first `count` prompts have ended."""
    rows, slots = work.state.cache.valid.shape
    group = -(-rows // GROUP)

    def goes_on(carry: tuple[Work, Array]) -> Array:
        return (carry[1] > 0) & ((carry[0].taken < count) | ~carry[0].state.done.all())

    def has_room(work: Work) -> Array:
        return (work.taken < count) & (work.state.done.sum() >= jnp.minimum(group, count - work.taken))

    def is_full(work: Work) -> Array:
        return work.state.cache.length + BLOCK > slots

    def run(carry: tuple[Work, Array]) -> tuple[Work, Array]:
        # Loops of few steps, often none: a `cond` would copy the cache.
        refill = functools.partial(_refill, lm, params, request, count, group)
        move = functools.partial(_moved, lm, request)
        work = jax.lax.while_loop(has_room, refill, carry[0])
        work = jax.lax.while_loop(is_full, move, work)
        return _block(lm, params, request, work), carry[1] - 1

    return jax.lax.while_loop(goes_on, run, (work, jnp.asarray(blocks, jnp.int32)))[0]


def _refill(lm: LanguageModel, params: Params, request: Request, count: Int[Array, ""], group: int, work: Work) -> Work:
    """Read the next `group` prompts, and give them the first rows that have ended."""
    state, new = work.state, work.taken + jnp.arange(group, dtype=jnp.int32)
    rows, slots = state.cache.valid.shape
    places = jnp.where(new < count, jnp.argsort(~state.done, stable=True)[:group], rows)
    mine = request.take(jnp.minimum(new, request.limits.shape[0] - 1))
    cache = lm.init_cache(group, slots, dtype=language_model.params_dtype(params))
    hidden, cache = _read(lm, params, mine, dataclasses.replace(cache, length=state.cache.length))
    fresh, first = start(mine, lm.logits(params, hidden), cache)
    fresh = dataclasses.replace(fresh, time=jnp.ones(group, jnp.int32))

    def write(old: Array, new: Array) -> Array:
        return old.at[places].set(new, mode="drop") if old.ndim else old

    return Work(
        state=jax.tree.map(write, state, fresh),
        number=write(work.number, new),
        taken=jnp.minimum(work.taken + group, count),
        found=jax.tree.map(lambda leaf, value: leaf.at[new, 0].set(value, mode="drop"), work.found, first),
    )


def _read(
    lm: LanguageModel, params: Params, request: Request, cache: Cache
) -> tuple[Float[Array, "rows width"], Cache]:
    """The hidden state at the last token of each prompt; the prompts end at the cache's length."""
    width = request.prompts.shape[1]
    size = min(CHUNK, width)
    longest, chunks = request.mask.sum(axis=1).max(), width // size
    first = chunks - jnp.maximum(1, -(-longest // size))

    def read(carry: tuple[Array, Cache, Array]) -> tuple[Array, Cache, Array]:
        chunk, cache, _ = carry
        tokens, mask = (
            jax.lax.dynamic_slice_in_dim(each, chunk * size, size, axis=1) for each in (request.prompts, request.mask)
        )
        hidden, cache = lm.hidden(params, tokens, cache, mask=mask)
        return chunk + 1, cache, hidden[:, -1]

    cache = dataclasses.replace(cache, length=(cache.length - width + first * size).astype(cache.length.dtype))
    hidden = jax.eval_shape(read, (first, cache, None))[2]
    carry = (first, cache, jnp.zeros(hidden.shape, hidden.dtype))
    _, cache, hidden = jax.lax.while_loop(lambda carry: carry[0] < chunks, read, carry)
    return hidden, cache


def _moved(lm: LanguageModel, request: Request, work: Work) -> Work:
    """The cache without the slots that no row needs any more."""
    state, cache = work.state, work.state.cache
    longest = jnp.where(state.done, 0, cache.valid.sum(axis=1)).max()  # a text has the last slots, without gaps
    kept = jnp.maximum(longest, request.prompts.shape[1]).astype(cache.length.dtype)  # the next prompts end there
    shift, axes, width = cache.length - kept, _slot_axes(lm), core.MIN_PROMPT_BUCKET

    def move(index: Array, leaves: list[Array]) -> list[Array]:
        """Move `width` slots in place; none of them has been overwritten, for `shift` is larger."""
        start = jnp.minimum(index * width, kept - width)

        def moved(leaf: Array, axis: int) -> Array:
            slots = jax.lax.dynamic_slice_in_dim(leaf, start + shift, width, axis)
            return jax.lax.dynamic_update_slice_in_dim(leaf, slots, start, axis)

        pairs = zip(leaves, axes, strict=True)
        return [leaf if axis is None else moved(leaf, axis) for leaf, axis in pairs]

    leaves, structure = jax.tree.flatten(cache.memory)
    leaves = jax.lax.fori_loop(0, -(-kept // width), move, leaves)
    cache = dataclasses.replace(
        cache, memory=jax.tree.unflatten(structure, leaves), valid=jnp.roll(cache.valid, -shift, axis=1), length=kept
    )
    return dataclasses.replace(work, state=dataclasses.replace(state, cache=cache))


def _slot_axes(lm: LanguageModel) -> list[int | None]:
    """The axis of the slots in each leaf of a cache's memory; None where there is none."""
    one, two = (jax.eval_shape(lambda count=count: lm.init_cache(1, count).memory) for count in (1, 2))
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return [next((axis for axis, size in enumerate(a.shape) if size != b.shape[axis]), None) for a, b in pairs]


def _block(lm: LanguageModel, params: Params, request: Request, work: Work) -> Work:
    """A block of steps of all rows."""
    mine = request.take(jnp.minimum(work.number, request.limits.shape[0] - 1))
    state, emitted = jax.lax.scan(lambda state, _: step(lm, params, mine, state), work.state, length=BLOCK)
    time = work.state.time + jnp.arange(BLOCK)[:, None]  # beyond a row's end what is written is padding

    def write(found: Array, values: Array) -> Array:
        return found.at[work.number, time].set(values, mode="drop")

    return dataclasses.replace(work, state=state, found=jax.tree.map(write, work.found, emitted))
