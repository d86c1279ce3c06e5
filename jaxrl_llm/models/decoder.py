"""The base of every neural model, and that of causal transformers: configuration, parameters, positions, cache."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.language_model import Cache, Params
from jaxrl_llm.mesh import over_rows
from jaxrl_llm.models.layers import KeyValue, check_form, recorded_weights

TokenId = int  # annotates token ids in a configuration, which may be 0
KINDS = {  # of a configuration's fields; numpy's numbers are accepted, True is not a number
    "int": ("a positive integer", lambda value: isinstance(value, numbers.Integral) and value > 0),
    "TokenId": ("a token id, 0 or above", lambda value: isinstance(value, numbers.Integral) and value >= 0),
    "float": ("a finite number, 0 or above", lambda value: isinstance(value, numbers.Real) and 0 <= value < math.inf),
    "bool": ("true or false", lambda value: isinstance(value, bool | np.bool_)),
    "Count": ("an integer, 0 or above", lambda value: isinstance(value, numbers.Integral) and value >= 0),
    "tuple": ("a list", lambda value: isinstance(value, list | tuple)),
    "dict": ("an object", lambda value: isinstance(value, Mapping)),
    "str": ("a name", lambda value: isinstance(value, str)),
}


def check_value(name: str, value: Any, kind: str) -> None:
    """Raise ValueError unless the value of a field is of a kind of `KINDS`."""
    expected, fits = KINDS[kind]
    if not fits(value) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{name} must be {expected}, but is {value!r}.")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless the value of a field is one of the known names."""
    if value not in list(known):
        raise ValueError(f"{name} must be one of {', '.join(known)}, but is {value!r}.")


def check_multiple(name: str, value: int, other: str, divisor: int) -> None:
    """Raise ValueError unless the value of a field is a multiple of that of another one."""
    if value % divisor:
        raise ValueError(f"{name} must be a multiple of {other}, but they are {value} and {divisor}.")


def check_config(config: Any) -> None:
    """Raise ValueError for the first field of a configuration that does not fit its annotation."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type.removesuffix(" | None")
        if kind in KINDS and (value is not None or kind == field.type):
            check_value(field.name, value, kind)


@dataclasses.dataclass(frozen=True)
class Network(abc.ABC):
    """An NNX module as pure functions: `config` is its whole state, its parameters are a plain nested dict.

    `nnx.split` of the abstract module gives the static graph once; merging it with parameters is free under `jit`.
    """

    config: Any

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs | None) -> nnx.Module:
        """Return the NNX module with random parameters; with zeros without `rngs`."""

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def init(self, key: Array) -> Params:
        """Return random parameters."""
        return nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1])

    def merge(self, params: Params) -> nnx.Module:
        """Return the module with these parameters."""
        return nnx.merge(self._split[0], params)

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self.build(None)))

    @property
    def abstract_params(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        return nnx.to_pure_dict(self._split[1])

    def num_params(self) -> int:
        """Return the number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))


def with_attention(model: Any, form: str) -> Any:
    """Return the model with this form of attention, one of `layers.FORMS`.

    Raises:
        ValueError: if it cannot have it.
    """
    if form == getattr(model, "attention_form", "exact"):
        return model
    if not isinstance(model, DecoderLM):
        raise ValueError(f'attention must be "exact" for a {type(model).__name__}, but is "{form}".')
    return dataclasses.replace(model, attention_form=form)


# Causal transformers --------------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """Positions and attention mask of the tokens of a call."""

    positions: Int[Array, "batch time"]  # number of valid tokens before each, in its segment
    slots: Int[Array, "batch slot"]  # position of the token in each slot; without a cache, `positions`
    attention_mask: Bool[Array, "batch time slot"]
    lengths: Int[Array, "batch #time"]  # number of valid tokens of each token's text; with a cache, the number of slots
    cache_index: Int[Array, ""] | None  # slot of the first token; None without a cache
    cache: Cache | None  # with the slots of the tokens reserved


