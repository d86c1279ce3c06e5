"""Eight ways to teach a small GPT-2 to write good reviews: what each gains, at what divergence, and what it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.text import LITERAL, sentence, signed

LABELS = {
    "reference": "fine-tuned model",
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "simpo": "SimPO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "best of n": "best of n",
}
COLOURS = dict(zip(LABELS, (style.INK, *style.PALETTE, style.MUTED), strict=True))
WIDTH, PANELS, LINE = 10.4, 8.6, 0.172  # inches: of the figure, of the panels' height, of a line of text


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Reward against KL, over-optimisation, log-probabilities in time, the pretraining term, and three reviews each."""
    data = results["data"]
    shown = [(name, row) for name in LABELS for row in data["samples"].get(name, [])]
    below = LINE * (len(shown) + len(data["samples"]) * 0.35 + 2.5)
    figure = Figure(figsize=(WIDTH, PANELS + below), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[PANELS, below])
    upper.suptitle(_title(data), x=0.01, ha="left", weight="bold", fontsize=10.5)
    (frontier, optimised), (times, ablation) = upper.subplots(2, 2)
    _draw_frontier(frontier, data)
    _draw_optimised(optimised, data)
    _draw_times(times, data)
    _draw_ablation(ablation, data)
    _draw_samples(lower, shown, below)
    return figure


def _title(data: dict[str, Any]) -> str:
    first, second = data["ranked"][:2]
    lead = data["lead"]
    apart = "more" if lead["mean"] > lead["half_width"] else "not more"
    return (
        f"Gold sentiment: {LABELS[first]} leads {LABELS[second]} by {lead['mean']:.2f} ± {lead['half_width']:.2f} "
        f"log-odds at the best β of each, {apart} than chance"
    )


def _draw_frontier(axes: Axes, data: dict[str, Any]) -> None:
    """Final policies with their intervals over seeds, the ways to them, and the best of n."""
    axes.set(title="Gold reward against divergence", xlabel="KL(π‖π_ref) (nats a review)", ylabel="gold (log-odds)")
    for method in data["ranked"]:
        rows = sorted((row for row in data["rows"] if row["method"] == method), key=lambda row: row["kl"]["mean"])
        kl, gold = (
            {part: [row[name][part] for row in rows] for part in ("mean", "half_width")} for name in ("kl", "gold")
        )
        axes.errorbar(
            kl["mean"], gold["mean"], xerr=kl["half_width"], yerr=gold["half_width"], color=COLOURS[method],
            marker="o", linewidth=1.2, elinewidth=0.6, label=LABELS[method],
        )  # fmt: skip
    axes.plot(0, data["start"]["gold"], marker="*", markersize=9, color=COLOURS["reference"], linestyle="")
    _draw_best_of(axes, data, np.asarray, "gold", "-")
    axes.set_xscale("symlog", linthresh=1)
    axes.set(
        xlim=(-0.1, None), xticks=(ticks := (0, 0.5, 1, 2, 5, 10, 20)), xticklabels=[f"{tick:g}" for tick in ticks]
    )
    axes.legend(ncols=2)


def _draw_optimised(axes: Axes, data: dict[str, Any]) -> None:
    """On the way to the least strength: what is optimised (dashed) goes on rising where gold does not."""
    axes.set(
        title="Proxy (dashed) and gold, on the way",
        xlabel="√KL(π‖π_ref) (√nats); each method at its least β",
        ylabel="reward (log-odds)",
    )
    for method in data["ranked"]:
        path = min((path for path in data["paths"] if path["method"] == method), key=lambda path: path["beta"])
        root = np.sqrt([0.0, *path["kl"]])
        for name, line in (("gold", "-"), ("proxy", "--")):
            axes.plot(root, [data["start"][name], *path[name]], line, color=COLOURS[method], linewidth=1.2)
    _draw_best_of(axes, data, np.sqrt, "gold", "-")
    _draw_best_of(axes, data, np.sqrt, "proxy", "--")


