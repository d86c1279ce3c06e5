"""Online training: sample completions, compute their rewards, and update the policy by any of `METHODS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.decoding.core import check_room
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.numerics import bounded_exp, is_concrete
from jaxrl_llm.objectives import kl, policy_gradient, rlhf
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.scoring import Sequences, log_probs
from jaxrl_llm.training import steps
from jaxrl_llm.training.methods import Method
from jaxrl_llm.training.rewards import RewardFn, rewards_of
from jaxrl_llm.training.rollout import (
    Experience,
    Prompts,
    Rollout,
    Sampler,
    critic_values,
    experience,
    policy_of,
    rollout,
)
from jaxrl_llm.training.steps import Frozen, Loss, LossFn, Metrics, TrainState, View


class Trainer(NamedTuple):
    """The three jitted parts of an online step; the reward is computed between the first two."""

    draw: Callable[[TrainState, Prompts, Sampler, Frozen], Rollout]
    score: Callable[..., tuple[Experience, Metrics]]  # (state, rollout, rewards, method, frozen, temperature)
    update: Callable[..., tuple[TrainState, Metrics]]  # (state, experience, method, frozen, text), donates the state

    def step(
        self,
        state: TrainState,
        prompts: Prompts,
        reward: RewardFn,
        *,
        method: Method,
        sampler: Sampler,
        frozen: Frozen,
        text: Sequences | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Do one step: sample completions from the current policy, compute their rewards, and update.

        Traceable if the reward is, so that a whole run can be one program.

        Args:
            prompts: each gets `method.group_size` completions.
            frozen: the reference's parameters, and those that the view needs.
            text: pretraining text for the term γ E[log π]; None leaves it out.

        Raises:
            ValueError: for a prompt that leaves no room for a completion in the model's context.
            ValueError, RuntimeError: as `rewards_of`.
        """
        drawn = self.draw(state, prompts, sampler, frozen, group_size=method.group_size, critic=method.has_critic)
        rewards = rewards_of(reward, drawn)
        batch, described = self.score(state, drawn, rewards, method, frozen, sampler.temperature)
        state, metrics = self.update(state, batch, method, frozen, text, sampler.temperature)
        return state, described | metrics


