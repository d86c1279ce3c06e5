"""How alignment amplifies a slight taste for agreement."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

MARKS = {"DPO": "o", "PPO": "s", "RLOO": "^"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The law with exact optima on it, the same with a GPT-2, its deviations, and best-of-n."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    figure.suptitle(headline(results), x=0.01, ha="left", weight="bold", fontsize=10.5)
    (table, gpt2), (deviations, best) = figure.subplots(2, 2)
    colours = {curve["share"]: style.PALETTE[i % len(style.PALETTE)] for i, curve in enumerate(data["curves"])}
    _draw_table(table, data, colours)
    _draw_gpt2(gpt2, data, colours)
    _draw_deviations(deviations, data["gpt2"], colours)
    _draw_best(best, data["best_of_n"])
    return figure


def headline(results: dict[str, Any]) -> str:
    """What the figure shows, as a finding only where the results hold."""
    worst = max(abs(point["deviation"]) for point in results["data"]["gpt2"])
    if results["holds"]:
        return (
            "Alignment amplifies a slight taste for agreement: exact optima lie on the law, "
            f"a trained GPT-2 within {worst:.3f} of it"
        )
    return f"Agreement after alignment and its law: a trained GPT-2 is off it by up to {worst:.3f}"


def _draw_law(axes: Axes, curves: list[dict[str, Any]], colours: dict[float, str]) -> None:
    """A curve for each share that has points."""
    for curve in curves:
        axes.plot(curve["inverse_beta"], curve["agreement"], color=colours[curve["share"]], linewidth=1.2)
        place = (curve["inverse_beta"][0], curve["agreement"][0])
        axes.annotate(
            f"p = {curve['share']:g}", place, xytext=(-12, 0), textcoords="offset points", ha="right", va="center",
            fontsize=7.5, color=colours[curve["share"]],
        )  # fmt: skip
    first, last = curves[0]["inverse_beta"][0], curves[0]["inverse_beta"][-1]
    axes.set(xscale="log", xlim=(first * 0.5, last * 1.15), ylim=(0, 1.03), xlabel="1/β (nats per reward)")
    axes.set_xticks([1, 2, 4, 10], ["1", "2", "4", "10"])
    axes.set_xticks([], minor=True)
    axes.set_ylabel("probability of agreement")


def _draw_table(axes: Axes, data: dict[str, Any], colours: dict[float, str]) -> None:
    _draw_law(axes, data["curves"], colours)
    table = {name: np.asarray(values) for name, values in data["table"].items() if isinstance(values, list)}
    half = table["reference"] == 0.5
    for way, mark, size in (("dpo", "o", 6), ("rlhf", "x", 4)):
        for share, colour in colours.items():
            chosen = half & (table["share"] == share)
            axes.plot(
                1 / table["beta"][chosen], table[way][chosen], mark, color=colour, markersize=size, fillstyle="none"
            )
    axes.set_title("(a) a table, π_ref = ½: ○ DPO, × RLHF")


def _draw_gpt2(axes: Axes, data: dict[str, Any], colours: dict[float, str]) -> None:
    shares = {point["share"] for point in data["gpt2"]}
    _draw_law(axes, [curve for curve in data["curves"] if curve["share"] in shares], colours)
    shift = {"DPO": 1.0, "PPO": 1.06, "RLOO": 0.94}  # beside each other, not upon each other
    for point in data["gpt2"]:
        if point["reference"] == 0.5:
            axes.errorbar(
                shift[point["method"]] / point["beta"],
                point["mean"],
                _within_0_and_1(point["mean"], point["half_width"]),
                color=colours[point["share"]],
                marker=MARKS[point["method"]],
                markersize=4.5,
                linewidth=0,
                elinewidth=1,
                markerfacecolor="white",
            )
    used = dict.fromkeys(point["method"] for point in data["gpt2"])
    for method in used:
        axes.plot([], [], MARKS[method], color=style.MUTED, markerfacecolor="white", label=method)
    axes.legend(loc="lower right")
    axes.set_title("(b) a GPT-2, π_ref = ½: means over seeds")


def _within_0_and_1(mean: float, half_width: float) -> list[list[float]]:
    """An interval of a probability as error bars: down, up."""
    return [[min(half_width, mean)], [min(half_width, 1 - mean)]]


def _draw_deviations(axes: Axes, points: list[dict[str, Any]], colours: dict[float, str]) -> None:
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    for point in points:
        axes.errorbar(
            point["law"],
            point["deviation"],
            point["deviation_half_width"],
            color=colours[point["share"]],
            marker=MARKS[point["method"]],
            markersize=4.5,
            linewidth=0,
            elinewidth=1,
            markerfacecolor="white" if point["reference"] == 0.5 else None,
        )
    axes.set(xlabel="the law", ylabel="measured − law", xlim=(0, 1.02))
    axes.set_title("(c) deviation, 95 per cent; filled: π_ref not ½")


def _draw_best(axes: Axes, best: list[dict[str, Any]]) -> None:
    for each, colour in zip(best, style.PALETTE, strict=False):
        sizes = [row["n"] for row in each["sizes"]]
        label = f"π_ref ≈ {each['reference']:g}"
        axes.plot(sizes, [row["law"] for row in each["sizes"]], color=colour, linewidth=1.2, label=label)
        axes.plot(sizes, [row["sampled"] for row in each["sizes"]], "o", color=colour, markerfacecolor="white")
    axes.set(xscale="log", xlabel="n", ylabel="the best of n agrees", ylim=(0, 1.03))
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_xticks([], minor=True)
    axes.legend(loc="lower right")
    axes.set_title("(d) best of n draws of the GPT-2: 1 − (1 − π_ref)ⁿ")
