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
    """Draw the estimators on two models side by side, and the baselines on all random models."""
    data = results["data"]
    searched = len(data["search"]["mean baseline"])
    worst = data["cases"]["coin"]["estimators"]["mean baseline"]["relative variance"]
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    finding = (
        f"The mean baseline lowers the variance in most random models, but can raise it ({worst:.3g} times for a coin)"
    )
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    typical, counter, search = figure.subplots(1, 3, width_ratios=(1, 1, 0.95))
    _draw_case(typical, data["cases"]["typical"], f"(a) one model of {searched}, that\nof the median in (c)")
    _draw_case(counter, data["cases"]["coin"], f"(b) a coin: reward 1\nwith probability {data['p']:g}, else 0")
    typical.set_yticks(range(len(ORDER)), ORDER)
    counter.set_yticks(range(len(ORDER)), [])
    _draw_search(search, data["search"])
    figure.supxlabel(
        "* for equal numbers of samples, and rescaled to the length of ∇J. Dark blue: unbiased, mean = ∇J to 10⁻¹⁰. "
        "Light blue: short by the factor shown (1 − 1/N).\n"
        "Orange: of the length shown, and turned where a cosine is shown. Red: the mean baseline raises the variance. "
        "k1 in the reward is compared\n"
        "with ∇(E[r] − β KL). The exact critic is GAE with λ = 1 and the true V. "
        "Dotted line in (c): the mean baseline is as good as the optimal one.",
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
        colour = UNBIASED if unbiased else TURNED if name.startswith("GRPO") else SHORT
        note = "" if unbiased else f"   ×{entry['length']:.2f}"
        note += "" if parallel else f", cos {entry['cosine']:.3f}"
        axes.barh(row, value, 0.72, color=style.ACCENT if name == "mean baseline" and value > 1 else colour)
        place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.2f}{note}", (max(value, 1), row), fontsize=SMALL, **place)
        values.append(value)
    axes.axvline(1, color=style.INK, linewidth=0.8, linestyle="--")
    axes.set(ylim=(len(ORDER) - 0.4, -0.6), xlim=(0, 1.85 * max(values)), xlabel="variance / that of no baseline*")
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
    axes.text(0.97, 0.45, f"the mean raises\nthe variance\nin {raised.mean():.0%} of them",
              transform=axes.transAxes, ha="right", va="top", color=style.ACCENT)  # fmt: skip
    axes.set(xlabel="variance, mean baseline / none", ylabel="variance, optimal baseline / none")
    axes.set_title(f"(c) constant baselines\non {len(mean)} random models")
