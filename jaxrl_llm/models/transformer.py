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
from jaxrl_llm.models import layers
from jaxrl_llm.models.decoder import DecoderLM, Placed, check_choice, check_multiple, checkpointed
from jaxrl_llm.models.rotary import Rotary, rotate
from jaxrl_llm.products import ragged_product


class Norm(NamedTuple):
    """A norm of `layers`: "rms" or "layer", with a learned scale (offset + weight), and a bias or not."""

    kind: str = "rms"
    scale: bool = True
    bias: bool = False
    offset: float = 0.0

    def over(self, features: int | tuple[int, ...], epsilon: float) -> nnx.Module:
        """Return the module over the last axis, with a scale of this shape."""
        if self.kind == "rms":
            return layers.RMSNorm(features, epsilon=epsilon, offset=self.offset)
        return layers.LayerNorm(features, epsilon=epsilon, scale=self.scale, bias=self.bias)


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
    epsilon: float = 1e-5  # of the norms
    embedding_norm: bool = False
    head_norm: str | None = None  # of queries and keys: over a "head", "each" with a scale of its own, or "all" at once
    parallel: bool = False  # attention and MLP both read the block's input (Wang and Komatsuzaki 2021)
    fused: str | None = None  # q, k and v in one projection: "blocks" one after the other, or "groups" of key heads
    gate: str | None = "separate"  # the MLP's (Shazeer 2020), or "fused" with up in one projection; None: without gate
    activation: str = "silu"
    biases: frozenset[str] = frozenset()  # of q, k, v, o, mlp, head
    experts: int | None = None  # MLPs in a mixture (Shazeer et al. 2017)
    chosen: int = 0  # of the experts, for each token: the most probable ones
    normalised: bool = True  # the probabilities of the chosen experts are divided by their sum
    expert_width: int | None = None  # default: that of the MLP
    score_scale: float | None = None  # default: head_dim^−½
    score_cap: float | None = None  # scores and logits are c · tanh(x / c) (Gemma Team 2024)
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    clip: float | None = None  # of queries, keys and values
    interleaved: bool = False  # rotary pairs are (2i, 2i + 1), not (i, i + half)
    learned_positions: int | None = None  # row of the table for position 0
    alibi: float | None = None  # factor of the slopes (Press et al. 2022)
    tied: bool = True
    std: float = 0.02
    attention_form: str = "exact"  # one of `layers.FORMS`

    def __post_init__(self):
        check_multiple("num_attention_heads", self.heads, "num_key_value_heads", self.kv_heads)
        if self.experts and self.chosen > self.experts:
            raise ValueError(f"{self.chosen} experts for each token must be at most {self.experts}.")
        check_choice("the activation", self.activation, layers.ACTIVATIONS)


Hidden = Float[Array, "batch time width"]


class Context(NamedTuple):
    """The arrays that a block reads beside hidden states."""

    turns: tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]] | None  # cosines and sines
    mask: Bool[Array, "batch time slot"]
    bias: Float[Array, "batch head time slot"] | None
    cache: layers.KeyValue | None = None
    index: Int[Array, ""] | None = None  # of the cache's slot for the first token
    intermediates: list[Array] | None = None  # to which attention weights are appended


