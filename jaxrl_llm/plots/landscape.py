"""Loss landscapes: the loss over a plane of two directions around a model (Li et al. 2018), in pictures.

A *surface* is `jaxrl_llm.analysis.landscape.Surface`, or a mapping with its fields, as results files have it: `alphas`
[A] and `betas` [B], the steps along the two directions; `loss` [A][B], None or not finite at a hole; `centre`, the loss
at the origin; `unit` (by default nats per token); and for a whole figure `title`, `cosine` (of the directions) and,
where it is known, `sharpness` (the Hessian's largest eigenvalue) and, if it did not converge, `residuals`. Alpha runs
along x, beta along y.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from jaxrl_llm.plots import style
from jaxrl_llm.plots.style import LITERAL, POINTS, sentence, size_in_points

# Grids ----------------------------------------------------------------------------------------------------------------

LOSS = "loss (nats per token)"


@dataclasses.dataclass(frozen=True)
class LossGrid:
    """Losses over the plane of two directions.

    Args:
        alphas: [A] steps along the first direction, ascending; drawn along x.
        betas: [B] steps along the second direction, ascending; drawn along y.
        loss: [A, B] masked where the loss is not finite.
        centre: the loss at the origin, which need not be a point of the grid.
        label: of an axis of losses, with the unit.
    """

    alphas: np.ndarray
    betas: np.ndarray
    loss: np.ma.MaskedArray
    centre: float
    label: str = LOSS

    @property
    def holes(self) -> int:
        """Return the number of points of the grid without a finite loss."""
        return int(np.ma.count_masked(self.loss))

    @property
    def minimum(self) -> tuple[float, float, float]:
        """Return alpha, beta and loss of the lowest point of the grid."""
        row, column = np.unravel_index(np.ma.argmin(self.loss), self.loss.shape)
        return float(self.alphas[row]), float(self.betas[column]), float(self.loss[row, column])

    @property
    def has_origin(self) -> bool:
        """Return True if the origin is a point of the grid, as in a symmetric grid of odd size."""
        return all(np.isclose(steps, 0, atol=1e-9 * np.ptp(steps)).any() for steps in (self.alphas, self.betas))


def fields_of(surface: Any) -> Mapping[str, Any]:
    """Return the fields of a surface, which is a mapping or an object that has them as attributes."""
    return surface if isinstance(surface, Mapping) else vars(surface)


def read_grid(surface: Any) -> LossGrid:
    """Read the grid of a surface: `alphas` [A], `betas` [B], `loss` [A][B] (None where not finite) and `centre`.

    Raises:
        ValueError: if a field is missing, the grid has fewer than two steps along a direction or they do not ascend,
            the losses are not A x B, none of them is finite, or the loss at the origin is not.
    """
    surface = fields_of(surface)
    if missing := [field for field in ("alphas", "betas", "loss", "centre") if field not in surface]:
        raise ValueError(f"a loss surface must have alphas, betas, loss and centre, but lacks {', '.join(missing)}.")
    alphas, betas = (read_steps(surface[name], name) for name in ("alphas", "betas"))
    rows = surface["loss"]
    widths = sorted({len(row) for row in rows})
    if len(rows) != len(alphas) or widths != [len(betas)]:
        found = f"{len(rows)} x {' or '.join(map(str, widths)) or 0}"
        raise ValueError(f"loss must be {len(alphas)} x {len(betas)} (alphas x betas), but is {found}.")
    loss = read_losses([value for row in rows for value in row]).reshape(len(alphas), len(betas))
    (centre,) = np.asarray([surface["centre"]], float)
    if not np.isfinite(centre):
        raise ValueError(f"the loss at the origin must be a finite number, but is {surface['centre']}.")
    label = f"loss ({surface['unit']})" if "unit" in surface else LOSS
    return LossGrid(alphas, betas, loss, float(centre), label)


def read_steps(values: Sequence[float], name: str, *, least: int = 2) -> np.ndarray:
    """Check and return the steps along a direction: at least two, ascending."""
    steps = np.asarray(values, float)
    if steps.ndim != 1 or len(steps) < least:
        hint = "; one row of a grid is drawn as a section" if steps.size == 1 else ""
        raise ValueError(f"{name} must be at least {least} numbers, but are {steps.size}{hint}.")
    if not (np.isfinite(steps).all() and (np.diff(steps) > 0).all()):
        raise ValueError(f"{name} must be finite and ascending, but are {', '.join(f'{step:g}' for step in steps)}.")
    return steps


def read_losses(values: Sequence[float | None]) -> np.ma.MaskedArray:
    """Return losses masked where they are None or not finite; at least one must be finite."""
    losses = np.ma.masked_invalid(np.asarray(values, float))
    if not losses.count():
        raise ValueError(f"at least one loss must be finite, but none of {losses.size} is.")
    return losses


# Scale ----------------------------------------------------------------------------------------------------------------

LOG_RATIO = 5  # a log scale is used if the highest loss is more than this many times the lowest
TAIL = 10
BEYOND = "#dfe3e7"  # colour of losses beyond the limits, and of the colour bar's arrows


def loss_limits(surfaces: Sequence[Any]) -> tuple[float, float]:
    """Return the lowest and the highest loss of these surfaces, for panels that share one scale.

    A log scale needs positive losses. Without one, a few huge losses would leave a single colour for all others.
    Then the scale ends at the 90th percentile if the highest loss is more than `TAIL` times as far from the lowest.
    """
    grids = [read_grid(surface) for surface in surfaces]
    values = np.concatenate([*(grid.loss.compressed() for grid in grids), [grid.centre for grid in grids]])
    low, high = float(values.min()), float(values.max())
    most = float(np.percentile(values, 90))
    if low <= 0 and low < most and high - low > TAIL * (most - low):
        high = most
    return low, high


def loss_norm(limits: tuple[float, float]) -> Normalize:
    """Return the scale between two losses: logarithmic if both are positive and their ratio is above `LOG_RATIO`.

    It depends on the limits alone, so that panels with equal limits have equal colours.

    Raises:
        ValueError: if the limits are not finite and in order.
    """
    low, high = limits
    if not (np.isfinite([low, high]).all() and low <= high):
        raise ValueError(f"limits must be two finite losses, the lower first, but are {low} and {high}.")
    if 0 < low < high / LOG_RATIO:
        return LogNorm(low, high)
    spare = 0.0 if low < high else max(0.05 * abs(low), 1e-6)  # a flat surface
    return Normalize(low - spare, high + spare)


def is_log(norm: Normalize) -> bool:
    """Return True for a log scale."""
    return isinstance(norm, LogNorm)


def scaled(label: str, norm: Normalize) -> str:
    """Return an axis label, with "log scale" on a log scale."""
    return ", ".join([label] * bool(label) + ["log scale"] * is_log(norm))


def ticks(norm: Normalize, *, count: int = 7) -> np.ndarray:
    """Return round losses spread evenly over the scale, for contour lines, colour bar and vertical axis."""
    if is_log(norm):
        values = np.unique([_round(value) for value in norm.inverse(np.linspace(0, 1, count + 2))[1:-1]])
    else:
        values = MaxNLocator(count).tick_values(norm.vmin, norm.vmax)
    return values[(values > norm.vmin) & (values < norm.vmax)]


def _round(loss: float) -> float:
    """Return the nearest round number, by ratio."""
    power = 10.0 ** np.floor(np.log10(loss))
    return float(power * min(_ROUND, key=lambda mantissa: abs(np.log(loss / power / mantissa))))


def digits(loss: float, *, padded: bool = False, among: Iterable[float] = ()) -> str:
    """Return a number in four digits with a true minus sign, below 0.001 and from 10⁴ as a multiple of a power of ten.

    Args:
        padded: keep trailing zeros, so that numbers in a column have equally many digits.
        among: numbers, such as the ticks of a scale, that are to be told apart: more than four digits if that needs it.
    """
    several = np.unique(np.asarray([*among], float))
    count = next((n for n in range(4, MOST_DIGITS) if len({_digits(each, n) for each in several}) == len(several)), 4)
    return _digits(loss, count, padded=padded)


def _digits(loss: float, count: int, *, padded: bool = False) -> str:
    if loss and not 1e-3 <= abs(loss) < 10 ** max(4, count - 1) - 0.5:
        mantissa, power = f"{loss:.{count - 1}e}".split("e")
        mantissa = mantissa if padded else mantissa.rstrip("0").rstrip(".")
        text = f"{mantissa}×10" + str(int(power)).translate(_RAISED)
    else:
        text = f"{loss:{'#' if padded else ''}.{count}g}".rstrip(".")
    return text.replace("-", "−")


def loss_colours(grid: LossGrid, norm: Normalize) -> ScalarMappable:
    """Return the colours of a grid's losses; beyond the scale they are grey, and the colour bar gets an arrow."""
    losses = np.append(grid.loss.compressed(), grid.centre)
    ends = (bool((losses < norm.vmin).any()), bool((losses > norm.vmax).any()))
    cmap = matplotlib.colormaps["viridis"].with_extremes(under=BEYOND, over=BEYOND)
    cmap.colorbar_extend = _EXTEND[ends]
    return ScalarMappable(norm, cmap)


