"""Log-probabilities over a large vocabulary in chunks: forward and backward never hold [places, vocab].

The forward pass is an online log Σ exp over chunks of the vocabulary. The backward pass recomputes the logits of each
chunk: four matrix products where the plain form has three, with the memory of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_ELEMENTS = 2**20  # of one chunk's logits: 4 MiB in float32
SMALLEST_CHUNK = 128  # below it the matrix products are too thin to be fast


def chunk_size_for(places: int, vocab_size: int) -> int:
    """Number of vocabulary entries in one chunk."""
    return min(vocab_size, max(SMALLEST_CHUNK, CHUNK_ELEMENTS // max(1, places)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def log_probs(
    hidden: Float[Array, "place width"],
    unembedding: Float[Array, "vocab width"],
    tokens: Int[Array, "place"],
    chunk_size: int,
) -> Float[Array, "place"]:
    """log p of each token under the logits `hidden @ unembedding.T`; accumulated in float32 or wider."""
    return forward(hidden, unembedding, tokens, chunk_size)[0]


def forward(hidden: Array, unembedding: Array, tokens: Array, chunk_size: int) -> tuple[Array, tuple[Array, ...]]:
    """The log-probabilities, and the residuals of the backward pass: the inputs and log Σ_v exp z_v of each place."""
    dtype = _wide(hidden, unembedding)

    def read(carry: tuple[Array, Array], rows: Array, start: Any) -> tuple[Array, Array]:
        largest, total = carry
        logits = _matmul("nd,vd->nv", hidden, rows)
        new = jnp.maximum(largest, logits.max(axis=-1))
        return new, total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(axis=-1)

    nothing = jnp.full(tokens.shape, jnp.finfo(dtype).min, dtype), jnp.zeros(tokens.shape, dtype)
    largest, total = _over_chunks(read, nothing, unembedding, chunk_size)
    log_normaliser = largest + jnp.log(total)
    chosen = (hidden.astype(dtype) * unembedding[tokens].astype(dtype)).sum(axis=-1)
    return chosen - log_normaliser, (hidden, unembedding, tokens, log_normaliser)


def _backward(chunk_size: int, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    return *gradients(*residuals, cotangent, chunk_size), None


log_probs.defvjp(forward, _backward)


def gradients(
    hidden: Float[Array, "place width"],
    unembedding: Float[Array, "vocab width"],
    tokens: Int[Array, "place"],
    log_normaliser: Float[Array, "place"],
    cotangent: Float[Array, "place"],
    chunk_size: int,
) -> tuple[Float[Array, "place width"], Float[Array, "vocab width"]]:
    """Gradients of Σ_t c_t log p_t: c_t (W[y_t] − Σ_v p_tv W_v) for h_t, Σ_t c_t (1[v = y_t] − p_tv) h_t for W_v."""
    dtype = _wide(hidden, unembedding)

    def read(carry: tuple[Array, Array], rows: Array, start: Any) -> tuple[Array, Array]:
        of_hidden, of_unembedding = carry
        probabilities = jnp.exp(_matmul("nd,vd->nv", hidden, rows) - log_normaliser[:, None])
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
