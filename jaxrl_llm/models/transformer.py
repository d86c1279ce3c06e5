"""Causal transformers described by data: one block that reads a `Description`, for every family but GPT-2 and T5.

`models.families` turns the `config.json` of a family into a description. Attribute names are Llama's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.mesh import over_rows
from jaxrl_llm.models.decoder import DecoderLM, Placed, check_choice, check_multiple, checkpointed
from jaxrl_llm.models.layers import (
    ACTIVATIONS,
    Embedding,
    KeyValue,
    LayerNorm,
    Linear,
    RMSNorm,
    attention,
    normal,
    standardise,
    write_slots,
)
from jaxrl_llm.models.rotary import Rotary, rotate
from jaxrl_llm.products import ragged_product


class Norm(NamedTuple):
    """A norm of `layers`: "rms" or "layer", with a learned scale (offset + weight), and a bias or not."""

    kind: str
    epsilon: float
    scale: bool = True
    bias: bool = False
    offset: float = 0.0

    def over(self, features: int) -> nnx.Module:
        """Return the module over the last axis."""
        if self.kind == "rms":
            return RMSNorm(features, epsilon=self.epsilon, offset=self.offset)
        return LayerNorm(features, epsilon=self.epsilon, scale=self.scale, bias=self.bias)


class Norms(NamedTuple):
    """The attribute name of each norm of a block; None where there is none."""

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


class Layer(NamedTuple):
    """The parts in which the layers of one model differ."""

    rotary: Rotary | None = None  # rotary positions of queries and keys
    window: int | None = None  # a query attends to the last `window` positions, itself included
    dense: bool = False  # one MLP also in a model with experts


class Experts(NamedTuple):
    """A mixture of experts (Shazeer et al. 2017): each token goes through the `chosen` most probable of `count`."""

    count: int
    chosen: int
    width: int
    normalised: bool  # the chosen probabilities are divided by their sum


@dataclasses.dataclass(frozen=True)
class Description:
    """A causal transformer as data."""

    vocab_size: int
    max_length: int
    width: int
    inner: int  # width of the MLP
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    norm: Norm
    norms: Norms
    embedding_norm: bool = False
    head_norm: str | None = None  # of queries and keys: over a "head", "each" with a scale of its own, or "all" at once
    parallel: bool = False  # attention and MLP both read the block's input (Wang and Komatsuzaki 2021)
    fused: str | None = None  # q, k and v in one projection: "blocks" one after the other, or "groups" of key heads
    gated: bool = True  # down(activation(gate(x)) · up(x)) (Shazeer 2020); else down(activation(up(x)))
    fused_gate: bool = False  # gate and up in one projection
    activation: str = "silu"
    biases: frozenset[str] = frozenset()  # of q, k, v, o, mlp, head
    experts: Experts | None = None
    score_scale: float | None = None  # default: head_dim^−½
    score_cap: float | None = None  # scores and logits are c · tanh(x / c) (Gemma Team 2024)
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    clip: float | None = None  # of queries, keys and values
    interleaved: bool = False  # rotary pairs are (2i, 2i + 1), not (i, i + half)
    learned_positions: int | None = None  # row of the table for position 0
    alibi: tuple[float, ...] = ()  # slope of each head (Press et al. 2022)
    tied: bool = True
    std: float = 0.02

    def __post_init__(self):
        check_multiple("num_attention_heads", self.heads, "num_key_value_heads", self.kv_heads)
        if self.experts and self.experts.chosen > self.experts.count:
            raise ValueError(f"{self.experts.chosen} experts for each token must be at most {self.experts.count}.")
        check_choice("the activation", self.activation, ACTIVATIONS)


Hidden = Float[Array, "batch time width"]


class Context(NamedTuple):
    """The arrays that a block reads beside hidden states."""

    turns: tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]] | None  # cosines and sines
    mask: Bool[Array, "batch time slot"]
    bias: Float[Array, "batch head time slot"] | None
    cache: KeyValue | None = None
    index: Int[Array, ""] | None = None  # of the cache's slot for the first token
    intermediates: list[Array] | None = None  # to which attention weights are appended


class HeadsNorm(nnx.Module):
    """LayerNorm without bias over each head, with a scale for each head."""

    def __init__(self, heads: int, head_dim: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((heads, head_dim)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "batch head time head_dim"]) -> Float[Array, "batch head time head_dim"]:
        return standardise(x, self.epsilon) * self.scale[...][:, None]


class Attention(nnx.Module):
    """Grouped-query causal attention (Ainslie et al. 2023)."""

    def __init__(self, config: Description, *, rngs: nnx.Rngs | None):
        d = self.config = config
        queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
        widths = {"qkv_proj": queries + 2 * keys} if d.fused else {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        for name, width in widths.items():
            setattr(self, name, Linear(d.width, width, std=d.std, use_bias=name[0] in d.biases, rngs=rngs))
        self.o_proj = Linear(queries, d.width, std=d.std, use_bias="o" in d.biases, rngs=rngs)
        if d.head_norm == "each":
            self.q_norm, self.k_norm = (HeadsNorm(n, d.head_dim, epsilon=d.norm.epsilon) for n in (d.heads, d.kv_heads))
        elif d.head_norm:
            sizes = (queries, keys) if d.head_norm == "all" else (d.head_dim, d.head_dim)
            self.q_norm, self.k_norm = map(d.norm.over, sizes)

    def project(self, x: Hidden) -> list[Float[Array, "batch time features"]]:
        """Return queries, keys and values, heads side by side."""
        d = self.config
        if not d.fused:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        groups = d.kv_heads if d.fused == "groups" else 1  # each: its queries, its keys, its values
        queries, keys = d.heads * d.head_dim // groups, d.kv_heads * d.head_dim // groups
        fused = self.qkv_proj(x).reshape(*x.shape[:2], groups, queries + 2 * keys)
        # Split, not indexed: the gradient of an index is a padded copy of the whole array.
        parts = jnp.split(fused, [queries, queries + keys], axis=-1)
        return [part.reshape(*x.shape[:2], -1) for part in parts]

    def __call__(self, x: Hidden, at: Context) -> tuple[Hidden, KeyValue]:
        d = self.config
        query, key, value = self.project(x)
        if d.head_norm == "all":
            query, key = self.q_norm(query), self.k_norm(key)
        if d.clip is not None:
            query, key, value = (jnp.clip(each, -d.clip, d.clip) for each in (query, key, value))
        shape = (*x.shape[:2], -1, d.head_dim)  # [batch, time, head, head_dim]
        query, key, value = (each.reshape(shape).swapaxes(1, 2) for each in (query, key, value))
        if d.head_norm in ("head", "each"):
            query, key = self.q_norm(query), self.k_norm(key)
        if at.turns is not None:
            query, key = (rotate(each, *at.turns, interleaved=d.interleaved) for each in (query, key))
        dtype = self.o_proj.kernel[...].dtype
        kept = write_slots(at.cache, key, value, at.index) if at.cache else (key.astype(dtype), value.astype(dtype))
        scale = d.head_dim**-0.5 if d.score_scale is None else d.score_scale
        options = {"scale": scale, "cap": d.score_cap, "bias": at.bias, "intermediates": at.intermediates}
        return self.o_proj(attention(query, kept, at.mask, **options)), kept


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x)), or without gate down(activation(up(x)))."""

    def __init__(self, config: Description, *, rngs: nnx.Rngs | None):
        options = {"std": config.std, "use_bias": "mlp" in config.biases, "rngs": rngs}
        widths = {"gate_proj": config.inner, "up_proj": config.inner} if config.gated else {"up_proj": config.inner}
        for name, width in {"gate_up_proj": 2 * config.inner}.items() if config.fused_gate else widths.items():
            setattr(self, name, Linear(config.width, width, **options))
        self.down_proj = Linear(config.inner, config.width, **options)
        self.config = config

    def __call__(self, x: Hidden) -> Hidden:
        activation = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            # The backward pass keeps one array of the inner width, not three: the activation is cheap to recompute.
            return jax.checkpoint(lambda inner: self.down_proj(activation(inner)))(self.up_proj(x))
        if self.config.fused_gate:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(activation(gate) * up)


