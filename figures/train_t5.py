"""Training of tiny-t5 on number names, and what it gets right of those it has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

SHOWN = 3  # examples below the bars


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The loss on a logarithmic scale, and the exact translations by the length of the name."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    _draw_curve(curve, data["log"])
    _draw_lengths(bars, data["exact"])
    lines = [f"{each['source']} → {each['translation']}" for each in data["examples"][:SHOWN]]
    figure.supxlabel("     ".join(lines), fontsize=7.5, color=style.MUTED)
    return figure


def _draw_curve(axes: Axes, log: list[dict[str, Any]]) -> None:
    tokens = [row["tokens"] / 1e6 for row in log]
    axes.plot(tokens, [row["loss"] for row in log], color=style.PALETTE[0], label="training names")
    axes.plot(tokens, [row["held_out_loss"] for row in log], color=style.PALETTE[1], marker="o", label="held-out names")
    axes.set(yscale="log", xlabel="target tokens seen (millions)", ylabel="loss (nats per token)", xlim=(0, None))
    axes.set_title("(a) training of tiny-t5: English to German number names")
    axes.legend(loc="upper right")


def _draw_lengths(axes: Axes, rows: list[dict[str, int]]) -> None:
    words, names, exact = (np.asarray([row[field] for row in rows]) for field in ("words", "names", "exact"))
    drawn = axes.bar(words, 100 * exact / names, color=style.PALETTE[1], width=0.7)
    axes.bar_label(drawn, [f"{a}\nof {b}" for a, b in zip(exact, names, strict=True)], fontsize=7, padding=2)
    axes.set(xlabel="words of the English name", ylabel="exact translations (%)", ylim=(0, 118), xticks=words)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="x", visible=False)
    axes.set_title(f"(b) held-out names: {exact.sum():,} of {names.sum():,} exact")
