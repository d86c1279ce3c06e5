"""Estimators under the model's own law: their enumerated expectation is the exact answer, to 1e-10, nothing sampled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.objectives import advantages, kl, logprobs, policy_gradient, preference, reward_model, rlhf
from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params

LM = TabularLM(vocab_size=3, horizon=2)
BETA = 0.4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def laws():
    """Parameters of the policy, the reference, and an older policy that drew the samples."""
    return [random_params(LM, seed, dtype=jnp.float64) for seed in (1, 2, 3)]


def rewards():
    return jnp.asarray(np.random.default_rng(8).normal(size=9) + 2.0)


def log_probs(params):
    return oracle.sequence_log_probs(LM, params)


def tokens_of(params):
    return oracle.token_log_probs_of(LM, params, oracle.enumerate_sequences(LM))


def exact(beta=0.0):
    policy, ref, _ = laws()
    return -oracle.objective_grad(LM, policy, ref, rewards(), beta=beta)["logits"]


def mean_gradient(loss, *, group_size=1, sampler=None):
    """E[∇ℓ] of a loss `(params, groups) -> [groups]`, over all groups."""
    policy, *_ = laws()

    @jax.jit
    def mean():
        return oracle.gradient_moments(LM, policy, loss, group_size=group_size, sampler_params=sampler).mean["logits"]

    return mean()


def one_sample(losses):
    """From the loss of every sequence to that of every group of one."""
    return lambda params, groups: losses(params)[groups[:, 0]]


def assert_is(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("baseline", ["none", "mean", "optimal"])
def test_reinforce_is_unbiased_with_any_constant_baseline(baseline):
    policy, *_ = laws()
    scores = jax.jacrev(log_probs)(policy)["logits"].reshape(9, -1)
    probabilities = jnp.exp(log_probs(policy))
    optimal = advantages.optimal_baseline(rewards(), jnp.square(scores).sum(axis=1), probabilities=probabilities)
    b = {"none": 0.0, "mean": (probabilities * rewards()).sum(), "optimal": optimal}[baseline]
    loss = one_sample(lambda params: policy_gradient.reinforce_loss(log_probs(params), rewards() - b))
    assert_is(mean_gradient(loss), exact())


def test_the_optimal_baseline_has_the_least_variance():
    policy, *_ = laws()
    scores = jax.jacrev(log_probs)(policy)["logits"].reshape(9, -1)
    optimal = advantages.optimal_baseline(
        rewards(), jnp.square(scores).sum(axis=1), probabilities=jnp.exp(log_probs(policy))
    )

    @jax.jit
    @jax.vmap
    def variance(b):
        loss = one_sample(lambda params: policy_gradient.reinforce_loss(log_probs(params), rewards() - b))
        return oracle.gradient_moments(LM, policy, loss).total_variance

    at, beside, without = variance(jnp.stack([optimal, optimal + 0.1, jnp.zeros(())]))
    assert at < beside < without
    np.testing.assert_allclose(
        beside - at, 0.01 * (jnp.exp(log_probs(policy)) @ jnp.square(scores).sum(axis=1)), rtol=1e-9
    )


@pytest.mark.parametrize(("estimator", "share"), [(advantages.rloo, 1.0), (advantages.centered, 2 / 3)])
def test_rloo_is_unbiased_and_the_groups_own_mean_shrinks_the_gradient_by_an_nth(estimator, share):
    """Groups of 3: the mean that includes the sample leaves 1 − 1/3."""

    def loss(params, groups):
        return policy_gradient.reinforce_loss(log_probs(params)[groups], estimator(rewards()[groups])).mean(axis=1)

    assert_is(mean_gradient(loss, group_size=3), share * exact())


def test_k1_in_the_reward_gives_the_gradient_of_the_regularised_objective():
    policy, ref, _ = laws()
    regularised = rewards() - BETA * kl.k1(log_probs(policy), log_probs(ref))
    loss = one_sample(lambda params: policy_gradient.reinforce_loss(log_probs(params), regularised))
    assert_is(mean_gradient(loss), exact(BETA))


def test_k2_as_a_loss_beside_reinforce_is_the_same_and_k1_and_k3_are_not():
    _, ref, _ = laws()
    for k, right in ((kl.k1, False), (kl.k2, True), (kl.k3, False)):

        def losses(params, k=k):
            log_policy = log_probs(params)
            return policy_gradient.reinforce_loss(log_policy, rewards()) + BETA * k(log_policy, log_probs(ref))

        error = np.abs(mean_gradient(one_sample(losses)) - exact(BETA)).max()
        assert (error < 1e-10) == right and (right or error > 1e-2)


def test_returns_to_go_credit_each_token_with_what_comes_after_it():
    per_token = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3)))
    sequences = oracle.enumerate_sequences(LM)
    earned = jnp.stack([per_token[0][sequences[:, 0]], per_token[1][sequences[:, 1]]], axis=1)
    to_go = advantages.returns_to_go(earned)

    def losses(params):
        return policy_gradient.reinforce_loss(tokens_of(params), to_go).sum(axis=1)

    policy, ref, _ = laws()
    expected = -oracle.objective_grad(LM, policy, ref, earned.sum(axis=1), beta=0.0)["logits"]
    assert_is(mean_gradient(one_sample(losses)), expected)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("critic", ["exact", "wrong"])
def test_gae_is_unbiased_for_the_true_value_or_for_lambda_one(lambda_, critic):
    """The reward comes at the last token; after it the episode has ended, so the bootstrap is 0."""
    policy, *_ = laws()
    sequences, probabilities = oracle.enumerate_sequences(LM), jnp.exp(log_probs(policy))
    first = sequences[:, 0, None] == jnp.arange(3)
    value_after = (probabilities * rewards()) @ first / (probabilities @ first)
    if critic == "wrong":
        value_after = value_after + jnp.asarray([1.0, -2.0, 0.5])
    start = jnp.full(9, (probabilities * rewards()).sum())
    values = jnp.stack([start, value_after[sequences[:, 0]], jnp.zeros(9)], axis=1)
    earned = jnp.stack([jnp.zeros(9), rewards()], axis=1)
    estimate = advantages.gae(earned, values, discount=1.0, lambda_=lambda_)

    def losses(params):
        return policy_gradient.reinforce_loss(tokens_of(params), estimate).sum(axis=1)

    found = mean_gradient(one_sample(losses))
    if critic == "exact" or lambda_ == 1.0:
        assert_is(found, exact())
    else:
        assert np.abs(found - exact()).max() > 1e-2


AT_RATIO_ONE = {
    "ppo": lambda params, old, a: policy_gradient.ppo_clip_loss(log_probs(params), old, a),
    "gspo": lambda params, old, a: policy_gradient.gspo_loss(
        tokens_of(params), jax.lax.stop_gradient(tokens_of(params)), a, jnp.ones((9, 2), bool), length_normalised=False
    ),
    "cispo": lambda params, old, a: policy_gradient.cispo_loss(log_probs(params), old, a),
    "off-policy": lambda params, old, a: policy_gradient.off_policy_reinforce_loss(log_probs(params), old, a),
}


@pytest.mark.parametrize("name", AT_RATIO_ONE)
def test_the_first_step_on_fresh_samples_is_the_policy_gradient(name):
    policy, *_ = laws()
    old = log_probs(policy)
    assert_is(mean_gradient(one_sample(lambda params: AT_RATIO_ONE[name](params, old, rewards()))), exact())


WITH_A_WIDE_CLIP = {
    "ppo": lambda params, old: policy_gradient.ppo_clip_loss(
        log_probs(params), old, rewards(), clip_low=1, clip_high=1e6
    ),
    "cispo": lambda params, old: policy_gradient.cispo_loss(
        log_probs(params), old, rewards(), clip_low=1, clip_high=1e6
    ),
    "off-policy": lambda params, old: policy_gradient.off_policy_reinforce_loss(
        log_probs(params), old, rewards(), cap=1e6
    ),
}


@pytest.mark.parametrize("name", WITH_A_WIDE_CLIP)
def test_samples_of_an_older_policy_give_the_same_gradient_through_the_ratio(name):
    """Advantages that are not centred: only the ratio makes up for the other law. A cap costs that, and is seen to."""
    *_, old = laws()
    loss = one_sample(lambda params: WITH_A_WIDE_CLIP[name](params, log_probs(old)))
    assert_is(mean_gradient(loss, sampler=old), exact())


def test_truncation_biases_and_no_ratio_biases_more():
    *_, old = laws()

    def error(losses):
        return np.abs(mean_gradient(one_sample(losses), sampler=old) - exact()).max()

    truncated = error(
        lambda params: policy_gradient.off_policy_reinforce_loss(log_probs(params), log_probs(old), rewards(), cap=2.0)
    )
    without = error(lambda params: policy_gradient.reinforce_loss(log_probs(params), rewards()))
    assert 1e-3 < truncated < without


def test_the_weight_for_a_warped_sampler_corrects_it():
    """The sampler draws at temperature 0.7, the trainer's law is that at 1: the weight is the ratio of the two."""
    policy, *_ = laws()
    sampler = {"logits": policy["logits"] / 0.7}
    weight = policy_gradient.truncated_importance_weight(log_probs(policy), log_probs(sampler), cap=1e6)
    loss = one_sample(lambda params: weight * policy_gradient.reinforce_loss(log_probs(params), rewards()))
    assert_is(mean_gradient(loss, sampler=sampler), exact())
    bare = one_sample(lambda params: policy_gradient.reinforce_loss(log_probs(params), rewards()))
    assert np.abs(mean_gradient(bare, sampler=sampler) - exact()).max() > 1e-2


