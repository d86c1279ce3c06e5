"""Optimisers, and one step of them: a pure, jitted function of (state, batch) that donates the buffers of the state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxrl_llm.language_model import Params

Metrics = dict[str, Float[Array, ""]]


class Frozen(NamedTuple):
    """Parameters that no step changes."""

    ref: Params | None = None  # of the reference policy
    base: Params | None = None  # of the model that adapters are merged into
    running: PyTree = None  # the statistic of a loss that keeps one, as it was before the step: see `Running`


View = Callable[[Params, Frozen | None], Params]  # (trained, frozen) -> the parameters that the loss sees


class TrainState(NamedTuple):
    """The training state: parameters, optimiser state, number of steps, and the run's key."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]
    running: PyTree = ()  # the statistic of a loss that keeps one: see `Running`

    @property
    def step_key(self) -> Key[Array, ""]:
        """The key of the next step."""
        return jax.random.fold_in(self.key, self.step)


class Loss(NamedTuple):
    """A mean loss with its normaliser, so that microbatches can be combined exactly."""

    value: Float[Array, ""]
    weight: Float[Array, ""] | float = 1.0  # tokens, rows or pairs: what `value` is the mean over
    metrics: Mapping[str, Float[Array, ""]] = {}  # means over the same


LossFn = Callable[[Params, PyTree, Frozen | None, Array], Loss]  # (params, batch, frozen, key) -> Loss


class Running(NamedTuple):
    """A statistic over the steps of a run, such as BCO's mean reward: the attribute `running` of a loss that keeps one.

    It is part of the state, and the loss reads it as `frozen.running`. It is advanced by the metrics of whole batches,
    so that it does not depend on microbatches.
    """

    start: float
    advance: Callable[[Array, Metrics, Array], Array]  # (statistic, metrics of a step, number of steps before it)


def initial_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    copy: bool = True,
    loss: LossFn | None = None,
) -> TrainState:
    """Return the state before the first step.

    Args:
        loss: a loss that may keep a `Running` statistic, which is then begun; without it, it keeps none.
        copy: copy `params`, so that they stay valid. Without it the first step donates them: nothing may read them any
            more, and the memory never holds them twice.
    """
    if copy:
        params, key = jax.tree.map(jnp.copy, (params, key))
    running = getattr(loss, "running", None)
    statistic = () if running is None else jnp.asarray(running.start, jnp.float32)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key, statistic)


def make_step(
    loss: LossFn, optimizer: optax.GradientTransformation, *, microbatches: int = 1, view: View | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return one jitted step `(state, batch, frozen=None) -> (state, metrics)`; it donates the state and nothing else.

    Args:
        loss: loss(params, batch, frozen, key), where `key` is the step's own.
        microbatches: parts that the batch is split into, whose gradients are accumulated: the memory of one part, the
            step of the whole batch. Every leaf of the batch then has the rows first.
        view: a transform of the trained parameters before the loss sees them, such as a copy in bfloat16 (`compute_in`)
            or a base model with adapters merged into it (`lora`). Gradients flow through it.

    The metrics are `loss`, `grad_norm` (before clipping) and those of the loss.

    Raises:
        ValueError: if the number of parts does not divide the rows, or the loss is not a mean over rows, as KTO's.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: PyTree, frozen: Frozen | None = None) -> tuple[TrainState, Metrics]:
        return update(loss, optimizer, state, batch, frozen, microbatches=microbatches, view=view)

    return train_step


def update(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: PyTree,
    frozen: Frozen | None = None,
    *,
    microbatches: int = 1,
    view: View | None = None,
) -> tuple[TrainState, Metrics]:
    """Do one step: the body of `make_step`, to be part of a larger program."""
    if microbatches > 1 and getattr(loss, "needs_whole_batch", False):
        raise ValueError(
            f"microbatches must be 1 for a loss that compares with all rows of a batch, but is {microbatches}."
        )

    running = getattr(loss, "running", None) if jax.tree.leaves(state.running) else None
    if running is not None:
        frozen = (frozen or Frozen())._replace(running=state.running)

    def seen(params: Params, part: PyTree, key: Array) -> Loss:
        return loss(params if view is None else view(params, frozen), part, frozen, key)

    grads, metrics = gradients(seen, state.params, batch, state.step_key, microbatches=microbatches)
    metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    statistic = state.running if running is None else running.advance(state.running, metrics, state.step)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1, state.key, statistic), metrics


