"""Attention maps of a T5 that translates number names: single heads, all heads, alignment, entropy, length."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import attention as measures
from jaxrl_llm.plots import style
from jaxrl_llm.plots.attention import GAP, add_colour_bar, draw_grid, draw_map, label_room, name_axes, thumbnail_size
from jaxrl_llm.plots.style import Sheet

WIDTH, MARGIN = 720.0, 18.0
CELL, SMALL_CELL = 17.0, 12.5
COLUMN, GUTTER, PANEL = 134.0, 44.0, 124.0  # of the panels below: width of axes, room between, height
KINDS = {"encoder": "encoder", "decoder": "decoder", "cross": "cross-attention"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the maps of a held-out number, and below them the measures over all held-out names."""
    data = results["data"]
    size = thumbnail_size(len(data["example"]["target"]), len(data["example"]["source"]))
    layers = len(data["example"]["cross"])
    second = 56 + max(104 + CELL * len(data["example"]["target"]), 92 + layers * (size[1] + GAP))
    third = second + 98 + SMALL_CELL * len(data["example"]["source"]) + 30
    sheet = Sheet(WIDTH, third + PANEL + 84)
    _title(sheet, data)
    _best_head(sheet, 44, data)
    _all_heads(sheet, 300, 44, data, size)
    _encoder(sheet, second, data)
    _panels(sheet, third, data)
    return sheet.figure


def _title(sheet: Sheet, data: dict[str, Any]) -> None:
    layer, head = data["best"]
    rate = data["error_rates"][layer][head]["estimate"]
    text = f"Head {layer}.{head} of {data['model']} aligns {data['names']:,} held-out names with {rate:.1%} error"
    sheet.line(MARGIN, 24, text, size=12, width=WIDTH - 2 * MARGIN, weight="bold")


def _name(head: Any) -> str:
    return ".".join(map(str, head))


def _heading(sheet: Sheet, x: float, y: float, title: str, *, width: float, note: str = "") -> None:
    sheet.line(x, y + 10, title, size=9.5, width=width, weight="bold")
    if note:
        sheet.line(x, y + 22, note, size=7.5, width=width, color=style.MUTED)


# Maps -----------------------------------------------------------------------------------------------------------------


def _best_head(sheet: Sheet, y: float, data: dict[str, Any]) -> None:
    title, note = f"(a) cross-attention, head {_name(data['best'])}", "outlined: the gold alignment, sure and possible"
    _heading(sheet, MARGIN, y, title, width=260, note=note)
    _draw_head(sheet, MARGIN, y + 34, data["example"], "cross", data["best"], cell=CELL, gold=True)


def _draw_head(
    sheet: Sheet, x: float, y: float, example: dict[str, Any], kind: str, head: Any, *, cell: float, gold: bool = False
) -> None:
    """Draw a head's map with its tokens; its corner follows from their lengths."""
    keys, queries = example["source"], example["target" if kind == "cross" else "source"]
    left, top = x + 12 + label_room(queries), y + 12 + label_room(keys)
    axes = sheet.axes(left, top, cell * len(keys), cell * len(queries))
    links = {"sure": example["sure"], "possible": example["possible"]} if gold else {}
    draw_map(axes, example[kind][head[0]][head[1]], queries=queries, keys=keys, **links)
    names = ("target", "source") if kind == "cross" else ("query", "key")
    name_axes(sheet, left, top, label_room(queries), label_room(keys), names)


def _all_heads(sheet: Sheet, x: float, y: float, data: dict[str, Any], size: tuple[float, float]) -> None:
    title, note = (
        "(b) every cross-attention head on the same number",
        "framed: the head of (a), which has the least error on training names",
    )
    _heading(sheet, x, y, title, width=WIDTH - MARGIN - x, note=note)
    weights, left = data["example"]["cross"], x + 42
    scale = min(1.0, ((WIDTH - MARGIN - left) / len(weights[0]) - GAP) / size[0])
    width, height = (scale * each for each in size)
    draw_grid(sheet, left, y + 50, weights, width=width, height=height, marked=tuple(data["best"]))
    add_colour_bar(sheet.axes(left, y + 50 + len(weights) * (height + GAP) + 8, 150, 6))


