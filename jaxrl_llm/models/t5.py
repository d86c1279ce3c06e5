"""T5 (Raffel et al. 2020) and its successors (v1.1, flan), from scratch: an encoder, and a decoder that reads from it.

A source makes it a language model: `lm, params = t5.start(weights, source, source_mask)` encodes the source once, and
what comes back goes into every decoder and objective of the library like any other model and its parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.language_model import Cache, Params
from jaxrl_llm.models.decoder import empty_slots, place
from jaxrl_llm.models.layers import KeyValue, recorded_weights
from jaxrl_llm.models.network import Network
from jaxrl_llm.models.t5_layers import T5Config, T5Decoder, T5Module
from jaxrl_llm.numerics import is_concrete

UNBOUNDED = 2**30  # tokens: positions are relative, and far ones alike, so that memory alone limits the context


class Given(NamedTuple):
    """The parameters of a `T5Given`: the decoder's, and what was computed once from the encoded source."""

    weights: Params  # a part of the T5's own tree
    cross: list[KeyValue]  # of each layer, [source, head, source_time, d_kv]
    mask: Bool[Array, "source source_time"]


class Started(NamedTuple):
    """A language model of the target given the source, and its parameters."""

    lm: T5Given
    params: Given


class AttentionMaps(NamedTuple):
    """How much each query looks at each key. Rows of queries that are padding are 0."""

    encoder: Float[Array, "layer source head source_time source_time"]
    decoder: Float[Array, "layer batch head target_time target_time"]
    cross: Float[Array, "layer batch head target_time source_time"]


