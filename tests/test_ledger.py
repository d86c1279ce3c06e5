"""The ledger of claims: what a number needs, when it holds, and how it is written."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import __main__ as every_experiment
from experiments import ledger


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 3
    corpus: Path = Path("corpus/x.jsonl")
    sizes: tuple[int, ...] = (1, 2)


def number(value=1.0, **bound):
    return ledger.number("x", value, unit="nats", source="eq. 1", **bound)


def result(**changes):
    numbers = [number(1.0, expected=1.1, tolerance=0.2), number(5.0)]
    return {"claim": "Ünïcode holds.", "numbers": numbers, "data": {"x": [1, 2.5, None]}} | changes


def write(out, **changes):
    return ledger.write("claim", result(**changes), config=Config(), preset="quick", seconds=1.26, out=out)


# Numbers --------------------------------------------------------------------------------------------------------------


def test_a_number_says_what_it_was_given_and_nothing_else():
    assert number() == {"name": "x", "value": 1.0, "unit": "nats", "source": "eq. 1"}
    assert number(expected=2.0) == number() | {"expected": 2.0}
    assert number(expected=2.0, tolerance=0.0) == number() | {"expected": 2.0, "tolerance": 0.0}
    assert number(interval=(None, 2.0)) == number() | {"interval": (None, 2.0)}
    assert number(expected=2.0, interval=(0.0, 2.0)) == number() | {"expected": 2.0, "interval": (0.0, 2.0)}


@pytest.mark.parametrize("bound", [{"tolerance": 0.1}, {"expected": 1.0, "tolerance": 0.1, "interval": (0.0, 2.0)}])
def test_a_tolerance_needs_what_is_expected_and_no_interval(bound):
    with pytest.raises(ValueError, match=r"^x: give expected with tolerance, or interval, not both"):
        number(**bound)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_number_and_its_bounds_are_finite(bad):
    for bound in ({"value": bad}, {"expected": bad}, {"expected": 1.0, "tolerance": bad}, {"interval": (0.0, bad)}):
        with pytest.raises(ValueError, match=r"^x: a number and its bounds must be finite"):
            number(**bound)


@pytest.mark.parametrize(
    ("value", "bound", "expected"),
    [
        (1.0, {}, True),
        (1.0, {"expected": 9.0}, True),  # told beside it, bounds nothing
        (1.0, {"expected": 1.25, "tolerance": 0.25}, True),
        (1.5, {"expected": 1.25, "tolerance": 0.25}, True),
        (1.5, {"expected": 1.25, "tolerance": 0.125}, False),
        (0.5, {"expected": 1.25, "tolerance": 0.5}, False),
        (1.0, {"expected": 1.0, "tolerance": 0.0}, True),
        (1.0, {"interval": (1.0, 2.0)}, True),
        (2.0, {"interval": (1.0, 2.0)}, True),
        (2.5, {"interval": (1.0, 2.0)}, False),
        (0.5, {"interval": (1.0, 2.0)}, False),
        (-1e9, {"interval": (None, 2.0)}, True),
        (2.5, {"interval": (None, 2.0)}, False),
        (1e9, {"interval": (1.0, None)}, True),
        (0.5, {"interval": (1.0, None)}, False),
        (0.5, {"expected": 9.0, "interval": (0.0, 1.0)}, True),
    ],
)
def test_a_number_holds_within_its_own_bound(value, bound, expected):
    entry = number(value, **bound)
    assert ledger.holds(entry) is expected
    assert ledger.holds(json.loads(json.dumps(entry))) is expected, "also as it is read back"


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_result_is_written_whole(tmp_path):
    path = write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "claim.json"
    assert [each.name for each in path.parent.iterdir()] == ["claim.json"]
    content = path.read_text(encoding="utf-8")
    assert content.endswith("}\n") and "Ünïcode" in content
    entry = json.loads(content)
    assert set(entry) == {
        "claim",
        "holds",
        "numbers",
        "data",
        "config",
        "preset",
        "seed",
        "versions",
        "seconds",
    }
    assert entry["config"] == {"seed": 3, "corpus": "corpus/x.jsonl", "sizes": [1, 2]}
    assert (entry["holds"], entry["preset"], entry["seed"], entry["seconds"]) == (True, "quick", 3, 1.3)
    assert entry["data"] == {"x": [1, 2.5, None]}
    assert set(entry["versions"]) == set(ledger.VERSIONS) and all(entry["versions"].values())


def test_a_claim_holds_if_all_its_numbers_do(tmp_path):
    outside = [number(), number(expected=2.0, tolerance=0.5)]
    assert json.loads(write(tmp_path, numbers=outside).read_text())["holds"] is False
    assert json.loads(write(tmp_path).read_text())["holds"] is True
    assert json.loads(write(tmp_path, holds=False).read_text())["holds"] is False, "or as the experiment says"


@pytest.mark.parametrize("bad", [math.nan, math.inf, object()])
def test_what_is_no_json_is_refused_and_leaves_what_was_there(tmp_path, bad):
    before = write(tmp_path).read_bytes()
    with pytest.raises((ValueError, TypeError)):
        write(tmp_path, data={"x": [1.0, bad]})
    assert (tmp_path / "claim.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    before = write(tmp_path).read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "replace", fail)
        write(tmp_path, claim="Another.")
    assert (tmp_path / "claim.json").read_bytes() == before
    assert json.loads(write(tmp_path, claim="Another.").read_text())["claim"] == "Another."


def test_run_and_write_times_the_run_and_marks_what_is_outside(tmp_path, capsys):
    def run(config):
        assert config == Config(seed=8)
        return result(numbers=[number(0.123456789), number(3.0, interval=(0.0, 1.0))])

    path = ledger.run_and_write("claim", run, Config(seed=8), "full", out=tmp_path)
    entry = json.loads(path.read_text())
    assert (entry["seed"], entry["preset"], entry["holds"]) == (8, "full", False) and 0 <= entry["seconds"] < 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Ünïcode holds."
    assert lines[1] == "  x: 0.123457 nats" and lines[2] == "  x: 3 nats   << outside its bound"
    assert lines[3] == f"wrote {path}"


def test_to_run_every_experiment_is_no_experiment():
    """It would run itself, and so without end."""
    names = every_experiment.names()
    assert {"pretrain_gpt2", "search_trees"} <= set(names)
    assert not {"__main__", "__init__", "ledger"} & set(names)


def test_experiments_run_side_by_side_and_end_at_the_first_that_fails():
    write = "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"
    commands = {name: [sys.executable, "-c", write, name, code] for name, code in [("a", "0"), ("b", "3"), ("c", "0")]}
    ended = {name: (done.stdout.strip(), done.returncode) for name, done in every_experiment.finished(commands, jobs=2)}
    assert ended == {"a": ("a", 0), "b": ("b", 3), "c": ("c", 0)}


def test_a_failing_experiment_is_named_with_what_it_said(monkeypatch, capsys):
    monkeypatch.setattr(every_experiment, "names", lambda: ["no_such_experiment"])
    with pytest.raises(SystemExit, match=r"no_such_experiment failed:\n(.|\n)*No module named"):
        every_experiment.main("quick")
