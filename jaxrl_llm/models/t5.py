"""T5 (Raffel et al. 2020) and its kin (v1.1, flan, mT5, umT5), from scratch: an encoder, and a decoder that reads it.

A source makes it a language model: `lm, params = t5.start(weights, source, source_mask)` encodes the source once. Every
decoder and objective of the library accepts the result like any other model and its parameters.
Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.language_model import Cache, Params
from jaxrl_llm.mesh import over_rows
from jaxrl_llm.models.decoder import Network, TokenId, check_choice, check_config, empty_slots, place
from jaxrl_llm.models.layers import (
    ACTIVATIONS,
    Embedding,
    KeyValue,
    Linear,
    RMSNorm,
    attention,
    recorded_weights,
    write_slots,
)
from jaxrl_llm.numerics import is_concrete

MODEL_TYPES = ("t5", "mt5", "umt5")
UNBOUNDED = 2**30  # tokens: positions are relative and far ones share a bucket, so that only memory limits the context


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of a T5 `config.json` that change the function; the defaults are those of t5-small.

    mT5 (Xue et al. 2021) is T5 1.1 and never scales its outputs. umT5 (Chung et al. 2023) also has position biases of
    its own in every layer.
    """

    model_type: str = "t5"  # or mt5, umt5
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # default: num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # an activation, or "gated-" and one; "gated-gelu" means gelu_new
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = (
        None  # by d_model^(−1/2), before the unembedding; as tie_word_embeddings, in mt5 never
    )
    decoder_start_token_id: TokenId = 0

    def __post_init__(self):
        check_config(self)
        check_choice("model_type", self.model_type, MODEL_TYPES)
        if self.model_type == "mt5" and self.scale_decoder_outputs:
            raise ValueError("scale_decoder_outputs must be false in mt5, but is true.")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f'feed_forward_proj must be one of {known}, or "gated-" and one of them, '
                f"but is {self.feed_forward_proj!r}."
            )
        if self.relative_attention_num_buckets < 4:
            raise ValueError(
                f"relative_attention_num_buckets must be at least 4, but is {self.relative_attention_num_buckets}."
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                "relative_attention_max_distance must be above half of relative_attention_num_buckets, "
                f"but they are {self.relative_attention_max_distance} and {self.relative_attention_num_buckets}."
            )
        if self.decoder_start_token_id >= self.vocab_size:
            raise ValueError(
                f"decoder_start_token_id must lie in the vocabulary of {self.vocab_size}, "
                f"but is {self.decoder_start_token_id}."
            )

    @property
    def gated(self) -> bool:
        """Return True if the feed-forward layers multiply two projections."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """The name of the feed-forward layers' nonlinearity."""
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.removeprefix("gated-")

    @property
    def decoder_layers(self) -> int:
        """The number of the decoder's layers."""
        return self.num_decoder_layers or self.num_layers

    @property
    def output_scale(self) -> float:
        """Return the factor of the decoder's last states before the unembedding."""
        scaled = self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs
        return self.d_model**-0.5 if scaled and self.model_type != "mt5" else 1.0


def spelt_fields(config: dict[str, Any], tensor_names: Callable[[], set[str]]) -> dict[str, Any]:
    """Return the fields of a `config.json` that have more than one spelling.

    Before transformers 5, `tie_word_embeddings` decided over the head and its scale. Since then it is always true,
    `scale_decoder_outputs` decides over the scale of a T5, and the head is tied unless the files have a head that
    differs from the embedding. An mT5 has no scale. A umT5 has one, by its original, where it is said to be tied;
    transformers 5.23 scales every umT5 that it loads.
    """
    model_type, tied = config["model_type"], config.get("tie_word_embeddings")
    scaled = config.get("scale_decoder_outputs")
    tied = True if tied is None else tied
    values = {"tie_word_embeddings": tied, "scale_decoder_outputs": scaled}
    if scaled is None:
        values["scale_decoder_outputs"] = False if model_type == "mt5" else tied
    if tied is True and (model_type != "t5" or isinstance(scaled, bool)) and "lm_head.weight" in tensor_names():
        values["tie_word_embeddings"] = False
    if config.get("decoder_start_token_id") is None:
        values["decoder_start_token_id"] = config.get("pad_token_id") or 0
    projection, named = config.get("feed_forward_proj", "relu"), config.get("dense_act_fn")
    meant = "gelu_new" if projection == "gated-gelu" else str(projection).removeprefix("gated-")
    if named not in (None, meant):
        raise ValueError(f"feed_forward_proj is {projection!r}, but dense_act_fn is {named!r}.")
    return values


