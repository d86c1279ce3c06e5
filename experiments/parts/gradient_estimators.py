"""Policy-gradient estimators on a tabular model, as losses that `oracle.gradient_moments` takes apart."""

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


class Problem(NamedTuple):
    """A policy, a reference, and a reward for every token in its place."""

    lm: TabularLM
    params: dict[str, Array]
    ref_params: dict[str, Array]
    rewards: Float[Array, "sequences time"]


def problem(key: Key[Array, ""]) -> Problem:
    """Draw normal logits and normal rewards of 27 sequences."""
    lm = TabularLM(vocab_size=3, horizon=3)
    policy, ref, rewards = (
        jax.random.normal(each, (lm.num_prefixes, lm.vocab_size), jnp.float64) for each in jax.random.split(key, 3)
    )
    sequences = oracle.enumerate_sequences(lm)
    rows = oracle.next_token_logits(lm, {"logits": rewards}, sequences)  # a reward is looked up as a logit is
    per_token = jnp.take_along_axis(rows, sequences[..., None], axis=-1)[..., 0]
    return Problem(lm, {"logits": 1.5 * policy}, {"logits": 1.5 * ref}, per_token)


def coin(p: float) -> Problem:
    """Return a policy on two tokens: the reward is 1 for the first, of probability p, and 0 for the second.

    Without a baseline the gradient has the variance 2p(1 − p)³, less the mean reward 2p(1 − p)(2p − 1)², less b* none.
    """
    params = {"logits": jnp.log(jnp.asarray([[p, 1 - p]], jnp.float64))}
    ref_params = {"logits": jnp.zeros((1, 2), jnp.float64)}
    return Problem(TabularLM(vocab_size=2, horizon=1), params, ref_params, jnp.asarray([[1.0], [0.0]], jnp.float64))


def baselines(given: Problem) -> tuple[Array, Array]:
    """Return E[r], and the constant that minimises the variance."""
    probs = jnp.exp(oracle.sequence_log_probs(given.lm, given.params))
    rewards = given.rewards.sum(axis=1)
    scores = jax.jacrev(functools.partial(oracle.sequence_log_probs, given.lm))(given.params)["logits"]
    norms = jnp.square(scores).sum(axis=(1, 2))
    return probs @ rewards, advantages.optimal_baseline(rewards, norms, probabilities=probs)


def single(given: Problem, loss: Any) -> oracle.Moments:
    """Return the moments of an estimator that sees one sequence; `loss` is of all of them."""
    return oracle.gradient_moments(given.lm, given.params, lambda params, groups: loss(params)[groups[:, 0]])


def single_losses(given: Problem, beta: float) -> dict[str, Any]:
    """Return losses on single sequences: functions of the parameters, with a value for each sequence."""
    whole, to_go = given.rewards.sum(axis=1), advantages.returns_to_go(given.rewards)
    mean, best = baselines(given)
    critic = advantages.gae(given.rewards, exact_values(given, to_go), discount=1.0, lambda_=1.0)
    ref = oracle.sequence_log_probs(given.lm, given.ref_params)

    def log_probs(params):
        return oracle.sequence_log_probs(given.lm, params)

    def per_token(params, advantage):
        tokens = oracle.token_log_probs_of(given.lm, params, oracle.enumerate_sequences(given.lm))
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
    """Return V(y_<t) = E[rewards from t on | y_<t] along every sequence, and 0 at the end."""
    probs = jnp.exp(oracle.sequence_log_probs(given.lm, given.params))
    columns = []
    for time in range(given.lm.horizon):
        same_prefix = probs.reshape(given.lm.vocab_size**time, -1)
        value = (same_prefix * to_go[:, time].reshape(same_prefix.shape)).sum(axis=1) / same_prefix.sum(axis=1)
        columns.append(jnp.repeat(value, same_prefix.shape[1]))
    return jnp.stack([*columns, jnp.zeros_like(probs)], axis=1)


def grouped(given: Problem, advantage: Any, size: int) -> oracle.Moments:
    """Return the moments of REINFORCE averaged over a group, each advantage from the whole group."""
    whole = given.rewards.sum(axis=1)

    def loss(params, groups):
        log_probs = oracle.sequence_log_probs(given.lm, params)[groups]
        return reinforce_loss(log_probs, advantage(whole[groups])).mean(axis=1)

    return oracle.gradient_moments(given.lm, given.params, loss, group_size=size)
