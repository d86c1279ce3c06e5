"""What every causal transformer shares: where tokens stand, what they may look at, and the protocol around it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.language_model import Cache, Params
from jaxrl_llm.models.layers import KeyValue, recorded_weights
from jaxrl_llm.models.network import Network


class Placed(NamedTuple):
    """Where the tokens of a call stand, and what they may look at."""

    positions: Int[Array, "batch time"]  # valid tokens before each
    slots: Int[Array, "batch slot"]  # the position of what stands in each slot; without a cache, `positions`
    allowed: Bool[Array, "batch time slot"]
    start: Int[Array, ""] | None  # the slot of the first token; None without a cache
    cache: Cache | None  # with the tokens' slots claimed


def place(mask: Bool[Array, "batch time"], cache: Cache | None) -> Placed:
    """Places for tokens of which `mask` says which are valid: valid ones see valid ones up to themselves."""
    time = jnp.arange(mask.shape[1])
    positions = jnp.cumsum(mask, axis=1) - 1
    if cache is None:
        allowed = mask[:, None, :] & (time[None, :] <= time[:, None])
        positions = jnp.maximum(positions, 0)
        return Placed(positions, positions, allowed, None, None)
    start = cache.length
    positions += cache.valid.sum(axis=1, keepdims=True)
    cache = cache.append(mask)
    allowed = cache.valid[:, None, :] & (jnp.arange(cache.max_length) <= start + time[:, None])
    slots = jnp.cumsum(cache.valid, axis=1) - 1
    return Placed(jnp.maximum(positions, 0), slots, allowed, start, cache)


def checkpointed(block: nnx.Module) -> Callable[..., tuple[Array, KeyValue]]:
    """The block without a cache, computed anew for the gradient; what it would have cached is not kept."""

    def forward(x: Array, *places: Array) -> Array:
        return block(x, *places, None, None, None)[0]

    return lambda x, *places: (jax.checkpoint(forward)(x, *places), None)


def empty_slots(
    layers: int, batch_size: int, heads: int, max_length: int, head_dim: int, dtype: Any
) -> tuple[list[KeyValue], Bool[Array, "batch slot"], Int[Array, ""]]:
    """Of a cache in which nothing is written: its memory, `valid` and `length`."""
    shape = (batch_size, heads, max_length, head_dim)
    memory = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]
    return memory, jnp.zeros((batch_size, max_length), bool), jnp.zeros((), jnp.int32)


@dataclasses.dataclass(frozen=True)
class DecoderLM(Network, language_model.LanguageModel):
    """A causal transformer behind the `LanguageModel` protocol.

    With `checkpoint_blocks` a gradient keeps what stands between the blocks, and computes what is inside of each anew:
    less memory for a second forward pass (Chen et al. 2016). Values are the same; a cache is not concerned.
    """

    checkpoint_blocks: bool = False
    min_prompt_length = 1

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The NNX module: `module(tokens, positions, allowed, memory, start, record) -> hidden, memory`; `.unembed`."""

    @property
    @abc.abstractmethod
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, key-value heads, head dimension)."""

    def init_cache(self, batch_size: int, max_length: int, *, dtype: Any = jnp.float32) -> Cache:
        layers, heads, head_dim = self.cache_shape
        return Cache(*empty_slots(layers, batch_size, heads, max_length, head_dim, dtype))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        return self._read(params, tokens, cache, mask)

    def attention(
        self, params: Params, tokens: Int[Array, "batch time"], *, mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "layer batch head query key"]:
        """The attention weights of every layer and head: how much each token looks at each.

        The row of a valid query sums to 1 over the valid keys up to itself and is exactly 0 elsewhere; the row of a
        query that is padding is 0.
        """
        record = []
        self._read(params, tokens, None, mask, record)
        return recorded_weights(record, mask)

    def _read(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None,
        mask: Bool[Array, "batch time"] | None,
        record: list[Array] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        language_model.check_tokens(self, tokens, mask, cache)
        at = place(jnp.ones(tokens.shape, bool) if mask is None else mask, cache)
        memory = None if cache is None else cache.memory
        hidden, memory = self.merge(params)(tokens, at.positions, at.allowed, memory, at.start, record)
        return hidden, None if cache is None else dataclasses.replace(at.cache, memory=memory)

    def logits(self, params: Params, hidden: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        return self.merge(params).unembed(hidden)
