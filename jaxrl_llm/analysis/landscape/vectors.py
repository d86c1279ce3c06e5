"""Parameter trees as vectors: inner products that are accurate over millions of numbers, and checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.language_model import Params
from jaxrl_llm.numerics import is_concrete, wide

LossFn = Callable[[Params], Float[Array, ""]]

BLOCK = 1024  # numbers that are summed in one step


def accurate_sum(values: Float[Array, "..."]) -> Float[Array, ""]:
    """Sum by blocks of blocks: unlike in one long sum, the error does not grow with the number of terms."""
    values = values.reshape(-1)
    while values.size > 1:
        padded = jnp.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
        values = jax.lax.optimization_barrier(padded.sum(axis=1))  # else XLA makes one long sum of the two
    return values.reshape(()) if values.size else jnp.zeros((), values.dtype)


@jax.jit
def inner(first: Params, second: Params) -> Float[Array, ""]:
    """Compute the inner product of two trees over all their numbers, in float32 or wider."""
    terms = jax.tree.map(lambda a, b: accurate_sum(wide(a) * wide(b)), first, second)
    return accurate_sum(jnp.stack(jax.tree.leaves(terms)))


def norm(tree: Params) -> Float[Array, ""]:
    """Compute the Euclidean norm over all numbers of a tree."""
    return jnp.sqrt(inner(tree, tree))


def cosine(first: Params, second: Params) -> Float[Array, ""]:
    """Compute the cosine of the angle between two trees over all their numbers; NaN if one is 0."""
    return inner(first, second) / (norm(first) * norm(second))


def orthonormal(trees: Sequence[Params]) -> list[Params]:
    """Orthonormalise the trees over all their numbers, by Gram-Schmidt.

    Raises:
        ValueError: if a tree is 0, or a linear combination of those before it.
    """
    done: list[Params] = []
    for tree in trees:
        length = norm(tree)
        for earlier in done * 2:  # the second time removes what rounding left
            share = inner(earlier, tree)
            tree = jax.tree.map(lambda leaf, e, share=share: wide(leaf) - share.astype(e.dtype) * e, tree, earlier)
        remaining = norm(tree)
        if not remaining > 1e-3 * length:
            raise ValueError("trees must be linearly independent to be orthonormalised, but are not.")
        done.append(jax.tree.map(lambda leaf, r=remaining: wide(leaf) / r.astype(wide(leaf).dtype), tree))
    return done


def name_of(path: tuple) -> str:
    """Return a leaf's path in its tree, such as h/0/attn/c_attn/kernel."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


def check_params(params: Params, *, name: str = "params") -> None:
    """Raise ValueError unless the tree holds floating numbers, all of them finite, and at least one."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if math.fsum(jnp.size(leaf) for _, leaf in leaves) == 0:
        raise ValueError(f"{name} must have numbers, but has none.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, but {name_of(path)} is {jnp.asarray(leaf).dtype}.")
        if is_concrete(leaf) and not jnp.isfinite(leaf).all():
            raise ValueError(f"{name} must be finite, but {name_of(path)} is not.")


def check_like(tree: Params, params: Params, *, name: str) -> None:
    """Raise ValueError unless `tree` is a finite floating tree of the structure and shapes of `params`."""
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    wanted = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    missing, unknown = sorted(wanted.keys() - leaves.keys()), sorted(leaves.keys() - wanted.keys())
    if missing or unknown or jax.tree.structure(tree) != jax.tree.structure(params):
        found = [f"lacks {each}" for each in missing[:4]] + [f"has {each} besides" for each in unknown[:4]]
        raise ValueError(f"{name} must be a tree like params, but {', '.join(found) or 'its structure is another'}.")
    for leaf_name, leaf in leaves.items():
        if jnp.shape(leaf) != jnp.shape(wanted[leaf_name]):
            shapes = list(jnp.shape(wanted[leaf_name])), list(jnp.shape(leaf))
            raise ValueError(f"{name} must be a tree like params: {leaf_name} must be {shapes[0]}, but is {shapes[1]}.")
    check_params(tree, name=name)
