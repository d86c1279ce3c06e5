"""A loss whose landscape is known: a quadratic over a tree of several shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree


class Quadratic:
    """½ θᵀAθ + bᵀθ + c over a tree of 3 × 4 + 4 + 1 numbers."""

    def __init__(self, dtype):
        rng = np.random.default_rng(0)
        shapes = {"dense": {"kernel": (3, 4), "bias": (4,)}, "gain": ()}
        self.params = jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        square = rng.normal(size=(17, 17))
        self.matrix, self.linear = square + square.T, rng.normal(size=17)

    def loss(self, params):
        theta = ravel_pytree(params)[0]
        return (
            0.5 * theta @ jnp.asarray(self.matrix, theta.dtype) @ theta + jnp.asarray(self.linear, theta.dtype) @ theta
        )

    def exactly(self, params):
        theta = flat(params)
        return 0.5 * theta @ self.matrix @ theta + self.linear @ theta


def flat(tree):
    """All numbers of a tree, in float64, in the order of ravel_pytree."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


@pytest.fixture
def quadratic():
    return Quadratic(jnp.float32)


@pytest.fixture
def exact_quadratic():
    with jax.enable_x64(True):
        yield Quadratic(jnp.float64)
