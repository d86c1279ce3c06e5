"""Attention maps of a T5 that translates number names: single heads, all heads, alignment, entropy, length."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import attention_measures as measures
from jaxrl_llm.plots import style
from jaxrl_llm.plots.attention import GAP, add_colour_bar, draw_grid, draw_map, label_room, name_axes, thumbnail_size
from jaxrl_llm.plots.sheet import Sheet

WIDTH, MARGIN = 720.0, 18.0
CELL, SMALL_CELL = 17.0, 12.5
COLUMN, GUTTER, PANEL = 184.0, 48.0, 112.0  # of the panels below: width of axes, room between, height
KINDS = ("encoder", "decoder", "cross")


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Above the maps of a long number and a short one, below what is measured over all held-out ones."""
    data = results["data"]
    value = {entry["name"]: entry["value"] for entry in results["numbers"]}
    _, long = data["examples"]
    size = thumbnail_size(len(long["target"]), len(long["source"]))
    layers = len(long["cross"])
    second = 56 + max(104 + CELL * len(long["target"]), 92 + layers * (size[1] + GAP))
    third = second + 98 + SMALL_CELL * len(long["source"]) + 26
    sheet = Sheet(WIDTH, third + 2 * (PANEL + 66))
    _title(sheet, data, value)
    _best_head(sheet, 44, data)
    _all_heads(sheet, 300, 44, data, size)
    _small_maps(sheet, second, data)
    _panels(sheet, third, data)
    return sheet.figure


def _title(sheet: Sheet, data: dict[str, Any], value: dict[str, float]) -> None:
    rate = value["alignment error rate, best head"]
    order = value["alignment error rate of a head that keeps the order"]
    text = f"Head {_name(data['best'])} of {data['model']} aligns unseen number names with {rate:.1%} error; "
    sheet.line(MARGIN, 24, f"{text}keeping the order: {order:.0%}", size=12, width=WIDTH - 2 * MARGIN, weight="bold")


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
    _draw_head(sheet, MARGIN, y + 34, data["examples"][1], "cross", data["best"], cell=CELL, gold=True)


def _draw_head(
    sheet: Sheet, x: float, y: float, example: dict[str, Any], kind: str, head: Any, *, cell: float, gold: bool = False
) -> None:
    """A head's map with its tokens; where its corner is follows from their lengths."""
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
        "framed: the head of (a), chosen on training names",
    )
    _heading(sheet, x, y, title, width=WIDTH - MARGIN - x, note=note)
    weights, left = data["examples"][1]["cross"], x + 42
    scale = min(1.0, ((WIDTH - MARGIN - left) / len(weights[0]) - GAP) / size[0])
    width, height = (scale * each for each in size)
    draw_grid(sheet, left, y + 50, weights, width=width, height=height, marked=tuple(data["best"]))
    add_colour_bar(sheet.axes(left, y + 50 + len(weights) * (height + GAP) + 8, 150, 6))


def _small_maps(sheet: Sheet, y: float, data: dict[str, Any]) -> None:
    """The best head on a short number, the encoder's most concentrated heads, and where all its heads look."""
    short, long = data["examples"]
    _heading(sheet, MARGIN, y, "(c) a short number", width=125, note=f"head {_name(data['best'])}")
    _draw_head(sheet, MARGIN, y + 26, short, "cross", data["best"], cell=SMALL_CELL, gold=True)
    heads = np.asarray(data["entropy"]["encoder"]["heads"])
    for letter, which, layer, x in (("d", "first", 0, 146.0), ("e", "last", len(heads) - 1, 342.0)):
        head = (layer, int(heads[layer].argmin()))
        _heading(
            sheet, x, y, f"({letter}) encoder, {which} layer", width=192, note=f"head {_name(head)}, its most focused"
        )
        _draw_head(sheet, x, y + 26, long, "encoder", head, cell=SMALL_CELL)
    note = "where their weight falls"
    _heading(sheet, 540, y, "(f) the encoder's heads", width=WIDTH - MARGIN - 540, note=note)
    axes = sheet.axes(566, y + 70, WIDTH - MARGIN - 566, SMALL_CELL * len(long["source"]) + 6)
    measures.draw_shares(axes, data["shares"]["encoder"])
    measures.draw_share_key(axes, {"last": "</s>", "first": "first"}, ncols=3, handlelength=0.8, columnspacing=0.9)


