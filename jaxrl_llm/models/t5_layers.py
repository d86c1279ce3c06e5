"""The parts of T5 (Raffel et al. 2020) as Flax NNX modules. Attribute names are those of the published checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.layers import (
    ACTIVATIONS,
    Embedding,
    KeyValue,
    Linear,
    RMSNorm,
    attend,
    attention_weights,
    write_slots,
)
from jaxrl_llm.models.network import TokenId, check_config


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of a T5 `config.json` that change the function; the defaults are those of t5-small."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # an activation, or "gated-" and one; "gated-gelu" means gelu_new
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # by d_model^(−1/2) before the unembedding; as tie_word_embeddings
    decoder_start_token_id: TokenId = 0

    def __post_init__(self):
        check_config(self)
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
        """Whether the feed-forward layers multiply two projections."""
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
        """What the decoder's last states are multiplied by."""
        scaled = self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs
        return self.d_model**-0.5 if scaled else 1.0


@functools.cache
def relative_buckets(*, num_buckets: int, max_distance: int, bidirectional: bool) -> Int[np.ndarray, "2*distance+1"]:
    """The bucket of each relative position (key − query) from −max_distance to max_distance.

    Of B buckets (for each direction half of all, or all of them for the past), the first E = B // 2 are the distances
    n < E themselves; the others widen in proportion to the distance:

        E + ⌊(B − E) · log(n / E) / log(max_distance / E)⌋, at most B − 1         (Raffel et al. 2020, section 2.1)

    What is further away shares the last one. Where the future cannot be seen it shares bucket 0.
    """
    relative = np.arange(-max_distance, max_distance + 1)
    buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = buckets // 2
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    # In float32, as the models were trained: elsewhere a distance at the edge of two buckets could fall into the other.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    wide = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    ahead = buckets * (relative > 0) if bidirectional else 0
    return (np.where(distance < exact, distance, wide) + ahead).astype(np.int32)


class Attention(nnx.Module):
    """Multi-head attention without scaling of the logits: the initial weights of the queries do that."""

    def __init__(self, config: T5Config, *, relative: bool, rngs: nnx.Rngs):
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
        """Keys and values of what is looked at, in the parameters' dtype."""
        dtype = self.k.kernel[...].dtype
        return self._heads(self.k(states)).astype(dtype), self._heads(self.v(states)).astype(dtype)

    def __call__(
        self, x: Array, key_value: KeyValue, allowed: Array, bias: Array | None, record: list[Array] | None
    ) -> Float[Array, "batch time width"]:
        query = self._heads(self.q(x))
        weights = attention_weights(query, key_value[0], allowed, scale=1.0, bias=bias, record=record)
        return self.o(attend(weights, key_value[1]))


class SelfAttentionLayer(nnx.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: T5Config, *, relative: bool, rngs: nnx.Rngs):
        self.SelfAttention = Attention(config, relative=relative, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)

    def __call__(
        self,
        x: Array,
        allowed: Array,
        bias: Array,
        memory: KeyValue | None,
        start: Array | None,
        record: list[Array] | None,
    ) -> tuple[Array, KeyValue]:
        normed = self.layer_norm(x)
        written = self.SelfAttention.key_value(normed)
        memory = written if memory is None else write_slots(memory, *written, start)
        return x + self.SelfAttention(normed, memory, allowed, bias, record), memory


class CrossAttentionLayer(nnx.Module):
    """x + attention(norm(x)) over the source."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.EncDecAttention = Attention(config, relative=False, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)

    def __call__(self, x: Array, source: KeyValue, allowed: Array, record: list[Array] | None) -> Array:
        return x + self.EncDecAttention(self.layer_norm(x), source, allowed, None, record)


class DenseReluDense(nnx.Module):
    """wo(activation(wi x)), or gated (Shazeer 2020): wo(activation(wi_0 x) · wi_1 x)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
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

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.DenseReluDense = DenseReluDense(config, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)

    def __call__(self, x: Array) -> Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    """Self-attention, in the decoder cross-attention, feed-forward."""

    def __init__(self, config: T5Config, *, relative: bool, decoder: bool, rngs: nnx.Rngs):
        cross = [CrossAttentionLayer(config, rngs=rngs)] if decoder else []
        first = SelfAttentionLayer(config, relative=relative, rngs=rngs)
        self.layer = nnx.List([first, *cross, FeedForwardLayer(config, rngs=rngs)])


class Stack(nnx.Module):
    """The encoder or the decoder: blocks and a final norm. The first block's table of position biases serves all."""

    def __init__(self, config: T5Config, *, decoder: bool, rngs: nnx.Rngs):
        layers = config.decoder_layers if decoder else config.num_layers
        blocks = [Block(config, relative=layer == 0, decoder=decoder, rngs=rngs) for layer in range(layers)]
        self.block = nnx.List(blocks)
        self.final_layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)
        self.max_distance = config.relative_attention_max_distance
        self.num_buckets, self.bidirectional = config.relative_attention_num_buckets, not decoder

    def bias(
        self, queries: Int[Array, "batch time"], keys: Int[Array, "batch slot"]
    ) -> Float[Array, "batch head time slot"]:
        """What is added to the attention logits, by the positions of query and key."""
        buckets = relative_buckets(
            num_buckets=self.num_buckets, max_distance=self.max_distance, bidirectional=self.bidirectional
        )
        by_distance = self.block[0].layer[0].SelfAttention.relative_attention_bias(jnp.asarray(buckets))
        relative = jnp.clip(keys[:, None, :] - queries[:, :, None], -self.max_distance, self.max_distance)
        return jnp.moveaxis(by_distance[relative + self.max_distance], -1, 1)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        allowed: Bool[Array, "batch #time slot"],
        bias: Float[Array, "#batch head time slot"],
        memory: list[KeyValue] | None = None,
        start: Int[Array, ""] | None = None,
        source: tuple[list[KeyValue], Bool[Array, "batch 1 source"]] | None = None,
        record: list[Array] | None = None,
    ) -> tuple[Float[Array, "batch time width"], list[KeyValue]]:
        written = []
        for index, block in enumerate(self.block):
            own = None if memory is None else memory[index]
            x, key_value = block.layer[0](x, allowed, bias, own, start, record)
            if source is not None:
                x = block.layer[1](x, source[0][index], source[1], record)
            x = block.layer[-1](x)
            written.append(key_value)
        return self.final_layer_norm(x), written


class T5Decoder(nnx.Module):
    """What is needed once the source is encoded: embeddings, the decoder, the unembedding (tied or not)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.shared = Embedding(config.vocab_size, config.d_model, std=config.initializer_factor, rngs=rngs)
        self.decoder = Stack(config, decoder=True, rngs=rngs)
        if not config.tie_word_embeddings:
            std = config.initializer_factor
            self.lm_head = Linear(config.d_model, config.vocab_size, std=std, use_bias=False, rngs=rngs)
        self.scale = config.output_scale

    def source_key_values(self, states: Float[Array, "source time width"]) -> list[KeyValue]:
        """Each layer's keys and values of the encoded source."""
        return [block.layer[1].EncDecAttention.key_value(states) for block in self.decoder.block]

    def unembed(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        return self.lm_head(hidden) if hasattr(self, "lm_head") else self.shared.attend(hidden)


class T5Module(T5Decoder):
    """The whole: with the encoder."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.encoder = Stack(config, decoder=False, rngs=rngs)
