"""Online training by policy gradients: methods, experience (scored completions), the loss, and the trainer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.decoding.core import check_room
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.mesh import over_rows
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.numerics import bounded_exp, is_concrete
from jaxrl_llm.objectives import advantages, kl, policy_gradient, rlhf
from jaxrl_llm.objectives.aggregate import Mode, aggregate
from jaxrl_llm.options import STATIC, Range
from jaxrl_llm.scoring import Measures, Sequences, log_probs, log_probs_and_entropy, measures
from jaxrl_llm.training import steps
from jaxrl_llm.training.config import CriticOptions, GRPOConfig, PolicyOptions, PPOConfig
from jaxrl_llm.training.reward_fns import RewardFn, only_judged, rewards_of
from jaxrl_llm.training.rollout import Prompts, Rollout, Sampler, rollout
from jaxrl_llm.training.steps import Frozen, Loss, LossFn, Metrics, TrainState, View

Advantage = Literal["returns", "rloo", "grpo", "gae"]
Surrogate = Literal["reinforce", "ppo_clip", "sequence_clip", "gspo", "cispo"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(PolicyOptions, CriticOptions):
    """A policy-gradient method: an advantage estimator and a surrogate loss. `METHODS` has presets.

    Numbers are leaves, so that another value never recompiles. Choices are static, and so are `value_clip` and
    `dual_clip`, which may be None, and `entropy_coefficient`, as the entropy is only computed if it counts.

    The penalty β KL(π‖π_ref) is never divided by the spread of rewards. `kl` says where it is:

    "reward": −β k1 at each token, the estimator whose expectation and policy gradient are both right; of methods that
    compare completions, −β Σ_t k1 less its mean in the group, added to the advantage. "reverse": a term of the loss, k2
    of the summed log-ratio of whole completions, which has the same gradient in expectation. "forward": a term of the
    loss, k3 token by token, as in the GRPO paper: its gradient is E_π[Σ_t ∇KL_t(ref‖π)], not ∇KL(ref‖π) of whole
    completions. The two penalties have different optima: see `objectives.kl`. Terms of the loss are aggregated as the
    surrogate is, so that β weighs the same against the reward.

    The importance weight of a token is π_old/μ within [`importance_floor`, `importance_cap`], where μ is the
    distribution that it was sampled from (after top-p, or in another precision); it is 1 if μ is the policy. Surrogate
    and penalty have the same weights. The critic's loss is a mean over tokens with the mode "token_mean", else a mean
    over completions of their means.
    """

    advantage: Advantage = dataclasses.field(default="rloo", metadata=STATIC)
    """"returns": rewards to go without a baseline; "rloo" or "grpo": a completion's reward less the mean of the other
    or of all completions of its prompt; "gae": against a critic."""
    surrogate: Surrogate = dataclasses.field(default="reinforce", metadata=STATIC)
    """The loss of `objectives.policy_gradient`; "sequence_clip": `ppo_clip_loss` of the ratios of whole completions."""
    mode: Mode = dataclasses.field(default="sequence_sum", metadata=STATIC)
    """The aggregation of its values over tokens and rows, by `objectives.aggregate`."""

    def __post_init__(self):
        super().__post_init__()
        if self.advantage in ("rloo", "grpo") and self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 for {self.advantage}, which compares the completions of a prompt, "
                f"but is {self.group_size}."
            )
        if self.advantage != "grpo" and self.scale_rewards != "none":
            raise ValueError(f"scale_rewards must be none for {self.advantage}, but is {self.scale_rewards}.")
        if self.surrogate == "reinforce" and self.epochs * self.minibatches > 1:
            raise ValueError(
                "epochs × minibatches must be 1 for the surrogate reinforce, which has no ratio to the policy that "
                f"sampled, but is {self.epochs} × {self.minibatches}."
            )
        if self.surrogate in ("ppo_clip", "sequence_clip", "gspo"):
            Range(0, 1).check("clip_low", self.clip_low, integer=False)
        if self.surrogate == "gspo" and self.mode != "sequence_mean":
            raise ValueError(
                f"mode must be sequence_mean for gspo, which has one ratio per completion, but is {self.mode}."
            )
        if self.dual_clip is not None and self.surrogate not in ("ppo_clip", "sequence_clip"):
            raise ValueError(f"dual_clip must be None for the surrogate {self.surrogate}, but is {self.dual_clip}.")
        if self.normaliser is not None and self.mode != "constant":
            raise ValueError(f"normaliser must be None for the mode {self.mode}, but is {self.normaliser}.")

    @property
    def has_critic(self) -> bool:
        """True if a critic is trained beside the policy."""
        return self.advantage == "gae"


_GROUP = {"advantage": "grpo", "scale_rewards": "group"}
METHODS: dict[str, Method] = {
    "reinforce": Method(advantage="returns", group_size=1),
    "rloo": Method(advantage="rloo", surrogate="sequence_clip"),
    "ppo": Method(
        advantage="gae",
        surrogate="ppo_clip",
        mode="token_mean",
        group_size=PPOConfig.group_size,
        epochs=PPOConfig.epochs,
        whiten=PPOConfig.whiten,
    ),
    "grpo": Method(**_GROUP, surrogate="ppo_clip", mode="sequence_mean", beta=0.04, kl="forward"),
    "dr_grpo": Method(advantage="grpo", surrogate="ppo_clip", mode="constant", beta=0.0),
    "dapo": Method(
        **_GROUP, surrogate="ppo_clip", mode="token_mean", beta=0.0, clip_high=0.28, overlong_buffer=4096 / 20480
    ),
    "gspo": Method(**_GROUP, surrogate="gspo", mode="sequence_mean", beta=0.0, clip_low=3e-4, clip_high=4e-4),
    "cispo": Method(**_GROUP, surrogate="cispo", mode="token_mean", beta=0.0, clip_low=1.0, clip_high=4.0),
}
"""The methods as published, with one update of a batch but for PPO.

