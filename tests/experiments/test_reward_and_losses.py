"""The numbers that the committed results on reward models, RLHF's terms and losses promise, and how tight they are."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from experiments import ppo_clip_surface, preference_losses, reward_model, rlhf_terms
from figures.preference_losses import GROUPS, LABELS
from jaxrl_llm.objectives import rlhf
from tests.experiments import entry, number

# results file, name of the number, what it must be, and the loosest tolerance it may be given
EXPECTED = [
    ("reward_model", "margin of one pair after t = 1000", 7.598, 1e-3),
    ("reward_model", "largest gradient of an answer over 2/K, K = 2, 4, 9: farthest from 1", 1.0, 1e-9),
    ("reward_model", "largest |Δ* − logit p| over label probabilities p", 0.0, 1e-9),
    ("preference_losses", "largest relative difference of a loss from its closed form at the reference", 0.0, 1e-9),
    ("preference_losses", "largest |slope| where a loss is stated to be least or flat", 0.0, 1e-9),
    ("preference_losses", "largest difference of the two runs' margins", 0.0, 1e-9),
    ("ppo_clip_surface", "largest |gradient + A| at ratio 1", 0.0, 0.0),
    ("ppo_clip_surface", "ratios where the gradient is 0 and should not be, or the reverse", 0.0, 0.0),
]


@pytest.mark.parametrize(("results", "name", "expected", "loosest"), EXPECTED)
def test_number_is_what_theory_says(results, name, expected, loosest):
    found = number(results, name)
    assert found["tolerance"] <= loosest
    assert found["expected"] == pytest.approx(expected, abs=loosest)
    assert found["value"] == pytest.approx(expected, abs=loosest)


def test_labellers_who_agree_on_72_6_per_cent_prefer_with_a_probability_of_0_836():
    """The agreement of two labellers is p² + (1 − p)², not p."""
    with jax.enable_x64(True):
        agreed = reward_model.label_noise(reward_model.Config())[0]["agreed"]
    p = agreed["probability"]
    assert p**2 + (1 - p) ** 2 == pytest.approx(agreed["agreement"]) == pytest.approx(0.726)
    assert float(agreed["margin"]) == pytest.approx(math.log(p / (1 - p))) == pytest.approx(1.63, abs=0.005)


def test_reward_models_are_compared_under_both_optimisers():
    found = entry("reward_model")
    assert list(found["data"]["arms"]) == ["SGD", "Adam"] and "under SGD" in found["claim"]


def test_the_best_rate_is_chosen_on_other_seeds_than_it_is_measured_on():
    losses = np.asarray([[1.0, 5.0, 1.0, 6.0], [2.0, 3.0, 2.0, 4.0]])
    assert reward_model._at_best_rate(losses).tolist() == [5.0, 6.0]


@pytest.fixture(scope="module")
def problems():
    with jax.enable_x64(True):
        return jax.jit(lambda key: rlhf_terms.draw_problems(key, count=4, forgetting=0.5))(jax.random.key(3))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_without_text_the_optimum_is_that_of_gibbs(problems, beta):
    with jax.enable_x64(True):
        gibbs = jax.jit(rlhf.gibbs_optimum)(problems["log_ref"], problems["rewards"], beta=beta)
    np.testing.assert_allclose(rlhf_terms.optimum(problems, beta, 0.0), gibbs, atol=1e-9)


@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 0.03), (0.1, 0.03), (0.5, 3.0), (2.0, 1e4)])
def test_every_optimum_is_stationary(problems, beta, gamma):
    found = rlhf_terms.optimum(problems, beta, gamma)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-12)
    with jax.enable_x64(True):
        assert rlhf_terms.slope_at(problems, found, beta, gamma) < 1e-8 * max(1, gamma)


def test_jumps_of_ppo_are_drawn_where_the_clips_are():
    """Not between two grid points, as slopes, nor half a cell away from them."""
    data = entry("ppo_clip_surface")["data"]
    sections, clips = data["sections"], data["clips"]["asymmetric"]
    ratio, gradient = (np.asarray(each) for each in (sections["ratio"], sections["positive"]["asymmetric"]["gradient"]))
    (jump,) = np.flatnonzero(np.abs(np.diff(gradient)) > 0.5)
    assert ratio[jump] == ratio[jump + 1] == pytest.approx(1 + clips["clip_high"])
    surface = data["surfaces"]["asymmetric"]
    edges = {float(surface["ratio"][np.flatnonzero(np.asarray(row) == 0)[0]]) for row in surface["gradient"][-2:]}
    assert list(edges) == pytest.approx([1 + clips["clip_high"]])


def test_a_batch_counts_samples_beyond_the_clip_only_on_the_rewarded_side():
    ratios, advantages = np.asarray([[1.3, 1.3, 0.7, 0.7]]), np.asarray([[1.0, -1.0, 1.0, -1.0]])
    assert ppo_clip_surface.beyond(ratios, advantages, 0.2).tolist() == [0.5]
    assert ppo_clip_surface.beyond(np.ones((1, 4)), advantages, 0.2).tolist() == [0]


@pytest.mark.slow
def test_the_run_of_dpo_lowers_the_chosen_response_with_shared_logits_only():
    config = dataclasses.replace(preference_losses.run.presets["quick"], steps=20)
    run = preference_losses.example(config)
    moved = {name: run[name]["chosen"][-1] - run[name]["chosen"][0] for name in ("own", "shared")}
    assert moved["own"] > 0.1 and moved["shared"] < -0.1


def test_every_loss_of_the_figure_has_its_curve():
    curves = entry("preference_losses")["data"]["curves"]
    drawn = {name for names in GROUPS.values() for name in names}
    assert drawn == set(LABELS)
    assert set(curves) - {"x", "kto", "cpo"} == drawn
    apart = np.abs(np.asarray(curves["orpo"]["loss"]) - curves["cpo"]["loss"]).max()
    assert apart < 0.06, "drawn as one line"
