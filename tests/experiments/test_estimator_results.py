"""The committed results on estimators: each named number is there, with the truth and a tight bound."""

import jax
import numpy as np
import pytest

from experiments import kl_estimators, kl_gradients, ledger, policy_gradient_variance
from tests.experiments import entry, number

SCHULMAN = {
    0.1: {"k1 sd/KL": 20, "k2 bias/KL": 0.0025, "k2 sd/KL": 1.4177, "k3 sd/KL": 1.4166},
    1: {"k1 sd/KL": 2, "k2 bias/KL": 0.25, "k2 sd/KL": 1.7321, "k3 sd/KL": 1.6950},
    2: {"k1 sd/KL": 1, "k2 bias/KL": 1.0, "k2 sd/KL": 2.449, "k3 sd/KL": 3.521},
}


def assert_promised(number, expected, *, within, at_most):
    """The number is bound to the truth (`expected`, known to `within`) no more loosely than `at_most`, and holds."""
    assert number["expected"] == pytest.approx(expected, abs=within)
    assert number["tolerance"] <= at_most
    assert abs(number["value"] - expected) <= number["tolerance"] + within


@pytest.mark.parametrize("name", ["kl_estimators", "kl_gradients"])
def test_the_seed_is_stated_and_the_file_is_small(name):
    assert entry(name)["seed"] is not None
    assert (ledger.RESULTS / f"{name}.json").stat().st_size < 150_000


@pytest.mark.parametrize("shift", SCHULMAN)
def test_schulmans_table(shift):
    (row,) = [row for row in entry("kl_estimators")["data"]["gaussians"]["table"] if row["shift"] == shift]
    for column, expected in SCHULMAN[shift].items():
        assert row["closed form"][column] == pytest.approx(expected, rel=2.5e-4)
        assert row["quadrature"][column] == pytest.approx(expected, rel=2.5e-4)
        if (shift, column) != (2, "k3 sd/KL"):  # whose fourth moment is so large that these draws bound nothing
            assert row["sampled"][column] == pytest.approx(expected, abs=max(0.02 * expected, 0.002))


def test_the_crossovers():
    for name, expected, within in (
        ("k2 has less variance than k1", 0.618034, 1e-6),
        ("k3 has less variance than k1", 0.628, 5e-4),
        ("k2 has a smaller mean squared error than k1", 0.606, 5e-4),
    ):
        assert_promised(number("kl_estimators", name), expected, within=within, at_most=1e-6)


def test_the_crossovers_are_not_of_tokens():
    found = number("kl_estimators", "Var(k2)/Var(k1) of one token of two values, at KL = 0.036 nats")
    assert_promised(found, 5.28, within=0.01, at_most=1e-9)


def test_rao_blackwell_is_tested_against_every_estimator_on_the_same_rows():
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=256) * spread for name, spread in (("k1", 3), ("k2", 2), ("k3", 1))}
    better, worse = (
        kl_estimators.precision({"a": rows | {"Rao-Blackwell": rng.normal(size=256) * spread}})[0]
        for spread in (0.3, 1.0)
    )
    assert ledger.holds(better) and not ledger.holds(worse)


@pytest.mark.parametrize("name", ["k1, loss", "k2, loss", "k3, loss", "k1, reward"])
def test_on_policy_gradients_are_what_the_table_says_to_ten_digits(name):
    assert_promised(number("kl_gradients", f"{name}: distance"), 0, within=0, at_most=1e-10)


@pytest.mark.slow
def test_the_minimum_over_independent_tokens_is_the_librarys():
    best = kl_gradients.lowest_divergence()
    with jax.enable_x64(True):
        ref = kl_gradients.sticky_reference()
        slope = jax.jit(jax.grad(lambda row: kl_gradients.reverse_kl(kl_gradients.tie(row), ref)))
        assert np.abs(slope(jax.numpy.log(best))).max() < 1e-10


def test_the_interval_of_a_median_is_that_of_order_statistics():
    assert kl_gradients._median(np.arange(1.0, 13.0)) == (6.5, 3.0, 10.0)  # the third of twelve: 96.1%


@jax.jit
def variances(p):
    """The variance of the coin's gradient without a baseline, with the mean and with the optimal one."""
    coin = policy_gradient_variance.coin(p)
    losses = policy_gradient_variance.single_losses(coin, beta=0.1)
    names = ("no baseline", "mean baseline", "optimal baseline")
    return [policy_gradient_variance.single(coin, losses[name]).total_variance for name in names]


@pytest.mark.parametrize("p", [0.6, 0.8])
def test_the_mean_baseline_raises_the_variance_of_a_coin_above_two_thirds(p):
    with jax.enable_x64(True):
        found = np.asarray(variances(p)).tolist()
    assert found == pytest.approx([2 * p * (1 - p) ** 3, 2 * p * (1 - p) * (2 * p - 1) ** 2, 0], abs=1e-12)
    assert (found[1] > found[0]) is (p > 2 / 3)
