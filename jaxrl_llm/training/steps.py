"""One optimiser step: a pure, jitted function of (state, batch) that donates the state's buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxrl_llm.language_model import Params

Metrics = dict[str, Float[Array, ""]]
View = Callable[[Params, PyTree], Params]  # (trained parameters, frozen ones) -> those that the loss sees


class TrainState(NamedTuple):
    """All that a run is: parameters, optimiser state, steps done, and the key that every step derives its own from."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]

    @property
    def step_key(self) -> Key[Array, ""]:
        """The key of the step to come."""
        return jax.random.fold_in(self.key, self.step)


class Loss(NamedTuple):
    """A loss that is a mean over something, and how much of it there was.

    Parts of a batch are put together by their weights, so that accumulation gives what the whole batch gives.
    """

    value: Float[Array, ""]
    weight: Float[Array, ""] | float = 1.0  # tokens, rows or pairs: what `value` is the mean over
    metrics: Mapping[str, Float[Array, ""]] = {}  # means over the same


LossFn = Callable[[Params, PyTree, PyTree, Array], Loss]  # (params, batch, frozen, key) -> Loss


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, key: Key[Array, ""], *, copy: bool = True
) -> TrainState:
    """The state before the first step.

    Args:
        copy: the state has buffers of its own, and `params` stay. Without it the first step donates `params`
            themselves: nothing may read them any more, and the memory never holds them twice.
    """
    if copy:
        params, key = jax.tree.map(jnp.copy, (params, key))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def make_step(
    loss: LossFn, optimizer: optax.GradientTransformation, *, microbatches: int = 1, view: View | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One jitted step `(state, batch, frozen=None) -> (state, metrics)`; the state is donated, the rest is not.

    Args:
        loss: loss(params, batch, frozen, key); `frozen` is what no step changes, such as a reference policy's
            parameters, and `key` the step's own.
        microbatches: the batch is cut into so many parts, whose gradients are added up: the memory of one part, the
            step of the whole. Every leaf of the batch then has the rows first.
        view: what the loss sees of the trained parameters, such as a copy in bfloat16 (`precision.compute_in`) or a
            base model with adapters merged into it (`lora`). Gradients flow through it.

    The metrics hold `loss`, `grad_norm` (before any clipping) and those of the loss.

    Raises:
        ValueError: if the rows of a batch cannot be cut into so many parts, or the loss is no mean over rows, as KTO's.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: PyTree, frozen: PyTree = None) -> tuple[TrainState, Metrics]:
        return update(loss, optimizer, state, batch, frozen, microbatches=microbatches, view=view)

    return train_step


def update(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: PyTree,
    frozen: PyTree = None,
    *,
    microbatches: int = 1,
    view: View | None = None,
) -> tuple[TrainState, Metrics]:
    """What `make_step` jits, to be part of a larger program."""
    if microbatches > 1 and getattr(loss, "needs_whole_batch", False):
        raise ValueError(
            "this loss compares with all rows of a batch, so that its parts do not add up: no microbatches."
        )

    def seen(params: Params, part: PyTree, key: Array) -> Loss:
        return loss(params if view is None else view(params, frozen), part, frozen, key)

    grads, metrics = gradients(seen, state.params, batch, state.step_key, microbatches=microbatches)
    metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1, state.key), metrics


def gradients(
    loss: Callable[[Params, PyTree, Array], Loss], params: Params, batch: PyTree, key: Array, *, microbatches: int = 1
) -> tuple[Params, Metrics]:
    """The gradient of the mean loss of a batch, and the mean metrics, over its parts one after the other."""

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
    """Every leaf [rows, ...] as [count, rows / count, ...], part i holding the rows i, i + count, ...

    Strided, so that a batch that is spread over devices by rows stays spread evenly in every part.
    """

    def cut(leaf: Array) -> Array:
        if leaf.ndim == 0 or leaf.shape[0] % count:
            raise ValueError(
                f"a batch must have a number of rows that {count} microbatches divide, but has a leaf "
                f"of the shape {list(leaf.shape)}."
            )
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def whole_run(
    initial: Callable[[Array], TrainState], advance: Callable[[TrainState], tuple[TrainState, PyTree]], *, steps: int
) -> Callable[[Array], tuple[TrainState, PyTree]]:
    """A whole run as one function of a key: jit it, and `jax.vmap` it over seeds.

    Args:
        initial: from a key to the state before the first step.
        advance: one step, traceable; what it returns beside the state is stacked over the steps.
    """

    def train(key: Array) -> tuple[TrainState, PyTree]:
        return jax.lax.scan(lambda state, _: advance(state), initial(key), length=steps)

    return train
