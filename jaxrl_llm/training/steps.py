"""Optimisers, and one step of them: a pure, jitted function of (state, batch) that donates the buffers of the state."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxrl_llm.language_model import Params
from jaxrl_llm.mesh import laid_out
from jaxrl_llm.training.config import Optimizer, Schedule, check_optimizer

Metrics = dict[str, Float[Array, ""]]
ROUNDING = 0x726F756E  # what a step's key is folded with to round its parameters


class Frozen(NamedTuple):
    """Parameters that no step changes."""

    ref: Params | None = None  # of the reference policy
    base: Params | None = None  # of the model that adapters are merged into
    running: PyTree = None  # the statistic of a loss that keeps one, as it was before the step: see `Running`


# (trained, frozen, key=None) -> the parameters that the loss sees. The key is the step's; without it nothing is random.
View = Callable[..., Params]


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
    metrics: Mapping[str, Float[Array, ""]] = {}  # means, over the same unless `weights` has what they are over
    weights: Mapping[str, Float[Array, ""] | float] = {}  # by the names of metrics

    def totals(self) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
        """Return the loss and each metric times its weight, and the weight: those of the parts of a batch add up."""
        if unknown := sorted(set(self.weights) - set(self.metrics)):
            raise ValueError(f"weights must be of metrics, {', '.join(self.metrics)}, but has {', '.join(unknown)}.")
        means = {"loss": self.value, **self.metrics}
        weights = {name: jnp.asarray(self.weights.get(name, self.weight), self.value.dtype) for name in means}
        return {name: (weights[name] * mean, weights[name]) for name, mean in means.items()}


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
    """Return the state before the first step. Of parameters in bfloat16 the optimiser's state is in float32.

    Args:
        loss: a loss that may keep a `Running` statistic, which is then begun; without it, it keeps none.
        copy: copy `params`, so that they stay valid. Without it the first step donates them: nothing may read them any
            more, and the memory never holds them twice.
    """
    if copy:
        params, key = jax.tree.map(jnp.copy, (params, key))

    def init(params: Params) -> optax.OptState:
        return laid_out(optimizer.init(_wide(params)))

    if _is_narrow(params) or not jax.sharding.get_abstract_mesh().empty:
        init = jax.jit(init)  # so that no wide copy of narrow parameters is made, and no device holds the whole state
    running = getattr(loss, "running", None)
    statistic = () if running is None else jnp.asarray(running.start, jnp.float32)
    return TrainState(params, init(params), jnp.zeros((), jnp.int32), key, statistic)


def make_step(
    loss: LossFn, optimizer: optax.GradientTransformation, *, microbatches: int = 1, view: View | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return one jitted step `(state, batch, frozen=None) -> (state, metrics)`; it donates the state and nothing else.

    Args:
        loss: loss(params, batch, frozen, key), where `key` is the step's own.
        microbatches: parts that the batch is split into, whose gradients are accumulated: the memory of one part, the
            step of the whole batch. Every leaf of the batch then has the rows first.
        view: a transform of the trained parameters before the loss sees them, such as a copy in bfloat16 (`compute_in`)
            or a base model with adapters merged into it (`models.lora`). Gradients flow through it. It is called with
            the step's key, for dropout.

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
    further: tuple[LossFn, PyTree] | None = None,
    microbatches: int = 1,
    view: View | None = None,
) -> tuple[TrainState, Metrics]:
    """Do one step: the body of `make_step`, to be part of a larger program.

    Parameters in bfloat16 are updated in float32 and rounded at random, up or down with the probabilities that keep the
    mean, so that steps far below their spacing add up.

    Args:
        further: a loss that is added, with a batch of its own, which is split into as many parts.
    """
    if microbatches > 1 and getattr(loss, "needs_whole_batch", False):
        raise ValueError(
            f"microbatches must be 1 for a loss that compares with all rows of a batch, but is {microbatches}."
        )

    running = getattr(loss, "running", None) if jax.tree.leaves(state.running) else None
    if running is not None:
        frozen = (frozen or Frozen())._replace(running=state.running)

    def found(loss: LossFn, batch: PyTree) -> tuple[Params, Metrics]:
        def seen(params: Params, part: PyTree, key: Array) -> Loss:
            return loss(params if view is None else view(params, frozen, key), part, frozen, key)

        return gradients(seen, state.params, batch, state.step_key, microbatches=microbatches)

    grads, metrics = found(loss, batch)
    if further is not None:
        added, described = found(*further)
        grads = jax.tree.map(jnp.add, grads, added)
        metrics = described | metrics | {"loss": metrics["loss"] + described["loss"]}
    grads = _wide(grads)
    metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
    updates, opt_state = optimizer.update(grads, state.opt_state, _wide(state.params))
    params = _added(state.params, updates, jax.random.fold_in(state.step_key, ROUNDING))
    statistic = state.running if running is None else running.advance(state.running, metrics, state.step)
    params, opt_state = laid_out((params, opt_state))
    return TrainState(params, opt_state, state.step + 1, state.key, statistic), metrics


def gradients(
    loss: Callable[[Params, PyTree, Array], Loss], params: Params, batch: PyTree, key: Array, *, microbatches: int = 1
) -> tuple[Params, Metrics]:
    """Return the gradient of the mean loss of a batch, and the mean metrics, one microbatch after the other.

    Gradients are in the dtype of their parameters, but at least in float32.
    """

    def weighted(params: Params, part: PyTree, key: Array) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        found = loss(params, part, key)
        weight = jax.lax.stop_gradient(jnp.asarray(found.weight, found.value.dtype))
        return weight * found.value, found.totals()

    def of_part(part: PyTree, key: Array) -> tuple[Params, dict[str, tuple[Array, Array]]]:
        grads, totals = jax.grad(weighted, has_aux=True)(params, part, key)
        return laid_out(grads if microbatches == 1 else _wide(grads)), totals

    if microbatches == 1:
        total = of_part(batch, key)
    else:
        parts = _parts(batch, microbatches)
        first = jax.eval_shape(of_part, jax.tree.map(lambda leaf: leaf[0], parts), key)
        grads, totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        nothing = laid_out(grads), totals

        def add(total: PyTree, numbered: tuple[Array, PyTree]) -> tuple[PyTree, None]:
            index, part = numbered
            return jax.tree.map(jnp.add, total, of_part(part, jax.random.fold_in(key, index))), None

        total, _ = jax.lax.scan(add, nothing, (jnp.arange(microbatches), parts))
    grads, totals = total
    _, weight = totals["loss"]
    share = 1 / jnp.where(weight == 0, 1, weight)
    return jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), grads), means(totals)


def means(totals: Mapping[str, tuple[Array, Array]]) -> Metrics:
    """Return the means of sums and their weights, as `Loss.totals` has them; 0 where the weight is."""
    return {name: total / jnp.where(weight == 0, 1, weight) for name, (total, weight) in totals.items()}


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


def _is_narrow(params: Params) -> bool:
    return any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def _wide(params: Params) -> Params:
    """Return bfloat16 leaves in float32, all others as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, params)


