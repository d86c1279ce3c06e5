import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.tabular import TabularLM
from tests.conftest import log_softmax, random_params

LM = TabularLM(vocab_size=3, horizon=4)
REF = np.log(np.float32([0.5, 0.25, 0.15, 0.1]))
REWARDS = np.asarray([0.0, 2.0, 1.0, 2.0], np.float32)


regularised_objective, optimal_value, gibbs_optimum, best_of_n = map(
    jax.jit, (rlhf.regularised_objective, rlhf.optimal_value, rlhf.gibbs_optimum, rlhf.best_of_n)
)
sequence_log_probs = jax.jit(functools.partial(oracle.sequence_log_probs, LM))


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


def log(probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.float32(probabilities))


def log_probs_of(seed):
    """Of the 81 sequences of random parameters, in float64."""
    return np.asarray(sequence_log_probs(random_params(LM, seed, dtype=jnp.float64)))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("beta", [0.05, 1.0, 20.0])
def test_the_gibbs_optimum_is_beta_log_z_above_and_beta_kl_from_every_policy(beta):
    """On the 81 sequences of a tabular model, for several policies, to 1e-12."""
    ref = log_probs_of(0)
    rewards = np.random.default_rng(1).normal(size=81)
    best = optimal_value(ref, rewards, beta=beta)
    optimum = gibbs_optimum(ref, rewards, beta=beta)
    np.testing.assert_allclose(best, beta * np.log((np.exp(ref) * np.exp(rewards / beta)).sum()), rtol=1e-12)
    np.testing.assert_allclose(regularised_objective(optimum, ref, rewards, beta=beta), best, rtol=1e-12)
    for seed in range(3):
        policy = log_probs_of(10 + seed)
        gap = best - regularised_objective(policy, ref, rewards, beta=beta)
        np.testing.assert_allclose(gap, beta * (np.exp(policy) * (policy - optimum)).sum(), atol=1e-12, rtol=1e-12)
        assert gap > 1e-3


def test_the_value_by_hand_and_its_sign_of_kl():
    policy = log([0.25, 0.25, 0.25, 0.25])
    kl = 0.25 * np.log(0.25 / np.asarray([0.5, 0.25, 0.15, 0.1])).sum()
    value = regularised_objective(policy, REF, REWARDS, beta=0.5)
    np.testing.assert_allclose(value, 1.25 - 0.5 * kl, rtol=1e-6)
    np.testing.assert_allclose(regularised_objective(REF, REF, REWARDS, beta=9.0), 0.85, rtol=1e-6)


def test_beta_decides_between_argmax_and_the_reference():
    cold = np.exp(gibbs_optimum(REF, REWARDS, beta=1e-2))
    np.testing.assert_allclose(cold, [0, 0.25 / 0.35, 0, 0.1 / 0.35], atol=2e-5)  # ties keep the reference's odds
    np.testing.assert_allclose(gibbs_optimum(REF, REWARDS, beta=1e6), REF, atol=1e-5)


def test_what_the_reference_excludes_stays_excluded_whatever_its_reward():
    ref = log([0.5, 0.5, 0.0])

    @jax.jit
    def values_and_gradients(optimum, rewards):
        of_value = jax.value_and_grad(rlhf.optimal_value, argnums=(0, 1))(ref, rewards, beta=1.0)
        every = jax.value_and_grad(rlhf.regularised_objective, argnums=(0, 1, 2))(optimum, ref, rewards, beta=1.0)
        return of_value, every

    for reward in (100.0, np.inf, np.nan):
        rewards = np.asarray([0.0, 1.0, reward], np.float32)
        optimum = gibbs_optimum(ref, rewards, beta=1.0)
        np.testing.assert_allclose(np.exp(optimum), [*np.exp(log_softmax([0.0, 1.0])), 0], rtol=1e-6)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values_and_gradients(optimum, rewards)))
        rlhf.gibbs_optimum(ref, rewards, beta=1.0)  # not refused


def test_best_of_n_is_the_distribution_of_the_best_of_all_tuples():
    """By enumeration of every tuple of draws, ties broken at random."""
    ref, rewards = np.exp(np.asarray(REF, np.float64)), np.asarray(REWARDS)
    for n in (1, 2, 4):
        drawn = np.zeros(4)
        for draws in itertools.product(range(4), repeat=n):
            winners = [y for y in draws if rewards[y] == max(rewards[list(draws)])]
            for winner in winners:
                drawn[winner] += np.prod(ref[list(draws)]) / len(winners)
        np.testing.assert_allclose(np.exp(best_of_n(REF, REWARDS, n=n)), drawn, rtol=1e-5)


