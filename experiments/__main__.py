"""Run every experiment at one preset: `python -m experiments --preset quick`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

# With several processes at a time, each compiles its programs in one piece instead of in parts side by side.
ENVIRONMENT = {"XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"} | os.environ


def names() -> list[str]:
    """The experiments: modules of this folder that have a `main`."""
    files = sorted(set(Path(__file__).parent.glob("*.py")) - {Path(__file__)})  # not itself, without end
    return [file.stem for file in files if "\ndef main(" in file.read_text(encoding="utf-8")]


def main(preset: Literal["quick", "full"] = "quick", jobs: int = 2) -> None:
    """Run every experiment, each in a process of its own, and stop at the first that fails.

    Args:
        preset: `quick` takes minutes on two cores; `full` is what the committed results may come from.
        jobs: how many run at a time. Compiling keeps about one core busy.
    """
    commands = {name: [sys.executable, "-m", f"experiments.{name}", "--preset", preset] for name in names()}
    with tqdm(total=len(commands), unit="experiment") as progress:
        for name, done in finished(commands, jobs=jobs):
            progress.write(f"--- {name}\n{done.stdout.rstrip()}")
            progress.update()
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")


def finished(commands: dict[str, Sequence[str]], *, jobs: int) -> Iterator[tuple[str, subprocess.CompletedProcess]]:
    """Run commands, so many at a time, and give each when it ends; who stops asking stops those that wait."""
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
    tyro.cli(main)
