"""Training of tiny-gpt2, and held-out text against n-grams."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.curves import draw_training_curve


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The training curve, and bits per byte by source."""
    data = results["data"]
    order = data["best_order"]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(1.35, 1))
    baseline = (f"Kneser-Ney {order}-gram", data["ngram_nats_per_token"][order])
    draw_training_curve(curve, data["log"], baseline=baseline)
    curve.set_title("(a) training of tiny-gpt2")
    _draw_sources(bars, data["sources"], order)
    bars.set_title("(b) held-out text by source")
    return figure


def _draw_sources(axes: Any, sources: list[dict[str, Any]], order: str) -> None:
    place = np.arange(len(sources))
    series = (("tiny-gpt2", "bits_per_byte", -0.2, 0), (f"{order}-gram", "ngram_bits_per_byte", 0.2, 5))
    for label, field, shift, colour in series:
        values = [source[field] for source in sources]
        drawn = axes.bar(place + shift, values, 0.38, color=style.PALETTE[colour], label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7.5, padding=2)
    names = {"kjv": "King James\nBible", "brown": "Brown"}
    axes.set_xticks(place, [names.get(source["source"], source["source"].capitalize()) for source in sources])
    axes.set(ylabel="bits per byte (lower is better)", ylim=(0, 1.22 * max(s["ngram_bits_per_byte"] for s in sources)))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right", ncols=2)
