"""The loss over a plane or along a line through a point of parameter space.

`next_token_loss`, `preference_loss` and `reward_model_loss` are losses as functions of the parameters alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxrl_llm import runtime
from jaxrl_llm.analysis.landscape.directions import check_like, check_params, cosine
from jaxrl_llm.files import replacing
from jaxrl_llm.language_model import LanguageModel, Params, check_tokens
from jaxrl_llm.models.decoder import with_attention
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.numerics import wide
from jaxrl_llm.objectives import preference, reward_model
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.scoring import Sequences, check_sequences, log_probs

LossFn = Callable[[Params], Float[Array, ""]]


class LossHole(UserWarning):
    """The loss is not finite at some points of a grid."""


def axis(radius: float = 1.0, points: int = 21) -> Float[np.ndarray, "points"]:
    """Return `points` equally spaced numbers over [−radius, radius], exactly symmetric; odd numbers include 0.

    Raises:
        ValueError: if there are no points, or radius is not positive and finite.
    """
    if not isinstance(points, int | np.integer) or points < 1:
        raise ValueError(f"points must be an integer of at least 1, but is {points!r}.")
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
    """Compute loss(params + α d1 + β d2) for every α and β.

    Each point is computed from the parameters themselves, so that errors do not accumulate: params + α d1 is formed
    once for each α, and the row is a `lax.map` over vmapped blocks of β. The origin, if it is on the grid, is evaluated
    by `jax.jit(loss_fn)(params)` and equals it bit for bit; another program may round the last bit differently.

    Args:
        loss_fn: any scalar function of a parameter tree that jax can trace. Each function object is compiled once.
        directions: two trees like params. The sum is formed in float32 or wider, and cast to the dtype of params.
        memory_budget: bytes on each device for the perturbed parameters and the loss's intermediates; as many points
            as fit are evaluated together. By default one point at a time on CPUs, where batching is not faster, and a
            quarter of the device's memory elsewhere.
        mesh: devices over which the points of a row are split.
        checkpoint: a file for the finished rows; a call that finds it there continues from it.
        progress: show a progress bar.

    Returns:
        The losses, [alpha, beta]. A loss that is not finite is a hole, which is returned unchanged, and a `LossHole`
        warning gives the number of holes and the first one.

    Raises:
        ValueError: if trees do not match, the grid is empty or not finite, the loss is not a scalar, one point needs
            more than the budget, or the checkpoint belongs to another grid, loss or point.
    """
    alphas, betas = _checked_axis("alphas", alphas), _checked_axis("betas", betas)
    if len(directions) != 2:
        raise ValueError(f"directions must be two trees, but are {len(directions)}.")
    first, second = directions
    dtype = _checked_dtype(loss_fn, params, directions)
    block = _block_size(
        loss_fn, params, second, memory_budget, most=-(-len(betas) // (1 if mesh is None else mesh.size))
    )
    rows = _Rows(checkpoint, loss_fn, params, directions, alphas, betas, dtype)
    if mesh is not None:
        params, first, second = jax.device_put((params, first, second), NamedSharding(mesh, P()))
    bar = tqdm(
        total=alphas.size * betas.size,
        initial=rows.done.size,
        unit="point",
        leave=False,
        disable=not progress or runtime.is_file(),
    )
    for alpha in alphas[len(rows.done) :]:
        row = _losses_along(loss_fn, params, _sum(params, first, alpha), second, betas, block=block, mesh=mesh)
        for origin in np.flatnonzero((alpha == 0) & (betas == 0)):
            row[origin] = _loss_alone(loss_fn, params, _sum(params, first, alpha), second, betas[origin])
        rows.add(row)
        bar.update(len(row))
    bar.close()
    _report_holes(rows.done, alphas, betas)
    return rows.done


@dataclasses.dataclass(frozen=True)
class Surface:
    """The loss over a plane of two directions around a point of parameter space.

    Args:
        title: of a figure.
        unit: of the loss.
        alphas: [A] the steps along the first direction.
        betas: [B] the steps along the second.
        loss: [A, B]; not finite at a hole.
        centre: the loss at the origin, which an even grid does not hold.
        cosine: of the two directions.
        sharpness: the largest eigenvalue of the Hessian at the centre, if it is known.
        residuals: ‖Hv − λv‖ of the two directions, if they are to be eigenvectors but did not converge; the sharpness
            is then no more than a lower bound.

    Raises:
        ValueError: if the shapes do not match, or no loss is finite.
    """

    title: str
    unit: str
    alphas: Float[np.ndarray, "A"]
    betas: Float[np.ndarray, "B"]
    loss: Float[np.ndarray, "A B"]
    centre: float
    cosine: float
    sharpness: float | None = None
    residuals: tuple[float, float] | None = None

    def __post_init__(self):
        if np.shape(self.loss) != (len(self.alphas), len(self.betas)):
            raise ValueError(
                f"loss must be [{len(self.alphas)}, {len(self.betas)}], but is {list(np.shape(self.loss))}."
            )
        if not np.isfinite(self.loss).any():
            raise ValueError(f"none of the {np.size(self.loss)} losses is finite: take a smaller radius.")

    def as_dict(self) -> dict[str, Any]:
        """Return the surface as JSON, for results files: None where the loss is not finite, and the numbers of it."""
        finite = np.isfinite(self.loss)
        fields = {
            "title": self.title,
            "unit": self.unit,
            "alphas": [float(alpha) for alpha in self.alphas],
            "betas": [float(beta) for beta in self.betas],
            "loss": [[float(loss) if np.isfinite(loss) else None for loss in row] for row in self.loss],
            "centre": self.centre,
            "minimum": float(self.loss[finite].min()),
            "maximum": float(self.loss[finite].max()),
            "holes": int((~finite).sum()),
            "cosine": self.cosine,
            "centre_on_grid": bool(np.any(self.alphas == 0) and np.any(self.betas == 0)),
        }
        known = {"sharpness": self.sharpness, "residuals": self.residuals and list(self.residuals)}
        return fields | {name: value for name, value in known.items() if value is not None}


def surface_of(
    loss_fn: LossFn,
    params: Params,
    directions: tuple[Params, Params],
    alphas: Float[np.ndarray, "A"] | None = None,
    betas: Float[np.ndarray, "B"] | None = None,
    *,
    title: str = "Loss",
    unit: str = "nats per token",
    sharpness: float | None = None,
    residuals: tuple[float, float] | None = None,
    **options: Any,
) -> Surface:
    """Compute `loss_surface` with the numbers that belong to it: what `jaxrl_llm.plots.landscape` draws.

    Args:
        alphas, betas: by default `axis()` each.
        title, unit, sharpness, residuals: as in `Surface`.
        options: of `loss_surface`.

    Raises:
        ValueError: as `loss_surface` and `Surface` do.
    """
    alphas, betas = (axis() if steps is None else np.asarray(steps, np.float64) for steps in (alphas, betas))
    losses = loss_surface(loss_fn, params, directions, alphas, betas, **options)
    centre, angle = float(jax.jit(loss_fn)(params)), float(cosine(*directions))
    return Surface(title, unit, alphas, betas, losses, centre, angle, sharpness, residuals)


def loss_section(
    loss_fn: LossFn, params: Params, direction: Params, alphas: Float[np.ndarray, "A"]
) -> Float[np.ndarray, "A"]:
    """Compute loss(params + α d) for every α: `loss_surface` along one direction."""
    alphas = _checked_axis("alphas", alphas)
    _checked_dtype(loss_fn, params, (direction,))
    losses = _losses_along(loss_fn, params, params, direction, alphas)
    for origin in np.flatnonzero(alphas == 0):
        losses[origin] = _loss_alone(loss_fn, params, params, direction, alphas[origin])
    _report_holes(losses, alphas)
    return losses


def _checked_axis(name: str, values: Array) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        found = f"has the shape {list(values.shape)}" if values.ndim != 1 or values.size == 0 else "has others"
        raise ValueError(f"{name} must be a list of at least one number, all finite, but {found}.")
    return values


def _checked_dtype(loss_fn: LossFn, params: Params, directions: Sequence[Params]) -> np.dtype:
    """Check all trees and the loss, and return the dtype of the loss."""
    check_params(params)
    for number, direction in enumerate(directions):
        check_like(direction, params, name=f"direction {number}")
    loss = jax.eval_shape(loss_fn, params)
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"loss_fn must return one floating number, but returns {loss}.")
    return np.dtype(loss.dtype)


@jax.jit
def _sum(params: Params, direction: Params, coefficient: float) -> Params:
    """Compute params + coefficient · direction, in float32 or wider."""

    def leaf_sum(leaf: Array, step: Array) -> Array:
        leaf = wide(leaf)
        return leaf + jnp.asarray(coefficient, leaf.dtype) * step.astype(leaf.dtype)

    return jax.tree.map(leaf_sum, params, direction)


@jax.jit
def _moved(params: Params, base: Params, direction: Params, coefficient: float) -> Params:
    """Compute base + coefficient · direction, in the dtypes of params."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), _sum(base, direction, coefficient), params)