def test_the_surprise_of_samples_is_the_entropy():
    policy, *_ = laws()
    logits = oracle.next_token_logits(LM, policy, oracle.enumerate_sequences(LM))
    per_prefix = logprobs.entropy(logits).sum(axis=1)
    found = oracle.moments(LM, policy, lambda groups: (per_prefix - -tokens_of(policy).sum(axis=1))[groups[:, 0]])
    np.testing.assert_allclose(found.mean, 0, atol=1e-12)
    assert found.variance > 0.1


def test_best_of_n_is_the_winner_of_all_groups():
    policy, *_ = laws()
    winner = oracle.moments(
        LM,
        policy,
        lambda groups: jax.nn.one_hot(groups[jnp.arange(len(groups)), jnp.argmax(rewards()[groups], axis=1)], 9),
        group_size=4,
    )
    np.testing.assert_allclose(jnp.exp(rlhf.best_of_n(log_probs(policy), rewards(), n=4)), winner.mean, atol=1e-12)


# Preferences of a whole population ------------------------------------------------------------------------------------


def population(loss_of_pair):
    """Σ_ij P(i chosen, j rejected) ℓ(i, j), of a loss of two lists of indices."""
    _, ref, _ = laws()
    law = oracle.population_preferences(log_probs(ref), rewards())
    chosen, rejected = (index.reshape(-1) for index in np.indices((9, 9)))
    return (law.reshape(-1) * loss_of_pair(chosen, rejected)).sum()


