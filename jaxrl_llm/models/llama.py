"""Llama (Touvron et al. 2023) and its grouped-query successors, such as SmolLM2; and StableLM, from scratch.

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.decoder import DecoderLM, check_config, checkpointed
from jaxrl_llm.models.layers import (
    Embedding,
    KeyValue,
    LayerNorm,
    Linear,
    RMSNorm,
    attend,
    attention_weights,
    standardise,
    write_slots,
)
from jaxrl_llm.models.rotary import RopeScaling, rope_frequencies, rotate


class Attention(nnx.Module):
    """Grouped-query causal attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: Any, *, qkv_bias: bool, output_bias: bool, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
        )
        options = {"std": config.initializer_range, "rngs": rngs}
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, use_bias=qkv_bias, **options)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, use_bias=qkv_bias, **options)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, use_bias=qkv_bias, **options)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, use_bias=output_bias, **options)

    def queries_and_keys(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Transform queries and keys [batch, head, time, head_dim] before RoPE; the identity by default."""
        return query, key

    def __call__(
        self,
        x: Array,
        angles: Array,
        mask: Array,
        cache: KeyValue | None,
        index: Array | None,
        intermediates: list[Array] | None,
    ):
        batch, time, _ = x.shape

        def heads(projection: Linear, count: int) -> Array:  # [batch, head, time, head_dim]
            return projection(x).reshape(batch, time, count, self.head_dim).swapaxes(1, 2)

        query, key = self.queries_and_keys(heads(self.q_proj, self.heads), heads(self.k_proj, self.kv_heads))
        query, key, value = rotate(query, angles), rotate(key, angles), heads(self.v_proj, self.kv_heads)
        dtype = self.q_proj.kernel[...].dtype
        cache = (key.astype(dtype), value.astype(dtype)) if cache is None else write_slots(cache, key, value, index)
        weights = attention_weights(query, cache[0], mask, scale=self.head_dim**-0.5, intermediates=intermediates)
        return self.o_proj(attend(weights, cache[1])), cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Any, *, use_bias: bool, rngs: nnx.Rngs):
        options = {"std": config.initializer_range, "use_bias": use_bias, "rngs": rngs}
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)).

    With `parallel` (Wang and Komatsuzaki 2021) both share one norm: x + attention(norm(x)) + mlp(norm(x)).
    """

    def __init__(self, attention: Attention, mlp: MLP, norm: Callable[[], nnx.Module], *, parallel: bool = False):
        self.input_layernorm = norm()
        self.self_attn = attention
        self.post_attention_layernorm = None if parallel else norm()
        self.mlp = mlp

    def __call__(
        self,
        x: Array,
        angles: Array,
        mask: Array,
        cache: KeyValue | None,
        index: Array | None,
        intermediates: list[Array] | None,
    ):
        normed = self.input_layernorm(x)
        mixed, cache = self.self_attn(normed, angles, mask, cache, index, intermediates)
        x = x + mixed
        return x + self.mlp(
            normed if self.post_attention_layernorm is None else self.post_attention_layernorm(x)
        ), cache


class RotaryModule(nnx.Module):
    """Token embeddings, the blocks, a final norm, the unembedding (tied or not)."""

    def __init__(
        self,
        config: Any,
        block: Callable[[], Block],
        norm: Callable[[], nnx.Module],
        *,
        rngs: nnx.Rngs,
        checkpoint_blocks: bool = False,
    ):
        std = config.initializer_range
        self.checkpoint_blocks = checkpoint_blocks
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=std, rngs=rngs)
        self.layers = nnx.List([block() for _ in range(config.num_hidden_layers)])
        self.norm = norm()
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, std=std, use_bias=False, rngs=rngs)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        mask: Bool[Array, "batch time slot"],
        cache: list[KeyValue] | None,
        index: Int[Array, ""] | None,
        intermediates: list[Array] | None,
    ) -> tuple[Float[Array, "batch time width"], list[KeyValue]]:
        x, config = self.embed_tokens(tokens), self.config
        frequencies = rope_frequencies(config.rotary_dim, theta=config.rope_theta, scaling=config.rope_scaling)
        angles = positions[..., None] * frequencies
        written = []
        for layer, block in enumerate(self.layers):
            if self.checkpoint_blocks and cache is None and intermediates is None:
                x, key_value = checkpointed(block)(x, angles, mask)
            else:
                x, key_value = block(x, angles, mask, None if cache is None else cache[layer], index, intermediates)
            written.append(key_value)
        return self.norm(x), written

    def unembed(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        return self.lm_head(hidden) if hasattr(self, "lm_head") else self.embed_tokens.attend(hidden)


class RotaryLM(DecoderLM):
    """A decoder with rotary positions as a `LanguageModel`."""

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.head_size


def check_rotary_config(config: Any) -> None:
    """Raise ValueError for a field that does not fit its annotation, or heads that do not divide the width."""
    check_config(config)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            "num_attention_heads must be a multiple of num_key_value_heads, "
            f"but they are {config.num_attention_heads} and {config.num_key_value_heads}."
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % config.num_attention_heads:
        raise ValueError(
            "hidden_size must be a multiple of num_attention_heads, "
            f"but they are {config.hidden_size} and {config.num_attention_heads}."
        )
    if config.rope_theta == 0:
        raise ValueError("rope_theta must be above 0.")


# Llama ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Llama `config.json` that change the function; the defaults are those of SmolLM2-135M."""

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int | None = None  # hidden_size / num_attention_heads
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self):
        check_rotary_config(self)
        if self.head_size % 2:
            raise ValueError(f"the heads' dimension must be even for rotary positions, but is {self.head_size}.")

    @property
    def head_size(self) -> int:
        """The dimension of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Return the number of rotated coordinates of a head: all."""
        return self.head_size


