"""A loss surface in three dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from jaxrl_llm.plots import style
from jaxrl_llm.plots.loss_grid import LOSS, LossGrid, read_grid
from jaxrl_llm.plots.loss_marks import FIRST, ORIGIN, SECOND, halo, span
from jaxrl_llm.plots.loss_scale import digits, is_log, loss_colours, loss_limits, loss_norm, scaled, ticks
from jaxrl_llm.plots.sheet import size_in_points

LABELS = 26.0  # points for the labels around the box
MOST_VECTORS = 2500  # more faces than that are drawn as pixels, in an SVG too


def draw_surface(
    axes: Any, surface: dict[str, Any], *, limits: tuple[float, float] | None = None, label: str = LOSS
) -> ScalarMappable:
    """Draw a loss surface into 3-D axes, the origin marked with its loss, holes left open.

    Height and colour share one scale, logarithmic where the limits differ by more than a factor of five, and then said
    to be so. What lies beyond the limits is cut off flat, in grey.

    Args:
        axes: of projection "3d".
        surface: as in `jaxrl_llm.plots.landscape`.
        limits: the lowest and the highest loss of the scale; by default `loss_limits([surface])`.
        label: of the vertical axis.

    Returns:
        The colours, for `add_colour_bar`.

    Raises:
        ValueError: for a surface or limits that cannot be drawn, saying what was expected and found.
    """
    grid = read_grid(surface)
    norm = loss_norm(limits or loss_limits([surface]))
    colours = loss_colours(grid, norm)
    faces = _faces(grid)
    shown = [np.column_stack([face[:, :2], _height(face[:, 2], norm)]) for face in faces]
    fills = [_fill(_middle(face[:, 2], norm), colours) for face in faces]
    if faces:  # one may be left without, between holes
        drawn = Poly3DCollection(shown, facecolors=fills, edgecolors=(1, 1, 1, 0.5), linewidths=0.3)
        drawn.set_rasterized(len(faces) > MOST_VECTORS)
        axes.add_collection3d(drawn)
    _mark_origin(axes, grid, norm)
    _dress(axes, grid, norm, label)
    return colours


def _faces(grid: LossGrid) -> list[np.ndarray]:
    """The corners (alpha, beta, loss) of the grid's cells: of four finite ones a quadrangle, of three a triangle."""
    alphas, betas = np.meshgrid(grid.alphas, grid.betas, indexing="ij")
    points = np.stack([alphas, betas, grid.loss.filled(np.nan)], axis=-1)
    cells = np.stack([points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]], axis=2).reshape(-1, 4, 3)
    finite = [cell[np.isfinite(cell[:, 2])] for cell in cells]
    return [cell for cell in finite if len(cell) >= 3]


def _height(loss: Any, norm: Normalize) -> Any:
    """Return the positions of losses on the vertical axis, which is linear: on a log scale their logarithms."""
    cut = np.clip(loss, norm.vmin, norm.vmax)
    return np.log10(cut) if is_log(norm) else cut


def _middle(losses: np.ndarray, norm: Normalize) -> float:
    """The loss whose colour a face has."""
    return float(np.exp(np.log(losses).mean()) if is_log(norm) and (losses > 0).all() else losses.mean())


def _fill(loss: float, colours: ScalarMappable) -> tuple[float, ...]:
    """The colour of a face; what is cut off is half transparent, so as not to hide the valley behind it."""
    norm = colours.norm
    return (*colours.cmap(norm(loss))[:3], 1.0 if norm.vmin <= loss <= norm.vmax else 0.45)


def _mark_origin(axes: Any, grid: LossGrid, norm: Normalize) -> None:
    axes.computed_zorder = False  # or the slope in front would hide the mark
    foot, top = _height(grid.centre, norm), _height(norm.vmax, norm)
    axes.plot([0, 0], [0, 0], [foot, top], color=style.ACCENT, linewidth=0.9, linestyle=(0, (2, 1.5)), zorder=5)
    axes.plot([0], [0], [foot], **ORIGIN, zorder=6)
    text = axes.text2D(0.02, 0.99, f"{digits(grid.centre, padded=True)} at the origin", fontsize=7.5, va="top")
    text.set(color=style.ACCENT, path_effects=halo(), transform=axes.transAxes)  # in a corner: it would hide the slope


def _dress(axes: Any, grid: LossGrid, norm: Normalize, label: str) -> None:
    axes.view_init(elev=34, azim=-122)
    axes.set_box_aspect((1, 1, 0.75), zoom=1 - LABELS / min(size_in_points(axes)))
    axes.set(xlim=span(grid.alphas), ylim=span(grid.betas), zlim=_height([norm.vmin, norm.vmax], norm))
    axes.set_xlabel(FIRST, labelpad=-2)
    axes.set_ylabel(SECOND, labelpad=-2)
    name, _, unit = label.partition(" (")
    lines = [scaled(name, norm)] + [f"({unit}"] * bool(unit)  # together no longer than the axis
    axes.set_zlabel("\n".join(lines), labelpad=0, fontsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.zaxis.set_major_locator(FixedLocator(_height(ticks(norm, count=4), norm)))
    axes.zaxis.set_major_formatter(FuncFormatter(lambda height, _: digits(10**height if is_log(norm) else height)))
    axes.tick_params(pad=-1)
