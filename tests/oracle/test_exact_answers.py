"""J(π), sequence-level KL, their gradients, moments and preferences: against sums written out, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params
from tests.oracle.test_oracle import naive_log_probs

LM = TabularLM(vocab_size=2, horizon=3)
REWARDS = np.random.default_rng(5).normal(size=8)


pytestmark = pytest.mark.usefixtures("float64")
sequence_kl = jax.jit(functools.partial(oracle.sequence_kl, LM))
objective = jax.jit(functools.partial(oracle.objective, LM))
objective_grad = jax.jit(functools.partial(oracle.objective_grad, LM))


def distributions():
    policy, ref = (random_params(LM, seed, dtype=jnp.float64) for seed in (1, 2))
    return policy, ref, naive_log_probs(LM, policy).sum(axis=1), naive_log_probs(LM, ref).sum(axis=1)


def test_sequence_kl_is_the_sum_and_runs_from_policy_to_reference():
    policy, ref, p, q = distributions()
    forward, backward = (np.exp(p) * (p - q)).sum(), (np.exp(q) * (q - p)).sum()
    np.testing.assert_allclose(sequence_kl(policy, ref), forward, rtol=1e-12)
    np.testing.assert_allclose(sequence_kl(ref, policy), backward, rtol=1e-12)
    assert abs(forward - backward) > 0.05
    assert sequence_kl(policy, policy) == 0


def test_objective_is_reward_less_beta_kl_plus_gamma_pretraining():
    policy, ref, p, q = distributions()
    pretraining = np.random.default_rng(3).dirichlet(np.ones(8))
    expected = (np.exp(p) * (REWARDS - 0.3 * (p - q))).sum()
    np.testing.assert_allclose(objective(policy, ref, REWARDS, beta=0.3), expected, rtol=1e-12)
    found = objective(policy, ref, REWARDS, beta=0.3, gamma=2.0, pretraining=pretraining)
    np.testing.assert_allclose(found, expected + 2 * (pretraining * p).sum(), rtol=1e-12)
    with pytest.raises(ValueError, match=r"gamma is 2\.0: the pretraining distribution must be given too"):
        jax.eval_shape(functools.partial(oracle.objective, LM, beta=0.3, gamma=2.0), policy, ref, REWARDS)


def test_what_the_policy_excludes_from_other_texts_costs_nothing_there():
    """0 · −inf in the pretraining term, where that distribution has no mass."""
    policy, ref, *_ = distributions()
    sure = {"logits": policy["logits"].at[0, 0].set(-jnp.inf)}
    pretraining = jnp.asarray([0.0] * 4 + [0.25] * 4)
    knobs = {"beta": 0.3, "gamma": 1.0, "pretraining": pretraining}
    value, slope = jax.jit(jax.value_and_grad(functools.partial(oracle.objective, LM)))(sure, ref, REWARDS, **knobs)
    assert np.isfinite(value)
    np.testing.assert_allclose(slope["logits"], objective_grad(sure, ref, REWARDS, **knobs)["logits"], atol=1e-12)


def test_an_infinite_divergence_has_no_gradient():
    policy, ref, *_ = distributions()
    narrow = {"logits": ref["logits"].at[0, 0].set(-jnp.inf)}
    assert sequence_kl(policy, narrow) == jnp.inf
    assert (jax.jit(functools.partial(oracle.sequence_kl_grad, LM))(policy, narrow)["logits"] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta must lie in"),
        ({"gamma": -1.0}, "gamma must lie in"),
        ({"rewards": np.ones(1)}, r"rewards must be .* = \[8\] as in log_probs, but has the shape \[1\]"),
        ({"rewards": np.ones(8, int)}, "rewards must be floating"),
        ({"gamma": 1.0, "pretraining": np.ones((8, 1)) / 8}, "pretraining must have the shape of log_probs"),
    ],
)
def test_value_and_gradient_refuse_the_same_things(change, message):
    policy, ref, *_ = distributions()
    given = {"rewards": REWARDS, "beta": 0.3} | change
    for function in (oracle.objective, oracle.objective_grad):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: function(LM, policy, ref, **given))  # noqa: B023


def test_probabilities_and_rewards_of_preferences_are_checked():
    with pytest.raises(ValueError, match="probabilities that sum to 1, but they sum to 8"):
        oracle._checked_pretraining(np.zeros(8), np.ones(8), 1.0)
    with pytest.raises(ValueError, match="rewards must"):
        oracle.population_preferences(np.zeros(8), np.ones((8, 1)))


def test_closed_form_gradients_are_those_of_autodiff():
    policy, ref, *_ = distributions()
    pretraining = jnp.asarray(np.random.default_rng(3).dirichlet(np.ones(8)))
    knobs = {"beta": 0.3, "gamma": 2.0, "pretraining": pretraining}

    @jax.jit
    def pairs():
        given = ref, jnp.asarray(REWARDS)
        return [
            (jax.grad(lambda x: oracle.sequence_kl(LM, x, ref))(policy), oracle.sequence_kl_grad(LM, policy, ref)),
            (
                jax.grad(lambda x: oracle.objective(LM, x, *given, **knobs))(policy),
                oracle.objective_grad(LM, policy, *given, **knobs),
            ),
        ]

    for by_autodiff, in_closed_form in pairs():
        np.testing.assert_allclose(in_closed_form["logits"], by_autodiff["logits"], atol=1e-12)
        assert np.abs(by_autodiff["logits"]).max() > 1e-2


def test_moments_of_groups_are_those_of_all_tuples_and_the_variance_of_a_mean_of_n_is_an_nth():
    policy, _, p, _ = distributions()

    @jax.jit
    def moments():
        rewards = jnp.asarray(REWARDS)
        best = oracle.moments(LM, policy, lambda groups: rewards[groups].max(axis=1), group_size=2)
        return best, *(oracle.moments(LM, policy, lambda g: rewards[g].mean(axis=1), group_size=n) for n in (1, 4))

    best, one, four = moments()
    pairs = np.asarray(list(itertools.product(range(8), repeat=2)))
    weight, value = np.exp(p[pairs].sum(axis=1)), REWARDS[pairs].max(axis=1)
    mean = weight @ value
    np.testing.assert_allclose(best.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(best.variance, weight @ np.square(value) - mean**2, rtol=1e-10)
    np.testing.assert_allclose(four.mean, one.mean, rtol=1e-12)
    np.testing.assert_allclose(four.variance, one.variance / 4, rtol=1e-10)


def test_gradient_variance_is_that_of_the_score_function_and_of_sampled_rewards_zero():
    policy, _, p, _ = distributions()

    @jax.jit
    def moments():
        def reward(params, groups):
            return jnp.asarray(REWARDS)[groups[:, 0]]

        def loss(params, groups):
            return reward(params, groups) * oracle.sequence_log_probs(LM, params)[groups[:, 0]]

        found, of_rewards = (oracle.gradient_moments(LM, policy, each) for each in (loss, reward))
        scores = jax.jacrev(lambda x: oracle.sequence_log_probs(LM, x))(policy)["logits"]
        return scores, found, found.total_variance, of_rewards

    scores, found, total_variance, of_rewards = jax.tree.map(np.asarray, moments())
    mean = np.einsum("y,y,yij->ij", np.exp(p), REWARDS, scores)
    second = np.einsum("y,y,yij->", np.exp(p), REWARDS**2, scores**2)
    np.testing.assert_allclose(found.mean["logits"], mean, atol=1e-12)
    np.testing.assert_allclose(total_variance, second - (mean**2).sum(), rtol=1e-10)
    assert (of_rewards.mean["logits"] == 0).all() and (of_rewards.variance["logits"] == 0).all()


def test_population_preferences_are_a_distribution_of_ordered_pairs():
    _, _, p, _ = distributions()
    found = np.asarray(jax.jit(oracle.population_preferences)(p, REWARDS))
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(np.log(found / found.T), REWARDS[:, None] - REWARDS, atol=1e-12)
    np.testing.assert_allclose(found + found.T, 2 * np.exp(p)[:, None] * np.exp(p), rtol=1e-12)
