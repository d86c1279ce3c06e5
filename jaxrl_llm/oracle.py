"""Exact answers on a tabular language model, by enumeration of every sequence.

The expectation, variance and gradient of anything under the model's distribution, or under that of a sampler with
transforms; J(π) of RLHF, sequence-level KL and the population's preferences. `objectives.rlhf` computes best-of-n's
distribution and the Gibbs optimum from `sequence_log_probs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.language_model import Params
from jaxrl_llm.numerics import check_range, checked, violated
from jaxrl_llm.objectives import kl, rlhf
from jaxrl_llm.objectives.logprobs import token_log_probs
from jaxrl_llm.tabular import TabularLM

MAX_SEQUENCES = 10**7
GROUPS_AT_ONCE = 512  # groups whose gradients are computed together; the gradients of all groups are kept


class Moments(NamedTuple):
    """Exact mean and variance of every coordinate of an estimator."""

    mean: PyTree[Array]
    variance: PyTree[Array]

    @property
    def total_variance(self) -> Float[Array, ""]:
        """The trace of the covariance: E‖x − E x‖²."""
        return sum(leaf.sum() for leaf in jax.tree.leaves(self.variance))


def enumerate_sequences(lm: TabularLM) -> Int[Array, "sequences horizon"]:
    """All `vocab**horizon` sequences, in lexicographic order: row i is i written in base `vocab`."""
    return _digits(lm.vocab_size, lm.horizon)


def enumerate_groups(lm: TabularLM, group_size: int) -> Int[Array, "groups group_size"]:
    """All groups of `group_size` sequences, as rows of indices into `enumerate_sequences`, in lexicographic order."""
    return _digits(lm.vocab_size**lm.horizon, group_size)


def token_log_probs_of(
    lm: TabularLM, params: Params, sequences: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """log p(y_t | y_<t) of each token of the sequences, the first one included, in nats."""
    return token_log_probs(next_token_logits(lm, params, sequences), sequences)


def next_token_logits(
    lm: TabularLM, params: Params, sequences: Int[Array, "batch time"]
) -> Float[Array, "batch time vocab"]:
    """The logits from which each token of the sequences is drawn, the first one included."""
    if sequences.ndim != 2 or sequences.shape[1] > lm.horizon:
        raise ValueError(f"sequences must be [batch, at most {lm.horizon}], but are {list(sequences.shape)}.")
    root = jnp.zeros((sequences.shape[0], 1), sequences.dtype)
    inputs = jnp.concatenate([root, sequences[:, :-1]], axis=1)  # a padded place reads the root's logits
    mask = jnp.broadcast_to(jnp.arange(inputs.shape[1]) > 0, inputs.shape)
    return lm.apply(params, inputs, mask=mask)[0]


def sequence_log_probs(
    lm: TabularLM,
    params: Params,
    transform: Callable[[Array], Array] | Sequence[Callable[[Array], Array]] | None = None,
    *,
    prompt: Sequence[int] = (),
) -> Float[Array, "sequences"]:
    """log p(y) = Σ_t log p(y_t | y_<t) of every sequence, in the order of `enumerate_sequences`, in nats.

    With a transform it is the exact distribution of a sampler: p(y_t | y_<t) = softmax(transform(logits))[y_t]. With a
    prompt it is that of the horizon − len(prompt) tokens after it. The exponentials sum to 1. Differentiable in
    `params`.

    Args:
        transform: a function of logits [batch, vocab]; one with `init`, `apply` and `update`, as all of
            `decoding.transforms` have; or a sequence of these, applied in their order.

    Raises:
        ValueError: if the prompt has more tokens than the horizon, or a transform cannot be called.
    """
    if len(prompt) > lm.horizon:
        raise ValueError(f"the prompt must have at most {lm.horizon} tokens, but has {len(prompt)}.")
    sequences = _digits(lm.vocab_size, lm.horizon - len(prompt))
    prompts = jnp.tile(jnp.asarray(prompt, jnp.int32), (len(sequences), 1))
    logits = next_token_logits(lm, params, jnp.concatenate([prompts, sequences], axis=1))[:, len(prompt) :]
    if transform is None:
        return token_log_probs(logits, sequences).sum(axis=-1)
    parts = [_stateful(each) for each in (transform if isinstance(transform, list | tuple) else (transform,))]
    slots = jnp.pad(prompts, ((0, 0), (0, sequences.shape[1])))
    mask = jnp.broadcast_to(jnp.arange(lm.horizon) < len(prompt), slots.shape)
    states = [each.init(slots, mask, jnp.full(len(slots), sequences.shape[1])) for each in parts]

    def step(states: list[PyTree[Array]], column: tuple[Array, Array]) -> tuple[list[PyTree[Array]], Array]:
        logits, token = column
        left = logits
        for each, state in zip(parts, states, strict=True):
            left = each.apply(state, left)
        states = [each.update(state, token, logits) for each, state in zip(parts, states, strict=True)]
        return states, token_log_probs(left, token)

    return jax.lax.scan(step, states, (jnp.moveaxis(logits, 1, 0), sequences.T))[1].sum(axis=0)


class _Stateless(NamedTuple):
    """A function of logits, as a transform."""

    function: Callable[[Array], Array]

    def init(self, prompts: Array, mask: Array, limits: Array) -> tuple[()]:
        return ()

    def apply(self, state: tuple[()], logits: Array) -> Array:
        return self.function(logits)

    def update(self, state: tuple[()], token: Array, logits: Array) -> tuple[()]:
        return ()


def _stateful(transform: Any) -> Any:
    if hasattr(transform, "init"):
        return transform
    if not callable(transform):
        raise ValueError(
            f"transform must be a function of logits, a transform, or a sequence of them, but is {transform!r}."
        )
    return _Stateless(transform)


def expectation(
    lm: TabularLM, params: Params, function: Callable[[Int[Array, "sequences horizon"]], PyTree[Array]]
) -> PyTree[Array]:
    """E_{y ~ p}[f(y)] = Σ_y p(y) f(y), exactly, and differentiable in `params`.

    Args:
        function: from all sequences [N, horizon] to a value for each: an array, or a tree of arrays, [N, ...]. It is
            not differentiated through the choice of y, because there is none: the sum runs over all of them.
    """
    probabilities = jnp.exp(sequence_log_probs(lm, params))
    values = function(enumerate_sequences(lm))
    return _weighted_sum(probabilities, values)


def moments(
    lm: TabularLM,
    params: Params,
    function: Callable[[Int[Array, "groups group_size"]], PyTree[Array]],
    *,
    group_size: int = 1,
) -> Moments:
    """Exact mean and variance of an estimator that sees `group_size` independent sequences.

    Args:
        function: from all groups [M, group_size], rows of indices into `enumerate_sequences`, to the estimator's value
            on each: an array, or a tree of arrays, [M, ...].
    """
    groups = enumerate_groups(lm, group_size)
    weights = jnp.exp(sequence_log_probs(lm, params)[groups].sum(axis=-1))
    values = function(groups)
    mean = _weighted_sum(weights, values)
    squares = jax.tree.map(lambda leaf, centre: jnp.square(leaf - centre), values, mean)
    return Moments(mean, _weighted_sum(weights, squares))


def gradient_moments(
    lm: TabularLM,
    params: Params,
    loss: Callable[[Params, Int[Array, "groups group_size"]], Float[Array, "groups"]],
    *,
    group_size: int = 1,
    sampler_params: Params | None = None,
) -> Moments:
    """Exact mean and variance of the gradient that autodiff takes of a loss on samples.

    The samples themselves do not depend on `params`, as in training: what is missing from the mean is what a trainer
    would miss.

    Args:
        loss: from `params` and groups (see `moments`), of which it is given some at a time, to the loss on each;
            differentiated in `params`.
        sampler_params: of the distribution that the groups are drawn from; by default `params`, on-policy.
    """

    def gradient(group: Array) -> Params:
        return jax.grad(lambda params: loss(params, group[None])[0])(params)

    gradients = jax.lax.map(gradient, enumerate_groups(lm, group_size), batch_size=GROUPS_AT_ONCE)
    sampler_params = params if sampler_params is None else sampler_params
    return moments(lm, sampler_params, lambda groups: gradients, group_size=group_size)


def sequence_kl(lm: TabularLM, params: Params, ref_params: Params) -> Float[Array, ""]:
    """KL(π‖ref) of the two distributions of whole sequences, in nats."""
    return _kl(sequence_log_probs(lm, params), sequence_log_probs(lm, ref_params))


def sequence_kl_grad(lm: TabularLM, params: Params, ref_params: Params) -> Params:
    """∇KL(π‖ref) = E_π[log(π/ref) ∇log π] in `params`; 0 where the divergence is infinite, as for `kl.exact_kl`."""
    log_probs, pull_back = jax.vjp(lambda params: sequence_log_probs(lm, params), params)
    weights = _weighted(log_probs, kl.k1(log_probs, sequence_log_probs(lm, ref_params)))
    return pull_back(jnp.where(jnp.isfinite(weights).all(), weights, 0))[0]


def objective(
    lm: TabularLM,
    params: Params,
    ref_params: Params,
    rewards: Float[Array, "sequences"],
    *,
    beta: float,
    gamma: float = 0.0,
    pretraining: Float[Array, "sequences"] | None = None,
) -> Float[Array, ""]:
    """J(π) = E_π[r − β log(π/ref)] + γ E_{x ~ pretraining}[log π(x)], exactly (Ouyang et al. 2022, eq. 2).

    Args:
        rewards: of every sequence, in the order of `enumerate_sequences`.
        pretraining: the probability of every sequence in pretraining text; needed where gamma is not 0.

    Raises:
        ValueError: if there is not one floating reward, and one probability, for each sequence, beta or gamma is
            negative, or the pretraining distribution is missing or does not sum to 1.
    """
    log_probs = sequence_log_probs(lm, params)
    value = rlhf.regularised_objective(log_probs, sequence_log_probs(lm, ref_params), rewards, beta=beta)
    pretraining = _checked_pretraining(log_probs, pretraining, gamma)
    bonus = rlhf.ptx_bonus(jnp.where(pretraining > 0, log_probs, 0), gamma=gamma)
    return value + (pretraining * bonus).sum()


def objective_grad(
    lm: TabularLM,
    params: Params,
    ref_params: Params,
    rewards: Float[Array, "sequences"],
    *,
    beta: float,
    gamma: float = 0.0,
    pretraining: Float[Array, "sequences"] | None = None,
) -> Params:
    """∇J = E_π[(r − β log(π/ref)) ∇log π] + γ E_pretraining[∇log π] in `params`: the policy gradient, exactly."""
    log_probs, pull_back = jax.vjp(lambda params: sequence_log_probs(lm, params), params)
    ref_log_probs = sequence_log_probs(lm, ref_params)
    of_log_probs, *_ = rlhf.regularised_objective.grad(log_probs, ref_log_probs, rewards, beta=beta)
    return pull_back(of_log_probs + gamma * _checked_pretraining(log_probs, pretraining, gamma))[0]


def population_preferences(
    log_probs: Float[Array, "sequences"], rewards: Float[Array, "sequences"]
) -> Float[Array, "chosen rejected"]:
    """The probability of every labelled pair, where the population answers by Bradley-Terry.

        P(chosen = i, rejected = j) = 2 p_i p_j σ(r_i − r_j)

    Two answers are drawn independently from the distribution `log_probs`, then one is preferred. All entries sum to 1.

    Raises:
        ValueError: if the two are not floating and of one shape [sequences].
    """
    log_probs, rewards = checked(log_probs=log_probs, rewards=rewards)
    if log_probs.ndim != 1:
        raise ValueError(f"log_probs must be [sequences], but has the shape {list(log_probs.shape)}.")
    probs = jnp.exp(log_probs)
    return 2 * probs[:, None] * probs * jax.nn.sigmoid(rewards[:, None] - rewards)


def _digits(base: int, places: int) -> Int[Array, "rows places"]:
    total = base**places
    if total > MAX_SEQUENCES:
        raise ValueError(f"{base}**{places} = {total} sequences are too many to enumerate.")
    place_values = base ** jnp.arange(places - 1, -1, -1)
    return (jnp.arange(total)[:, None] // place_values % base).astype(jnp.int32)


def _checked_pretraining(log_probs: Array, pretraining: Array | None, gamma: float) -> Float[Array, "sequences"]:
    """The pretraining distribution, all 0 if it is None and gamma is 0."""
    check_range(0, gamma=gamma)
    if pretraining is None:
        if not (isinstance(gamma, float | int) and gamma == 0):
            raise ValueError(f"gamma is {gamma}: the pretraining distribution must be given too.")
        return jnp.zeros_like(log_probs)
    _, pretraining = checked(log_probs=log_probs, pretraining=pretraining)
    if violated((pretraining >= 0) & (jnp.abs(pretraining.sum() - 1) < 1e-4)):
        raise ValueError(f"pretraining must be probabilities that sum to 1, but they sum to {pretraining.sum()}.")
    return pretraining


def _kl(log_probs: Array, log_probs_other: Array) -> Array:
    return _weighted(log_probs, kl.k1(log_probs, log_probs_other)).sum()


def _weighted(log_probs: Array, values: Array) -> Array:
    """p(y) f(y), 0 where p(y) = 0."""
    return jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * jnp.where(log_probs > -jnp.inf, values, 0), 0)


def _weighted_sum(weights: Float[Array, "n"], values: PyTree[Array]) -> PyTree[Array]:
    def total(leaf: Array) -> Array:
        if leaf.shape[:1] != weights.shape:
            raise ValueError(
                f"the function must give a value for each of {weights.shape[0]} sequences, got {leaf.shape}."
            )
        # A sequence of probability 0 contributes 0, whatever its value.
        weight = weights.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(weight > 0, weight * jnp.where(weight > 0, leaf, 0), 0).sum(axis=0)

    return jax.tree.map(total, values)
