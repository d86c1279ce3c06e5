"""One loss and one point in three planes: by tensor, by filter, and along the Hessian's top eigenvectors."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from jaxrl_llm.plots import landscape, style

ORDER = ("parameter", "filter", "hessian")


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The contours on one scale, and under each the section along its first direction with its parabola."""
    data = results["data"]
    surfaces, sections = ([data[kind][name] for name in ORDER] for kind in ("surfaces", "sections"))
    figure = Figure(figsize=(11.4, 6.6), layout="constrained")
    figure.suptitle(
        f"The directions decide what the loss around {data['model']} looks like",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    grid = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
    limits, panels = landscape.loss_limits(surfaces), []
    for column, (surface, section) in enumerate(zip(surfaces, sections, strict=True)):
        panels.append(figure.add_subplot(grid[0, column]))
        colours = landscape.draw_contour(panels[-1], surface, limits=limits)
        panels[-1].set_title(f"({'abc'[column]}) {surface['title']}")
        axes = figure.add_subplot(grid[1, column])
        shown = section | {"label": "per ‖d‖²", "curvature": section["per_length"]}
        landscape.draw_section(axes, [shown], xlabel="α, first direction")
        axes.set_title(f"({'def'[column]}) the first direction, near the model")
    landscape.add_colour_bar(panels, colours)
    return figure
