"""Bars and points of sycophancy: names that stay apart, signs that are no mathematics, points without an interval."""

import matplotlib.figure
import pytest

from jaxrl_llm.plots import style
from jaxrl_llm.plots.sycophancy import LONGEST, draw_effects, matching_figure, short_name

ALONE = {"estimate": 0.5, "low": None, "high": None}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/Sm…LM2-135M-Instruct"),
        ("/home/user/models/of-some-name/checkpoint-1000/", "checkpoint-1000"),
        ("./short", "./short"),
        ("a" * LONGEST, "a" * LONGEST),
    ],
)
def test_names_keep_both_ends(name, shown):
    assert short_name(name) == shown and len(shown) <= LONGEST


def test_signs_are_no_mathematics_and_one_claim_has_a_point_alone(tmp_path):
    figure = matching_figure([{"name": "a $x_{$ b", **ALONE}], title="t $\\frac$ x")
    style.save_as(figure, tmp_path / "drawn.png")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a $x_{$ b"]
    assert len(axes.patches) == 1 and len(axes.lines) == 1, "the line at 0.5 and no interval"
    axes = matplotlib.figure.Figure().subplots()
    draw_effects(axes, {"s": [ALONE, None]}, ["one", "two"], xlabel="x")
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 1, 0], "the line at 0, the point, the legend's"
