"""DPO finds the optimum of RLHF."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the loss from log 2 to the labels' entropy, the implied against the true reward, and finite samples."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    finding = "DPO on a population's preferences ends at RLHF's optimum π*; from n pairs its median KL falls as 1/n"
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    loss, reward, pairs = figure.subplots(1, 3)
    _draw_loss(loss, data)
    _draw_reward(reward, data)
    _draw_pairs(pairs, data["samples"], data["asymptotic"])
    return figure


def _draw_loss(axes: Axes, data: dict[str, Any]) -> None:
    axes.plot(data["loss"], color=style.PALETTE[0], marker="o", markersize=2.5)
    for level, label, above in ((np.log(2), "log 2: policy = reference", True),
                                (data["label_entropy"], "entropy of the labels", False)):  # fmt: skip
        axes.axhline(level, color=style.MUTED, linestyle="--", linewidth=1)
        axes.annotate(label, (len(data["loss"]) - 1, level), xytext=(0, 4 if above else -11), ha="right",
                      textcoords="offset points", color=style.MUTED, fontsize=7.5)  # fmt: skip
    axes.margins(y=0.12)
    axes.set(xlabel="Newton step", ylabel="population DPO loss (nats)")
    axes.set_title("(a) as low as any model gets")


def _draw_reward(axes: Axes, data: dict[str, Any]) -> None:
    true, implied = data["true_reward"], data["implied_reward"]
    ends = [min(true), max(true)]
    axes.plot(ends, ends, color=style.FAINT, linewidth=1, zorder=1)
    axes.plot(true, implied, "o", color=style.PALETTE[0], markersize=4.5, alpha=0.8, markeredgewidth=0)
    axes.set(xlabel="true reward, centred (reward)", ylabel="β log(π/ref), centred (reward)", aspect="equal")
    axes.set_title(f"(b) implied reward, all {len(true)} sequences")


def _draw_pairs(axes: Axes, samples: list[dict[str, Any]], asymptotic: float) -> None:
    sizes = np.asarray([row["pairs"] for row in samples], float)
    for row in samples:
        axes.plot([row["pairs"]] * len(row["kl"]), row["kl"], "o", color=style.PALETTE[5], markersize=2.5)
    middle = [np.median([*row["kl"], *[np.inf] * row["without_minimum"]]) for row in samples]
    axes.plot(sizes, asymptotic / sizes, color=style.MUTED, linewidth=1.1, linestyle="--", label="predicted median")
    axes.plot(sizes, middle, "o", color=style.PALETTE[0], markersize=5, label="median")
    fits = len(samples[0]["kl"]) + samples[0]["without_minimum"]
    axes.plot([], [], "o", color=style.PALETTE[5], markersize=2.5, label=f"each of {fits} samples")
    axes.legend(loc="lower left")
    axes.set(xscale="log", yscale="log", xlabel="labelled pairs n", ylabel="KL(π*‖π) (nats)")
    without = sum(row["without_minimum"] for row in samples)
    axes.set_title("(c) finite samples" + (f", {without} without a minimum" if without else ""))
