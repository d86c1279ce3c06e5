"""From one value per token to one number: the only place where masks, means and sums over tokens are decided."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.numerics import check_range, checked_mask, floating

Mode = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


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
        constant       1/(B c) Σ_bt m x            Dr. GRPO (Liu et al. 2025): c = `normaliser`, say the longest answer

    What the mask hides may be infinite or NaN. A row without a real token has the mean and the sum 0, and counts as one
    of the B rows; a batch without any has the value 0. All gradients are finite there.

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
    per_token = floating("per_token", per_token)
    mask, weights = _weights(per_token, mask, mode, normaliser, axis_name)
    total = (weights * jnp.where(mask, per_token, 0)).sum()
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def aggregate_grad(
    per_token: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    mode: Mode,
    *,
    normaliser: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "batch time"]]:
    """Closed-form gradient of `aggregate`: each token's weight, m/Σm, m/(B Σ_t m), m/B or m/(B c)."""
    _, weights = _weights(floating("per_token", per_token), mask, mode, normaliser, axis_name)
    return (weights,)


def _weights(
    per_token: Array, mask: Array, mode: str, normaliser: float | None, axis_name: str | tuple[str, ...] | None
) -> tuple[Bool[Array, "batch time"], Float[Array, "batch time"]]:
    if per_token.ndim != 2:
        raise ValueError(f"per_token must be [batch, time], but has the shape {list(per_token.shape)}.")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, but is {mode!r}.")
    if (normaliser is not None) != (mode == "constant"):
        raise ValueError(f"normaliser is for the mode constant and needed there, but is {normaliser} for {mode}.")
    mask = checked_mask(mask, per_token.shape, of="per_token")
    real = mask.astype(per_token.dtype)

    def everywhere(count: Array) -> Array:
        return count if axis_name is None else jax.lax.psum(count, axis_name)

    rows = everywhere(jnp.asarray(per_token.shape[0], per_token.dtype))
    if mode == "token_mean":
        return mask, real / jnp.maximum(everywhere(real.sum()), 1)
    if mode == "sequence_mean":
        return mask, real / (jnp.maximum(rows, 1) * jnp.maximum(real.sum(axis=1, keepdims=True), 1))
    if mode == "constant":
        check_range(0, open_low=True, normaliser=normaliser)
        rows = rows * normaliser
    return mask, real / jnp.maximum(rows, jnp.finfo(real.dtype).tiny)
