"""The core of all decoders: the request, the prefill, the choice and emission of a token, and the scan over steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt

from jaxrl_llm import language_model, text
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.transforms import Transform, as_transform, token_ids
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import host, is_concrete, library_of, on_cpu, on_device, violated, wide
from jaxrl_llm.objectives.logprobs import token_log_probs

BLOCK = 8  # steps between two checks whether all rows have ended
STEP_BUCKET = 2 * BLOCK
MIN_PROMPT_BUCKET = 16
DIGITS = (23, 20, 20)  # bits of the digits of a point in [0, 1); sums of 2^11 digits fit into an integer

Prompts = Int[Array, "batch prompt"] | Sequence[Sequence[int]]
State = TypeVar("State")


def result(cls: type) -> type:
    """Make a class a frozen dataclass and a pytree that prints as the types and shapes of its arrays."""

    def shown(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else repr(leaf)

    def __repr__(self: Any) -> str:
        fields = ", ".join(f"{each.name}={shown(getattr(self, each.name))}" for each in dataclasses.fields(self))
        return f"{cls.__name__}({fields})"

    cls.__repr__ = __repr__
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, repr=False)(cls))


@result
class Generation:
    """The tokens after the prompts. EOS counts as a token: it is in the mask, and its log-probability counts.

    Where the mask is false the token is `pad_id` and the log-probabilities are 0.
    """

    tokens: Int[Array, "batch time"]
    mask: Bool[Array, "batch time"]
    logp: Float[Array, "batch time"]  # of the model itself, at temperature 1, in nats
    logp_sampler: Float[Array, "batch time"]  # under the sampling distribution; 0 where the choice was greedy


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: z + (scale − 1) (log p − log p_u), z the logits of p; p_u follows the second prompt.

    A scale of 1 is plain generation; above 1 it moves away from what would follow the second prompt anyway. A token
    that either distribution excludes is then excluded. The new tokens are fed to both. The scale is one number, or one
    for each row.
    """

    prompts: Prompts
    scale: float | Float[Array, "*#batch"]
    prompt_mask: Bool[Array, "batch unguided"] | None = None

    def repeat(self, n: int) -> Guidance:
        """The same for a batch in which each row is repeated n times."""
        prompts, mask = _repeated(n, *_batch_of("guidance.prompts", self.prompts, self.prompt_mask))
        return Guidance(prompts, self.scale, mask)


# The request ----------------------------------------------------------------------------------------------------------


@result
class Request:
    """The checked arguments of a decoder. All but `num_steps` are leaves, so that another value does not recompile."""

    prompts: Int[Array, "rows prompt"]  # of a bucket; under guidance, the unguided ones are the second half
    mask: Bool[Array, "rows prompt"]
    limits: Int[Array, "batch"]  # the most new tokens of each row
    eos_ids: Int[Array, "eos"]
    pad_id: Int[Array, ""]
    transform: Transform
    keys: Key[Array, "batch"] | None  # None: greedy
    stop: StopStrings | None
    guidance_scale: Float[Array, "batch"] | None
    num_steps: int = dataclasses.field(metadata={"static": True})  # compiled for, after the first token
    copies: int = dataclasses.field(default=1, metadata={"static": True})  # adjacent rows of one prompt

    def ends(self, token: Int[Array, "..."]) -> Bool[Array, "..."]:
        """True at EOS."""
        return (token[..., None] == self.eos_ids).any(axis=-1)

    def take(self, rows: Int[Array, "row"]) -> Request:
        """The request of these rows of the batch alone; not under guidance."""
        return dataclasses.replace(
            self,
            copies=1,
            prompts=self.prompts[rows],
            mask=self.mask[rows],
            limits=self.limits[rows],
            transform=self.transform.take(rows),
            keys=None if self.keys is None else self.keys[rows],
        )

    def initial_state(self) -> PyTree[Array]:
        """The state of the transform before the first new token."""
        batch, room = self.limits.shape[0], ((0, 0), (0, self.num_steps + 1))
        return self.transform.init(jnp.pad(self.prompts[:batch], room), jnp.pad(self.mask[:batch], room), self.limits)


