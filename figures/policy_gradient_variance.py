"""Exact variance and bias of policy-gradient estimators."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

ORDER = (
    "no baseline",
    "PPO-clip, first step",
    "k1 in the reward",
    "mean baseline",
    "optimal baseline",
    "reward-to-go",
    "exact critic",
    "RLOO, groups of 2",
    "RLOO, groups of 3",
    "centred, groups of 2",
    "centred, groups of 3",
    "GRPO, groups of 2",
    "GRPO, groups of 3",
)
UNBIASED, SHORT, TURNED = style.PALETTE[0], style.PALETTE[5], style.PALETTE[4]
SMALL = 7.0


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Two models side by side, and all that were searched."""
    data = results["data"]
    worst = data["cases"]["counter-example"]["estimators"]["mean baseline"]["relative variance"]
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    figure.suptitle(
        f"Subtracting the mean reward can raise the variance (here {worst:.2f} times); the optimal baseline never does",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10.5,
    )
    typical, counter, search = figure.subplots(1, 3, width_ratios=(1, 1, 0.95))
    _draw_case(typical, data["cases"]["typical"], "(a) the median model")
    _draw_case(counter, data["cases"]["counter-example"], "(b) the counter-example")
    typical.set_yticks(range(len(ORDER)), ORDER)
    counter.set_yticks(range(len(ORDER)), [])
    _draw_search(search, data["search"])
    figure.supxlabel(
        "* for equal numbers of samples, and rescaled to the length of ∇J. Dark blue: unbiased, mean = ∇J to 10⁻¹⁰. "
        "Light blue: short by the factor shown (1 − 1/N).\n"
        "Orange: short, and turned by the cosine shown. k1 in the reward is held against ∇(E[r] − β KL). "
        "The exact critic is GAE with λ = 1 and the true V.",
        x=0.01,
        ha="left",
        fontsize=7.2,
        color=style.MUTED,
    )
    return figure


def _draw_case(axes: Axes, case: dict[str, Any], title: str) -> None:
    values = []
    for row, name in enumerate(ORDER):
        entry = case["estimators"][name]
        value = entry["relative variance"] / entry["length"] ** 2
        unbiased, parallel = entry["bias"] < 1e-10, entry["cosine"] > 1 - 1e-10
        colour = UNBIASED if unbiased else SHORT if parallel else TURNED
        note = "" if unbiased else f"   ×{entry['length']:.2f}"
        note += "" if parallel else f", cos {entry['cosine']:.3f}"
        axes.barh(row, value, 0.72, color=style.ACCENT if name == "mean baseline" and value > 1 else colour)
        place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.2f}{note}", (max(value, 1), row), fontsize=SMALL, **place)
        values.append(value)
    axes.axvline(1, color=style.INK, linewidth=0.8, linestyle="--")
    axes.set(ylim=(len(ORDER) - 0.4, -0.6), xlim=(0, 1.72 * max(values)), xlabel="variance / no baseline*")
    axes.grid(axis="y", visible=False)
    axes.text(0.99, 0.985, f"E[r] = {case['mean reward']:.2f}\nb* = {case['b*']:.2f}".replace("-", "−"),
              transform=axes.transAxes, ha="right", va="top")  # fmt: skip
    axes.set_title(title)


def _draw_search(axes: Axes, search: dict[str, list[float]]) -> None:
    mean, best = np.asarray(search["mean baseline"]), np.asarray(search["optimal baseline"])
    raised = mean > 1
    for chosen, colour in ((~raised, UNBIASED), (raised, style.ACCENT)):
        axes.plot(mean[chosen], best[chosen], "o", color=colour, markersize=3, alpha=0.6, markeredgewidth=0)
    axes.axvline(1, color=style.INK, linewidth=0.8, linestyle="--")
    axes.plot([best.min(), 1], [best.min(), 1], color=style.MUTED, linewidth=0.8, linestyle=":")
    axes.text(0.97, 0.45, f"the mean raises it\nin {raised.mean():.0%} of {len(mean)}\nrandom models",
              transform=axes.transAxes, ha="right", va="top", color=style.ACCENT)  # fmt: skip
    axes.set(xlabel="variance with the mean baseline / none", ylabel="variance with the optimal baseline / none")
    axes.set_title("(c) all models searched")
