"""Log-probabilities of tokens and sequences under logits, and entropy, in nats.

The fused form of a large vocabulary goes over it in chunks: neither forward nor backward ever holds [places, vocab].
Trainers use `scoring.log_probs` instead, which goes over the *positions* in chunks, for the same memory: it takes any
model's logits, also those with a bias or a soft cap, where the fused form needs them to be `hidden @ unembedding.T`.
The forward pass is an online log Σ exp over the chunks. The backward pass recomputes the logits of each chunk: four
matrix products where the plain form has three, with the memory of one chunk.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.numerics import log_softmax, violated
from jaxrl_llm.objectives.objective import objective


@objective
def token_log_probs(logits: Float[Array, "*places vocab"], tokens: Int[Array, "*places"]) -> Float[Array, "*places"]:
    """Log-probability of each token under the logits at its place, in nats.

        log p(y) = z_y − log Σ_v exp z_v

    Shift before the call: the logits that predict token t are at place t − 1. Computed in float32 or wider, also for
    bfloat16 logits. A `-inf` logit gives probability 0, and its token the log-probability `-inf`, as every token of a
    row that is all `-inf` has. Gradients stay finite there.

    Raises:
        ValueError: if the shapes do not match, the dtypes are not floating and integer, or a token is outside the
            vocabulary. (Under `jit` tokens cannot be read: there such a token has the log-probability NaN.)
    """
    outside = _outside(tokens, logits.shape[-1])
    return jnp.where(outside, jnp.nan, _of_tokens(logits, jnp.where(outside, 0, tokens)))


@token_log_probs.gradient
def _(logits, tokens):
    """1[v = y] − p_v, with respect to the logits."""
    chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
    unusable = _outside(tokens, logits.shape[-1]) | (logits == -jnp.inf).all(axis=-1)
    return jnp.where(unusable[..., None], 0, chosen - jnp.exp(log_softmax(logits)))


@jax.custom_jvp
def _of_tokens(logits: Array, tokens: Array) -> Array:
    """`token_log_probs` of tokens of the vocabulary. The derivative is one pass over the logits, without a scatter."""
    largest, log_normaliser, empty = _normaliser(logits)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return jnp.where(empty, -jnp.inf, chosen - largest - log_normaliser)[..., 0]


@_of_tokens.defjvp
def _of_tokens_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    logits, tokens = primals
    largest, log_normaliser, empty = _normaliser(logits)
    chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
    derivative = jnp.where(empty, 0, chosen - jnp.exp(logits - largest - log_normaliser))
    return _of_tokens(logits, tokens), (derivative * tangents[0]).sum(axis=-1)


def _normaliser(logits: Array) -> tuple[Array, Array, Bool[Array, "... 1"]]:
    """max z (0 in a row that is all `-inf`), log Σ_v exp(z_v − max z), and those rows.

    Subtracted one after the other they cost no digits where all logits have a large offset.
    """
    largest = logits.max(axis=-1, keepdims=True)
    empty = largest == -jnp.inf
    largest = jnp.where(empty, 0, largest)
    return largest, jnp.log(jnp.exp(logits - largest).sum(axis=-1, keepdims=True)), empty


def _outside(tokens: Array, vocab_size: int) -> Bool[Array, "..."]:
    """Return the tokens outside the vocabulary: none, or a ValueError, where they can be read."""
    outside = (tokens < 0) | (tokens >= vocab_size)
    if violated(~outside):
        raise ValueError(f"tokens must lie in [0, {vocab_size}), but one is {tokens[outside][0]}.")
    return outside


@objective
def sequence_log_prob(
    logits: Float[Array, "*batch time vocab"],
    tokens: Int[Array, "*batch time"],
    mask: Bool[Array, "*batch time"] | None = None,
) -> Float[Array, "*batch"]:
    """Log-probability of each sequence, the sum over its real tokens (EOS among them), in nats.

        log p(y_1 … y_T) = Σ_t mask_t log p(y_t | y_<t)

    Args:
        mask: the tokens that count; masked entries may hold anything, `-inf` and tokens outside the vocabulary too.

    Raises:
        ValueError: as `token_log_probs`, or if the mask does not match.
    """
    return jnp.where(mask, token_log_probs(logits, jnp.where(mask, tokens, 0)), 0).sum(axis=-1)


@sequence_log_prob.gradient
def _(logits, tokens, mask):
    """mask_t (1[v = y_t] − p_tv), with respect to the logits."""
    (per_token,) = token_log_probs.grad(logits, jnp.where(mask, tokens, 0))
    return jnp.where(mask[..., None], per_token, 0)


@objective(widen=False)
def fused_token_log_probs(
    hidden: Float[Array, "*places width"],
    unembedding: Float[Array, "vocab width"],
    tokens: Int[Array, "*places"],
    *,
    chunk_size: int | None = None,
) -> Float[Array, "*places"]:
    """`token_log_probs` of the logits `hidden @ unembedding.T`, which are never held as [batch, time, vocab].

    Neither the value nor the gradient holds more of the vocabulary than `chunk_size` tokens at once. Matrix products
    accumulate in float32 or wider, also for bfloat16 inputs. Apply a temperature, or T5's d^−½, to `hidden` first.

    Args:
        chunk_size: tokens of the vocabulary at once; by default as many as make a chunk of 4 MiB. An integer, static.

    Hidden states must be finite, also where a mask follows: 0 · NaN would reach the unembedding's gradient. Only
    reverse mode is defined.

    Raises:
        ValueError: if the shapes do not match, the dtypes are not floating and integer, or a token is outside the
            vocabulary. (Under `jit` tokens cannot be read: there such a token has the log-probability NaN.)
    """
    arrays, size, outside = _flat(hidden, unembedding, tokens, chunk_size)
    return jnp.where(outside, jnp.nan, _chunked(*arrays, size).reshape(outside.shape))


@fused_token_log_probs.gradient
def _(hidden, unembedding, tokens, *, chunk_size):
    """(W[y_t] − Σ_v p_tv W_v at each place t, Σ_t (1[v = y_t] − p_tv) h_t for each row W_v)."""
    arrays, size, outside = _flat(hidden, unembedding, tokens, chunk_size)
    log_probs, residuals = _chunked_forward(*arrays, size)
    used = jnp.where(outside.reshape(-1), 0, jnp.ones_like(log_probs))
    of_hidden, of_unembedding = _chunked_gradients(*residuals, used, size)
    return of_hidden.reshape(hidden.shape), of_unembedding


def _flat(hidden: Array, unembedding: Array, tokens: Array, chunk_size: int | None) -> tuple:
    """The three arrays as [place, width], [vocab, width], [place]; the chunk size; and the tokens outside."""
    outside = _outside(tokens, unembedding.shape[0])
    size = _chunk_size(tokens.size, unembedding.shape[0]) if chunk_size is None else operator.index(chunk_size)
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {size}.")
    rows = jnp.where(outside, 0, tokens).reshape(-1)
    return (hidden.reshape(-1, hidden.shape[-1]), unembedding, rows), min(size, unembedding.shape[0]), outside


@objective
def entropy(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """Entropy of the next-token distribution, in nats.

        H = −Σ_v p_v log p_v,   p = softmax(logits)

    A `-inf` logit adds nothing, and a row that is all `-inf` has the entropy 0.
    """
    p, log_p = _distribution(logits)
    return -(p * log_p).sum(axis=-1)


@entropy.gradient
def _(logits):
    """−p_v (log p_v + H)."""
    p, log_p = _distribution(logits)
    return -p * (log_p + entropy(logits)[..., None])


def _distribution(logits: Array) -> tuple[Array, Array]:
    """p and log p, both 0 where p = 0."""
    log_p = log_softmax(logits)
    possible = log_p > -jnp.inf
    log_p = jnp.where(possible, log_p, 0)
    return jnp.where(possible, jnp.exp(log_p), 0), log_p


# The fused form, over chunks of the vocabulary ------------------------------------------------------------------------

CHUNK_ELEMENTS = 2**20  # of one chunk's logits: 4 MiB in float32
SMALLEST_CHUNK = 128  # below it the matrix products are too thin to be fast


def _chunk_size(places: int, vocab_size: int) -> int:
    """Number of vocabulary entries in one chunk."""
    return min(vocab_size, max(SMALLEST_CHUNK, CHUNK_ELEMENTS // max(1, places)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(
    hidden: Float[Array, "place width"],
    unembedding: Float[Array, "vocab width"],
    tokens: Int[Array, "place"],
    chunk_size: int,
) -> Float[Array, "place"]:
    """log p of each token under the logits `hidden @ unembedding.T`; accumulated in float32 or wider."""
    return _chunked_forward(hidden, unembedding, tokens, chunk_size)[0]


def _chunked_forward(
    hidden: Array, unembedding: Array, tokens: Array, chunk_size: int
) -> tuple[Array, tuple[Array, ...]]:
    """The log-probabilities, and the residuals of the backward pass: the inputs, max z and log Σ_v exp(z_v − max z).

    The chosen logit is read from the same matrix product as the others, so that no log-probability is above 0.
    """
    dtype = _wide(hidden, unembedding)

    def read(carry: tuple[Array, Array, Array], rows: Array, start: Any) -> tuple[Array, Array, Array]:
        largest, total, chosen = carry
        logits = _matmul("nd,vd->nv", hidden, rows)
        new = jnp.maximum(largest, logits.max(axis=-1))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(axis=-1)
        place = tokens - start
        there = jnp.take_along_axis(logits, jnp.clip(place, 0, rows.shape[0] - 1)[:, None], axis=-1)[:, 0]
        return new, total, jnp.where((place >= 0) & (place < rows.shape[0]), there, chosen)

    nothing = jnp.full(tokens.shape, jnp.finfo(dtype).min, dtype), *[jnp.zeros(tokens.shape, dtype)] * 2
    largest, total, chosen = _over_chunks(read, nothing, unembedding, chunk_size)
    log_normaliser = jnp.log(total)
    return (chosen - largest) - log_normaliser, (hidden, unembedding, tokens, largest, log_normaliser)


def _chunked_backward(chunk_size: int, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    return *_chunked_gradients(*residuals, cotangent, chunk_size), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunked_gradients(
    hidden: Float[Array, "place width"],
    unembedding: Float[Array, "vocab width"],
    tokens: Int[Array, "place"],
    largest: Float[Array, "place"],
    log_normaliser: Float[Array, "place"],
    cotangent: Float[Array, "place"],
    chunk_size: int,
) -> tuple[Float[Array, "place width"], Float[Array, "vocab width"]]:
    """Gradients of Σ_t c_t log p_t: c_t (W[y_t] − Σ_v p_tv W_v) for h_t, Σ_t c_t (1[v = y_t] − p_tv) h_t for W_v."""
    dtype = _wide(hidden, unembedding)

    def read(carry: tuple[Array, Array], rows: Array, start: Any) -> tuple[Array, Array]:
        of_hidden, of_unembedding = carry
        logits = _matmul("nd,vd->nv", hidden, rows)
        probabilities = jnp.exp(logits - largest[:, None] - log_normaliser[:, None])
        chosen = jnp.arange(rows.shape[0]) + start == tokens[:, None]
        of_logits = (cotangent[:, None] * (chosen - probabilities)).astype(rows.dtype)
        of_hidden = of_hidden + _matmul("nv,vd->nd", of_logits, rows)
        of_rows = _matmul("nv,nd->vd", of_logits, hidden).astype(rows.dtype)
        return of_hidden, jax.lax.dynamic_update_slice_in_dim(of_unembedding, of_rows, start, axis=0)

    nothing = jnp.zeros(hidden.shape, dtype), jnp.zeros_like(unembedding)
    of_hidden, of_unembedding = _over_chunks(read, nothing, unembedding, chunk_size)
    return of_hidden.astype(hidden.dtype), of_unembedding


def _over_chunks(read: Callable[..., Any], carry: Any, unembedding: Array, chunk_size: int) -> Any:
    """Fold `read(carry, rows, start)` over the vocabulary; a last, shorter chunk is read by itself, without padding."""
    whole, rest = divmod(unembedding.shape[0], chunk_size)

    def step(index: Array, carry: Any) -> Any:
        start = index * chunk_size
        return read(carry, jax.lax.dynamic_slice_in_dim(unembedding, start, chunk_size, axis=0), start)

    carry = jax.lax.fori_loop(0, whole, step, carry)
    return read(carry, unembedding[whole * chunk_size :], whole * chunk_size) if rest else carry


def _matmul(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=_wide(left, right))


def _wide(*arrays: Array) -> jnp.dtype:
    return jnp.result_type(*arrays, jnp.float32)