# Measures -------------------------------------------------------------------------------------------------------------


def _panels(sheet: Sheet, y: float, data: dict[str, Any]) -> None:
    text = data["text"]
    panels = (
        (f"(g) alignment error, {data['names']} names", _error_rates),
        ("(h) head " + _name(data["best"]) + ": rows on a possible link", _words),
        ("(i) its alignment error by length", _error_by_length),
        ("(j) entropy by layer; dots: heads", _entropy_by_layer),
        ("(k) entropy by length", _entropy_by_length),
        (f"(l) {text['model']}, {text['passages']} texts of {text['tokens']}", _text),
    )
    for place, (title, draw_panel) in enumerate(panels):
        row, column = divmod(place, 3)
        left, top = MARGIN + 34 + column * (COLUMN + GUTTER), y + row * (PANEL + 66)
        _heading(sheet, left - 34, top, title, width=COLUMN + 44)
        draw_panel(sheet.axes(left, top + 20, COLUMN, PANEL), data)


def _error_rates(axes: Axes, data: dict[str, Any]) -> None:
    measures.draw_error_rates(axes, data["error_rates"], best=tuple(data["best"]), bound=data["bound"])


def _words(axes: Axes, data: dict[str, Any]) -> None:
    """How often the best head's row has its largest weight on a word that the gold allows."""
    names, values = list(data["aligned"]), list(data["aligned"].values())
    axes.barh(names, values, height=0.7, color=style.PALETTE[0])
    for row, share in enumerate(values):
        inside = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
        axes.annotate(f"{share:.1%}", (share, row), color="white", fontsize=7.5, weight="bold", **inside)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xlabel="share of rows")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _error_by_length(axes: Axes, data: dict[str, Any]) -> None:
    rows = data["lengths"]
    _band(axes, rows, "error_rate", style.ACCENT, "")
    axes.axhline(data["bound"], color=style.MUTED, linestyle=(0, (3, 2)), linewidth=0.9)
    axes.set(ylabel="alignment error rate", ylim=(-0.003, None))


def _entropy_by_layer(axes: Axes, data: dict[str, Any]) -> None:
    measures.draw_by_layer(axes, [{"name": kind} | data["entropy"][kind] for kind in KINDS])


def _entropy_by_length(axes: Axes, data: dict[str, Any]) -> None:
    for kind, colour in zip(KINDS, style.PALETTE, strict=False):
        _band(axes, data["lengths"], kind, colour, kind)
    axes.set(ylabel="entropy (nats)", ylim=(0, None))
    axes.legend(loc="upper left", borderaxespad=0.2)


def _band(axes: Axes, rows: list[dict[str, Any]], field: str, colour: str, name: str) -> None:
    """A quantity and its interval against the number of words."""
    words = [row["words"] for row in rows]
    mean, low, high = ([row[field][part] for row in rows] for part in ("estimate", "low", "high"))
    axes.fill_between(words, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(words, mean, color=colour, marker="o", markersize=3, label=name)
    axes.set(xlabel="English words", xticks=words)


def _text(axes: Axes, data: dict[str, Any]) -> None:
    text = data["text"]
    measures.draw_by_layer(axes, [{"name": "self-attention"} | text])
    axes.axhline(text["uniform"], color=style.MUTED, linestyle=(0, (3, 2)), linewidth=0.9)
    beside = {"xytext": (-2, 3), "textcoords": "offset points", "ha": "right"}
    axes.annotate("all keys alike", (axes.get_xlim()[1], text["uniform"]), color=style.MUTED, fontsize=7.5, **beside)
    axes.set_ylim(0, 1.2 * text["uniform"])
