"""The frame of every experiment: one decorated function gives command line, presets, ledger, seeds and resuming.

    @experiment(quick=Config(), full=Config(rows=512), seeds=3)
    def run(config: Config) -> dict[str, Any]:
        ...
        return {"claim": "One sentence.", "numbers": [ledger.test(...), ...], "data": {"curve": curve}}

`python -m experiments.<name> --preset quick|full` runs it, and every field of its Config is an option. The full preset
writes the committed results in `results/`. A quick run writes to `runs/quick/results`, and a run with other settings or
on another model to `runs/own/results`, unless `--results` names a folder. `experiments/README.md` has a whole example.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from experiments import ledger

ROOT = Path(__file__).resolve().parent.parent
QUICK, OWN = ROOT / "runs" / "quick" / "results", ROOT / "runs" / "own" / "results"
Result = dict[str, Any]
"""A claim, its numbers (`ledger.identity`, `test`, `measurement`), and the data that the figure draws."""


def by_model(name: str, config: Any) -> str:
    """Return the experiment's name, followed by the model's if it is not tiny-gpt2."""
    return ledger.result_name(name, getattr(config, "model", "tiny-gpt2"))


def experiment(
    *, quick: Any, full: Any, seeds: int = 1, named: Callable[[str, Any], str] = by_model
) -> Callable[[Callable[[Any], Result]], Experiment]:
    """Declare a function from a config to a result as the experiment of its module.

    Args:
        quick: the config of the quick preset, a frozen dataclass.
        full: the config of the full preset, whose results are committed.
        seeds: the number of seeds of the full preset, beginning with the config's; quick runs the first alone.
        named: the name of the results file, from the experiment's name and the config.
    """

    def declare(run: Callable[[Any], Result]) -> Experiment:
        module = run.__module__
        if module == "__main__":  # `python -m` has read the file up to here: import the whole of it, and run that
            module = run.__globals__["__spec__"].name
            getattr(importlib.import_module(module), run.__name__).main()
            sys.exit()
        return Experiment(module.rpartition(".")[2], run, {"quick": quick, "full": full}, seeds, named)

    return declare


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A declared experiment: a call computes the result of one config, `main` does what the command line says."""

    name: str
    run: Callable[[Any], Result]
    presets: Mapping[str, Any]
    seeds: int = 1
    named: Callable[[str, Any], str] = by_model

    def __call__(self, config: Any) -> Result:
        """Compute the result of one config; nothing is written."""
        return self.run(config)

    def main(self, args: list[str] | None = None) -> Path:
        """Run as the command line says, write the results, print the numbers, and return the file."""
        preset, folder, config = self._parsed(sys.argv[1:] if args is None else args)
        if folder is None:
            folder = self._folder(preset, config)
        count = self.seeds if preset == "full" else 1
        seeds = [config.seed + k for k in range(count)] if hasattr(config, "seed") else []
        configs = [dataclasses.replace(config, seed=seed) for seed in seeds] or [config]
        started = time.perf_counter()
        results = [self.run(each) for each in tqdm(configs, unit="seed", disable=len(configs) == 1)]
        path = ledger.write(
            self.named(self.name, config),
            results,
            config=config,
            preset=preset if self._is(preset, config, free=("seed", "model")) else "own",
            seconds=time.perf_counter() - started,
            seeds=seeds,
            out=folder,
        )
        _print(results, seeds, path)
        return path

    def _parsed(self, args: list[str]) -> tuple[str, Path | None, Any]:
        """Return the preset, the folder for results if one is named, and the preset's config with the given fields."""
        program = f"python -m experiments.{self.name}"
        first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=sorted(self.presets), default="quick")
        preset = first.parse_known_args(args)[0].preset
        config = self.presets[preset]
        options = dataclasses.make_dataclass(
            "Options",
            [
                ("preset", Literal[tuple(self.presets)], preset),
                ("results", Path | None, None),
                ("config", tyro.conf.OmitArgPrefixes[type(config)], config),
            ],
        )
        options.__doc__ = f"""Run the experiment {self.name} and write its results.

        Args:
            preset: the base settings. The committed results are of full.
            results: the folder for the results file. By default runs/quick/results, results for the full preset as it
                is, or runs/own/results for other settings.
        """
        given = tyro.cli(options, args=args, prog=program)
        return given.preset, given.results, given.config

    def _folder(self, preset: str, config: Any) -> Path:
        """Return the committed results' folder only for the full preset, on its model or one that is there already."""
        if self._is(preset, config):
            return {"quick": QUICK, "full": ledger.RESULTS}[preset]
        if preset == "full" and self._is(preset, config, free=("model",)):
            committed = ledger.RESULTS / f"{self.named(self.name, config)}.json"
            return ledger.RESULTS if committed.exists() else OWN
        return OWN

    def _is(self, preset: str, config: Any, *, free: tuple[str, ...] = ()) -> bool:
        """Return whether the config is this preset, except for its work_dir and the free fields."""
        same = [field for field in ("work_dir", *free) if hasattr(config, field)]
        return config == dataclasses.replace(self.presets[preset], **{field: getattr(config, field) for field in same})