def written_fields(config: T5Config) -> dict[str, Any]:
    """Return what a `config.json` says beside the fields, or more plainly."""
    scaled = {"scale_decoder_outputs": config.output_scale != 1}
    return {"num_decoder_layers": config.decoder_layers, "is_encoder_decoder": True} | scaled


@functools.cache
def relative_buckets(*, num_buckets: int, max_distance: int, bidirectional: bool) -> Int[np.ndarray, "2*distance+1"]:
    """The bucket of each relative position (key − query) from −max_distance to max_distance.

    Of B buckets (for each direction half of all, or all of them for the past), the first E = B // 2 are the distances
    n < E themselves; the others widen in proportion to the distance:

        E + ⌊(B − E) · log(n / E) / log(max_distance / E)⌋, at most B − 1         (Raffel et al. 2020, section 2.1)

    Larger distances share the last bucket. In the decoder, future keys share bucket 0.
    """
    relative = np.arange(-max_distance, max_distance + 1)
    buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = buckets // 2
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    # In float32, as in training: otherwise a distance at the edge of two buckets could fall into the other.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    wide = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    ahead = buckets * (relative > 0) if bidirectional else 0
    return (np.where(distance < exact, distance, wide) + ahead).astype(np.int32)


class Attention(nnx.Module):
    """Multi-head attention without scaling of the logits: the initial weights of the queries do that."""

    def __init__(self, config: T5Config, *, relative: bool, rngs: nnx.Rngs | None):
        inner, factor = config.num_heads * config.d_kv, config.initializer_factor
        options = {"use_bias": False, "rngs": rngs}
        self.q = Linear(config.d_model, inner, std=factor * (config.d_model * config.d_kv) ** -0.5, **options)
        self.k = Linear(config.d_model, inner, std=factor * config.d_model**-0.5, **options)
        self.v = Linear(config.d_model, inner, std=factor * config.d_model**-0.5, **options)
        self.o = Linear(inner, config.d_model, std=factor * inner**-0.5, **options)
        if relative:
            std = factor * config.d_model**-0.5
            self.relative_attention_bias = Embedding(
                config.relative_attention_num_buckets, config.num_heads, std=std, rngs=rngs
            )
        self.heads = config.num_heads

    def _heads(self, x: Float[Array, "batch time inner"]) -> Float[Array, "batch head time head_dim"]:
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def key_value(self, states: Float[Array, "batch time width"]) -> KeyValue:
        """Return keys and values of the states, in the parameters' dtype."""
        dtype = self.k.kernel[...].dtype
        return self._heads(self.k(states)).astype(dtype), self._heads(self.v(states)).astype(dtype)

    def __call__(
        self,
        x: Array,
        key_value: KeyValue,
        mask: Array,
        bias: Array | None,
        intermediates: list[Array] | None,
    ) -> Float[Array, "batch time width"]:
        query = self._heads(self.q(x))
        return self.o(attention(query, key_value, mask, scale=1.0, bias=bias, intermediates=intermediates))


class SelfAttentionLayer(nnx.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: T5Config, *, relative: bool, rngs: nnx.Rngs | None):
        self.SelfAttention = Attention(config, relative=relative, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)

    def __call__(
        self,
        x: Array,
        mask: Array,
        bias: Array,
        cache: KeyValue | None,
        index: Array | None,
        intermediates: list[Array] | None,
    ) -> tuple[Array, KeyValue]:
        normed = self.layer_norm(x)
        written = self.SelfAttention.key_value(normed)
        cache = written if cache is None else write_slots(cache, *written, index)
        return x + self.SelfAttention(normed, cache, mask, bias, intermediates), cache