def request(
    lm: LanguageModel,
    prompts: Prompts,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    *,
    max_new_tokens: int | Int[Array, "batch"],
    transform: Transform | Sequence[Transform] | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
    guidance: Guidance | None = None,
    n: int = 1,
    align: bool = False,
    bounded: bool = True,
) -> Request:
    """Check the arguments of a decoder, and bring them into the shapes for which programs are compiled.

    Prompts are padded on the left to a bucket: the next power of two, at least 16.

    Args:
        align: move all padding to the left.
        bounded: refuse prompts that do not fit the model's context with their new tokens.

    Raises:
        ValueError: as `generate`.
    """
    prompts, prompt_mask = _batch_of("prompts", prompts, prompt_mask)
    copies = check_size("n", n, 1)
    if copies > 1:
        prompts, prompt_mask = _repeated(copies, prompts, prompt_mask)
        guidance = None if guidance is None else guidance.repeat(copies)
    batch = prompts.shape[0] if prompts.ndim else 1
    limits, transform = row_limits(max_new_tokens, batch), as_transform(transform).plain()
    transform.check(limits)
    prompts, mask = _bucketed(lm, prompts, prompt_mask, limits, bounded=bounded)
    if align:
        xp = library_of(prompts, mask)
        order = xp.argsort(mask, axis=1, stable=True)
        prompts, mask = (xp.take_along_axis(each, order, axis=1) for each in (prompts, mask))
    if stop is not None and not isinstance(stop, StopStrings):
        raise ValueError(f"stop must be made by decoding.stop_strings, but is {stop!r}.")
    scale = None
    if guidance is not None:
        prompts, mask, scale = _with_guidance(lm, prompts, mask, guidance, limits)
    arrays = {"prompts": prompts, "mask": mask, "limits": limits, "eos_ids": token_ids("eos_id", eos_id)}
    arrays["pad_id"] = pad_id if isinstance(pad_id, jax.Array) else np.asarray(pad_id, np.int32)
    return Request(
        **on_device(arrays),
        transform=transform,
        keys=None if greedy else row_keys(key, batch),
        stop=stop,
        guidance_scale=scale,
        num_steps=step_bucket(longest(max_new_tokens) - 1),  # the first token comes with the prefill
        copies=copies,
    )


def longest(max_new_tokens: int | Int[Array, "batch"]) -> int:
    """The most new tokens of any row."""
    return int(np.max(max_new_tokens, initial=1))


def prompt_bucket(length: int) -> int:
    """The length that prompts are padded to: the next power of two, at least 16."""
    return max(MIN_PROMPT_BUCKET, 1 << max(length - 1, 0).bit_length())


