"""Estimators: their enumerated expectation under the model's distribution is the exact answer, to 1e-10."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.objectives import advantages, kl, logprobs, policy_gradient, preference, reward_model, rlhf
from tests.oracle.samples import (
    LM,
    REWARDS,
    SEQUENCES,
    distribution,
    distributions,
    mean_gradients,
    objective_grad,
    params,
)

BETA = 0.4
pytestmark = pytest.mark.usefixtures("float64")


def reinforce(gain):
    return lambda now: policy_gradient.reinforce_loss(now.sequences, gain)


@functools.cache
def squared_scores():
    """‖∇log π(y)‖² of every sequence."""
    scores = jax.jit(jax.jacrev(lambda table: distribution(table).sequences))(params(1))["logits"]
    return np.square(scores).sum(axis=(1, 2))


@functools.cache
def optimal_baseline():
    probabilities = np.exp(distributions()[0].sequences)
    return np.asarray(jax.jit(advantages.optimal_baseline)(REWARDS, squared_scores(), probabilities=probabilities))


def warped():
    """Log-probabilities of a sampler at temperature 0.7."""
    return np.asarray(distribution({"logits": np.asarray(params(1)["logits"]) / 0.7}).sequences)


EARNED = np.random.default_rng(4).normal(size=(3, 3))


def earned():
    """A reward for each token."""
    return np.stack([EARNED[0][SEQUENCES[:, 0]], EARNED[1][SEQUENCES[:, 1]]], axis=1)


gae = jax.jit(advantages.gae)


def with_a_critic(*, wrong, lambda_):
    """The reward comes at the last token; after it the episode has ended, so the bootstrap is 0."""
    policy, *_ = distributions()
    probabilities = np.exp(policy.sequences)
    first = SEQUENCES[:, 0, None] == np.arange(3)
    value_after = (probabilities * REWARDS) @ first / (probabilities @ first)
    if wrong:
        value_after = value_after + np.asarray([1.0, -2.0, 0.5])
    start = np.full(9, (probabilities * REWARDS).sum())
    values = np.stack([start, value_after[SEQUENCES[:, 0]], np.zeros(9)], axis=1)
    rewards = np.stack([np.zeros(9), REWARDS], axis=1)
    estimate = np.asarray(gae(rewards, values, discount=1.0, lambda_=lambda_))
    return lambda now: policy_gradient.reinforce_loss(now.tokens, estimate).sum(axis=1)


def unbiased():
    """Losses on samples whose mean gradient is that of −E[reward]; for samples of another policy, its distribution."""
    policy, _, old = distributions()
    p, q, r, whole = policy.sequences, old.sequences, jnp.asarray(REWARDS), np.ones((9, 2), bool)
    wide = {"clip_low": 1, "clip_high": 1e6}
    drawn = warped()
    return {
        # any constant baseline
        "no baseline": reinforce(REWARDS),
        "the mean as baseline": reinforce(REWARDS - np.exp(p) @ REWARDS),
        "the optimal baseline": reinforce(REWARDS - optimal_baseline()),
        # a critic that is right, or λ = 1
        "gae, the exact critic, λ = 0": with_a_critic(wrong=False, lambda_=0.0),
        "gae, the exact critic, λ = 0.6": with_a_critic(wrong=False, lambda_=0.6),
        "gae, the exact critic, λ = 1": with_a_critic(wrong=False, lambda_=1.0),
        "gae, a wrong critic, λ = 1": with_a_critic(wrong=True, lambda_=1.0),
        # the first step on fresh samples
        "ppo": lambda now: policy_gradient.ppo_clip_loss(now.sequences, p, r),
        "gspo": lambda now: policy_gradient.gspo_loss(now.tokens, policy.tokens, r, whole, length_normalised=False),
        "cispo": lambda now: policy_gradient.cispo_loss(now.sequences, p, r),
        "off-policy": lambda now: policy_gradient.off_policy_reinforce_loss(now.sequences, p, r),
        # Samples of an older policy, and advantages that are not centred: only the ratio corrects for the distribution.
        "ppo of old samples": (lambda now: policy_gradient.ppo_clip_loss(now.sequences, q, r, **wide), q),
        "cispo of old samples": (lambda now: policy_gradient.cispo_loss(now.sequences, q, r, **wide), q),
        "off-policy of old samples": (
            lambda now: policy_gradient.off_policy_reinforce_loss(now.sequences, q, r, cap=1e6),
            q,
        ),
        # The sampler draws at temperature 0.7, the trainer's distribution is at 1: the weight is their ratio.
        "the weight of a warped sampler": (
            lambda now: policy_gradient.truncated_importance_weight(p, drawn, cap=1e6) * reinforce(REWARDS)(now),
            drawn,
        ),
    }


def with_kl(k):
    _, ref, _ = distributions()
    return lambda now: reinforce(REWARDS)(now) + BETA * k(now.sequences, ref.sequences)


def regularised():
    """Losses whose mean gradient is that of −E[reward − β log(π/ref)]."""
    policy, ref, _ = distributions()
    return {
        "k1 in the reward": (lambda now: reinforce(REWARDS - BETA * kl.k1(policy.sequences, ref.sequences))(now)),
        "k2 as a loss": with_kl(kl.k2),
    }


def biased():
    q = distributions()[2].sequences
    return {
        "gae, a wrong critic, λ = 0": with_a_critic(wrong=True, lambda_=0.0),
        "gae, a wrong critic, λ = 0.6": with_a_critic(wrong=True, lambda_=0.6),
        "no weight for a warped sampler": (reinforce(REWARDS), warped()),
        "no ratio": (reinforce(REWARDS), q),
        "a truncated ratio": (
            lambda now: policy_gradient.off_policy_reinforce_loss(now.sequences, q, jnp.asarray(REWARDS), cap=2.0),
            q,
        ),
        "k1 as a loss": with_kl(kl.k1),
        "k3 as a loss": with_kl(kl.k3),
    }


def to_go(now):
    """Each token is credited with what comes after it."""
    return policy_gradient.reinforce_loss(now.tokens, advantages.returns_to_go(jnp.asarray(earned()))).sum(axis=1)


@pytest.fixture(scope="module")
def found(float64):
    """E[∇ℓ] of all of them."""
    return mean_gradients({**unbiased(), **regularised(), **biased(), "returns to go": to_go})


def exact(beta=0.0, rewards=REWARDS):
    return -objective_grad(params(1), params(2), jnp.asarray(rewards), beta=beta)["logits"]


def assert_is(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.abs(expected).max() > 1e-2


def test_the_mean_gradient_is_the_policy_gradient(found):
    for name in unbiased():
        np.testing.assert_allclose(found[name], exact(), atol=1e-10, err_msg=name)
    assert np.abs(exact()).max() > 1e-2


def test_k1_in_the_reward_and_k2_as_a_loss_give_the_gradient_of_the_regularised_objective(found):
    for name in regularised():
        np.testing.assert_allclose(found[name], exact(BETA), atol=1e-10, err_msg=name)
    assert np.abs(exact(BETA)).max() > 1e-2
    for name in ("k1 as a loss", "k3 as a loss"):
        assert np.abs(found[name] - exact(BETA)).max() > 1e-2, name


def test_a_wrong_critic_a_missing_weight_and_truncation_bias(found):
    error = {name: np.abs(found[name] - exact()).max() for name in biased()}
    assert 1e-3 < error["a truncated ratio"] < error["no ratio"]
    assert error["gae, a wrong critic, λ = 0"] > 1e-2 and error["gae, a wrong critic, λ = 0.6"] > 1e-2
    assert error["no weight for a warped sampler"] > 1e-2


def test_returns_to_go_credit_each_token_with_what_comes_after_it(found):
    assert_is(found["returns to go"], exact(rewards=earned().sum(axis=1)))


def test_the_oracle_differentiates_a_loss_group_by_group_to_the_same_mean():
    q = distributions()[2].sequences

    def loss(table, groups):
        return policy_gradient.off_policy_reinforce_loss(
            oracle.sequence_log_probs(LM, table), jnp.asarray(q), jnp.asarray(REWARDS), cap=1e6
        )[groups[:, 0]]

    assert_is(
        jax.jit(lambda: oracle.gradient_moments(LM, params(1), loss, sampler_params=params(3)).mean)()["logits"],
        exact(),
    )


def test_the_optimal_baseline_has_the_least_variance():
    optimal = optimal_baseline()

    @jax.jit
    @jax.vmap
    def variance(b):
        def loss(table, groups):
            return policy_gradient.reinforce_loss(oracle.sequence_log_probs(LM, table), REWARDS - b)[groups[:, 0]]

        return oracle.gradient_moments(LM, params(1), loss).total_variance

    at, beside, without = variance(np.stack([optimal, optimal + 0.1, 0.0]))
    assert at < beside < without
    np.testing.assert_allclose(beside - at, 0.01 * (np.exp(distributions()[0].sequences) @ squared_scores()), rtol=1e-9)


def test_rloo_is_unbiased_and_the_groups_own_mean_shrinks_the_gradient_by_an_nth():
    """Groups of 3: the mean that includes the sample leaves 1 − 1/3."""
    groups = np.asarray(list(itertools.product(range(9), repeat=3)))

    def loss(estimator):
        return lambda now: policy_gradient.reinforce_loss(
            now.sequences[groups], estimator(jnp.asarray(REWARDS[groups]))
        ).mean(axis=1)

    found = mean_gradients({each.__name__: loss(each) for each in (advantages.rloo, advantages.centered)}, group_size=3)
    assert_is(found["rloo"], exact())
    assert_is(found["centered"], 2 / 3 * exact())


def test_the_surprise_of_samples_is_the_entropy():
    policy, *_ = distributions()

    @jax.jit
    def moments():
        difference = logprobs.entropy(policy.logits).sum(axis=1) - -policy.tokens.sum(axis=1)
        return oracle.moments(LM, params(1), lambda groups: difference[groups[:, 0]])

    found = moments()
    np.testing.assert_allclose(found.mean, 0, atol=1e-12)
    assert found.variance > 0.1


def test_best_of_n_is_the_winner_of_all_groups():
    distributions()  # outside jit

    @jax.jit
    def both():
        def winners(groups):
            return jax.nn.one_hot(groups[jnp.arange(len(groups)), jnp.argmax(jnp.asarray(REWARDS)[groups], axis=1)], 9)

        winner = oracle.moments(LM, params(1), winners, group_size=4).mean
        return jnp.exp(rlhf.best_of_n(distributions()[0].sequences, REWARDS, n=4)), winner

    np.testing.assert_allclose(*both(), atol=1e-12)


# Preferences of a whole population ------------------------------------------------------------------------------------


@functools.cache
def labels():
    """P(i chosen, j rejected), one after the other."""
    preferences = jax.jit(oracle.population_preferences)(distributions()[1].sequences, REWARDS)
    return np.asarray(preferences).reshape(-1)


def population(loss_of_pair):
    """Σ_ij P(i chosen, j rejected) ℓ(i, j), of a loss of two lists of indices."""
    chosen, rejected = (index.reshape(-1) for index in np.indices((9, 9)))
    return (labels() * loss_of_pair(chosen, rejected)).sum()


def test_the_reward_models_loss_is_least_at_the_true_reward_and_has_no_gradient_there():
    def loss(scores):
        return population(lambda i, j: reward_model.pairwise_loss(scores[i], scores[j]))

    labels()  # outside jit
    slope = jax.grad(loss)
    slopes, curvature = jax.jit(
        lambda scores: (jax.lax.map(slope, jnp.stack([scores, 2 * scores])), jax.jacobian(slope)(scores))
    )(REWARDS)
    np.testing.assert_allclose(slopes[0], 0, atol=1e-12)
    assert np.abs(slopes[1]).max() > 1e-2
    free, least, *_ = np.linalg.eigvalsh(curvature)
    assert abs(free) < 1e-12 < 1e-4 < least, "one direction is free: a constant"


def test_only_dpo_and_robust_dpo_under_the_noise_it_undoes_have_no_gradient_at_the_gibbs_optimum():
    """The others converge to another policy, or with a population's noise to none."""
    ref, _ = distributions()[1].sequences, labels()  # outside jit

    def of_pairs(name, flips=0.0, **settings):
        """The slope where labels are flipped with some probability."""
        loss = getattr(preference, f"{name}_loss")

        def of(log_policy, i, j):
            return loss(log_policy[i], log_policy[j], ref[i], ref[j], beta=BETA, **settings)

        def total(log_policy):
            return population(lambda i, j: (1 - flips) * of(log_policy, i, j) + flips * of(log_policy, j, i))

        return jax.grad(total)

    slopes = {
        "dpo": of_pairs("dpo"),
        "robust dpo, flipped labels": of_pairs("robust_dpo", 0.2, label_smoothing=0.2),
        "ipo": of_pairs("ipo"),
        "hinge": of_pairs("hinge"),
        "exo": of_pairs("exo"),
        "robust dpo, clean labels": of_pairs("robust_dpo", label_smoothing=0.1),
        "dpo, flipped labels": of_pairs("dpo", 0.2),
    }

    @jax.jit
    def at_the_optimum():
        optimum = rlhf.gibbs_optimum(ref, jnp.asarray(REWARDS), beta=BETA)
        return {name: jnp.abs(slope(optimum)).max() for name, slope in slopes.items()}

    for name, slope in at_the_optimum().items():
        assert slope < 1e-12 if name in list(slopes)[:2] else slope > 1e-3, name