class CrossAttentionLayer(nnx.Module):
    """x + attention(norm(x)) over the source."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs | None):
        self.EncDecAttention = Attention(config, relative=False, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)

    def __call__(self, x: Array, source: KeyValue, mask: Array, intermediates: list[Array] | None) -> Array:
        return x + self.EncDecAttention(self.layer_norm(x), source, mask, None, intermediates)


class DenseReluDense(nnx.Module):
    """wo(activation(wi x)), or gated (Shazeer 2020): wo(activation(wi_0 x) · wi_1 x)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs | None):
        factor = config.initializer_factor
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            std = factor * config.d_model**-0.5
            setattr(self, name, Linear(config.d_model, config.d_ff, std=std, use_bias=False, rngs=rngs))
        self.wo = Linear(config.d_ff, config.d_model, std=factor * config.d_ff**-0.5, use_bias=False, rngs=rngs)
        self.activation, self.gated = config.activation, config.gated

    def __call__(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.activation]
        return self.wo(activation(self.wi_0(x)) * self.wi_1(x) if self.gated else activation(self.wi(x)))


class FeedForwardLayer(nnx.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs | None):
        self.DenseReluDense = DenseReluDense(config, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)

    def __call__(self, x: Array) -> Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    """Self-attention, in the decoder cross-attention, feed-forward."""

    def __init__(self, config: T5Config, *, relative: bool, decoder: bool, rngs: nnx.Rngs | None):
        cross = [CrossAttentionLayer(config, rngs=rngs)] if decoder else []
        first = SelfAttentionLayer(config, relative=relative, rngs=rngs)
        self.layer = nnx.List([first, *cross, FeedForwardLayer(config, rngs=rngs)])


class Stack(nnx.Module):
    """The encoder or the decoder: blocks and a final norm. Except in umT5, all use the first one's position biases."""

    def __init__(self, config: T5Config, *, decoder: bool, rngs: nnx.Rngs | None):
        layers = config.decoder_layers if decoder else config.num_layers
        relative = [layer == 0 or config.model_type == "umt5" for layer in range(layers)]
        self.block = nnx.List(Block(config, relative=each, decoder=decoder, rngs=rngs) for each in relative)
        self.final_layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)
        self.max_distance = config.relative_attention_max_distance
        self.num_buckets, self.bidirectional = config.relative_attention_num_buckets, not decoder

    def biases(
        self, queries: Int[Array, "batch time"], keys: Int[Array, "batch slot"]
    ) -> list[Float[Array, "batch head time slot"]]:
        """Return the bias of each layer's attention logits by the positions of query and key."""
        buckets = relative_buckets(
            num_buckets=self.num_buckets, max_distance=self.max_distance, bidirectional=self.bidirectional
        )
        relative = jnp.clip(keys[:, None, :] - queries[:, :, None], -self.max_distance, self.max_distance)
        places = jnp.asarray(buckets)[relative + self.max_distance]
        attentions = [block.layer[0].SelfAttention for block in self.block]
        tables = [each.relative_attention_bias for each in attentions if hasattr(each, "relative_attention_bias")]
        biases = [jnp.moveaxis(table(places), -1, 1) for table in tables]
        return biases * (len(attentions) // len(tables))

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Bool[Array, "batch #time slot"],
        biases: list[Float[Array, "#batch head time slot"]],
        cache: list[KeyValue] | None = None,
        index: Int[Array, ""] | None = None,
        source: tuple[list[KeyValue], Bool[Array, "batch 1 source"]] | None = None,
        intermediates: list[Array] | None = None,
    ) -> tuple[Float[Array, "batch time width"], list[KeyValue]]:
        x, written = over_rows(x), []
        for layer, block in enumerate(self.block):
            own = None if cache is None else cache[layer]
            x, key_value = block.layer[0](x, mask, biases[layer], own, index, intermediates)
            if source is not None:
                x = block.layer[1](x, source[0][layer], source[1], intermediates)
            x = over_rows(block.layer[-1](x))
            written.append(key_value)
        return self.final_layer_norm(x), written


