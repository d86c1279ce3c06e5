"""Run every experiment at one preset: `python -m experiments --preset quick`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm


def names() -> list[str]:
    """The experiments: modules of this folder that have a `main`."""
    files = sorted(set(Path(__file__).parent.glob("*.py")) - {Path(__file__)})  # not itself, without end
    return [file.stem for file in files if "\ndef main(" in file.read_text(encoding="utf-8")]


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Run every experiment, each in a process of its own, and stop at the first that fails.

    Args:
        preset: `quick` takes minutes on two cores; `full` is what the committed results may come from.
    """
    for name in tqdm(names(), unit="experiment"):
        tqdm.write(f"--- {name}")
        subprocess.run([sys.executable, "-m", f"experiments.{name}", "--preset", preset], check=True)


if __name__ == "__main__":
    tyro.cli(main)
