"""The loss around a trained GPT-2, over two random orthogonal directions."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import interactive as pages
from jaxrl_llm.plots import landscape, style
from jaxrl_llm.plots.text import LITERAL

FACTS = ("centre", "minimum", "maximum")
GRIDS = {"short": "short text", "even": "even grid", "longer": "longer text"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """A row a text: the surface, its contours, and beside them the even grid and the numbers."""
    data = results["data"]
    surfaces = data["surfaces"]
    figure = Figure(figsize=(10.4, 6.6), layout="constrained")
    figure.suptitle(
        f"The loss around {data['model']}: two random orthogonal directions, every tensor of its own norm",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    grid = figure.add_gridspec(2, 3, width_ratios=(1.2, 1, 1))
    for row, (name, contours) in enumerate({"short": ("short", "even"), "longer": ("longer",)}.items()):
        axes = figure.add_subplot(grid[row, 0], projection="3d")
        landscape.draw_surface(axes, surfaces[name], label="")
        axes.set_title(f"({'ad'[row]}) {_shown(surfaces[name])}", **LITERAL)
        limits = landscape.loss_limits([surfaces[each] for each in contours])
        panels = [figure.add_subplot(grid[row, 1 + column]) for column in range(len(contours))]
        for axes, each in zip(panels, contours, strict=True):
            colours = landscape.draw_contour(axes, surfaces[each], limits=limits)
            axes.set_title(_contour_title(each, surfaces[each]))
        landscape.add_colour_bar(panels, colours)
    _write_losses(figure.add_subplot(grid[1, 2]), surfaces)
    return figure


def _shown(surface: dict[str, Any]) -> str:
    return surface["title"].rsplit(", ", 1)[0]


def _contour_title(name: str, surface: dict[str, Any]) -> str:
    size = len(surface["alphas"])
    letter, remark = {
        "short": ("b", ", the model in the middle"),
        "even": ("c", ", the model between points"),
        "longer": ("e", ""),
    }[name]
    return f"({letter}) {size} × {size}{remark}"


def _write_losses(axes: Axes, surfaces: dict[str, Any]) -> None:
    """The losses of each grid."""
    axes.axis("off")
    axes.set_title("(f) nats per token")
    rows = [[f"{surfaces[name][fact]:.3f}" for fact in FACTS] for name in GRIDS]
    table = axes.table(
        rows, colLabels=FACTS, rowLabels=list(GRIDS.values()), bbox=(0.24, 0.5, 1.06, 0.42), edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set_edgecolor(style.FAINT)


def interactive(results: dict[str, Any]) -> str:
    """The same surfaces, to be turned by hand."""
    data = results["data"]
    return pages.surface_html(list(data["surfaces"].values()), title=f"The loss around {data['model']}")