def step_bucket(steps: int) -> int:
    """The number of steps to compile for: the next multiple of 16."""
    return max(1, -(-steps // STEP_BUCKET)) * STEP_BUCKET


def one_prompt(prompt: Int[Array, "prompt"] | Sequence[int]) -> Int[Array, "1 prompt"]:
    """A single prompt, an array or a list of token ids, as a batch of one.

    Raises:
        ValueError: if it is not one sequence of tokens.
    """
    prompt = _array("prompt", np.zeros(0, np.int32) if isinstance(prompt, list | tuple) and not prompt else prompt)
    if prompt.ndim != 1:
        raise ValueError(f"prompt must be one sequence [time], but has the shape {list(prompt.shape)}.")
    return prompt[None]


def _batch_of(
    name: str, prompts: Prompts, mask: Bool[Array, "batch prompt"] | None
) -> tuple[Int[Array, "batch prompt"], Bool[Array, "batch prompt"] | None]:
    """Prompts as an array. Lists of unequal lengths are padded on the left, and get their mask."""

    def is_row(row: Any) -> bool:
        return isinstance(row, list | tuple) or getattr(row, "ndim", 0) == 1

    lists = isinstance(prompts, list | tuple) and all(map(is_row, prompts))
    lengths = set(map(len, prompts)) if lists else set()
    if len(lengths) < 2:
        prompts = _array(name, np.zeros((len(prompts), 0), np.int32) if lengths == {0} else prompts)
        return prompts, None if mask is None else host(mask)
    rows = [np.asarray(row, None if len(row) else np.int32) for row in prompts]
    if not all(row.ndim == 1 and np.issubdtype(row.dtype, np.integer) for row in rows):
        raise _no_prompts(name, prompts)
    if mask is not None:
        raise ValueError(f"the mask of {name} must be None if they are lists of unequal lengths, but is given.")
    return text.left_pad(rows)


def _repeated(n: int, prompts: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """Each row n times."""
    return tuple(None if each is None else library_of(each).repeat(each, n, axis=0) for each in (prompts, mask))


def _array(name: str, prompts: Any) -> Array:
    try:
        array = host(prompts)
    except (TypeError, ValueError) as error:
        raise _no_prompts(name, prompts) from error
    if array.dtype.kind in "OSUMm":
        raise _no_prompts(name, prompts)
    return array


def _no_prompts(name: str, prompts: Any) -> ValueError:
    return ValueError(
        f"{name} must be token ids, in an array or in lists, but is {prompts!r}. "
        "Decoders take tokens; what `jaxrl_llm.load(...)` returns takes text."
    )


def _bucketed(
    lm: LanguageModel,
    prompts: Int[Array, "batch prompt"],
    mask: Bool[Array, "batch prompt"] | None,
    limits: Int[np.ndarray, "batch"],
    *,
    name: str = "prompts",
    bounded: bool = True,
) -> tuple[Int[Array, "batch bucket"], Bool[Array, "batch bucket"]]:
    """The prompts and their mask, checked, and padded on the left to a bucket."""
    language_model.check_tokens(lm, prompts, mask, name=name, bounded=False)  # `check_room` knows the new tokens too
    mask = np.ones(prompts.shape, bool) if mask is None else mask
    check_room(lm, mask, limits, bounded=bounded)
    padding = ((0, 0), (prompt_bucket(prompts.shape[1]) - prompts.shape[1], 0))
    return tuple(library_of(each).pad(each, padding) for each in (prompts.astype(np.int32), mask))


def _with_guidance(
    lm: LanguageModel,
    prompts: Int[Array, "batch bucket"],
    mask: Bool[Array, "batch bucket"],
    guidance: Guidance,
    limits: Int[np.ndarray, "batch"],
) -> tuple[Int[Array, "rows bucket"], Bool[Array, "rows bucket"], Float[Array, "batch"]]:
    """The prompts, then those of the unguided rows, of one bucket; and the scale of each row."""
    name = "guidance.prompts"
    others, other_mask = _batch_of(name, guidance.prompts, guidance.prompt_mask)
    if others.shape[:1] != prompts.shape[:1]:
        raise ValueError(f"guidance needs a second prompt for each of {prompts.shape[0]} rows.")
    scale = finite_number("the guidance scale", guidance.scale, rows=prompts.shape[0])
    others, other_mask = _bucketed(lm, others, other_mask, limits, name=name)
    bucket = max(prompts.shape[1], others.shape[1])

    def both(*arrays: Array) -> Array:
        return jnp.concatenate([jnp.pad(each, ((0, 0), (bucket - each.shape[1], 0))) for each in arrays])

    return both(prompts, others), both(mask, other_mask), scale


def row_limits(max_new_tokens: int | Int[Array, "batch"], batch: int) -> Int[np.ndarray, "batch"]:
    """The most new tokens of each row. A host array, since programs are compiled for the longest.

    Raises:
        ValueError: unless they are known integers of at least 1, one or one for each row.
    """
    if not is_concrete(max_new_tokens):
        raise ValueError("max_new_tokens decides shapes: it must be a number or a concrete array, but is traced.")
    limits = np.asarray(max_new_tokens)
    if not np.issubdtype(limits.dtype, np.integer) or limits.shape not in ((), (batch,)):
        raise ValueError(
            f"max_new_tokens must be an integer, or one for each of {batch} rows, but is {max_new_tokens}."
        )
    if limits.min(initial=1) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but is {limits.min()}.")
    if limits.max(initial=1) >= 2**31:
        raise ValueError(f"max_new_tokens must be at most {2**31 - 1}, but is {limits.max()}.")
    return np.broadcast_to(limits, (batch,)).astype(np.int32)


def check_room(
    lm: LanguageModel,
    prompt_mask: Bool[Array, "batch prompt"],
    max_new_tokens: int | Int[np.ndarray, "batch"],
    *,
    bounded: bool = True,
) -> None:
    """Raise ValueError for a prompt that is too short for the model or, if `bounded`, too long for its context.

    Where the mask is traced nothing is known.
    """
    if not is_concrete(prompt_mask) or prompt_mask.shape[0] == 0:
        return
    lengths = np.asarray(prompt_mask).sum(axis=1)
    if lengths.min() < lm.min_prompt_length:
        raise ValueError(f"prompt {lengths.argmin()} is empty: this model needs at least one token to start from.")
    totals = lengths + max_new_tokens
    if bounded and totals.max() > lm.max_length:
        row = totals.argmax()
        raise ValueError(
            f"prompt {row} has {lengths[row]} tokens, and {totals[row] - lengths[row]} new ones do not fit "
            f"with it in the model's context of {lm.max_length}: shorten the prompt (methods on text "
            "have the option cut, --cut left), or let the context slide (for sample, greedy and mbr: decoding.slide, "
            "or --context slide)."
        )


def row_keys(key: Key[Array, "*#batch"] | None, batch: int) -> Key[Array, "batch"]:
    """A key for each row: those given, or derived from one by the row's index.

    Raises:
        ValueError: unless there is one typed key, or one for each row.
    """
    if key is None:
        raise ValueError("sampling needs key=jax.random.key(seed); for the most probable tokens pass greedy=True.")
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key must be made by jax.random.key, but is {key!r}.")
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one for each of {batch} rows, but has the shape {key.shape}.")
    return key if key.shape else _keys_of_rows(key, batch)


@functools.partial(jax.jit, static_argnames="batch")
def _keys_of_rows(key: Key[Array, ""], batch: int) -> Key[Array, "batch"]:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))


def check_size(name: str, size: int, least: int, most: int | None = None) -> int:
    """The size as a Python integer.

    Raises:
        ValueError: unless it is an integer of at least `least`, and at most `most`.
    """
    if (
        not isinstance(size, int | np.integer)
        or isinstance(size, bool)
        or size < least
        or (most is not None and size > most)
    ):
        range_ = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be an integer {range_}, but is {size!r}.")
    return int(size)


def finite_number(
    name: str, value: float | Array, *, low: float = -math.inf, rows: int | None = None
) -> Float[Array, "*#batch"]:
    """A number as an array; with `rows`, one for each row.

    Raises:
        ValueError: unless it is one finite number of at least `low`, or one for each row.
    """
    number = host(value).astype(jnp.result_type(float))
    xp, shapes = library_of(number), [()] if rows is None else [(), (rows,)]
    if number.shape not in shapes or violated(xp.isfinite(number) & (number >= low)):
        least = "" if low == -math.inf else f" of at least {low}"
        each = "" if rows is None else f", or one for each of {rows} rows"
        raise ValueError(f"{name} must be one finite number{least}{each}, but is {value}.")
    return number if rows is None else xp.broadcast_to(number, (rows,))


def length_exponent(
    value: float | Array, max_new_tokens: int | Int[Array, "batch"], *, rows: int | None = None
) -> Float[Array, "*#batch"]:
    """The length penalty; with `rows`, that of each row.

    Raises:
        ValueError: unless it is a finite number, for which length**penalty stays in the range of float32.
    """
    number, most = finite_number("length_penalty", value, rows=rows), longest(max_new_tokens)
    if violated(abs(number) * math.log(most + 1) <= 80):
        raise ValueError(f"length_penalty is {value}: a length of {most} to that power is out of range.")
    return number


# Steps ----------------------------------------------------------------------------------------------------------------


class Prefill(NamedTuple):
    """The prompts as the model has read them."""

    hidden: Float[Array, "rows prompt width"]  # at every token
    last: Float[Array, "rows width"]  # at each row's last token
    cache: Cache


def prefill(lm: LanguageModel, params: Params, request: Request, *, num_slots: int) -> Prefill:
    """Read the prompts in one call, each of them once, into a cache of `num_slots` slots."""
    copies, batch = request.copies, request.limits.shape[0] // request.copies
    cache = lm.init_cache(batch, num_slots, dtype=language_model.params_dtype(params))
    if request.guidance_scale is not None:
        cache = cache.take(jnp.tile(jnp.arange(batch), 2))  # an unguided row reads the source of its guided one
    found = read(lm, params, cache, request.prompts[::copies], request.mask[::copies])
    if copies == 1:
        return found
    rows = jnp.repeat(jnp.arange(found.last.shape[0]), copies)
    return Prefill(found.hidden[rows], found.last[rows], found.cache.take(rows))


def read(
    lm: LanguageModel,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "rows time"],
    mask: Bool[Array, "rows time"],
) -> Prefill:
    """Append tokens to a cache in one call."""
    hidden, cache = lm.hidden(params, tokens, cache, mask=mask)
    # For an empty prompt any place will do: all are its root.
    last = jnp.where(mask, jnp.arange(tokens.shape[1]), 0).max(axis=1)
    return Prefill(hidden, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache)