class Stack(nnx.Module):
    """The kernels of one linear layer of every expert."""

    def __init__(self, count: int, fan_in: int, fan_out: int, *, std: float, rngs: nnx.Rngs | None):
        self.kernel = normal(rngs, (count, fan_in, fan_out), std)

    def __call__(self, rows: Float[Array, "row in"], sizes: Int[Array, "expert"]) -> Float[Array, "row out"]:
        """Multiply the first sizes[0] rows by the first kernel, the next sizes[1] by the second, and so on."""
        kernel = self.kernel[...]
        return ragged_product(rows.astype(kernel.dtype), kernel, sizes)


class MixtureOfExperts(nnx.Module):
    """Σ p_e · MLP_e(x) over the most probable experts e of p = softmax(gate(x)) (Shazeer et al. 2017)."""

    def __init__(self, config: Description, *, rngs: nnx.Rngs | None):
        experts, options = config.experts, {"std": config.std, "rngs": rngs}
        self.gate = Linear(config.width, experts.count, use_bias=False, **options)
        sizes = {name: (config.width, experts.width) for name in ("gate_proj", "up_proj")}
        sizes["down_proj"] = (experts.width, config.width)
        self.experts = nnx.Dict({name: Stack(experts.count, *size, **options) for name, size in sizes.items()})
        self.config = config

    def __call__(self, x: Hidden) -> Hidden:
        count, chosen, _, normalised = self.config.experts
        rows = x.reshape(-1, x.shape[-1])
        weights, expert = jax.lax.top_k(jax.nn.softmax(self.gate(rows), axis=-1), chosen)  # [row, chosen]
        weights = weights / weights.sum(-1, keepdims=True) if normalised else weights
        order = jnp.argsort(expert.reshape(-1), stable=True)  # rows of one expert side by side
        sizes, source = jnp.bincount(expert.reshape(-1), length=count), order // chosen
        gate, up, inputs = self.experts.gate_proj, self.experts.up_proj, rows[source]
        inner = ACTIVATIONS[self.config.activation](gate(inputs, sizes)) * up(inputs, sizes)
        outputs = self.experts.down_proj(inner, sizes) * weights.reshape(-1)[order][:, None]
        return jnp.zeros(rows.shape, outputs.dtype).at[source].add(outputs).reshape(x.shape)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `parallel` both read the block's input."""

    def __init__(self, config: Description, layer: Layer, *, rngs: nnx.Rngs | None):
        for name in config.norms:
            if name:
                setattr(self, name, config.norm.over(config.width))
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = (MixtureOfExperts if config.experts and not layer.dense else MLP)(config, rngs=rngs)
        self.config = config

    def norm(self, place: str, x: Array) -> Array:
        """Apply the norm of this place; the identity where there is none."""
        name = getattr(self.config.norms, place)
        return getattr(self, name)(x) if name else x

    def __call__(self, x: Hidden, at: Context) -> tuple[Hidden, KeyValue]:
        d, normed = self.config, self.norm("attention_in", x)
        mixed, cache = self.self_attn(normed, at)
        attended = x + d.residual_scale * self.norm("attention_out", mixed)
        # In parallel without a norm of its own the MLP shares that of attention.
        inner = normed if d.parallel and not d.norms.mlp_in else self.norm("mlp_in", x if d.parallel else attended)
        return attended + d.residual_scale * self.norm("mlp_out", self.mlp(inner)), cache


