"""Log-probabilities of tokens under logits, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def wide(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """In float32 or wider, as log-probabilities always are."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def token_log_probs(
    logits: Float[Array, "*batch time vocab"], tokens: Int[Array, "*batch time"]
) -> Float[Array, "*batch time"]:
    """Log-probability of each token under the logits at its place, in nats.

        log p(y) = z_y − log Σ_v exp z_v

    Shift before the call: the logits that predict token t stand at token t − 1. Computed in float32 or wider, also for
    bfloat16 logits; `-inf` logits give probability 0, and a token that has it the log-probability `-inf`, as has every
    token of a row that is all `-inf`. Gradients stay finite there.

    Raises:
        ValueError: if the shapes do not match, the dtypes are not floating and integer, or a token is outside the
            vocabulary. (Under `jit` tokens cannot be read: there such a token has the log-probability NaN.)
    """
    if logits.ndim < 1 or tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens must have the shape of logits without the vocabulary, {list(logits.shape[:-1])}, "
            f"but have {list(tokens.shape)}."
        )
    if not (jnp.issubdtype(logits.dtype, jnp.floating) and jnp.issubdtype(tokens.dtype, jnp.integer)):
        raise ValueError(f"logits must be floating and tokens integer, but are {logits.dtype} and {tokens.dtype}.")
    outside = (tokens < 0) | (tokens >= logits.shape[-1])
    if not isinstance(outside, jax.core.Tracer) and outside.any():
        raise ValueError(f"tokens must lie in [0, {logits.shape[-1]}), but one is {tokens[outside][0]}.")
    logits = wide(logits)
    empty = (logits == -jnp.inf).all(axis=-1)
    logits = jnp.where(empty[..., None], 0, logits)  # inside, so that the gradient is finite too
    chosen = jnp.take_along_axis(logits, jnp.where(outside, 0, tokens)[..., None], axis=-1)[..., 0]
    log_probs = jnp.where(empty, -jnp.inf, chosen - jax.nn.logsumexp(logits, axis=-1))
    return jnp.where(outside, jnp.nan, log_probs)
