"""What Llama and its kin share: grouped attention with rotary positions, SwiGLU, the blocks and the module around them.

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.decoder import DecoderLM, checkpointed
from jaxrl_llm.models.layers import Embedding, KeyValue, Linear, attend, attention_weights, write_slots
from jaxrl_llm.models.network import check_config
from jaxrl_llm.models.rotary import rope_frequencies, rotate


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
        """What is done to them [batch, head, time, head_dim] before they turn: nothing."""
        return query, key

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

        query, key = self.queries_and_keys(heads(self.q_proj, self.heads), heads(self.k_proj, self.kv_heads))
        query, key, value = rotate(query, angles), rotate(key, angles), heads(self.v_proj, self.kv_heads)
        dtype = self.q_proj.kernel[...].dtype
        memory = (key.astype(dtype), value.astype(dtype)) if memory is None else write_slots(memory, key, value, start)
        weights = attention_weights(query, memory[0], allowed, scale=self.head_dim**-0.5, record=record)
        return self.o_proj(attend(weights, memory[1])), memory


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

    In parallel (Wang and Komatsuzaki 2021) both read one norm: x + attention(norm(x)) + mlp(norm(x)).
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
        allowed: Array,
        memory: KeyValue | None,
        start: Array | None,
        record: list[Array] | None,
    ):
        normed = self.input_layernorm(x)
        mixed, memory = self.self_attn(normed, angles, allowed, memory, start, record)
        x = x + mixed
        return x + self.mlp(
            normed if self.post_attention_layernorm is None else self.post_attention_layernorm(x)
        ), memory


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
        allowed: Bool[Array, "batch time slot"],
        memory: list[KeyValue] | None,
        start: Int[Array, ""] | None,
        record: list[Array] | None,
    ) -> tuple[Float[Array, "batch time width"], list[KeyValue]]:
        x, config = self.embed_tokens(tokens), self.config
        frequencies = rope_frequencies(config.rotary_dim, theta=config.rope_theta, scaling=config.rope_scaling)
        angles = positions[..., None] * frequencies
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


class RotaryLM(DecoderLM):
    """Its sizes, as its configuration names them."""

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.head_size


def check_rotary_config(config: Any) -> None:
    """Raise for a field that is not what its annotation says, or for heads that cannot be."""
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