class T5Decoder(nnx.Module):
    """The part that decoding needs after the source is encoded: embeddings, decoder, unembedding (tied or not)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs | None):
        self.shared = Embedding(config.vocab_size, config.d_model, std=config.initializer_factor, rngs=rngs)
        self.decoder = Stack(config, decoder=True, rngs=rngs)
        if not config.tie_word_embeddings:
            std = config.initializer_factor
            self.lm_head = Linear(config.d_model, config.vocab_size, std=std, use_bias=False, rngs=rngs)
        self.scale = config.output_scale

    def source_key_values(self, states: Float[Array, "source time width"]) -> list[KeyValue]:
        """Return each layer's keys and values of the encoded source."""
        return [block.layer[1].EncDecAttention.key_value(states) for block in self.decoder.block]

    def unembed(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        return self.lm_head(hidden) if hasattr(self, "lm_head") else self.shared.attend(hidden)


class T5Module(T5Decoder):
    """The whole model: the decoder's part and the encoder."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs | None):
        super().__init__(config, rngs=rngs)
        self.encoder = Stack(config, decoder=False, rngs=rngs)


# The model ------------------------------------------------------------------------------------------------------------


class EncoderState(NamedTuple):
    """The parameters of a `T5LM`: the decoder's weights and the state of the encoded source."""

    weights: Params  # the T5's tree without its encoder
    cross: list[KeyValue]  # cross-attention keys and values of each layer, [source, head, source_time, d_kv]
    mask: Bool[Array, "source source_time"]


class Conditioned(NamedTuple):
    """The language model of the target given the source, and its parameters."""

    lm: T5LM
    params: EncoderState


class AttentionMaps(NamedTuple):
    """Attention weights of encoder, decoder and cross-attention. Rows of queries that are padding are 0."""

    encoder: Float[Array, "layer source head source_time source_time"]
    decoder: Float[Array, "layer batch head target_time target_time"]
    cross: Float[Array, "layer batch head target_time source_time"]


@dataclasses.dataclass(frozen=True)
class T5(Network):
    """The encoder-decoder: `T5(T5Config(num_layers=2, ...))`.

    It is not a `LanguageModel` and has no `apply`: `lm, params = t5.start(params, source, source_mask)` makes one.
    Masks are false at padding, on either side. Tokens at padding have no effect elsewhere.
    """

    config: T5Config = dataclasses.field(default_factory=T5Config)

    def build(self, rngs: nnx.Rngs | None) -> T5Module:
        return T5Module(self.config, rngs=rngs)

    def encode(
        self,
        params: Params,
        source: Int[Array, "source time"],
        mask: Bool[Array, "source time"] | None = None,
    ) -> Float[Array, "source time width"]:
        """Return the encoder's last states; they are undefined at padding.

        Raises:
            ValueError: if the tokens or the mask do not fit, or a source is empty.
        """
        return self._encode(params, source, mask)

    def start(
        self,
        params: Params,
        source: Int[Array, "source time"],
        mask: Bool[Array, "source time"] | None = None,
    ) -> Conditioned:
        """Encode the source and return the language model p(target | source) with its parameters.

        Its sequences begin with `decoder_start_token_id`: the prompts are `decoder_prompts(batch)`, optionally followed
        by forced tokens. The number of prompts may be a multiple of the number of sources; prompts of one source are
        adjacent. The model is hashable and depends on the number of sources alone, so that another source of the same
        shape compiles nothing. The result is differentiable in all of `params`, encoder included: a loss is
        `loss(*t5.start(params, source, mask), ...)`.

        Raises:
            ValueError: as `encode` does.
        """
        self._check(source, mask)
        return Conditioned(T5LM(self.config, source.shape[0]), _given(self, params, source, mask))

    def decoder_prompts(self, batch_size: int) -> Int[Array, "batch 1"]:
        """Return the start token for each row."""
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
        """Return the attention weights of every layer and head.

        A row sums to 1 over the keys in its query's mask (valid keys, in the decoder up to the query) and is exactly 0
        elsewhere. The row of a query that is padding is 0.

        Args:
            target: the decoder's input: the start token, then the target. Query t predicts token t + 1.

        Raises:
            ValueError: as `encode`, and if the number of rows is not a multiple of the number of sources.
        """
        encoder, decoder = [], []
        states = self._encode(params, source, source_mask, encoder)
        lm, given = T5LM(self.config, source.shape[0]), self._started(params, states, source_mask)
        lm.read(given, target, None, target_mask, decoder)
        return AttentionMaps(
            recorded_weights(encoder, source_mask),
            recorded_weights(decoder[0::2], target_mask),
            recorded_weights(decoder[1::2], target_mask),
        )

    def _encode(
        self, params: Params, source: Array, mask: Array | None, intermediates: list[Array] | None = None
    ) -> Float[Array, "source time width"]:
        self._check(source, mask)
        module = self.merge(params)
        # Without padding all rows have the same positions, and share their biases.
        valid = jnp.ones((1, source.shape[1]), bool) if mask is None else mask
        positions = jnp.cumsum(valid, axis=1) - 1
        biases = module.encoder.biases(positions, positions)
        return module.encoder(module.shared(source), valid[:, None], biases, intermediates=intermediates)[0]

    def _started(self, params: Params, states: Array, mask: Array | None) -> EncoderState:
        mask = jnp.ones(states.shape[:2], bool) if mask is None else mask
        weights = {name: value for name, value in params.items() if name != "encoder"}
        return EncoderState(weights, self.merge(params).source_key_values(states), mask)

    def _check(self, source: Array, mask: Array | None) -> None:
        language_model.check_tokens(T5LM(self.config, 1), source, mask, name="source")
        if source.shape[1] == 0 or (mask is not None and is_concrete(mask) and not mask.any(axis=1).all()):
            raise ValueError("a source must have at least one token, but one is empty.")


@functools.partial(jax.jit, static_argnums=0)
def _given(t5: T5, params: Params, source: Array, mask: Array | None) -> EncoderState:
    return t5._started(params, t5._encode(params, source, mask), mask)


@dataclasses.dataclass(frozen=True)
class T5LM(Network, language_model.LanguageModel):
    """The language model of a T5's target given its encoded source; made by `T5.start`, with its parameters.

    With k times more rows than sources, rows i k to i k + k − 1 belong to source i. Under classifier-free guidance both
    prompts of a row belong to its source.
    """

    config: T5Config
    num_sources: int
    min_prompt_length = 1
    max_length = UNBOUNDED

    def build(self, rngs: nnx.Rngs | None) -> T5Decoder:
        return T5Decoder(self.config, rngs=rngs)

    def init(self, key: Array) -> Params:
        raise TypeError("the parameters of a T5LM come from its source: T5.start(params, source) gives them.")

    def init_cache(self, batch_size: int, max_length: int, *, dtype: Any = jnp.float32) -> Cache:
        """Return an empty cache of the decoder's keys and values, with the index of each row's source.

        Raises:
            ValueError: if the number of rows is not a multiple of the number of sources.
        """
        config = self.config
        slots = empty_slots(config.decoder_layers, batch_size, config.num_heads, max_length, config.d_kv, dtype)
        return Cache(*slots, given=self._sources(batch_size))

    def hidden(
        self,
        params: EncoderState,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
        segments: Int[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """Return hidden states as `LanguageModel.hidden`; if the model scales its outputs, they are scaled.

        All segments of a row have its source.
        """
        return self.read(params, tokens, cache, mask, segments=segments)

    def logits(self, params: EncoderState, hidden: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        return self.merge(params.weights).unembed(hidden)

    def read(
        self,
        params: EncoderState,
        tokens: Int[Array, "batch time"],
        cache: Cache | None,
        mask: Bool[Array, "batch time"] | None,
        intermediates: list[Array] | None = None,
        segments: Int[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """Return `hidden`; append the attention weights, self and cross in turn, to `intermediates` if it is a list."""
        language_model.check_tokens(self, tokens, mask, cache, segments=segments)
        source = self._source_of(params, tokens.shape[0], cache)
        # Without padding and cache all rows have the same positions, and share their biases.
        shared = mask is None and cache is None and segments is None
        mask = jnp.ones((1 if shared else tokens.shape[0], tokens.shape[1]), bool) if mask is None else mask
        at = place(mask, cache, segments)
        module, kv_cache = self.merge(params.weights), None if cache is None else cache.memory
        biases = module.decoder.biases(at.positions, at.slots)
        hidden, kv_cache = module.decoder(
            module.shared(tokens), at.attention_mask, biases, kv_cache, at.cache_index, source, intermediates
        )
        return hidden * module.scale, None if cache is None else dataclasses.replace(at.cache, memory=kv_cache)

    def _source_of(self, params: EncoderState, batch: int, cache: Cache | None) -> tuple[list[KeyValue], Array]:
        """Return the cross-attention keys and values of each row's source, for every layer, and their mask."""
        rows = self._sources(batch) if cache is None else cache.given
        cross, mask = params.cross, params.mask
        if cache is not None or batch != self.num_sources:
            cross, mask = jax.tree.map(lambda leaf: leaf[rows], (cross, mask))
        return cross, mask[:, None]

    def _sources(self, batch: int) -> Int[Array, "batch"]:
        if batch % self.num_sources:
            raise ValueError(
                f"the number of rows must be a multiple of the {self.num_sources} sources, but is {batch} "
                "(a search of one prompt takes one source)."
            )
        return jnp.repeat(jnp.arange(self.num_sources), batch // self.num_sources)
