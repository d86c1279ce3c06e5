"""Loss landscapes: the loss over a plane of two directions around a model (Li et al. 2018), in pictures.

A *surface* is `jaxrl_llm.analysis.landscape.Surface`, or a mapping with its fields, as results files have it: `alphas`
[A] and `betas` [B], the steps along the two directions; `loss` [A][B], None or not finite at a hole; `centre`, the loss
at the origin; `unit` (by default nats per token); and for a whole figure `title`, `cosine` (of the directions) and,
where it is known, `sharpness` (the Hessian's largest eigenvalue). Alpha runs along x, beta along y.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from jaxrl_llm.plots import style
from jaxrl_llm.plots.layout import LITERAL, POINTS, sentence, size_in_points
from jaxrl_llm.plots.loss_grid import (
    FIRST,
    HATCHED,
    LOSS,
    MINIMUM,
    ORIGIN,
    SECOND,
    LossGrid,
    add_colour_bar,
    digits,
    fields_of,
    halo,
    is_log,
    loss_colours,
    loss_limits,
    loss_norm,
    read_grid,
    read_losses,
    read_steps,
    scaled,
    span,
    ticks,
)

WIDTH, HEIGHT, HEADING, MARGIN = 691.0, 360.0, 44.0, 10.0  # points


@style.look()
def landscape_figure(surface: Any, *, model: str = "", paths: Sequence[dict[str, Any]] = ()) -> Figure:
    """Draw a figure of one surface: in three dimensions and as contours, under its title and its numbers.

    Args:
        surface: as the module says, with a title and the cosine of its directions.
        model: the model's name, for the title.
        paths: as in `draw_contour`.

    Raises:
        ValueError: for a surface or paths that cannot be drawn.
    """
    grid, fields = read_grid(surface), fields_of(surface)
    if missing := [field for field in ("title", "cosine") if field not in fields]:
        raise ValueError(f"a surface must have title and cosine for its figure, but lacks {', '.join(missing)}.")
    figure = Figure(figsize=(WIDTH / POINTS, HEIGHT / POINTS), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - HEADING / HEIGHT))
    _write(figure, 20, ", ".join(filter(None, (fields["title"], model))), size=12, weight="bold")
    _write(figure, 36, _facts(grid, fields), size=8, color=style.MUTED)
    places = figure.add_gridspec(1, 2, width_ratios=(1.1, 1))
    draw_surface(figure.add_subplot(places[0], projection="3d"), surface, label=grid.label)
    contour = figure.add_subplot(places[1])
    colours = draw_contour(contour, surface, paths=paths)
    add_colour_bar(contour, colours, label=grid.label)
    return figure


def _write(figure: Figure, y: float, text: str, *, size: float, **properties: Any) -> None:
    """Write a line of text, shortened to the figure's width."""
    weight = properties.get("weight", "normal")
    line = sentence(text, size=size, width=WIDTH - 2 * MARGIN, weight=weight)
    figure.text(MARGIN / WIDTH, 1 - y / HEIGHT, line, fontsize=size, **properties, **LITERAL)


def _facts(grid: LossGrid, fields: Mapping[str, Any]) -> str:
    facts = [f"loss at the origin {digits(grid.centre)}, lowest {digits(grid.minimum[2])}"]
    facts += [f"highest {digits(float(grid.loss.max()))}", f"cosine of the directions {digits(fields['cosine'])}"]
    if fields.get("sharpness") is not None:
        facts.append(f"sharpness {digits(fields['sharpness'])}")
    facts.append(f"{grid.holes} of {grid.loss.size} points without a finite loss")
    return ", ".join(facts)


# Contours -------------------------------------------------------------------------------------------------------------

PATHS = (style.PALETTE[3], style.PALETTE[6], style.PALETTE[4], style.PALETTE[5])  # visible on every colour of the scale
BANDS = 48
APART = 19.0  # points between labels, measured before the layout has placed titles and legends