def _draw_best_of(axes: Axes, data: dict[str, Any], scale: Any, name: str, line: str) -> None:
    rows = data["best_of_n"]
    kl, reward = scale([row["kl"] for row in rows]), [row[name] for row in rows]
    label = LABELS["best of n"] + f" (to {rows[-1]['n']})" if line == "-" else None
    axes.plot(kl, reward, line, color=COLOURS["best of n"], marker=".", linewidth=1.2, label=label)


def _draw_times(axes: Axes, data: dict[str, Any]) -> None:
    """How likely the chosen and the rejected answers are on the way, since the first steps."""
    axes.set(
        title="Chosen (line) and rejected (dashed) answers",
        xlabel="share of the training",
        ylabel="log π, less that at the start (nats)",
    )
    for method in data["ranked"]:
        curves = [curve for curve in data["curves"] if curve["method"] == method and "chosen_logp" in curve]
        if not curves:
            continue
        middle = sorted(curves, key=lambda curve: curve["beta"])[len(curves) // 2]
        for name, line in (("chosen_logp", "-"), ("rejected_logp", "--")):
            values = np.asarray([part.mean() for part in np.array_split(middle[name], min(12, len(middle[name])))])
            label = f"{LABELS[method]}, β = {middle['beta']:g}" if line == "-" else None
            axes.plot(np.linspace(0, 1, len(values)), values - values[0], line, color=COLOURS[method], label=label)
    axes.legend()


def _draw_ablation(axes: Axes, data: dict[str, Any]) -> None:
    """RLOO: the reviews of people stay as likely as they were, where the term is there."""
    axes.set(
        title="RLOO with the term γ E[log π] of reviews",
        xlabel="gold (log-odds)",
        ylabel="loss on held-out reviews (nats a token)",
    )
    gammas = sorted({row["gamma"] for row in data["ablation"]})
    for gamma, colour in zip(gammas, style.PALETTE, strict=False):
        rows = sorted((row for row in data["ablation"] if row["gamma"] == gamma), key=lambda row: row["beta"])
        gold, loss = (
            {part: [row[name][part] for row in rows] for part in ("mean", "half_width")}
            for name in ("gold", "text_loss")
        )
        axes.errorbar(
            gold["mean"], loss["mean"], xerr=gold["half_width"], yerr=loss["half_width"], color=colour,
            marker="o", linewidth=1.2, elinewidth=0.6, label=f"γ = {gamma:g}",
        )  # fmt: skip
        for row, x, y in zip(rows, gold["mean"], loss["mean"], strict=True):
            axes.annotate(f"β = {row['beta']:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(data["start"]["text_loss"], color=style.EDGE, linewidth=0.8, linestyle=":")
    axes.annotate(
        "the fine-tuned model", (0.99, data["start"]["text_loss"]), xycoords=("axes fraction", "data"), ha="right",
        va="bottom", fontsize=7, color=style.MUTED,
    )  # fmt: skip
    axes.legend()


def _draw_samples(figure: Any, shown: list[tuple[str, dict[str, Any]]], height: float) -> None:
    """After the same prompts (grey), with the gold reward of each."""
    figure.text(0.01, 1, "What they write: the prompt in grey, the gold reward before it", weight="bold", fontsize=9.5,
                va="top")  # fmt: skip
    y, before = 1 - 1.9 * LINE / height, ""
    for name, row in shown:
        y -= (LINE * (1.35 if name != before else 1)) / height
        if name != before:
            figure.text(0.01, y, LABELS[name], color=COLOURS[name], weight="bold", fontsize=7.5)
        before = name
        prompt, place = row["prompt"], 0.165
        figure.text(0.155, y, signed(row["gold"]), fontsize=7.5, ha="right")
        text = sentence(prompt + row["answer"], size=7.5, width=(1 - place - 0.01) * WIDTH * 72)
        figure.text(place, y, text, fontsize=7.5, **LITERAL)
        figure.text(place, y, text[: len(prompt)], fontsize=7.5, color=style.MUTED, **LITERAL)