* "reinforce": Williams 1992, rewards to go without a baseline; the KL in the reward as in Ouyang et al. 2022.
* "rloo": Ahmadian et al. 2024 (arXiv 2402.14740), the KL in the reward. As in TRL, the ratio of whole completions is
  clipped, which counts from the second update of a batch on; the paper has one update and no ratio.
* "ppo": Schulman et al. 2017 with the KL in the reward of each token (Ouyang et al. 2022), whitened advantages, a
  clipped value loss and a critic with parameters of its own.
* "grpo": Shao et al. 2024 (arXiv 2402.03300), eqs. 3 and 4: k3 of each token in the loss, β = 0.04; ε = 0.2, which the
  paper does not state.
* "dr_grpo": Liu et al. 2025 (arXiv 2503.20783): rewards are centred, not divided; the sum over a completion is divided
  by the longest completion allowed; no KL.
* "dapo": Yu et al. 2025 (arXiv 2503.14476): clip-higher, the mean over tokens, the soft overlong penalty (eq. 13) over
  the last fifth of the length, as the paper's 4096 of 20480 tokens; no KL. Dynamic sampling, the replacement of groups
  without a difference, is the option `dynamic_sampling` of the trainers, by default on for "dapo".
* "gspo": Zheng et al. 2025 (arXiv 2507.18071), with its clips of 3e-4 and 4e-4; the paper leaves its KL term out.
* "cispo": MiniMax 2025 (arXiv 2506.13585), eqs. 4 and 5, without KL; ε_high = 4, which the paper does not state, and
  without DAPO's dynamic sampling and length penalty, which the paper takes over.
"""


def method_of(config: GRPOConfig) -> Method:
    """Return the preset that the configuration names, with the hyperparameters that it sets.

    Raises:
        ValueError: as `Method`, if they do not fit the preset, or if one of them would have no effect.
    """
    names = {field.name for field in dataclasses.fields(Method)}
    given: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in names and not (getattr(config, field.name) is None and field.default is None)
    }
    method = dataclasses.replace(METHODS[config.method], **given)
    if config.kl is not None and method.beta == 0:
        raise ValueError(f"beta must be above 0 with kl {config.kl}, but is 0 for {config.method}.")
    if method.surrogate == "reinforce" and not config.clip_low is config.clip_high is None:
        raise ValueError(
            f"clip_low and clip_high must be None for {config.method}, which has no ratio, "
            f"but are {config.clip_low} and {config.clip_high}."
        )
    return method


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

    A row without a completion token was not judged: it counts neither in its group, nor in the loss, nor in metrics.

    The metrics describe the policy that sampled them: `reward`; `reward_std`, the mean of the standard deviations of
    the groups, and `frac_reward_zero_std`, the share of groups without a difference (without groups, the standard
    deviation of the batch alone); `kl_k1`, `kl_k3` and `kl` (Rao-Blackwell) against the reference, of whole completions
    in nats; `entropy` per token in nats; `length` in tokens; `ended`, the share of completions that ended with EOS;
    and with a critic its `explained_variance`.
    """
    sequences = rollout.sequences
    found = measures(lm, policy_of(params, method), ref_params, sequences, temperature=temperature)
    described = _described(method, found, rollout, rewards)
    length = sequences.completion_mask.sum(axis=1)
    rewards = rewards - overlong_penalty(length, longest(sequences.completion_mask), buffer=method.overlong_buffer)
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
    elif method.advantage == "returns":
        found_advantages = advantages.returns_to_go(per_token, mask=sequences.completion_mask)
    else:
        found_advantages = _compared(method, found, sequences, rewards)
    returns = jnp.where(sequences.completion_mask, found_advantages + values, 0) if method.has_critic else values
    if method.whiten:
        found_advantages = advantages.whiten(found_advantages, sequences.completion_mask)
    if method.has_critic:
        described |= {"explained_variance": _explained_variance(returns, values, sequences.completion_mask)}
    mask = sequences.completion_mask & (rollout.ended | (not method.mask_truncated))[:, None]
    fixed = found.logp_policy, rollout.logp_sampler, found.logp_ref, found_advantages, returns, values
    return Experience(
        sequences._replace(completion_mask=mask), *(jnp.where(mask, each, 0) for each in fixed)
    ), described


