"""The Hessian of a loss without forming it: products with vectors, curvature along a direction, top eigenpairs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Key
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
    tolerance: float = 1e-3  # of residuals, relative to the largest |λ| found

    @property
    def converged(self) -> Bool[np.ndarray, "count"]:
        """False for pairs whose residual is above the tolerance: there were too few iterations."""
        return self.residuals <= self.tolerance * max(abs(self.values[0]), abs(self.smallest))

    def __repr__(self) -> str:
        rows = zip(self.values, self.residuals, self.converged, strict=True)
        pairs = (f"{value:.6g} ({'' if fine else 'not converged, '}residual {far:.2g})" for value, far, fine in rows)
        return f"Eigenpairs({', '.join(pairs)}; {self.iterations} iterations)"


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
    max_iterations: int = 40,
    vectors: int | None = None,
    tolerance: float = 1e-3,
    progress: bool = False,
) -> Eigenpairs:
    """Compute the `count` largest eigenvalues of the Hessian with their eigenvectors, by Lanczos iterations.

    An orthonormal basis Q of the Krylov space of a random vector makes Qᵀ H Q tridiagonal. Its eigenpairs (λ, s) give
    the eigenpairs (λ, Q s) of H, with residual β |s_m|. Each new vector is orthogonalised twice against all earlier
    ones, so that a simple eigenvalue does not appear twice. If the space is exhausted, the iterations continue from a
    new random vector, so that multiple eigenvalues are found too. Parameters narrower than float32 are widened.

    With fewer `vectors` than iterations, a full basis is replaced by about half as many vectors, the eigenvectors of
    its largest eigenvalues, from which the iterations go on (thick restart). More iterations are then needed.

    Args:
        max_iterations: the most products of the Hessian with a vector.
        vectors: basis vectors that are held at once, each as large as the parameters; by default all.
        tolerance: stop when the residuals are below this fraction of the largest |λ| found.

    Raises:
        ValueError: if params are not finite and floating or have fewer numbers than `count`, a keyword argument is
            out of range, or the basis needs more memory than there is: the error says how many `vectors` fit.
        FloatingPointError: if the loss has no finite curvature at `params`.

    Source: Parlett 1980, chapter 13; restarts: Wu and Simon 2000.
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
    if vectors is not None and vectors <= count:
        raise ValueError(f"vectors must be at least {count + 1}, one more than count, but is {vectors}.")
    held = most if vectors is None else min(vectors, most)
    kept = (held + count) // 2  # by a restart
    step_of = _compiled_step(loss_fn, unravel, params, flat, held, kept if held < most else 0)
    basis, matrix, place, smallest = jnp.zeros((held, size), dtype), np.zeros((held, held)), 0, np.inf
    start_key, restart_key = jax.random.split(key)
    vector, _ = _orthonormal(basis, jax.random.normal(start_key, (size,), dtype))
    bar = tqdm(range(most), unit="product", desc="Lanczos", leave=False, disable=not progress or runtime.is_file())
    for step in bar:
        basis, image, alpha = step_of(params, basis, vector, place)
        matrix[place, place] = alpha
        if not np.isfinite(matrix[place, place]):
            raise FloatingPointError("the loss has no finite curvature at params.")
        vector, beta = _orthonormal(basis, image)
        values, shares = np.linalg.eigh(matrix[: place + 1, : place + 1])
        values, shares = values[::-1], shares[:, ::-1]  # in descending order
        smallest = min(smallest, float(values[-1]))
        scale = max(abs(values[0]), abs(smallest))
        exhausted = float(beta) <= 8 * float(jnp.finfo(dtype).eps) * scale
        residuals = np.abs(shares[-1]) * float(beta)
        # An exhausted space has only one vector of a multiple eigenvalue: further ones are needed.
        if step + 1 == most or (step + 1 >= count and not exhausted and (residuals[:count] <= tolerance * scale).all()):
            break
        if exhausted:
            vector, _ = _orthonormal(basis, jax.random.normal(jax.random.fold_in(restart_key, step), (size,), dtype))
        beside = np.zeros(place + 1)  # of the new vector with those of the basis
        beside[-1] = 0.0 if exhausted else float(beta)
        if place + 1 == held:
            basis = _mixed(basis, jnp.asarray(shares[:, :kept].T, dtype))
            matrix[:] = np.diag(np.append(values[:kept], np.zeros(held - kept)))
            beside, place = beside[-1] * shares[-1, :kept], kept - 1
        place += 1
        matrix[place, :place] = matrix[:place, place] = beside
    bar.close()
    # Orthonormal up to the rounding of long sums in the basis; accurate sums remove that.
    unused = np.zeros(held - len(shares))
    found = [unravel(jnp.asarray(np.append(shares[:, i], unused), dtype) @ basis) for i in range(count)]
    del basis
    return Eigenpairs(values[:count], orthonormal(found), residuals[:count], smallest, step + 1, tolerance)


def _compiled_step(
    loss_fn: LossFn, unravel: Any, params: Params, flat: Float[Array, "size"], held: int, kept: int
) -> Any:
    """Return the program of an iteration, after a look at the memory that the iterations need beside the parameters.

    Raises:
        ValueError: if there is less.
    """
    basis = jax.ShapeDtypeStruct((held, flat.size), flat.dtype)
    program = _lanczos_step.lower(loss_fn, unravel, params, basis, flat, 0).compile()
    available, one = runtime.available_memory(), flat.nbytes
    aside = program.memory_analysis().temp_size_in_bytes + 3 * one  # a vector, its image and one between
    needed = aside + (held + kept) * one
    if available is not None and needed > available:
        fitting = int((available - aside) / (1.5 * one)) - 1
        way_out = f"with vectors={fitting} they fit" if fitting > 2 else "not even 3 of them would fit"
        raise ValueError(
            f"the Lanczos iterations must fit into memory, but {held} vectors of {flat.size} numbers need "
            f"{_gibibytes(needed)}, and {_gibibytes(available)} are available: {way_out}."
        )
    return program


def _gibibytes(count: int) -> str:
    return f"{count} bytes ({count / 2**30:.1f} GiB)"


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


@functools.partial(jax.jit, donate_argnames="basis")
def _mixed(basis: Float[Array, "held size"], shares: Float[Array, "kept held"]) -> Float[Array, "held size"]:
    """Return a basis of mixtures of the vectors of another, with room for as many as before."""
    return basis.at[: len(shares)].set(shares @ basis).at[len(shares) :].set(0)
