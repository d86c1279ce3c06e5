"""Shared numerics: input checks, and arithmetic that stays finite where a number leaves its range."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree


def is_concrete(array: Any) -> bool:
    """True if the values can be read: under `jit`, `vmap` and `grad` they cannot."""
    return not isinstance(array, jax.core.Tracer)


def host(values: Any) -> Array | np.ndarray:
    """Return values as an array of numpy, for which no program is compiled; one of JAX, or of traced numbers, stays."""
    if isinstance(values, jax.Array):
        return values
    try:
        return np.asarray(values)
    except TypeError:  # a list with traced numbers
        return jnp.asarray(values)


def on_device(tree: PyTree) -> PyTree:
    """Return a tree with numpy's arrays as JAX's, for which no program is compiled; those of JAX stay where they are.

    They may lie on the devices of several processes.
    """
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)


def library_of(*arrays: Array | np.ndarray) -> ModuleType:
    """Return numpy if all arrays are its own, else jax.numpy: the library whose operations keep them where they are."""
    return np if all(isinstance(each, np.ndarray) for each in arrays) else jnp


def violated(condition: bool | Array) -> bool:
    """True if the condition, or an entry of it, is concretely false; False when traced."""
    return is_concrete(condition) and not (condition if isinstance(condition, bool) else condition.all())


def on_cpu() -> bool:
    """True if programs run on CPUs, for whose XLA backend some products are written in another order."""
    return jax.default_backend() == "cpu"


def wide(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cast to float32 unless wider already, as log-probabilities always are."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def largest(array: Float[Array, "*batch size"], k: int) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """Return the k largest values along the last axis, and their places.

    Barriers keep XLA from merging what follows into a sort of the whole axis. They are two, since on a mesh XLA crashes
    at one for both results.
    """
    values, places = jax.lax.top_k(array, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def finite_gradient(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array itself, with no gradient into entries that are infinite or NaN.

    A log-probability of `-inf` that a mask hides is then harmless: its value is masked later, and its gradient, which
    would be 0 · inf = NaN, is 0. A value that is *not* masked stays infinite, and shows.
    """
    return jnp.where(jnp.isfinite(array), array, jax.lax.stop_gradient(array))


def log_ratio(logp: Float[Array, "..."], logp_other: Float[Array, "..."]) -> Float[Array, "..."]:
    """log p − log q with a `finite_gradient`, the form in which objectives subtract log-probabilities."""
    return finite_gradient(logp - logp_other)


def checked(**arrays: Array) -> tuple[Array, ...]:
    """Return the named arrays, each `wide`, after checking that they are floating and of one shape.

    Raises:
        ValueError: naming the first array whose shape is not that of the first one, or whose dtype is not floating.
    """
    taken = {name: floating(name, array) for name, array in arrays.items()}
    first, shape = next((name, array.shape) for name, array in taken.items())
    for name, array in taken.items():
        if array.shape != shape:
            raise ValueError(f"{name} must have the shape of {first}, {list(shape)}, but has {list(array.shape)}.")
    return tuple(taken.values())


def floating(name: str, array: Array, *, ndim: int = 0) -> Array:
    """Return one named array, `wide`.

    Raises:
        ValueError: if its dtype is not floating, or it has fewer than `ndim` axes.
    """
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, but is {array.dtype}.")
    if array.ndim < ndim:
        raise ValueError(f"{name} must have at least {ndim} axes, but has the shape {list(array.shape)}.")
    return wide(array)


def checked_mask(mask: Array | None, shape: tuple[int, ...], *, of: str) -> Bool[Array, "..."]:
    """Return the mask as booleans, all true if it is None.

    Raises:
        ValueError: if its shape is not that of the array named `of`, or it holds anything but 0 and 1.
    """
    if mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(mask)
    if mask.shape != tuple(shape):
        raise ValueError(f"mask must have the shape of {of}, {list(shape)}, but has {list(mask.shape)}.")
    if mask.dtype != bool and violated((mask == 0) | (mask == 1)):
        raise ValueError(f"mask must be boolean, or 0 and 1, but is {mask.dtype} and holds other values.")
    return mask.astype(bool)


def check_range(
    low: float = -jnp.inf, high: float = jnp.inf, *, open_low: bool = False, open_high: bool = False, **numbers: Any
) -> None:
    """Raise ValueError if a named number lies outside [low, high]; an `open_` end is excluded, as infinity always is.

    The value of a traced number is unknown and passes; outside its range the result may not be finite.
    """
    for name, value in numbers.items():
        above = value > low if open_low else value >= low
        below = value < high if open_high or high == jnp.inf else value <= high
        if violated(above & below):
            interval = f"{'(' if open_low or low == -jnp.inf else '['}{low:g}, {high:g}"
            closing = ")" if open_high or high == jnp.inf else "]"
            raise ValueError(f"{name} must lie in {interval}{closing}, but is {value}.")


def times(weight: float | Array, value: Array) -> Array:
    """weight · value, and 0 where the weight is 0, also if the value is infinite."""
    return jnp.where(jnp.asarray(weight) == 0, 0, weight * value)


@jax.custom_jvp
def bounded_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp x, held at e^80 beyond 80 (float64: at e^700 beyond 700), so that it never overflows; its own derivative.

    The derivative is held too and does not fall to 0, so that a ratio out of range is still pulled back.
    """
    return jnp.exp(jnp.minimum(x, 700.0 if x.dtype == jnp.float64 else 80.0))


@bounded_exp.defjvp
def _bounded_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value = bounded_exp(*primals)
    return value, value * tangents[0]


@jax.custom_jvp
def sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """σ(x), with the derivative σ(x) σ(−x): as σ(x) (1 − σ(x)) it is 0 in float32 where σ(x) rounds to 1."""
    return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value = sigmoid(*primals)
    return value, value * sigmoid(-primals[0]) * tangents[0]


def exp_minus_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp x − 1 without cancellation near 0, bounded as `bounded_exp` is."""
    near = jnp.abs(x) < 1
    return jnp.where(near, jnp.expm1(jnp.where(near, x, 0)), bounded_exp(x) - 1)


def log_softmax(logits: Float[Array, "... vocab"]) -> Float[Array, "... vocab"]:
    """log softmax over the last axis; a row that is all `-inf` stays so. The gradient is finite there too."""
    empty = logits.max(axis=-1, keepdims=True) == -jnp.inf
    return jnp.where(empty, -jnp.inf, jax.nn.log_softmax(jnp.where(empty, 0, logits), axis=-1))