class Attention(nnx.Module):
    """Grouped-query causal attention (Ainslie et al. 2023)."""

    def __init__(self, config: Description, *, rngs: nnx.Rngs | None):
        d = self.config = config
        queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
        widths = {"qkv_proj": queries + 2 * keys} if d.fused else {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        for name, width in widths.items():
            setattr(self, name, layers.Linear(d.width, width, std=d.std, use_bias=name[0] in d.biases, rngs=rngs))
        self.o_proj = layers.Linear(queries, d.width, std=d.std, use_bias="o" in d.biases, rngs=rngs)
        if d.head_norm:
            each = (d.heads, d.head_dim), (d.kv_heads, d.head_dim)
            scales = {"head": (d.head_dim, d.head_dim), "each": each, "all": (queries, keys)}[d.head_norm]
            self.q_norm, self.k_norm = (d.norm._replace(bias=False).over(scale, d.epsilon) for scale in scales)

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

    def __call__(self, x: Hidden, at: Context) -> tuple[Hidden, layers.KeyValue]:
        d = self.config
        query, key, value = self.project(x)
        if d.head_norm == "all":
            query, key = self.q_norm(query), self.k_norm(key)
        if d.clip is not None:
            query, key, value = (jnp.clip(each, -d.clip, d.clip) for each in (query, key, value))
        # From [batch, time, features] to [batch, time, head, head_dim].
        query, key, value = (each.reshape(*x.shape[:2], -1, d.head_dim) for each in (query, key, value))
        if d.head_norm in ("head", "each"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (each.swapaxes(1, 2) for each in (query, key, value))
        if at.turns is not None:
            query, key = (rotate(each, *at.turns, interleaved=d.interleaved) for each in (query, key))
        kept = tuple(each.astype(self.o_proj.kernel[...].dtype) for each in (key, value))
        if at.cache:
            kept = layers.write_slots(at.cache, key, value, at.index)
        scale = d.head_dim**-0.5 if d.score_scale is None else d.score_scale
        options = {"scale": scale, "cap": d.score_cap, "bias": at.bias, "intermediates": at.intermediates}
        return self.o_proj(layers.attention(query, kept, at.mask, **options, form=d.attention_form)), kept


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x)), or without gate down(activation(up(x)))."""

    def __init__(self, config: Description, *, rngs: nnx.Rngs | None):
        d = self.config = config
        options = {"std": d.std, "use_bias": "mlp" in d.biases, "rngs": rngs}
        names = {"separate": ("gate_proj", "up_proj"), "fused": ("gate_up_proj",), None: ("up_proj",)}[d.gate]
        for name in names:
            setattr(self, name, layers.Linear(d.width, 2 * d.inner if d.gate == "fused" else d.inner, **options))
        self.down_proj = layers.Linear(d.inner, d.width, **options)

    def __call__(self, x: Hidden) -> Hidden:
        activation = layers.ACTIVATIONS[self.config.activation]
        if self.config.gate is None:
            # The backward pass keeps one array of the inner width, not three: the activation is cheap to recompute.
            return jax.checkpoint(lambda inner: self.down_proj(activation(inner)))(self.up_proj(x))
        fused = self.config.gate == "fused"
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1) if fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(activation(gate) * up)


class Stack(nnx.Module):
    """The kernels of one linear layer of every expert."""

    def __init__(self, count: int, fan_in: int, fan_out: int, *, std: float, rngs: nnx.Rngs | None):
        self.kernel = layers.normal(rngs, (count, fan_in, fan_out), std)

    def __call__(self, rows: Float[Array, "row in"], sizes: Int[Array, "expert"]) -> Float[Array, "row out"]:
        """Multiply the first sizes[0] rows by the first kernel, the next sizes[1] by the second, and so on."""
        kernel = self.kernel[...]
        return ragged_product(rows.astype(kernel.dtype), kernel, sizes)


class MixtureOfExperts(nnx.Module):
    """Σ p_e · MLP_e(x) over the most probable experts e of p = softmax(gate(x)) (Shazeer et al. 2017)."""

    def __init__(self, config: Description, *, rngs: nnx.Rngs | None):
        d = self.config = config
        width, options = d.expert_width or d.inner, {"std": d.std, "rngs": rngs}
        self.gate = layers.Linear(d.width, d.experts, use_bias=False, **options)
        sizes = {"gate_proj": (d.width, width), "up_proj": (d.width, width), "down_proj": (width, d.width)}
        self.experts = nnx.Dict({name: Stack(d.experts, *size, **options) for name, size in sizes.items()})

    def __call__(self, x: Hidden) -> Hidden:
        d = self.config
        rows = x.reshape(-1, x.shape[-1])
        weights, expert = jax.lax.top_k(jax.nn.softmax(self.gate(rows), axis=-1), d.chosen)  # [row, chosen]
        weights = weights / weights.sum(-1, keepdims=True) if d.normalised else weights
        order = jnp.argsort(expert.reshape(-1), stable=True)  # rows of one expert side by side
        sizes, source = jnp.bincount(expert.reshape(-1), length=d.experts), order // d.chosen
        gate, up, inputs = self.experts.gate_proj, self.experts.up_proj, rows[source]
        inner = layers.ACTIVATIONS[d.activation](gate(inputs, sizes)) * up(inputs, sizes)
        outputs = self.experts.down_proj(inner, sizes) * weights.reshape(-1)[order][:, None]
        return jnp.zeros(rows.shape, outputs.dtype).at[source].add(outputs).reshape(x.shape)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `parallel` both read the block's input."""

    def __init__(self, config: Description, layer: Layer, *, rngs: nnx.Rngs | None):
        for name in config.norms:
            if name:
                setattr(self, name, config.norm.over(config.width, config.epsilon))
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = (MixtureOfExperts if config.experts and not layer.dense else MLP)(config, rngs=rngs)
        self.config = config

    def norm(self, place: str, x: Array) -> Array:
        """Apply the norm of this place; the identity where there is none."""
        name = getattr(self.config.norms, place)
        return getattr(self, name)(x) if name else x

    def __call__(self, x: Hidden, at: Context) -> tuple[Hidden, layers.KeyValue]:
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
        self.embed_tokens = layers.Embedding(d.vocab_size, d.width, std=d.std, rngs=rngs)
        if d.learned_positions is not None:
            self.embed_positions = layers.Embedding(d.max_length + d.learned_positions, d.width, std=d.std, rngs=rngs)
        if d.embedding_norm:
            self.embed_norm = d.norm.over(d.width, d.epsilon)
        self.layers = nnx.List([Block(d, layer, rngs=rngs) for layer in d.layers])
        self.norm = d.norm.over(d.width, d.epsilon)
        if not d.tied:
            self.lm_head = layers.Linear(d.width, d.vocab_size, std=d.std, use_bias="head" in d.biases, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        placed: Placed,
        cache: list[layers.KeyValue] | None,
        intermediates: list[Array] | None,
    ) -> tuple[Hidden, list[layers.KeyValue]]:
        d = self.config
        x = self.embed_tokens(tokens)
        if d.embedding_scale != 1:  # rounded like the parameters, as in the original
            x = x * jnp.asarray(d.embedding_scale, self.embed_tokens.embedding[...].dtype).astype(x.dtype)
        if d.learned_positions is not None:
            x = x + self.embed_positions(placed.positions + d.learned_positions)
        if d.embedding_norm:
            x = self.embed_norm(x)
        x, written = over_rows(x), []
        recomputed = self.checkpoint_blocks and cache is None and intermediates is None
        for block, at, memory in zip(self.layers, self.contexts(placed), cache or [None] * len(d.layers), strict=True):
            block = checkpointed(block) if recomputed else block
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
        slopes = [d.alibi * slope for slope in alibi_slopes(d.heads)] if d.alibi else []
        bias = jnp.asarray(slopes, jnp.float32)[:, None, None] * distance[:, None] if d.alibi else None
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

    @property
    def score_cap(self) -> float | None:
        return self.config.description.score_cap

    def build(self, rngs: nnx.Rngs | None) -> Transformer:
        description = dataclasses.replace(self.config.description, attention_form=self.attention_form)
        return Transformer(description, rngs=rngs, checkpoint_blocks=self.checkpoint_blocks)
