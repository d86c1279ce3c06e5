"""Policy-gradient estimators on a random tabular model, as losses that `oracle.gradient_moments` takes apart."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Key

from jaxrl_llm import oracle
from jaxrl_llm.objectives import advantages, kl
from jaxrl_llm.objectives.policy_gradient import ppo_clip_loss, reinforce_loss
from jaxrl_llm.tabular import TabularLM

LM = TabularLM(vocab_size=3, horizon=3)


class Problem(NamedTuple):
    """A policy, a reference, and a reward for every token in its place."""

    params: dict[str, Array]
    ref_params: dict[str, Array]
    rewards: Float[Array, "sequences time"]


def problem(key: Key[Array, ""]) -> Problem:
    """Normal logits and normal rewards."""
    policy, ref, rewards = (
        jax.random.normal(each, (LM.num_prefixes, LM.vocab_size), jnp.float64) for each in jax.random.split(key, 3)
    )
    sequences = oracle.enumerate_sequences(LM)
    rows = oracle.next_token_logits(LM, {"logits": rewards}, sequences)  # a reward is looked up as a logit is
    per_token = jnp.take_along_axis(rows, sequences[..., None], axis=-1)[..., 0]
    return Problem({"logits": 1.5 * policy}, {"logits": 1.5 * ref}, per_token)


def baselines(given: Problem) -> tuple[Array, Array]:
    """E[r], and the constant that minimises the variance."""
    probs = jnp.exp(oracle.sequence_log_probs(LM, given.params))
    rewards = given.rewards.sum(axis=1)
    scores = jax.jacrev(functools.partial(oracle.sequence_log_probs, LM))(given.params)["logits"]
    norms = jnp.square(scores).sum(axis=(1, 2))
    return probs @ rewards, advantages.optimal_baseline(rewards, norms, probabilities=probs)


def single(given: Problem, loss: Any) -> oracle.Moments:
    """Of an estimator that sees one sequence; `loss` is of all of them."""
    return oracle.gradient_moments(LM, given.params, lambda params, groups: loss(params)[groups[:, 0]])


def single_losses(given: Problem, beta: float) -> dict[str, Any]:
    """Losses on single sequences: functions of the parameters, with a value for each sequence."""
    whole, to_go = given.rewards.sum(axis=1), advantages.returns_to_go(given.rewards)
    mean, best = baselines(given)
    critic = advantages.gae(given.rewards, exact_values(given, to_go), discount=1.0, lambda_=1.0)
    ref = oracle.sequence_log_probs(LM, given.ref_params)

    def log_probs(params):
        return oracle.sequence_log_probs(LM, params)

    def per_token(params, advantage):
        tokens = oracle.token_log_probs_of(LM, params, oracle.enumerate_sequences(LM))
        return reinforce_loss(tokens, advantage).sum(axis=1)

    def ppo(params):
        return ppo_clip_loss(log_probs(params), stop_gradient(log_probs(params)), whole)

    def penalised(params):
        return reinforce_loss(log_probs(params), whole - beta * kl.k1(stop_gradient(log_probs(params)), ref))

    return {
        "no baseline": lambda params: reinforce_loss(log_probs(params), whole),
        "PPO-clip, first step": ppo,
        "mean baseline": lambda params: reinforce_loss(log_probs(params), whole - mean),
        "optimal baseline": lambda params: reinforce_loss(log_probs(params), whole - best),
        "reward-to-go": lambda params: per_token(params, to_go),
        "exact critic": lambda params: per_token(params, critic),
        "k1 in the reward": penalised,
    }


def exact_values(given: Problem, to_go: Float[Array, "sequences time"]) -> Float[Array, "sequences time_plus_one"]:
    """V(y_<t) = E[rewards from t on | y_<t] along every sequence, and 0 at the end."""
    probs = jnp.exp(oracle.sequence_log_probs(LM, given.params))
    columns = []
    for time in range(LM.horizon):
        same_prefix = probs.reshape(LM.vocab_size**time, -1)
        value = (same_prefix * to_go[:, time].reshape(same_prefix.shape)).sum(axis=1) / same_prefix.sum(axis=1)
        columns.append(jnp.repeat(value, same_prefix.shape[1]))
    return jnp.stack([*columns, jnp.zeros_like(probs)], axis=1)


def grouped(given: Problem, advantage: Any, size: int) -> oracle.Moments:
    """Of REINFORCE averaged over a group, each advantage from the whole group."""
    whole = given.rewards.sum(axis=1)

    def loss(params, groups):
        log_probs = oracle.sequence_log_probs(LM, params)[groups]
        return reinforce_loss(log_probs, advantage(whole[groups])).mean(axis=1)

    return oracle.gradient_moments(LM, given.params, loss, group_size=size)
