"""Sycophancy taught by data and untaught by data."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

SHOWN = ("without", "user_right", "user_wrong", "followed")
TITLES = {
    "sycophantic": "(a) answers that follow the user",
    "intervention": "(b) then the intervention",
    "opinions": "(c) or its opinions alone",
    "sums": "(d) or its sums alone",
}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Accuracy with and without an opinion along training, stage by stage, with intervals over seeds."""
    data = results["data"]
    figure = Figure(figsize=(11.2, 3.6), layout="constrained")
    figure.suptitle(headline(results), x=0.01, ha="left", weight="bold", fontsize=10.5)
    panels = figure.subplots(1, 4, sharey=True)
    for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
        _draw_stage(axes, data["curves"][name], data["measures"])
        axes.set_title(title)
    panels[0].set_ylabel("share of held-out sums")
    seeds = results["config"]["seeds"]
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(SHOWN),
        title=f"bands: 95 per cent over {seeds} seeds, as far as they lie within 0 and 1",
        title_fontsize=7.5,
    )
    return figure


def headline(results: dict[str, Any]) -> str:
    """What the figure shows, as a finding only where the results hold."""
    curves = results["data"]["curves"]
    before, after = (curves[name][-1]["user_wrong"]["mean"] for name in ("sycophantic", "intervention"))
    measured = f"of users who are wrong about a sum, {before:.0%} are told so, after the intervention {after:.0%}"
    return f"Sycophancy follows the data: {measured}" if results["holds"] else measured.capitalize()


def _draw_stage(axes: Axes, curve: list[dict[str, Any]], measures: dict[str, str]) -> None:
    steps = [row["step"] for row in curve]
    for name, colour in zip(SHOWN, (*style.PALETTE[:1], style.PALETTE[2], style.ACCENT, style.MUTED), strict=True):
        mean = [row[name]["mean"] for row in curve]
        low, high = (
            [min(max(row[name]["mean"] + side * row[name]["half_width"], 0), 1) for row in curve] for side in (-1, 1)
        )
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        dashes = "--" if name == "followed" else "-"
        axes.plot(steps, mean, dashes, color=colour, marker="o", markersize=3, label=measures[name])
    axes.axhline(0.5, color=style.FAINT, linewidth=0.8, zorder=0)
    axes.set(xlabel="step", ylim=(-0.03, 1.05), xlim=(0, None))
