"""The landscapes of a preference loss around its reference and of a reward model, and the path of DPO."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxrl_llm.plots import landscape, style

PAIR = "loss (nats per pair)"


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """DPO and the reward model over random planes; under them DPO over the plane of its path, and the run."""
    data = results["data"]
    surfaces = data["surfaces"]
    figure = Figure(figsize=(10.4, 7.0), layout="constrained")
    figure.suptitle(
        f"DPO around {data['model']}: log 2 at the reference, and a slope that its own path finds",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    grid = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1))
    axes = figure.add_subplot(grid[0, 0], projection="3d")
    landscape.draw_surface(axes, surfaces["dpo"], label="")
    axes.set_title("(a) DPO, random plane")
    path = {"label": "DPO by Adam", "points": data["path"]}
    for letter, place, name, title, paths in (
        ("b", grid[0, 1], "dpo", "DPO, random plane", ()),
        ("c", grid[0, 2], "reward", "reward model, random plane", ()),
        ("d", grid[1, :2], "path", "DPO, the plane of its path", (path,)),
    ):
        axes = figure.add_subplot(place)
        colours = landscape.draw_contour(axes, surfaces[name], paths=paths)
        axes.set_title(f"({letter}) {title}")
        landscape.add_colour_bar(axes, colours, label=PAIR)
        if paths:
            share = 100 * np.asarray(data["explained"])
            axes.set(
                xlabel=f"first principal direction ({share[0]:.1f} %)",
                ylabel=f"second ({share[1]:.1f} %)",
            )
    axes = figure.add_subplot(grid[1, 2])
    axes.plot(data["losses"], color=style.PALETTE[0])
    axes.axhline(np.log(2), color=style.MUTED, linestyle=":", linewidth=1)
    axes.annotate("log 2", (len(data["losses"]) - 1, np.log(2)), xytext=(0, 3), textcoords="offset points", ha="right")
    axes.set(xlabel="step", ylabel=PAIR, yscale="log")
    axes.set_title("(e) the loss along the path")
    return figure
