"""DPO finds the optimum of RLHF."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The loss from log 2 to the labels' entropy, the implied against the true reward, and finitely many pairs."""
    data = results["data"]
    value = {entry["name"]: entry["value"] for entry in results["numbers"]}
    error, slope = value["largest |log π − log π*|"], value["slope of log KL(π*‖π) against log pairs"]
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    figure.suptitle(
        f"DPO on a population's preferences is RLHF's optimum: max |log π − log π*| = {error:.0e}",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10.5,
    )
    loss, reward, pairs = figure.subplots(1, 3)
    _draw_loss(loss, data)
    _draw_reward(reward, data)
    _draw_pairs(pairs, data["samples"], slope)
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
    axes.set_title("(a) as low as any model can")


def _draw_reward(axes: Axes, data: dict[str, Any]) -> None:
    true, implied = data["true_reward"], data["implied_reward"]
    ends = [min(true), max(true)]
    axes.plot(ends, ends, color=style.FAINT, linewidth=1, zorder=1)
    axes.plot(true, implied, "o", color=style.PALETTE[0], markersize=4.5, alpha=0.8, markeredgewidth=0)
    axes.set(xlabel="true reward, centred", ylabel="implied reward β log(π/ref), centred", aspect="equal")
    axes.set_title(f"(b) all {len(true)} sequences")


def _draw_pairs(axes: Axes, samples: list[dict[str, Any]], slope: float) -> None:
    sizes = np.asarray([row["pairs"] for row in samples], float)
    kl = np.asarray([row["kl"] for row in samples])
    middle = np.exp(np.log(kl).mean(axis=1))
    axes.plot(np.repeat(sizes, kl.shape[1]), kl.reshape(-1), "o", color=style.PALETTE[5], markersize=2.5)
    axes.plot(sizes, middle, color=style.PALETTE[0], marker="o")
    text = f"slope {slope:.2f}".replace("-", "−")
    axes.annotate(text, (sizes[2], middle[2]), xytext=(10, 6), textcoords="offset points", color=style.PALETTE[0])
    axes.set(xscale="log", yscale="log", xlabel="labelled pairs", ylabel="KL(π*‖π) (nats)")
    axes.set_title("(c) KL falls as 1/pairs")
