"""A figure measured in points from its top left corner, for drawings whose size follows from their content."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots.text import LITERAL, sentence

POINTS = 72  # an inch


class Sheet:
    """A figure of `width` times `height` points on which axes and lines of text are placed."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / POINTS, height / POINTS))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes with their top left corner at (x, y)."""
        extent = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(extent)

    def line(self, x: float, y: float, text: str, *, size: float, width: float, **properties: Any) -> None:
        """A line of text, its base at (x, y), shortened to `width`."""
        text = sentence(text, size=size, width=width, weight=properties.get("weight", "normal"))
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **properties, **LITERAL)


def size_in_points(axes: Axes) -> tuple[float, float]:
    """The present width and height of axes."""
    inches = axes.get_window_extent().transformed(axes.get_figure().dpi_scale_trans.inverted())
    return inches.width * POINTS, inches.height * POINTS
