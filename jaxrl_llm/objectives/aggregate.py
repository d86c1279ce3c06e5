"""From one value per token to one number: the only place that decides on masks, means and sums over tokens."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.objectives.objective import objective

Mode = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


@objective(normaliser="(0, inf)")
def aggregate(
    per_token: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    mode: Mode,
    *,
    normaliser: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """The mean or sum over the real tokens of a batch.

        token_mean     Σ_bt m x / Σ_bt m           every token weighs the same: long rows count more
        sequence_mean  1/B Σ_b (Σ_t m x / Σ_t m)   every row weighs the same: a token of a long row counts less
        sequence_sum   1/B Σ_b Σ_t m x             the log-probability of sequences, and what a policy gradient needs
        constant       1/(B c) Σ_bt m x            Dr. GRPO (Liu et al. 2025): c = `normaliser`, e.g. the longest length

    Masked entries may be infinite or NaN. A row without a real token has the mean and the sum 0, and counts as one of
    the B rows; a batch without any has the value 0. All gradients are finite there.

    Args:
        normaliser: tokens per row, for "constant" alone.
        axis_name: the mapped axis, or axes, over which the batch is split under `shard_map` or `pmap`: sums and counts
            are added up over all shards before they are divided, so that every shard returns the global value. Under
            `jit` with sharded arrays none is needed. (Differentiate the mapped function as a whole, or inside it with
            `check_vma=True`, jax's default: without it jax adds the cotangents of all shards up.)

    Raises:
        ValueError: if per_token is not floating [batch, time], the mask does not match, the mode is unknown, or
            `normaliser` is given for another mode, missing or not positive.
    """
    total = (_weights(mask, mode, normaliser, axis_name, per_token.dtype) * jnp.where(mask, per_token, 0)).sum()
    return total if axis_name is None else jax.lax.psum(total, axis_name)


@aggregate.gradient
def _(per_token, mask, mode, *, normaliser, axis_name):
    """Each token's weight, m/Σm, m/(B Σ_t m), m/B or m/(B c)."""
    return _weights(mask, mode, normaliser, axis_name, per_token.dtype)


def _weights(
    mask: Array, mode: str, normaliser: float | None, axis_name: str | tuple[str, ...] | None, dtype: jnp.dtype
) -> Float[Array, "batch time"]:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, but is {mode!r}.")
    if (normaliser is not None) != (mode == "constant"):
        raise ValueError(f"normaliser is for the mode constant and needed there, but is {normaliser} for {mode}.")
    real = mask.astype(dtype)

    def everywhere(count: Array) -> Array:
        return count if axis_name is None else jax.lax.psum(count, axis_name)

    rows = everywhere(jnp.asarray(mask.shape[0], dtype))
    if mode == "token_mean":
        return real / jnp.maximum(everywhere(real.sum()), 1)
    if mode == "sequence_mean":
        return real / (jnp.maximum(rows, 1) * jnp.maximum(real.sum(axis=1, keepdims=True), 1))
    if mode == "constant":
        rows = rows * normaliser
    return real / jnp.maximum(rows, jnp.finfo(dtype).tiny)
