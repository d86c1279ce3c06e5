"""Rollouts: completions sampled from the policy, and the log-probabilities and advantages that an update needs."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm import decoding
from jaxrl_llm.decoding.transforms import Chain, Temperature, Transform
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import advantages, kl
from jaxrl_llm.scoring import Measures, Sequences, measures
from jaxrl_llm.training.methods import Method
from jaxrl_llm.training.steps import Metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Sampling parameters. The trained policy is softmax(logits / temperature) in every log-probability.

    Args:
        max_new_tokens: most tokens of a completion.
        temperature: of the policy itself, and so of the reference too.
        transform: further filters, such as top-p. Tokens are then not sampled from the policy, and the importance
            weight of `Method` corrects for it as far as its cap allows.
        eos_ids: tokens that end a completion and belong to it.
    """

    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    temperature: float | Float[Array, ""] = 1.0
    transform: Transform | None = None
    eos_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def whole_transform(self) -> Transform:
        """The temperature, then the filters."""
        warm = Temperature(self.temperature)
        return warm if self.transform is None else Chain((warm, self.transform))


class Prompts(NamedTuple):
    """Prompts padded on the left."""

    tokens: Int[Array, "batch prompt"]
    mask: Bool[Array, "batch prompt"]


class Rollout(NamedTuple):
    """Prompts with sampled completions; those of one prompt are adjacent."""

    sequences: Sequences  # [batch, prompt + completion]
    logp_sampler: Float[Array, "batch time"]  # under the sampling distribution, in nats; 0 outside completions
    ended: Bool[Array, "batch"]  # by EOS, not by the limit


def rollout(
    lm: LanguageModel, params: Params, prompts: Prompts, key: Key[Array, ""], sampler: Sampler, *, group_size: int = 1
) -> Rollout:
    """Sample `group_size` completions of each prompt; traceable, so that it can be part of a jitted step.

    Raises:
        ValueError: as `decoding.generate`, for example for a prompt that leaves no room in the model's context.
    """
    tokens, mask = (jnp.repeat(jnp.asarray(each), group_size, axis=0) for each in prompts)
    drawn = decoding.generate(
        lm,
        params,
        tokens,
        max_new_tokens=sampler.max_new_tokens,
        transform=sampler.whole_transform,
        key=key,
        prompt_mask=mask,
        eos_id=sampler.eos_ids or None,
    )
    nothing = jnp.zeros(mask.shape, bool)
    sequences = Sequences(
        jnp.concatenate([tokens, drawn.tokens], axis=1),
        jnp.concatenate([mask, drawn.mask], axis=1),
        jnp.concatenate([nothing, drawn.mask], axis=1),
    )
    is_eos = jnp.isin(drawn.tokens, jnp.asarray(sampler.eos_ids, jnp.int32)) & drawn.mask
    logp_sampler = jnp.concatenate([nothing.astype(drawn.logp_sampler.dtype), drawn.logp_sampler], axis=1)
    return Rollout(sequences, logp_sampler, is_eos.any(axis=1))


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
    return batch, _metrics(found, rollout, rewards)


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
    whole = compare(per_token.sum(axis=1).reshape(-1, method.group_size)).reshape(-1, 1)
    return jnp.where(sequences.completion_mask, whole, 0)


def _metrics(found: Measures, rollout: Rollout, rewards: Array) -> Metrics:
    mask = rollout.sequences.completion_mask
    tokens = jnp.maximum(mask.sum(), 1)
    sums = {
        "kl_k1": kl.k1(found.logp_policy, found.logp_ref),
        "kl_k3": kl.k3(found.logp_policy, found.logp_ref),
        "kl": found.kl,
    }
    return {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        **{name: jnp.where(mask, each, 0).sum(axis=1).mean() for name, each in sums.items()},
        "entropy": jnp.where(mask, found.entropy, 0).sum() / tokens,
        "length": mask.sum(axis=1).mean(),
        "ended": rollout.ended.mean(),
    }
