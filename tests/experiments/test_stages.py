"""Stages of a long experiment are computed once."""

import numpy as np

from experiments.parts import stages


def test_what_is_kept_comes_back_and_is_not_computed_again(tmp_path):
    tree = {"h": {0: {"w": np.arange(6.0).reshape(2, 3)}, 1: {"w": np.zeros(2)}}, "loss": np.float32(0.5)}
    calls = []

    def compute():
        calls.append(1)
        return tree

    path = tmp_path / "deep" / "stage.safetensors"
    for found in (stages.kept(path, compute), stages.kept(path, compute)):
        assert set(found) == {"h", "loss"} and set(found["h"]) == {0, 1}
        np.testing.assert_array_equal(found["h"][0]["w"], tree["h"][0]["w"])
        assert found["loss"] == 0.5
        assert np.shape(found["loss"]) == ()
    assert len(calls) == 1 and [each.name for each in path.parent.iterdir()] == ["stage.safetensors"]
    stages.kept(None, compute)
    assert len(calls) == 2
