"""Directions in parameter space: parameter trees as vectors, random directions, and those spanned by given parameters.

Inner products are accurate over millions of numbers.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxrl_llm.language_model import Params
from jaxrl_llm.numerics import is_concrete, wide

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


Scale = Literal["parameter", "filter", "none"]
Directions = tuple[Params, Params]


def random_directions(params: Params, key: Key[Array, ""], *, scale: Scale = "parameter") -> Directions:
    """Draw two random directions, a normal tensor for each parameter, that are orthogonal over all parameters.

        scale       each direction has                                  without change
        parameter   in each tensor its parameter's norm                 parameters of norm 0
        filter      in each filter its filter's norm                    filters of norm 0; biases and norms, that is
                    (Li et al. 2018, section 4)                         every tensor of one axis or none
        none        standard normal numbers                             nothing

    The filters of a `kernel` are its columns, the inputs of one unit (all axes but the last). The filters of any other
    tensor, such as an embedding, are its rows.

    The directions are orthogonal *and* have the right norm by construction. In a group g (tensor or filter) of norm t_g
    let u_g and v_g be orthonormal: the first draw, and the component of the second draw orthogonal to it. Then, with
    one cosine c for all groups,

        d1_g = t_g u_g,    d2_g = t_g (c u_g + √(1 − c²) v_g):    ‖d1_g‖ = ‖d2_g‖ = t_g,    ⟨d1, d2⟩ = Σ_g c t_g²

    and c = 0 makes them orthogonal in every group. A group of a single number has no v_g: there d2_g = ±d1_g, which
    adds S = Σ ± t_g², and c = −S / Σ t_g² over the other groups cancels it. Without a scale, the component of d2 along
    d1 is removed over all numbers, and the length of d2 is kept.

    Args:
        params: a tree of floating arrays. The draw of a tensor depends on its name, its shape and the key alone.

    Returns:
        Two trees like `params`, in float32 or wider.

    Raises:
        ValueError: if params are not finite and floating, if all have norm 0 and a scale is asked for, or if groups of
            single numbers outweigh the others.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, but is {scale!r}.")
    check_params(params)
    if scale == "none":
        return _unscaled(params, key)
    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.tree.map(jnp.asarray, params))
    firsts, besides = zip(*(_scaled_pair(path, leaf, key, scale) for path, leaf in leaves), strict=True)
    alone = [_group_size(path, leaf, scale) == 1 for path, leaf in leaves]
    cos = _common_cosine(firsts, besides, alone)
    if cos != 0:
        sin = math.sqrt(1 - cos**2)
        besides = [v if lone else cos * u + sin * v for u, v, lone in zip(firsts, besides, alone, strict=True)]
    return structure.unflatten(firsts), structure.unflatten(besides)


def _draw(path: tuple, leaf: Array, key: Array, number: int) -> Array:
    """Draw normal numbers that depend on the leaf's name and shape, and on no other leaf."""
    leaf_key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name_of(path).encode())), number)
    return jax.random.normal(leaf_key, leaf.shape, wide(leaf).dtype)


def _unscaled(params: Params, key: Array) -> Directions:
    draws = [
        jax.tree_util.tree_map_with_path(lambda path, leaf, i=i: _draw(path, jnp.asarray(leaf), key, i), params)
        for i in (0, 1)
    ]
    try:
        _, second = orthonormal(draws)
    except ValueError:
        raise ValueError("params must have at least two numbers for two orthogonal directions.") from None
    return draws[0], rescaled(second, norm(draws[1]))


def _group_axes(path: tuple, leaf: Array, scale: Scale) -> tuple[int, ...] | None:
    """Return the axes of one group; None for a tensor that is not changed."""
    if scale == "parameter":
        return tuple(range(leaf.ndim))
    if leaf.ndim < 2:
        return None
    is_kernel = name_of(path).rsplit("/", 1)[-1] == "kernel"
    return tuple(range(leaf.ndim - 1)) if is_kernel else tuple(range(1, leaf.ndim))


def _group_size(path: tuple, leaf: Array, scale: Scale) -> int:
    axes = _group_axes(path, leaf, scale)
    return 0 if axes is None else math.prod(leaf.shape[axis] for axis in axes)