def _loss_alone(loss_fn: LossFn, params: Params, base: Params, direction: Params, coefficient: float) -> np.ndarray:
    """Compute the loss at one point by its own program: another program may round differently."""
    return np.asarray(jax.jit(loss_fn)(_moved(params, base, direction, coefficient)))


def _losses_along(
    loss_fn: LossFn,
    params: Params,
    base: Params,
    direction: Params,
    coefficients: Float[np.ndarray, "point"],
    *,
    block: int = 1,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "point"]:
    """Compute the loss at base + c · direction for each coefficient c; the last one is repeated to fill blocks."""
    together = block * (1 if mesh is None else mesh.size)
    padded = jnp.asarray(np.pad(coefficients, (0, -len(coefficients) % together), mode="edge"))
    if mesh is not None:
        padded = jax.device_put(padded, NamedSharding(mesh, P(mesh.axis_names)))
    losses = _line(loss_fn, params, base, direction, padded, block=block, mesh=mesh)
    return np.array(losses)[: len(coefficients)]


@functools.partial(jax.jit, static_argnames=("loss_fn", "block", "mesh"))
def _line(
    loss_fn: LossFn,
    params: Params,
    base: Params,
    direction: Params,
    coefficients: Float[Array, "point"],
    *,
    block: int,
    mesh: Mesh | None = None,
) -> Float[Array, "point"]:
    """Evaluate `block` points at a time on each device of the mesh."""

    def each(params: Params, base: Params, direction: Params, coefficients: Array) -> Array:
        def at(coefficient: Float[Array, ""]) -> Float[Array, ""]:
            return loss_fn(_moved(params, base, direction, coefficient))

        # For one point at a time there is no vmap: it would turn plain products into batched ones.
        return jax.lax.map(at, coefficients, batch_size=block if block > 1 else None)

    if mesh is None:
        return each(params, base, direction, coefficients)
    split = P(mesh.axis_names)
    spread = jax.shard_map(each, mesh=mesh, in_specs=(P(), P(), P(), split), out_specs=split, check_vma=False)
    return spread(params, base, direction, coefficients)


