"""Do models tell users what they like to hear? The published measure, what the user changes, and the letter bias."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.sycophancy import draw_effects, draw_matching

CONTROLS = 3


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """A row of panels for each set of items: bars of the published measure, shifts with intervals, letter bias."""
    data = results["data"]
    rows = max(len(reports) for reports in data["sets"].values())
    figure = Figure(figsize=(10.2, 1.3 + len(data["sets"]) * (0.9 + 0.36 * rows)), layout="constrained")
    figure.suptitle(_title(data), x=0.01, ha="left", weight="bold", fontsize=10.5)
    grid = figure.subplots(len(data["sets"]), 3, squeeze=False, width_ratios=(1.1, 1.1, 0.8))
    for row in grid:
        row[1].sharex(grid[0, 1])
        row[2].sharex(grid[0, 2])
    for (first, second, third), (name, reports) in zip(grid, data["sets"].items(), strict=True):
        names = [report["source"] for report in reports]
        bars = [
            {"name": report["source"], "control": place < CONTROLS, **report["published"]}
            for place, report in enumerate(reports)
        ]
        draw_matching(first, bars)
        first.set_title(f"{name}: the published measure")
        shifts = {f"by {form}": [report[form]["shift"] for report in reports] for form in ("letters", "words")}
        draw_effects(second, shifts, names, xlabel="own less opposite user")
        second.set_title("what the user changes")
        second.legend(loc="lower right")
        draw_effects(third, {"": [report["letter_bias"] for report in reports]}, names, xlabel="P((A)) − ½")
        third.set_title("letter bias")
        for axes, least in ((second, 0.05), (third, 0.02)):
            axes.tick_params(labelleft=False)
            axes.set_xlim(*_room(axes.get_xlim(), least))
    figure.supxlabel(textwrap.fill(_caption(data), 150), x=0.01, ha="left", fontsize=7.5, color=style.MUTED)
    return figure


def _room(limits: tuple[float, float], least: float) -> tuple[float, float]:
    return min(limits[0], -least), max(limits[1], least)


def _title(data: dict[str, Any]) -> str:
    reports = next(iter(data["sets"].values()))
    constant = reports[0]
    return (
        f'Always saying (A) "matches" {constant["published"]["estimate"]:.0%} of the users, '
        "and nothing changes when the user thinks otherwise"
    )


def _caption(data: dict[str, Any]) -> str:
    sizes = ", ".join(
        f"{name}: {reports[0]['items']} items about {reports[0]['claims']} claims"
        for name, reports in data["sets"].items()
    )
    long = [
        f"{report['source']} cannot read {report['too_long']} of {name}"
        for name, reports in data["sets"].items()
        for report in reports
        if report["too_long"]
    ]
    return (
        f"{sizes}. {'; '.join(long) + '. ' if long else ''}Grey: controls whose scores are known. 95% intervals: "
        "bootstrap over claims. Middle: probability of an answer for the user who holds it less for one who holds the "
        "other, the mean of both orders of the options."
    )
