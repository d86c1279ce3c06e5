"""Beam search: the number of beams, n-gram blocking, and a diversity factor."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.text import signed

REPEATED, DISTINCT, RELEVANCE = style.PALETTE[1], style.PALETTE[0], style.PALETTE[2]
LINE = 52  # letters of an example's line


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Above log-probability, below it what the text is like, against each of the knobs; then the exercise's texts."""
    data = results["data"]
    value = {entry["name"]: entry["value"] for entry in results["numbers"]}
    k, count = data["beams"], len(data["prompts"])
    repeated = value[f"repeated 2-grams of the best hypothesis, k = {k}"]
    cost = value[f"log-probability of the best hypothesis, k = {k} − with 2-grams blocked"]
    figure = Figure(figsize=(9.6, 6.7), layout="constrained")
    figure.suptitle(
        f"Beam search repeats {repeated:.0%} of its 2-grams; to block them costs {cost:.1f} nats, "
        f"{cost / data['new_tokens']:.2f} a token",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 1.02))
    above, below = ([figure.add_subplot(grid[row, column]) for column in range(3)] for row in (0, 1))
    worse = value["prompts and steps of k at which the wider beam is worse"]
    _draw_widths(above[0], below[0], data, worse)
    _draw_blocks(above[1], below[1], data)
    _draw_factors(above[2], below[2], data)
    above[0].set_ylabel("Σ log p of the best hypothesis\n(nats)")
    below[0].set_ylabel("share of 2-grams; nats a token")
    _draw_examples(figure.add_subplot(grid[2, :]), data, count)
    return figure


def _draw_widths(above: Axes, below: Axes, data: dict[str, Any], worse: float) -> None:
    sweep, labels = data["sweeps"]["width"], [f"{k}" for k in data["widths"]]
    _draw_log_probs(above, sweep, labels)
    above.set_title(f"(a) wider is worse in {worse:.0%} of steps")
    _draw_shares(below, sweep, labels)
    first, last = (sweep[place]["repeated"]["estimate"] for place in (0, -1))
    below.set(xlabel="beams k (1 is greedy)", title=f"(d) repeats: {first:.0%} at k = 1, {last:.0%} at {labels[-1]}")


def _draw_blocks(above: Axes, below: Axes, data: dict[str, Any]) -> None:
    sweep = data["sweeps"]["block"]
    labels = [f"{n}" if n else "off" for n in data["blocks"]]
    _draw_log_probs(above, sweep, labels)
    above.set_title(f"(b) blocking (k = {data['beams']}) costs log p")
    _draw_shares(below, sweep, labels)
    below.set(xlabel="length n of the n-grams that may not repeat", title="(e) repeats end at n = 2 and below")


def _draw_factors(above: Axes, below: Axes, data: dict[str, Any]) -> None:
    sweep, labels = data["sweeps"]["factor"], [f"{factor:g}" for factor in data["factors"]]
    _draw_log_probs(above, sweep, labels)
    means = [each["mean_log_prob"]["estimate"] for each in sweep]
    above.plot(range(len(means)), means, color=style.MUTED, linestyle="--", linewidth=1.2)
    above.annotate(
        f"mean of all {data['beams']}",
        (len(means) - 1, means[-1]),
        xytext=(0, -9),
        textcoords="offset points",
        ha="right",
        color=style.MUTED,
        fontsize=7.5,
    )
    above.set_title(f"(c) factor {labels[-1]}: mean {signed(means[-1] - means[0])} nats")
    _draw_shares(below, sweep, labels)
    first, last = (sweep[place]["distinct"]["estimate"] for place in (0, -1))
    below.set(xlabel="diversity factor (nats for each earlier group)")
    below.set_title(f"(f) distinct: {first:.2f} at 0, {last:.2f} at {labels[-1]}")


def _draw_log_probs(axes: Axes, sweep: list[dict[str, Any]], labels: list[str]) -> None:
    """Every prompt's as a thin line, the mean over them and its interval."""
    place = np.arange(len(labels))
    axes.plot(place, np.asarray([each["log_probs"] for each in sweep]), color=style.FAINT, linewidth=0.6)
    _draw_mean(axes, [each["log_prob"] for each in sweep], style.INK)
    axes.set_xticks(place, labels)
    axes.grid(axis="x", visible=False)


def _draw_shares(axes: Axes, sweep: list[dict[str, Any]], labels: list[str]) -> None:
    for field, colour in (("repeated", REPEATED), ("distinct", DISTINCT), ("relevance", RELEVANCE)):
        _draw_mean(axes, [each[field] for each in sweep], colour)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_ylim(-0.03, 0.9)
    axes.grid(axis="x", visible=False)


def _draw_mean(axes: Axes, intervals: list[dict[str, float]], colour: str) -> None:
    place = np.arange(len(intervals))
    mean, low, high = (np.asarray([each[part] for each in intervals]) for part in ("estimate", "low", "high"))
    axes.fill_between(place, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(place, mean, color=colour, marker="o", markersize=3)


def _draw_examples(axes: Axes, data: dict[str, Any], count: int) -> None:
    """What the shares are, and the best hypotheses of the exercise's three searches."""
    axes.axis("off")
    key = (
        (REPEATED, "repeats within the best hypothesis (seq-rep-2)"),
        (DISTINCT, "distinct among all k hypotheses (falls with k by itself)"),
        (RELEVANCE, "relevance: what the prompt adds to log p, nats a token"),
    )
    for place, (colour, label) in zip((0.0, 0.32, 0.67), key, strict=True):
        axes.text(place, 1.0, f"● {label}", color=colour, fontsize=7.5, va="top")
    note = f"Means over {count} prompts with 95% bootstrap intervals; thin lines: each prompt. {data['model']}, "
    axes.text(0, 0.91, f"{note}{data['new_tokens']} tokens, no early end.", color=style.MUTED, fontsize=7.5, va="top")
    axes.text(0, 0.76, f"(g) The exercise: “{data['prompts'][0]}…”", fontsize=9.5, fontweight="bold", va="top")
    for column, each in enumerate(data["examples"]):
        axes.text(column / 3, 0.63, each["title"], fontsize=8, fontweight="bold", va="top")
        lines = []
        for hypothesis, log_prob in zip(each["texts"], each["log_probs"], strict=True):
            shown = " ".join(hypothesis.replace("\n", " ⏎ ").split())
            lines.append(textwrap.fill(f"{signed(log_prob)}  …{shown}", LINE, subsequent_indent="    "))
        axes.text(column / 3, 0.53, "\n".join(lines), fontsize=7.2, va="top", linespacing=1.35)
    axes.set(xlim=(0, 1), ylim=(0, 1))
