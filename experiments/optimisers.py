"""Adam for short trainings, and Newton's method for exact optima of few parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

DAMPING = 1e-12  # the softmax does not see a shift of its logits: without it the Hessian has no inverse


def adam(peak: float, num_steps: int) -> optax.GradientTransformation:
    """Return Adam with clipped gradients: a short warm-up, then a cosine decay to a tenth of the peak."""
    schedule = optax.warmup_cosine_decay_schedule(0, peak, max(1, num_steps // 10), num_steps, peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def minimum(loss: Callable[[Any], Array], start: Any, *, steps: int) -> tuple[Any, Float[Array, "values"]]:
    """Return the parameters of least loss, and the loss before each step and at the end. Traceable.

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
