"""Loss landscapes: the loss over a plane of two directions around a model (Li et al. 2018), in pictures.

A *surface* is a dict: `title`; `alphas` [A] and `betas` [B], the steps along the two directions; `loss` [A][B], None
where it is not finite (a hole); `centre`, the loss at the origin; and for the facts under a figure's title `minimum`,
`maximum`, `cosine` (between the directions) and, where known, `sharpness` (the Hessian's top eigenvalue) and `unit`
(else nats per token). Alpha runs along x, beta along y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.loss_contour import draw_contour
from jaxrl_llm.plots.loss_grid import read_grid
from jaxrl_llm.plots.loss_scale import add_colour_bar, digits, loss_limits
from jaxrl_llm.plots.loss_section import draw_section
from jaxrl_llm.plots.loss_surface import draw_surface
from jaxrl_llm.plots.sheet import POINTS
from jaxrl_llm.plots.text import LITERAL, sentence

__all__ = ["add_colour_bar", "draw_contour", "draw_section", "draw_surface", "landscape_figure", "loss_limits"]

WIDTH, HEIGHT, HEADING, MARGIN = 691.0, 360.0, 44.0, 10.0  # points


@style.look()
def landscape_figure(surface: dict[str, Any], *, model: str, paths: Sequence[dict[str, Any]] = ()) -> Figure:
    """A figure of one surface: in three dimensions, and as contours with the paths; over them its title and its facts.

    Args:
        surface: as the module says, with all its fields.
        model: the model's name, for the title.
        paths: as in `draw_contour`.

    Raises:
        ValueError: for a surface or paths that cannot be drawn, saying what was expected and found.
    """
    facts = _facts(surface)
    figure = Figure(figsize=(WIDTH / POINTS, HEIGHT / POINTS), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - HEADING / HEIGHT))
    _write(figure, 20, f"{surface['title']}, {model}", size=12, weight="bold")
    _write(figure, 36, facts, size=8, color=style.MUTED)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.1, 1))
    draw_surface(figure.add_subplot(grid[0], projection="3d"), surface, label=read_grid(surface).label)
    contour = figure.add_subplot(grid[1])
    colours = draw_contour(contour, surface, paths=paths)
    add_colour_bar(contour, colours, label=read_grid(surface).label)
    return figure


def _write(figure: Figure, y: float, text: str, *, size: float, **properties: Any) -> None:
    """A line of text, shortened to the figure's width."""
    weight = properties.get("weight", "normal")
    line = sentence(text, size=size, width=WIDTH - 2 * MARGIN, weight=weight)
    figure.text(MARGIN / WIDTH, 1 - y / HEIGHT, line, fontsize=size, **properties, **LITERAL)


def _facts(surface: dict[str, Any]) -> str:
    if missing := [field for field in ("title", "minimum", "maximum", "cosine") if field not in surface]:
        raise ValueError(f"the figure of a surface also needs its {', '.join(missing)}.")
    grid = read_grid(surface)
    facts = [f"loss at the origin {digits(grid.centre)}, lowest {digits(surface['minimum'])}"]
    facts += [f"highest {digits(surface['maximum'])}", f"cosine of the directions {digits(surface['cosine'])}"]
    if surface.get("sharpness") is not None:
        facts.append(f"sharpness {digits(surface['sharpness'])}")
    facts.append(f"{grid.holes} of {grid.loss.size} points without a finite loss")
    return ", ".join(facts)
