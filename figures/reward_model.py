"""The reward-model loss over all pairs of a prompt: what it bounds, and against shuffled comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from jaxrl_llm.plots import style

COLOURS = {"grouped": style.PALETTE[0], "shuffled": style.PALETTE[1], "matched": style.PALETTE[2]}
NAMES = {"grouped": "grouped by prompt", "shuffled": "shuffled, same rate", "matched": "shuffled, matched rate"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the margin's flow, the bound on a gradient, the optimum; below, the three arms by SGD and by Adam."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 8.9), layout="constrained")
    finding = (
        "The loss bounds the gradient on an answer by 2/K, not the margin. On a linear model, a rate matched per\n"
        "comparison removes what shuffling adds under SGD, but not under Adam; each at its best rate, shuffling wins"
    )
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    panels = figure.subplots(3, 3)
    _draw_flow(panels[0, 0], data["flow"])
    _draw_bounds(panels[0, 1], data["bounds"])
    _draw_optima(panels[0, 2], data["optima"])
    for row, letters, (name, trained) in zip(panels[1:], ("def", "ghi"), data["arms"].items(), strict=True):
        _draw_arms(row[0], trained, "margin", "mean margin on training pairs (log-odds)")
        row[0].set_title(f"({letters[0]}) {name}, rate {trained['shown']:g}: margin")
        _draw_arms(row[1], trained, "held_out_loss", "loss on held-out pairs (nats)")
        row[1].set_title(f"({letters[1]}) {name}, rate {trained['shown']:g}: held-out loss")
        _draw_rates(row[2], trained, f"({letters[0]}), ({letters[1]})")
        row[2].set_title(f"({letters[2]}) {name}: one epoch at other rates")
    panels[1, 0].legend(loc="upper left", title=f"mean of {data['seeds']} seeds, 95% interval", title_fontsize=7.5)
    figure.align_ylabels(panels)
    return figure


def _draw_flow(axes: Axes, flow: dict[str, Any]) -> None:
    time, margin = np.asarray(flow["time"]), np.asarray(flow["margin"])
    exact = np.linspace(0.02, margin[-1], 200)
    axes.plot((np.exp(exact) + exact - 1) / 2, exact, color=style.FAINT, linewidth=5, label="$e^Δ + Δ = 2t + 1$")
    axes.plot(time, margin, color=style.PALETTE[0], label="flow on two scores")
    axes.plot(time[-1], margin[-1], "o", color=style.PALETTE[0])
    axes.annotate(
        f"Δ({time[-1]:g}) = {margin[-1]:.3f}",
        (time[-1], margin[-1]),
        xytext=(-10, -3),
        textcoords="offset points",
        ha="right",
    )
    axes.set(
        xscale="log", xlabel="time t of gradient flow", ylabel="margin Δ (log-odds)", ylim=(0, None), xlim=(0.05, 2000)
    )
    axes.set_title("(a) one pair: slower, without end")
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
        ylabel="largest |gradient| of an answer\n(nats per log-odds)",
        ylim=(0, 1.12),
    )
    axes.set_title("(b) no push is above 2/K")


def _draw_optima(axes: Axes, optima: dict[str, Any]) -> None:
    p = np.linspace(0.48, 0.993, 200)
    axes.plot(p, np.log(p / (1 - p)), color=style.FAINT, linewidth=5, label="logit p")
    axes.plot(optima["probability"], optima["margin"], "o", color=style.PALETTE[0], label="gradient descent")
    agreed = optima["agreed"]
    axes.plot(agreed["probability"], agreed["margin"], "D", color=style.ACCENT, markersize=5)
    axes.annotate(
        f"two labellers agree on {agreed['agreement']:.1%}:\n"
        f"p = {agreed['probability']:.3f}, Δ* = {agreed['margin']:.2f}",
        (agreed["probability"], agreed["margin"]),
        xytext=(-8, 16),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=style.ACCENT,
        arrowprops={"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.7},
    )
    axes.set(xlabel="probability p that the label holds", ylabel="optimal margin Δ* (log-odds)")
    axes.set_title("(c) noisy labels end the growth")
    axes.legend(loc="upper left")


def _draw_arms(axes: Axes, trained: dict[str, Any], field: str, label: str) -> None:
    for arm, curves in trained["arms"].items():
        mean, low, high = (np.asarray(curves[field][part]) for part in ("mean", "low", "high"))
        dashes = (0, (4, 2)) if arm == "matched" else "-"
        axes.fill_between(trained["epoch"], low, high, color=COLOURS[arm], alpha=0.2, linewidth=0)
        axes.plot(trained["epoch"], mean, color=COLOURS[arm], linestyle=dashes, label=NAMES[arm])
    if field == "margin":
        axes.set_ylim(0, 1.5 * max(max(curves[field]["mean"]) for curves in trained["arms"].values()))
    axes.axvline(1, color=style.EDGE, linewidth=0.7, linestyle=":")
    axes.text(1, 0.01, " 1 epoch", transform=axes.get_xaxis_transform(), fontsize=7, color=style.MUTED)
    axes.set(xlabel="epochs", ylabel=label, xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _draw_rates(axes: Axes, trained: dict[str, Any], shown_in: str) -> None:
    for arm, curves in trained["arms"].items():
        mean, low, high = (np.asarray(curves["after_one_epoch"][part]) for part in ("mean", "low", "high"))
        line = (0, (4, 2)) if arm == "matched" else "-"
        bars = [mean - low, high - mean]
        axes.errorbar(trained["rates"], mean, bars, color=COLOURS[arm], linestyle=line, marker="o", markersize=3)
    axes.axvline(trained["shown"], color=style.EDGE, linewidth=0.7, linestyle=":")
    axes.text(
        trained["shown"], 0.95, f"{shown_in} ", transform=axes.get_xaxis_transform(), ha="right", fontsize=7,
        color=style.MUTED,
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss after one epoch (nats)")
    ticks = [0.6, 1, 2, 4, 8]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
