"""From answers and rewards to what a policy-gradient update needs: log-probabilities, advantages, returns."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import advantages, kl
from jaxrl_llm.scoring import Measures, Sequences, measures
from jaxrl_llm.training.methods import Method
from jaxrl_llm.training.rollout import Rollout
from jaxrl_llm.training.steps import Metrics


class Experience(NamedTuple):
    """Answers with all that an update takes for constant. Places outside the answers hold 0."""

    sequences: Sequences
    logp_old: Float[Array, "batch time"]  # of the policy before the update, by the trainer itself
    logp_sampler: Float[Array, "batch time"]  # of the law that drew the tokens
    logp_ref: Float[Array, "batch time"]
    advantages: Float[Array, "batch time"]
    returns: Float[Array, "batch time"]  # what the critic should have said; 0 without one
    values_old: Float[Array, "batch time"]


def policy_of(params: Params, method: Method) -> Params:
    """The policy's parameters, of those that are trained."""
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
    """Score the answers by policy, reference and critic, and compare their rewards.

    The metrics describe the policy that drew the answers: `reward`, `reward_std`, `kl_k1`, `kl_k3` and `kl`
    (Rao-Blackwell) of whole answers against the reference in nats, `entropy` per token in nats, `length` in tokens,
    `ended`, the share of answers that ended by themselves.
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
    """The answer's reward at its last token, and −β k1 at each, unless the divergence is a term of the loss."""
    place = jnp.arange(sequences.completion_mask.shape[1])
    last = jnp.where(sequences.completion_mask, place, -1).max(axis=1, keepdims=True)
    at_end = jnp.where(place == last, rewards[:, None], 0)
    if method.kl_loss is not None:
        return at_end
    return at_end - jnp.where(sequences.completion_mask, method.beta * kl.k1(found.logp_policy, found.logp_ref), 0)


def critic_values(
    critic: ScalarHead, params: Params, sequences: Sequences
) -> tuple[Float[Array, "batch time"], Float[Array, "batch"]]:
    """V before each token of an answer, 0 elsewhere; and V of the row's end."""
    before = ((0, 0), (1, 0))  # a place that is padding has the state of what stands before it
    tokens, mask = (jnp.pad(each, before) for each in (sequences.tokens, sequences.mask))
    values = critic.values(params, tokens, mask=mask)
    last = jnp.where(mask, jnp.arange(mask.shape[1]), 0).max(axis=1)
    end = jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
    return jnp.where(sequences.completion_mask, values[:, :-1], 0), end


def _compared(method: Method, per_token: Array, sequences: Sequences) -> Float[Array, "batch time"]:
    """Advantages without a critic: the rewards to come, or an answer's whole reward within its group."""
    if method.advantage == "returns":
        return advantages.returns_to_go(per_token, mask=sequences.completion_mask)
    compare = {"rloo": advantages.rloo, "grpo": advantages.grpo, "centered": advantages.centered}[method.advantage]
    whole = compare(per_token.sum(axis=1).reshape(-1, method.group_size)).reshape(-1, 1)
    return jnp.where(sequences.completion_mask, whole, 0)


def _metrics(found: Measures, rollout: Rollout, rewards: Array) -> Metrics:
    answer = rollout.sequences.completion_mask
    tokens = jnp.maximum(answer.sum(), 1)
    sums = {
        "kl_k1": kl.k1(found.logp_policy, found.logp_ref),
        "kl_k3": kl.k3(found.logp_policy, found.logp_ref),
        "kl": found.kl,
    }
    return {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        **{name: jnp.where(answer, each, 0).sum(axis=1).mean() for name, each in sums.items()},
        "entropy": jnp.where(answer, found.entropy, 0).sum() / tokens,
        "length": answer.sum(axis=1).mean(),
        "ended": rollout.ended.mean(),
    }