def token_rewards(
    method: Method, found: Measures, sequences: Sequences, rewards: Float[Array, "batch"]
) -> Float[Array, "batch time"]:
    """Return the reward at the last token and −β k1 at each, unless the KL penalty is a term of the loss."""
    place = jnp.arange(sequences.completion_mask.shape[1])
    last = jnp.where(sequences.completion_mask, place, -1).max(axis=1, keepdims=True)
    at_end = jnp.where(place == last, rewards[:, None], 0)
    return at_end - method.beta * _price(method, found, sequences)


def _price(method: Method, found: Measures, sequences: Sequences) -> Float[Array, "batch time"]:
    """Return k1 of each token if it is part of the reward, else 0."""
    if method.kl != "reward":
        return jnp.zeros_like(found.logp_policy)
    return jnp.where(sequences.completion_mask, kl.k1(found.logp_policy, found.logp_ref), 0)


def overlong_penalty(
    length: Float[Array, "batch"], longest: Float[Array, ""] | int, *, buffer: float | Array
) -> Float[Array, "batch"]:
    """Return DAPO's soft penalty of long completions, between 0 and 1, to be subtracted from their rewards.

        (|y| − (L_max − L_cache))/L_cache where |y| > L_max − L_cache, else 0                (eq. 13, without its sign)

    Args:
        length: |y|, in tokens.
        longest: L_max, the longest completion allowed.
        buffer: L_cache/L_max; 0 is no penalty.

    Source: Yu et al. 2025.
    """
    cache = jnp.asarray(buffer * longest, jnp.result_type(float))
    return jnp.where(cache > 0, jnp.clip(1 - (longest - length) / jnp.where(cache > 0, cache, 1), 0, 1), 0)


def longest(completion_mask: Bool[Array, "batch time"]) -> Int[Array, ""]:
    """Return the most tokens that a completion of the batch has room for: `max_new_tokens` for those of a rollout."""
    return completion_mask.shape[1] - completion_mask.any(axis=0).argmax()


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


def _compared(
    method: Method, found: Measures, sequences: Sequences, rewards: Float[Array, "batch"]
) -> Float[Array, "batch time"]:
    """Return each completion's reward and KL penalty, compared within its group; only rewards are ever divided."""
    penalty = method.beta * _price(method, found, sequences).sum(axis=1)
    judged = sequences.completion_mask.any(axis=1)
    rewards, penalty, judged = (each.reshape(-1, method.group_size) for each in (rewards, penalty, judged))
    if method.advantage == "rloo":
        whole = advantages.rloo(rewards - penalty, mask=judged)
    else:
        whole = advantages.grpo(rewards, scale=method.scale_rewards, mask=judged)
        whole = whole - advantages.centered(penalty, mask=judged)
    return jnp.where(sequences.completion_mask, whole.reshape(-1, 1), 0)


DESCRIBED = ("reward", "reward_std", "frac_reward_zero_std", "kl_k1", "kl_k3", "kl", "entropy", "length", "ended")


