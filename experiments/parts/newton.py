"""Newton's method on few parameters, for optima that are to be exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

DAMPING = 1e-12  # the softmax does not see a shift of its logits: without it the Hessian has no inverse


def minimum(loss: Callable[[Any], Array], start: Any, *, steps: int) -> tuple[Any, Float[Array, "values"]]:
    """Return the parameters of the least loss, and its values before each step and at the end. Traceable.

    Every step goes downhill, also where the loss is not convex in the parameters, and is never longer than 1.
    """
    at_start, unravel = ravel_pytree(start)

    def of_flat(flat: Array) -> Array:
        return loss(unravel(flat))

    def step(flat: Array, _: None) -> tuple[Array, Array]:
        value, gradient = jax.value_and_grad(of_flat)(flat)
        values, vectors = jnp.linalg.eigh(jax.hessian(of_flat)(flat))
        direction = vectors @ ((vectors.T @ gradient) / jnp.maximum(jnp.abs(values), DAMPING))
        return flat - direction / jnp.maximum(1, jnp.linalg.norm(direction)), value

    flat, history = jax.lax.scan(step, at_start, length=steps)
    return unravel(flat), jnp.append(history, of_flat(flat))