def _added(params: Params, updates: Params, key: Array) -> Params:
    """Return the sum; in bfloat16 rounded at random, so that it is right in the mean (Gupta et al. 2015)."""
    if not _is_narrow(params):
        return optax.apply_updates(params, updates)
    leaves, treedef = jax.tree.flatten(params)
    seeds = jax.tree.unflatten(treedef, list(jax.random.bits(key, (len(leaves),), jnp.uint32)))

    def rounded(leaf: Array, update: Array, seed: Array) -> Array:
        whole = leaf + update
        if leaf.dtype != jnp.bfloat16:
            return whole.astype(leaf.dtype)
        bits = jax.lax.bitcast_convert_type(whole, jnp.uint32)  # the upper half is the bfloat16 next to it towards 0
        up = (bits + _noise(seed, whole.shape)) & jnp.uint32(0xFFFF0000)
        chosen = jax.lax.bitcast_convert_type(up, jnp.float32)
        return jnp.where(jnp.isfinite(whole), chosen, whole).astype(leaf.dtype)

    return jax.tree.map(rounded, params, updates, seeds)


def _noise(seed: Array, shape: tuple[int, ...]) -> Array:
    """Return 16 random bits for each place, by hashing it: unlike `jax.random.bits` this needs no memory of its own.

    Source: the finaliser of MurmurHash3 (Appleby 2011).
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B9) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return ((bits ^ (bits >> 16)) & 0xFFFF).reshape(shape)


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

    def narrow(params: Params, frozen: Frozen | None, key: Array | None = None) -> Params:
        return laid_out(
            jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
        )

    return narrow


# Learning rates and optimisers ----------------------------------------------------------------------------------------


def warmup_steps(warmup: float, steps: int) -> int:
    """Return the steps in which a rate that decays later rises: `warmup`, or below 1 a share of all; never all."""
    return min(steps - 1, round(warmup * steps) if warmup < 1 else int(warmup))


def schedule_of(name: Schedule, learning_rate: float, *, steps: int, warmup: float = 0.0) -> optax.Schedule:
    """Return the learning rate of each step: a linear warm-up to the peak, then a decay by name.

    With the peak η, w steps of warm-up and t = (step − w) / (steps − w) after it: "linear" is η(1 − t); "cosine"
    η(1 + cos πt)/2; "constant" η; "inverse_sqrt" η√(w / step), with w of at least 1. The last two do not end with the
    run, nor does their warm-up in steps, which may be longer.

    Args:
        learning_rate: the peak.
        warmup: as in `warmup_steps`.

    Raises:
        ValueError: for another name.
    """
    endless = warmup >= 1 and name in ("constant", "inverse_sqrt")
    rising = int(warmup) if endless else warmup_steps(warmup, steps)
    scale, rest = max(1, rising), max(1, steps - rising)
    after = {
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
        "constant": optax.constant_schedule(learning_rate),
        "inverse_sqrt": lambda step: learning_rate * jnp.sqrt(scale / (scale + jnp.maximum(step, 0))),
    }
    if name not in after:
        raise ValueError(f"the schedule must be one of {', '.join(after)}, but is {name!r}.")
    return optax.join_schedules(
        [optax.linear_schedule(learning_rate / scale, learning_rate, scale), after[name]], [rising]
    )


def optimizer_of(
    name: Optimizer,
    schedule: optax.Schedule | float,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    **hyperparameters: float,
) -> optax.GradientTransformation:
    """Return an optimiser on clipped gradients, whose weight decay leaves norms, biases and embeddings alone.

    "adamw" and "lion" decay weights apart from the gradient, "adam" and "sgd" add the decay to it, as torch's do.
    "adafactor" does not scale by the size of the weights, as in transformers' Trainer. "muon" is Muon on the
    kernels, whose updates are scaled to the size of Adam's so that one learning rate serves both, and Adam on all else.

    Args:
        schedule: the learning rate, of each step or of all.
        clip_norm: gradients of a larger norm are scaled down to it.
        hyperparameters: those of `config.OPTIMIZERS`, by optax's names and with its defaults; of muon adam_b2 is 0.95.

    Raises:
        ValueError: for another name or hyperparameter.

    Source: Loshchilov and Hutter 2019 (AdamW), Chen et al. 2023 (Lion), Shazeer and Stern 2018 (Adafactor),
    Jordan et al. 2024 and Liu et al. 2025, arXiv 2502.16982 (Muon).
    """
    check_optimizer(name, hyperparameters)
    apart = {"weight_decay": weight_decay, "mask": decayed}
    make = {
        "adamw": lambda **given: optax.adamw(schedule, **given, **apart),
        "adam": lambda **given: optax.chain(
            optax.add_decayed_weights(weight_decay, decayed), optax.adam(schedule, **given)
        ),
        "sgd": lambda **given: optax.chain(
            optax.add_decayed_weights(weight_decay, decayed), optax.sgd(schedule, **given)
        ),
        "lion": lambda **given: optax.lion(schedule, **given, **apart),
        "adafactor": lambda **given: optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False, **given),
            optax.add_decayed_weights(-weight_decay, decayed),
            optax.scale_by_learning_rate(schedule, flip_sign=False),
        ),
        "muon": lambda **given: optax.contrib.muon(
            schedule,
            **{"adam_b2": 0.95} | given,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        ),
    }
    return optax.chain(optax.clip_by_global_norm(clip_norm), make[name](**hyperparameters))


def decayed(params: Params) -> PyTree:
    """Return True for each parameter that weight decay acts on: all but norms, biases and embeddings."""
    return _by_name(params, lambda name: name not in ("scale", "bias", "embedding"))


def _matrices(params: Params) -> PyTree:
    return _by_name(params, lambda name: optax.contrib.MuonDimensionNumbers() if name == "kernel" else None)


def _by_name(params: Params, of_name: Callable[[Any], Any]) -> PyTree:
    """Map the last name of each parameter's path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: of_name(getattr(path[-1], "key", None)), params)


def muon(
    learning_rate: float, *, steps: int, warmup_steps: int, decay_steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """Return "muon" of `optimizer_of`, with a linear warm-up from 0, a plateau and a linear decay to 0."""
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup_steps),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.0, decay_steps),
        ],
        [warmup_steps, steps - decay_steps],
    )
    return optimizer_of("muon", schedule, weight_decay=weight_decay)