def add_colour_bar(
    axes: Axes | Sequence[Axes],
    colours: ScalarMappable | Sequence[ScalarMappable],
    *,
    label: str = LOSS,
    **options: Any,
) -> Colorbar:
    """Add a colour bar for one panel or several that share a scale; its label names a log scale and cut-off losses.

    Args:
        axes: the panels that make room for it.
        colours: return values of their draw functions.
        label: of the losses.
        options: keyword arguments of matplotlib's `Figure.colorbar`.

    Raises:
        ValueError: if the panels' scales differ.
    """
    several = [colours] if isinstance(colours, ScalarMappable) else list(colours)
    scales = {(each.norm.vmin, each.norm.vmax) for each in several}
    if len(scales) != 1:
        raise ValueError(f"panels that share a colour bar must have the same limits, but have {sorted(scales)}.")
    ends = [each.cmap.colorbar_extend for each in several]
    extend = _EXTEND[any(end in ("min", "both") for end in ends), any(end in ("max", "both") for end in ends)]
    figure = np.ravel(axes)[0].get_figure()
    bar = figure.colorbar(several[0], ax=axes, extend=extend, **options)
    at = ticks(several[0].norm)
    bar.set_ticks(at, minor=False)
    bar.minorticks_off()
    bar.formatter = lambda loss, _: digits(loss, among=at)
    bar.outline.set_visible(False)
    note = "" if extend == "neither" else "\ngrey: beyond the scale"
    bar.set_label(f"{scaled(label, several[0].norm)}{note}")
    return bar


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MOST_DIGITS = 15
_ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
_EXTEND = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}