def emit(
    request: Request,
    logits: Float[Array, "batch vocab"],
    token: Int[Array, "batch"],
    logp_sampler: Float[Array, "batch"],
    done: Bool[Array, "batch"],
    time: Int[Array, "*#batch"],
) -> tuple[Generation, Bool[Array, "batch"]]:
    """The chosen tokens of the rows that are not done, with their log-probabilities; and which rows are done then.

    Args:
        logits: the model's own.
        time: tokens emitted before.
    """
    alive = ~done
    emitted = Generation(
        tokens=jnp.where(alive, token, request.pad_id),
        mask=alive,
        logp=jnp.where(alive, token_log_probs(logits, token), 0),
        logp_sampler=jnp.where(alive, logp_sampler, 0),
    )
    return emitted, done | request.ends(token) | (time + 1 >= request.limits)


def run_blocks(
    step: Callable[[State], tuple[State, PyTree[Array]]],
    state: State,
    unfinished: Callable[[State], Bool[Array, ""]],
    *,
    num_steps: int,
    block: int = BLOCK,
) -> tuple[State, PyTree[Array]]:
    """Run up to `num_steps` steps, in scans of `block`, while the state is unfinished.

    The end is checked between the scans, not in each step: a `cond` in the step makes XLA copy the cache twice.

    Returns:
        The state, and the outputs of the steps, [num_steps, ...]; 0 for the steps that were not needed.
    """
    block = math.gcd(num_steps, block)
    outputs = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), jax.eval_shape(step, state)[1])

    def goes_on(carry: tuple[State, PyTree[Array], Array]) -> Array:
        return (carry[2] < num_steps) & unfinished(carry[0])

    def run_block(carry: tuple[State, PyTree[Array], Array]) -> tuple[State, PyTree[Array], Array]:
        state, outputs, index = carry
        state, piece = jax.lax.scan(lambda state, _: step(state), state, length=block)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=0)
        return state, jax.tree.map(write, outputs, piece), index + block

    return jax.lax.while_loop(goes_on, run_block, (state, outputs, jnp.zeros((), jnp.int32)))[:2]


