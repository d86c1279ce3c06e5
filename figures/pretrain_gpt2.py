"""Training of tiny-gpt2, and held-out text against n-grams."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.charts import draw_training_curve


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the training curve, and bits per byte by the order of the n-gram models and by source."""
    data = results["data"]
    order = data["best_order"]
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    least = f"{order}-gram model {data['ngram_bits_per_byte'][order]:.3f}"
    style.headline(figure, f"Held-out text, bits per byte: tiny-gpt2 {data['bits_per_byte']:.3f}, {least}")
    curve, orders, bars = figure.subplots(1, 3, width_ratios=(1.3, 0.8, 1.1))
    baseline = (f"{order}-gram", data["ngram_nats_per_token"][order])
    draw_training_curve(curve, data["log"], baseline=baseline)
    curve.set_title("(a) one training run of tiny-gpt2")
    _draw_orders(orders, data)
    orders.set_title("(b) n-gram models")
    _draw_sources(bars, data["sources"], order)
    bars.set_title("(c) held-out text by source")
    return figure


def _draw_orders(axes: Axes, data: dict[str, Any]) -> None:
    """Draw all orders of n-gram models that were tried, over the model's line."""
    ngrams = {int(order): value for order, value in data["ngram_bits_per_byte"].items()}
    axes.plot(list(ngrams), list(ngrams.values()), color=style.PALETTE[5], marker="o")
    axes.axhline(data["bits_per_byte"], color=style.PALETTE[0], linestyle="--", linewidth=1.2)
    beside = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "fontsize": 7.5}
    axes.annotate("tiny-gpt2", (max(ngrams), data["bits_per_byte"]), color=style.PALETTE[0], **beside)
    axes.set(xlabel="order of the Kneser-Ney model", ylabel="bits per byte (lower is better)", xticks=list(ngrams))


def _draw_sources(axes: Axes, sources: list[dict[str, Any]], order: str) -> None:
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
