"""The reward-model loss over all pairs of a prompt: what it bounds, and against shuffled comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

COLOURS = {"grouped": style.PALETTE[0], "shuffled": style.PALETTE[1], "matched": style.PALETTE[2]}
NAMES = {"grouped": "grouped by prompt", "shuffled": "shuffled, same rate", "matched": "shuffled, matched rate"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Above: the margin's flow, the bound on a gradient, the optimum. Below: the three arms."""
    data = results["data"]
    numbers = {entry["name"]: entry["value"] for entry in results["numbers"]}
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    figure.suptitle(
        "The loss bounds the push on an answer, 2/K, not the margin; grouping by prompt is a smaller step",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    panels = figure.subplots(2, 3)
    _draw_flow(panels[0, 0], data["flow"], numbers)
    _draw_bounds(panels[0, 1], data["bounds"])
    _draw_optima(panels[0, 2], data["optima"])
    _draw_arms(panels[1, 0], data, "margin", "mean margin on training pairs (log-odds)")
    panels[1, 0].set_title("(d) margin, mean ± 2 s.e.")
    _draw_arms(panels[1, 1], data, "held_out_loss", "loss on held-out pairs (nats)")
    panels[1, 1].set_title("(e) held-out loss")
    _draw_rates(panels[1, 2], data)
    return figure


def _draw_flow(axes: Axes, flow: dict[str, Any], numbers: dict[str, float]) -> None:
    time, margin = np.asarray(flow["time"]), np.asarray(flow["margin"])
    law = np.linspace(0.02, margin[-1], 200)
    axes.plot((np.exp(law) + law - 1) / 2, law, color=style.FAINT, linewidth=5, label="e^Δ + Δ = 2t + 1")
    axes.plot(time, margin, color=style.PALETTE[0], label="flow on two scores")
    axes.plot(time[-1], margin[-1], "o", color=style.PALETTE[0])
    value = next(value for name, value in numbers.items() if name.startswith("Δ(1000)"))
    axes.annotate(
        f"Δ(1000) = {value:.3f}", (time[-1], margin[-1]), xytext=(-10, -3), textcoords="offset points", ha="right"
    )
    axes.set(xscale="log", xlabel="time t", ylabel="margin Δ (log-odds)", ylim=(0, None), xlim=(0.05, 2000))
    axes.set_title("(a) one pair: slower and slower, no end")
    axes.legend(loc="lower right")


def _draw_bounds(axes: Axes, bounds: list[dict[str, Any]]) -> None:
    for colour, each in zip(style.PALETTE, bounds, strict=False):
        bound = 2 / each["size"]
        axes.axhline(bound, color=colour, linewidth=0.8, linestyle="--")
        axes.plot(each["scale"], each["largest"], color=colour)
        axes.annotate(
            f"2/K, K = {each['size']}",
            (100, bound),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set(
        xscale="log",
        xlabel="spread of random scores (log-odds)",
        ylabel="largest gradient of an answer",
        ylim=(0, 1.12),
    )
    axes.set_title("(b) no answer is pushed harder than 2/K")


def _draw_optima(axes: Axes, optima: dict[str, Any]) -> None:
    p = np.linspace(0.48, 0.993, 200)
    axes.plot(p, np.log(p / (1 - p)), color=style.FAINT, linewidth=5, label="logit p")
    axes.plot(optima["probability"], optima["margin"], "o", color=style.PALETTE[0], label="gradient descent")
    place = optima["probability"].index(0.73)
    axes.annotate(
        f"p = 0.73: {optima['margin'][place]:.3f}",
        (0.73, optima["margin"][place]),
        xytext=(-4, 14),
        textcoords="offset points",
        ha="right",
        arrowprops={"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.7},
    )
    axes.set(xlabel="probability p that the label holds", ylabel="optimal margin Δ* (log-odds)")
    axes.set_title("(c) noisy labels end the growth")
    axes.legend(loc="upper left")


def _draw_arms(axes: Axes, data: dict[str, Any], field: str, label: str) -> None:
    for arm, curve in data["arms"].items():
        epoch, mean = np.asarray(curve["epoch"]), np.asarray(curve[field]["mean"])
        error = 2 * np.asarray(curve[field]["error"])
        dashes = (0, (4, 2)) if arm == "matched" else "-"
        axes.fill_between(epoch, mean - error, mean + error, color=COLOURS[arm], alpha=0.2, linewidth=0)
        axes.plot(epoch, mean, color=COLOURS[arm], linestyle=dashes, label=NAMES[arm])
    if field == "margin":
        axes.legend(loc="upper left")
        axes.set_ylim(0, 1.25 * _largest_mean(data, "margin"))
    axes.axvline(1, color=style.EDGE, linewidth=0.7, linestyle=":")
    axes.set(xlabel="epochs", ylabel=label, xlim=(0, None))


def _largest_mean(data: dict[str, Any], field: str) -> float:
    """The largest mean of a field over the arms."""
    return max(max(curve[field]["mean"]) for curve in data["arms"].values())


def _draw_rates(axes: Axes, data: dict[str, Any]) -> None:
    for arm, curve in data["arms"].items():
        mean, error = (np.asarray(curve["after_one_epoch"][part]) for part in ("mean", "error"))
        line = (0, (4, 2)) if arm == "matched" else "-"
        axes.errorbar(
            data["learning_rates"],
            mean,
            2 * error,
            color=COLOURS[arm],
            linestyle=line,
            marker="o",
            markersize=3,
            capsize=0,
        )
    axes.axvline(data["shown_rate"], color=style.EDGE, linewidth=0.7, linestyle=":")
    axes.annotate(
        "(d), (e)",
        (data["shown_rate"], 1.16),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=style.MUTED,
    )
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss after one epoch (nats)", ylim=(0.58, 1.2))
    axes.set_title("(f) one epoch at other rates")