def by_row(request: Request, emitted: Generation) -> Generation:
    """The outputs of `run_blocks`, [time, batch], with the rows first."""
    emitted = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), emitted)
    return dataclasses.replace(emitted, tokens=jnp.where(emitted.mask, emitted.tokens, request.pad_id))


# Checks of results ----------------------------------------------------------------------------------------------------


def check_generation(generation: Generation, *, start: int = 0) -> Generation:
    """The generation, or a piece of it from new token `start`, unchanged.

    Raises:
        FloatingPointError: if a log-probability is NaN or infinite.
    """
    if is_concrete(generation.logp):
        broken = ~(np.isfinite(generation.logp) & np.isfinite(generation.logp_sampler))
        if broken.any():
            row, time = np.argwhere(broken)[0]
            raise FloatingPointError(
                f"no token could be drawn in row {row} at new token {start + time}: the model's logits there are NaN, "
                "+inf, or all −inf, or the transforms and the guidance together leave no token of them."
            )
    return generation


def check_log_prob(log_prob: Float[Array, "batch ..."]) -> None:
    """Raise FloatingPointError if any log-probability is NaN, as it is for broken logits."""
    if is_concrete(log_prob):
        broken = np.isnan(log_prob).any(axis=tuple(range(1, log_prob.ndim)))
        if broken.any():
            raise FloatingPointError(
                f"row {broken.argmax()} could not be continued: the model's logits are NaN, +inf, or all −inf."
            )


