"""Llama (Touvron et al. 2023) and its grouped-query successors, from scratch; SmolLM2 is one of them."""

from __future__ import annotations

import dataclasses
import functools

from flax import nnx

from jaxrl_llm.models.layers import RMSNorm
from jaxrl_llm.models.rotary import RopeScaling
from jaxrl_llm.models.rotary_decoder import MLP, Attention, Block, RotaryLM, RotaryModule, check_rotary_config


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
        """How many coordinates of a head turn: all."""
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
