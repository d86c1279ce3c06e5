"""Llama (Touvron et al. 2023) and its grouped-query successors, from scratch; SmolLM2 is one of them.

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.decoder import DecoderLM, checkpointed
from jaxrl_llm.models.layers import Embedding, KeyValue, Linear, RMSNorm, attend, attention_weights, write_slots
from jaxrl_llm.models.network import check_config


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies were stretched for a longer context: `linear`, or `llama3` (Llama 3.1)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None  # llama3 needs it

    def __post_init__(self):
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(f"rope_type must be default, linear or llama3, but is {self.rope_type!r}.")
        if self.rope_type == "llama3" and not self.original_max_position_embeddings:
            raise ValueError("rope_type llama3 needs original_max_position_embeddings.")
        check_config(self)
        if self.factor == 0:
            raise ValueError("factor must be above 0.")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be below high_freq_factor, "
                f"but they are {self.low_freq_factor} and {self.high_freq_factor}."
            )


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
        check_config(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, "
                f"but they are {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, "
                f"but they are {self.hidden_size} and {self.num_attention_heads}."
            )
        if self.head_size % 2:
            raise ValueError(f"the heads' dimension must be even for rotary positions, but is {self.head_size}.")
        if self.rope_theta == 0:
            raise ValueError("rope_theta must be above 0.")

    @property
    def head_size(self) -> int:
        """The dimension of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def rope_frequencies(config: LlamaConfig) -> Float[Array, "half"]:
    """Radians a position for each pair of coordinates: θ^(−2i/d), stretched as `rope_scaling` says."""
    half = config.head_size // 2
    frequencies = float(config.rope_theta) ** (-jnp.arange(half) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # llama3: wavelengths beyond the original context are stretched, short ones kept, those between interpolated.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "batch head time head_dim"], angles: Float[Array, "batch time half"]
) -> Float[Array, "batch head time head_dim"]:
    """Rotary position embedding (Su et al. 2021): coordinates i and i + d/2 turn by their angle."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
        )
        options = {"std": config.initializer_range, "use_bias": config.attention_bias, "rngs": rngs}
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, **options)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, **options)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, **options)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, **options)

    def __call__(
        self,
        x: Array,
        angles: Array,
        allowed: Array,
        memory: KeyValue | None,
        start: Array | None,
        record: list[Array] | None,
    ):
        batch, time, _ = x.shape

        def heads(projection: Linear, count: int) -> Array:  # [batch, head, time, head_dim]
            return projection(x).reshape(batch, time, count, self.head_dim).swapaxes(1, 2)

        query = rotate(heads(self.q_proj, self.heads), angles)
        key = rotate(heads(self.k_proj, self.kv_heads), angles)
        value = heads(self.v_proj, self.kv_heads)
        dtype = self.q_proj.kernel[...].dtype
        memory = (key.astype(dtype), value.astype(dtype)) if memory is None else write_slots(memory, key, value, start)
        weights = attention_weights(query, memory[0], allowed, scale=self.head_dim**-0.5, record=record)
        return self.o_proj(attend(weights, memory[1])), memory


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        options = {"std": config.initializer_range, "use_bias": config.mlp_bias, "rngs": rngs}
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Array,
        angles: Array,
        allowed: Array,
        memory: KeyValue | None,
        start: Array | None,
        record: list[Array] | None,
    ):
        mixed, memory = self.self_attn(self.input_layernorm(x), angles, allowed, memory, start, record)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), memory


class LlamaModule(nnx.Module):
    """Token embeddings, the blocks, a final norm, the unembedding (tied or not)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, checkpoint_blocks: bool = False):
        std = config.initializer_range
        self.checkpoint_blocks = checkpoint_blocks
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=std, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, std=std, use_bias=False, rngs=rngs)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        allowed: Bool[Array, "batch time slot"],
        memory: list[KeyValue] | None,
        start: Int[Array, ""] | None,
        record: list[Array] | None,
    ) -> tuple[Float[Array, "batch time width"], list[KeyValue]]:
        x = self.embed_tokens(tokens)
        angles = positions[..., None] * rope_frequencies(self.config)
        written = []
        for layer, block in enumerate(self.layers):
            if self.checkpoint_blocks and memory is None and record is None:
                x, key_value = checkpointed(block)(x, angles, allowed)
            else:
                x, key_value = block(x, angles, allowed, None if memory is None else memory[layer], start, record)
            written.append(key_value)
        return self.norm(x), written

    def unembed(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        return self.lm_head(hidden) if hasattr(self, "lm_head") else self.embed_tokens.attend(hidden)


@dataclasses.dataclass(frozen=True)
class Llama(DecoderLM):
    """Llama as a `LanguageModel`: `Llama(LlamaConfig(num_hidden_layers=2, ...))`."""

    config: LlamaConfig = LlamaConfig()

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.head_size

    def build(self, rngs: nnx.Rngs) -> LlamaModule:
        return LlamaModule(self.config, rngs=rngs, checkpoint_blocks=self.checkpoint_blocks)