class Transformer(nnx.Module):
    """Token embeddings, the blocks, a final norm, the unembedding (tied or not)."""

    def __init__(self, config: Description, *, rngs: nnx.Rngs | None, checkpoint_blocks: bool = False):
        d = self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        self.embed_tokens = Embedding(d.vocab_size, d.width, std=d.std, rngs=rngs)
        if d.learned_positions is not None:
            self.embed_positions = Embedding(d.max_length + d.learned_positions, d.width, std=d.std, rngs=rngs)
        if d.embedding_norm:
            self.embed_norm = d.norm.over(d.width)
        self.layers = nnx.List([Block(d, layer, rngs=rngs) for layer in d.layers])
        self.norm = d.norm.over(d.width)
        if not d.tied:
            self.lm_head = Linear(d.width, d.vocab_size, std=d.std, use_bias="head" in d.biases, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        placed: Placed,
        cache: list[KeyValue] | None,
        intermediates: list[Array] | None,
    ) -> tuple[Hidden, list[KeyValue]]:
        d = self.config
        x = self.embed_tokens(tokens)
        if d.embedding_scale != 1:  # rounded like the parameters, as in the original
            x = x * jnp.asarray(d.embedding_scale, self.embed_tokens.embedding[...].dtype).astype(x.dtype)
        if d.learned_positions is not None:
            x = x + self.embed_positions(placed.positions + d.learned_positions)
        if d.embedding_norm:
            x = self.embed_norm(x)
        x, written = over_rows(x), []
        for block, at, memory in zip(self.layers, self.contexts(placed), cache or [None] * len(d.layers), strict=True):
            if self.checkpoint_blocks and cache is None and intermediates is None:
                x, key_value = checkpointed(block)(x, at)
            else:
                x, key_value = block(x, at._replace(cache=memory, intermediates=intermediates))
            x = over_rows(x)
            written.append(key_value)
        return self.norm(x), written

    def contexts(self, placed: Placed) -> list[Context]:
        """Return what each layer reads; layers that are alike share the arrays."""
        d, mask = self.config, placed.attention_mask
        rotaries = {layer.rotary for layer in d.layers if layer.rotary}
        turns = {each: each.turn(placed.positions, placed.lengths) for each in rotaries}
        distance = placed.slots[:, None, :] - placed.positions[:, :, None]  # 0 at the query itself, negative before
        windows = {layer.window for layer in d.layers}
        masks = {window: mask if window is None else mask & (distance > -window) for window in windows}
        slopes = jnp.asarray(d.alibi, jnp.float32)[None, :, None, None]
        bias = slopes * distance[:, None] if d.alibi else None
        index = placed.cache_index
        return [Context(turns.get(layer.rotary), masks[layer.window], bias, index=index) for layer in d.layers]

    def unembed(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        d = self.config
        logits = self.embed_tokens.attend(hidden) if d.tied else self.lm_head(hidden)
        logits = logits if d.logit_scale == 1 else logits * d.logit_scale
        return logits if d.logit_cap is None else d.logit_cap * jnp.tanh(logits / d.logit_cap)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return 2^(−8i/n) for heads i = 1 … n (Press et al. 2022).

    If n is not a power of two, the heads beyond the last one below n take every other slope of the next power.
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    slopes += [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)]
    return tuple(slopes)


@dataclasses.dataclass(frozen=True)
class Decoder(DecoderLM):
    """A causal transformer of any family as a `LanguageModel`: `Decoder(Config("qwen3", num_hidden_layers=2, ...))`."""

    config: Any  # a `configuration.Config`

    @property
    def max_length(self) -> int:
        return self.config.description.max_length

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        description = self.config.description
        return len(description.layers), description.kv_heads, description.head_dim

    def build(self, rngs: nnx.Rngs | None) -> Transformer:
        return Transformer(self.config.description, rngs=rngs, checkpoint_blocks=self.checkpoint_blocks)
