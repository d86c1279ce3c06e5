"""PPO's clipped objective and its gradient over ratio and advantage, and the ratios that training reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

RATIO = "ratio ρ = π / π old"
BLUE, RED, GREEN, PURPLE = style.PALETTE[:4]


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the surface and maps of the gradient; under them the gradient's sections, the loss, and trained ratios."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    beyond = 100 * np.mean(data["shares"]["clip"])
    style.headline(
        figure,
        f"Beyond the clip PPO's gradient is 0, which does not bound the ratio: {beyond:.0f} % of samples end beyond it",
    )
    grid = figure.add_gridspec(2, 4)
    _draw_surface(figure.add_subplot(grid[0, 0], projection="3d"), data["surfaces"]["symmetric"])
    clips, panels = data["clips"], []
    titles = {
        "symmetric": f"(b) gradient; clip {clips['symmetric']['clip_low']:g}",
        "asymmetric": f"(c) clips {clips['asymmetric']['clip_low']:g} and {clips['asymmetric']['clip_high']:g}",
        "dual": f"(d) dual clip: {clips['dual']['clip_low']:g} and {clips['dual']['dual_clip']:g}",
    }
    largest = max(np.abs(data["surfaces"][name]["gradient"]).max() for name in titles)
    for column, (name, title) in enumerate(titles.items(), start=1):
        panels.append(figure.add_subplot(grid[0, column]))
        image = _draw_map(panels[-1], data["surfaces"][name], largest)
        panels[-1].set_title(title)
    panels[0].set_ylabel("advantage A")
    figure.colorbar(image, ax=panels[-1], label="∂loss/∂log π (units of A)", aspect=25)
    sections = data["sections"]
    for column, (name, title) in enumerate({"positive": "(e) A = +1", "negative": "(f) A = −1"}.items()):
        axes = figure.add_subplot(grid[1, column])
        _draw_gradients(axes, sections["ratio"], sections[name], positive=name == "positive")
        axes.set_title(title)
    _draw_losses(figure.add_subplot(grid[1, 2]), sections)
    _draw_ratios(figure.add_subplot(grid[1, 3]), data)
    return figure


def _draw_surface(axes: Any, surface: dict[str, Any]) -> None:
    ratio, advantage = np.meshgrid(surface["ratio"], surface["advantage"])
    height, gradient = np.asarray(surface["objective"]), np.asarray(surface["gradient"])
    colours = np.where((gradient == 0)[..., None], np.asarray((0.85, 0.87, 0.89)), np.asarray((0.34, 0.62, 0.83)))
    axes.plot_surface(
        ratio, advantage, height, facecolors=colours, rstride=1, cstride=1, linewidth=0.1, edgecolor="white"
    ).set_rasterized(True)
    axes.view_init(elev=24, azim=-125)
    axes.set(xlabel="ratio ρ", ylabel="advantage A")
    axes.set_zlabel("objective\n(units of A)", labelpad=3, fontsize=7.5)
    axes.tick_params(pad=-2)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.85)
    axes.set_title("(a) min(ρA, clip(ρ)A);\ngrey: gradient 0")


def _draw_map(axes: Axes, surface: dict[str, Any], largest: float) -> Any:
    gradient = np.ma.masked_equal(np.asarray(surface["gradient"]), 0)
    axes.set_facecolor("#d8dcdf")
    image = axes.pcolormesh(
        surface["ratio"],
        surface["advantage"],
        gradient,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0, -largest, largest),
        rasterized=True,
    )
    axes.axvline(1, color=style.INK, linewidth=0.8, linestyle=":")
    axes.annotate("gradient 0", (2.6, 1.0), ha="center", color=style.INK, fontsize=8.5)
    axes.grid(visible=False)
    axes.set(xlabel=RATIO)
    return image


def _draw_ratios(axes: Axes, data: dict[str, Any]) -> None:
    """Draw how the ratios of samples with A > 0 are distributed after training, with and without the clip."""
    histogram = data["histogram"]
    for name, colour, width in (("no clip", style.MUTED, 1.2), ("clip", BLUE, 2.0)):
        values = 100 * np.asarray(histogram[name])
        axes.stairs(values, histogram["edges"], color=colour, linewidth=width, label=f"{name}, {data['steps']} steps")
    high = 1 + data["clips"]["symmetric"]["clip_high"]
    axes.axvline(high, color=style.INK, linewidth=0.8, linestyle=":")
    last = histogram["edges"][-1]
    axes.set(xlabel=f"{RATIO}; last bar: ≥ {last:g}", ylabel="samples with A > 0 (%)", xlim=(0, last))
    axes.set_title("(h) after training")
    axes.legend(loc="upper right")


def _draw_gradients(axes: Axes, ratio: list[float], section: dict[str, Any], *, positive: bool) -> None:
    lines = (
        ("reinforce", "REINFORCE", style.MUTED, "--"),
        ("cispo", "CISPO", GREEN, "-"),
        ("symmetric", "PPO, as (b)", BLUE, "-"),
        ("asymmetric", "PPO, as (c)", RED, (0, (4, 1.5))),
    )
    for name, label, colour, dashes in lines if positive else (*lines[:3], ("dual", "PPO, as (d)", RED, (0, (4, 1.5)))):
        width = 2.4 if name == "symmetric" else 1.5
        axes.plot(ratio, section[name]["gradient"], color=colour, linestyle=dashes, linewidth=width, label=label)
    axes.plot([1], [-1 if positive else 1], "o", color=style.INK, zorder=5)
    axes.annotate(
        "−A at ratio 1",
        (1, -1 if positive else 1),
        xytext=(1.7, -0.4) if positive else (1.3, 0.4),
        fontsize=7.5,
        arrowprops={"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.7},
        va="center",
    )
    axes.set(xlabel=RATIO, ylabel="∂loss/∂log π (units of A)", xlim=(0, ratio[-1]))
    axes.legend(loc="lower left" if positive else "upper left")


def _draw_losses(axes: Axes, sections: dict[str, Any]) -> None:
    ratio, negative = sections["ratio"], sections["negative"]
    axes.plot(
        ratio, -np.asarray(negative["symmetric"]["objective"]), color=BLUE, linewidth=2.4, label="A = −1, (b): no bound"
    )
    axes.plot(
        ratio,
        -np.asarray(negative["dual"]["objective"]),
        color=RED,
        linestyle=(0, (4, 1.5)),
        label="A = −1, (d): at most c",
    )
    axes.plot(ratio, -np.asarray(sections["positive"]["symmetric"]["objective"]), color=PURPLE, label="A = +1, (b)")
    axes.axhline(0, color=style.EDGE, linewidth=0.7)
    axes.set(xlabel=RATIO, ylabel="loss (units of A)", xlim=(0, ratio[-1]), ylim=(-1.6, 6.2))
    axes.set_title("(g) loss")
    axes.legend(loc="upper left")
