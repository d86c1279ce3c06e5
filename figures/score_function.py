"""The gradient of an expected reward, through samples and by the score function."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw every entry of the gradient, the error against the number of samples, the direction of one batch."""
    data = results["data"]
    slope = next(entry["value"] for entry in results["numbers"] if entry["name"].startswith("slope"))
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    finding = "Through sampled rewards the gradient is exactly 0; the score function's error falls as 1/√n"
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    entries, error, direction = figure.subplots(1, 3)
    _draw_entries(entries, data["gradients"], data["generated"])
    _draw_error(error, data["curve"], slope)
    _draw_direction(direction, data["curve"])
    return figure


def _draw_entries(axes: Axes, gradients: dict[str, list[float]], generated: int) -> None:
    exact = np.asarray(gradients["exact"])
    reach = 1.08 * np.abs(exact).max()
    axes.plot([-reach, reach], [-reach, reach], color=style.MUTED, linewidth=0.9, linestyle="--")
    axes.annotate("dashed: exact", (-reach, -reach), xytext=(70, 2), textcoords="offset points", color=style.MUTED,
                  fontsize=7.5)  # fmt: skip
    axes.plot(exact, gradients["one batch"], "o", color=style.PALETTE[0], alpha=0.7, markeredgewidth=0)
    axes.plot(exact, gradients["through the samples"], "o", color=style.ACCENT, alpha=0.7, markeredgewidth=0)
    axes.text(0.05, 0.94, f"score function,\n{generated} generated sequences", transform=axes.transAxes, va="top",
              color=style.PALETTE[0])  # fmt: skip
    axes.text(0.97, 0.36, "through the samples: 0", transform=axes.transAxes, ha="right", color=style.ACCENT)
    axes.set(xlabel="entry of the exact ∇J (reward per nat)", ylabel="found (reward per nat)", xlim=(-reach, reach))
    axes.set_title(f"(a) all {len(exact)} entries of ∇J")


def _draw_error(axes: Axes, curve: dict[str, list[float]], slope: float) -> None:
    axes.plot(curve["n"], curve["predicted"], color=style.MUTED, linewidth=1.1, label="√(exact variance / n)")
    axes.errorbar(curve["n"], curve["error"], 1.96 * np.asarray(curve["standard error"]), fmt="o", capsize=2,
                  color=style.PALETTE[0], markersize=3.5, label="measured, 95% interval")  # fmt: skip
    axes.text(0.97, 0.94, f"slope {slope:.3f}".replace("-", "−"), transform=axes.transAxes, ha="right", va="top",
              color=style.PALETTE[0])  # fmt: skip
    axes.legend(loc="lower left")
    axes.set(xscale="log", yscale="log", xlabel="samples n", ylabel="root mean square error / ‖∇J‖")
    axes.set_title("(b) the error of the score function")


def _draw_direction(axes: Axes, curve: dict[str, list[float]]) -> None:
    colour = style.PALETTE[0]
    axes.fill_between(curve["n"], curve["cosine low"], curve["cosine high"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(curve["n"], curve["cosine"], color=colour, marker="o", markersize=3)
    axes.text(0.97, 0.3, "median and 90% range\nof single batches", transform=axes.transAxes, ha="right", color=colour)
    axes.set(
        xscale="log", xlabel="samples n", ylabel="cosine with ∇J", ylim=(min(0, *curve["cosine low"]) - 0.02, 1.03)
    )
    axes.set_title("(c) the direction of one batch")
