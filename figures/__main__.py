"""Redraw figures from `results/` alone, and the page that shows them: python -m figures [NAME ...]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from figures import _page, _results
from figures._results import Problem
from jaxrl_llm.plots import style


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    results: Path = _results.RESULTS,
    gallery: Path = _results.GALLERY,
) -> int:
    """Draw figures from their results files, as PNG and SVG (and HTML if interactive), and write the gallery's page.

    Args:
        names: the figures to draw; all of them by default.
        results: the folder of `<name>.json`.
        gallery: the folder for `<name>.png`, `<name>.svg`, perhaps `<name>.html`, and `index.html`.
    """
    known = _results.figure_names() | _results.result_names(results)
    if unknown := sorted(set(names) - known):
        print(f"no figure is named {', '.join(unknown)}; there are: {', '.join(sorted(known))}.", file=sys.stderr)
        return 2
    problems, notes = [], []
    for name in tqdm(sorted(set(names) or known), unit="figure"):
        try:
            notes += _draw(name, results, gallery)
        except Problem as problem:
            problems.append(str(problem))
    index = _write_index(results, gallery)
    for note in notes:
        print(note)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"The gallery is {index.relative_to(Path.cwd()) if index.is_relative_to(Path.cwd()) else index}")
    return 1 if problems else 0


def _draw(name: str, results: Path, gallery: Path) -> list[str]:
    """Write a figure's files, and say which one could not be for want of plotly."""
    entry = _results.load(results, name)
    module, notes = _results.figure_module(name), []
    try:
        style.save(module.draw(entry), gallery / name)
        if hasattr(module, "interactive"):
            style.write_atomically(gallery / f"{name}.html", module.interactive(entry).encode())
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        notes.append(f"{name}.html is left out: {error}")
    except Exception as error:
        error.add_note(f"while drawing {results / name}.json")
        raise
    return notes


def _write_index(results: Path, gallery: Path) -> Path:
    """The page of all results that can be read, also of those that this call did not draw."""
    entries = []
    for name in sorted(_results.result_names(results)):
        try:
            entry = _results.load(results, name)
        except Problem:
            continue
        drawn = {kind: (gallery / f"{name}.{kind}").exists() for kind in ("png", "html")}
        entries.append(_page.Entry(name, _title(name), entry, has_picture=drawn["png"], has_page=drawn["html"]))
    return style.write_atomically(gallery / "index.html", _page.render(entries).encode())


def _title(name: str) -> str:
    if _results.figure_of(name) not in _results.figure_names():
        return name.replace("_", " ").capitalize()
    title = (_results.figure_module(name).__doc__ or name).splitlines()[0].rstrip(".")
    _, _, variant = name.partition(".")
    return f"{title} ({variant})" if variant else title


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m figures"))
