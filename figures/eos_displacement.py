"""DPO that moves probability out of EOS instead of the word before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

NEAR = 0.02  # the promise


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the deviations of words and of whole answers from the prediction, and the probabilities of EOS."""
    points, config = results["data"]["points"], results["config"]
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    style.headline(figure, headline(points))
    off, eos = figure.subplots(1, 2)
    _draw_deviations(off, points)
    _draw_eos(eos, points)
    figure.supxlabel(
        f"A GPT-2 (layers: {config['layers']}, width: {config['width']}) whose reference agrees with "
        f"{config['reference']:.0%} of users; {config['share']:.0%} of annotators prefer agreement. Each mark is a\n"
        f"mean over the prompts of users of one opinion, of one of {config['seeds']} seeds.",
        x=0.01, ha="left", fontsize=7.5, color=style.MUTED,
    )  # fmt: skip
    return figure


def headline(points: list[dict[str, Any]]) -> str:
    """Return the largest deviation of a word and of a whole answer."""
    word, whole = (max(np.abs(point[name]).max() for point in points) for name in ("word_off", "whole_off"))
    return (
        f"DPO on a word and EOS: off the prediction by up to {word:.2f} for the word, {whole:.2f} for the whole answer"
    )


def _draw_deviations(axes: Axes, points: list[dict[str, Any]]) -> None:
    series = (("whole_off", "whole answer", style.PALETTE[0], "o"), ("word_off", "its word", style.ACCENT, "s"))
    for place, point in enumerate(points):
        for side, (name, _, colour, mark) in zip((-0.16, 0.16), series, strict=True):
            values = np.ravel(point[name])
            spread = np.linspace(-0.1, 0.1, len(values))
            axes.plot(place + side + spread, values, mark, color=colour, markersize=3.5, markerfacecolor="white")
    for _, label, colour, mark in series:
        axes.plot([], [], mark, color=colour, markerfacecolor="white", label=label)
    axes.axhspan(-NEAR, NEAR, color=style.FAINT, linewidth=0, zorder=0, label=f"promised: ± {NEAR}")
    axes.set_xticks(range(len(points)), [f"β = {point['beta']:g}" for point in points])
    axes.set_ylabel("probability of agreement − the prediction")
    axes.legend(loc="lower left")
    axes.set_title("(a) deviation from the prediction")


def _draw_eos(axes: Axes, points: list[dict[str, Any]]) -> None:
    lowest = 1.0
    for point, colour in zip(points, style.PALETTE, strict=False):
        first, second = (np.ravel(point[f"eos_after_{name}"]) for name in ("disagreeing", "agreeing"))
        axes.plot(
            first, second, "o", color=colour, markersize=4, markerfacecolor="white", label=f"β = {point['beta']:g}"
        )
        lowest = min(lowest, first.min(), second.min())
    axes.plot([lowest, 1], [lowest, 1], color=style.MUTED, linewidth=0.9, label="equal: the word is as predicted")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="probability of EOS after the disagreeing word",
        ylabel="probability of EOS after the agreeing word",
    )
    exponents = range(0, int(np.floor(np.log10(lowest))) - 1, -4 if lowest < 1e-6 else -1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([10.0**each for each in exponents], [f"1e{each}" if each else "1" for each in exponents])
        axis.set_ticks([], minor=True)
    axes.legend(loc="lower right")
    axes.set_title("(b) EOS after either word")
