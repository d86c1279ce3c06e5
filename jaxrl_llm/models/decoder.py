"""What every decoder-only transformer shares: the pure-function shell around its NNX module."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.language_model import Cache, Params

KINDS = {  # of a configuration's fields: numpy's numbers count, but True is no number
    "int": ("a positive integer", lambda value: isinstance(value, numbers.Integral) and value > 0),
    "float": ("a finite number, 0 or above", lambda value: isinstance(value, numbers.Real) and 0 <= value < math.inf),
    "bool": ("true or false", lambda value: isinstance(value, bool | np.bool_)),
    "str": ("a name", lambda value: isinstance(value, str)),
}


def check_config(config: Any) -> None:
    """Raise for a field of a configuration that is not what its annotation says, naming it."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type.removesuffix(" | None")
        if kind not in KINDS or (value is None and kind != field.type):
            continue
        expected, fits = KINDS[kind]
        if not fits(value) or (isinstance(value, bool) and kind != "bool"):
            raise ValueError(f"{field.name} must be {expected}, but is {value!r}.")


@dataclasses.dataclass(frozen=True)
class DecoderLM(language_model.LanguageModel):
    """A causal transformer behind the `LanguageModel` protocol: `config` is all its state.

    `nnx.split` of the abstract module, once, gives the static graph; `hidden` and `logits` merge it with the
    parameters, which costs nothing under `jit`.
    """

    config: Any
    min_prompt_length = 1

    # What a model says of itself -------------------------------------------------------------------------------------

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The NNX module: `module(tokens, positions, allowed, memory, start) -> hidden, memory` and `.unembed`."""

    @property
    @abc.abstractmethod
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, key-value heads, head dimension)."""

    # The protocol ----------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def init(self, key: Array) -> Params:
        return nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1])

    def init_cache(self, batch_size: int, max_length: int, *, dtype: Any = jnp.float32) -> Cache:
        layers, heads, head_dim = self.cache_shape
        shape = (batch_size, heads, max_length, head_dim)
        memory = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]
        return Cache(memory, jnp.zeros((batch_size, max_length), bool), jnp.zeros((), jnp.int32))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        language_model.check_tokens(self, tokens, mask, cache)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        time = jnp.arange(tokens.shape[1])
        positions = jnp.cumsum(mask, axis=1) - 1
        if cache is None:
            allowed = mask[:, None, :] & (time[None, :] <= time[:, None])
            memory = start = None
        else:
            start, memory = cache.length, cache.memory
            positions += cache.valid.sum(axis=1, keepdims=True)
            cache = cache.append(mask)
            allowed = cache.valid[:, None, :] & (jnp.arange(cache.max_length) <= start + time[:, None])
        module = nnx.merge(self._graph, params)
        hidden, memory = module(tokens, jnp.maximum(positions, 0), allowed, memory, start)
        return hidden, None if cache is None else dataclasses.replace(cache, memory=memory)

    def logits(self, params: Params, hidden: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        return nnx.merge(self._graph, params).unembed(hidden)

    # -----------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))

    @property
    def _graph(self) -> nnx.GraphDef:
        return self._split[0]

    @property
    def abstract_params(self) -> Params:
        """The parameters' shapes and dtypes, without the parameters."""
        return nnx.to_pure_dict(self._split[1])

    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))
