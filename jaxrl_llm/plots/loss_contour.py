"""A loss surface from above: filled contours, and paths over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.contour import QuadContourSet
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from jaxrl_llm.plots import style
from jaxrl_llm.plots.loss_grid import LossGrid, read_grid
from jaxrl_llm.plots.loss_marks import FIRST, HATCHED, MINIMUM, ORIGIN, SECOND, halo, span
from jaxrl_llm.plots.loss_scale import digits, loss_colours, loss_limits, loss_norm, ticks
from jaxrl_llm.plots.sheet import size_in_points

PATHS = (style.PALETTE[3], style.PALETTE[6], style.PALETTE[4], style.PALETTE[5])  # seen on every colour of the scale
BANDS = 48
APART = 19.0  # points between labels, measured before the layout makes room for what is around the axes


def draw_contour(
    axes: Axes,
    surface: dict[str, Any],
    *,
    limits: tuple[float, float] | None = None,
    paths: Sequence[dict[str, Any]] = (),
) -> ScalarMappable:
    """Draw a loss surface as filled contours with labelled lines; its legend stands under the axes.

    The origin, with its loss, and the lowest point of the grid are marked; the legend says if that lies on the grid's
    edge. Where the loss is not finite the plane is hatched, and the legend says at how many points.

    Args:
        axes: to draw into.
        surface: as in `jaxrl_llm.plots.landscape`.
        limits: the lowest and the highest loss of the scale; by default `loss_limits([surface])`. Panels with the same
            limits have the same scale and may share a colour bar.
        paths: each with a `label` and its `points`, pairs (alpha, beta) from start to end.

    Returns:
        The colours, for `add_colour_bar`.

    Raises:
        ValueError: for a surface, limits or paths that cannot be drawn, saying what was expected and found.
    """
    grid = read_grid(surface)
    norm = loss_norm(limits or loss_limits([surface]))
    colours = loss_colours(grid, norm)
    routes = [_route(path) for path in paths]
    reached = np.concatenate([[(0.0, 0.0)], *routes])
    axes.set(xlim=span(grid.alphas, *reached[:, 0]), ylim=span(grid.betas, *reached[:, 1]), xlabel=FIRST, ylabel=SECOND)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(visible=False)
    marks = _mark_points(axes, grid)
    for index, (path, route) in enumerate(zip(paths, routes, strict=True)):
        marks.append(_draw_path(axes, str(path["label"]), route, PATHS[index % len(PATHS)]))
    taken = np.concatenate([[(0.0, 0.0), grid.minimum[:2]], *map(_dense, routes)])
    _fill(axes, grid, colours, taken)
    if grid.holes:
        marks.append(_hatch_holes(axes, grid))
    legend = axes.legend(handles=marks, loc="upper left", bbox_to_anchor=(-0.03, -0.15), labelspacing=0.35)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return colours


def _fill(axes: Axes, grid: LossGrid, colours: ScalarMappable, taken: np.ndarray) -> None:
    norm = colours.norm
    levels = norm.inverse(np.linspace(0, 1, BANDS + 1))
    levels[[0, -1]] = norm.vmin, norm.vmax  # exactly, or rounding would leave the highest point open
    losses = grid.loss.T  # matplotlib's rows run along y
    shared = {"norm": norm, "corner_mask": True}
    filled = axes.contourf(
        grid.alphas, grid.betas, losses, levels, cmap=colours.cmap, extend=colours.cmap.colorbar_extend, **shared
    )
    filled.set_rasterized(True)  # or an SVG's viewers show the seams between bands
    at = [level for level in ticks(norm) if grid.loss.min() < level < grid.loss.max()]
    if at:
        lines = axes.contour(grid.alphas, grid.betas, losses, at, colors="white", linewidths=0.7, corner_mask=True)
        places = _places(axes, lines, taken)
        for text in axes.clabel(lines, fmt=digits, fontsize=7, colors=style.INK, inline=False, manual=places):
            text.set_path_effects(halo())


def _places(axes: Axes, lines: QuadContourSet, taken: np.ndarray) -> list[np.ndarray]:
    """Return for each line its point that is farthest from the edge, marks, paths and other labels.

    A line without enough room stays without a label; the colour bar names its level.
    """
    to_points = axes.transData + axes.transAxes.inverted()
    size = np.asarray(size_in_points(axes))
    kept, places = to_points.transform(taken) * size, []
    for line in (line for level in lines.allsegs for line in level if len(line)):
        at = to_points.transform(line) * size
        beside = np.linalg.norm(at[:, None] - kept, axis=-1).min(axis=1)
        room = np.minimum(beside, 2 * np.minimum(at, size - at).min(axis=1))
        best = int(room.argmax())
        if room[best] >= APART:
            kept = np.vstack([kept, at[best]])
            places.append(line[best])
    return places


def _mark_points(axes: Axes, grid: LossGrid) -> list[Artist]:
    alpha, beta, lowest = grid.minimum
    between = "" if grid.has_origin else ", between grid points"
    edge = ", at its edge" if alpha in grid.alphas[[0, -1]] or beta in grid.betas[[0, -1]] else ""
    shared = {"linestyle": "", "clip_on": False}
    lowest_is, origin_is = (digits(loss, padded=True) for loss in (lowest, grid.centre))
    (low,) = axes.plot([alpha], [beta], **MINIMUM, **shared, zorder=6, label=f"lowest of the grid: {lowest_is}{edge}")
    (origin,) = axes.plot([0], [0], **ORIGIN, **shared, zorder=7, label=f"origin: {origin_is}{between}")
    return [origin, low]


def _hatch_holes(axes: Axes, grid: LossGrid) -> Patch:
    """Hatch the whole plane under the colours, which leave the holes open."""
    corner = (grid.alphas[0], grid.betas[0])
    axes.add_patch(Rectangle(corner, np.ptp(grid.alphas), np.ptp(grid.betas), **HATCHED, linewidth=0, zorder=0))
    points = f"{grid.holes} of {grid.loss.size} points"
    return Patch(**HATCHED, linewidth=0.5, label=f"no finite loss: {points}")


def _route(path: dict[str, Any]) -> np.ndarray:
    points = np.asarray(path["points"], float)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"the points of a path must be finite pairs (alpha, beta), found {path['points']!r:.80}.")
    return points


def _dense(route: np.ndarray) -> np.ndarray:
    """Return the path with points also between its own, from which labels keep away."""
    return np.concatenate([route[:1], *(np.linspace(*ends, 12) for ends in itertools.pairwise(route))])


def _draw_path(axes: Axes, label: str, route: np.ndarray, colour: str) -> Line2D:
    """A line with a hollow circle at its start and a square at its end."""
    shared = {"color": colour, "zorder": 5, "clip_on": False}
    axes.plot(*route.T, linewidth=1.8, path_effects=halo(3.2), **shared)
    axes.plot(*route[:1].T, marker="o", markersize=6, markerfacecolor="white", markeredgewidth=1.6, **shared)
    axes.plot(*route[-1:].T, marker="s", markersize=6, markeredgecolor="white", **shared)
    return Line2D([], [], color=colour, linewidth=1.8, label=f"{label} (○ start, ■ end)")
