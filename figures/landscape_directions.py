"""One loss and one point in three planes: by tensor, by filter, and along the Hessian's top eigenvectors."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from jaxrl_llm.plots import landscape, style
from jaxrl_llm.plots.landscape import FIRST

TITLES = {"parameter": "random, by tensor", "filter": "random, by filter", "hessian": "top Hessian eigenvectors"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the contours on one scale, and under each the section along its first direction with its parabola."""
    data = results["data"]
    surfaces, sections = ([data[kind][name] for name in TITLES] for kind in ("surfaces", "sections"))
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    lowest, highest = (
        next(number["value"] for number in results["numbers"] if number["name"].startswith(start))
        for start in ("lowest loss", "highest loss")
    )
    finding = (
        f"At a tenth of the radius the loss is at least {lowest:.2f} times the model's along top eigenvectors,\n"
        f"and at most {highest:.2f} times along random directions"
    )
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    grid = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
    limits, panels = landscape.loss_limits(surfaces), []
    for column, (title, surface, section) in enumerate(zip(TITLES.values(), surfaces, sections, strict=True)):
        panels.append(figure.add_subplot(grid[0, column]))
        colours = landscape.draw_contour(panels[-1], surface, limits=limits)
        panels[-1].set_title(f"({'abc'[column]}) {title}")
        axes = figure.add_subplot(grid[1, column])
        shown = section | {"label": "loss; per ‖d₁‖²", "curvature": section["per_length"], "sharpness": None}
        landscape.draw_section(axes, [shown], xlabel=FIRST)
        axes.set_title(f"({'def'[column]}) direction 1, near the model")
    landscape.add_colour_bar(panels, colours)
    return figure