def place(
    mask: Bool[Array, "batch time"], cache: Cache | None, segments: Int[Array, "batch time"] | None = None
) -> Placed:
    """Place tokens by their validity mask: valid tokens attend to valid tokens of their segment up to themselves."""
    time = jnp.arange(mask.shape[1])
    positions = jnp.cumsum(mask, axis=1) - 1
    if cache is None:
        attention_mask = mask[:, None, :] & (time[None, :] <= time[:, None])
        lengths = positions[:, -1:] + 1
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]
            starts = language_model.segment_starts(segments)
            positions -= jax.lax.cummax(jnp.where(starts, positions + 1 - mask, 0), axis=1)  # tokens before the segment
            attention_mask &= same
            lengths = (mask[:, None, :] & same).sum(axis=2)
        positions = jnp.maximum(positions, 0)
        return Placed(positions, positions, attention_mask, lengths, None, None)
    cache_index = cache.length
    positions += cache.valid.sum(axis=1, keepdims=True)
    cache = cache.append(mask)
    attention_mask = cache.valid[:, None, :] & (jnp.arange(cache.max_length) <= cache_index + time[:, None])
    slots = jnp.cumsum(cache.valid, axis=1) - 1
    lengths = jnp.full((mask.shape[0], 1), cache.max_length)  # of a row not known yet
    return Placed(jnp.maximum(positions, 0), slots, attention_mask, lengths, cache_index, cache)


def checkpointed(block: nnx.Module) -> Callable[..., tuple[Array, KeyValue]]:
    """Return the block under `jax.checkpoint`: recomputed in the backward pass, without a KV cache."""

    def forward(x: Array, *places: Array) -> Array:
        return block(x, *places)[0]

    return lambda x, *places: (jax.checkpoint(forward)(x, *places), None)


def empty_slots(
    layers: int, batch_size: int, heads: int, max_length: int, head_dim: int, dtype: Any
) -> tuple[list[KeyValue], Bool[Array, "batch slot"], Int[Array, ""]]:
    """Return memory, `valid` and `length` of an empty cache."""
    shape = (batch_size, heads, max_length, head_dim)
    kv_cache = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]
    kv_cache = over_rows(kv_cache, heads=True)
    return kv_cache, jnp.zeros((batch_size, max_length), bool), jnp.zeros((), jnp.int32)


@dataclasses.dataclass(frozen=True)
class DecoderLM(Network, language_model.LanguageModel):
    """A causal transformer as a `LanguageModel`.

    With `checkpoint_blocks` the backward pass keeps only the activations between blocks and recomputes those inside
    (Chen et al. 2016): less memory for a second forward pass, and equal values. Calls with a cache are unaffected.

    `attention_form` is one of `layers.FORMS`: "exact", or "cudnn", which holds no attention scores. The latter needs an
    NVIDIA GPU and parameters in bfloat16 or float16. It serves calls of several tokens, in training and of prompts;
    steps of one token and attention maps are computed in the exact form. It must not be batched by `jax.vmap`.

    Raises:
        ValueError: if the model or the device cannot have this form of attention.
    """

    checkpoint_blocks: bool = False
    attention_form: str = "exact"
    min_prompt_length = 1
    score_cap: ClassVar[float | None] = None

    def __post_init__(self):
        if self.attention_form != "exact":
            check_form(self.attention_form, head_dim=self.cache_shape[2], cap=self.score_cap)

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs | None) -> nnx.Module:
        """Return the NNX module, with a method `unembed` and

        module(tokens, placed, cache, intermediates) -> hidden, cache
        """

    @property
    @abc.abstractmethod
    def cache_shape(self) -> tuple[int, int, int]:
        """Return (layers, key-value heads, head dimension)."""

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
        segments: Int[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        return self._read(params, tokens, cache, mask, segments)

    def attention(
        self, params: Params, tokens: Int[Array, "batch time"], *, mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "layer batch head query key"]:
        """Return the attention weights of every layer and head.

        The row of a valid query sums to 1 over the valid keys up to itself and is exactly 0 elsewhere. The row of a
        query that is padding is 0.
        """
        intermediates = []
        self._read(params, tokens, None, mask, None, intermediates)
        return recorded_weights(intermediates, mask)

    def _read(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None,
        mask: Bool[Array, "batch time"] | None,
        segments: Int[Array, "batch time"] | None,
        intermediates: list[Array] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        language_model.check_tokens(self, tokens, mask, cache, segments=segments)
        at = place(jnp.ones(tokens.shape, bool) if mask is None else mask, cache, segments)
        kv_cache = None if cache is None else cache.memory
        hidden, kv_cache = self.merge(params)(tokens, at, kv_cache, intermediates)
        return hidden, None if cache is None else dataclasses.replace(at.cache, memory=kv_cache)

    def logits(self, params: Params, hidden: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        return self.merge(params).unembed(hidden)