def _print(results: list[Result], seeds: list[int], path: Path) -> None:
    """Print the claim, its numbers, its verdict as the file has it, and the file."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    print(entry["claim"])
    for number in entry["numbers"]:
        judged = entry["preset"] == "full" or number["kind"] == "identity"
        mark = "   << outside its bound" if judged and ledger.holds(number) is False else ""
        print(f"  {number['kind']:11} {number['name']}: {number['value']:.6g} {number['unit']}{mark}")
    verdicts = {True: "the claim holds", False: "the claim does not hold", None: "measured: nothing is tested"}
    full = entry["preset"] == "full"
    print(verdicts[entry["holds"]] if full else "not judged: only the full preset is large enough")
    held = [ledger.verdict(result["numbers"]) for result in results]
    if len(seeds) > 1 and None not in held:
        print(f"held at {sum(held)} of {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


# Resuming -------------------------------------------------------------------------------------------------------------


def kept(config: Any, name: str, compute: Callable[[], Any]) -> Any:
    """Return a stage of a long experiment: read from `config.work_dir` if it was finished there, else computed.

    A stage belongs to the experiment and its config, all fields but `work_dir`; if that is None, nothing is kept.

    Args:
        compute: gives nested dicts and lists of arrays and of values that JSON has. Keys are strings or integers.
    """
    arrays: dict[str, np.ndarray] = {}
    if config.work_dir is None:
        return _with_arrays(_without_arrays(compute(), arrays), arrays.__getitem__)
    settings = f"{type(config).__module__}.{dataclasses.replace(config, work_dir=None)}"
    path = config.work_dir / hashlib.sha256(settings.encode()).hexdigest()[:12] / f"{name}.safetensors"
    if not path.is_file():
        tree = json.dumps(_without_arrays(compute(), arrays))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(arrays, partial, metadata={"tree": tree})
        os.replace(partial, path)
    with safe_open(path, "numpy") as file:
        return _with_arrays(json.loads(file.metadata()["tree"]), file.get_tensor)


def _without_arrays(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return the tree as JSON, and add its arrays to `arrays` under the names that take their places."""
    if isinstance(tree, dict):
        return {"dict": [[key, _without_arrays(value, arrays)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_without_arrays(value, arrays) for value in tree]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    name = str(len(arrays))
    arrays[name] = np.array(tree, order="C")
    return {"array": name}


def _with_arrays(tree: Any, array: Callable[[str], np.ndarray]) -> Any:
    """Undo `_without_arrays`."""
    if isinstance(tree, list):
        return [_with_arrays(value, array) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return array(tree["array"])
    return {key: _with_arrays(value, array) for key, value in tree["dict"]}