def _block_size(loss_fn: LossFn, params: Params, direction: Params, budget: int | None, *, most: int) -> int:
    """Return the number of points that are evaluated together within the budget."""
    if budget is None:
        stats = jax.devices()[0].memory_stats()
        if jax.default_backend() == "cpu" or not stats or "bytes_limit" not in stats:
            return 1
        budget = stats["bytes_limit"] // 4
    if budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, but is {budget}.")
    base = jax.eval_shape(_sum, params, direction, 0.0)
    program = _line.lower(loss_fn, params, base, direction, jnp.zeros(1), block=1).compile()
    alone = max(1, program.memory_analysis().temp_size_in_bytes)
    if alone > budget:
        raise ValueError(f"memory_budget must be at least {alone} bytes, the need of one point, but is {budget}.")
    return -(-most // -(-most // min(budget // alone, most)))  # blocks of equal size


def _report_holes(losses: np.ndarray, *axes: np.ndarray) -> None:
    holes = np.argwhere(~np.isfinite(losses))
    if holes.size:
        place = ", ".join(f"{axis[index]:g}" for axis, index in zip(axes, holes[0], strict=True))
        warnings.warn(
            f"the loss is not finite at {len(holes)} of {losses.size} points, first at ({place}): they are holes.",
            LossHole,
            stacklevel=3,
        )


class _Rows:
    """The finished rows of a surface, in memory and, if there is a checkpoint, in its file, written atomically."""

    def __init__(
        self,
        path: Path | None,
        loss_fn: LossFn,
        params: Params,
        directions: Sequence[Params],
        alphas: np.ndarray,
        betas: np.ndarray,
        dtype: np.dtype,
    ):
        self.path, self.done = path, np.zeros((0, len(betas)), dtype)
        if path is None:
            return
        self._identity = _fingerprint(loss_fn, params, directions, alphas, betas)
        if Path(path).exists():
            self.done = self._read()

    def _read(self) -> np.ndarray:
        try:
            kept = json.loads(Path(self.path).read_text(encoding="utf-8"))
            identity, losses = kept["identity"], [[float(loss) for loss in row] for row in kept["losses"]]
            losses = np.asarray(losses, self.done.dtype).reshape(-1, self.done.shape[1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not a checkpoint of a loss surface: {error!r}.") from error
        if identity != self._identity:
            raise ValueError(
                f"{self.path} is the checkpoint of another surface (grid, directions, parameters or loss): "
                "choose another file, or remove it."
            )
        return losses

    def add(self, row: np.ndarray) -> None:
        """Add the next row, and write all rows."""
        self.done = np.concatenate([self.done, row[None]])
        if self.path is None:
            return
        content = {"identity": self._identity, "losses": [[repr(float(loss)) for loss in row] for row in self.done]}
        with replacing(Path(self.path)) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")


def _fingerprint(
    loss_fn: LossFn, params: Params, directions: tuple[Params, Params], alphas: np.ndarray, betas: np.ndarray
) -> str:
    """Return a hash of grid, parameters, directions, and the loss's values at two corners.

    The centre would not do: around its reference every DPO loss is log 2 there.
    """
    first, second = directions
    corners = [float(_loss_alone(loss_fn, params, _sum(params, first, alphas[i]), second, betas[i])) for i in (0, -1)]
    digest = hashlib.sha256(json.dumps([alphas.tolist(), betas.tolist(), *map(repr, corners)]).encode())
    for leaf in jax.tree.leaves((params, directions)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def next_token_loss(
    lm: LanguageModel, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"] | None = None
) -> LossFn:
    """Return the mean −log p of the real tokens after the first of each row, in nats per token.

    Two of the same model, tokens and mask are equal, so that JAX compiles what is computed from them once. Attention is
    in its exact form, which has the derivatives and batched forms that are taken here.

    Raises:
        ValueError: if the tokens are not ids of the model, or leave nothing to predict.
    """
    tokens = jnp.asarray(tokens)
    check_tokens(lm, tokens, mask)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    predicted = mask & (jnp.cumsum(mask, axis=1) > 1)
    if not predicted.any():
        raise ValueError("a text must have at least two tokens, for otherwise there is nothing to predict.")
    contents = tuple((each.shape, each.dtype.str, each.tobytes()) for each in map(np.asarray, (tokens, mask)))
    return _NextTokenLoss(with_attention(lm, "exact"), contents, Sequences(tokens, mask, predicted))


@dataclasses.dataclass(frozen=True)
class _NextTokenLoss:
    """The loss of `next_token_loss`, a value: JAX finds the programs of an equal one."""

    lm: LanguageModel
    contents: tuple[tuple[tuple[int, ...], str, bytes], ...]  # shape, type and bytes of tokens and mask
    sequences: Sequences = dataclasses.field(compare=False)

    def __call__(self, params: Params) -> Float[Array, ""]:
        logp = log_probs(self.lm, params, self.sequences)
        return -aggregate(logp, self.sequences.completion_mask, "token_mean")


def preference_loss(
    lm: LanguageModel,
    ref_params: Params,
    chosen: Sequences,
    rejected: Sequences,
    *,
    loss: Callable[..., Float[Array, "batch"]] = preference.dpo_loss,
    **hyperparameters: Any,
) -> LossFn:
    """Return the mean over pairs of a loss of `objectives.preference` with a reference, such as DPO's, in nats.

    Args:
        chosen, rejected: row i of the one is preferred to row i of the other.
        loss: of summed log-probabilities: loss(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen,
            logp_ref_rejected, **hyperparameters) -> [batch].

    Raises:
        ValueError: if the rows do not match in number, are not tokens of the model, or one has no completion.
    """
    lm = _of_pairs(lm, chosen, rejected)

    def logp(params: Params) -> list[Float[Array, "batch"]]:
        return [log_probs(lm, params, each).sum(axis=1) for each in (chosen, rejected)]

    logp_ref = jax.jit(logp)(ref_params)

    def pair_loss(params: Params) -> Float[Array, ""]:
        return loss(*logp(params), *logp_ref, **hyperparameters).mean()

    return pair_loss


def reward_model_loss(lm: LanguageModel, chosen: Sequences, rejected: Sequences, **hyperparameters: Any) -> LossFn:
    """Return the mean pairwise loss −log σ(r_chosen − r_rejected) of a reward model, in nats.

    Its parameters are {"model": the language model's, "head": [width]}; the reward of a row is the head's product
    with the hidden state at the row's last real token.

    Raises:
        ValueError: as `preference_loss`.
    """
    lm = _of_pairs(lm, chosen, rejected)
    head = ScalarHead(lm)

    def scores(params: Params, rows: Sequences) -> Float[Array, "batch"]:
        return head.scores(params, rows.tokens, mask=rows.mask)

    def pair_loss(params: Params) -> Float[Array, ""]:
        return reward_model.pairwise_loss(scores(params, chosen), scores(params, rejected), **hyperparameters).mean()

    return pair_loss


def _of_pairs(lm: LanguageModel, chosen: Sequences, rejected: Sequences) -> LanguageModel:
    """Return the model as in `next_token_loss`, if these are pairs of its tokens."""
    check_sequences(lm, chosen, name="chosen")
    check_sequences(lm, rejected, name="rejected")
    if len(chosen.tokens) != len(rejected.tokens) or not len(chosen.tokens):
        raise ValueError(
            f"chosen and rejected must be pairs, but there are {len(chosen.tokens)} and {len(rejected.tokens)}."
        )
    return with_attention(lm, "exact")
