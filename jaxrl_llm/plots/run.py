"""The log of a training run as a figure: a panel for each metric, with its held-out values in the same panel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

HELD_OUT = "held_out_"
FIRST = ("loss", "accuracy", "margin", "reward", "kl", "perplexity")  # the panels that come first
TIMES = ("step", "epoch", "tokens", "seconds", "tokens_per_second")  # of a row, not metrics of it
WIDTH, HEIGHT = 2.6, 1.8  # inches of a panel


def run_figure(run: str | Path | Sequence[Mapping[str, Any]], *, metrics: Sequence[str] = ()) -> Figure:
    """Draw the metrics of a run against its steps; a notebook shows the figure.

        jl.plots.run.run_figure("out")

    Args:
        run: the output folder, its `log.jsonl`, or the rows of one.
        metrics: those that are drawn, in this order; by default all. `held_out_x` is drawn in the panel of `x`.

    Raises:
        FileNotFoundError: if the folder has no log.
        ValueError: for a log without rows, or a metric that it does not have.
    """
    rows = read_log(run) if isinstance(run, str | Path) else list(run)
    name = Path(run).resolve().name if isinstance(run, str | Path) else "run"
    known = panels(rows)
    if not known:
        raise ValueError(f"the log of {name} must have rows with metrics, but has {len(rows)} without one.")
    chosen = dict.fromkeys(each.removeprefix(HELD_OUT) for each in metrics) or known
    if unknown := [each for each in chosen if each not in known]:
        raise ValueError(f"metrics must be among {', '.join(known)}, but have {', '.join(unknown)}.")
    with style.look():
        columns = min(3, len(chosen))
        lines = -(-len(chosen) // columns)
        figure = Figure(figsize=(columns * WIDTH, lines * HEIGHT + 0.4), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, metric in zip(grid, chosen, strict=False):
            _draw(axes, rows, metric)
        for axes in grid[len(chosen) :]:
            axes.set_axis_off()
        for axes in grid[max(0, len(chosen) - columns) : len(chosen)]:
            axes.set_xlabel("step")
        last = rows[-1].get("step", len(rows))
        style.headline(figure, style.sentence(f"{name}: {last} steps", size=10.5, width=columns * WIDTH * style.POINTS))
    return style.shown(figure)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `log.jsonl`; an incomplete last line is ignored."""
    path = Path(path)
    file = path / "log.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no log.jsonl: it is not the output folder of a run.")
    text = file.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise ValueError(f"{file} is not the log of a run: {error}") from error


def panels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metrics of a log, each one with its held-out values, the most asked for first."""
    names = dict.fromkeys(
        name.removeprefix(HELD_OUT) for row in rows for name, value in row.items() if _is_number(value)
    )
    found = [name for name in names if name not in TIMES]
    return sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    sides = [(metric, "training"), (HELD_OUT + metric, "held-out")]
    drawn = [(name, label) for name, label in sides if any(_is_number(row.get(name)) for row in rows)]
    for name, label in drawn:
        points = [(row.get("step", place), row[name]) for place, row in enumerate(rows) if _is_number(row.get(name))]
        held_out = name.startswith(HELD_OUT)
        marker = "o" if held_out or len(points) < 3 else None
        axes.plot(*zip(*points, strict=True), color=style.PALETTE[int(held_out)], marker=marker, label=label)
    title = metric if drawn[0][0] == metric else f"{metric}, held-out"
    axes.set_title(style.sentence(title, size=9.5, width=0.8 * WIDTH * style.POINTS, weight="bold"))
    if len(drawn) > 1:
        axes.legend()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