def test_weights_of_pairs_leave_the_optimum_of_dpo_where_it_is_and_margins_tails_and_likelihood_move_it():
    """A weight of WPO is the same for both orders of a pair."""
    ref, _ = distributions()[1].sequences, labels()  # outside jit
    alignment, tail = np.random.default_rng(0).normal(0, 1, (2, len(ref)))

    def slope(loss):
        return jax.grad(lambda log_p: population(lambda i, j: loss(log_p, i, j)))

    def four(log_p, i, j):
        return log_p[i], log_p[j], ref[i], ref[j]

    def with_tails(alpha):
        def loss(log_p, i, j):
            tails = log_p[i] * tail[i], log_p[j] * tail[j], ref[i] * tail[i], ref[j] * tail[j]
            return preference.ld_dpo_loss(*four(log_p, i, j), *tails, beta=BETA, alpha=alpha)

        return loss

    losses = {
        "wpo": lambda *of: preference.wpo_loss(*four(*of), alignment[of[1]], alignment[of[2]], beta=BETA),
        "ld_dpo, alpha 1": with_tails(1.0),
        "ld_dpo": with_tails(0.5),
        "odpo": lambda *of: preference.dpo_loss(*four(*of), beta=BETA, margin=0.5),
        "dpo and sft": lambda *of: preference.dpo_loss(*four(*of), beta=BETA) + preference.sft_loss(*four(*of)[:2]),
    }

    @jax.jit
    def at_the_optimum():
        optimum = rlhf.gibbs_optimum(ref, jnp.asarray(REWARDS), beta=BETA)
        return {name: jnp.abs(slope(loss)(optimum)).max() for name, loss in losses.items()}

    for name, found in at_the_optimum().items():
        assert found < 1e-12 if name in list(losses)[:2] else found > 1e-3, name
