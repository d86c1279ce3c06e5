"""PPO's clipped objective and its gradient over ratio and advantage."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

RATIO = "ratio ρ = $\\pi/\\pi_{\\mathrm{old}}$"
BLUE, RED, GREEN, PURPLE = style.PALETTE[0], style.PALETTE[1], style.PALETTE[2], style.PALETTE[3]


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The surface and two maps of the gradient; under them the gradient's sections, and the dual clip's bound."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    figure.suptitle(
        "Beyond the clip PPO's gradient is exactly 0, on one side for each sign of the advantage",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    grid = figure.add_gridspec(2, 3, width_ratios=(1.05, 1, 1))
    _draw_surface(figure.add_subplot(grid[0, 0], projection="3d"), data["surfaces"]["symmetric"])
    low, high = data["clips"]["asymmetric"]["clip_low"], data["clips"]["asymmetric"]["clip_high"]
    titles = {
        "asymmetric": f"(b) gradient, clips {low:g} and {high:g}",
        "dual": f"(c) gradient, dual clip c = {data['clips']['dual']['dual_clip']:g}",
    }
    largest = max(np.abs(data["surfaces"][name]["gradient"]).max() for name in titles)
    for column, (name, title) in enumerate(titles.items(), start=1):
        axes = figure.add_subplot(grid[0, column])
        image = _draw_map(axes, data["surfaces"][name], largest)
        axes.set_title(title)
    figure.colorbar(image, ax=axes, label="∂loss/∂log π (units of A)", shrink=0.9)
    sections = data["sections"]
    for column, (name, title) in enumerate(
        {"positive": "(d) gradient at A = +1", "negative": "(e) gradient at A = −1"}.items()
    ):
        axes = figure.add_subplot(grid[1, column])
        _draw_gradients(axes, sections["ratio"], sections[name], positive=name == "positive")
        axes.set_title(title)
    _draw_losses(figure.add_subplot(grid[1, 2]), sections)
    return figure


def _draw_surface(axes: Any, surface: dict[str, Any]) -> None:
    ratio, advantage = np.meshgrid(surface["ratio"], surface["advantage"])
    height, gradient = np.asarray(surface["objective"]), np.asarray(surface["gradient"])
    colours = np.where((gradient == 0)[..., None], np.asarray((0.85, 0.87, 0.89)), np.asarray((0.34, 0.62, 0.83)))
    axes.plot_surface(
        ratio, advantage, height, facecolors=colours, rstride=1, cstride=1, linewidth=0.15, edgecolor="white"
    )
    axes.view_init(elev=24, azim=-125)
    axes.set(xlabel=RATIO, ylabel="advantage A")
    axes.set_zlabel("objective", labelpad=-4)
    axes.tick_params(pad=-2)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.95)
    axes.set_title("(a) min(ρA, clip(ρ) A); grey: no gradient")


def _draw_map(axes: Axes, surface: dict[str, Any], largest: float) -> Any:
    gradient = np.ma.masked_equal(np.asarray(surface["gradient"]), 0)
    axes.set_facecolor("#d8dcdf")
    image = axes.pcolormesh(
        surface["ratio"],
        surface["advantage"],
        gradient,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0, -largest, largest),
        shading="nearest",
        rasterized=True,
    )
    axes.axvline(1, color=style.INK, linewidth=0.8, linestyle=":")
    axes.annotate("gradient 0", (2.6, 1.0), ha="center", color=style.INK, fontsize=8.5)
    axes.grid(visible=False)
    axes.set(xlabel=RATIO, ylabel="advantage A")
    return image


def _draw_gradients(axes: Axes, ratio: list[float], section: dict[str, Any], *, positive: bool) -> None:
    lines = (
        ("reinforce", "REINFORCE", style.MUTED, "--"),
        ("cispo", "CISPO", GREEN, "-"),
        ("symmetric", "PPO, 0.2", BLUE, "-"),
        ("asymmetric", "PPO, 0.2 and 0.28", RED, (0, (4, 1.5))),
    )
    for name, label, colour, dashes in (
        lines if positive else (*lines[:3], ("dual", "PPO, dual clip", RED, (0, (4, 1.5))))
    ):
        width = 2.4 if name == "symmetric" else 1.5
        axes.plot(ratio, section[name]["gradient"], color=colour, linestyle=dashes, linewidth=width, label=label)
    axes.plot([1], [-1 if positive else 1], "o", color=style.INK, zorder=5)
    axes.annotate(
        "−A at ratio 1",
        (1, -1 if positive else 1),
        xytext=(1.55, -0.55 if positive else 0.5),
        fontsize=7.5,
        arrowprops={"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.7},
        va="center",
    )
    axes.set(xlabel=RATIO, ylabel="∂loss/∂log π (units of A)", xlim=(0, ratio[-1]))
    axes.legend(loc="lower left" if positive else "upper left")


def _draw_losses(axes: Axes, sections: dict[str, Any]) -> None:
    ratio, negative = sections["ratio"], sections["negative"]
    axes.plot(
        ratio, -np.asarray(negative["symmetric"]["objective"]), color=BLUE, linewidth=2.4, label="A = −1, PPO: no bound"
    )
    axes.plot(
        ratio,
        -np.asarray(negative["dual"]["objective"]),
        color=RED,
        linestyle=(0, (4, 1.5)),
        label="A = −1, dual clip: at most c",
    )
    axes.plot(ratio, -np.asarray(sections["positive"]["symmetric"]["objective"]), color=PURPLE, label="A = +1, PPO")
    axes.axhline(0, color=style.EDGE, linewidth=0.7)
    axes.set(xlabel=RATIO, ylabel="loss (units of A)", xlim=(0, ratio[-1]))
    axes.set_title("(f) the loss, A = −1 and A = +1")
    axes.legend(loc="upper left")