@dataclasses.dataclass(frozen=True)
class Llama(RotaryLM):
    """Llama as a `LanguageModel`: `Llama(LlamaConfig(num_hidden_layers=2, ...))`."""

    config: LlamaConfig = LlamaConfig()

    def build(self, rngs: nnx.Rngs) -> RotaryModule:
        config, bias = self.config, self.config.attention_bias
        norm = functools.partial(RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps)

        def block() -> Block:
            attention = Attention(config, qkv_bias=bias, output_bias=bias, rngs=rngs)
            return Block(attention, MLP(config, use_bias=config.mlp_bias, rngs=rngs), norm)

        return RotaryModule(config, block, norm, rngs=rngs, checkpoint_blocks=self.checkpoint_blocks)


# StableLM (Tow et al. 2023, Bellagente et al. 2024): LayerNorm, and rotary positions in a part of each head -----------


@dataclasses.dataclass(frozen=True)
class StableLMConfig:
    """The fields of a StableLM `config.json` that change the function; the defaults are StableLM-Zephyr-3B's."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.25
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self):
        check_rotary_config(self)
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_size:
            raise ValueError(
                f"partial_rotary_factor must leave an even number of a head's {self.head_size} coordinates to turn, "
                f"2 or more, but is {self.partial_rotary_factor}."
            )

    @property
    def head_size(self) -> int:
        """The dimension of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Return the number of rotated coordinates of a head, the first ones."""
        return int(self.head_size * self.partial_rotary_factor)


class HeadScale(nnx.Module):
    """The scale of one head's LayerNorm of queries or keys."""

    def __init__(self, head_dim: int):
        self.scale = nnx.Param(jnp.ones(head_dim))


class HeadsNorm(nnx.Module):
    """LayerNorm without bias over each head, with a scale for each head."""

    def __init__(self, heads: int, head_dim: int, *, epsilon: float):
        self.norms = nnx.List([HeadScale(head_dim) for _ in range(heads)])  # the checkpoint has one tensor for each
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "batch head time head_dim"]) -> Float[Array, "batch head time head_dim"]:
        return standardise(x, self.epsilon) * jnp.stack([norm.scale[...] for norm in self.norms])[:, None]


class NormedAttention(Attention):
    """Grouped-query attention; with `qk_layernorm` queries and keys are normalised head by head."""

    def __init__(self, config: StableLMConfig, *, rngs: nnx.Rngs):
        super().__init__(config, qkv_bias=config.use_qkv_bias, output_bias=False, rngs=rngs)
        norm = functools.partial(HeadsNorm, head_dim=self.head_dim, epsilon=config.layer_norm_eps)
        self.q_layernorm = norm(self.heads) if config.qk_layernorm else None
        self.k_layernorm = norm(self.kv_heads) if config.qk_layernorm else None

    def queries_and_keys(self, query: Array, key: Array) -> tuple[Array, Array]:
        if self.q_layernorm is None:
            return query, key
        return self.q_layernorm(query), self.k_layernorm(key)


@dataclasses.dataclass(frozen=True)
class StableLM(RotaryLM):
    """StableLM as a `LanguageModel`: `StableLM(StableLMConfig(num_hidden_layers=2, ...))`."""

    config: StableLMConfig = StableLMConfig()

    def build(self, rngs: nnx.Rngs) -> RotaryModule:
        config = self.config
        norm = functools.partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps)

        def block() -> Block:
            attention, mlp = NormedAttention(config, rngs=rngs), MLP(config, use_bias=False, rngs=rngs)
            return Block(attention, mlp, norm, parallel=config.use_parallel_residual)

        return RotaryModule(config, block, norm, rngs=rngs, checkpoint_blocks=self.checkpoint_blocks)
