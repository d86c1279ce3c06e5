"""Layers shared by the neural models, as Flax NNX modules that do not mutate."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.mesh import by_own_heads, over_rows
from jaxrl_llm.numerics import on_cpu
from jaxrl_llm.products import product, rows_at, summed_wide

CHUNK_SCORES = 2**24  # attention scores of a layer that a device holds at once: 64 MiB in float32
Form = Literal["exact", "cudnn"]  # of attention; the fused one is NVIDIA's
FORMS = get_args(Form)
KeyValue = tuple[Float[Array, "batch kv_head slot head_dim"], Float[Array, "batch kv_head slot head_dim"]]

ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),  # the tanh form, GPT-2's own
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Draw a parameter from N(0, std²); without `rngs`, for the shapes alone, it is zero."""
    return nnx.Param(jnp.zeros(shape) if rngs is None else std * jax.random.normal(rngs.params(), shape))


def is_one_bfloat16_row(x: Float[Array, "*batch features"]) -> bool:
    """Return True if XLA's CPU backend would convert the whole matrix that x is multiplied by to float32.

    That takes longer than a product of two rows, and twice the matrix's memory: such a row is taken `twice`.
    """
    return on_cpu() and x.size == x.shape[-1] and x.dtype == jnp.bfloat16


def twice(row: Float[Array, "1 features"]) -> Float[Array, "2 features"]:
    """Return the row twice; the barrier hides from XLA that both are equal."""
    return jax.lax.optimization_barrier(jnp.repeat(row, 2, axis=0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kernel W with a low-rank adapter whose inputs are dropped out, in place of the array: x W + dropout(x) A B."""

    kernel: Float[Array, "in out"]
    a: Float[Array, "in rank"]
    b: Float[Array, "rank out"]
    key: Key[Array, ""]
    rate: float = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Adapted:
        return self

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel.dtype

    def further(self, rows: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        """Return dropout(x) A B: each input is 0 with probability `rate`, else divided by 1 − rate."""
        kept = jax.random.bernoulli(self.key, 1 - self.rate, rows.shape)
        rows = jnp.where(kept, rows / (1 - self.rate), 0).astype(self.a.dtype)
        return product("nr,ro->no", product("ni,ir->nr", rows, self.a).astype(self.b.dtype), self.b)


class Linear(nnx.Module):
    """x @ kernel + bias: inputs in the kernel's dtype, sums in float32 or wider."""

    def __init__(self, in_features: int, out_features: int, *, std: float, use_bias: bool, rngs: nnx.Rngs | None):
        self.kernel = normal(rngs, (in_features, out_features), std)
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        adapted = self.kernel[...]
        kernel = adapted.kernel if isinstance(adapted, Adapted) else adapted
        # As rows: with two batch axes, XLA's CPU backend would transpose an input of the kernel's gradient.
        rows = x.reshape(-1, x.shape[-1]).astype(kernel.dtype)
        rows = twice(rows) if is_one_bfloat16_row(rows) else rows
        y = product("ni,io->no", rows, kernel)
        y = y + adapted.further(rows) if isinstance(adapted, Adapted) else y
        y = y[: math.prod(x.shape[:-1])].reshape(*x.shape[:-1], kernel.shape[1])
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Rows of a table; `attend` is the tied unembedding, their inner products with hidden states."""

    def __init__(self, num_embeddings: int, features: int, *, std: float, rngs: nnx.Rngs | None):
        self.embedding = normal(rngs, (num_embeddings, features), std)

    def __call__(self, index: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        return rows_at(self.embedding[...], index)

    def attend(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch num_embeddings"]:
        table = self.embedding[...]
        return unembed(x.astype(table.dtype).reshape(-1, x.shape[-1]), table).reshape(*x.shape[:-1], table.shape[0])


def unembed(x: Float[Array, "rows features"], table: Float[Array, "vocab features"]) -> Float[Array, "rows vocab"]:
    """Compute x @ tableᵀ; on CPUs in the form that XLA runs fastest for few rows, as in a decoding step."""
    if is_one_bfloat16_row(x):
        return product("nd,vd->nv", twice(x), table)[:1]
    if on_cpu() and x.shape[0] <= 64 and table.dtype == jnp.float32:
        return jnp.einsum("vd,nd->vn", table, x).T  # 1.5 times faster than the other order
    return product("nd,vd->nv", x, table)


def standardise(x: Float[Array, "*batch features"], epsilon: float) -> Float[Array, "*batch features"]:
    """Compute (x − mean) / √(variance + ε) over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


class LayerNorm(nnx.Module):
    """(x − mean) / √(variance + ε) · scale + bias over the last axis (Ba et al. 2016); scale and bias are optional."""

    def __init__(self, features: int | tuple[int, ...], *, epsilon: float, scale: bool = True, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(features)) if scale else None
        self.bias = nnx.Param(jnp.zeros(features)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        x = standardise(x, self.epsilon)
        x = x if self.scale is None else x * self.scale[...]
        return x if self.bias is None else x + self.bias[...]


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) · (offset + scale) over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, *, epsilon: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(features, 1 - offset))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.scale[...] if self.offset == 0 else self.offset + self.scale[...].astype(x.dtype)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * scale


def write_slots(cache: KeyValue, key: Array, value: Array, index: Int[Array, ""]) -> KeyValue:
    """Write keys and values [batch, kv_head, time, head_dim] from slot `index` on."""
    zero = jnp.zeros_like(index)
    place = (zero, zero, index, zero)
    old_key, old_value = cache
    written = (
        jax.lax.dynamic_update_slice(old_key, key.astype(old_key.dtype), place),
        jax.lax.dynamic_update_slice(old_value, value.astype(old_value.dtype), place),
    )
    return over_rows(written, heads=True)


def attention_weights(
    query: Float[Array, "batch head time head_dim"],
    key: Float[Array, "batch kv_head slot head_dim"],
    mask: Bool[Array, "batch time slot"],
    *,
    scale: float,
    cap: float | None = None,
    bias: Float[Array, "#batch head time slot"] | None = None,
    intermediates: list[Array] | None = None,
) -> Float[Array, "batch kv_head group time slot"]:
    """Compute softmax(scale · q kᵀ + bias) over the slots in the mask; query head i attends to key head i // group.

    With a `cap` c the scaled scores s are c · tanh(s / c) (Gemma Team 2024).

    A query that attends to nothing (padding) gets uniform weights, not NaN. The weights are appended to `intermediates`
    if it is a list.
    """
    batch, heads, time, head_dim = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(batch, kv_heads, heads // kv_heads, time, head_dim).astype(key.dtype)
    scores = product("bkgtd,bksd->bkgts", query, key) * scale
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores += bias.reshape(bias.shape[0], *scores.shape[1:])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if intermediates is not None:
        intermediates.append(weights)
    return weights


def recorded_weights(
    intermediates: Sequence[Float[Array, "batch kv_head group query key"]], queries: Bool[Array, "batch query"] | None
) -> Float[Array, "layer batch head query key"]:
    """Stack the weights of all layers into one array, 0 where the query is padding."""
    weights = jnp.stack(intermediates)
    weights = weights.reshape(*weights.shape[:2], -1, *weights.shape[-2:])
    return weights if queries is None else jnp.where(queries[None, :, None, :, None], weights, 0)


def attend(
    weights: Float[Array, "batch kv_head group time slot"], value: Float[Array, "batch kv_head slot head_dim"]
) -> Float[Array, "batch time features"]:
    """Return the weighted sums of values, heads concatenated."""
    # Transposed after the product: XLA's CPU backend has no transposing bfloat16 × bfloat16 = float32 product.
    mixed = product("bkgts,bksd->bkgtd", weights.astype(value.dtype), value)
    batch, kv_heads, group, time, head_dim = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, kv_heads * group * head_dim)


def compute_capability() -> tuple[int, int] | None:
    """Return that of the NVIDIA GPUs that programs run on; None if they run elsewhere."""
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def check_form(form: str, *, head_dim: int, cap: float | None) -> None:
    """Raise ValueError unless models of this head dimension and cap on scores can have this form of attention."""
    if form == "exact":
        return
    if form not in FORMS:
        raise ValueError(f"attention must be one of {', '.join(FORMS)}, but is {form!r}.")
    found = compute_capability()
    if found is None or found < (8, 0):
        has = "programs run on " + jax.default_backend() if found is None else f"it has {found[0]}.{found[1]}"
        raise ValueError(f"attention {form} needs an NVIDIA GPU of compute capability 8.0 or above, but {has}.")
    if cap is not None:
        raise ValueError(f"attention {form} needs a model without a cap on scores, but its cap is {cap:g}.")
    most = 256 if found[0] == 9 else 128  # of the gradient, by cuDNN's table
    if head_dim % 8 or head_dim > most:
        raise ValueError(
            f"attention {form} needs a head dimension that is a multiple of 8 and at most {most} on this GPU, "
            f"but it is {head_dim}."
        )


def check_dtype(form: str, dtype: Any) -> None:
    """Raise ValueError unless this form of attention can be computed in this dtype."""
    if form == "cudnn" and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention {form} needs parameters in bfloat16 or float16, but they are in {dtype}.")


def fused_attention(
    query: Float[Array, "batch head time head_dim"],
    key_value: KeyValue,
    mask: Bool[Array, "#batch #time slot"],
    *,
    scale: float,
    bias: Float[Array, "#batch head time slot"] | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "batch time features"]:
    """Compute attention by `jax.nn.dot_product_attention`, which with cuDNN holds no scores (Dao et al. 2022).

    cuDNN reads mask and bias as one bias in the keys' dtype, [batch, 1 or head, time, slot], and writes its gradient.
    It has no forward-mode derivative, and not all of its batched forms are right: neither `jax.jvp` nor `jax.vmap`.
    """
    (batch, heads, time, head_dim), slots, dtype = query.shape, mask.shape[2], key_value[0].dtype

    def padded(array: Array, rows: int, columns: int = 0) -> Array:
        return jnp.pad(array, [(0, 0), (0, 0), (0, rows), (0, columns)])

    # cuDNN's gradient needs even numbers of queries and slots: a further query is cut off, a further slot is masked.
    odd_time, odd_slots = time % 2, slots % 2
    mask = padded(jnp.broadcast_to(mask[:, None], (batch, 1, time, slots)), odd_time)
    # A query that attends to nothing has scores of 0 for all slots, and so uniform weights.
    attends = mask.any(axis=-1, keepdims=True)
    arrays = [jnp.where(attends, padded(query, odd_time), 0).astype(dtype)]
    arrays += [padded(each, odd_slots) for each in key_value]
    arrays += [padded(mask | ~attends, 0, odd_slots)]
    if bias is not None:
        bias = padded(jnp.broadcast_to(bias, (batch, heads, time, slots)), odd_time)
        arrays += [padded(jnp.where(attends, bias, 0).astype(dtype), 0, odd_slots)]

    def of_heads(query: Array, key: Array, value: Array, mask: Array, bias: Array | None = None) -> Array:
        by_time = (each.swapaxes(1, 2) for each in (query, key, value))
        options = {"scale": scale, "implementation": implementation}
        return jax.nn.dot_product_attention(*by_time, bias, mask, **options).swapaxes(1, 2)

    mixed = by_own_heads(of_heads, *arrays)[:, :, :time]
    return mixed.swapaxes(1, 2).reshape(batch, time, heads * head_dim)


def attention(
    query: Float[Array, "batch head time head_dim"],
    key_value: KeyValue,
    mask: Bool[Array, "batch #time slot"],
    *,
    scale: float,
    cap: float | None = None,
    bias: Float[Array, "#batch head time slot"] | None = None,
    intermediates: list[Array] | None = None,
    form: str = "exact",
) -> Float[Array, "batch time features"]:
    """Compute `attend(attention_weights(...))`, a chunk of the queries at a time if the scores are many.

    Scores are then recomputed for the gradient, so that memory grows linearly with the length, but for mask and bias.
    Weights that are recorded are computed at once.

    Args:
        form: one of `FORMS`; `check_form` says what "cudnn" needs. Steps of one token, and recorded weights, are always
            computed in the exact form.

    Raises:
        ValueError: if `form` is "cudnn", and keys are neither in bfloat16 nor in float16.
    """
    if form == "cudnn" and intermediates is None and query.shape[2] > 1:
        check_dtype(form, key_value[0].dtype)
        return fused_attention(query, key_value, mask, scale=scale, bias=bias)

    def of_queries(key_value: KeyValue, query: Array, mask: Array, bias: Array | None) -> Array:
        options = {"scale": scale, "cap": cap, "bias": bias, "intermediates": intermediates}
        return attend(attention_weights(query, key_value[0], mask, **options), key_value[1])

    (batch, heads, time, _), slots = query.shape, mask.shape[2]
    devices = max(1, jax.sharding.get_abstract_mesh().size)  # 0 without a mesh
    size = max(1, CHUNK_SCORES * devices // max(1, batch * heads * slots))
    if size >= time or intermediates is not None:
        return of_queries(key_value, query, mask, bias)
    chunks = -(-time // size)
    size = -(-time // chunks)  # of even sizes
    summed, as_it_was = summed_wide(key_value)

    def cut(array: Array, axis: int) -> Array:
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, chunks * size - time)
        shape = (*array.shape[:axis], chunks, size, *array.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(array, padding).reshape(shape), axis, 0)

    # What is alike for all queries is read whole.
    parts = (cut(query, 2), None if mask.shape[1] == 1 else cut(mask, 1), None if bias is None else cut(bias, 2))

    def of_chunk(parts: tuple[Array, Array | None, Array | None]) -> Array:
        query, own, bias = parts
        return of_queries(as_it_was(summed), query, mask if own is None else own, bias)

    found = jnp.moveaxis(jax.lax.map(jax.checkpoint(of_chunk), parts), 0, 1)
    return found.reshape(batch, chunks * size, -1)[:, :time]
