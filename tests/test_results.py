"""The committed results and pictures: of the full preset, judged by their own bounds, and drawn from one another."""

import dataclasses
import importlib
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from experiments import catalogue, ledger
from figures import _results

FILES = sorted(ledger.RESULTS.glob("*.json"))
README_WIDTH, LEAST_SIZE = 8.6, 6.0  # inches that a page gives to a picture; points that can be read there


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_experiment_has_results_and_a_figure():
    assert set(catalogue.names()) == {_results.figure_of(path.stem) for path in FILES} == _results.figure_names()
    assert set(catalogue.names()) == set(catalogue.READ_ON)
    assert set(catalogue.names()) == {
        path.stem for path in ledger.RESULTS.parent.glob("experiments/*.py") if "\n@experiment(" in path.read_text()
    }


def test_every_experiment_links_to_files_and_headings_that_exist():
    for name in catalogue.names():
        for path, _, anchor in (each.partition("#") for each in catalogue.links(name).values()):
            text = (ledger.RESULTS.parent / path).read_text(encoding="utf-8")
            headings = {line.strip("# ").lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"}
            assert not anchor or anchor in headings, f"{name}: {path}#{anchor}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_verdicts_follow_from_bounds_that_can_fail(path):
    entry = load(path)
    assert entry["preset"] == "full"
    preset = importlib.import_module(f"experiments.{_results.figure_of(path.stem)}").run.presets["full"]
    settings = json.loads(json.dumps(dataclasses.asdict(preset), default=str))
    own = ("model", "work_dir")  # another model makes a variant
    assert {k: v for k, v in entry["config"].items() if k not in own} == {
        k: v for k, v in settings.items() if k not in own
    }
    assert entry["holds"] is ledger.verdict(entry["numbers"])
    for number in entry["numbers"]:
        assert (number["kind"] == "measurement") is (ledger.holds(number) is None), number["name"]
        if number["kind"] == "test":
            assert ledger.holds(broken(number)) is False, f"{number['name']}: nothing can break its bound"


def broken(number):
    """The number, had it come out at the plausible wrong value that was written down with its bound."""
    wrong = {"value": number["wrong"]}
    if "tolerance" in number:
        wrong["error"] = abs(number["wrong"] - number["expected"])
    return {field: value for field, value in number.items() if field not in ("values", "errors")} | wrong


def test_claims_hold_but_for_those_that_are_known_not_to():
    verdicts = {path.stem: load(path)["holds"] for path in FILES}
    failed = {
        "eos_displacement",
        "intervention_forgets",
        "search_trees.gemma-3-270m",
        "sentiment_alignment",
        "sycophancy",
    }
    assert {name for name, holds in verdicts.items() if holds is False} == failed
    assert {name for name, holds in verdicts.items() if holds is None} == {"loss_landscape", "pretrain_gpt2"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_picture_is_of_these_results(path):
    with Image.open(_results.GALLERY / f"{path.stem}.png") as picture:
        assert picture.text["Source"] == ledger.digest(path), f"run python -m figures {path.stem}"


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_text_can_be_read_at_the_width_of_a_page(path):
    figure = _results.figure_module(path.stem).draw(load(path))
    scale = min(1.0, README_WIDTH / figure.get_size_inches()[0])
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    small = {text.get_text(): text.get_fontsize() * scale for text in drawn if text.get_fontsize() * scale < LEAST_SIZE}
    assert not small
    renderer = FigureCanvasAgg(figure).get_renderer()
    title = figure._suptitle.get_window_extent(renderer) if figure._suptitle else None
    assert title is None or (title.x0 >= 0 and title.x1 <= figure.bbox.width), "the title is cut off"
