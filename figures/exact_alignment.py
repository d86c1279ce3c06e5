"""Trainers against the known optimum of RLHF."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

ENDS = {"arrives": "-", "another fixed point": (0, (5, 1.5)), "deliberate mistake": (0, (1.5, 1.2))}
COLOURS = (*style.PALETTE, "#8b5e3c", "#7f3fbf", style.MUTED)


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the share that is left against steps, and at the end of the run on every table."""
    data, config = results["data"], results["config"]
    curves, tables = data["curves"], len(data["curves"][0]["left"])
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    style.headline(figure, _title(data, tables))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    (arriving, others), ends = left.subplots(2, 1, sharex=True), right.subplots()
    colours = {curve["name"]: colour for curve, colour in zip(curves, COLOURS, strict=True)}
    for axes, arrives, title in (
        (arriving, True, "(a) trainers whose optimum is RLHF's"),
        (others, False, "(b) other fixed points, deliberate mistakes"),
    ):
        for curve in curves:
            if (curve["ends"] == "arrives") is arrives:
                _draw_curve(axes, curve, colours[curve["name"]])
        _draw_near(axes.axhline, data["near"])
        axes.set(xscale="symlog", yscale="log", ylabel="share of the gain left")
        axes.set_xlim(0, config["steps"])
        axes.set_title(title)
    others.set_ylim(data["near"] ** 2, 2)
    arriving.text(0.02, 0.04, f"lines: median of {tables} tables\nbands: range of {tables} tables", fontsize=7.5,
                  transform=arriving.transAxes, color=style.MUTED)  # fmt: skip
    others.set_xlabel(f"step, each on {config['answers']} sampled answers (DPO: on all pairs)")
    _draw_ends(ends, curves, colours, data["near"])
    ends.set_title("(c) the end, by table (bar: median)")
    return figure


def _title(data: dict[str, Any], tables: int) -> str:
    arrived = {each["name"]: sum(left < data["near"] for left in each["left"]) for each in data["curves"]}
    right = [arrived[each["name"]] for each in data["curves"] if each["ends"] == "arrives"]
    some = f"{min(right)} to {max(right)}" if min(right) < max(right) else f"{min(right)}"
    published = arrived["GRPO as published (k3 in the loss)"]
    return (
        f"{len(right)} trainers reach RLHF's optimum on {some} of {tables} random tables, "
        f"GRPO as published (k3 in the loss) on {published}"
    )


def _draw_near(line: Any, near: float) -> None:
    line(near, color=style.INK, linewidth=0.8, linestyle="--")


def _draw_curve(axes: Axes, curve: dict[str, Any], colour: str) -> None:
    share = curve["share"]
    axes.fill_between(share["step"], share["low"], share["high"], color=colour, alpha=0.12, linewidth=0)
    axes.plot(share["step"], share["median"], color=colour, linestyle=ENDS[curve["ends"]], linewidth=1.5)


def _draw_ends(axes: Axes, curves: list[dict[str, Any]], colours: dict[str, str], near: float) -> None:
    for row, curve in enumerate(curves):
        axes.plot(curve["left"], [row] * len(curve["left"]), "o", color=colours[curve["name"]], alpha=0.55,
                  markersize=4.5, markeredgewidth=0)  # fmt: skip
        axes.plot([curve["share"]["median"][-1]] * 2, [row - 0.3, row + 0.3], color=colours[curve["name"]], linewidth=2)
    names = {
        "arrives": "{name}",
        "another fixed point": "{name}:\nanother fixed point",
        "deliberate mistake": "deliberate mistake:\n{name}",
    }
    axes.set_yticks(range(len(curves)), [names[curve["ends"]].format(name=curve["name"]) for curve in curves])
    for label, curve in zip(axes.get_yticklabels(), curves, strict=True):
        label.set_color(colours[curve["name"]])
    _draw_near(axes.axvline, near)
    axes.annotate(f"arrived: below {near:.0%}", (near, -0.75), xytext=(-4, 0), textcoords="offset points", ha="right",
                  va="center", fontsize=7.5)  # fmt: skip
    axes.set(xscale="log", ylim=(len(curves) - 0.5, -1.1), xlabel="share of the gain left, (J* − J)/(J* − J(ref))")
    axes.grid(axis="y", visible=False)