def greedy(logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """The token of the largest logit, the first of them in a tie."""
    if not on_cpu():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # A maximum and a minimum: XLA's CPU backend runs them about 10 times faster than argmax.
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(largest, index, logits.shape[-1] - 1).min(axis=-1)


def greedy_log_prob(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """The log-probability of the token of `greedy`, for a sampler that always takes it: 0; −inf if none is possible."""
    return jnp.where(logits.max(axis=-1) > -jnp.inf, 0.0, -jnp.inf).astype(wide(logits).dtype)


def sample(keys: Key[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """One token of each row from softmax(logits), with a key for each row.

    Sampling by inversion, in two stages: first a block of about √V tokens, then a token in it. This takes six random
    words for each row, where the Gumbel trick takes V. Rare tokens are drawn as often as they should be, and those of
    probability 0 never (see `invert`).
    """
    logits = wide(logits)
    batch, vocab = logits.shape
    width, bits = math.isqrt(vocab - 1) + 1, jnp.finfo(logits.dtype).bits
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    blocks = jnp.pad(weights, ((0, 0), (0, width * width - vocab))).reshape(batch, width, width)
    words = jax.vmap(lambda key: jax.random.bits(key, (6,), f"uint{bits}"))(keys)
    high, low = words[:, :2, None] >> (bits - DIGITS[0]), words[:, 2:].reshape(batch, 2, 2) >> (bits - DIGITS[1])
    points = jnp.concatenate([high, low], axis=-1).astype(jnp.int32)
    block = invert(blocks.sum(axis=-1), points[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * width + invert(inside, points[:, 1])


def invert(weights: Float[Array, "batch n"], point: Int[Array, "batch 3"]) -> Int[Array, "batch"]:
    """The index whose interval contains the point, where [0, 1) is divided in proportion to the weights.

    The sums of the weights are fixed-point numbers of three digits (`DIGITS`), so that small weights do not vanish
    beside large ones. The largest weight takes what rounding leaves of the interval. Each index has its share of
    the 2^63 points to a relative error of n 2^-24, or to one point; those of weight 0 have none.

    Args:
        point: the three digits of a number in [0, 1).
    """
    place, largest = jnp.arange(weights.shape[-1]), greedy(weights)[:, None]
    rest = jnp.where(place == largest, 0, weights / weights.sum(axis=-1, keepdims=True))
    digits = []
    for bits in DIGITS:
        scaled = rest * 2.0**bits
        whole = jnp.floor(scaled)
        digits.append(whole.astype(jnp.int32))
        rest = scaled - whole
    sums = jnp.cumsum(jnp.stack(digits), axis=-1)
    one = jnp.asarray([2 ** DIGITS[0], 0, 0], jnp.int32)[:, None, None]
    sums += jnp.where(place >= largest, one - sums[..., -1:], 0)
    high, middle, low = sums - point.T[..., None]
    middle += (low - 1) >> DIGITS[2]  # the carry: it rounds down, so that the sum must be larger than the point
    return jnp.argmax(high + (middle >> DIGITS[1]) >= 0, axis=-1).astype(jnp.int32)


def bernoulli(keys: Key[Array, "batch"], probability: Float[Array, "batch n"]) -> Bool[Array, "batch n"]:
    """True with each probability, a small one too: uniform numbers of 23 bits alone would be 0 once in 8 million."""
    number, bits = probability.shape[1], jnp.finfo(probability.dtype).bits
    words = jax.vmap(lambda key: jax.random.bits(key, (2, number), f"uint{bits}"))(keys)
    high = (words[:, 0] >> (bits - DIGITS[0])).astype(probability.dtype) / 2 ** DIGITS[0]
    rest = (words[:, 1].astype(probability.dtype) + 0.5) * 2.0**-bits  # above 0
    return (probability - high) * 2 ** DIGITS[0] >= rest


def sample_distinct(
    keys: Key[Array, "batch"], logits: Float[Array, "batch vocab"], count: int
) -> Int[Array, "batch count"]:
    """`count` distinct tokens of each row, as if drawn one after the other without replacement from softmax(logits).

    The Gumbel-top-k trick (Kool et al. 2019): the largest of logits + Gumbel noise. If a row has fewer tokens of
    positive probability, these come first, followed by tokens of logit −inf. Rare tokens are drawn as often as they
    should be (see `gumbel`).
    """
    logits = wide(logits)
    noise = gumbel(keys, logits.shape[-1:], logits.dtype)
    return jax.lax.top_k(logits + noise, count)[1]


def gumbel(keys: Key[Array, "batch"], shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "batch *shape"]:
    """Gumbel noise of this shape for each key, from two random words a number.

    To a rounding of 2^-22 it is `jax.random.gumbel`, whose 23 bits are never above 16: the maximum of logits + noise is
    then a token of probability 1e-9 too often, or never. Here tokens of 1e-15 have their share.
    """
    bits = jnp.finfo(dtype).bits

    def draw(key: Key[Array, ""]) -> Float[Array, "*shape"]:
        kind = f"uint{bits}"
        return gumbel_of(
            jax.random.bits(key, shape, kind), jax.random.bits(jax.random.fold_in(key, 1), shape, kind), dtype
        )

    return jax.vmap(draw)(keys)


def gumbel_of(high: UInt[Array, "..."], low: UInt[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """−log(−log u), u the number in (0, 1) that has these words as its digits; it rises with them."""
    bits = jnp.finfo(dtype).bits

    def fraction(high: Array, low: Array) -> Array:
        return (high.astype(dtype) + (low.astype(dtype) + 0.5) * 2.0**-bits) * 2.0**-bits

    from_above = jnp.minimum(fraction(~high, ~low), 0.75)  # precise near 1, where u is not
    information = jnp.where(high >> (bits - 1) > 0, -jnp.log1p(-from_above), -jnp.log(fraction(high, low)))
    return -jnp.log(information)
