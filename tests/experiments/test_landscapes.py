"""The numbers that the committed results on loss landscapes promise, and how tight they are."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import preference_landscape
from experiments.parts import landscapes
from jaxrl_llm import models

RESULTS = Path(__file__).resolve().parents[2] / "results"
NAMES = ("loss_landscape", "landscape_directions", "preference_landscape")


def entry(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def numbers(name):
    return {number["name"]: number for number in entry(name)["numbers"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_centre_is_the_loss_bit_for_bit_and_every_cosine_below_a_millionth(name):
    centres = [each for each in entry(name)["numbers"] if each["name"].startswith("centre of the surface minus")]
    cosines = [each for each in entry(name)["numbers"] if each["name"].startswith("cosine of the two directions")]
    assert centres and all(each["value"] == 0 == each["tolerance"] for each in centres)
    assert cosines and all(abs(each["value"]) < 1e-6 for each in cosines)


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-3), (64, 1e-8)])
def test_second_differences_are_the_hessian_product(bits, tolerance):
    number = numbers("loss_landscape")[f"second difference over dᵀHd, minus 1, longer, first direction, float{bits}"]
    assert number["tolerance"] == tolerance and abs(number["value"]) <= tolerance


def test_surfaces_hold_their_own_extremes_and_centre():
    for name in NAMES:
        for surface in entry(name)["data"]["surfaces"].values():
            losses = np.asarray(surface["loss"], float)
            assert losses.shape == (len(surface["alphas"]), len(surface["betas"]))
            np.testing.assert_allclose([losses.min(), losses.max()], [surface["minimum"], surface["maximum"]])
            if surface["centre_on_grid"]:
                row, column = surface["alphas"].index(0), surface["betas"].index(0)
                assert losses[row, column] == surface["centre"]


def test_the_exercise_has_both_grids():
    surfaces = entry("loss_landscape")["data"]["surfaces"]
    assert len(surfaces["even"]["alphas"]) % 2 == 0 and not surfaces["even"]["centre_on_grid"]
    assert len(surfaces["short"]["alphas"]) % 2 == 1 and surfaces["short"]["centre_on_grid"]
    assert surfaces["short"]["alphas"][-1] == 1 == -surfaces["short"]["alphas"][0]
    assert surfaces["even"]["centre"] == surfaces["short"]["centre"]


def test_sections_touch_their_parabola_at_the_centre():
    for section in entry("landscape_directions")["data"]["sections"].values():
        middle = len(section["alphas"]) // 2
        near = slice(middle - 2, middle + 3)
        loss, quadratic = (np.asarray(section[kind], float) for kind in ("loss", "quadratic"))
        np.testing.assert_allclose(loss[near], quadratic[near], atol=2e-3)
        assert section["sharpness"] == entry("landscape_directions")["data"]["sharpness"]


def test_the_parabola_of_a_quadratic_loss_is_the_loss():
    def loss(params):
        return 3 * params["w"][0] ** 2 - params["w"][0] + jnp.square(params["w"][1] - 1)

    place = landscapes.Place.of(loss, {"w": jnp.asarray([0.5, 0.2])})
    section = landscapes.section_of(place, {"w": jnp.asarray([1.0, 2.0])}, radius=0.7, points=9, label="")
    np.testing.assert_allclose(section["quadratic"], section["loss"], rtol=1e-5)
    np.testing.assert_allclose(section["curvature"], 14, rtol=1e-6)


def test_dpo_starts_at_log_two_and_leaves_by_its_own_plane():
    found = numbers("preference_landscape")
    assert abs(found["DPO's loss at the reference"]["value"] - math.log(2)) <= 1e-6
    losses = entry("preference_landscape")["data"]["losses"]
    assert losses[-1] < 0.1 * losses[0]
    assert entry("preference_landscape")["data"]["path"][0] == [0, 0]


def test_the_pairs_are_marked_from_their_first_answer_token():
    tokenizer = models.load("tiny-gpt2").tokenizer
    chosen = preference_landscape.answers(tokenizer, 1)
    for pair, tokens, mask, answer in zip(preference_landscape.PAIRS, *map(np.asarray, chosen), strict=True):
        assert tokenizer.decode(tokens[answer]) == pair[1]
        assert tokenizer.decode(tokens[mask & ~answer]) == pair[0]
