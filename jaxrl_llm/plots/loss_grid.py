"""Loss surfaces for drawing: the checked grid, one scale for colour and height, and the marks of every picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from jaxrl_llm.plots import style

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

    If losses are not all positive there is no log scale, and a few huge losses would leave one colour for all others.
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


def digits(loss: float, *, padded: bool = False) -> str:
    """Return a number in four digits with a true minus sign, below 0.001 and from 10⁴ as a multiple of a power of ten.

    Args:
        padded: keep trailing zeros, so that numbers in a column have equally many digits.
    """
    if loss and not 1e-3 <= abs(loss) < 9999.5:
        mantissa, power = f"{loss:.3e}".split("e")
        mantissa = mantissa if padded else mantissa.rstrip("0").rstrip(".")
        text = f"{mantissa}×10" + str(int(power)).translate(_RAISED)
    else:
        text = f"{loss:{'#' if padded else ''}.4g}".rstrip(".")
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
    bar.set_ticks(ticks(several[0].norm), minor=False)
    bar.minorticks_off()
    bar.formatter = lambda loss, _: digits(loss)
    bar.outline.set_visible(False)
    note = "" if extend == "neither" else "\ngrey: beyond the scale"
    bar.set_label(f"{scaled(label, several[0].norm)}{note}")
    return bar


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
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
