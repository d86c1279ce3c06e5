"""What every decoder checks before it runs, and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm import language_model
from jaxrl_llm.decoding.loop import Generation
from jaxrl_llm.decoding.transforms.base import Transform
from jaxrl_llm.language_model import LanguageModel
from jaxrl_llm.numerics import is_concrete

MIN_PROMPT_BUCKET = 16


def bucketed_prompts(
    lm: LanguageModel,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"] | None,
    *,
    max_new_tokens: int | Int[np.ndarray, "batch"],
) -> tuple[Int[Array, "batch bucket"], Bool[Array, "batch bucket"]]:
    """The prompts and their mask, checked, and padded on the left to the next power of two (at least 16).

    One compiled program then serves all prompts of a bucket.
    """
    prompts = jnp.asarray(prompts)
    prompt_mask = None if prompt_mask is None else jnp.asarray(prompt_mask)
    language_model.check_tokens(lm, prompts, prompt_mask, name="prompts")
    row_limits(max_new_tokens, prompts.shape[0])
    if prompt_mask is None:
        prompt_mask = jnp.ones(prompts.shape, bool)
    check_room(lm, prompt_mask, max_new_tokens)
    length = prompts.shape[1]
    bucket = max(MIN_PROMPT_BUCKET, 1 << max(length - 1, 0).bit_length())
    padding = ((0, 0), (bucket - length, 0))
    return jnp.pad(prompts.astype(jnp.int32), padding), jnp.pad(prompt_mask, padding)


def row_limits(
    max_new_tokens: int | Int[Array, "batch"],
    batch: int,
    transform: Transform | None = None,
    *,
    per_row: bool = True,
) -> Int[np.ndarray, "batch"]:
    """How many new tokens each row may have, if its transform can serve it.

    A host array, since programs are compiled for the longest.
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
    limits = np.broadcast_to(limits, (batch,)).astype(np.int32)
    if transform is not None and not isinstance(transform, Transform):
        raise ValueError(f"transform must be a Transform, several of them in a Chain((...)), but is {transform!r}.")
    if transform is not None:
        transform.check(limits, per_row=per_row)
    return limits


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: log p_u + scale (log p − log p_u), p_u the law after the second prompt.

    A scale of 1 is plain generation, above 1 moves away from what would follow the second prompt anyway; a token that
    either law excludes is then excluded. The new tokens are fed to both.
    """

    prompts: Int[Array, "batch unguided"]
    scale: float | Float[Array, ""]
    prompt_mask: Bool[Array, "batch unguided"] | None = None


def with_guidance(
    lm: LanguageModel,
    prompts: Int[Array, "batch bucket"],
    prompt_mask: Bool[Array, "batch bucket"],
    guidance: Guidance,
    *,
    max_new_tokens: Int[np.ndarray, "batch"],
) -> tuple[Int[Array, "rows bucket"], Bool[Array, "rows bucket"], Float[Array, ""]]:
    """The prompts, then those of the unguided rows, of one bucket; and the scale."""
    if jnp.shape(guidance.prompts)[:1] != prompts.shape[:1]:
        raise ValueError(f"guidance needs a second prompt for each of {prompts.shape[0]} rows.")
    scale = jnp.asarray(guidance.scale, jnp.result_type(float))
    if scale.ndim or (is_concrete(scale) and not jnp.isfinite(scale)):
        raise ValueError(f"the guidance scale must be one finite number, but is {guidance.scale}.")
    others = bucketed_prompts(lm, guidance.prompts, guidance.prompt_mask, max_new_tokens=max_new_tokens)
    bucket = max(prompts.shape[1], others[0].shape[1])
    pairs = zip((prompts, prompt_mask), others, strict=True)
    left = [[jnp.pad(each, ((0, 0), (bucket - each.shape[1], 0))) for each in pair] for pair in pairs]
    return jnp.concatenate(left[0]), jnp.concatenate(left[1]), scale


def eos_array(eos_id: int | Sequence[int] | Int[Array, "*eos"] | None) -> Int[Array, "eos"]:
    """No, one or several ending tokens as an array; an id outside the vocabulary never ends a row."""
    ids = jnp.atleast_1d(jnp.asarray([] if eos_id is None else eos_id))
    if ids.size and not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"eos_id must be a token or several, but is {eos_id!r}.")
    return ids.astype(jnp.int32)


def check_room(
    lm: LanguageModel, prompt_mask: Bool[Array, "batch prompt"], max_new_tokens: int | Int[np.ndarray, "batch"]
) -> None:
    """Raise if a prompt is too short for the model, or too long for its context, where that can be known."""
    if not is_concrete(prompt_mask) or prompt_mask.shape[0] == 0:
        return
    lengths = np.asarray(prompt_mask).sum(axis=1)
    if lengths.min() < lm.min_prompt_length:
        raise ValueError(f"prompt {lengths.argmin()} is empty: this model needs at least one token to start from.")
    totals = lengths + max_new_tokens
    if totals.max() > lm.max_length:
        row = totals.argmax()
        raise ValueError(
            f"prompt {row} has {lengths[row]} tokens, and {totals[row] - lengths[row]} new ones do not fit "
            f"with it in the model's context of {lm.max_length}."
        )


def row_keys(key: Key[Array, "*#batch"] | None, batch: int) -> Key[Array, "batch"]:
    """A key for each row: those given, or derived from one by the row's index."""
    if key is None:
        raise ValueError("sampling needs key=jax.random.key(seed); for the most probable tokens pass greedy=True.")
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key must be made by jax.random.key, but is {key!r}.")
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one for each of {batch} rows, but has the shape {key.shape}.")
    return key if key.shape else jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))


def check_finite(generation: Generation, *, start: int = 0) -> Generation:
    """Raise where the model's law broke down; return the generation, a piece from new token `start`, unchanged."""
    if is_concrete(generation.logp):
        broken = ~(np.isfinite(generation.logp) & np.isfinite(generation.logp_sampler))
        if broken.any():
            row, time = np.argwhere(broken)[0]
            raise FloatingPointError(
                f"no token could be drawn in row {row} at new token {start + time}: the model's logits there are NaN, "
                "+inf, or all −inf, or the transform and the guidance leave no token of them."
            )
    return generation
