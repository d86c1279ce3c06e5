"""The loss around a trained GPT-2, over two random orthogonal directions."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from jaxrl_llm.plots import interactive as pages
from jaxrl_llm.plots import landscape, style
from jaxrl_llm.plots.landscape import FIRST
from jaxrl_llm.plots.style import LITERAL


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw a row a text: the surface, its contours, and beside them the even grid and the section through the model."""
    data = results["data"]
    surfaces = data["surfaces"]
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    off = 100 * abs(data["difference"])  # tested against 0.1 %
    style.headline(
        figure,
        f"The loss around {data['model']}: second differences at the model are the Hessian's curvature "
        f"to {max(0.1, float(f'{off:.1g}')):g} %",
    )
    grid = figure.add_gridspec(2, 3, width_ratios=(1.2, 1, 1))
    for row, (name, contours) in enumerate({"short": ("short", "even"), "longer": ("longer",)}.items()):
        axes = figure.add_subplot(grid[row, 0], projection="3d")
        landscape.draw_surface(axes, surfaces[name])
        axes.set_title(f"({'ad'[row]}) {_shown(surfaces[name])}", **LITERAL)
        limits = landscape.loss_limits([surfaces[each] for each in contours])
        panels = [figure.add_subplot(grid[row, 1 + column]) for column in range(len(contours))]
        for axes, each in zip(panels, contours, strict=True):
            colours = landscape.draw_contour(axes, surfaces[each], limits=limits)
            axes.set_title(_contour_title(each, surfaces[each]))
        landscape.add_colour_bar(panels, colours)
    axes = figure.add_subplot(grid[1, 2])
    landscape.draw_section(axes, [data["section"] | {"label": "loss"}], xlabel=FIRST)
    axes.set_title("(f) direction 1 of (e), at the model")
    return figure


def _shown(surface: dict[str, Any]) -> str:
    return surface["title"].rsplit(", ", 1)[0]


def _contour_title(name: str, surface: dict[str, Any]) -> str:
    size = len(surface["alphas"])
    letter, remark = {
        "short": ("b", ", through the model"),
        "even": ("c", ", around the model"),
        "longer": ("e", ", through the model"),
    }[name]
    return f"({letter}) {size} × {size}{remark}"


def interactive(results: dict[str, Any]) -> str:
    """Return the page of the same surfaces in 3-D, which needs no other file."""
    data = results["data"]
    title = f"The loss around {data['model']}"
    return pages.surface_html(list(data["surfaces"].values()), title=title)
