"""Training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from jaxrl_llm.plots import style


def draw_training_curve(
    axes: Axes, log: Sequence[dict[str, Any]], *, baseline: tuple[str, float] | None = None
) -> None:
    """Draw the training and held-out loss (nats per token) of a run's log against tokens seen, with a baseline."""
    millions = [row["tokens"] / 1e6 for row in log]
    axes.plot(millions, [row["loss"] for row in log], color=style.PALETTE[0], label="training text")
    held_out = [row["held_out_loss"] for row in log]
    axes.plot(millions, held_out, color=style.PALETTE[1], marker="o", label="held-out text")
    if baseline is not None:
        name, value = baseline
        axes.axhline(value, color=style.MUTED, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{name}, held-out text: {value:.2f}",
            (0, value),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",  # a falling curve is above the line here
            color=style.MUTED,
            fontsize=7.5,
        )
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", xlim=(0, None))
    axes.legend(loc="upper right")
