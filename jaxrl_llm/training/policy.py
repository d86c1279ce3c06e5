"""Online training by policy gradients: methods, experience (scored completions), the loss, and the trainer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.decoding.core import check_room
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.numerics import bounded_exp, is_concrete
from jaxrl_llm.objectives import advantages, kl, policy_gradient, rlhf
from jaxrl_llm.objectives.aggregate import Mode, aggregate
from jaxrl_llm.options import STATIC, Range, number
from jaxrl_llm.scoring import Measures, Sequences, log_probs, measures
from jaxrl_llm.training import steps
from jaxrl_llm.training.config import CriticOptions, GRPOConfig, PolicyOptions, PPOConfig
from jaxrl_llm.training.rewards import RewardFn, only_judged, rewards_of
from jaxrl_llm.training.rollout import Prompts, Rollout, Sampler, rollout
from jaxrl_llm.training.steps import Frozen, Loss, LossFn, Metrics, TrainState, View

Advantage = Literal["returns", "rloo", "grpo", "centered", "gae"]
Surrogate = Literal["reinforce", "ppo_clip", "gspo", "cispo"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(PolicyOptions, CriticOptions):
    """A policy-gradient method: an advantage estimator and a surrogate loss. `METHODS` has presets.

    Numbers are leaves, so that another value never recompiles. Choices are static, and so are `value_clip` and
    `dual_clip`, which may be None.

    The penalty β KL(π‖π_ref) is in the reward of each token as −β k1, the estimator whose expectation and policy
    gradient are both right. With `kl_loss` it is a term of the loss instead, by the estimator whose gradient is that of
    the named divergence. "reverse" is KL(π‖ref) of whole completions, by k2 of their summed log-ratios, divided by what
    `mode` divides the surrogate by, so that β weighs the same against the reward. "forward" is k3 token by token, as in
    the GRPO paper: its gradient is E_π[Σ_t ∇KL_t(ref‖π)], not ∇KL(ref‖π) of whole completions. The two penalties have
    different optima: see `objectives.kl`.

    The presets differ from the papers: all have the KL in the reward. GRPO as published (Shao et al. 2024) has k3 in
    the loss (`kl_loss="forward"`), whose fixed point is not the optimum of RLHF. DAPO (Yu et al. 2025), Dr. GRPO (Liu
    et al. 2025) and CISPO (MiniMax 2025) have no KL (`beta=0`). "dapo" has two of DAPO's four techniques: clip-higher
    and the mean over tokens.

    The importance weight of a token is min(π_old/μ, `importance_cap`), where μ is the distribution it was sampled from
    (after top-p, or in another precision); it is 1 if μ is the policy. The critic's loss is a mean over tokens with the
    mode "token_mean", else a mean over completions of their means.
    """

    advantage: Advantage = dataclasses.field(default="rloo", metadata=STATIC)
    """"returns": rewards to go without a baseline; "rloo", "grpo", "centered": within the group of completions of a
    prompt; "gae": against a critic."""
    surrogate: Surrogate = dataclasses.field(default="reinforce", metadata=STATIC)
    """The loss of `objectives.policy_gradient`."""
    mode: Mode = dataclasses.field(default="sequence_sum", metadata=STATIC)
    """The aggregation of its values over tokens and rows, by `objectives.aggregate`."""
    normaliser: float = number(1.0, 0, above=True)
    """Tokens per row that the mode "constant" divides by."""

    def __post_init__(self):
        if self.kl_loss not in ("reverse", "forward", None):
            raise ValueError(
                f'kl_loss must name a divergence, "reverse" or "forward", or be None, but is {self.kl_loss!r}: '
                "as a loss, k1 has the gradient 0 in expectation, and k3 that of the forward divergence."
            )
        super().__post_init__()
        if self.advantage in ("rloo", "grpo", "centered") and self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 for {self.advantage}, which compares the completions of a prompt, "
                f"but is {self.group_size}."
            )
        if self.surrogate in ("ppo_clip", "gspo"):
            Range(0, 1).check("clip_low", self.clip_low, integer=False)
        if self.surrogate == "gspo" and self.mode != "sequence_mean":
            raise ValueError(
                f"mode must be sequence_mean for gspo, which has one ratio per completion, but is {self.mode}."
            )
        if self.dual_clip is not None and self.surrogate != "ppo_clip":
            raise ValueError(f"dual_clip must be None for the surrogate {self.surrogate}, but is {self.dual_clip}.")

    @property
    def has_critic(self) -> bool:
        """True if a critic is trained beside the policy."""
        return self.advantage == "gae"


METHODS: dict[str, Method] = {
    "reinforce": Method(advantage="returns", group_size=1),
    "rloo": Method(advantage="rloo"),
    "ppo": Method(
        advantage="gae",
        surrogate="ppo_clip",
        mode="token_mean",
        group_size=PPOConfig.group_size,
        epochs=PPOConfig.epochs,
        whiten=PPOConfig.whiten,
    ),
    "grpo": Method(advantage="grpo", surrogate="ppo_clip", mode="sequence_mean"),
    "dr_grpo": Method(advantage="centered", surrogate="ppo_clip", mode="constant", normaliser=32.0),
    "dapo": Method(advantage="grpo", surrogate="ppo_clip", mode="token_mean", clip_high=0.28),
    "gspo": Method(advantage="grpo", surrogate="gspo", mode="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    "cispo": Method(advantage="grpo", surrogate="cispo", mode="token_mean", clip_low=1.0, clip_high=4.0),
}


def method_of(config: GRPOConfig) -> Method:
    """Return the preset that the configuration names, with the hyperparameters that it sets.

    Raises:
        ValueError: as `Method`, if they do not fit the preset.
    """
    names = {field.name for field in dataclasses.fields(Method)}
    given: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in names and not (getattr(config, field.name) is None and field.default is None)
    }
    return dataclasses.replace(METHODS[config.method], **given)


# Experience -----------------------------------------------------------------------------------------------------------


class Experience(NamedTuple):
    """A rollout batch: completions and the quantities held fixed during an update, all 0 outside completions."""

    sequences: Sequences
    logp_old: Float[Array, "batch time"]  # of the policy before the update, computed by the trainer
    logp_sampler: Float[Array, "batch time"]  # under the sampling distribution
    logp_ref: Float[Array, "batch time"]
    advantages: Float[Array, "batch time"]
    returns: Float[Array, "batch time"]  # targets of the critic; 0 without one
    values_old: Float[Array, "batch time"]


def policy_of(params: Params, method: Method) -> Params:
    """Return the policy's parameters among the trained ones."""
    return params["policy"] if method.has_critic else params


