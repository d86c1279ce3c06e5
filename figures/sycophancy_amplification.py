"""Amplification of a slight preference for agreement."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

MARKS = {"DPO": "o", "PPO": "s", "RLOO": "^"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the prediction with exact optima on it, the same with a GPT-2, its deviations, and best-of-n."""
    data, config = results["data"], results["config"]
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    style.headline(figure, headline(results))
    (table, gpt2), (deviations, best) = figure.subplots(2, 2)
    colours = {curve["share"]: style.PALETTE[i % len(style.PALETTE)] for i, curve in enumerate(data["curves"])}
    _draw_table(table, data, colours)
    _draw_gpt2(gpt2, data, colours)
    _draw_deviations(deviations, data["gpt2"], colours)
    _draw_best(best, data["best_of_n"])
    figure.supxlabel(
        f"The GPT-2: layers: {config['layers']}, width: {config['width']}, answers of one token to "
        f"{2 * config['words'] ** 2} prompts. π: probability that the reference agrees. "
        f"p: share of annotators who prefer agreement.\n"
        f"Bars in (b) and (c): 95% intervals over {config['seeds']} seeds. Marks in (c) are those of (b).",
        x=0.01, ha="left", fontsize=7.5, color=style.MUTED,
    )  # fmt: skip
    return figure


def headline(results: dict[str, Any]) -> str:
    """Return what the figure shows, as a finding only where the results hold."""
    if results["holds"]:
        return (
            "Alignment amplifies a slight taste for agreement: exact optima are as predicted, "
            "a small GPT-2 within 0.02 of it"
        )
    worst = max(abs(point["deviation"]) for point in results["data"]["gpt2"])
    return f"Agreement after alignment and its prediction: a small GPT-2 is off it by up to {worst:.3f}"


def _draw_law(axes: Axes, curves: list[dict[str, Any]], colours: dict[float, str]) -> None:
    """Draw a curve for each share that has points."""
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
    for mark, label in (("o", "DPO"), ("x", "RLHF")):
        axes.plot([], [], mark, color=style.MUTED, fillstyle="none", label=label)
    axes.plot([], [], color=style.MUTED, linewidth=1.2, label="the prediction")
    _head(axes, "(a) exact optima on a table, from π = 0.5")


def _draw_gpt2(axes: Axes, data: dict[str, Any], colours: dict[float, str]) -> None:
    shares = {point["share"] for point in data["gpt2"]}
    _draw_law(axes, [curve for curve in data["curves"] if curve["share"] in shares], colours)
    shift = {"DPO": 1.0, "PPO": 1.06, "RLOO": 0.94}  # beside each other, not upon each other
    for point in data["gpt2"]:
        if point["reference"] == 0.5:
            axes.errorbar(
                shift[point["method"]] / point["beta"],
                point["mean"],
                _within_0_and_1(point),
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
    axes.plot([], [], color=style.MUTED, linewidth=1.2, label="the prediction")
    _head(axes, "(b) the GPT-2, from π = 0.5: means over seeds")


def _head(axes: Axes, title: str) -> None:
    """Set the title, and the key between it and the panel, where it covers no curve."""
    count = len(axes.get_legend_handles_labels()[0])
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=count, borderaxespad=0.1, handlelength=1.4, columnspacing=1
    )
    axes.set_title(title, pad=17)


def _within_0_and_1(point: dict[str, Any]) -> list[list[float]]:
    """Return the interval of a probability as error bars: down, up."""
    mean = point["mean"]
    return [[mean - max(point["low"], 0)], [min(point["high"], 1) - mean]]


def _draw_deviations(axes: Axes, points: list[dict[str, Any]], colours: dict[float, str]) -> None:
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    for point in points:
        axes.errorbar(
            point["prediction"],
            point["deviation"],
            [[point["deviation"] - point["deviation_low"]], [point["deviation_high"] - point["deviation"]]],
            color=colours[point["share"]],
            marker=MARKS[point["method"]],
            markersize=4.5,
            linewidth=0,
            elinewidth=1,
            markerfacecolor=_filled(point["reference"]),
        )
    for share in sorted({point["share"] for point in points}):
        axes.plot([], [], "-", color=colours[share], label=f"p = {share:g}")
    for aim in sorted({point["reference"] for point in points}, reverse=True):
        axes.plot([], [], "o", color=style.MUTED, markerfacecolor=_filled(aim), label=f"from π = {aim:g}")
    axes.set(xlabel="predicted agreement", ylabel="measured − predicted agreement", xlim=(0, 1.02))
    _head(axes, "(c) deviation, for the users of the opinion further off")


def _filled(reference: float) -> str | None:
    """Return the face of a mark: white from a reference of ½."""
    return "white" if reference == 0.5 else None


def _draw_best(axes: Axes, best: list[dict[str, Any]]) -> None:
    for each, colour in zip(best, style.PALETTE, strict=False):
        sizes = [row["n"] for row in each["sizes"]]
        label = f"from π ≈ {each['reference']:g}"
        axes.plot(sizes, [row["prediction"] for row in each["sizes"]], color=colour, linewidth=1.2, label=label)
        axes.plot(sizes, [row["sampled"] for row in each["sizes"]], "o", color=colour, markerfacecolor="white")
    axes.set(xscale="log", xlabel="n", ylabel="probability that the best of n agrees", ylim=(0, 1.03))
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_xticks([], minor=True)
    _head(axes, "(d) best of n draws; lines: 1 − (1 − π)ⁿ")