def draw_contour(
    axes: Axes,
    surface: Any,
    *,
    limits: tuple[float, float] | None = None,
    paths: Sequence[dict[str, Any]] = (),
) -> ScalarMappable:
    """Draw a loss surface as filled contours with labelled lines, with a legend below the axes.

    The origin and the lowest point of the grid are marked, and the legend gives their losses. Holes are hatched, and
    the legend gives their number.

    Args:
        axes: to draw into.
        surface: as in `jaxrl_llm.plots.landscape`.
        limits: the lowest and the highest loss of the scale; by default `loss_limits([surface])`. Panels with the same
            limits have the same scale and may share a colour bar.
        paths: each with a `label` and its `points`, pairs (alpha, beta) from start to end.

    Returns:
        The colours, for `add_colour_bar`.

    Raises:
        ValueError: for a surface, limits or paths that cannot be drawn.
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
    _fill_contours(axes, grid, colours, taken)
    if grid.holes:
        marks.append(_hatch_holes(axes, grid))
    legend = axes.legend(handles=marks, loc="upper left", bbox_to_anchor=(-0.03, -0.15), labelspacing=0.35)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return colours


def _fill_contours(axes: Axes, grid: LossGrid, colours: ScalarMappable, taken: np.ndarray) -> None:
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

    A line without room for a label is left out; the colour bar gives its level.
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
    """Hatch the whole plane below the colours, which leave the holes open."""
    corner = (grid.alphas[0], grid.betas[0])
    axes.add_patch(Rectangle(corner, np.ptp(grid.alphas), np.ptp(grid.betas), **HATCHED, linewidth=0, zorder=0))
    points = f"{grid.holes} of {grid.loss.size} points"
    return Patch(**HATCHED, linewidth=0.5, label=f"no finite loss: {points}")


def _route(path: dict[str, Any]) -> np.ndarray:
    points = np.asarray(path["points"], float)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"the points of a path must be finite pairs (alpha, beta), but are {path['points']!r:.80}.")
    return points


def _dense(route: np.ndarray) -> np.ndarray:
    """Return the path with further points between its own, so that labels keep away from all of it."""
    return np.concatenate([route[:1], *(np.linspace(*ends, 12) for ends in itertools.pairwise(route))])


def _draw_path(axes: Axes, label: str, route: np.ndarray, colour: str) -> Line2D:
    """Draw a line with a hollow circle at its start and a square at its end."""
    shared = {"color": colour, "zorder": 5, "clip_on": False}
    axes.plot(*route.T, linewidth=1.8, path_effects=halo(3.2), **shared)
    axes.plot(*route[:1].T, marker="o", markersize=6, markerfacecolor="white", markeredgewidth=1.6, **shared)
    axes.plot(*route[-1:].T, marker="s", markersize=6, markeredgecolor="white", **shared)
    return Line2D([], [], color=colour, linewidth=1.8, label=f"{label} (○ start, ■ end)")


# Three dimensions -----------------------------------------------------------------------------------------------------

LABELS = 26.0  # points around the box, for its labels
MOST_VECTORS = 2500  # a surface of more faces is drawn as pixels, in an SVG too


def draw_surface(
    axes: Any, surface: Any, *, limits: tuple[float, float] | None = None, label: str = LOSS
) -> ScalarMappable:
    """Draw a loss surface into 3-D axes, with the origin marked by its loss and holes left open.

    Height and colour share one scale; if the limits differ by more than a factor of five it is logarithmic, and the
    axis label says so. Losses beyond the limits are cut off flat, in grey.

    Args:
        axes: of projection "3d".
        surface: as in `jaxrl_llm.plots.landscape`.
        limits: the lowest and the highest loss of the scale; by default `loss_limits([surface])`.
        label: of the vertical axis.

    Returns:
        The colours, for `add_colour_bar`.

    Raises:
        ValueError: for a surface or limits that cannot be drawn.
    """
    grid = read_grid(surface)
    norm = loss_norm(limits or loss_limits([surface]))
    colours = loss_colours(grid, norm)
    faces = _faces(grid)
    shown = [np.column_stack([face[:, :2], _heights(face[:, 2], norm)]) for face in faces]
    fills = [_face_colour(_middle(face[:, 2], norm), colours) for face in faces]
    if faces:  # holes may leave none
        drawn = Poly3DCollection(shown, facecolors=fills, edgecolors=(1, 1, 1, 0.5), linewidths=0.3)
        drawn.set_rasterized(len(faces) > MOST_VECTORS)
        axes.add_collection3d(drawn)
    _mark_origin(axes, grid, norm)
    _dress(axes, grid, norm, label)
    return colours


def _faces(grid: LossGrid) -> list[np.ndarray]:
    """Return the finite corners (alpha, beta, loss) of each cell: quadrangles and, beside a hole, triangles."""
    alphas, betas = np.meshgrid(grid.alphas, grid.betas, indexing="ij")
    points = np.stack([alphas, betas, grid.loss.filled(np.nan)], axis=-1)
    cells = np.stack([points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]], axis=2).reshape(-1, 4, 3)
    finite = [cell[np.isfinite(cell[:, 2])] for cell in cells]
    return [cell for cell in finite if len(cell) >= 3]


def _heights(loss: Any, norm: Normalize) -> Any:
    """Return the heights of losses: on a log scale their logarithms, for the 3-D axis is linear."""
    cut = np.clip(loss, norm.vmin, norm.vmax)
    return np.log10(cut) if is_log(norm) else cut


def _middle(losses: np.ndarray, norm: Normalize) -> float:
    """Return the mean loss of a face, which decides its colour."""
    return float(np.exp(np.log(losses).mean()) if is_log(norm) and (losses > 0).all() else losses.mean())


def _face_colour(loss: float, colours: ScalarMappable) -> tuple[float, ...]:
    """Return the colour of a face; a face that is cut off is half transparent, so that the valley stays visible."""
    norm = colours.norm
    return (*colours.cmap(norm(loss))[:3], 1.0 if norm.vmin <= loss <= norm.vmax else 0.45)


def _mark_origin(axes: Any, grid: LossGrid, norm: Normalize) -> None:
    axes.computed_zorder = False  # else the slope in front hides the mark
    foot, top = _heights(grid.centre, norm), _heights(norm.vmax, norm)
    axes.plot([0, 0], [0, 0], [foot, top], color=style.ACCENT, linewidth=0.9, linestyle=(0, (2, 1.5)), zorder=5)
    axes.plot([0], [0], [foot], **ORIGIN, zorder=6)
    text = axes.text2D(0.02, 0.99, f"{digits(grid.centre, padded=True)} at the origin", fontsize=7.5, va="top")
    text.set(color=style.ACCENT, path_effects=halo(), transform=axes.transAxes)  # in a corner, off the slope


def _dress(axes: Any, grid: LossGrid, norm: Normalize, label: str) -> None:
    axes.view_init(elev=34, azim=-122)
    axes.set_box_aspect((1, 1, 0.75), zoom=1 - LABELS / min(size_in_points(axes)))
    axes.set(xlim=span(grid.alphas), ylim=span(grid.betas), zlim=_heights([norm.vmin, norm.vmax], norm))
    axes.set_xlabel(FIRST, labelpad=-2)
    axes.set_ylabel(SECOND, labelpad=-2)
    name, _, unit = label.partition(" (")
    lines = [scaled(name, norm)] + [f"({unit}"] * bool(unit)  # in two lines, so that they are not longer than the axis
    axes.set_zlabel("\n".join(lines), labelpad=0, fontsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.zaxis.set_major_locator(FixedLocator(_heights(ticks(norm, count=4), norm)))
    axes.zaxis.set_major_formatter(FuncFormatter(lambda height, _: digits(10**height if is_log(norm) else height)))
    axes.tick_params(pad=-1)


# Sections -------------------------------------------------------------------------------------------------------------


def draw_section(
    axes: Axes,
    sections: Sequence[dict[str, Any]],
    *,
    limits: tuple[float, float] | None = None,
    xlabel: str = "step along the direction (× ‖d‖)",
    label: str = LOSS,
) -> None:
    """Draw the loss along lines through the model, and dashed the quadratic that gradient and Hessian predict.

    The vertical axis covers the losses, not the quadratics. If losses differ by more than a factor of five it is
    logarithmic, and its label says so. At a loss that is not finite the line has a gap, and the legend gives the number
    of such points.

    Args:
        axes: to draw into.
        sections: each with `label`, `alphas` [A], `loss` [A] (None where not finite), `quadratic` [A] (the same),
            `curvature` (along the line, at the origin) and optionally `sharpness` (the Hessian's largest eigenvalue).
        limits: the lowest and the highest loss of the vertical axis; by default those of the losses.
        xlabel: of the horizontal axis.
        label: of the vertical axis.

    Raises:
        ValueError: if there is no section, or one whose lists differ in length or hold no finite loss.
    """
    if not sections:
        raise ValueError("there must be at least one section to draw, but there is none.")
    lines = [_read_section(section) for section in sections]
    values = np.concatenate([loss.compressed() for _, loss, _ in lines])
    norm = loss_norm(limits or (float(values.min()), float(values.max())))
    handles = []
    for index, (section, (alphas, loss, quadratic)) in enumerate(zip(sections, lines, strict=True)):
        colour = style.PALETTE[index % len(style.PALETTE)]
        handles += axes.plot(alphas, loss.filled(np.nan), color=colour, label=_section_label(section, loss))
        axes.plot(alphas, quadratic, color=colour, linestyle=(0, (4, 1.6)), linewidth=1.2)
    dashed = {"color": style.MUTED, "linestyle": (0, (4, 1.6)), "linewidth": 1.2}
    handles.append(Line2D([], [], **dashed, label="predicted by gradient and Hessian"))
    axes.axvline(0, color=style.FAINT, linewidth=0.8, zorder=0)
    axes.set(xlabel=xlabel, ylabel=scaled(label, norm))
    axes.set_xlim(min(alphas[0] for alphas, _, _ in lines), max(alphas[-1] for alphas, _, _ in lines))
    _set_height(axes, norm)
    legend = axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.03, -0.2))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _read_section(section: dict[str, Any]) -> tuple[np.ndarray, np.ma.MaskedArray, np.ndarray]:
    needed = ("label", "alphas", "loss", "quadratic", "curvature")
    if missing := [field for field in needed if field not in section]:
        raise ValueError(f"a section must have {', '.join(needed)}, but lacks {', '.join(missing)}.")
    alphas = read_steps(section["alphas"], "alphas")
    lengths = {name: len(section[name]) for name in ("loss", "quadratic")}
    if set(lengths.values()) != {len(alphas)}:
        raise ValueError(f"a section of {len(alphas)} alphas must have as many values, but has {lengths}.")
    return alphas, read_losses(section["loss"]), np.asarray(section["quadratic"], float)


def _section_label(section: dict[str, Any], loss: np.ma.MaskedArray) -> str:
    facts = [f"curvature {digits(section['curvature'])}"]
    if section.get("sharpness") is not None:
        facts.append(f"sharpness {digits(section['sharpness'])}")
    if holes := int(np.ma.count_masked(loss)):
        facts.append(f"no finite loss at {holes} of {loss.size} points")
    return f"{section['label']}: {', '.join(facts)}"


def _set_height(axes: Axes, norm: Any) -> None:
    low, high = norm.vmin, norm.vmax
    if is_log(norm):
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        axes.yaxis.set_major_locator(FixedLocator(ticks(norm)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: digits(loss)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
