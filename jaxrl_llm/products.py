"""Matrix products in mixed precision: sums in float32 or wider; of bfloat16 operands those of the gradient too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.numerics import on_cpu


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of sums and of the residual stream: float32, or wider if the parameters are."""
    return jnp.promote_types(dtype, jnp.float32)


def product(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the einsum of an equation such as "ni,io->no", with sums in float32 or wider.

    Of bfloat16 operands the gradient's products are of bfloat16 too: the cotangent is rounded to bfloat16 first, and
    sums are in float32 (Micikevicius et al. 2018). Of such operands only reverse mode is defined.

    Args:
        equation: every letter is in two of the three terms or in all.
    """
    if x.dtype == y.dtype == jnp.bfloat16:
        return _narrow(equation, x, y)
    return _sums(equation, x, y)


def ragged_product(
    rows: Float[Array, "row in"], kernel: Float[Array, "group in out"], sizes: Int[Array, "group"]
) -> Float[Array, "row out"]:
    """Multiply the first sizes[0] rows by the first kernel, the next sizes[1] by the second, ..., as `product` does."""
    if rows.dtype == kernel.dtype == jnp.bfloat16:
        return _narrow_ragged(rows, kernel, sizes)
    return jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=accumulator(kernel.dtype))


def rows_at(table: Float[Array, "row features"], index: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
    """Return rows of a table in float32 or wider, in which the gradients of one row's uses are also summed."""
    return (
        _narrow_rows_at(table, index) if table.dtype == jnp.bfloat16 else table[index].astype(accumulator(table.dtype))
    )


def summed_wide(held: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Return what a loop reads with bfloat16 in float32, and a function that gives it back as it was.

    Called inside of the loop, it keeps the loop's sum of gradients in float32.
    """
    narrow = jax.tree.map(lambda leaf: getattr(leaf, "dtype", None) == jnp.bfloat16, held)

    def cast(tree: PyTree, dtype: jnp.dtype) -> PyTree:
        return jax.tree.map(lambda leaf, narrow: leaf.astype(dtype) if narrow else leaf, tree, narrow)

    return cast(held, jnp.float32), lambda tree: cast(tree, jnp.bfloat16)


def _sums(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=accumulator(jnp.promote_types(x.dtype, y.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow(equation: str, x: Array, y: Array) -> Array:
    return _sums(equation, x, y)


def _narrow_forward(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _sums(equation, x, y), (x, y)


def _narrow_backward(equation: str, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    (x, y), cotangent = operands, cotangent.astype(jnp.bfloat16)
    (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
    # XLA transposes and reshapes the products of a mesh by itself, without communication.
    sums = _by_matrices if on_cpu() and jax.sharding.get_abstract_mesh().empty else _sums
    of_x, of_y = sums(f"{result},{right}->{left}", cotangent, y), sums(f"{left},{result}->{right}", x, cotangent)
    return of_x.astype(jnp.bfloat16), of_y.astype(jnp.bfloat16)


_narrow.defvjp(_narrow_forward, _narrow_backward)


def _by_matrices(equation: str, x: Array, y: Array) -> Array:
    """Compute the einsum as one of [batch, m, k] and [batch, k, n] or [batch, n, k].

    Of other orders XLA's CPU backend would convert bfloat16 operands to float32, in which it multiplies at half the
    speed. The barriers keep it from folding transposes into the product.
    """
    (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
    batch = [letter for letter in result if letter in left and letter in right]
    if result[len(batch)] not in left:
        (left, x), (right, y) = (right, y), (left, x)
    inner = [letter for letter in left if letter in right and letter not in result]
    rows = [letter for letter in left if letter not in right]
    columns = [letter for letter in right if letter not in left]
    size = dict(zip(left + right, x.shape + y.shape, strict=True))

    def matrices(term: str, array: Array, *groups: list[str]) -> Array:
        order, shape = sum(groups, batch), [math.prod(map(size.get, group)) for group in groups]
        if batch or order != [*term]:  # heads are often transposed before
            array = jax.lax.optimization_barrier(array.transpose([*map(term.index, order)]).reshape(-1))
        return array.reshape(*map(size.get, batch), *shape)

    flipped = right.index(inner[0]) > right.index(columns[0])
    x = matrices(left, x, rows, inner)
    y = matrices(right, y, columns, inner) if flipped else matrices(right, y, inner, columns)
    found = jax.lax.optimization_barrier(_sums("...mk,...nk->...mn" if flipped else "...mk,...kn->...mn", x, y))
    return found.reshape([*map(size.get, result)])


@jax.custom_vjp
def _narrow_ragged(rows: Array, kernel: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32)


def _narrow_ragged_backward(given: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    (rows, kernel, sizes), cotangent = given, cotangent.astype(jnp.bfloat16)
    of_rows = _narrow_ragged(cotangent, kernel.swapaxes(1, 2), sizes)
    groups = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])  # of rows, which are summed over
    of_kernel = jax.lax.ragged_dot_general(rows, cotangent, sizes, groups, preferred_element_type=jnp.float32)
    return of_rows.astype(rows.dtype), of_kernel.astype(kernel.dtype), None


_narrow_ragged.defvjp(lambda *given: (_narrow_ragged(*given), given), _narrow_ragged_backward)


@jax.custom_vjp
def _narrow_rows_at(table: Array, index: Array) -> Array:
    return table[index].astype(jnp.float32)


def _narrow_rows_at_backward(given: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    table, index = given
    return jnp.zeros(table.shape, jnp.float32).at[index].add(cotangent).astype(table.dtype), None


_narrow_rows_at.defvjp(lambda *given: (_narrow_rows_at(*given), given), _narrow_rows_at_backward)