@dataclasses.dataclass(frozen=True)
class T5(Network):
    """The encoder-decoder: `T5(T5Config(num_layers=2, ...))`; a `LanguageModel` once `start` has given it a source.

    Masks are false at padding, on either side; what stands there changes nothing elsewhere.
    """

    config: T5Config = dataclasses.field(default_factory=T5Config)

    def build(self, rngs: nnx.Rngs) -> T5Module:
        return T5Module(self.config, rngs=rngs)

    def encode(
        self,
        params: Params,
        source: Int[Array, "source time"],
        mask: Bool[Array, "source time"] | None = None,
    ) -> Float[Array, "source time width"]:
        """The encoder's last states; those at padding mean nothing.

        Raises:
            ValueError: for tokens or a mask that do not fit, or a source without tokens.
        """
        return self._encode(params, source, mask)

    def start(
        self,
        params: Params,
        source: Int[Array, "source time"],
        mask: Bool[Array, "source time"] | None = None,
    ) -> Started:
        """The language model p(target | source), and its parameters.

        Its sequences begin with `decoder_start_token_id`: the prompts are `decoder_prompts(batch)`, or these with
        forced tokens behind. Prompts may be a multiple of the sources; those of one source stand next to each other.
        The model is hashable and knows the number of sources, so that another source of the same shape compiles
        nothing. The parameters are differentiable with respect to all of `params`, encoder included: a loss is
        `loss(*t5.start(params, source, mask), ...)`.

        Raises:
            ValueError: as `encode` does.
        """
        self._check(source, mask)
        return Started(T5Given(self.config, source.shape[0]), _given(self, params, source, mask))

    def decoder_prompts(self, batch_size: int) -> Int[Array, "batch 1"]:
        """The start token, for each row."""
        return jnp.full((batch_size, 1), self.config.decoder_start_token_id, jnp.int32)

    def attention(
        self,
        params: Params,
        source: Int[Array, "source source_time"],
        target: Int[Array, "batch target_time"],
        *,
        source_mask: Bool[Array, "source source_time"] | None = None,
        target_mask: Bool[Array, "batch target_time"] | None = None,
    ) -> AttentionMaps:
        """The attention weights of every layer and head.

        A row sums to 1 over the keys that its query may look at (valid ones, in the decoder up to itself) and is
        exactly 0 elsewhere; the row of a query that is padding is 0.

        Args:
            target: what the decoder reads: the start token, then the target. Query t predicts token t + 1.

        Raises:
            ValueError: as `encode` does, and for rows that are no multiple of the sources.
        """
        encoder, decoder = [], []
        states = self._encode(params, source, source_mask, encoder)
        lm, given = T5Given(self.config, source.shape[0]), self._started(params, states, source_mask)
        lm.read(given, target, None, target_mask, decoder)
        return AttentionMaps(
            recorded_weights(encoder, source_mask),
            recorded_weights(decoder[0::2], target_mask),
            recorded_weights(decoder[1::2], target_mask),
        )

    def _encode(
        self, params: Params, source: Array, mask: Array | None, record: list[Array] | None = None
    ) -> Float[Array, "source time width"]:
        self._check(source, mask)
        module = self.merge(params)
        # Without padding all rows have the same positions, and share one bias.
        valid = jnp.ones((1, source.shape[1]), bool) if mask is None else mask
        positions = jnp.cumsum(valid, axis=1) - 1
        bias = module.encoder.bias(positions, positions)
        return module.encoder(module.shared(source), valid[:, None], bias, record=record)[0]

    def _started(self, params: Params, states: Array, mask: Array | None) -> Given:
        mask = jnp.ones(states.shape[:2], bool) if mask is None else mask
        weights = {name: value for name, value in params.items() if name != "encoder"}
        return Given(weights, self.merge(params).source_key_values(states), mask)

    def _check(self, source: Array, mask: Array | None) -> None:
        language_model.check_tokens(T5Given(self.config, 1), source, mask, name="source")
        if source.shape[1] == 0 or (mask is not None and is_concrete(mask) and not mask.any(axis=1).all()):
            raise ValueError("a source is empty: the decoder needs at least one token to look at.")

    def __getattr__(self, name: str) -> Any:
        """What a language model has and this has not."""
        if name in ("max_length", "min_prompt_length", "init_cache", "hidden", "logits", "apply"):
            raise AttributeError(
                f"T5 has no {name}, for without a source it is no language model: "
                "lm, params = t5.start(params, source, source_mask) makes one."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@functools.partial(jax.jit, static_argnums=0)
def _given(t5: T5, params: Params, source: Array, mask: Array | None) -> Given:
    return t5._started(params, t5._encode(params, source, mask), mask)


@dataclasses.dataclass(frozen=True)
class T5Given(Network, language_model.LanguageModel):
    """The target's language model of a T5 whose source is given: `T5.start` makes it, with its parameters.

    Rows are the sources in order, each as often as there are times more rows than sources. Under classifier-free
    guidance both prompts of a row are read with its source.
    """

    config: T5Config
    num_sources: int
    min_prompt_length = 1
    max_length = UNBOUNDED

    def build(self, rngs: nnx.Rngs) -> T5Decoder:
        return T5Decoder(self.config, rngs=rngs)

    def init(self, key: Array) -> Params:
        raise TypeError("the parameters of a T5Given come from its source: T5.start(params, source) gives them.")

    def init_cache(self, batch_size: int, max_length: int, *, dtype: Any = jnp.float32) -> Cache:
        """Slots for the decoder's own keys and values, and which source each row reads.

        Raises:
            ValueError: if the rows are no multiple of the sources.
        """
        config = self.config
        slots = empty_slots(config.decoder_layers, batch_size, config.num_heads, max_length, config.d_kv, dtype)
        return Cache(*slots, given=self._sources(batch_size))

    def hidden(
        self,
        params: Given,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """As the protocol says; where the model scales its outputs, the hidden states are the scaled ones."""
        return self.read(params, tokens, cache, mask)

    def logits(self, params: Given, hidden: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        return self.merge(params.weights).unembed(hidden)

    def read(
        self,
        params: Given,
        tokens: Int[Array, "batch time"],
        cache: Cache | None,
        mask: Bool[Array, "batch time"] | None,
        record: list[Array] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """`hidden`; the attention weights, self and cross in turn, are appended to `record` where it is given."""
        language_model.check_tokens(self, tokens, mask, cache)
        source = self._source_of(params, tokens.shape[0], cache)
        # Without padding and cache all rows have the same positions, and share one bias.
        shared = mask is None and cache is None
        mask = jnp.ones((1 if shared else tokens.shape[0], tokens.shape[1]), bool) if mask is None else mask
        at = place(mask, cache)
        module, memory = self.merge(params.weights), None if cache is None else cache.memory
        bias = module.decoder.bias(at.positions, at.slots)
        hidden, memory = module.decoder(module.shared(tokens), at.allowed, bias, memory, at.start, source, record)
        return hidden * module.scale, None if cache is None else dataclasses.replace(at.cache, memory=memory)

    def _source_of(self, params: Given, batch: int, cache: Cache | None) -> tuple[list[KeyValue], Array]:
        """Each row's keys and values of its source, of every layer, and which of them it may look at."""
        rows = self._sources(batch) if cache is None else cache.given
        cross, mask = params.cross, params.mask
        if cache is not None or batch != self.num_sources:
            cross, mask = jax.tree.map(lambda leaf: leaf[rows], (cross, mask))
        return cross, mask[:, None]

    def _sources(self, batch: int) -> Int[Array, "batch"]:
        if batch % self.num_sources:
            raise ValueError(
                f"{batch} rows cannot be shared out among {self.num_sources} sources: there must be as many "
                "for each source (and for a search of one prompt, one source)."
            )
        return jnp.repeat(jnp.arange(self.num_sources), batch // self.num_sources)