def _described(method: Method, found: Measures, rollout: Rollout, rewards: Array) -> Metrics:
    mask = rollout.sequences.completion_mask
    tokens, judged = jnp.maximum(mask.sum(), 1), mask.any(axis=1)  # others have no reward

    def mean(of_rows: Array, counted: Array = judged) -> Array:
        return jnp.where(counted, of_rows, 0).sum() / jnp.maximum(counted.sum(), 1)

    sums = {
        "kl_k1": kl.k1(found.logp_policy, found.logp_ref),
        "kl_k3": kl.k3(found.logp_policy, found.logp_ref),
        "kl": found.kl,
    }
    shape = (-1, method.group_size if method.group_size > 1 else rewards.size)
    groups, counted = rewards.reshape(shape), judged.reshape(shape)
    deviation = advantages.centered(groups, mask=counted)
    spread = jnp.sqrt(jnp.square(deviation).sum(axis=1) / jnp.maximum(counted.sum(axis=1) - 1, 1))
    without_difference = {"frac_reward_zero_std": mean(spread == 0, counted.any(axis=1))}
    return {
        "reward": mean(rewards),
        "reward_std": mean(spread, counted.any(axis=1)),
        **(without_difference if method.group_size > 1 else {}),
        **{name: mean(jnp.where(mask, each, 0).sum(axis=1)) for name, each in sums.items()},
        "entropy": jnp.where(mask, found.entropy, 0).sum() / tokens,
        "length": mean(mask.sum(axis=1)),
        "ended": mean(rollout.ended),
    }


