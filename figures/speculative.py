"""Speculative decoding: acceptance, and tokens per round."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw measured against predicted acceptance, tokens per round against the length of the draft, and time."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    title = "Speculative decoding: acceptance, tokens per round, and time"
    if results.get("holds"):
        title = "Drafts are accepted with probability Σ min(p, q), and rounds yield as many tokens as follows from it"
    style.headline(figure, title)
    acceptance, tokens, time = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
    _draw_acceptance(acceptance, data["rows"])
    _draw_tokens(tokens, data)
    _draw_time(time, data)
    return figure


def _draw_acceptance(axes: Axes, rows: list[dict[str, float]]) -> None:
    axes.plot([0, 1], [0, 1], color=style.EDGE, linewidth=1, zorder=1, label="equal")
    columns = ("predicted", "accepted", "predicted_se", "se")
    predicted, accepted, across, along = (np.asarray([row[name] for row in rows]) for name in columns)
    bars = {"xerr": 1.96 * across, "yerr": 1.96 * along, "capsize": 2, "elinewidth": 1}
    axes.errorbar(predicted, accepted, fmt="o", color=style.PALETTE[0], label="95% intervals over texts", **bars)
    lowest = accepted.min() - 0.08
    axes.set(xlim=(lowest, 1.03), ylim=(lowest, 1.03))
    axes.set(xlabel="predicted: E Σ min(p, q)", ylabel="measured acceptance")
    axes.set_title("(a) drafts by noisy copies")
    axes.legend(loc="upper left")


def _draw_tokens(axes: Axes, data: dict[str, Any]) -> None:
    chosen = sorted((row for row in data["rows"] if row["noise"] == data["middle"]), key=lambda row: row["drafts"])
    drafts, mean, low, high, expected, cut = (
        np.asarray([row[name] for row in chosen])
        for name in ("drafts", "per_round", "per_round_low", "per_round_high", "formula", "formula_cut")
    )
    axes.plot(drafts, expected, color=style.EDGE, linewidth=1.2, linestyle="--", label="(1 − α$^{γ+1}$)/(1 − α)")
    label = f"the same, last round of {data['new_tokens']} tokens cut"
    axes.plot(drafts, cut, color=style.EDGE, linewidth=1.8, label=label)
    bars = {"yerr": (mean - low, high - mean), "capsize": 2, "elinewidth": 1}
    axes.errorbar(drafts, mean, fmt="o", color=style.PALETTE[1], label="measured, 95% interval over texts", **bars)
    axes.set(xlabel="drafts in a round, γ", ylabel="tokens per call of the target", ylim=(0, 1.45 * expected.max()))
    axes.set_xticks(drafts)
    axes.set_title(f"(b) noise {data['middle']:g}, α = {np.mean([row['accepted'] for row in chosen]):.2f}")
    axes.legend(loc="upper left")


def _draw_time(axes: Axes, data: dict[str, Any]) -> None:
    copy, seconds = data["rows"][0], data["seconds"]
    labels = {
        "plain": "plain generation",
        "copy": f"draft of the target's size\n{copy['per_round']:.1f} tokens per round",
        **{
            name: f"look-up, {name}\n{found['per_round']:.2f} tokens per round"
            for name, found in data["look_up"].items()
        },
    }
    places = np.arange(len(labels))[::-1]
    medians = np.asarray([np.median(seconds[name]) for name in labels])
    spread = np.asarray(
        [[m - min(seconds[name]), max(seconds[name]) - m] for name, m in zip(labels, medians, strict=True)]
    )
    axes.barh(places, medians, 0.55, xerr=spread.T, capsize=3, color=style.PALETTE[5], error_kw={"elinewidth": 1})
    longest = max(map(max, seconds.values()))
    for place, name, median in zip(places, labels, medians, strict=True):
        axes.text(max(seconds[name]) + 0.03 * longest, place, f"{median:.2f} s", fontsize=7.5, va="center")
    axes.set_yticks(places, list(labels.values()))
    axes.set(xlim=(0, 1.25 * longest), xlabel=f"seconds: median and range of {len(seconds['plain'])} runs")
    axes.grid(axis="y", visible=False)
    axes.set_title("(c) time on one machine")
