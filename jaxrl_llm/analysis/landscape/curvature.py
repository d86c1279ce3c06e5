"""The Hessian of a loss, never formed: its products with vectors, its curvature along a direction, its largest part."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from jaxrl_llm.analysis.landscape.vectors import LossFn, accurate_sum, check_like, check_params, inner, orthonormal
from jaxrl_llm.language_model import Params
from jaxrl_llm.numerics import wide

# Weights of the eighth-order central second difference at distances 0 to 4 (Fornberg 1988, table 1).
SECOND_DIFFERENCE = (-205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560)


class Eigenpairs(NamedTuple):
    """The largest eigenvalues of a Hessian, in falling order, and unit eigenvectors."""

    values: Float[np.ndarray, "count"]
    vectors: list[Params]
    residuals: Float[np.ndarray, "count"]  # ‖Hv − λv‖: some eigenvalue lies within it of λ
    smallest: float  # the smallest eigenvalue that the same iterations found: an upper bound of the smallest of all
    iterations: int


def hessian_vector_product(loss_fn: LossFn, params: Params, vector: Params) -> Params:
    """H v with H = ∇²loss(params), forward over reverse: the cost of a few gradients, and no Hessian.

    Raises:
        ValueError: if the trees do not match.
    """
    check_like(vector, params, name="vector")
    vector = jax.tree.map(lambda v, p: jnp.asarray(v, jnp.asarray(p).dtype), vector, params)
    return jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]


def slope(loss_fn: LossFn, params: Params, direction: Params) -> float:
    """⟨∇loss, d⟩: the first derivative of the loss at `params` along a direction, which keeps its length."""
    check_like(direction, params, name="direction")
    return float(_slope(loss_fn, params, direction))


def curvature(loss_fn: LossFn, params: Params, direction: Params) -> float:
    """dᵀHd: the second derivative of the loss at `params` along a direction, which keeps its length."""
    check_like(direction, params, name="direction")
    return float(_curvature(loss_fn, params, direction))


@functools.partial(jax.jit, static_argnames="loss_fn")
def _slope(loss_fn: LossFn, params: Params, direction: Params) -> Array:
    return inner(jax.grad(loss_fn)(params), direction)


@functools.partial(jax.jit, static_argnames="loss_fn")
def _curvature(loss_fn: LossFn, params: Params, direction: Params) -> Array:
    return inner(hessian_vector_product(loss_fn, params, direction), direction)


def second_difference(values: Float[np.ndarray, "point"], spacing: float) -> float:
    """The second derivative in the middle of an odd number of equally spaced values, 9 of them or more.

    The central difference of eighth order (Fornberg 1988): its error is f⁽¹⁰⁾ h⁸ / 3150, and that of rounding some
    six times that of the values over h².

    Raises:
        ValueError: if the values are fewer than 9, even in number or not finite in the middle, or spacing is not
            positive.
    """
    values = np.asarray(values, np.float64)
    reach, middle = len(SECOND_DIFFERENCE) - 1, len(values) // 2
    if values.ndim != 1 or values.size < 2 * reach + 1 or values.size % 2 == 0:
        raise ValueError(f"values must be an odd number of at least {2 * reach + 1}, but are {list(values.shape)}.")
    if not spacing > 0:
        raise ValueError(f"spacing must be positive, but is {spacing}.")
    near = values[middle - reach : middle + reach + 1]
    if not np.isfinite(near).all():
        raise ValueError("the values in the middle are not all finite.")
    weights = np.asarray(SECOND_DIFFERENCE[:0:-1] + SECOND_DIFFERENCE)
    return float(weights @ near / spacing**2)


def top_eigenpairs(
    loss_fn: LossFn,
    params: Params,
    key: Key[Array, ""],
    *,
    count: int = 2,
    max_iterations: int = 64,
    tolerance: float = 1e-3,
    progress: bool = False,
) -> Eigenpairs:
    """The `count` largest eigenvalues of the Hessian, and their eigenvectors, by Lanczos iterations.

    An orthonormal basis Q of the Krylov space of a random vector makes Qᵀ H Q tridiagonal; its eigenpairs (λ, s) give
    those of H as (λ, Q s), with the residual β |s_m| (Parlett 1980, chapter 13). Every new vector is made orthogonal
    to all before, twice, so that no eigenvalue appears twice that is single; where the space is exhausted a new random
    vector goes on, so that those that are multiple are found too. It holds `max_iterations` vectors of the size of the
    parameters in memory. Parameters narrower than float32 are widened.

    Args:
        tolerance: stop when the residuals are below this share of the largest |λ| found.

    Raises:
        ValueError: if params are not finite and floating, or fewer numbers than `count`, or knobs are out of range.
        FloatingPointError: if the loss has no finite curvature at `params`.
    """
    check_params(params)
    params = jax.tree.map(lambda leaf: wide(jnp.asarray(leaf)), params)
    flat, unravel = ravel_pytree(params)
    size, dtype = flat.size, flat.dtype
    if not 1 <= count <= min(size, max_iterations):
        raise ValueError(
            f"count must lie in [1, {min(size, max_iterations)}], by the numbers in params and max_iterations, "
            f"but is {count}."
        )
    most = min(max_iterations, size)
    basis = jnp.zeros((most, size), dtype)
    diagonal, beside = [], []
    start_key, restart_key = jax.random.split(key)
    vector, _ = _orthonormal(basis, jax.random.normal(start_key, (size,), dtype))
    bar = tqdm(range(most), unit="product", desc="Lanczos", leave=False, disable=not progress)
    for step in bar:
        basis, image, alpha = _lanczos_step(loss_fn, unravel, params, basis, vector, step)
        diagonal.append(float(alpha))
        if not np.isfinite(diagonal[-1]):
            raise FloatingPointError("the loss has no finite curvature at params.")
        vector, beta = _orthonormal(basis, image)
        values, shares = _tridiagonal_eigh(diagonal, beside)
        scale = np.abs(values).max()
        exhausted = float(beta) <= 8 * float(jnp.finfo(dtype).eps) * scale
        residuals = np.abs(shares[-1]) * float(beta)
        # An exhausted space may hold one vector of a multiple eigenvalue: only further ones can tell.
        if step + 1 >= count and not exhausted and (residuals[:count] <= tolerance * scale).all():
            break
        if exhausted and step + 1 < most:
            vector, _ = _orthonormal(basis, jax.random.normal(jax.random.fold_in(restart_key, step), (size,), dtype))
        beside.append(0.0 if exhausted else float(beta))
    bar.close()
    used = basis[: len(diagonal)]
    # Orthonormal but for the rounding of the long sums in the basis, and made so by accurate ones.
    vectors = orthonormal([unravel(jnp.asarray(shares[:, i], dtype) @ used) for i in range(count)])
    return Eigenpairs(values[:count], vectors, residuals[:count], float(values[-1]), len(diagonal))


@functools.partial(jax.jit, static_argnames=("loss_fn", "unravel"), donate_argnames="basis")
def _lanczos_step(
    loss_fn: LossFn,
    unravel: Any,
    params: Params,
    basis: Float[Array, "most size"],
    vector: Float[Array, "size"],
    step: int,
) -> tuple[Float[Array, "most size"], Float[Array, "size"], Float[Array, ""]]:
    """The basis with the new vector, H times that vector, and the vector's own curvature."""
    image = ravel_pytree(hessian_vector_product(loss_fn, params, unravel(vector)))[0]
    basis = jax.lax.dynamic_update_slice_in_dim(basis, vector[None], step, axis=0)
    return basis, image, accurate_sum(vector * image)


@jax.jit
def _orthonormal(
    basis: Float[Array, "most size"], vector: Float[Array, "size"]
) -> tuple[Float[Array, "size"], Float[Array, ""]]:
    """The part of a vector beside the basis, with norm 1, and that part's norm. Rows of zeros take nothing."""
    lengths = []
    for _ in range(3):  # what rounding left is taken away, also where little more than that was left
        vector = vector - (basis @ vector) @ basis
        lengths.append(jnp.sqrt(accurate_sum(jnp.square(vector))))
        vector = vector / jnp.where(lengths[-1] > 0, lengths[-1], 1)
    return vector, lengths[0] * lengths[1]


def _tridiagonal_eigh(diagonal: list[float], beside: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in falling order, and eigenvectors as columns."""
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1], vectors[:, ::-1]
