"""How far each trainer is from the optimum of RLHF, step by step."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """KL(π‖π*) against steps: solid lines for what should arrive, dashed ones for what has one thing wrong."""
    data = results["data"]
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    arrived = [curve for curve in data["curves"] if curve["arrives"]]
    worst = max(curve["distance"]["high"][-1] for curve in arrived)
    figure.suptitle(
        f"The trainers of a GPT-2 on a table: {len(arrived)} end {worst:.0e} nats from the optimum or nearer",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10.5,
    )
    axes = figure.subplots()
    axes.axhspan(1e-8, data["near"], color=style.FAINT, alpha=0.35, linewidth=0)
    axes.annotate(
        f"reached: below {data['near']:g} nats", (1.2, data["near"]), xytext=(0, -11), textcoords="offset points",
        color=style.MUTED, fontsize=8,
    )  # fmt: skip
    for place, curve in enumerate(data["curves"]):
        _draw_curve(axes, curve, style.PALETTE[place % len(style.PALETTE)])
    axes.set(xscale="symlog", yscale="log", xlabel="step", ylabel="KL(π‖π*) (nats)", xlim=(0, None), ylim=(1e-7, 4))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure


def _draw_curve(axes: Axes, curve: dict[str, Any], colour: str) -> None:
    distance = curve["distance"]
    axes.fill_between(distance["step"], distance["low"], distance["high"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        distance["step"],
        distance["mean"],
        color=colour,
        linestyle="-" if curve["arrives"] else "--",
        linewidth=1.4,
        label=curve["name"],
    )
