"""The gradient of DPO: one weight, an up-push and a down-push."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

KINDS = {
    "different": ("two different answers", style.PALETTE[0]),
    "nearly the same": ("answers that differ in the last token alone", style.PALETTE[1]),
}
ANSWERS = {"chosen": "-", "rejected": (0, (4, 1.5))}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the two log-probabilities in either kind of runs, the weight, and the share of the pushes that is left."""
    data = results["data"]
    runs, figure = data["runs"], Figure(figsize=(9.6, 5.8), layout="constrained")
    finding = "Between nearly equal answers more of DPO's two pushes cancels, and the chosen answer falls too"
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    (different, same), (weight, left) = figure.subplots(2, 2, sharex=True)
    for axes, kind, letter in ((different, "different", "a"), (same, "nearly the same", "b")):
        for answer, line in ANSWERS.items():
            _draw_runs(axes, runs[kind][answer], KINDS[kind][1], line, answer)
        axes.axhline(0, color=style.MUTED, linewidth=0.8)
        axes.set_ylabel("log π − log ref (nats per answer)")
        axes.set_title(f"({letter}) {KINDS[kind][0]}")
        axes.legend(loc="lower left")
    for kind, (label, colour) in KINDS.items():
        _draw_runs(weight, runs[kind]["weight"], colour, "-", label)
        _draw_runs(left, runs[kind]["left"], colour, "-", label)
    weight.set(ylim=(0, 0.6), xlabel="step of gradient descent", ylabel=r"mean weight $\sigma(\hat r_l - \hat r_w)$")
    weight.set_title("(c) the weight of both pushes: ½ at the start")
    weight.legend(loc="upper right")
    left.set(ylim=(0, 1), xlabel="step of gradient descent", ylabel="‖up + down‖ / (‖up‖ + ‖down‖)")
    left.set_title("(d) what is left of the two pushes")
    batches = len(runs["different"]["weight"])
    left.text(0.98, 0.97, f"lines: mean of {batches} batches of {data['pairs']} pairs\nbands: range of the batches",
              transform=left.transAxes, ha="right", va="top", fontsize=7.5, color=style.MUTED)  # fmt: skip
    return figure


def _draw_runs(axes: Axes, runs: list[list[float]], colour: str, line: Any, label: str) -> None:
    """Draw the mean over batches, and their range."""
    values = np.asarray(runs)
    axes.fill_between(range(values.shape[1]), values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0)
    axes.plot(values.mean(axis=0), color=colour, linestyle=line, label=label)
