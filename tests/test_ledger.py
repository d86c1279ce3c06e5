"""The ledger of claims: its three kinds of numbers, when a claim holds, how it is written, and where to."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from experiments import __main__ as every_experiment
from experiments import catalogue, frame, ledger, statistics

ABOUT = {"unit": "nats", "source": "eq. 1"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes."""

    seed: int = 3
    corpus: Path = Path("corpus/x.jsonl")
    sizes: tuple[int, ...] = (1, 2)
    model: str = "tiny-gpt2"
    work_dir: Path | None = None


PRESETS = {"quick": Config(), "full": Config(sizes=(9,))}


def identity(value=1.0, expected=1.0, tolerance=1e-9):
    return ledger.identity("i", value, expected=expected, tolerance=tolerance, **ABOUT)


def checked(value=1.0, *, wrong=9.0, **bound):
    return ledger.test("t", value, wrong=wrong, **(bound or {"at_most": 2.0}), **ABOUT)


def measured(value=1.0, *confidence):
    return ledger.measurement("m", value, *confidence, **ABOUT)


def result(*numbers, **changes):
    return {"claim": "Ünïcode holds.", "numbers": numbers or [checked()], "data": {"x": [1, 2.5, None]}} | changes


def write(out, *results, preset="full", **options):
    results = results or [result()]
    path = ledger.write("claim", results, config=Config(), preset=preset, seconds=1.26, out=out, **options)
    return json.loads(path.read_text(encoding="utf-8"))


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (identity(1.0 + 1e-12), True),
        (identity(1.0 + 1e-6), False),
        (ledger.identity("largest difference", 3e-16, tolerance=1e-12, **ABOUT), True),
        (checked(1.5, expected=1.25, tolerance=0.25), True),
        (checked(1.5, expected=1.25, tolerance=0.125), False),
        (checked(2.0, at_most=2.0), True),
        (checked(2.5, at_most=2.0), False),
        (checked(1.0, at_least=0.0, wrong=-1.0), True),
        (checked(-1e-9, at_least=0.0, wrong=-1.0), False),
        (checked(0.5, at_least=0.0, at_most=1.0), True),
        (measured(1.0), None),
        (measured(1.0, 2.0, 3.0), None),
    ],
)
def test_numbers_hold_within_their_bounds(number, expected):
    assert ledger.holds(number) is expected
    assert ledger.holds(json.loads(json.dumps(number))) is expected, "also as it is read back"


def test_an_identity_is_judged_before_it_is_rounded():
    number = identity(1.23456789, 1.23456780)
    assert (number["value"], number["expected"]) == (1.23457, 1.23457)
    assert ledger.holds(number) is False


@pytest.mark.parametrize("bound", [{"at_most": 10.0}, {"at_least": 0.0}, {"expected": 8.0, "tolerance": 1.0}])
def test_a_bound_needs_a_wrong_value_that_breaks_it(bound):
    with pytest.raises(ValueError, match=r"^t: the wrong value must break the bound, but 9\.0 does not"):
        checked(1.0, wrong=9.0, **bound)
    with pytest.raises(ValueError, match="must break"):
        checked(1.0, wrong=math.nan, **bound)


@pytest.mark.parametrize(
    "bound", [{"tolerance": 0.1}, {"expected": 1.0}, {"expected": 1.0, "tolerance": 0.1, "at_most": 2.0}]
)
def test_a_bound_has_one_form(bound):
    with pytest.raises(ValueError, match="the bound must be expected and tolerance, or at_least or at_most"):
        checked(**bound)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_numbers_and_their_bounds_are_finite(bad):
    makers = [
        lambda: identity(bad),
        lambda: identity(expected=bad),
        lambda: checked(bad),
        lambda: checked(at_most=bad),
        lambda: measured(bad),
        lambda: measured(1.0, 0.0, bad),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="a number and its bounds must be finite"):
            make()


# Claims ---------------------------------------------------------------------------------------------------------------


def test_a_claim_holds_if_its_tests_and_identities_do():
    assert ledger.verdict([checked(), identity(), measured()]) is True
    assert ledger.verdict([checked(), checked(3.0)]) is False
    assert ledger.verdict([checked(), identity(2.0)]) is False


def test_a_claim_without_a_test_is_measured():
    assert ledger.verdict([measured(), identity()]) is None
    assert ledger.verdict([measured(), identity(2.0)]) is False, "but a broken identity shows"


def test_a_claim_holds_at_every_seed_or_not_at_all(tmp_path):
    runs = [result(checked(value), measured(value)) for value in (1.0, 3.0, 2.0)]
    entry = write(tmp_path, *runs, seeds=(3, 4, 5))
    assert entry["seeds"] == {"run": [3, 4, 5], "held": [True, False, True]}
    assert entry["holds"] is False
    assert [number["values"] for number in entry["numbers"]] == [[1.0, 3.0, 2.0]] * 2
    assert write(tmp_path, runs[0], runs[2], seeds=(3, 5))["holds"] is True


