"""The command line of every experiment: `python -m experiments.<name> --preset quick|full`, and fields of its Config.

The committed results in `results/` are of the full preset and change by nothing else: a quick run writes to
`runs/quick/results`, and a run with other settings to `runs/own/results`, unless `--results` names a folder.
"""

from __future__ import annotations

import argparse
import dataclasses
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
        folder = {"quick": QUICK, "full": ledger.RESULTS}[preset] if _is(preset, config, presets) else OWN
    run_seeds = [config.seed + k for k in range(seeds if preset == "full" else 1)] if hasattr(config, "seed") else []
    configs = [dataclasses.replace(config, seed=seed) for seed in run_seeds] or [config]
    started = time.perf_counter()
    results = [run(each) for each in tqdm(configs, unit="seed", disable=len(configs) == 1)]
    path = ledger.write(
        named(name, config),
        results,
        config=config,
        preset=preset if _is(preset, config, presets, free=("seed",)) else "own",
        seconds=time.perf_counter() - started,
        seeds=run_seeds,
        out=folder,
    )
    _print(results, run_seeds)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def _parsed(name: str, presets: Mapping[str, Any], args: list[str]) -> tuple[str, Path | None, Any]:
    """Return the preset, the folder for results if one is named, and the preset's config with what else is given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
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
        preset: the settings to begin with; full is what the committed results are of.
        results: the folder for the results file. By default that of the preset, which git ignores unless it is full.
    """
    given = tyro.cli(options, args=args, prog=f"python -m experiments.{name}")
    return given.preset, given.results, given.config


def _is(preset: str, config: Any, presets: Mapping[str, Any], *, free: tuple[str, ...] = ()) -> bool:
    """Return whether this is the preset, on whatever model, wherever it keeps checkpoints, but for the free fields."""
    same = [field for field in ("model", "work_dir", *free) if hasattr(config, field)]
    return config == dataclasses.replace(presets[preset], **{field: getattr(config, field) for field in same})


def _print(results: list[dict[str, Any]], seeds: list[int]) -> None:
    print(results[0]["claim"])
    numbers = ledger.merged([result["numbers"] for result in results])
    for number in numbers:
        mark = "   << outside its bound" if ledger.holds(number) is False else ""
        print(f"  {number['kind']:11} {number['name']}: {number['value']:.6g} {number['unit']}{mark}")
    held = [ledger.verdict(result["numbers"]) for result in results]
    if len(seeds) > 1:
        print(f"held at {sum(each is True for each in held)} of {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})")