def _explained_variance(returns: Array, values: Array, mask: Array) -> Float[Array, ""]:
    """Return 1 − var(R − V)/var(R) over the tokens of the batch."""
    count = jnp.maximum(mask.sum(), 1)

    def variance(array: Array) -> Array:
        mean = jnp.where(mask, array, 0).sum() / count
        return jnp.where(mask, jnp.square(array - mean), 0).sum() / count

    return 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8)


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
            ValueError: for a prompt that leaves no room for a completion in the model's context; or as `check_ends`.
            ValueError, RuntimeError: as `rewards_of`.
        """
        check_ends(method, sampler)
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


def check_ends(method: Method, sampler: Sampler) -> None:
    """Raise ValueError for `mask_truncated` without EOS and stop strings, as no completion then ends."""
    if method.mask_truncated and not sampler.eos_ids and sampler.stop is None:
        raise ValueError("mask_truncated must be False without EOS, as no completion ends, but is True.")


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
        loss = policy_loss(lm, method, critic=critic, temperature=temperature)
        further = None if text is None else (text_loss(lm, method), text)

        def one(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
            part = over_rows(jax.tree.map(lambda leaf: leaf[rows], batch))
            return steps.update(
                loss, optimizer, state, part, frozen, further=further, microbatches=microbatches, view=view
            )

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
    temperature: float | Array = 1.0,
) -> LossFn:
    """Return the loss of a method over `Experience`: surrogate, and divergence, entropy and critic if any.

    Metrics: `clip_fraction`, the share of tokens (for "gspo" and "sequence_clip", of completions) whose ratio is
    outside of the clip interval; `ratio`, the mean; with a critic `value_loss`. Of a step with several updates they are
    means over those, of which the first alone has the ratio 1.
    """

    def loss(params: Params, batch: Experience, frozen: Frozen | None, key: Array) -> Loss:
        mask = batch.sequences.completion_mask
        scored = lm, policy_of(params, method), batch.sequences
        if method.entropy_coefficient:
            logp, entropy = log_probs_and_entropy(*scored, temperature=temperature)
            bonus = method.entropy_coefficient * _aggregate(method, entropy, mask)
        else:
            logp, bonus = log_probs(*scored, temperature=temperature), 0.0
        value = _surrogate(method, logp, batch) + _divergence(method, logp, batch) - bonus
        metrics, weights = _ratios(method, logp, batch)
        weight = mask.sum() if method.mode == "token_mean" else mask.shape[0]
        if method.has_critic:
            critic_loss = _critic_loss(method, critic, params["critic"], batch)
            value, metrics = value + method.value_coefficient * critic_loss, metrics | {"value_loss": critic_loss}
        return Loss(value, weight, metrics, weights)

    return loss


def text_loss(lm: LanguageModel, method: Method) -> LossFn:
    """Return the loss −γ E[log π] per token of `Sequences` of pretraining text; the metric `text_loss` is −E[log π]."""

    def loss(params: Params, text: Sequences, frozen: Frozen | None, key: Array) -> Loss:
        mask = text.completion_mask
        logp = log_probs(lm, policy_of(params, method), text)
        bonus = aggregate(rlhf.ptx_bonus(logp, gamma=method.gamma), mask, "token_mean")
        return Loss(-bonus, mask.sum(), {"text_loss": -aggregate(logp, mask, "token_mean")})

    return loss


def _surrogate(method: Method, logp: Array, batch: Experience) -> Float[Array, ""]:
    clips = {"clip_low": method.clip_low, "clip_high": method.clip_high}
    if method.surrogate == "reinforce":
        per_token = policy_gradient.reinforce_loss(logp, batch.advantages)
    elif method.surrogate == "cispo":
        per_token = policy_gradient.cispo_loss(logp, batch.logp_old, batch.advantages, **clips)
    else:
        log_ratio = _log_ratio(method, logp, batch)
        per_token = policy_gradient.ppo_clip_loss(
            log_ratio, jnp.zeros_like(log_ratio), batch.advantages, **clips, dual_clip=method.dual_clip
        )
    return _aggregate(method, _sampler_weight(method, batch) * per_token, batch.sequences.completion_mask)


def _aggregate(method: Method, per_token: Array, mask: Array) -> Float[Array, ""]:
    constant = {"normaliser": longest(mask) if method.normaliser is None else method.normaliser}
    return aggregate(per_token, mask, method.mode, **(constant if method.mode == "constant" else {}))


def _divergence(method: Method, logp: Array, batch: Experience) -> Float[Array, ""] | float:
    """Return β times the divergence that `kl` names, by the estimator with its gradient; 0 if it is in the reward.

    The constant ratio corrects for completions of an older policy (after the first of several updates), at the level of
    the surrogate's; the weight for those of another sampling distribution is the surrogate's.
    """
    if method.kl == "reward":
        return 0.0
    mask = batch.sequences.completion_mask
    ratio = bounded_exp(jax.lax.stop_gradient(_log_ratio(method, logp, batch)))
    if method.kl == "reverse":
        whole = policy_gradient.completion_log_ratio(logp, batch.logp_ref, mask)
        per_token = kl.k2(whole, jnp.zeros_like(whole))
    else:
        per_token = kl.k3(logp, batch.logp_ref)
    return method.beta * _aggregate(method, _sampler_weight(method, batch) * ratio * per_token, mask)


def _log_ratio(method: Method, logp: Array, batch: Experience) -> Float[Array, "batch time"]:
    """Return log π/π_old as the surrogate has it: of the token, or at each token that of its completion."""
    if method.surrogate not in ("gspo", "sequence_clip"):
        return logp - batch.logp_old
    return policy_gradient.completion_log_ratio(
        logp, batch.logp_old, batch.sequences.completion_mask, length_normalised=method.surrogate == "gspo"
    )


def _sampler_weight(method: Method, batch: Experience) -> Float[Array, "batch time"]:
    """Return π_old/μ within its bounds, a constant, of each token or at each token that of its completion."""
    level, _, mode = method.importance_mode.partition("_")
    logs = batch.logp_old, batch.logp_sampler
    if level == "sequence":
        mask = batch.sequences.completion_mask
        logs = tuple(jnp.where(mask, each, 0).sum(axis=1, keepdims=True) for each in logs)
    return policy_gradient.truncated_importance_weight(
        *logs, cap=method.importance_cap, floor=method.importance_floor, mode=mode
    )


def _ratios(method: Method, logp: Array, batch: Experience) -> tuple[Metrics, Metrics]:
    """Describe the ratios that the surrogate clips, of tokens or of completions, and count them."""
    counted = batch.sequences.completion_mask
    log_ratio = jnp.where(counted, jax.lax.stop_gradient(_log_ratio(method, logp, batch)), 0)
    if method.surrogate in ("gspo", "sequence_clip"):
        counted = counted & (jnp.cumsum(counted, axis=1) == 1)  # once for each completion
    ratio, count = bounded_exp(log_ratio), counted.sum()
    outside = (ratio < 1 - method.clip_low) | (ratio > 1 + method.clip_high)
    sums = {"clip_fraction": (outside & counted).sum(), "ratio": jnp.where(counted, ratio, 0).sum()}
    return {name: each / jnp.maximum(count, 1) for name, each in sums.items()}, dict.fromkeys(sums, count)


def _critic_loss(method: Method, critic: ScalarHead, params: Params, batch: Experience) -> Float[Array, ""]:
    values, _ = critic_values(critic, params, batch.sequences)
    per_token = policy_gradient.value_loss(values, batch.values_old, batch.returns, clip=method.value_clip)
    # A mean over tokens where `policy_loss` weighs by tokens, else one over completions.
    mode = "token_mean" if method.mode == "token_mean" else "sequence_mean"
    return aggregate(per_token, batch.sequences.completion_mask, mode)
