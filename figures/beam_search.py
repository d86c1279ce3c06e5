"""Beam search: the number of beams, n-gram blocking, and a diversity factor."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.style import signed

REPEATED, DISTINCT, RELEVANCE = style.PALETTE[1], style.PALETTE[0], style.PALETTE[2]
LINE = 52  # letters of an example's line


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw log-probability, shares and relevance against each hyperparameter, a column each; then the texts."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 8.0), layout="constrained")
    style.headline(figure, _title(results))
    grid = figure.add_gridspec(4, 3, height_ratios=(1, 0.95, 0.55, 1.0))
    axes = np.array([[figure.add_subplot(grid[row, column]) for column in range(3)] for row in range(3)])
    columns = {
        "width": ([f"{k}" for k in data["widths"]], "number of beams k (1 is greedy)"),
        "block": ([f"{n}" if n else "off" for n in data["blocks"]], "length n of the n-grams that may not repeat"),
        "factor": ([f"{factor:g}" for factor in data["factors"]], "diversity factor (nats for each earlier group)"),
    }
    for column, (name, (labels, label)) in enumerate(columns.items()):
        sweep = data["sweeps"][name]
        _draw_log_probs(axes[0, column], sweep)
        for field, colour in (("repeated", REPEATED), ("distinct", DISTINCT)):
            _draw_mean(axes[1, column], [each[field] for each in sweep], colour)
        _draw_mean(axes[2, column], [each["relevance"] for each in sweep], RELEVANCE)
        for each in axes[:, column]:
            each.set_xticks(np.arange(len(labels)), labels)
            each.grid(axis="x", visible=False)
        axes[1, column].set_ylim(-0.03, 1.0)
        axes[2, column].set(ylim=(0, None), xlabel=label)
    for each in axes[2, 1:]:
        each.sharey(axes[2, 0])
    k = data["beams"]
    for each, title in zip(
        axes.flat,
        (
            "(a) more beams",
            f"(b) blocked n-grams, k = {k}",
            f"(c) {k} diverse groups of one beam",
            *(f"({letter}) repeated and distinct {data['measured_n']}-grams" for letter in "def"),
            *(f"({letter}) relevance" for letter in "ghi"),
        ),
        strict=True,
    ):
        each.set_title(title)
    axes[0, 0].set_ylabel("Σ log p of the best\nhypothesis (nats)")
    axes[1, 0].set_ylabel(f"share of {data['measured_n']}-grams")
    axes[2, 0].set_ylabel("nats per token")
    _draw_mean_of_all(axes[0, 2], data)
    _draw_examples(figure.add_subplot(grid[3, :]), data)
    return figure


def _title(results: dict[str, Any]) -> str:
    data = results["data"]
    if not results.get("holds"):
        return f"Beam search by {data['model']}: its width, n-gram blocking and diverse groups"
    width = {k: each["log_prob"]["estimate"] for k, each in zip(data["widths"], data["sweeps"]["width"], strict=True)}
    block = {n: each["log_prob"]["estimate"] for n, each in zip(data["blocks"], data["sweeps"]["block"], strict=True)}
    k, widest, n = data["beams"], max(data["widths"]), data["block"]
    return (
        f"More probable than greedy text by {width[k] - width[1]:.1f} nats with {k} beams, "
        f"{width[widest] - width[1]:.1f} with {widest}; to block {n}-grams costs {block[0] - block[n]:.1f}"
    )


def _draw_log_probs(axes: Axes, sweep: list[dict[str, Any]]) -> None:
    """Draw every prompt's as a thin line, the mean over them and its interval."""
    axes.plot(
        np.arange(len(sweep)), np.asarray([each["log_probs"] for each in sweep]), color=style.FAINT, linewidth=0.5
    )
    _draw_mean(axes, [each["log_prob"] for each in sweep], style.INK)


def _draw_mean_of_all(axes: Axes, data: dict[str, Any]) -> None:
    """Draw the mean over all hypotheses, not only the best ones, against the diversity factor."""
    means = [each["mean_log_prob"]["estimate"] for each in data["sweeps"]["factor"]]
    axes.plot(range(len(means)), means, color=style.ACCENT, linestyle="--", linewidth=1.2)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.12 * (high - low), high)
    axes.annotate(
        f"dashed: mean of all {data['beams']} hypotheses",
        (0.98, 0.03),
        xycoords="axes fraction",
        ha="right",
        color=style.ACCENT,
        fontsize=7.5,
    )


def _draw_mean(axes: Axes, intervals: list[dict[str, float]], colour: str) -> None:
    place = np.arange(len(intervals))
    mean, low, high = (np.asarray([each[part] for each in intervals]) for part in ("estimate", "low", "high"))
    axes.fill_between(place, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(place, mean, color=colour, marker="o", markersize=3)


def _draw_examples(axes: Axes, data: dict[str, Any]) -> None:
    """Explain the colours, and show the hypotheses of the exercise's three searches."""
    axes.axis("off")
    n = data["measured_n"]
    key = (
        (REPEATED, f"repeated within the best hypothesis (seq-rep-{n})"),
        (DISTINCT, "distinct among all k hypotheses"),
        (RELEVANCE, "what the prompt adds to log p per token"),
    )
    for place, (colour, label) in zip((0.0, 0.36, 0.64), key, strict=True):
        axes.text(place, 1.0, f"● {label}", color=colour, fontsize=7.5, va="top")
    note = (
        f"Points and bands: mean over {len(data['prompts'])} prompts and its 95% interval (Student's t); thin lines: "
    )
    note += f"each prompt. {data['model']}, {data['new_tokens']} tokens, no early end."
    axes.text(0, 0.9, note, color=style.MUTED, fontsize=7.5, va="top")
    axes.text(
        0, 0.75, f"(j) The hypotheses after “{data['prompts'][0]}”, with Σ log p", fontsize=9.5, weight="bold", va="top"
    )
    for column, each in enumerate(data["examples"]):
        axes.text(column / 3, 0.61, each["title"], fontsize=8, fontweight="bold", va="top")
        lines = []
        for hypothesis, log_prob in zip(each["texts"], each["log_probs"], strict=True):
            shown = " ".join(hypothesis.replace("\n", " ⏎ ").split())
            lines.append(textwrap.fill(f"{signed(log_prob)}  …{shown}", LINE, subsequent_indent="    "))
        axes.text(column / 3, 0.5, "\n".join(lines), fontsize=7.2, va="top", linespacing=1.35)
    axes.set(xlim=(0, 1), ylim=(0, 1))
