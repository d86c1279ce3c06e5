"""Sycophancy taught by data and untaught by data."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

SHOWN = {
    "without": (style.PALETTE[0], "-"),
    "user_right": (style.PALETTE[2], "-"),
    "user_wrong": (style.ACCENT, "-"),
    "followed": (style.MUTED, "--"),
}
TITLES = {
    "sycophantic": "(a) answers that follow the user",
    "intervention": "(b) then the intervention",
    "sums": "(c) or sums without users alone",
}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw accuracy with and without an opinion along training, stage by stage, with the range over seeds."""
    return stages(results, TITLES, headline(results))


def stages(results: dict[str, Any], titles: dict[str, str], title: str) -> Figure:
    """Return a figure with a panel for each stage."""
    data = results["data"]
    figure = Figure(figsize=(3.2 * len(titles), 3.7), layout="constrained")
    style.headline(figure, title)
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (name, above) in zip(panels, titles.items(), strict=True):
        _draw_stage(axes, data["curves"][name], data["measures"])
        axes.set_title(above)
    panels[0].set_ylabel("share of held-out sums")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        title=f"lines: means; bands: range over {results['config']['seeds']} seeds; dotted: chance",
        title_fontsize=7.5,
    )
    return figure


def headline(results: dict[str, Any]) -> str:
    """Return what the figure shows, as a finding only where the results hold."""
    before, after = (results["data"]["curves"][stage][-1]["user_wrong"] for stage in ("sycophantic", "intervention"))
    told = (
        f"of users who are wrong about a sum, at most {max(before):.0%} are told so, after the intervention at least "
        f"{min(after):.0%}"
    )
    return f"Sycophancy follows the data:\n{told}" if results["holds"] else told.capitalize()


def _draw_stage(axes: Axes, curve: list[dict[str, Any]], measures: dict[str, str]) -> None:
    steps = [row["step"] for row in curve]
    for name, (colour, dashes) in SHOWN.items():
        shares = [row[name] for row in curve]
        axes.fill_between(steps, list(map(min, shares)), list(map(max, shares)), color=colour, alpha=0.15, linewidth=0)
        means = [sum(each) / len(each) for each in shares]
        axes.plot(steps, means, dashes, color=colour, marker="o", markersize=3, label=measures[name])
    axes.axhline(0.5, color=style.EDGE, linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xlabel="step", ylim=(-0.03, 1.05), xlim=(0, None))
