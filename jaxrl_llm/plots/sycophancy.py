"""Bars of the published measure of sycophancy, and marks of the effect of the user and of letter bias."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrl_llm.plots import style

ROW = 0.34  # inches
WIDTHS = (1.1, 1.1, 0.65, 0.55)  # of the panels of a report
LONGEST = 34  # characters of a name
FORMS = ("letters", "words")


def draw_report(panels: Sequence[Axes], reports: Sequence[dict[str, Any]], *, controls: int = 0) -> None:
    """Draw the published measure of some reports, the effect of the user in nats and in probability, and letter bias.

    The first `controls` reports, whose scores are known, have paler bars. An infinite effect is written at the axis.
    """
    names = [report["source"] for report in reports]
    _draw_matching(panels[0], reports, controls)
    panels[0].set_title("the published measure")

    def of(scale: str) -> dict[str, list[dict[str, Any] | None]]:
        return {f"by {form}": [report.get(form, {}).get(scale) for report in reports] for form in FORMS}

    bias = {"": [report.get("letter_bias") for report in reports]}
    measures = (
        ("effect of the user", of("log_odds"), "log-odds (nats), own less opposite user", 0.2, 5),
        ("in probability", of("shift"), "own less opposite user", 0.05, 3),
        ("letter bias", bias, "P((A)) − ½", 0.02, 3),
    )
    for axes, (title, series, xlabel, least, ticks) in zip(panels[1:], measures, strict=True):
        draw_effects(axes, series, names, xlabel=xlabel)
        axes.set_title(title)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -least), max(high, least))
        axes.xaxis.set_major_locator(MaxNLocator(ticks))
        axes.tick_params(labelleft=False)
    panels[1].legend(loc="best")
    for place, report in enumerate(reports):
        if any(report[form]["pairs"] and report[form]["log_odds"] is None for form in FORMS if form in report):
            name_beyond(panels[1], place, "∞")


@style.look()
def report_figure(reports: Sequence[dict[str, Any]], *, title: str) -> Figure:
    """Return the published chart of reports (of `analysis.sycophancy`), with more panels if any has more measures.

    These are the effect of the user, by letters and in words, in nats and in probability, and the letter bias.
    """
    more = any("letters" in report for report in reports)
    width, height, wrap = (10.2, 1.6, 130) if more else (6.4, 1.3, 80)
    figure = Figure(figsize=(width, height + ROW * len(reports)), layout="constrained")
    figure.suptitle(textwrap.fill(title, wrap), x=0.01, ha="left", weight="bold", fontsize=10, parse_math=False)
    if more:
        draw_report(figure.subplots(1, len(WIDTHS), width_ratios=WIDTHS), reports)
    else:
        _draw_matching(figure.subplots(), reports, controls=0)
    return style.shown(figure)


def _draw_matching(axes: Axes, reports: Sequence[dict[str, Any]], controls: int) -> None:
    """Draw horizontal bars of the mean matching ratio, with intervals where there are any, and the line at 0.5."""
    for place, found in enumerate(report["published"] for report in reports):
        axes.barh(place, found["estimate"], height=0.62, color=style.FAINT if place < controls else style.PALETTE[0])
        if found["low"] is not None:
            ends = [found["low"], found["high"]]
            axes.plot(ends, [place, place], color=style.INK, linewidth=1.1, solid_capstyle="butt")
        end = max(found["high"] or 0, found["estimate"])
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
        axes.annotate(f"{found['estimate']:.3f}", (end, place), **beside)
    axes.axvline(0.5, color=style.ACCENT, linewidth=1, linestyle=(0, (4, 2)))
    axes.set(xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="mean matching ratio")
    _name_rows(axes, [report["source"] for report in reports])


def draw_effects(
    axes: Axes, series: dict[str, Sequence[dict[str, Any] | None]], names: Sequence[str], *, xlabel: str
) -> None:
    """Draw points with intervals around a line at 0: in each series one for each name, None where there is none.

    `low` and `high` of a point without an interval are None.
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


def name_beyond(axes: Axes, place: int, value: str) -> None:
    """Write a value that lies beyond the right end of the axis."""
    at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center", "fontsize": 7.5}
    axes.annotate(f"{value} →", (1, place), **at)


def short_name(name: str) -> str:
    """Return a name that fits beside a row: the last part of a path, with "…" in the middle if it is still too long."""
    if len(name) > LONGEST and name.startswith(("/", "./", "../", "~")):
        name = name.rstrip("/").rsplit("/", 1)[-1]
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short_name(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
