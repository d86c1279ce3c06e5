"""Log-probabilities of tokens and sequences under logits, and entropy, in nats."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.numerics import checked_mask, floating, log_softmax, violated
from jaxrl_llm.objectives import fused


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
    logits, tokens = floating("logits", logits, ndim=1), jnp.asarray(tokens)
    outside = _outside(tokens, logits.shape[-1], logits.shape[:-1], of="logits without the vocabulary")
    return jnp.where(outside, jnp.nan, _of_tokens(logits, jnp.where(outside, 0, tokens)))


@jax.custom_jvp
def _of_tokens(logits: Array, tokens: Array) -> Array:
    """`token_log_probs` of tokens of the vocabulary. The derivative is one pass over the logits, without a scatter."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(log_normaliser == -jnp.inf, -jnp.inf, chosen - log_normaliser)


@_of_tokens.defjvp
def _of_tokens_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    logits, tokens = primals
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    empty = log_normaliser == -jnp.inf
    chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
    derivative = jnp.where(empty, 0, chosen - jnp.exp(logits - jnp.where(empty, 0, log_normaliser)))
    return _of_tokens(logits, tokens), (derivative * tangents[0]).sum(axis=-1)


def token_log_probs_grad(
    logits: Float[Array, "*batch time vocab"], tokens: Int[Array, "*batch time"]
) -> tuple[Float[Array, "*batch time vocab"]]:
    """Closed-form gradient of `token_log_probs` with respect to the logits: 1[v = y] − p_v."""
    logits, tokens = floating("logits", logits, ndim=1), jnp.asarray(tokens)
    outside = _outside(tokens, logits.shape[-1], logits.shape[:-1], of="logits without the vocabulary")
    chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
    unusable = outside | (logits == -jnp.inf).all(axis=-1)
    return (jnp.where(unusable[..., None], 0, chosen - jnp.exp(log_softmax(logits))),)


def sequence_log_prob(
    logits: Float[Array, "*batch time vocab"],
    tokens: Int[Array, "*batch time"],
    mask: Bool[Array, "*batch time"] | None = None,
) -> Float[Array, "*batch"]:
    """Log-probability of each sequence, the sum over its real tokens (EOS among them), in nats.

        log p(y_1 … y_T) = Σ_t mask_t log p(y_t | y_<t)

    Args:
        mask: which tokens count; what it hides may be anything, `-inf` and tokens outside the vocabulary too.

    Raises:
        ValueError: as `token_log_probs`, or if the mask does not match.
    """
    tokens = jnp.asarray(tokens)
    mask = checked_mask(mask, tokens.shape, of="tokens")
    per_token = token_log_probs(logits, jnp.where(mask, tokens, 0))
    return jnp.where(mask, per_token, 0).sum(axis=-1)


def sequence_log_prob_grad(
    logits: Float[Array, "*batch time vocab"],
    tokens: Int[Array, "*batch time"],
    mask: Bool[Array, "*batch time"] | None = None,
) -> tuple[Float[Array, "*batch time vocab"]]:
    """Closed-form gradient of `sequence_log_prob` with respect to the logits: mask_t (1[v = y_t] − p_tv)."""
    tokens = jnp.asarray(tokens)
    mask = checked_mask(mask, tokens.shape, of="tokens")
    (per_token,) = token_log_probs_grad(logits, jnp.where(mask, tokens, 0))
    return (jnp.where(mask[..., None], per_token, 0),)


def fused_token_log_probs(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    tokens: Int[Array, "*batch time"],
    *,
    chunk_size: int | None = None,
) -> Float[Array, "*batch time"]:
    """`token_log_probs` of the logits `hidden @ unembedding.T`, which are never held as [batch, time, vocab].

    Neither the value nor the gradient holds more of the vocabulary than `chunk_size` tokens at once. Products of
    matrices accumulate in float32 or wider, also for bfloat16 inputs. A temperature, or T5's d^−½, is the caller's to
    put on `hidden`.

    Args:
        chunk_size: tokens of the vocabulary at once; by default as many as make a chunk of 4 MiB. An integer, static.

    Hidden states must be finite, also where a mask follows: 0 · NaN would reach the unembedding's gradient. Only
    reverse mode is defined.

    Raises:
        ValueError: if the shapes do not match, the dtypes are not floating and integer, or a token is outside the
            vocabulary. (Under `jit` tokens cannot be read: there such a token has the log-probability NaN.)
    """
    flat, size, outside = _fused_inputs(hidden, unembedding, tokens, chunk_size)
    log_probs = fused.log_probs(*flat, size).reshape(outside.shape)
    return jnp.where(outside, jnp.nan, log_probs)