def _encoder(sheet: Sheet, y: float, data: dict[str, Any]) -> None:
    """Draw the most focused head of the encoder's first layer and of its last, and where all of its heads look."""
    heads = np.asarray(data["entropy"]["encoder"]["heads"])
    for letter, which, layer, x in (("c", "first", 0, MARGIN), ("d", "last", len(heads) - 1, 244.0)):
        head = (layer, int(heads[layer].argmin()))
        note = f"head {_name(head)}, which has the layer's least entropy"
        _heading(sheet, x, y, f"({letter}) encoder, {which} layer", width=205, note=note)
        _draw_head(sheet, x, y + 26, data["example"], "encoder", head, cell=SMALL_CELL)
    left = 506.0
    note = f"where their weight falls, {data['names']:,} names"
    _heading(sheet, left - 36, y, "(e) the encoder's heads", width=WIDTH - MARGIN - left + 36, note=note)
    axes = sheet.axes(left, y + 74, WIDTH - MARGIN - left, SMALL_CELL * len(data["example"]["source"]) + 6)
    measures.draw_shares(axes, data["shares"])
    measures.draw_share_key(axes, {"last": "</s>", "first": "first"}, ncols=3, handlelength=0.8, columnspacing=0.9)


# Measures -------------------------------------------------------------------------------------------------------------


def _panels(sheet: Sheet, y: float, data: dict[str, Any]) -> None:
    panels = (
        ("(f) alignment error by head", _error_rates),
        (f"(g) head {_name(data['best'])} by length", _error_by_length),
        ("(h) entropy by layer", _entropy_by_layer),
        ("(i) encoder by length", _entropy_by_length),
    )
    for place, (title, draw_panel) in enumerate(panels):
        left = MARGIN + 34 + place * (COLUMN + GUTTER)
        _heading(sheet, left - 34, y, title, width=COLUMN + 40)
        draw_panel(sheet.axes(left, y + 20, COLUMN, PANEL), data)
    note = "Bars in (f) and bands: 95% bootstrap intervals over the names; none for lengths of fewer than 25 names."
    sheet.line(MARGIN, y + PANEL + 70, note, size=7.5, width=WIDTH - 2 * MARGIN, color=style.MUTED)


def _error_rates(axes: Axes, data: dict[str, Any]) -> None:
    measures.draw_error_rates(axes, data["error_rates"], best=tuple(data["best"]), bound=data["bound"])
    _name_bound(axes, data, x=0.02)


def _error_by_length(axes: Axes, data: dict[str, Any]) -> None:
    _draw_by_length(axes, data["lengths"], "error_rate", style.ACCENT)
    axes.axhline(data["bound"], color=style.MUTED, linestyle=(0, (3, 2)), linewidth=0.9)
    _name_bound(axes, data, x=0.02)
    axes.set(ylabel="alignment error rate", ylim=(-0.003, 1.3 * data["bound"]))


def _name_bound(axes: Axes, data: dict[str, Any], *, x: float) -> None:
    """Name the dashed line: the bound of the test of the best head."""
    above = {"xytext": (0, 2), "textcoords": "offset points", "color": style.MUTED, "fontsize": 7.5}
    axes.annotate(f"bound: {data['bound']:.0%}", (x, data["bound"]), xycoords=("axes fraction", "data"), **above)


def _entropy_by_layer(axes: Axes, data: dict[str, Any]) -> None:
    measures.draw_by_layer(axes, [{"name": name} | data["entropy"][kind] for kind, name in KINDS.items()])
    axes.plot([], [], ".", color=style.MUTED, markersize=3, label="one head")
    axes.legend(loc="upper right", borderaxespad=0.2)


def _entropy_by_length(axes: Axes, data: dict[str, Any]) -> None:
    _draw_by_length(axes, data["lengths"], "entropy", style.PALETTE[0])
    axes.set(ylabel="entropy (nats)", ylim=(0, None))


def _draw_by_length(axes: Axes, rows: list[dict[str, Any]], field: str, colour: str) -> None:
    """Draw a quantity against the number of words, with its interval where it has one."""
    axes.plot([row["words"] for row in rows], [row[field]["estimate"] for row in rows], color=colour, marker="o", ms=3)
    rows = [row for row in rows if "low" in row[field]]
    low, high = ([row[field][end] for row in rows] for end in ("low", "high"))
    axes.fill_between([row["words"] for row in rows], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="English words", xticks=range(1, 10))
