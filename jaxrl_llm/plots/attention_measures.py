"""Plots of what is measured of attention heads: entropy by layer, error rates by head, and where the weight falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from jaxrl_llm.plots import style

Estimate = dict[str, float]  # estimate, low, high
KINDS = {"own": "itself", "previous": "previous", "next": "next", "first": "first", "last": "last", "other": "others"}
KIND_COLOURS = (style.PALETTE[0], style.PALETTE[5], style.PALETTE[2], style.PALETTE[4], style.PALETTE[1], style.FAINT)


def draw_by_layer(axes: Axes, curves: Sequence[dict[str, Any]], *, label: str = "entropy (nats)") -> None:
    """A quantity by layer: means with their intervals as lines, each head as a point.

    `curves` have a `name`, `layers` (an estimate with `low` and `high` for each layer) and `heads` [layer][head].
    """
    for index, curve in enumerate(curves):
        colour, place = style.PALETTE[index], np.arange(len(curve["layers"]))
        mean, low, high = (np.asarray([each[part] for each in curve["layers"]]) for part in ("estimate", "low", "high"))
        axes.fill_between(place, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(place, mean, color=colour, marker="o", label=curve["name"])
        shift = 0.05 * (index - (len(curves) - 1) / 2)
        for layer, heads in enumerate(curve["heads"]):
            axes.plot([layer + shift] * len(heads), heads, ".", color=colour, markersize=3, alpha=0.55)
    layers = max(len(curve["layers"]) for curve in curves)
    axes.set(xlabel="layer", ylabel=label, ylim=(0, None), xlim=(-0.3, layers - 0.7))
    axes.set_xticks(range(layers))
    axes.grid(axis="x", visible=False)


def draw_error_rates(
    axes: Axes, rates: Sequence[Sequence[Estimate]], *, best: tuple[int, int], bound: float | None = None
) -> None:
    """The alignment error rate of each head with its interval, [layer][head], heads of a layer side by side.

    Args:
        best: the layer and head that is emphasised.
        bound: a rate that is marked by a line.
    """
    places, centres, at = [], [], 0.0
    for layer, heads in enumerate(rates):
        for head, rate in enumerate(heads):
            chosen = (layer, head) == tuple(best)
            colour = style.ACCENT if chosen else style.PALETTE[0]
            error = [[max(0.0, rate["estimate"] - rate["low"])], [max(0.0, rate["high"] - rate["estimate"])]]
            axes.errorbar(at, rate["estimate"], yerr=error, fmt="o", color=colour, elinewidth=1.2, markersize=4)
            if chosen:
                text = f"{rate['estimate']:.1%}"
                beside = {"xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
                axes.annotate(text, (at, rate["low"]), color=colour, fontsize=7.5, weight="bold", **beside)
            places.append((at, str(head)))
            at += 1
        centres.append((at - (len(heads) + 1) / 2, f"layer {layer}"))
        at += 0.8
    top = 1.25 * max(rate["high"] for heads in rates for rate in heads)
    if bound is not None:
        axes.axhline(bound, color=style.MUTED, linestyle=(0, (3, 2)), linewidth=0.9)
    axes.set(xlabel="head", ylabel="alignment error rate", ylim=(-0.12 * top, max(top, 0.01)), xlim=(-0.8, at - 1))
    axes.set_xticks(*zip(*places, strict=True))
    axes.grid(axis="x", visible=False)
    for middle, text in centres:
        axes.annotate(text, (middle, 1), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=7.5)


def draw_shares(axes: Axes, shares: Sequence[Sequence[dict[str, float]]]) -> None:
    """Draw where each head's weight falls, [layer][head]: bars that sum to 1, in the order of `KINDS`."""
    row, labels = 0.0, []
    for layer, heads in enumerate(shares):
        for head, parts in enumerate(heads):
            left = 0.0
            for kind, colour in zip(KINDS, KIND_COLOURS, strict=True):
                axes.barh(row, parts[kind], left=left, height=0.86, color=colour)
                left += parts[kind]
            labels.append((row, f"{layer}.{head}"))
            row += 1
        row += 0.5
    axes.set(xlim=(0, 1), ylim=(row - 1, -0.6), xlabel="share of the weight", ylabel="layer.head")
    axes.set_yticks(*zip(*labels, strict=True))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def draw_share_key(axes: Axes, names: dict[str, str] | None = None, **options: Any) -> None:
    """The colours of `draw_shares`, above the axes; `names` replaces some, the options are those of a legend."""
    names = KINDS | (names or {})
    handles = [Patch(color=colour, label=names[kind]) for kind, colour in zip(KINDS, KIND_COLOURS, strict=True)]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, **options)
