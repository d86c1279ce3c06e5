"""The command line of every experiment: `python -m experiments.<name> --preset quick|full`, and fields of its Config.

The full preset writes the committed results in `results/`. A quick run writes to `runs/quick/results`, and a run with
other settings or on another model to `runs/own/results`, unless `--results` names a folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from experiments import ledger

ROOT = Path(__file__).resolve().parent.parent
QUICK, OWN = ROOT / "runs" / "quick" / "results", ROOT / "runs" / "own" / "results"


def by_model(name: str, config: Any) -> str:
    """Name the results after the experiment, and after the model where it is another than tiny-gpt2."""
    return ledger.result_name(name, getattr(config, "model", "tiny-gpt2"))


def main(
    name: str,
    run: Callable[[Any], dict[str, Any]],
    presets: Mapping[str, Any],
    *,
    seeds: int = 1,
    named: Callable[[str, Any], str] = by_model,
    args: list[str] | None = None,
) -> Path:
    """Run an experiment as the command line says, write its results, print its numbers.

    Args:
        seeds: how many seeds the full preset runs, beginning with the config's; quick runs the first alone.
        named: the name of the results file, from the experiment's and the config.
    """
    preset, folder, config = _parsed(name, presets, sys.argv[1:] if args is None else args)
    if folder is None:
        folder = _folder(named(name, config), preset, config, presets)
    run_seeds = [config.seed + k for k in range(seeds if preset == "full" else 1)] if hasattr(config, "seed") else []
    configs = [dataclasses.replace(config, seed=seed) for seed in run_seeds] or [config]
    started = time.perf_counter()
    results = [run(each) for each in tqdm(configs, unit="seed", disable=len(configs) == 1)]
    path = ledger.write(
        named(name, config),
        results,
        config=config,
        preset=preset if _is(preset, config, presets, free=("seed", "model")) else "own",
        seconds=time.perf_counter() - started,
        seeds=run_seeds,
        out=folder,
    )
    _print(results, run_seeds, path)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def _parsed(name: str, presets: Mapping[str, Any], args: list[str]) -> tuple[str, Path | None, Any]:
    """Return the preset, the folder for results if one is named, and the preset's config with what else is given."""
    first = argparse.ArgumentParser(prog=f"python -m experiments.{name}", add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(presets), default="quick")
    preset = first.parse_known_args(args)[0].preset
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("preset", Literal[tuple(presets)], preset),
            ("results", Path | None, None),
            ("config", tyro.conf.OmitArgPrefixes[type(presets[preset])], presets[preset]),
        ],
    )
    options.__doc__ = f"""Run the experiment {name} and write its results.

    Args:
        preset: the base settings. The committed results are of full.
        results: the folder for the results file. By default runs/quick/results, results for the full preset as it
            is, or runs/own/results for other settings.
    """
    given = tyro.cli(options, args=args, prog=f"python -m experiments.{name}")
    return given.preset, given.results, given.config


def _folder(results: str, preset: str, config: Any, presets: Mapping[str, Any]) -> Path:
    """Return where results go: to the committed ones only at the full preset, on its model or one that is there."""
    if _is(preset, config, presets):
        return {"quick": QUICK, "full": ledger.RESULTS}[preset]
    if preset == "full" and _is(preset, config, presets, free=("model",)):
        return ledger.RESULTS if (ledger.RESULTS / f"{results}.json").exists() else OWN
    return OWN


def _is(preset: str, config: Any, presets: Mapping[str, Any], *, free: tuple[str, ...] = ()) -> bool:
    """Return whether this is the preset, wherever it keeps checkpoints, but for the free fields."""
    same = [field for field in ("work_dir", *free) if hasattr(config, field)]
    return config == dataclasses.replace(presets[preset], **{field: getattr(config, field) for field in same})


def _print(results: list[dict[str, Any]], seeds: list[int], path: Path) -> None:
    """Print the claim, its numbers, and its verdict as the file has it."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    print(entry["claim"])
    for number in entry["numbers"]:
        judged = entry["preset"] == "full" or number["kind"] == "identity"
        mark = "   << outside its bound" if judged and ledger.holds(number) is False else ""
        print(f"  {number['kind']:11} {number['name']}: {number['value']:.6g} {number['unit']}{mark}")
    if entry["preset"] != "full":
        print("not judged: only the full preset is large enough")
    else:
        print(
            {True: "the claim holds", False: "the claim does not hold", None: "measured: nothing is tested"}[
                entry["holds"]
            ]
        )
    held = [ledger.verdict(result["numbers"]) for result in results]
    if len(seeds) > 1 and None not in held:
        print(f"held at {sum(held)} of {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})")
