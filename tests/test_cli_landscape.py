"""`jaxrl-llm landscape`: what it prints, writes and refuses."""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import interface, models, text
from jaxrl_llm.analysis import landscape
from tests.test_cli import write_model

SMALL = ("--points", "3", "--radius", "0.5")


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """The command in an empty folder: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(run, "landscape")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def test_it_prints_the_numbers_of_the_surface_and_draws_it(run, model, tmp_path):
    status, out, _ = run("the cat sat", "--model", model, *SMALL)
    assert status == 0
    loaded = models.load(model)
    tokens = jnp.asarray([text.encode(loaded.tokenizer, "the cat sat")])
    loss = landscape.next_token_loss(loaded.model, tokens)
    directions = landscape.random_directions(loaded.params, jax.random.key(0))
    axis = np.asarray([-0.5, 0, 0.5])
    losses = landscape.loss_surface(loss, loaded.params, directions, axis, axis, progress=False)
    assert f"centre {losses[1, 1]:.4f} nats per token\n" in out
    assert f"minimum {losses.min():.4f}, maximum {losses.max():.4f}\n" in out
    assert abs(float(re.search(r"cosine of the directions (\S+)", out)[1])) < 1e-6
    assert out.endswith("drawn: landscape.png\n")
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_even_grid_says_that_the_centre_is_not_on_it(run):
    status, out, _ = run("I have a dream", "--points", "2", "--out", "even.svg")
    assert status == 0 and re.search(r"centre 3\.\d+ nats per token, not on the grid", out)


@pytest.mark.slow
def test_checkpoint_and_page(run, tmp_path):
    status, first, _ = run("I have a dream", *SMALL, "--checkpoint", "kept.json", "--html", "page.html")
    assert status == 0 and "interactive 3-D plot: page.html" in first
    assert "I have a dream" in (tmp_path / "page.html").read_text()
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [len(row) for row in kept["losses"]] == [3, 3, 3]
    status, again, _ = run("I have a dream", *SMALL, "--checkpoint", "kept.json", "--html", "page.html")
    assert (status, again) == (0, first)
    status, _, error = run("I have a dream", *SMALL, "--checkpoint", "kept.json", "--seed", "1")
    assert status == 2 and "kept.json is the checkpoint of another surface" in error


@pytest.mark.slow
def test_hessian_directions_come_with_the_sharpness(monkeypatch, capsys):
    """The eigenvectors of tiny-gpt2 take too long to compile here: the command is given others."""
    loaded = models.load("tiny-gpt2")
    first, second = landscape.random_directions(loaded.params, jax.random.key(3))
    found = landscape.Eigenpairs(np.asarray([5.5, 2.0]), [first, second], np.zeros(2), -1.0, 3)
    asked = {}

    def eigenpairs(loss_fn, params, key, **options):
        asked.update(options)
        return found

    monkeypatch.setattr(landscape, "top_eigenpairs", eigenpairs)
    lanczos = {"max_iterations": 7, "vectors": 4, "progress": False}
    (directions, known) = interface.LM(loaded)._plane(None, "hessian", jax.random.key(0), **lanczos)
    assert known == {"sharpness": 5.5, "residuals": None}
    assert asked == lanczos
    for direction in directions:
        np.testing.assert_allclose(landscape.norm(direction), landscape.norm(loaded.params), rtol=1e-5)


@pytest.mark.slow
def test_a_sharpness_that_has_not_converged_says_so(run, model, monkeypatch, tmp_path):
    loaded = models.load(model)
    directions = landscape.random_directions(loaded.params, jax.random.key(3))
    found = landscape.Eigenpairs(np.asarray([5.5, 2.0]), list(directions), np.asarray([0.5, 1e-4]), -1.0, 2)
    monkeypatch.setattr(landscape, "top_eigenpairs", lambda *arguments, **options: found)
    options = ("--directions", "hessian", "--iterations", 2, "--out", tmp_path / "it.svg")
    status, out, _ = run("the cat", "--model", model, *SMALL, *options)
    said = "not converged: the residuals of the two eigenvectors are 0.5 and 0.0001; give more --iterations"
    assert status == 0 and "sharpness (largest Hessian eigenvalue) 5.5\n" in out and said in out
    shown = interface.LM(loaded, "model").landscape("the cat", points=3, directions="hessian", progress=False)
    assert repr(shown).endswith("at the minimum, directions not converged)")
    assert shown.surface.as_dict()["residuals"] == [0.5, 1e-4]


@pytest.mark.slow
def test_holes_are_counted_and_nothing_else_is_said(run):
    status, out, error = run("I have a dream", "--points", "3", "--radius", "1e19", "--directions", "none")
    assert status == 0 and re.search(r"no finite loss at \d+ of 9 points", out)
    assert "LossHole" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hi", "--points", "0"), "points must be at least 2, but is 0"),
        (("hi", "--points", "1"), "points must be at least 2, but is 1"),
        (("hi", "--vectors", "4"), 'vectors is for directions="hessian"'),
        (("hi", "--iterations", "4"), 'iterations is for directions="hessian"'),
        (("hi", "--radius", "-1"), "radius must be positive and finite, but is -1.0"),
        (("hi", "--out", "x.docx"), "cannot write a figure to x.docx"),
        (("",), "nothing to predict"),
        (("hi there", "--memory-budget", "5"), "memory_budget must be at least"),
        (("hi", "--model", "no/such/folder"), "no folder or .gguf file"),
    ],
)
def test_bad_input_is_said_in_one_sentence_before_anything_is_drawn(run, model, tmp_path, arguments, message):
    status, _, error = run("--model", model, *SMALL, *arguments)
    assert status == 2 and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_without_plotly_the_extra_is_named_before_the_work(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    status, _, error = run("I have a dream", *SMALL, "--html", "page.html")
    assert status == 2 and "pip install 'jaxrl_llm[interactive]'" in error
    assert list(tmp_path.iterdir()) == []