@pytest.mark.usefixtures("_float64")
def test_best_of_n_on_81_sequences_stays_below_the_bound():
    ref = log_probs_of(0)
    rewards = np.random.default_rng(1).normal(size=81)
    for n in (1, 2, 16, 1024, 10**6):
        drawn = best_of_n(ref, rewards, n=n)
        np.testing.assert_allclose(np.exp(drawn).sum(), 1, rtol=1e-9)  # 10⁶ times rounding
        drawn = np.asarray(drawn)
        kl = (np.exp(drawn) * (drawn - ref))[drawn > -np.inf].sum()
        bound = rlhf.best_of_n_kl_bound(n)
        assert kl <= bound + 1e-9
        assert kl <= -ref[np.argmax(rewards)] + 1e-9
        assert (bound - kl > 0.1) == (n >= 1024)
    np.testing.assert_allclose(drawn[np.argmax(rewards)], 0, atol=1e-6)
    np.testing.assert_allclose(rlhf.best_of_n_kl_bound(jnp.asarray([1, 4])), [0, np.log(4) - 0.75], rtol=1e-12)


def test_best_of_n_takes_leading_axes_and_outcomes_of_probability_zero():
    ref = np.stack([REF, log([0.0, 0.3, 0.7, 0.0])])
    drawn = best_of_n(ref, np.stack([REWARDS, REWARDS]), n=3)
    np.testing.assert_allclose(np.exp(drawn[1]), [0, 1 - 0.7**3, 0.7**3, 0], rtol=1e-5)
    np.testing.assert_allclose(drawn[0], best_of_n(REF, REWARDS, n=3), rtol=1e-6)


@pytest.mark.parametrize("outcomes", [3, 1000, 10000])
def test_best_of_one_is_the_reference_however_many_outcomes(outcomes):
    """In float32: no difference of two sums, in which a small mass would be lost."""
    rng = np.random.default_rng(0)
    ref = jnp.asarray(log_softmax(3 * rng.normal(size=outcomes)), jnp.float32)
    rewards = jnp.asarray(rng.normal(size=outcomes).round(2), jnp.float32)  # with ties
    np.testing.assert_allclose(best_of_n(ref, rewards, n=1), ref, atol=1e-5)
    many = best_of_n(ref, rewards, n=100)
    assert not np.isnan(many).any()
    np.testing.assert_allclose(np.exp(np.asarray(many, np.float64)).sum(), 1, atol=1e-4)


def test_a_reward_that_is_not_a_number_is_refused_or_seen():
    ref, rewards = log([0.2, 0.8]), np.float32([np.nan, 0.0])
    with pytest.raises(ValueError, match="rewards must be finite"):
        rlhf.best_of_n(ref, rewards, n=50)
    assert np.isnan(best_of_n(ref, rewards, n=50)).all()
    assert np.isfinite(rlhf.best_of_n(log([0.0, 1.0]), rewards, n=50)[1])


def test_without_a_price_what_the_reference_excludes_is_free_and_with_one_it_is_not():
    policy, ref = log([0.5, 0.25, 0.25]), log([0.5, 0.5, 0.0])
    rewards = jnp.asarray([1.0, 2.0, 3.0])
    assert regularised_objective(policy, ref, rewards, beta=0.0) == 1.75
    assert regularised_objective(policy, ref, rewards, beta=0.1) == -np.inf
    closed, by_autodiff = (
        jax.jit(rlhf.regularised_objective.grad),
        jax.jit(jax.grad(rlhf.regularised_objective, argnums=(0, 1, 2))),
    )
    for beta in (0.0, 0.1):
        found, expected = (each(policy, ref, rewards, beta=beta) for each in (closed, by_autodiff))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert np.isfinite(expected).all()
    slopes = jax.jit(jax.grad(lambda *given: rlhf.gibbs_optimum(*given, beta=0.5)[:2].sum(), argnums=(0, 1)))(
        ref, rewards
    )
    optimum = np.exp(gibbs_optimum(ref, rewards, beta=0.5))
    by_ref = np.where(optimum > 0, 1 - 2 * optimum, 0)  # two outcomes are possible
    np.testing.assert_allclose(slopes, (by_ref, by_ref / 0.5), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rlhf.gibbs_optimum(REF, REWARDS, beta=0.0), r"beta must lie in \(0, inf\), but is 0.0"),
        (lambda: rlhf.regularised_objective(REF, REF, REWARDS, beta=-1.0), r"beta must lie in \[0, inf\)"),
        (lambda: rlhf.gibbs_optimum(REF, np.float32([0, np.nan, 1, 2]), beta=1.0), "rewards must be finite"),
        (lambda: rlhf.best_of_n(REF, REWARDS, n=0), r"n must lie in \[1, inf\), but is 0"),
        (lambda: rlhf.best_of_n(REF, REWARDS, n=1.5), "n must be an integer, but is 1.5"),
        (lambda: rlhf.gibbs_optimum(REF, REWARDS, beta=jnp.inf), r"beta must lie in \(0, inf\), but is inf"),
        (lambda: rlhf.best_of_n_kl_bound(0), r"n must lie in \[1, inf\)"),
        (lambda: rlhf.ptx_bonus(REF, gamma=-0.1), r"gamma must lie in \[0, inf\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