def _scaled_pair(path: tuple, leaf: Array, key: Array, scale: Scale) -> tuple[Array, Array]:
    axes = _group_axes(path, leaf, scale)
    if axes is None:
        return jnp.zeros_like(wide(leaf)), jnp.zeros_like(wide(leaf))
    first, second = (_draw(path, leaf, key, number) for number in (0, 1))
    return _orthogonal_pair(wide(leaf), first, second, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _orthogonal_pair(leaf: Array, first: Array, second: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return t u and t v of each group; for a group of one number, t times the signs of its two draws."""

    def total(values: Array) -> Array:
        whole = len(axes) == values.ndim
        return accurate_sum(values).reshape((1,) * values.ndim) if whole else values.sum(axes, keepdims=True)

    def unit(values: Array) -> Array:
        length = jnp.sqrt(total(jnp.square(values)))
        return values / jnp.where(length > 0, length, 1)

    target = jnp.sqrt(total(jnp.square(leaf)))
    first, second = unit(first), unit(second)
    if math.prod(leaf.shape[axis] for axis in axes) > 1:
        for _ in range(2):  # the second time removes what rounding left
            second = unit(second - total(first * second) * first)
    return target * first, target * second


def _common_cosine(firsts: Sequence[Array], besides: Sequence[Array], alone: Sequence[bool]) -> float:
    """Return c: 0, or the cosine that compensates for groups of a single number."""
    free = lone = weight = 0.0
    for first, beside, single in zip(firsts, besides, alone, strict=True):
        square = float(inner(first, first))
        weight += square
        if single:
            lone += float(inner(first, beside))
        else:
            free += square
    if weight == 0:
        raise ValueError("params to scale to must not have norm 0, but all have: use scale='none'.")
    if not math.isfinite(weight):
        raise ValueError("the norm of params must be in their dtype's range, but overflows.")
    if abs(lone) >= free and lone != 0:
        raise ValueError(
            "params must not be mostly single numbers, for only their sign is random and two directions cannot be "
            "orthogonal: use scale='none' or another key."
        )
    return -lone / free if lone else 0.0


def rescaled(direction: Params, length: float | Array) -> Params:
    """Return the direction scaled to the norm `length` over all its numbers.

    Raises:
        ValueError: if the direction is 0.
    """
    present = norm(direction)
    if not present > 0:
        raise ValueError("a direction must not have norm 0 to be rescaled, but has.")
    return jax.tree.map(lambda leaf: wide(leaf) * (length / present).astype(wide(leaf).dtype), direction)


def interpolation_directions(params: Params, first: Params, second: Params) -> Directions:
    """Return the directions from `params` to two other trees: the first is at (1, 0), the second at (0, 1).

    Raises:
        ValueError: if the trees do not match.
    """
    check_params(params)
    return _towards(params, first, "first"), _towards(params, second, "second")


def _towards(origin: Params, target: Params, name: str) -> Params:
    check_like(target, origin, name=name)
    return jax.tree.map(lambda there, here: wide(there) - wide(here), target, origin)


class PrincipalDirections(NamedTuple):
    """The plane in which a list of checkpoints moves most."""

    directions: Directions
    coordinates: Float[np.ndarray, "checkpoint 2"]  # of each checkpoint in the plane; the largest of each axis is 1
    explained: Float[np.ndarray, "2"]  # fraction of Σ ‖checkpoint − origin‖² along each direction


def principal_directions(checkpoints: Sequence[Params], origin: Params) -> PrincipalDirections:
    """Compute the first two principal components of checkpoint − origin, where origin is usually the last checkpoint.

    They are uncentred, from the eigenvectors of the checkpoints' Gram matrix. They are orthogonal, and each is as long
    as the farthest checkpoint along it, so that the path fits into [−1, 1]². The first checkpoint has positive
    coordinates.

    Raises:
        ValueError: if trees do not match, or all checkpoints lie on one line through the origin.

    Source: Li et al. 2018, section 7.
    """
    check_params(origin, name="origin")
    differences = [_towards(origin, each, f"checkpoint {i}") for i, each in enumerate(checkpoints)]
    count = len(differences)
    gram = np.asarray([[float(inner(a, b)) for b in differences] for a in differences]).reshape(count, count)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if len(values) < 2 or values[1] <= count * _rounding(differences[0]) * values[0]:
        raise ValueError(f"checkpoints must span a plane with the origin, but all {count} lie on a line through it.")
    vectors = vectors * np.where(vectors[0] < 0, -1, 1)
    # The second is short, and rounding of the first would tilt it: orthogonalise again.
    axes = orthonormal([_combined(differences, vectors[:, i]) for i in (0, 1)])
    places = np.asarray([[float(inner(each, axis)) for axis in axes] for each in differences])
    reach = np.abs(places).max(axis=0)
    directions = tuple(rescaled(axis, length) for axis, length in zip(axes, reach, strict=True))
    return PrincipalDirections(directions, places / reach, np.square(places).sum(axis=0) / np.trace(gram))


def _combined(trees: Sequence[Params], weights: np.ndarray) -> Params:
    def total(*leaves: Array) -> Array:
        return sum(jnp.asarray(weight, leaf.dtype) * leaf for weight, leaf in zip(weights, leaves, strict=True))

    return jax.tree.map(total, *trees)


def _rounding(tree: Params) -> float:
    """Return the relative rounding error of inner products of such trees."""
    return 8 * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(tree))).eps)


def coordinates(params: Params, origin: Params, directions: Directions) -> Float[np.ndarray, "2"]:
    """Return (α, β) of the point of the plane that is nearest to `params`.

    Raises:
        ValueError: if trees do not match, or the directions span no plane.
    """
    difference = _towards(origin, params, "params")
    for i, direction in enumerate(directions):
        check_like(direction, origin, name=f"direction {i}")
    gram = np.asarray([[float(inner(a, b)) for b in directions] for a in directions])
    if not np.linalg.det(gram) > _rounding(difference) * gram[0, 0] * gram[1, 1]:
        raise ValueError("the directions must span a plane, but one is 0 or a multiple of the other.")
    return np.linalg.solve(gram, [float(inner(direction, difference)) for direction in directions])
