"""GPT-2 (Radford et al. 2019), any size, from scratch. Attribute names are those of the published checkpoints."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_llm.mesh import over_rows
from jaxrl_llm.models.decoder import DecoderLM, Placed, check_choice, check_config, check_multiple, checkpointed
from jaxrl_llm.models.layers import (
    ACTIVATIONS,
    Embedding,
    KeyValue,
    LayerNorm,
    Linear,
    attention,
    write_slots,
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The fields of a GPT-2 `config.json` that change the function; the defaults are GPT-2 small's."""

    model_type: ClassVar[str] = "gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # default: 4 · n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        check_config(self)
        check_multiple("n_embd", self.n_embd, "n_head", self.n_head)
        check_choice("activation_function", self.activation_function, ACTIVATIONS)


class Attention(nnx.Module):
    """Multi-head causal attention; queries, keys and values from one fused projection."""

    def __init__(self, config: GPT2Config, layer: int, form: str, *, rngs: nnx.Rngs | None):
        width, std = config.n_embd, config.initializer_range
        self.c_attn = Linear(width, 3 * width, std=std, use_bias=True, rngs=rngs)
        self.c_proj = Linear(width, width, std=std / math.sqrt(2 * config.n_layer), use_bias=True, rngs=rngs)
        self.heads, self.form = config.n_head, form
        scale = (width // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        self.scale = scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale

    def __call__(
        self,
        x: Array,
        mask: Array,
        cache: KeyValue | None,
        index: Array | None,
        intermediates: list[Array] | None,
    ):
        batch, time, width = x.shape
        # Split, not indexed: the gradient of an index is a padded copy of the whole array.
        query, key, value = (
            part.reshape(batch, time, self.heads, width // self.heads).transpose(0, 2, 1, 3)
            for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )  # each [batch, head, time, head_dim]
        dtype = self.c_attn.kernel[...].dtype
        cache = (key.astype(dtype), value.astype(dtype)) if cache is None else write_slots(cache, key, value, index)
        options = {"scale": self.scale, "intermediates": intermediates, "form": self.form}
        return self.c_proj(attention(query, cache, mask, **options)), cache


class MLP(nnx.Module):
    """c_proj(activation(c_fc(x))), `n_inner` wide."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs | None):
        width, std = config.n_embd, config.initializer_range
        inner = config.n_inner or 4 * width
        self.c_fc = Linear(width, inner, std=std, use_bias=True, rngs=rngs)
        self.c_proj = Linear(inner, width, std=std / math.sqrt(2 * config.n_layer), use_bias=True, rngs=rngs)
        self.activation = config.activation_function

    def __call__(self, x: Array) -> Array:
        # The backward pass keeps one array of the inner width instead of three: the activation is cheap to recompute.
        return jax.checkpoint(lambda inner: self.c_proj(ACTIVATIONS[self.activation](inner)))(self.c_fc(x))


class Block(nnx.Module):
    """Pre-norm: x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPT2Config, layer: int, form: str, *, rngs: nnx.Rngs | None):
        self.ln_1 = LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        self.attn = Attention(config, layer, form, rngs=rngs)
        self.ln_2 = LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Array,
        mask: Array,
        cache: KeyValue | None,
        index: Array | None,
        intermediates: list[Array] | None,
    ):
        mixed, cache = self.attn(self.ln_1(x), mask, cache, index, intermediates)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), cache


class GPT2Module(nnx.Module):
    """Token and position embeddings, `n_layer` blocks, a final norm, the (tied) unembedding."""

    def __init__(self, config: GPT2Config, form: str, *, rngs: nnx.Rngs | None, checkpoint_blocks: bool = False):
        std = config.initializer_range
        self.checkpoint_blocks = checkpoint_blocks
        self.wte = Embedding(config.vocab_size, config.n_embd, std=std, rngs=rngs)
        self.wpe = Embedding(config.n_positions, config.n_embd, std=std / 2, rngs=rngs)  # 0.01 in the original code
        self.h = nnx.List([Block(config, layer, form, rngs=rngs) for layer in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, std=std, use_bias=False, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        placed: Placed,
        cache: list[KeyValue] | None,
        intermediates: list[Array] | None,
    ) -> tuple[Float[Array, "batch time width"], list[KeyValue]]:
        x = over_rows(self.wte(tokens) + self.wpe(placed.positions))
        written, mask, index = [], placed.attention_mask, placed.cache_index
        for layer, block in enumerate(self.h):  # unrolled: a scan would slice the stacked weights at every step
            if self.checkpoint_blocks and cache is None and intermediates is None:
                x, key_value = checkpointed(block)(x, mask, None, None, None)
            else:
                x, key_value = block(x, mask, None if cache is None else cache[layer], index, intermediates)
            x = over_rows(x)
            written.append(key_value)
        return self.ln_f(x), written

    def unembed(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        return self.lm_head(hidden) if hasattr(self, "lm_head") else self.wte.attend(hidden)


@dataclasses.dataclass(frozen=True)
class GPT2(DecoderLM):
    """GPT-2 as a `LanguageModel`: `GPT2(GPT2Config(n_layer=2, ...))`."""

    config: GPT2Config = GPT2Config()

    @property
    def max_length(self) -> int:
        return self.config.n_positions

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.n_layer, self.config.n_head, self.config.n_embd // self.config.n_head

    def build(self, rngs: nnx.Rngs | None) -> GPT2Module:
        return GPT2Module(self.config, self.attention_form, rngs=rngs, checkpoint_blocks=self.checkpoint_blocks)
