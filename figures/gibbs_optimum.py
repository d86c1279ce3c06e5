"""The optimum of RLHF in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the gap of random policies against β KL, the ascent to the optimum, and the optimum along β."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    finding = "Every policy falls short of RLHF's optimum by β KL(π‖π*), and gradient ascent ends there"
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    gap, ascent, family = figure.subplots(1, 3)
    _draw_gap(gap, data)
    _draw_ascent(ascent, data["ascent"])
    _draw_family(family, data["family"], data["beta"])
    return figure


def _draw_gap(axes: Axes, data: dict[str, Any]) -> None:
    beta_kl, gap = (np.asarray([each[name] for each in data["gaps"]]) for name in ("beta_kl", "gap"))
    line = np.asarray([gap.min() / 1.5, gap.max() * 1.5])
    axes.plot(line, line, color=style.FAINT, linewidth=1, zorder=1)
    axes.annotate("J* − J = β KL", (line[1], line[1]), xytext=(-40, -4), textcoords="offset points", ha="right",
                  color=style.MUTED, fontsize=7.5)  # fmt: skip
    axes.plot(beta_kl, gap, "o", color=style.PALETTE[0], markersize=4, alpha=0.7, markeredgewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="β KL(π‖π*) (reward)", ylabel="J* − J(π) (reward)")
    axes.set_title(f"(a) the identity, at {len(gap)} policies")


def _draw_ascent(axes: Axes, ascent: dict[str, list[float]]) -> None:
    gap = np.maximum(ascent["gap"], 1e-16)  # rounding can leave less than nothing
    axes.plot(gap, color=style.PALETTE[0])
    axes.set(yscale="log", xlabel="step of L-BFGS from the reference", ylabel="J* − J(π) (reward)")
    axes.axhline(1e-4 * gap[0], color=style.MUTED, linestyle="--", linewidth=1)
    axes.annotate("bound: 10⁻⁴ of the start", (len(gap) - 1, 1e-4 * gap[0]), xytext=(0, 4), ha="right",
                  textcoords="offset points", color=style.MUTED, fontsize=7.5)  # fmt: skip
    axes.set_title("(b) ascent by the gradient of J")


def _draw_family(axes: Axes, family: dict[str, Any], beta: float) -> None:
    axes.plot(family["kl"], family["reward"], color=style.PALETTE[0])
    axes.axhline(family["largest_reward"], color=style.MUTED, linestyle="--", linewidth=1)
    axes.annotate("the largest reward: β → 0", (0, family["largest_reward"]), xytext=(4, -11),
                  textcoords="offset points", color=style.MUTED, fontsize=7.5)  # fmt: skip
    axes.plot(0, family["ref_reward"], "o", color=style.INK)
    axes.annotate(
        "reference: β → ∞", (0, family["ref_reward"]), xytext=(8, -3), textcoords="offset points", fontsize=7.5
    )
    for mark in (0.1, 0.5, 2.0):
        nearest = int(np.argmin(np.abs(np.log(np.asarray(family["beta"]) / mark))))
        place = family["kl"][nearest], family["reward"][nearest]
        colour = style.ACCENT if mark == beta else style.PALETTE[0]
        axes.plot(*place, "o", color=colour)
        axes.annotate(f"β = {mark:g}", place, xytext=(6, -9), textcoords="offset points", fontsize=7.5, color=colour)
    axes.set(xlabel="KL(π*‖ref) (nats)", ylabel="E[r] of π* (reward)")
    axes.set_title("(c) the optima of all β")
