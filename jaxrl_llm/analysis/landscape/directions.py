"""Directions in parameter space: random ones, and those that given parameters span."""

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

from jaxrl_llm.analysis.landscape.vectors import (
    accurate_sum,
    check_like,
    check_params,
    inner,
    name_of,
    norm,
    orthonormal,
)
from jaxrl_llm.language_model import Params
from jaxrl_llm.numerics import wide

Scale = Literal["parameter", "filter", "none"]
Directions = tuple[Params, Params]


def random_directions(params: Params, key: Key[Array, ""], *, scale: Scale = "parameter") -> Directions:
    """Two random directions, one normal tensor a parameter, that are orthogonal over all parameters together.

        scale       each direction has                                  stays where it is
        parameter   in each tensor its parameter's norm                 a parameter of norm 0
        filter      in each filter its filter's norm                    a filter of norm 0; biases and norms, that is
                    (Li et al. 2018, section 4)                         every tensor of one axis or none
        none        standard normal numbers                             nothing

    The filters of a `kernel` are its columns, what feeds one unit (all axes but the last); of any other tensor, an
    embedding for one, they are its rows.

    They are orthogonal *and* of the right norm by construction. In a group g (tensor or filter) of norm t_g let u_g
    and v_g be orthonormal: the first draw, and what the second has beside it. Then, with one cosine c for all groups,

        d1_g = t_g u_g,    d2_g = t_g (c u_g + √(1 − c²) v_g):    ‖d1_g‖ = ‖d2_g‖ = t_g,    ⟨d1, d2⟩ = Σ_g c t_g²

    and c = 0 makes them orthogonal, group by group. A group of a single number has no v_g: there d2_g = ±d1_g, which
    adds S = Σ ± t_g², and c = −S / Σ t_g² over the other groups takes it away. Without a scale, d2 is freed of d1 as a
    whole, and keeps its length.

    Args:
        params: a tree of floating arrays. The same name, shape and key give the same draw, whatever else is there.

    Returns:
        Two trees like `params`, in float32 or wider.

    Raises:
        ValueError: if params are not finite and floating, or all of norm 0 where there is something to scale to, or
            single numbers outweigh all that could make up for them.
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
    """Normal numbers that depend on the leaf's name and shape, and on no other leaf."""
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
        raise ValueError("two orthogonal directions need at least two numbers in params.") from None
    return draws[0], rescaled(second, norm(draws[1]))


def _group_axes(path: tuple, leaf: Array, scale: Scale) -> tuple[int, ...] | None:
    """The axes that one group fills; None for a tensor that stays where it is."""
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
    """t u and t v of each group; of a group of one number, its two draws' signs times t."""

    def total(values: Array) -> Array:
        whole = len(axes) == values.ndim
        return accurate_sum(values).reshape((1,) * values.ndim) if whole else values.sum(axes, keepdims=True)

    def unit(values: Array) -> Array:
        length = jnp.sqrt(total(jnp.square(values)))
        return values / jnp.where(length > 0, length, 1)

    target = jnp.sqrt(total(jnp.square(leaf)))
    first, second = unit(first), unit(second)
    if math.prod(leaf.shape[axis] for axis in axes) > 1:
        for _ in range(2):  # the second time takes away what rounding left
            second = unit(second - total(first * second) * first)
    return target * first, target * second


def _common_cosine(firsts: Sequence[Array], besides: Sequence[Array], alone: Sequence[bool]) -> float:
    """c: 0, or what makes up for the groups of a single number."""
    free = lone = weight = 0.0
    for first, beside, single in zip(firsts, besides, alone, strict=True):
        square = float(inner(first, first))
        weight += square
        if single:
            lone += float(inner(first, beside))
        else:
            free += square
    if weight == 0:
        raise ValueError("params have norm 0 wherever a direction would be scaled to them: take scale='none'.")
    if not math.isfinite(weight):
        raise ValueError("the norm of params is out of their dtype's range.")
    if abs(lone) >= free and lone != 0:
        raise ValueError(
            "params are mostly single numbers, in which a direction has no choice but its sign, so that two cannot be "
            "orthogonal: take scale='none', or another key."
        )
    return -lone / free if lone else 0.0


def rescaled(direction: Params, length: float | Array) -> Params:
    """The direction with the norm `length` over all its numbers together.

    Raises:
        ValueError: if the direction is 0.
    """
    present = norm(direction)
    if not present > 0:
        raise ValueError("a direction of norm 0 cannot be rescaled.")
    return jax.tree.map(lambda leaf: wide(leaf) * (length / present).astype(wide(leaf).dtype), direction)


def interpolation_directions(params: Params, first: Params, second: Params) -> Directions:
    """From `params` to two other trees: (1, 0) of the plane is the first, (0, 1) the second.

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
    coordinates: Float[np.ndarray, "checkpoint 2"]  # of each checkpoint in that plane, the largest of each axis 1
    explained: Float[np.ndarray, "2"]  # share of Σ ‖checkpoint − origin‖² along each direction


def principal_directions(checkpoints: Sequence[Params], origin: Params) -> PrincipalDirections:
    """The first two principal components of checkpoint − origin, where origin is usually the last checkpoint.

    Uncentred, by the eigenvectors of the checkpoints' Gram matrix (Li et al. 2018, section 7, whose matrix has these
    differences as its rows). They are orthogonal, and as long as the farthest checkpoint reaches along each, so that
    the path fits into [−1, 1]²; the first checkpoint lies at positive coordinates.

    Raises:
        ValueError: if trees do not match, or all checkpoints lie on one line through the origin.
    """
    check_params(origin, name="origin")
    differences = [_towards(origin, each, f"checkpoint {i}") for i, each in enumerate(checkpoints)]
    count = len(differences)
    gram = np.asarray([[float(inner(a, b)) for b in differences] for a in differences]).reshape(count, count)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if len(values) < 2 or values[1] <= count * _rounding(differences[0]) * values[0]:
        raise ValueError(f"{count} checkpoints span no plane around the origin: they lie on a line through it.")
    vectors = vectors * np.where(vectors[0] < 0, -1, 1)
    # The second is short, so that rounding of the first would tilt it: they are made orthogonal again.
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
    """What inner products of such trees leave unsure, relative to the products of the norms."""
    return 8 * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(tree))).eps)


def coordinates(params: Params, origin: Params, directions: Directions) -> Float[np.ndarray, "2"]:
    """(α, β) of the point of the plane that is nearest to `params`.

    Raises:
        ValueError: if trees do not match, or the directions span no plane.
    """
    difference = _towards(origin, params, "params")
    for i, direction in enumerate(directions):
        check_like(direction, origin, name=f"direction {i}")
    gram = np.asarray([[float(inner(a, b)) for b in directions] for a in directions])
    if not np.linalg.det(gram) > _rounding(difference) * gram[0, 0] * gram[1, 1]:
        raise ValueError("the directions span no plane: one is 0, or a multiple of the other.")
    return np.linalg.solve(gram, [float(inner(direction, difference)) for direction in directions])
