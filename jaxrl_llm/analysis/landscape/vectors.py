"""Parameter trees as vectors: inner products that stay accurate over millions of numbers, and checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.language_model import Params
from jaxrl_llm.numerics import is_concrete, wide

LossFn = Callable[[Params], Float[Array, ""]]

BLOCK = 1024  # numbers added up in one go


def accurate_sum(values: Float[Array, "..."]) -> Float[Array, ""]:
    """The sum, by blocks of blocks: its error does not grow with the number of terms as that of one long sum does."""
    values = values.reshape(-1)
    while values.size > 1:
        padded = jnp.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
        values = jax.lax.optimization_barrier(padded.sum(axis=1))  # XLA would make one long sum of the two
    return values.reshape(()) if values.size else jnp.zeros((), values.dtype)


@jax.jit
def inner(first: Params, second: Params) -> Float[Array, ""]:
    """The inner product of two trees, over all their numbers together, in float32 or wider."""
    terms = jax.tree.map(lambda a, b: accurate_sum(wide(a) * wide(b)), first, second)
    return accurate_sum(jnp.stack(jax.tree.leaves(terms)))


def norm(tree: Params) -> Float[Array, ""]:
    """The Euclidean norm over all numbers of a tree together."""
    return jnp.sqrt(inner(tree, tree))


def cosine(first: Params, second: Params) -> Float[Array, ""]:
    """The cosine of the angle between two trees, over all their numbers together; NaN if one of them is 0."""
    return inner(first, second) / (norm(first) * norm(second))


def orthonormal(trees: Sequence[Params]) -> list[Params]:
    """The trees made orthogonal to those before them, over all numbers together, and of norm 1 (Gram and Schmidt).

    Raises:
        ValueError: if one of them is 0, or a combination of those before.
    """
    done: list[Params] = []
    for tree in trees:
        length = norm(tree)
        for earlier in done * 2:  # the second time takes away what rounding left
            share = inner(earlier, tree)
            tree = jax.tree.map(lambda leaf, e, share=share: wide(leaf) - share.astype(e.dtype) * e, tree, earlier)
        remaining = norm(tree)
        if not remaining > 1e-3 * length:
            raise ValueError("the vectors to be made orthogonal depend on each other.")
        done.append(jax.tree.map(lambda leaf, r=remaining: wide(leaf) / r.astype(wide(leaf).dtype), tree))
    return done


def name_of(path: tuple) -> str:
    """A leaf's place in its tree, such as h/0/attn/c_attn/kernel."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


def check_params(params: Params, *, name: str = "params") -> None:
    """Raise ValueError unless the tree holds floating numbers, all of them finite, and at least one."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if math.fsum(jnp.size(leaf) for _, leaf in leaves) == 0:
        raise ValueError(f"{name} holds no numbers.")
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
