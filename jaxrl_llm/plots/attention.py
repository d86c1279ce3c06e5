"""Attention maps: a head as a heatmap with its tokens, all heads of a model, and measures of heads.

In every map the keys run along x from left to right and the queries along y from top to bottom; in cross-attention
these are the source and the target. Layers and heads are counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from jaxrl_llm.plots import style
from jaxrl_llm.plots.style import LITERAL, Sheet, size_in_points, text_width, token_label

LABEL_SIZE, LABEL_WIDTH = 7.5, 64.0
TITLE_SIZE, TITLE_WIDTH = 9.5, 440.0
CELL, LEAST_CELL, LARGEST_MAP = 18.0, 5.0, 900.0  # points of a cell; it shrinks as tokens are added
THUMBNAIL, GAP, MARGIN = 92.0, 8.0, 16.0
RASTER = 2500  # a map of more cells is an image in an SVG
POSSIBLE = "#e8894f"  # paler than the accent, which marks sure links

Map = Sequence[Sequence[float]] | np.ndarray  # [query, key]
Links = Iterable[tuple[int, int]]  # (key, query)


def weight_colours() -> Colormap:
    """Return the colour map of attention weights: white for 0, deep blue for 1."""
    return LinearSegmentedColormap.from_list("weight", ["#ffffff", "#c6dcee", "#4f97c9", "#0b5394", "#08306b"])


def draw_map(
    axes: Axes,
    weights: Map,
    *,
    queries: Sequence[str] = (),
    keys: Sequence[str] = (),
    sure: Links = (),
    possible: Links = (),
    norm: Normalize | None = None,
) -> None:
    """Draw one head's weights, queries on y from the top. The axes must have their final size.

    Args:
        queries: tokens of the rows, written on the left of the map; none by default.
        keys: tokens of the columns, written above it.
        sure: gold links (key, query); their cells are outlined.
        possible: possible links, outlined more lightly.
        norm: the colour scale; 0 to 1 by default.

    Raises:
        ValueError: if the number of tokens is not that of the rows or columns, or a link is outside the map.
    """
    weights = np.asarray(weights, float)
    for name, tokens, size in (("queries", queries, weights.shape[0]), ("keys", keys, weights.shape[1])):
        if len(tokens) not in (0, size):
            raise ValueError(f"{name} must be the {size} tokens of the map, but are {len(tokens)}.")
    width, height = size_in_points(axes)
    cell = min(width / weights.shape[1], height / weights.shape[0])
    lines = {"edgecolors": "#eef1f4", "linewidth": min(0.5, 0.06 * cell)} if weights.size <= RASTER else {}
    raster = weights.size > RASTER
    axes.pcolormesh(weights, cmap=weight_colours(), norm=norm or Normalize(0, 1), rasterized=raster, **lines)
    axes.set(xlim=(0, weights.shape[1]), ylim=(weights.shape[0], 0), xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=style.FAINT, linewidth=0.6)
    _outline(axes, weights.shape, sure, possible, cell)
    _label(axes, queries, keys, size=min(LABEL_SIZE, 0.72 * cell))


def _outline(axes: Axes, shape: tuple[int, ...], sure: Links, possible: Links, cell: float) -> None:
    sure = {tuple(link) for link in sure}
    links = [(link, POSSIBLE, 0.6) for link in {tuple(link) for link in possible} - sure]
    for (key, query), colour, share in [*sorted(links), *((link, style.ACCENT, 1.0) for link in sorted(sure))]:
        if not (0 <= key < shape[1] and 0 <= query < shape[0]):
            raise ValueError(
                f"a link must lie in the map of {shape[1]} keys and {shape[0]} queries, but is {(key, query)}."
            )
        width = share * min(1.6, 0.12 * cell)
        edge = {"edgecolor": colour, "linewidth": width, "linestyle": "-" if share == 1 else (0, (3, 1.5))}
        axes.add_patch(Rectangle((key + 0.06, query + 0.06), 0.88, 0.88, fill=False, zorder=3, **edge))


def _label(axes: Axes, queries: Sequence[str], keys: Sequence[str], *, size: float) -> None:
    shared = {"textcoords": "offset points", "fontsize": size, "annotation_clip": False, **LITERAL}
    for row, text in enumerate(_texts(queries, size)):
        axes.annotate(text, (0, row + 0.5), (-4, 0), ha="right", va="center", **shared)
    for column, text in enumerate(_texts(keys, size)):
        axes.annotate(text, (column + 0.5, 0), (0, 4), ha="center", va="bottom", rotation=90, **shared)


def label_room(tokens: Sequence[str]) -> float:
    """Return the width in points of the longest label, with its distance from the map."""
    return 6.0 + max((text_width(label, LABEL_SIZE) for label in _texts(tokens, LABEL_SIZE)), default=0.0)


def _texts(tokens: Sequence[str], size: float) -> list[str]:
    return style.told_apart([token_label(token, size=size, width=LABEL_WIDTH) for token in tokens])


def cell_size(queries: int, keys: int) -> float:
    """Return the size in points of a cell of a map that is a figure of its own."""
    return max(LEAST_CELL, min(CELL, LARGEST_MAP / max(queries, keys, 1)))


@style.look()
def attention_figure(
    maps: Any, *, layer: int | None = None, head: int | None = None, model: str = "", **links: Links
) -> Figure:
    """Draw the attention of a text: one head, or all heads of one layer, of one head number, or of the whole model.

    Args:
        maps: `jaxrl_llm.analysis.attention.AttentionMaps`, or an object with its `weights` [layer, head, query, key],
            `queries`, `keys`, `name`, `axis_names` and `source`.
        layer, head: counted from 0, or from −1 backwards; all if None.
        model: the model's name, for the title.
        links: `sure` and `possible`, as in `draw_map`.

    Raises:
        TypeError: if the layer or the head is not an integer.
        ValueError: if the model has no such layer or head, or the tokens or links do not fit the map.
    """
    weights = np.asarray(maps.weights)
    layers, heads = _chosen("layer", layer, weights.shape[0]), _chosen("head", head, weights.shape[1])
    title = ", ".join(filter(None, (model, maps.name)))
    if len(layers) == len(heads) == 1:
        return _one_head(maps, weights[layers[0], heads[0]], f"{title}, layer {layers[0]}, head {heads[0]}", links)
    return _all_heads(maps, weights[np.ix_(layers, heads)], f"{title}: {maps.source}", layers, heads, links)


def _chosen(name: str, index: int | None, count: int) -> list[int]:
    if index is None:
        return list(range(count))
    if not isinstance(index, int | np.integer):
        raise TypeError(f"{name} must be an integer, but is {index!r}.")
    if not -count <= index < count:
        raise ValueError(f"{name} must be from 0 to {count - 1} (or −{count} to −1), but is {index}.")
    return [index % count]


def _one_head(maps: Any, weights: np.ndarray, title: str, links: dict[str, Links]) -> Figure:
    """Draw a map as large as its tokens need."""
    queries, keys = maps.queries, maps.keys
    cell, left, top = cell_size(len(queries), len(keys)), 14 + label_room(queries), 44 + label_room(keys)
    width, height = cell * len(keys), cell * len(queries)
    sheet = _page(title, left + width, top + height + 46)
    axes = sheet.axes(MARGIN + left, top, width, height)
    draw_map(axes, weights, queries=queries, keys=keys, **links)
    name_axes(sheet, MARGIN + left, top, label_room(queries), label_room(keys), maps.axis_names)
    add_colour_bar(sheet.axes(MARGIN + left, top + height + 12, 150, 6))
    return sheet.figure


def _all_heads(
    maps: Any, weights: np.ndarray, title: str, layers: list[int], heads: list[int], links: dict[str, Links]
) -> Figure:
    """Draw a small map of each head, one row per layer."""
    rows, columns, queries, keys = weights.shape
    width, height = thumbnail_size(queries, keys)
    left, top = 44.0, 46.0
    sheet = _page(title, left + columns * (width + GAP), top + rows * (height + GAP) + 52)
    draw_grid(sheet, MARGIN + left, top, weights, width=width, height=height, layers=layers, heads=heads, **links)
    bottom = top + rows * (height + GAP)
    names = f"in each: {maps.axis_names[1]} → on x, {maps.axis_names[0]} ↓ on y"
    sheet.line(MARGIN + left, bottom + 8, names, size=7.5, width=200, color=style.MUTED)
    add_colour_bar(sheet.axes(MARGIN + left, bottom + 18, 150, 6))
    return sheet.figure


def _page(title: str, width: float, height: float) -> Sheet:
    """Return a sheet for content of this size between its margins, with its title."""
    room = max(width, min(TITLE_WIDTH, text_width(title, TITLE_SIZE, "bold") + 2), 230.0)
    sheet = Sheet(room + 2 * MARGIN, height)
    sheet.line(MARGIN, 20, title, size=TITLE_SIZE, width=room, weight="bold")
    return sheet


def name_axes(
    sheet: Sheet, x: float, y: float, rows: float, columns: float, axis_names: tuple[str, str], *, size: float = 7.5
) -> None:
    """Write the names of both axes outside the labels of a map whose corner is (x, y)."""
    queries, keys = axis_names
    shared = {"size": size, "color": style.MUTED}
    sheet.line(x, y - columns - 3, f"{keys} →", width=200, **shared)
    place = {"rotation": 90, "va": "top", "ha": "right"}
    sheet.line(x - rows - 3, y, f"← {queries}", width=200, **place, **shared)


def thumbnail_size(queries: int, keys: int) -> tuple[float, float]:
    """Return the width and height in points of a small map of square cells."""
    scale = THUMBNAIL / max(queries, keys, 1)
    return max(scale * keys, 16.0), max(scale * queries, 16.0)


def draw_grid(
    sheet: Sheet,
    x: float,
    y: float,
    weights: Any,
    *,
    width: float,
    height: float,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    marked: tuple[int, int] | None = None,
    **links: Links,
) -> None:
    """Draw small maps of heads, [layer, head, query, key], on one colour scale, with their numbers.

    Args:
        width, height: size of one map, in points.
        layers, heads: numbers of the layers and heads; from 0 by default.
        marked: the layer and head of the map that gets a frame.
        links: as in `draw_map`.
    """
    rows, columns = np.shape(weights)[:2]
    layers, heads = layers or range(rows), heads or range(columns)
    for row, layer in enumerate(layers):
        top = y + row * (height + GAP)
        sheet.line(x - 7, top + height / 2 + 3, f"layer {layer}", size=7.5, width=60, ha="right")
        for column, head in enumerate(heads):
            axes = sheet.axes(x + column * (width + GAP), top, width, height)
            draw_map(axes, weights[row][column], **links)
            if (layer, head) == marked:
                for spine in axes.spines.values():
                    spine.set(color=style.ACCENT, linewidth=2.0)
    for column, head in enumerate(heads):
        middle = x + column * (width + GAP) + width / 2
        sheet.line(middle, y - 5, f"head {head}", size=7.5, width=60, ha="center")


def add_colour_bar(axes: Axes, label: str = "attention weight") -> None:
    """Draw the colour scale of the weights into these axes, horizontally."""
    bar = axes.get_figure().colorbar(
        ScalarMappable(Normalize(0, 1), weight_colours()), cax=axes, orientation="horizontal"
    )
    bar.outline.set(edgecolor=style.FAINT, linewidth=0.6)
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    axes.set_xlabel(label, fontsize=7.5, labelpad=1)
    axes.tick_params(labelsize=7, length=2.5)


# Measures of heads ----------------------------------------------------------------------------------------------------

Estimate = dict[str, float]  # estimate, low, high
KINDS = {"own": "itself", "previous": "previous", "next": "next", "first": "first", "last": "last", "other": "others"}
KIND_COLOURS = (style.PALETTE[0], style.PALETTE[5], style.PALETTE[2], style.PALETTE[4], style.PALETTE[1], style.FAINT)


def draw_by_layer(axes: Axes, curves: Sequence[dict[str, Any]], *, label: str = "entropy (nats)") -> None:
    """Draw a quantity by layer: means with their intervals as lines, each head as a point.

    Args:
        curves: each with a `name`, `layers` (for each layer an estimate with `low` and `high`) and `heads`
            [layer][head].
        label: of the vertical axis.
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
    """Draw the alignment error rate of each head with its interval, [layer][head], by layer.

    Args:
        best: layer and head of the rate that is emphasised.
        bound: a rate that is marked by a horizontal line.
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
    """Draw the shares of each head's weight by kind of key, [layer][head]: bars that sum to 1, ordered as `KINDS`."""
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
    """Draw the legend of `draw_shares` above the axes; `names` replaces some names, options are those of `legend`."""
    names = KINDS | (names or {})
    handles = [Patch(color=colour, label=names[kind]) for kind, colour in zip(KINDS, KIND_COLOURS, strict=True)]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, **options)