def experience(
    lm: LanguageModel,
    method: Method,
    params: Params,
    ref_params: Params,
    rollout: Rollout,
    rewards: Float[Array, "batch"],
    *,
    critic: ScalarHead | None = None,
    temperature: float | Array = 1.0,
) -> tuple[Experience, Metrics]:
    """Score completions by policy, reference and critic, and compute their advantages.

    The metrics describe the policy that sampled them: `reward`, `reward_std`; `kl_k1`, `kl_k3` and `kl` (Rao-Blackwell)
    against the reference, of whole completions in nats; `entropy` per token in nats; `length` in tokens; and `ended`,
    the share of completions that ended with EOS.
    """
    sequences = rollout.sequences
    found = measures(lm, policy_of(params, method), ref_params, sequences, temperature=temperature)
    per_token = token_rewards(method, found, sequences, rewards)
    values = jnp.zeros_like(per_token)
    if method.has_critic:
        values, after = critic_values(critic, params["critic"], sequences)
        going_on = method.bootstrap & ~rollout.ended
        end = jnp.where(going_on, after, 0)[:, None]
        found_advantages = advantages.gae(
            per_token,
            jnp.concatenate([values, end], axis=1),
            discount=method.discount,
            lambda_=method.lambda_,
            mask=sequences.completion_mask,
        )
    else:
        found_advantages = _compared(method, per_token, sequences)
    returns = jnp.where(sequences.completion_mask, found_advantages + values, 0) if method.has_critic else values
    if method.whiten:
        found_advantages = advantages.whiten(found_advantages, sequences.completion_mask)
    batch = Experience(
        sequences, found.logp_policy, rollout.logp_sampler, found.logp_ref, found_advantages, returns, values
    )
    return batch, _described(found, rollout, rewards)


def token_rewards(
    method: Method, found: Measures, sequences: Sequences, rewards: Float[Array, "batch"]
) -> Float[Array, "batch time"]:
    """Return the reward at the last token and −β k1 at each, unless the divergence is a term of the loss."""
    place = jnp.arange(sequences.completion_mask.shape[1])
    last = jnp.where(sequences.completion_mask, place, -1).max(axis=1, keepdims=True)
    at_end = jnp.where(place == last, rewards[:, None], 0)
    if method.kl_loss is not None:
        return at_end
    return at_end - jnp.where(sequences.completion_mask, method.beta * kl.k1(found.logp_policy, found.logp_ref), 0)


