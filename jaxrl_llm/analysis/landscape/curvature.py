"""The Hessian of a loss without forming it: products with vectors, curvature along a direction, top eigenpairs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from jaxrl_llm import runtime
from jaxrl_llm.analysis.landscape.directions import accurate_sum, check_like, check_params, inner, orthonormal
from jaxrl_llm.analysis.landscape.surface import LossFn
from jaxrl_llm.language_model import Params
from jaxrl_llm.numerics import wide

# Weights of the eighth-order central second difference at distances 0 to 4 (Fornberg 1988, table 1).
SECOND_DIFFERENCE = (-205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560)


class Eigenpairs(NamedTuple):
    """The largest eigenvalues of a Hessian, in descending order, with unit eigenvectors."""

    values: Float[np.ndarray, "count"]
    vectors: list[Params]
    residuals: Float[np.ndarray, "count"]  # ‖Hv − λv‖: an eigenvalue of H lies within this distance of λ
    smallest: float  # the smallest eigenvalue that the iterations found: an upper bound of the smallest one
    iterations: int


def hessian_vector_product(loss_fn: LossFn, params: Params, vector: Params) -> Params:
    """Compute H v with H = ∇²loss(params), forward over reverse, at the cost of a few gradients.

    Parameters narrower than float32 are widened, and the product is of the widened type.

    Raises:
        ValueError: if the trees do not match.
    """
    check_like(vector, params, name="vector")
    params = jax.tree.map(lambda leaf: wide(jnp.asarray(leaf)), params)
    vector = jax.tree.map(lambda v, p: jnp.asarray(v, p.dtype), vector, params)
    return jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]


def slope(loss_fn: LossFn, params: Params, direction: Params) -> float:
    """Compute ⟨∇loss, d⟩, the first derivative of the loss at `params` along a direction d, which is not normalised."""
    check_like(direction, params, name="direction")
    return float(_slope(loss_fn, params, direction))


def curvature(loss_fn: LossFn, params: Params, direction: Params) -> float:
    """Compute dᵀHd, the second derivative of the loss at `params` along a direction d, which is not normalised."""
    check_like(direction, params, name="direction")
    return float(_curvature(loss_fn, params, direction))


@functools.partial(jax.jit, static_argnames="loss_fn")
def _slope(loss_fn: LossFn, params: Params, direction: Params) -> Array:
    return inner(jax.grad(loss_fn)(params), direction)


@functools.partial(jax.jit, static_argnames="loss_fn")
def _curvature(loss_fn: LossFn, params: Params, direction: Params) -> Array:
    return inner(hessian_vector_product(loss_fn, params, direction), direction)


def second_difference(values: Float[np.ndarray, "point"], spacing: float) -> float:
    """Estimate the second derivative in the middle of an odd number of equally spaced values, at least 9.

    It is the central difference of eighth order. Its truncation error is f⁽¹⁰⁾ h⁸ / 3150; its rounding error is about
    six times that of the values, divided by h².

    Raises:
        ValueError: if the values are fewer than 9, even in number or not finite in the middle, or spacing is not
            positive.

    Source: Fornberg 1988, table 1.
    """
    values = np.asarray(values, np.float64)
    reach, middle = len(SECOND_DIFFERENCE) - 1, len(values) // 2
    if values.ndim != 1 or values.size < 2 * reach + 1 or values.size % 2 == 0:
        raise ValueError(f"values must be an odd number of at least {2 * reach + 1}, but are {list(values.shape)}.")
    if not spacing > 0:
        raise ValueError(f"spacing must be positive, but is {spacing}.")
    near = values[middle - reach : middle + reach + 1]
    if not np.isfinite(near).all():
        raise ValueError("the values in the middle must be finite, but are not.")
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
    """Compute the `count` largest eigenvalues of the Hessian with their eigenvectors, by Lanczos iterations.

    An orthonormal basis Q of the Krylov space of a random vector makes Qᵀ H Q tridiagonal. Its eigenpairs (λ, s) give
    the eigenpairs (λ, Q s) of H, with residual β |s_m|. Each new vector is orthogonalised twice against all earlier
    ones, so that a simple eigenvalue does not appear twice. If the space is exhausted, the iterations continue from a
    new random vector, so that multiple eigenvalues are found too. The basis takes `max_iterations` times the memory of
    the parameters. Parameters narrower than float32 are widened.

    Args:
        tolerance: stop when the residuals are below this fraction of the largest |λ| found.

    Raises:
        ValueError: if params are not finite and floating or have fewer numbers than `count`, or a keyword argument is
            out of range.
        FloatingPointError: if the loss has no finite curvature at `params`.

    Source: Parlett 1980, chapter 13.
    """
    check_params(params)
    params = jax.tree.map(lambda leaf: wide(jnp.asarray(leaf)), params)
    flat, unravel = ravel_pytree(params)
    size, dtype = flat.size, flat.dtype
    if not 1 <= count <= min(size, max_iterations):
        raise ValueError(
            f"count must lie in [1, {min(size, max_iterations)}], bounded by the size of params and max_iterations, "
            f"but is {count}."
        )
    most = min(max_iterations, size)
    basis = jnp.zeros((most, size), dtype)
    diagonal, beside = [], []
    start_key, restart_key = jax.random.split(key)
    vector, _ = _orthonormal(basis, jax.random.normal(start_key, (size,), dtype))
    bar = tqdm(range(most), unit="product", desc="Lanczos", leave=False, disable=not progress or runtime.is_file())
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
        # An exhausted space has only one vector of a multiple eigenvalue: further ones are needed.
        if step + 1 >= count and not exhausted and (residuals[:count] <= tolerance * scale).all():
            break
        if exhausted and step + 1 < most:
            vector, _ = _orthonormal(basis, jax.random.normal(jax.random.fold_in(restart_key, step), (size,), dtype))
        beside.append(0.0 if exhausted else float(beta))
    bar.close()
    used = basis[: len(diagonal)]
    # Orthonormal up to the rounding of long sums in the basis; accurate sums remove that.
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
    """Return the basis with the new vector, H times that vector, and the curvature along it."""
    image = ravel_pytree(hessian_vector_product(loss_fn, params, unravel(vector)))[0]
    basis = jax.lax.dynamic_update_slice_in_dim(basis, vector[None], step, axis=0)
    return basis, image, accurate_sum(vector * image)


@jax.jit
def _orthonormal(
    basis: Float[Array, "most size"], vector: Float[Array, "size"]
) -> tuple[Float[Array, "size"], Float[Array, ""]]:
    """Return the normalised component of a vector orthogonal to the basis, and that component's norm."""
    lengths = []
    for _ in range(3):  # again, to remove what rounding left, even if little more than that was left
        vector = vector - (basis @ vector) @ basis
        lengths.append(jnp.sqrt(accurate_sum(jnp.square(vector))))
        vector = vector / jnp.where(lengths[-1] > 0, lengths[-1], 1)
    return vector, lengths[0] * lengths[1]


def _tridiagonal_eigh(diagonal: list[float], beside: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues in descending order, and eigenvectors as columns."""
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1], vectors[:, ::-1]