def test_seeds_must_give_the_same_numbers(tmp_path):
    other = result(ledger.test("best is PPO", 1.0, at_most=2.0, wrong=3.0, **ABOUT))
    with pytest.raises(ValueError, match="every seed must give the same numbers, but these are not in all: best is PP"):
        write(tmp_path, result(), other)


def test_bounds_must_not_depend_on_the_seed(tmp_path):
    with pytest.raises(ValueError, match="t: interval must be the same at every seed"):
        write(tmp_path, result(), result(checked(1.0, at_most=3.0)))


def test_a_quick_run_is_not_judged(tmp_path):
    assert write(tmp_path, preset="quick")["holds"] is None
    assert write(tmp_path, result(checked(3.0)), preset="quick")["holds"] is None
    assert write(tmp_path, result(identity(2.0)), preset="quick")["holds"] is False, "an identity holds at any size"


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_result_is_written_whole(tmp_path):
    entry = write(tmp_path / "new" / "folder", seeds=(3,))
    assert [each.name for each in (tmp_path / "new" / "folder").iterdir()] == ["claim.json"]
    assert "Ünïcode" in (content := (tmp_path / "new" / "folder" / "claim.json").read_text(encoding="utf-8"))
    assert content.endswith("}\n")
    fields = "claim holds seeds numbers data config preset seed versions seconds"
    assert list(entry) == fields.split()
    assert entry["config"] == {"seed": 3, "corpus": "corpus/x.jsonl", "sizes": [1, 2], "model": "tiny-gpt2"}
    assert (entry["holds"], entry["preset"], entry["seed"], entry["seconds"]) == (True, "full", 3, 1.3)
    assert entry["data"] == {"x": [1, 2.5, None]}
    assert set(entry["versions"]) == set(ledger.VERSIONS) and all(entry["versions"].values())


def test_arrays_take_one_line_and_numbers_six_digits(tmp_path):
    data = {"curve": np.linspace(0, 1, 200, dtype=np.float32), "grid": np.full((3, 50), 1 / 3), "text": "x" * 200}
    entry = write(tmp_path, result(data=data))
    assert entry["data"]["curve"][1] == 0.00502513 and entry["data"]["grid"][2][49] == 0.333333
    lines = (tmp_path / "claim.json").read_text(encoding="utf-8").splitlines()
    assert sum(line.count("0.333333") == 50 for line in lines) == 3
    assert len(lines) < 30


