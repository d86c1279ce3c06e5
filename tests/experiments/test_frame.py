"""The frame: the README's experiment runs as it is written, and a finished stage is kept."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import ledger
from experiments.frame import kept

ROOT = Path(__file__).resolve().parents[2]
IN_TURN = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, end.code
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copy experiments and figures, and add the two files that the README shows."""
    folder = tmp_path_factory.mktemp("project")
    for package in ("experiments", "figures"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "gallery"))
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"`((?:experiments|figures)/coin\.py)`:\n\n```python\n(.*?)```", readme, re.DOTALL))
    assert set(files) == {"experiments/coin.py", "figures/coin.py"}
    for name, code in files.items():
        (folder / name).write_text(code, encoding="utf-8")

    def run(*commands):
        """As `python -m COMMAND`, one after the other, but in one process."""
        environment = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "", "HOME": str(folder)}
        command = [sys.executable, "-c", IN_TURN, *commands]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return folder, run


@pytest.mark.slow
def test_the_readmes_experiment_runs_at_every_preset_and_its_figure_is_drawn(project):
    folder, run = project
    coin = "experiments.coin"
    said = run(coin, f"{coin} --repeats 500", f"{coin} --preset full", "figures coin")
    assert "The variance of the mean" in said and "wrote runs/quick/results/coin.json" in said
    assert "wrote runs/own/results/coin.json" in said
    assert "held at 3 of 3 seeds (0 to 2)" in said
    results = folder / "results" / "coin.json"
    entry = json.loads(results.read_text(encoding="utf-8"))
    assert entry["holds"] and entry["config"] == {"repeats": 100_000, "seed": 0} and entry["seeds"]["run"] == [0, 1, 2]
    with Image.open(folder / "figures" / "gallery" / "coin.png") as picture:
        assert picture.text["Source"] == ledger.digest(results)


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 2
    work_dir: Path | None = None


def test_a_finished_stage_is_read_again_by_the_same_config_only(tmp_path):
    tree = {"h": {0: {"w": np.arange(6.0).reshape(2, 3)}, 1: {"w": np.zeros(2)}}, "loss": np.float32(0.5)}
    tree |= {"rows": [{"name": "a", "left": None, "share": 1 / 3}], "1": 1, "worst": np.inf}
    calls = []

    def compute():
        calls.append(1)
        return tree

    config = Config(work_dir=tmp_path / "deep")
    for found in (kept(config, "stage", compute), kept(config, "stage", compute)):
        assert list(found) == list(tree) and list(found["h"]) == [0, 1]
        np.testing.assert_array_equal(found["h"][0]["w"], tree["h"][0]["w"])
        assert (found["loss"], found["loss"].dtype, found["loss"].shape) == (0.5, np.float32, ())
        assert (found["rows"], found["1"], found["worst"]) == (tree["rows"], 1, np.inf)
    assert len(calls) == 1 and [each.name for each in tmp_path.rglob("stage*")] == ["stage.safetensors"]
    kept(dataclasses.replace(config, work_dir=tmp_path / "other"), "stage", compute)
    kept(dataclasses.replace(config, size=3), "stage", compute)
    kept(Config(), "stage", compute)
    kept(Config(), "stage", compute)
    assert len(calls) == 5
