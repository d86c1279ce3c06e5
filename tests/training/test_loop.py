"""A run is resumed as what it was begun: with its configuration, and no fewer steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.training import loop
from jaxrl_llm.training.steps import Loss, initial_state, make_step

CONFIG = {"learning_rate": 0.1, "seed": 0, "sizes": (4, 2)}


def fit(folder, config=None, *, steps=2, evaluate=lambda params: {}):
    optimizer = optax.sgd(0.1)
    step = make_step(lambda params, *_: Loss(jnp.square(params["w"] - 1).sum()), optimizer)
    return loop.run(
        initial_state({"w": jnp.zeros(2)}, optimizer, jax.random.key(0)),
        lambda state, done: step(state, None),
        steps=steps,
        folder=folder,
        tokens=lambda steps: steps,
        evaluate=evaluate,
        evaluate_every=2,
        config=config,
    )


def test_the_same_configuration_resumes(tmp_path):
    fit(tmp_path, CONFIG)
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert not list(tmp_path.glob("*.partial"))
    resumed, whole = fit(tmp_path, CONFIG, steps=4), fit(tmp_path / "whole", CONFIG, steps=4)
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])
    assert int(resumed.step) == 4, "steps that the configuration does not name may grow"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.2}, "learning_rate was 0.1 and is 0.2"),
        ({"seed": 1, "sizes": [4]}, "seed was 0 and is 1; sizes was [4, 2] and is [4]"),
        ({"steps": 4}, "steps was absent and is 4"),
    ],
)
def test_another_configuration_is_refused_and_nothing_changes(tmp_path, change, said):
    fit(tmp_path, CONFIG)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as error:
        fit(tmp_path, CONFIG | change, steps=4)
    assert said in str(error.value) and str(tmp_path) in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_field_that_is_left_out_is_named(tmp_path):
    fit(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="seed was 0 and is absent"):
        fit(tmp_path, {name: CONFIG[name] for name in ("learning_rate", "sizes")})


def test_a_run_without_configuration_is_not_resumed_with_one(tmp_path):
    fit(tmp_path)
    assert not (tmp_path / "run.json").exists()
    with pytest.raises(ValueError, match=r"begun without a run\.json"):
        fit(tmp_path, CONFIG, steps=4)
    assert int(fit(tmp_path, steps=4).step) == 4


def test_a_run_that_reached_no_checkpoint_binds_nobody(tmp_path):
    def crash(params):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, CONFIG, evaluate=crash)
    fit(tmp_path, CONFIG | {"seed": 1})
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    fit(tmp_path, steps=4)
    with pytest.raises(ValueError, match="already has a run of 4 steps; it cannot be shortened to 2"):
        fit(tmp_path, steps=2)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    fit(tmp_path, CONFIG)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json (is not JSON|must hold a JSON object, but holds a list)"):
        fit(tmp_path, CONFIG)


def test_a_configuration_must_be_json(tmp_path):
    with pytest.raises(ValueError, match="must be a dict of what JSON can hold"):
        fit(tmp_path, {"path": tmp_path})
