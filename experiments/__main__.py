"""Run experiments at one preset and draw their figures as they end: `python -m experiments --preset quick`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from experiments import catalogue, frame, ledger
from figures import __main__ as figures
from figures import _results

# With several processes at a time, each compiles its programs in one piece instead of in parts side by side.
ENVIRONMENT = {"XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"} | os.environ
RESULTS = {"quick": frame.QUICK, "full": ledger.RESULTS}
GALLERY = {"quick": frame.QUICK.parent / "gallery", "full": _results.GALLERY}


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    preset: Literal["quick", "full"] = "quick",
    jobs: int = 2,
) -> int:
    """Run experiments, each in a process of its own, and draw each figure as soon as its results are there.

    Results and gallery of the quick preset go to `runs/quick`, which git ignores. Those of the full preset replace the
    committed ones in `results` and `figures/gallery`; they take hours.

    Args:
        names: the experiments to run; all of them by default, the fast ones first.
        preset: quick takes minutes on two cores; full is what the committed results are of.
        jobs: how many run at a time. Compiling keeps about one core busy.
    """
    if unknown := sorted(set(names) - set(catalogue.names())):
        print(f"unknown experiment {', '.join(unknown)}: choose from {', '.join(catalogue.names())}.", file=sys.stderr)
        return 2
    chosen = [name for name in catalogue.names() if name in names or not names]
    commands = {name: [sys.executable, "-m", f"experiments.{name}", "--preset", preset] for name in chosen}
    failed, started = [], time.monotonic()
    with tqdm(total=len(commands), unit="experiment") as progress:
        for name, done in finished(commands, jobs=jobs):
            progress.write(f"--- {name}, {time.monotonic() - started:.0f} s after the start\n{done.stdout.rstrip()}")
            if done.returncode:
                failed.append(name)
                progress.write(f"{name} failed:\n{done.stderr}", file=sys.stderr)
            elif not _draw(name, preset):
                failed.append(name)
            progress.update()
    print(f"The gallery is {figures.shown(GALLERY[preset] / 'index.html')}")
    if failed:
        print(f"{len(failed)} of {len(chosen)} experiments failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def _draw(name: str, preset: str) -> bool:
    """Draw a figure and renew the page; report a figure that cannot be drawn, and go on with the others."""
    also = ("html",) if preset == "quick" else ()
    try:
        return not figures.draw_into(RESULTS[preset], GALLERY[preset], [name], also=also)
    except Exception:
        tqdm.write(f"{name} could not be drawn:\n{traceback.format_exc()}", file=sys.stderr)
        return False


def finished(commands: dict[str, Sequence[str]], *, jobs: int) -> Iterator[tuple[str, subprocess.CompletedProcess]]:
    """Run commands, `jobs` at a time, and yield each when it ends; closing the generator cancels those that wait."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(subprocess.run, command, capture_output=True, text=True, env=ENVIRONMENT): name
            for name, command in commands.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m experiments"))
