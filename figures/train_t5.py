"""Training of tiny-t5 on number names, and held-out names by their length."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

SHOWN = 3  # examples below the panels


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the loss during training, and the negative log-likelihood of the names by their length."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    exact, names = (sum(row[field] for row in data["exact"]) for field in ("exact", "names"))
    style.headline(figure, f"tiny-t5 translates {exact:,} of {names:,} held-out number names exactly")
    curve, lengths = figure.subplots(1, 2)
    _draw_curve(curve, data["log"])
    _draw_lengths(lengths, data["nats"])
    lines = [f"{each['source']} → {each['translation']}" for each in data["examples"][:SHOWN]]
    figure.supxlabel("     ".join(lines), fontsize=7.5, color=style.MUTED)
    return figure


def _draw_curve(axes: Axes, log: list[dict[str, Any]]) -> None:
    tokens = [row["tokens"] / 1e6 for row in log]
    axes.plot(tokens, [row["loss"] for row in log], color=style.PALETTE[0], label="training names")
    axes.plot(tokens, [row["held_out_loss"] for row in log], color=style.PALETTE[1], marker="o", label="held-out names")
    axes.set(yscale="log", xlabel="target tokens seen (millions)", ylabel="loss (nats per token)", xlim=(0, None))
    axes.set_title("(a) one training run")
    axes.legend(loc="upper right")


def _draw_lengths(axes: Axes, rows: list[dict[str, Any]]) -> None:
    words = [row["words"] for row in rows]
    for field, label, colour in (("largest", "worst name", style.MUTED), ("median", "median", style.PALETTE[1])):
        axes.plot(words, [row[field] for row in rows], color=colour, marker="o", label=label)
    axes.set(yscale="log", xlabel="words of the English name", ylabel="−log p(German name), nats", xticks=words)
    axes.set_title("(b) the trained model on held-out names")
    axes.legend(loc="upper right")