def online(
    lm: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    critic: ScalarHead | None = None,
    microbatches: int = 1,
    view: View | None = None,
) -> Trainer:
    """Return a trainer for a model.

    The trained parameters are the policy's, or for methods with a critic {"policy": ..., "critic": those of `critic`}.

    Args:
        critic: the value model. It shares no parameters with the policy, so that its loss does not move the policy.
        microbatches: as in `make_step`, of each minibatch.
        view: as in `make_step`.
    """

    def seen(state: TrainState, frozen: Frozen) -> Params:
        return state.params if view is None else view(state.params, frozen)

    @functools.partial(jax.jit, static_argnames=("group_size", "critic"))
    def drawn(state, prompts, sampler, frozen, *, group_size, critic):
        params = seen(state, frozen)
        policy = params["policy"] if critic else params
        key = jax.random.fold_in(state.step_key, 0)
        return rollout(lm, policy, prompts, key, sampler, group_size=group_size)

    def draw(state, prompts, sampler, frozen, *, group_size, critic):
        # Unknown to this process: a traced mask, which does not even say where it lies, or another process's part.
        if is_concrete(prompts.mask) and getattr(prompts.mask, "is_fully_addressable", True):
            check_room(lm, prompts.mask, sampler.max_new_tokens)
        return drawn(state, prompts, sampler, frozen, group_size=group_size, critic=critic)

    @jax.jit
    def score(state, drawn, rewards, method, frozen, temperature=1.0):
        params = seen(state, frozen)
        return experience(lm, method, params, frozen.ref, drawn, rewards, critic=critic, temperature=temperature)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, batch, method, frozen, text=None, temperature=1.0):
        loss = policy_loss(lm, method, critic=critic, text=text, temperature=temperature)

        def one(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
            part = jax.tree.map(lambda leaf: leaf[rows], batch)
            return steps.update(loss, optimizer, state, part, frozen, microbatches=microbatches, view=view)

        order = minibatch_rows(method, batch.advantages.shape[0], jax.random.fold_in(state.step_key, 1))
        first_step = state.step
        state, metrics = jax.lax.scan(one, state, order)
        # A step of the run is one batch of completions, whatever the number of updates.
        return state._replace(step=first_step + 1), jax.tree.map(lambda leaf: leaf.mean(axis=0), metrics)

    return Trainer(draw, score, update)


def minibatch_rows(method: Method, rows: int, key: Array) -> Array:
    """Return the rows of each update, [epochs · minibatches, rows]: every row once an epoch, in random order.

    A single minibatch keeps the order.

    Raises:
        ValueError: if the minibatches do not divide the rows.
    """
    if rows % method.minibatches:
        raise ValueError(f"minibatches must divide the {rows} completions of a batch, but is {method.minibatches}.")
    if method.minibatches == 1:
        return jnp.broadcast_to(jnp.arange(rows), (method.epochs, rows))
    keys = jax.random.split(key, method.epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
    return orders.reshape(method.epochs * method.minibatches, rows // method.minibatches)


def policy_loss(
    lm: LanguageModel,
    method: Method,
    *,
    critic: ScalarHead | None = None,
    text: Sequences | None = None,
    temperature: float | Array = 1.0,
) -> LossFn:
    """Return the loss of a method over `Experience`: surrogate, and divergence, critic and pretraining text if any.

    Metrics: `clip_fraction`, the share of tokens (for "gspo", of completions) whose ratio is outside of the clip
    interval; `ratio`, the mean; with a critic `value_loss` and `explained_variance`; with text `text_loss`. Of a step
    with several updates they are means over those, of which the first alone has the ratio 1.
    """

    def loss(params: Params, batch: Experience, frozen: Frozen | None, key: Array) -> Loss:
        mask = batch.sequences.completion_mask
        logp = log_probs(lm, policy_of(params, method), batch.sequences, temperature=temperature)
        value = _surrogate(method, logp, batch) + _divergence(method, logp, batch)
        metrics = _ratios(method, logp, batch)
        if method.has_critic:
            critic_loss, described = _critic_loss(method, critic, params["critic"], batch)
            value, metrics = value + method.value_coefficient * critic_loss, metrics | described
        if text is not None:
            text_logp = log_probs(lm, policy_of(params, method), text)
            bonus = aggregate(rlhf.ptx_bonus(text_logp, gamma=method.gamma), text.completion_mask, "token_mean")
            value = value - bonus
            metrics |= {"text_loss": -aggregate(text_logp, text.completion_mask, "token_mean")}
        return Loss(value, mask.sum() if method.mode == "token_mean" else mask.shape[0], metrics)

    return loss


def _surrogate(method: Method, logp: Array, batch: Experience) -> Float[Array, ""]:
    mask, clips = batch.sequences.completion_mask, {"clip_low": method.clip_low, "clip_high": method.clip_high}
    if method.surrogate == "gspo":
        sequence_advantage = batch.advantages.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)  # the same at each token
        weight = policy_gradient.truncated_importance_weight(
            batch.logp_old.sum(axis=1), batch.logp_sampler.sum(axis=1), cap=method.importance_cap
        )
        return (weight * policy_gradient.gspo_loss(logp, batch.logp_old, sequence_advantage, mask, **clips)).mean()
    if method.surrogate == "reinforce":
        per_token = policy_gradient.reinforce_loss(logp, batch.advantages)
    elif method.surrogate == "cispo":
        per_token = policy_gradient.cispo_loss(logp, batch.logp_old, batch.advantages, **clips)
    else:
        per_token = policy_gradient.ppo_clip_loss(
            logp, batch.logp_old, batch.advantages, **clips, dual_clip=method.dual_clip
        )
    weight = policy_gradient.truncated_importance_weight(batch.logp_old, batch.logp_sampler, cap=method.importance_cap)
    return _aggregate(method, weight * per_token, mask)


def _aggregate(method: Method, per_token: Array, mask: Array) -> Float[Array, ""]:
    normaliser = {"normaliser": method.normaliser} if method.mode == "constant" else {}
    return aggregate(per_token, mask, method.mode, **normaliser)


def _divergence(method: Method, logp: Array, batch: Experience) -> Float[Array, ""] | float:
    """Return β times the divergence that `kl_loss` names, by the estimator with its gradient; 0 if it is in the reward.

    The constant ratio corrects for completions of an older policy (after the first of several updates), the truncated
    weight for those of another sampling distribution.
    """
    if method.kl_loss is None:
        return 0.0
    mask = batch.sequences.completion_mask
    logs = logp, batch.logp_old, batch.logp_sampler, batch.logp_ref
    if method.kl_loss == "reverse":
        policy, old, sampler, ref = (each.sum(axis=1) for each in logs)
        whole = _weight(method, policy, old, sampler) * kl.k2(policy, ref)
        # Spread over the completion's tokens, so that it is divided as the surrogate is.
        spread = whole[:, None] / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        return method.beta * _aggregate(method, jnp.where(mask, spread, 0), mask)
    policy, old, sampler, ref = logs
    per_token = _weight(method, policy, old, sampler) * kl.k3(policy, ref)
    return method.beta * _aggregate(method, per_token, mask)


def _weight(method: Method, logp: Array, logp_old: Array, logp_sampler: Array) -> Array:
    """Return π/π_old · min(π_old/μ, C), a constant."""
    truncated = policy_gradient.truncated_importance_weight(logp_old, logp_sampler, cap=method.importance_cap)
    return truncated * bounded_exp(jax.lax.stop_gradient(logp) - logp_old)


def _ratios(method: Method, logp: Array, batch: Experience) -> Metrics:
    """Describe the ratios of tokens; for "gspo" of whole completions, the geometric means that it clips."""
    counted = batch.sequences.completion_mask
    log_ratio = jnp.where(counted, jax.lax.stop_gradient(logp) - batch.logp_old, 0)
    if method.surrogate == "gspo":
        log_ratio = log_ratio.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)
        counted = counted.any(axis=1)
    ratio, count = bounded_exp(log_ratio), jnp.maximum(counted.sum(), 1)
    outside = (ratio < 1 - method.clip_low) | (ratio > 1 + method.clip_high)
    return {
        "clip_fraction": (outside & counted).sum() / count,
        "ratio": jnp.where(counted, ratio, 0).sum() / count,
    }


def _critic_loss(
    method: Method, critic: ScalarHead, params: Params, batch: Experience
) -> tuple[Float[Array, ""], Metrics]:
    mask = batch.sequences.completion_mask
    values, _ = critic_values(critic, params, batch.sequences)
    per_token = policy_gradient.value_loss(values, batch.values_old, batch.returns, clip=method.value_clip)
    # A mean over tokens where `policy_loss` weighs by tokens, else one over completions.
    value = aggregate(per_token, mask, "token_mean" if method.mode == "token_mean" else "sequence_mean")
    count = jnp.maximum(mask.sum(), 1)

    def variance(array: Array) -> Array:
        mean = jnp.where(mask, array, 0).sum() / count
        return jnp.where(mask, jnp.square(array - mean), 0).sum() / count

    explained = 1 - variance(batch.returns - batch.values_old) / jnp.maximum(variance(batch.returns), 1e-8)
    return value, {"value_loss": value, "explained_variance": explained}
