"""One scale for losses, of colour and of height: logarithmic where they range far, and never cut without saying so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from jaxrl_llm.plots.loss_grid import LOSS, LossGrid, read_grid

LOG_RATIO = 5  # a highest loss more than so many times the lowest is drawn on a log scale
TAIL = 10
BEYOND = "#dfe3e7"  # of losses beyond the limits, and of the arrows of the colour bar


def loss_limits(surfaces: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The lowest and the highest loss of these surfaces, for panels that share one scale.

    Losses that are not all positive have no log scale, so that a few huge ones would leave one colour for all others:
    where the highest is more than `TAIL` times as far from the lowest as the 90th percentile is, the scale ends at that
    percentile.
    """
    grids = [read_grid(surface) for surface in surfaces]
    values = np.concatenate([*(grid.loss.compressed() for grid in grids), [grid.centre for grid in grids]])
    low, high = float(values.min()), float(values.max())
    most = float(np.percentile(values, 90))
    if low <= 0 and low < most and high - low > TAIL * (most - low):
        high = most
    return low, high


def loss_norm(limits: tuple[float, float]) -> Normalize:
    """The scale between two losses: logarithmic if both are positive and the ratio is above `LOG_RATIO`.

    It follows from the limits alone, so that panels with equal limits have equal colours.

    Raises:
        ValueError: if the limits are not finite and in order.
    """
    low, high = limits
    if not (np.isfinite([low, high]).all() and low <= high):
        raise ValueError(f"limits must be two finite losses, the lower first, found {low} and {high}.")
    if 0 < low < high / LOG_RATIO:
        return LogNorm(low, high)
    spare = 0.0 if low < high else max(0.05 * abs(low), 1e-6)  # a flat surface
    return Normalize(low - spare, high + spare)


def is_log(norm: Normalize) -> bool:
    """Return True for a log scale."""
    return isinstance(norm, LogNorm)


def scaled(label: str, norm: Normalize) -> str:
    """An axis label that says if the scale is logarithmic."""
    return ", ".join([label] * bool(label) + ["log scale"] * is_log(norm))


def ticks(norm: Normalize, *, count: int = 7) -> np.ndarray:
    """Round losses spread evenly over the scale: those of the contour lines, the colour bar and the height."""
    if is_log(norm):
        values = np.unique([_round(value) for value in norm.inverse(np.linspace(0, 1, count + 2))[1:-1]])
    else:
        values = MaxNLocator(count).tick_values(norm.vmin, norm.vmax)
    return values[(values > norm.vmin) & (values < norm.vmax)]


def _round(loss: float) -> float:
    """The nearest round number, by ratio."""
    power = 10.0 ** np.floor(np.log10(loss))
    return float(power * min(_ROUND, key=lambda mantissa: abs(np.log(loss / power / mantissa))))


def digits(loss: float, *, padded: bool = False) -> str:
    """Return a number in four digits with a true minus sign, below 0.001 and from 10⁴ as a multiple of a power of ten.

    Args:
        padded: keep zeros at the end, so that numbers beside each other have equally many digits.
    """
    if loss and not 1e-3 <= abs(loss) < 9999.5:
        mantissa, power = f"{loss:.3e}".split("e")
        mantissa = mantissa if padded else mantissa.rstrip("0").rstrip(".")
        text = f"{mantissa}×10" + str(int(power)).translate(_RAISED)
    else:
        text = f"{loss:{'#' if padded else ''}.4g}".rstrip(".")
    return text.replace("-", "−")


def loss_colours(grid: LossGrid, norm: Normalize) -> ScalarMappable:
    """The colours of a grid's losses; beyond the scale grey, which the colour bar then shows by an arrow."""
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
    """A colour bar beside one panel or several that share a scale; the label says so where it is a log scale or cuts.

    Args:
        axes: the panels that give it room.
        colours: what their draw functions returned.
        label: of the losses.
        options: of matplotlib's `Figure.colorbar`.

    Raises:
        ValueError: if the panels' scales differ.
    """
    several = [colours] if isinstance(colours, ScalarMappable) else list(colours)
    scales = {(each.norm.vmin, each.norm.vmax) for each in several}
    if len(scales) != 1:
        raise ValueError(f"panels that share a colour bar need the same limits, found {sorted(scales)}.")
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
