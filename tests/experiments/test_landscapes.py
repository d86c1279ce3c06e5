"""The data of the committed results on loss landscapes, and how the figures draw them."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import landscapes, ledger, preference_landscape
from figures import loss_landscape
from jaxrl_llm import models
from tests.experiments import entry

NAMES = ("loss_landscape", "landscape_directions", "preference_landscape")


def test_surfaces_hold_their_own_extremes_and_centre():
    for name in NAMES:
        for surface in entry(name)["data"]["surfaces"].values():
            losses = np.asarray(surface["loss"], float)
            assert losses.shape == (len(surface["alphas"]), len(surface["betas"]))
            np.testing.assert_allclose(
                [losses.min(), losses.max()], [surface["minimum"], surface["maximum"]], rtol=1e-5
            )
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


def test_the_path_begins_at_the_reference_and_ends_below_all_random_planes():
    data = entry("preference_landscape")["data"]
    assert data["path"][0] == [0, 0]
    assert len(data["losses"]) == 1 + data["every"] * (len(data["path"]) - 1)
    assert data["losses"][-1] < min(data["lowest"]) <= data["surfaces"]["dpo"]["minimum"]


def test_the_pairs_are_marked_from_their_first_answer_token():
    tokenizer = models.load("tiny-gpt2").tokenizer
    chosen = preference_landscape.answers(tokenizer, 1)
    for pair, tokens, mask, answer in zip(preference_landscape.PAIRS, *map(np.asarray, chosen), strict=True):
        assert tokenizer.decode(tokens[answer]) == pair[1]
        assert tokenizer.decode(tokens[mask & ~answer]) == pair[0]


def test_a_second_difference_that_is_off_by_a_hundredth_breaks_its_bound():
    alphas = np.linspace(-0.08, 0.08, 9)
    section = {"alphas": alphas, "loss": 1 + alphas**2, "curvature": 2.0}
    assert ledger.holds(landscapes.curvature_test(section)) is True
    assert ledger.holds(landscapes.curvature_test(section | {"curvature": 1.98})) is False


def test_a_centre_that_is_off_by_one_bit_breaks_the_identity():
    surface = {"alphas": [-1.0, 0.0, 1.0], "betas": [-1.0, 0.0, 1.0], "loss": [[2.0] * 3] * 3, "centre": 2.0}
    surface |= {"cosine": 0.0, "unit": "nats", "centre_on_grid": True}
    assert all(ledger.holds(number) for number in landscapes.identities([surface]))
    moved = surface | {"centre": float(np.nextafter(np.float32(2), np.float32(3)))}
    assert [ledger.holds(number) for number in landscapes.identities([surface, moved])] == [False, True]


def test_the_page_in_3d_needs_no_other_file():
    pytest.importorskip("plotly")
    page = loss_landscape.interactive(entry("loss_landscape"))
    assert "Plotly.newPlot" in page
