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
    """Draw figures from their results files, as PNG and SVG, and write the gallery's page.

    Args:
        names: the figures to draw; all of them by default.
        results: the folder of `<name>.json`.
        gallery: the folder for `<name>.png`, `<name>.svg` and `index.html`.
    """
    known = _results.figure_names() | _results.result_names(results)
    if unknown := sorted(set(names) - known):
        print(f"no figure is named {', '.join(unknown)}; there are: {', '.join(sorted(known))}.", file=sys.stderr)
        return 2
    problems = []
    for name in tqdm(sorted(set(names) or known), unit="figure"):
        try:
            _draw(name, results, gallery)
        except Problem as problem:
            problems.append(str(problem))
    index = _write_index(results, gallery)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"The gallery is {index.relative_to(Path.cwd()) if index.is_relative_to(Path.cwd()) else index}")
    return 1 if problems else 0


def _draw(name: str, results: Path, gallery: Path) -> None:
    entry = _results.load(results, name)
    try:
        figure = _results.figure_module(name).draw(entry)
    except Exception as error:
        error.add_note(f"while drawing {results / name}.json")
        raise
    style.save(figure, gallery / name)


def _write_index(results: Path, gallery: Path) -> Path:
    """The page of all results that can be read, also of those that this call did not draw."""
    entries = []
    for name in sorted(_results.result_names(results)):
        try:
            entry = _results.load(results, name)
        except Problem:
            continue
        picture = (gallery / f"{name}.png").exists()
        entries.append(_page.Entry(name, _title(name), entry, has_picture=picture))
    return style.write_atomically(gallery / "index.html", _page.render(entries).encode())


def _title(name: str) -> str:
    if _results.figure_of(name) not in _results.figure_names():
        return name.replace("_", " ").capitalize()
    title = (_results.figure_module(name).__doc__ or name).splitlines()[0].rstrip(".")
    _, _, variant = name.partition(".")
    return f"{title} ({variant})" if variant else title


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m figures"))