@pytest.mark.parametrize("bad", [math.nan, math.inf, object()])
def test_what_json_lacks_is_refused_and_leaves_what_was_there(tmp_path, bad):
    before = write(tmp_path)
    with pytest.raises((ValueError, TypeError)):
        write(tmp_path, result(data={"x": [1.0, bad]}))
    assert json.loads((tmp_path / "claim.json").read_text()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    before = write(tmp_path)

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "replace", fail)
        write(tmp_path, result(claim="Another."))
    assert json.loads((tmp_path / "claim.json").read_text()) == before
    assert write(tmp_path, result(claim="Another."))["claim"] == "Another."


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Give each folder that results go to a place of its own, and say which of them has a file."""
    folders = {"quick": tmp_path / "quick", "own": tmp_path / "own", "committed": tmp_path / "results"}
    monkeypatch.setattr(frame, "QUICK", folders["quick"])
    monkeypatch.setattr(frame, "OWN", folders["own"])
    monkeypatch.setattr(ledger, "RESULTS", folders["committed"])

    def run(*args, seeds=1):
        seen = []

        def compute(config):
            seen.append(config)
            return result(checked(float(config.seed), at_most=4.0))

        path = frame.Experiment("claim", compute, PRESETS, seeds).main(list(args))
        folder = next(name for name, place in folders.items() if path.parent == place)
        return folder, path.name, seen, json.loads(path.read_text())

    return run


@pytest.mark.parametrize(
    ("args", "folder", "name", "preset"),
    [
        ((), "quick", "claim.json", "quick"),
        (("--preset", "quick", "--work-dir", "x"), "quick", "claim.json", "quick"),
        (("--preset", "full"), "committed", "claim.json", "full"),
        (("--preset", "full", "--model", "a/b"), "own", "claim.a-b.json", "full"),
        (("--preset", "full", "--seed", "4"), "own", "claim.json", "full"),
        (("--preset", "full", "--sizes", "1"), "own", "claim.json", "own"),
        (("--sizes", "9"), "own", "claim.json", "own"),
    ],
)
def test_only_the_full_preset_writes_the_committed_results(places, args, folder, name, preset):
    assert (found := places(*args))[:2] == (folder, name)
    assert found[3]["preset"] == preset
    assert (found[3]["holds"] is None) is (preset != "full")


def test_the_full_preset_runs_several_seeds(places, capsys):
    _, _, configs, entry = places("--preset", "full", seeds=3)
    assert [config.seed for config in configs] == entry["seeds"]["run"] == [3, 4, 5]
    said = capsys.readouterr().out
    assert "held at 2 of 3 seeds (3 to 5)" in said and "the claim does not hold" in said
    assert "test        t: 3 nats   << outside its bound" in said, "at a seed"
    assert len(places(seeds=3)[2]) == 1, "a quick run takes the first"
    assert "not judged: only the full preset is large enough" in capsys.readouterr().out


def test_a_committed_variant_is_renewed_and_no_other_is_added(places, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claim.a-b.json").touch()
    assert places("--preset", "full", "--model", "a/b")[0] == "committed"
    assert places("--preset", "full", "--model", "c")[0] == "own"


def test_help_names_the_command_and_unknown_options_are_refused(places, capsys):
    for args, expected in (["--help"], "python -m experiments.claim"), (["--size", "1"], "--size"):
        with pytest.raises(SystemExit):
            places(*args)
        captured = capsys.readouterr()
        assert expected in captured.out + captured.err


# All experiments ------------------------------------------------------------------------------------------------------


def test_experiments_run_side_by_side_and_failures_do_not_stop_the_others():
    write = "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"
    commands = {name: [sys.executable, "-c", write, name, code] for name, code in [("a", "0"), ("b", "3"), ("c", "0")]}
    ended = {name: (done.stdout.strip(), done.returncode) for name, done in every_experiment.finished(commands, jobs=2)}
    assert ended == {"a": ("a", 0), "b": ("b", 3), "c": ("c", 0)}


def test_each_figure_is_drawn_when_its_experiment_ends(tmp_path, monkeypatch, capsys):
    names = ("score_function", "gibbs_optimum", "kl_gradients")
    drawn = []

    def finished(commands, *, jobs):
        for name in commands:
            ended = subprocess.CompletedProcess([], int(name == names[1]), stdout=f"ran {name}", stderr="no luck")
            yield name, ended
            assert (name in drawn) is not bool(ended.returncode), "before the next one ends"

    monkeypatch.setattr(every_experiment, "finished", finished)
    monkeypatch.setattr(every_experiment.figures, "draw_into", lambda *args, **_: drawn.extend(args[2]) or [])
    assert every_experiment.main(names, jobs=1) == 1
    assert set(drawn) == {names[0], names[2]}
    said = capsys.readouterr()
    assert "1 of 3 experiments failed: gibbs_optimum" in said.err and "no luck" in said.err


def test_a_figure_that_cannot_be_drawn_counts_as_failed_and_stops_nobody(monkeypatch, capsys):
    names, drawn = ("score_function", "gibbs_optimum", "kl_gradients"), []
    ended = subprocess.CompletedProcess([], 0, stdout="ran", stderr="")
    monkeypatch.setattr(every_experiment, "finished", lambda commands, *, jobs: ((name, ended) for name in commands))

    def draw(results, gallery, each, **_):
        drawn.extend(each)
        if each == ["gibbs_optimum"]:
            raise KeyError("data")
        return ["no figure"] if each == ["kl_gradients"] else []

    monkeypatch.setattr(every_experiment.figures, "draw_into", draw)
    assert every_experiment.main(names, jobs=1) == 1
    assert set(drawn) == set(names)
    assert "2 of 3 experiments failed: gibbs_optimum, kl_gradients" in capsys.readouterr().err


def test_an_unknown_experiment_is_answered_with_the_known_ones(capsys):
    assert every_experiment.main(("no_such",)) == 2
    assert "unknown experiment no_such: choose from " in capsys.readouterr().err


def test_the_fast_ones_run_first():
    seconds = {name: taken for group in catalogue.SUBJECTS.values() for name, taken in group.items()}
    taken = [seconds[name] for name in catalogue.names()]
    assert taken == sorted(taken) and len(taken) == len(seconds) >= 29


# Statistics -----------------------------------------------------------------------------------------------------------


def test_students_interval_is_scipys():
    values = np.random.default_rng(0).normal(size=7)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert statistics.student(values) == pytest.approx((values.mean(), *expected))
    with pytest.raises(ValueError, match="values must be at least two numbers"):
        statistics.student([1.0])


def test_five_differences_of_one_sign_reach_five_per_cent_and_four_do_not():
    assert statistics.above_zero([1, 2, 3, 4, 5]) == pytest.approx(1 / 32)
    assert statistics.above_zero([1, 2, 3, 4]) == pytest.approx(1 / 16)
    assert statistics.above_zero([-1, -2, -3, -4, -5]) == pytest.approx(1.0)
    assert statistics.above_zero([0, 0]) == 1.0


def test_holms_correction_is_that_of_his_paper():
    assert statistics.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
