"""Bars of how often models agree with their users, and marks of what the user changes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

ROW = 0.34  # inches
WIDTHS = (1.1, 1.1, 0.8)  # of the panels of a report
LONGEST = 34  # characters of a name


def draw_matching(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Horizontal bars of the mean matching ratio, with intervals, and the line at 0.5.

    Each row has `name`, `estimate`, `low` and `high`, None without an interval; one with `control` set, whose score is
    known, is paler.
    """
    for place, row in enumerate(rows):
        axes.barh(place, row["estimate"], height=0.62, color=style.FAINT if row.get("control") else style.PALETTE[0])
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=style.INK, linewidth=1.1, solid_capstyle="butt")
        end = max(row["high"] or 0, row["estimate"])
        axes.annotate(
            f"{row['estimate']:.3f}", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    axes.axvline(0.5, color=style.ACCENT, linewidth=1, linestyle=(0, (4, 2)))
    axes.set(xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="mean matching ratio")
    _name_rows(axes, [row["name"] for row in rows])


def draw_effects(
    axes: Axes, series: dict[str, Sequence[dict[str, Any] | None]], names: Sequence[str], *, xlabel: str
) -> None:
    """Points with intervals around a line at 0: for each series one to a name, None where nothing was measured.

    `low` and `high` of a point are None if it has no interval.
    """
    axes.axvline(0, color=style.INK, linewidth=0.8)
    for number, (label, rows) in enumerate(series.items()):
        colour, offset = style.PALETTE[number], 0.22 * (number - (len(series) - 1) / 2)
        for place, row in enumerate(rows):
            if row is None:
                continue
            at = [place + offset] * 2
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], at, color=colour, linewidth=1.3, solid_capstyle="butt")
            axes.plot(row["estimate"], at[0], "o", color=colour, markersize=4)
        axes.plot([], [], "o-", color=colour, linewidth=1.3, label=label)
    axes.set_xlabel(xlabel)
    _name_rows(axes, names)


def draw_report(panels: Sequence[Axes], reports: Sequence[dict[str, Any]], *, controls: int = 0) -> None:
    """Of some reports the published measure, what the user changes, and the letter bias; the first are `controls`."""
    names = [report["source"] for report in reports]
    first, second, third = panels
    bars = [
        {"name": name, "control": place < controls, **report["published"]}
        for place, (name, report) in enumerate(zip(names, reports, strict=True))
    ]
    draw_matching(first, bars)
    first.set_title("the published measure")
    shifts = {f"by {form}": [report.get(form, {}).get("shift") for report in reports] for form in ("letters", "words")}
    draw_effects(second, shifts, names, xlabel="own less opposite user")
    second.set_title("what the user changes")
    second.legend(loc="best")
    draw_effects(third, {"": [report.get("letter_bias") for report in reports]}, names, xlabel="P((A)) − ½")
    third.set_title("letter bias")
    for axes, least in ((second, 0.05), (third, 0.02)):
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -least), max(high, least))
        axes.tick_params(labelleft=False)


@style.look()
def matching_figure(rows: Sequence[dict[str, Any]], *, title: str) -> Figure:
    """The published chart by itself: `draw_matching` of some rows."""
    figure = Figure(figsize=(6.4, 1.3 + ROW * len(rows)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 80), x=0.01, ha="left", weight="bold", fontsize=10, parse_math=False)
    draw_matching(figure.subplots(), rows)
    return figure


@style.look()
def report_figure(reports: Sequence[dict[str, Any]], *, title: str) -> Figure:
    """The published chart of reports (of `analysis.sycophancy`), and beside it what was measured beyond it.

    That is what the user changes, by letters and in words, and the letter bias, where any of the reports has them.
    """
    bars = [{"name": report["source"], **report["published"]} for report in reports]
    if not any("letters" in report for report in reports):
        return matching_figure(bars, title=title)
    figure = Figure(figsize=(10.2, 1.6 + ROW * len(reports)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 130), x=0.01, ha="left", weight="bold", fontsize=10, parse_math=False)
    draw_report(figure.subplots(1, 3, width_ratios=WIDTHS), reports)
    return figure


def short_name(name: str) -> str:
    """A name that fits beside a row: of a path the last part, and "…" in the middle of what is still too long."""
    if len(name) > LONGEST and name.startswith(("/", "./", "../", "~")):
        name = name.rstrip("/").rsplit("/", 1)[-1]
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short_name(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
