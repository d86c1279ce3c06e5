"""StableLM (Tow et al. 2023, Bellagente et al. 2024), from scratch: StableLM-Zephyr-3B, StableLM-2.

Llama with LayerNorm, and rotary positions in the first coordinates of each head alone.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxrl_llm.models import rotary_decoder
from jaxrl_llm.models.layers import LayerNorm, standardise
from jaxrl_llm.models.rotary import RopeScaling
from jaxrl_llm.models.rotary_decoder import MLP, Block, RotaryLM, RotaryModule, check_rotary_config


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
        """How many coordinates of a head turn, the first ones."""
        return int(self.head_size * self.partial_rotary_factor)


class HeadScale(nnx.Module):
    """What a head's coordinates are multiplied by."""

    def __init__(self, head_dim: int):
        self.scale = nnx.Param(jnp.ones(head_dim))


class HeadsNorm(nnx.Module):
    """LayerNorm without bias over each head, which has a scale of its own."""

    def __init__(self, heads: int, head_dim: int, *, epsilon: float):
        self.norms = nnx.List([HeadScale(head_dim) for _ in range(heads)])  # the checkpoint has one tensor for each
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "batch head time head_dim"]) -> Float[Array, "batch head time head_dim"]:
        return standardise(x, self.epsilon) * jnp.stack([norm.scale[...] for norm in self.norms])[:, None]


class Attention(rotary_decoder.Attention):
    """Grouped-query attention, with queries and keys normalised head by head where `qk_layernorm` says so."""

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
            attention, mlp = Attention(config, rngs=rngs), MLP(config, use_bias=False, rngs=rngs)
            return Block(attention, mlp, norm, parallel=config.use_parallel_residual)

        return RotaryModule(config, block, norm, rngs=rngs, checkpoint_blocks=self.checkpoint_blocks)
