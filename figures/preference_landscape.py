"""The landscapes of a preference loss around its reference and of a reward model, and the path of DPO."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jaxrl_llm.plots import landscape, style
from jaxrl_llm.plots.landscape import digits

PAIR = "loss (nats per pair)"


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw DPO and the reward model over random planes; under them DPO over the plane of its path, and the run."""
    data = results["data"]
    surfaces = data["surfaces"]
    figure = Figure(figsize=(9.6, 7.4), layout="constrained")
    style.headline(
        figure,
        f"DPO of {data['model']} falls from log 2 to {data['losses'][-1]:.1g} on its own path; "
        f"on {len(data['lowest'])} random planes no grid point is below {min(data['lowest']):.2f}",
    )
    rows = figure.subfigures(2, 1)
    panels = rows[0].subplots(1, 2)
    limits = landscape.loss_limits([surfaces["dpo"], surfaces["reward"]])
    for axes, name, title in zip(
        panels, ("dpo", "reward"), ("(a) DPO, random plane", "(b) reward model, random plane"), strict=True
    ):
        colours = landscape.draw_contour(axes, surfaces[name], limits=limits)
        axes.set_title(title)
    landscape.add_colour_bar(panels, colours, label=f"{PAIR}, (a) and (b)")
    plane, run = rows[1].subplots(1, 2, width_ratios=(1.3, 1))
    share = 100 * np.asarray(data["explained"])
    path = {"label": "DPO by Adam", "points": data["path"]}
    colours = landscape.draw_contour(plane, surfaces["path"], paths=(path,))
    plane.set_title("(c) DPO, the plane of its path: another scale")
    plane.set(
        xlabel=f"principal direction 1 ({share[0]:.1f} % of squared distance)",
        ylabel=f"principal direction 2 ({share[1]:.1f} %)",
    )
    landscape.add_colour_bar(plane, colours, label=f"{PAIR}, (c)")
    _draw_run(run, data)
    return figure


def _draw_run(axes: Any, data: dict[str, Any]) -> None:
    axes.plot(data["losses"], color=style.PALETTE[3], label="along the path")
    last = len(data["losses"]) - 1
    axes.plot(
        [last] * len(data["lowest"]),
        data["lowest"],
        "D",
        color="white",
        markeredgecolor=style.INK,
        label=f"lowest of each of {len(data['lowest'])} random planes",
    )
    axes.axhline(np.log(2), color=style.MUTED, linestyle=":", linewidth=1)
    axes.annotate("log 2", (0, np.log(2)), xytext=(0, 3), textcoords="offset points", ha="left")
    axes.set(xlabel="step of Adam", ylabel=PAIR, yscale="log")
    axes.yaxis.set_major_formatter(lambda loss, _: digits(loss))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("(d) the loss along the path")
    axes.legend(loc="lower left")