def gradients(
    loss: Callable[[Params, PyTree, Array], Loss], params: Params, batch: PyTree, key: Array, *, microbatches: int = 1
) -> tuple[Params, Metrics]:
    """Return the gradient of the mean loss of a batch, and the mean metrics, one microbatch after the other."""

    def weighted(params: Params, part: PyTree, key: Array) -> tuple[Array, tuple[Array, Metrics]]:
        found = loss(params, part, key)
        weight = jax.lax.stop_gradient(jnp.asarray(found.weight, found.value.dtype))
        means = {"loss": found.value, **found.metrics}
        return weight * found.value, (weight, {name: weight * mean for name, mean in means.items()})

    def of_part(part: PyTree, key: Array) -> tuple[Params, Array, Metrics]:
        grads, (weight, sums) = jax.grad(weighted, has_aux=True)(params, part, key)
        return grads, weight, sums

    if microbatches == 1:
        total = of_part(batch, key)
    else:
        parts = _parts(batch, microbatches)
        first = jax.eval_shape(of_part, jax.tree.map(lambda leaf: leaf[0], parts), key)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

        def add(total: PyTree, numbered: tuple[Array, PyTree]) -> tuple[PyTree, None]:
            index, part = numbered
            return jax.tree.map(jnp.add, total, of_part(part, jax.random.fold_in(key, index))), None

        total, _ = jax.lax.scan(add, nothing, (jnp.arange(microbatches), parts))
    grads, weight, sums = total
    share = 1 / jnp.where(weight == 0, 1, weight)
    # A metric may be unbounded where the weight is tiny; gradients keep the dtype of their parameters.
    return jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), grads), {
        name: total * share for name, total in sums.items()
    }


def _parts(batch: PyTree, count: int) -> PyTree:
    """Return every leaf [rows, ...] as [count, rows / count, ...], where part i holds the rows i, i + count, ...

    A batch that is sharded over devices by rows is then sharded evenly in every part.
    """

    def cut(leaf: Array) -> Array:
        if leaf.ndim == 0 or leaf.shape[0] % count:
            raise ValueError(
                f"a batch must have a number of rows that {count} microbatches divide, but has a leaf "
                f"of shape {list(leaf.shape)}."
            )
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def whole_run(
    initial: Callable[[Array], TrainState], advance: Callable[[TrainState], tuple[TrainState, PyTree]], *, steps: int
) -> Callable[[Array], tuple[TrainState, PyTree]]:
    """Return a whole run as one function of a key, to be jitted and mapped over seeds by `jax.vmap`.

    Args:
        initial: maps a key to the state before the first step.
        advance: one traceable step; its second result is stacked over the steps.
    """

    def train(key: Array) -> tuple[TrainState, PyTree]:
        return jax.lax.scan(lambda state, _: advance(state), initial(key), length=steps)

    return train


def compute_in(dtype: Any) -> View:
    """Return a view of the trained parameters in `dtype`, such as bfloat16.

    The forward and backward passes read the narrow copy. Gradients come back in the type of the weights, which the
    optimiser updates, so that no small step is lost to rounding (Micikevicius et al. 2018).

    Raises:
        ValueError: if `dtype` is not floating.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating type, but is {dtype}.")

    def narrow(params: Params, frozen: Frozen | None) -> Params:
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params
        )

    return narrow


def adamw(
    learning_rate: float, *, steps: int, warmup: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Return AdamW on clipped gradients, with a linear warm-up over a share of the steps and linear decay to 0."""
    rising = min(steps - 1, round(warmup * steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / max(1, rising), learning_rate, max(1, rising)),
            optax.linear_schedule(learning_rate, 0.0, max(1, steps - rising)),
        ],
        [rising],
    )
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay))


def muon(
    learning_rate: float, *, steps: int, warmup_steps: int, decay_steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """Return Muon on the weight matrices and Adam on embeddings, norms and biases; warm-up, plateau, linear decay.

    Updates of matrices are scaled to the size of Adam's, so that one learning rate serves both. Weight decay acts on
    matrices alone; gradients are clipped to norm 1.

    Source: Jordan et al. 2024; the size of the updates: Liu et al. 2025 (arXiv 2502.16982).
    """

    def is_matrix(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def dimension_numbers(params: Params) -> Params:
        return jax.tree.map(lambda matrix: optax.contrib.MuonDimensionNumbers() if matrix else None, is_matrix(params))

    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup_steps),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.0, decay_steps),
        ],
        [warmup_steps, steps - decay_steps],
    )
    update = optax.contrib.muon(
        schedule,
        adam_b2=0.95,
        weight_decay=weight_decay,
        weight_decay_mask=is_matrix,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), update)