def critic_values(
    critic: ScalarHead, params: Params, sequences: Sequences
) -> tuple[Float[Array, "batch time"], Float[Array, "batch"]]:
    """Return the value before each completion token, 0 elsewhere; and the value at each row's end."""
    before = ((0, 0), (1, 0))  # padding has the state of the tokens before it
    tokens, mask = (jnp.pad(each, before) for each in (sequences.tokens, sequences.mask))
    values = critic.values(params, tokens, mask=mask)
    last = jnp.where(mask, jnp.arange(mask.shape[1]), 0).max(axis=1)
    end = jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
    return jnp.where(sequences.completion_mask, values[:, :-1], 0), end


def _compared(method: Method, per_token: Array, sequences: Sequences) -> Float[Array, "batch time"]:
    """Return advantages without a critic: rewards to go, or a completion's reward compared within its group."""
    if method.advantage == "returns":
        return advantages.returns_to_go(per_token, mask=sequences.completion_mask)
    compare = {"rloo": advantages.rloo, "grpo": advantages.grpo, "centered": advantages.centered}[method.advantage]
    judged = sequences.completion_mask.any(axis=1).reshape(-1, method.group_size)
    whole = compare(per_token.sum(axis=1).reshape(-1, method.group_size), mask=judged).reshape(-1, 1)
    return jnp.where(sequences.completion_mask, whole, 0)


DESCRIBED = ("reward", "reward_std", "kl_k1", "kl_k3", "kl", "entropy", "length", "ended")


def _described(found: Measures, rollout: Rollout, rewards: Array) -> Metrics:
    mask = rollout.sequences.completion_mask
    tokens, judged = jnp.maximum(mask.sum(), 1), mask.any(axis=1)  # others have no reward

    def mean(of_rows: Array) -> Array:
        return jnp.where(judged, of_rows, 0).sum() / jnp.maximum(judged.sum(), 1)

    reward = mean(rewards)
    sums = {
        "kl_k1": kl.k1(found.logp_policy, found.logp_ref),
        "kl_k3": kl.k3(found.logp_policy, found.logp_ref),
        "kl": found.kl,
    }
    return {
        "reward": reward,
        "reward_std": jnp.sqrt(mean(jnp.square(rewards - reward))),
        **{name: mean(jnp.where(mask, each, 0).sum(axis=1)) for name, each in sums.items()},
        "entropy": jnp.where(mask, found.entropy, 0).sum() / tokens,
        "length": mean(mask.sum(axis=1)),
        "ended": mean(rollout.ended),
    }


# The trainer and its loss ---------------------------------------------------------------------------------------------


class Trainer(NamedTuple):
    """The three jitted parts of an online step; the reward is computed between the first two."""

    draw: Callable[..., Rollout]  # (state, prompts, sampler, frozen, again), `again` of draws for the same step
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
        return self.learn(state, drawn, rewards, method=method, sampler=sampler, frozen=frozen, text=text)

    def learn(
        self,
        state: TrainState,
        drawn: Rollout,
        rewards: Float[Array, "batch"],
        *,
        method: Method,
        sampler: Sampler,
        frozen: Frozen,
        text: Sequences | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Do the rest of a step, with completions that `draw` has sampled and their rewards, NaN where there is none.

        Completions without a reward count neither in the loss, nor in the mean of their group, nor in the metrics.
        """
        drawn, rewards = only_judged(drawn, rewards)
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
    def drawn(state, prompts, sampler, frozen, again, *, group_size, critic):
        params = seen(state, frozen)
        policy = params["policy"] if critic else params
        key = jax.random.fold_in(state.step_key, jnp.where(again > 0, again + 1, 0))  # 1 is of the minibatches
        return rollout(lm, policy, prompts, key, sampler, group_size=group_size)

    def draw(state, prompts, sampler, frozen, again=0, *, group_size, critic):
        # Unknown to this process: a traced mask, which does not even say where it lies, or another process's part.
        if is_concrete(prompts.mask) and getattr(prompts.mask, "is_fully_addressable", True):
            check_room(lm, prompts.mask, sampler.max_new_tokens)
        return drawn(state, prompts, sampler, frozen, again, group_size=group_size, critic=critic)

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