def test_the_reward_models_loss_is_least_at_the_true_reward_and_has_no_gradient_there():
    loss = jax.jit(lambda scores: population(lambda i, j: reward_model.pairwise_loss(scores[i], scores[j])))
    np.testing.assert_allclose(jax.grad(loss)(rewards()), 0, atol=1e-12)
    assert np.abs(jax.grad(loss)(2 * rewards())).max() > 1e-2
    free, least, *_ = np.linalg.eigvalsh(jax.hessian(loss)(rewards()))
    assert abs(free) < 1e-12 < 1e-4 < least, "one direction is free: a constant"


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "exo", "robust_dpo"])
def test_dpo_alone_has_no_gradient_at_the_gibbs_optimum(name):
    """What the others converge to is another policy, or with a population's noise no policy at all."""
    _, ref, _ = laws()
    optimum = rlhf.gibbs_optimum(log_probs(ref), rewards(), beta=BETA)

    def loss(log_policy):
        def of_pair(i, j):
            given = log_policy[i], log_policy[j], log_probs(ref)[i], log_probs(ref)[j]
            return getattr(preference, f"{name}_loss")(*given, beta=BETA, **knobs)

        return population(of_pair)

    knobs = {"label_smoothing": 0.1} if name == "robust_dpo" else {}
    slope = np.abs(jax.jit(jax.grad(loss))(optimum)).max()
    assert slope < 1e-12 if name == "dpo" else slope > 1e-3


def test_robust_dpo_undoes_the_noise_that_dpo_would_learn():
    """Labels flipped with probability 0.2: the robust loss is stationary at the clean optimum, the plain one is not."""
    _, ref, _ = laws()
    optimum = rlhf.gibbs_optimum(log_probs(ref), rewards(), beta=BETA)
    flips = 0.2

    def noisy(loss_function):
        def loss(log_policy):
            def of_pair(i, j):
                one = loss_function(log_policy[i], log_policy[j], log_probs(ref)[i], log_probs(ref)[j])
                other = loss_function(log_policy[j], log_policy[i], log_probs(ref)[j], log_probs(ref)[i])
                return (1 - flips) * one + flips * other

            return population(of_pair)

        return np.abs(jax.jit(jax.grad(loss))(optimum)).max()

    assert noisy(functools.partial(preference.robust_dpo_loss, beta=BETA, label_smoothing=flips)) < 1e-12
    assert noisy(functools.partial(preference.dpo_loss, beta=BETA)) > 1e-3