# Marks ----------------------------------------------------------------------------------------------------------------

FIRST, SECOND = "direction 1 (× ‖d₁‖)", "direction 2 (× ‖d₂‖)"
ORIGIN: dict[str, Any] = {"marker": "o", "markersize": 6, "color": style.ACCENT, "markeredgecolor": "white"}
MINIMUM: dict[str, Any] = {"marker": "D", "markersize": 7, "color": "white", "markeredgecolor": style.INK}
HATCHED: dict[str, Any] = {"facecolor": "white", "edgecolor": style.EDGE, "hatch": "//////"}


def halo(width: float = 2.0) -> list[withStroke]:
    """Return a white outline that keeps dark letters and lines visible on any colour."""
    return [withStroke(linewidth=width, foreground="white")]


def span(steps: np.ndarray, *others: float) -> tuple[float, float]:
    """Return the range from the first to the last step, widened to contain zero and the other positions."""
    low, high = min(steps[0], 0, *others), max(steps[-1], 0, *others)
    return float(low), float(high)


# The whole figure -----------------------------------------------------------------------------------------------------

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
    losses = (grid.centre, grid.minimum[2], float(grid.loss.max()))
    origin, lowest, highest = (digits(loss, among=losses) for loss in losses)
    facts = [f"loss at the origin {origin}, lowest {lowest}, highest {highest}"]
    facts += [f"cosine of the directions {digits(fields['cosine'])}"]
    if fields.get("sharpness") is not None:
        far = fields.get("residuals")
        both = " and ".join(digits(float(f"{each:.2g}")) for each in far or ())
        note = f" (not converged: residuals {both})" if far else ""
        facts.append(f"sharpness {digits(fields['sharpness'])}{note}")
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
        label = functools.partial(digits, among=at)
        for text in axes.clabel(lines, fmt=label, fontsize=7, colors=style.INK, inline=False, manual=places):
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
    lowest_is, origin_is = (digits(loss, padded=True, among=(lowest, grid.centre)) for loss in (lowest, grid.centre))
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
    at = ticks(norm, count=4)
    axes.zaxis.set_major_locator(FixedLocator(_heights(at, norm)))
    shown = functools.partial(digits, among=at)
    axes.zaxis.set_major_formatter(FuncFormatter(lambda height, _: shown(10**height if is_log(norm) else height)))
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