def fused_token_log_probs_grad(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    tokens: Int[Array, "*batch time"],
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "*batch time width"], Float[Array, "vocab width"]]:
    """Closed-form gradient of `fused_token_log_probs`, for the unembedding summed over all places t.

    ∂/∂h_t = W[y_t] − Σ_v p_tv W_v,      ∂/∂W_v = Σ_t (1[v = y_t] − p_tv) h_t
    """
    flat, size, outside = _fused_inputs(hidden, unembedding, tokens, chunk_size)
    log_probs, residuals = fused.forward(*flat, size)
    used = jnp.where(outside.reshape(-1), 0, jnp.ones_like(log_probs))
    of_hidden, of_unembedding = fused.gradients(*residuals, used, size)
    return of_hidden.reshape(jnp.shape(hidden)), of_unembedding


def _fused_inputs(hidden: Array, unembedding: Array, tokens: Array, chunk_size: int | None) -> tuple:
    """The three arrays as [place, width], [vocab, width], [place]; the chunk; and which tokens lie outside."""
    hidden, unembedding, tokens = jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(tokens)
    floating("hidden", hidden, ndim=1), floating("unembedding", unembedding, ndim=2)
    if unembedding.ndim != 2 or unembedding.shape[1] != hidden.shape[-1]:
        raise ValueError(f"unembedding must be [vocab, {hidden.shape[-1]}], but is {list(unembedding.shape)}.")
    outside = _outside(tokens, unembedding.shape[0], hidden.shape[:-1], of="hidden without the width")
    size = fused.chunk_size_for(tokens.size, unembedding.shape[0]) if chunk_size is None else operator.index(chunk_size)
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {size}.")
    rows = jnp.where(outside, 0, tokens).reshape(-1)
    return (hidden.reshape(-1, hidden.shape[-1]), unembedding, rows), min(size, unembedding.shape[0]), outside


def entropy(logits: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    """Entropy of the next-token distribution, in nats.

        H = −Σ_v p_v log p_v,   p = softmax(logits)

    A `-inf` logit adds nothing, and a row that is all `-inf` has the entropy 0.

    Raises:
        ValueError: if the logits are not floating or have no vocabulary axis.
    """
    log_probs, possible = _law(logits)
    return -(jnp.where(possible, jnp.exp(log_probs), 0) * log_probs).sum(axis=-1)


def entropy_grad(logits: Float[Array, "... vocab"]) -> tuple[Float[Array, "... vocab"]]:
    """Closed-form gradient of `entropy`: −p_v (log p_v + H)."""
    log_probs, possible = _law(logits)
    return (jnp.where(possible, -jnp.exp(log_probs) * (log_probs + entropy(logits)[..., None]), 0),)


def _law(logits: Array) -> tuple[Array, Array]:
    """log p, with 0 in place of `-inf`, and where p > 0."""
    log_probs = log_softmax(floating("logits", logits, ndim=1))
    possible = log_probs > -jnp.inf
    return jnp.where(possible, log_probs, 0), possible


def _outside(tokens: Array, vocab_size: int, shape: tuple[int, ...], *, of: str) -> Bool[Array, "..."]:
    """Return which tokens lie outside the vocabulary: none, or a ValueError, where they can be read."""
    tokens = jnp.asarray(tokens)
    if tokens.shape != shape:
        raise ValueError(f"tokens must have the shape of {of}, {list(shape)}, but have {list(tokens.shape)}.")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, but are {tokens.dtype}.")
    outside = (tokens < 0) | (tokens >= vocab_size)
    if violated(~outside):
        raise ValueError(f"tokens must lie in [0, {vocab_size}), but one is {tokens[outside][0]}.")
    return outside
