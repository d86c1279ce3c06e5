"""The loss over a plane, or along a line, through a point of parameter space."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxrl_llm.analysis.landscape.trees import check_like, check_params
from jaxrl_llm.language_model import Params
from jaxrl_llm.objectives.numerics import wide

LossFn = Callable[[Params], Float[Array, ""]]
CALL = 16  # points in one call, or what comes nearest: the progress bar's and the checkpoint's grain


class LossHole(UserWarning):
    """The loss is not finite at some points of a grid."""


def axis(radius: float = 1.0, points: int = 21) -> Float[np.ndarray, "points"]:
    """`points` equally spaced numbers over [−radius, radius], exactly symmetric: with an odd number, 0 is among them.

    Raises:
        ValueError: if there are no points, or radius is not positive and finite.
    """
    if not isinstance(points, int | np.integer) or points < 1:
        raise ValueError(f"a grid needs at least one point along each axis, but is given {points!r}.")
    if not 0 < radius < np.inf:
        raise ValueError(f"radius must be positive and finite, but is {radius}.")
    spaced = np.linspace(-radius, radius, points) if points > 1 else np.zeros(1)
    return (spaced - spaced[::-1]) / 2


def loss_surface(
    loss_fn: LossFn,
    params: Params,
    directions: tuple[Params, Params],
    alphas: Float[np.ndarray, "A"],
    betas: Float[np.ndarray, "B"],
    *,
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Float[np.ndarray, "A B"]:
    """loss(params + α d1 + β d2) for every α and β.

    Each point starts from the parameters themselves, which are never written, so that nothing drifts. The points are a
    `lax.map` over vmapped blocks. The origin, where it is on the grid, is then evaluated by the loss's own program, and
    is `jax.jit(loss_fn)(params)` bit for bit; within another program XLA may round the last bit otherwise.

    Args:
        loss_fn: any scalar of a parameter tree, traceable by jax. It is compiled once for each function object.
        directions: two trees like params. The sum is formed in float32 or wider, and cast to the dtype of params.
        memory_budget: bytes for the perturbed parameters and what the loss computes from them, on each device; as
            many points as fit are evaluated together. By default one point at a time on CPUs, where together they are
            no faster, and a quarter of the device's memory elsewhere.
        mesh: the points are split over all its devices.
        checkpoint: a file that keeps what is done; a call that finds it there goes on from it.
        progress: show a progress bar.

    Returns:
        The losses, [alpha, beta]. Where the loss is not finite it is a hole: the value stays as it is, and a `LossHole`
        warning says how many there are, and where the first.

    Raises:
        ValueError: if trees do not match, the grid is empty or not finite, the loss is no scalar, a point alone needs
            more than the budget, or the checkpoint is that of another grid, loss or point.
    """
    alphas, betas = _checked_axis("alphas", alphas), _checked_axis("betas", betas)
    points = np.stack(np.meshgrid(alphas, betas, indexing="ij"), axis=-1).reshape(-1, 2)
    if len(directions) != 2:
        raise ValueError(f"a surface needs two directions, but is given {len(directions)}.")
    options = {"memory_budget": memory_budget, "mesh": mesh, "checkpoint": checkpoint, "progress": progress}
    losses = _evaluate(loss_fn, params, tuple(directions), points, **options)
    return losses.reshape(len(alphas), len(betas))


def loss_section(
    loss_fn: LossFn, params: Params, direction: Params, alphas: Float[np.ndarray, "A"], *, progress: bool = False
) -> Float[np.ndarray, "A"]:
    """loss(params + α d) for every α: as `loss_surface`, along one direction."""
    alphas = _checked_axis("alphas", alphas)
    return _evaluate(loss_fn, params, (direction,), alphas[:, None], progress=progress)


def _checked_axis(name: str, values: Array) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        found = f"has the shape {list(values.shape)}" if values.ndim != 1 or values.size == 0 else "has others"
        raise ValueError(f"{name} must be a list of at least one number, all finite, but {found}.")
    return values


def _evaluate(
    loss_fn: LossFn,
    params: Params,
    directions: tuple[Params, ...],
    points: Float[np.ndarray, "point direction"],
    *,
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
    checkpoint: Path | None = None,
    progress: bool,
) -> Float[np.ndarray, "point"]:
    """The loss at each point, in calls of equal size."""
    check_params(params)
    for number, direction in enumerate(directions):
        check_like(direction, params, name=f"direction {number}")
    dtype = _checked_dtype(loss_fn, params)
    devices = 1 if mesh is None else mesh.size
    block = _block_size(loss_fn, params, directions, memory_budget, most=-(-len(points) // devices))
    size = _call_size(len(points), devices * block)
    losses = _Progress(checkpoint, loss_fn, params, directions, points, dtype)
    bar = tqdm(total=len(points), initial=len(losses.done), unit="point", leave=False, disable=not progress)
    while len(losses.done) < len(points):
        start = len(losses.done)
        chunk = points[start : start + size]
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
        found = _losses_at(loss_fn, params, directions, jnp.asarray(padded), block=block, mesh=mesh)
        found = np.array(found)[: len(chunk)]
        for origin in np.flatnonzero(~chunk.any(axis=1)):  # by the loss's own program: within another it rounds anew
            found[origin] = jax.jit(loss_fn)(_moved(params, directions, jnp.asarray(chunk[origin])))
        losses.add(found)
        bar.update(len(chunk))
    bar.close()
    _report_holes(losses.done, points)
    return losses.done


@functools.partial(jax.jit, static_argnames=("loss_fn", "block", "mesh"))
def _losses_at(
    loss_fn: LossFn,
    params: Params,
    directions: tuple[Params, ...],
    points: Float[Array, "point direction"],
    *,
    block: int,
    mesh: Mesh | None = None,
) -> Float[Array, "point"]:
    """The loss at each point, `block` of them at a time, on each device of the mesh."""

    def at(params: Params, directions: tuple[Params, ...], point: Float[Array, "direction"]) -> Float[Array, ""]:
        return loss_fn(_moved(params, directions, point))

    def each(params: Params, directions: tuple[Params, ...], points: Array) -> Array:
        # One point needs no vmap, which would make batched products of plain ones.
        return jax.lax.map(functools.partial(at, params, directions), points, batch_size=block if block > 1 else None)

    if mesh is None:
        return each(params, directions, points)
    split = P(mesh.axis_names)
    return jax.shard_map(each, mesh=mesh, in_specs=(P(), P(), split), out_specs=split, check_vma=False)(
        params, directions, points
    )


@jax.jit
def _moved(params: Params, directions: tuple[Params, ...], point: Float[Array, "direction"]) -> Params:
    """params + Σ point_i d_i, the sum in float32 or wider."""

    def moved(leaf: Array, *steps: Array) -> Array:
        total = wide(leaf)
        for coefficient, step in zip(point, steps, strict=True):
            total = total + coefficient.astype(total.dtype) * step.astype(total.dtype)
        return total.astype(leaf.dtype)

    return jax.tree.map(moved, params, *directions)


def _checked_dtype(loss_fn: LossFn, params: Params) -> np.dtype:
    """The dtype of the loss, which must be one floating number."""
    loss = jax.eval_shape(loss_fn, params)
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"loss_fn must return one floating number, but returns {loss}.")
    return np.dtype(loss.dtype)


def _call_size(points: int, together: int) -> int:
    """Points of a call: a multiple of those evaluated together, such that the calls are equal and waste the fewest."""
    calls = -(-points // max(CALL, together))
    return -(-points // (calls * together)) * together


def _block_size(loss_fn: LossFn, params: Params, directions: Sequence[Params], budget: int | None, *, most: int) -> int:
    """How many points are evaluated together within the budget."""
    if budget is None:
        stats = jax.devices()[0].memory_stats()
        if jax.default_backend() == "cpu" or not stats or "bytes_limit" not in stats:
            return 1
        budget = stats["bytes_limit"] // 4
    if budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, but is {budget}.")
    point = jnp.zeros((1, len(directions)))
    program = _losses_at.lower(loss_fn, params, tuple(directions), point, block=1).compile()
    alone = max(1, program.memory_analysis().temp_size_in_bytes)
    if alone > budget:
        raise ValueError(f"memory_budget must be at least {alone} bytes, what one point needs, but is {budget}.")
    return min(budget // alone, most)


def _report_holes(losses: np.ndarray, points: np.ndarray) -> None:
    holes = np.flatnonzero(~np.isfinite(losses))
    if holes.size:
        place = ", ".join(f"{coordinate:g}" for coordinate in points[holes[0]])
        warnings.warn(
            f"the loss is not finite at {holes.size} of {len(losses)} points, first at ({place}): they are holes.",
            LossHole,
            stacklevel=4,
        )


class _Progress:
    """The losses so far, in memory and, if there is a file, in it: whole or not at all."""

    def __init__(
        self,
        path: Path | None,
        loss_fn: LossFn,
        params: Params,
        directions: Sequence[Params],
        points: np.ndarray,
        dtype: np.dtype,
    ):
        self.path, self.done = path, np.zeros(0, dtype)
        if path is None:
            return
        self._identity = _fingerprint(loss_fn, params, directions, points)
        if Path(path).exists():
            self.done = self._read(len(points))

    def _read(self, most: int) -> np.ndarray:
        try:
            kept = json.loads(Path(self.path).read_text(encoding="utf-8"))
            identity, losses = kept["identity"], np.asarray([float(loss) for loss in kept["losses"]], self.done.dtype)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no checkpoint of a loss surface: {error!r}.") from error
        if identity != self._identity or len(losses) > most:
            raise ValueError(
                f"{self.path} is the checkpoint of another surface (grid, directions, parameters or loss): "
                "name another file, or remove it."
            )
        return losses

    def add(self, losses: np.ndarray) -> None:
        """Add the next losses, and write all so far."""
        self.done = np.concatenate([self.done, losses])
        if self.path is None:
            return
        partial = Path(f"{self.path}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        content = {"identity": self._identity, "losses": [repr(float(loss)) for loss in self.done]}
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, self.path)


def _fingerprint(loss_fn: LossFn, params: Params, directions: Sequence[Params], points: np.ndarray) -> str:
    """Of grid, parameters, directions, and of the loss by its value at the parameters."""
    digest = hashlib.sha256(points.tobytes())
    for leaf in jax.tree.leaves((params, directions, jax.jit(loss_fn)(params))):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
