"""What the committed results on estimators promise: each named number is there, with the truth and a tight bound."""

import json
import math

import pytest

from experiments import ledger

SCHULMAN = {
    0.1: {"k1 sd/KL": 20, "k2 bias/KL": 0.0025, "k2 sd/KL": 1.4177, "k3 sd/KL": 1.4166},
    1: {"k1 sd/KL": 2, "k2 bias/KL": 0.25, "k2 sd/KL": 1.7321, "k3 sd/KL": 1.6950},
    2: {"k1 sd/KL": 1, "k2 bias/KL": 1.0, "k2 sd/KL": 2.449, "k3 sd/KL": 3.521},
}
ZERO = {
    "kl_gradients": (
        "k1, loss: distance of E∇ from 0",
        "k2, loss: distance of E∇ from ∇KL(π‖ref)",
        "k3, loss: distance of E∇ from ∇KL(ref‖π)",
        "k1, reward: distance of E∇ from ∇KL(π‖ref)",
        "k1, constant ratio: distance of E∇ from 0",
        "k2, constant ratio: distance of E∇ from ∇KL(π‖ref)",
        "k3, constant ratio: distance of E∇ from ∇KL(ref‖π)",
        "k1, through the ratio: distance of E∇ from ∇KL(π‖ref)",
        "k3, through the ratio: distance of E∇ from ∇KL(π‖ref)",
        "k1 as a loss: how far KL(π‖ref) moves",
    ),
    "score_function": (
        "largest entry of the gradient through the samples",
        "E[r ∇log π] − ∇J, largest entry",
    ),
    "policy_gradient_variance": tuple(
        f"{case}: ‖bias‖/‖∇J‖ of {name}"
        for case in ("typical", "counter-example")
        for name in (
            "no baseline",
            "PPO-clip, first step",
            "k1 in the reward",
            "mean baseline",
            "optimal baseline",
            "reward-to-go",
            "exact critic",
            "RLOO, groups of 2",
            "RLOO, groups of 3",
        )
    ),
}


def entry(name):
    return json.loads((ledger.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def numbers(name):
    return {number["name"]: number for number in entry(name)["numbers"]}


def assert_promised(number, expected, *, within, at_most):
    """The number is bound to the truth (`expected`, known to `within`) no more loosely than `at_most`, and holds."""
    assert number["expected"] == pytest.approx(expected, abs=within)
    assert number["tolerance"] <= at_most
    assert abs(number["value"] - expected) <= number["tolerance"] + within


@pytest.mark.parametrize("name", ["kl_estimators", "kl_gradients", "score_function", "policy_gradient_variance"])
def test_the_claim_holds(name):
    found = entry(name)
    assert found["holds"] and found["seed"] is not None
    assert (ledger.RESULTS / f"{name}.json").stat().st_size < 150_000


@pytest.mark.parametrize(("shift", "column"), [(shift, column) for shift, row in SCHULMAN.items() for column in row])
def test_schulmans_table_by_quadrature(shift, column):
    number, expected = numbers("kl_estimators")[f"μ = {shift:g}: {column}"], SCHULMAN[shift][column]
    assert_promised(number, expected, within=2.5e-4 * expected, at_most=1e-6)


@pytest.mark.parametrize(("shift", "column"), [(shift, column) for shift, row in SCHULMAN.items() for column in row])
def test_schulmans_table_from_samples(shift, column):
    number, expected = numbers("kl_estimators")[f"μ = {shift:g}: {column}, 1e+07 draws"], SCHULMAN[shift][column]
    if (shift, column) == (2, "k3 sd/KL"):
        assert "tolerance" not in number, "the fourth moment there is so large that 10⁷ draws bound nothing"
        assert number["expected"] == pytest.approx(expected, abs=5e-4)
    else:
        assert_promised(number, expected, within=2.5e-4 * expected, at_most=max(0.02 * expected, 0.002))


@pytest.mark.parametrize("shift", SCHULMAN)
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_unbiased_estimators_give_the_divergence(shift, name):
    number = numbers("kl_estimators")[f"μ = {shift:g}: mean {name}"]
    assert_promised(number, shift**2 / 2, within=1e-12, at_most=4 * 7.05 / math.sqrt(1e7))


def test_the_crossovers():
    found = numbers("kl_estimators")
    assert_promised(found["k2 has less variance than k1 up to KL ="], 0.618034, within=1e-6, at_most=1e-6)
    assert_promised(found["k3 has less variance than k1 up to KL ="], 0.628, within=5e-4, at_most=5e-4)


def test_k3_is_never_negative():
    least = [number for name, number in numbers("kl_estimators").items() if name.startswith("smallest k3")]
    assert len(least) == 3
    assert all(number["interval"][0] == 0 and number["value"] >= 0 for number in least)


def test_the_language_model_has_one_divergence():
    found = numbers("kl_estimators")
    pairs = [name for name in found if name.startswith(("k1 − ", "k3 − "))]
    assert len(pairs) == 6
    for name in pairs:
        assert_promised(found[name], 0, within=0, at_most=0.04)


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, row in ZERO.items() for number in row])
def test_identities_hold_to_ten_digits(name, number):
    assert_promised(numbers(name)[number], 0, within=0, at_most=1e-10)


def test_the_misspecified_descents_end_at_different_optima():
    found = numbers("kl_gradients")
    for name in ("k2 as a loss ends at argmin KL(π‖ref)", "k3 as a loss ends at argmin KL(ref‖π)"):
        assert_promised(found[f"{name}: distance"], 0, within=0, at_most=1e-8)
    assert found["distance of the two ends"]["value"] > 0.1


def test_the_error_falls_as_one_over_root_n():
    (number,) = (number for name, number in numbers("score_function").items() if name.startswith("slope"))
    assert_promised(number, -0.5, within=0, at_most=0.02)


def test_the_mean_baseline_can_do_harm_and_the_optimal_one_cannot():
    found = numbers("policy_gradient_variance")
    assert found["counter-example: variance with mean baseline over none"]["value"] > 1.001
    assert found["typical: variance with mean baseline over none"]["value"] < 1
    for case in ("typical", "counter-example"):
        assert found[f"{case}: variance with optimal baseline over none"]["value"] <= 1
    assert found["largest Var(optimal baseline)/Var(no baseline) of all models"]["value"] <= 1 + 1e-12


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", ["typical", "counter-example"])
def test_a_mean_that_includes_the_sample_is_short(case, size):
    found = numbers("policy_gradient_variance")
    name = f"{case}: E[estimate] of centred, groups of {size}, as a multiple of ∇J"
    assert_promised(found[name], 1 - 1 / size, within=1e-12, at_most=1e-10)
    assert found[f"{case}: ‖bias‖/‖∇J‖ of GRPO, groups of {size}"]["value"] > 1e-3
