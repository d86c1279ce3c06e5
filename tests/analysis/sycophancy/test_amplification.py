"""The formulas of agreement, against the optimum itself and against counting."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.analysis.sycophancy import amplified_agreement, best_of_n_agreement
from jaxrl_llm.objectives import rlhf


@pytest.mark.parametrize(("beta", "expected"), [(1, 0.6), (0.5, 9 / 13), (0.1, 1.5**10 / (1 + 1.5**10))])
def test_a_slight_majority_becomes_a_near_certainty(beta, expected):
    assert float(amplified_agreement(0.5, 0.6, beta=beta)) == pytest.approx(expected, abs=1e-15)


def test_it_is_the_gibbs_optimum_for_the_rewards_of_bradley_terry():
    reference, share, beta = np.meshgrid([0.01, 0.3, 0.5, 0.9], [0.2, 0.5, 0.6, 0.95], [0.05, 0.5, 1, 4], indexing="ij")
    prediction = amplified_agreement(reference, share, beta=beta)
    with jax.enable_x64(True):
        rewards = np.stack([np.zeros(share.shape), np.log(share / (1 - share))], axis=-1)
        assert np.allclose(1 / (1 + np.exp(-(rewards[..., 1] - rewards[..., 0]))), share)
        ref = jnp.log(np.stack([1 - reference, reference], axis=-1))
        for place in np.ndindex(prediction.shape):
            optimum = jnp.exp(rlhf.gibbs_optimum(ref[place], jnp.asarray(rewards[place]), beta=beta[place]))
            assert float(optimum[1]) == pytest.approx(prediction[place], abs=1e-12)


def test_what_cannot_change_does_not():
    reference = np.asarray([0.0, 0.2, 0.7, 1.0])
    np.testing.assert_allclose(amplified_agreement(reference, 0.5, beta=0.01), reference, rtol=1e-12)
    np.testing.assert_array_equal(amplified_agreement(reference, 0.9, beta=0.1)[[0, 3]], [0, 1])
    disagreement = amplified_agreement(1 - reference, 0.1, beta=0.1)
    np.testing.assert_allclose(disagreement, 1 - amplified_agreement(reference, 0.9, beta=0.1), atol=1e-15)


def test_a_tiny_beta_overflows_nowhere():
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(amplified_agreement(0.5, [0.4, 0.6], beta=1e-6), [0, 1])
        for share in (0.4, 0.5, 0.6):
            found = amplified_agreement([0, 0.5, 1], share, beta=1e-309)
            np.testing.assert_array_equal(found, [0, {0.4: 0, 0.5: 0.5, 0.6: 1}[share], 1])


@pytest.mark.parametrize(
    ("reference", "share", "beta", "message"),
    [
        (1.1, 0.6, 1, r"reference must lie in \[0, 1\], but is 1.1"),
        (0.5, 1.0, 1, r"share must lie in \(0, 1\), but is 1.0"),
        (0.5, [0.6, 0.0], 1, r"share must lie in \(0, 1\), but is \[0.6 0. \]"),
        (0.5, 0.6, 0, r"beta must lie in \(0, inf\), but is 0"),
        (math.nan, 0.6, 1, "reference must lie in"),
        ("a half", 0.6, 1, r"could not convert string to float: 'a half'"),
        (0.5, None, 1, r"share must lie in \(0, 1\), but is nan"),
        (0.5, [[0.5], [0.5, 0.6]], 1, r"setting an array element with a sequence"),
        ([0.5, 0.4], [0.5, 0.4, 0.3], 1, r"could not be broadcast together with shapes \(2,\) \(3,\)"),
    ],
)
def test_what_is_no_probability_or_price_is_refused(reference, share, beta, message):
    with pytest.raises(ValueError, match=message):
        amplified_agreement(reference, share, beta=beta)


def test_the_best_of_n_agrees_unless_all_disagree():
    for n in (1, 2, 4):
        draws = list(itertools.product([0, 1], repeat=n))
        counted = sum(math.prod(0.3 if each else 0.7 for each in draw) for draw in draws if max(draw))
        assert float(best_of_n_agreement(0.3, n)) == pytest.approx(counted, abs=1e-15)
    assert float(best_of_n_agreement(1e-18, 1000)) == pytest.approx(1e-15, rel=1e-12)
    np.testing.assert_array_equal(best_of_n_agreement([0.0, 1.0], np.asarray([[3], [5]])), [[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("reference", "n", "message"),
    [
        (-0.1, 2, r"reference must lie in \[0, 1\], but is -0.1"),
        (0.5, 0, "n must be integers of at least 1, but is 0"),
        (0.5, 2.0, "n must be integers of at least 1, but is 2.0"),
        (0.5, "2", r"n must be integers of at least 1, but is 2"),
        ([0.5, 0.4], [1, 2, 3], r"could not be broadcast together with shapes \(3,\) \(2,\)"),
    ],
)
def test_best_of_n_refuses_what_it_cannot_draw(reference, n, message):
    with pytest.raises(ValueError, match=message):
        best_of_n_agreement(reference, n)
