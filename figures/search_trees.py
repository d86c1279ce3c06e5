"""Search trees and token probabilities of four ways to continue a prompt."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxrl_llm.plots import bars, style, trees
from jaxrl_llm.plots.sheet import Sheet
from jaxrl_llm.plots.text import sentence, text_width
from jaxrl_llm.plots.tree_layout import HEADER, ROW, place

MARGIN, GUTTER, HEADING, TITLE = 20.0, 36.0, 34.0, 42.0
KEY = HEADING + HEADER + ROW  # as high as a chain, beside which the key stands


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The greedy chain beside the key, and under them, in two columns, the other trees and the bars."""
    data = results["data"]
    ordered = sorted(data["trees"], key=lambda tree: tree["name"] != "greedy")
    column = max(place(tree).width for tree in ordered)
    tree_heights = [HEADING + place(tree).height for tree in ordered]
    heights = [tree_heights[0], KEY, *tree_heights[1:], bars.needed_height(data["bars"])]
    (first, key, *others, last), bottom = _pack(heights, column)
    sheet = Sheet(2 * (MARGIN + column) + GUTTER, bottom)
    _draw_title(sheet, data)
    norm, cmap = trees.score_norm(ordered), style.score_colours()
    for index, (tree, (x, y), height) in enumerate(zip(ordered, [first, *others], tree_heights, strict=True)):
        trees.draw_heading(sheet, x, y, tree, title=f"{_letter(index)} {tree['title']}", width=column)
        trees.draw_tree(sheet.axes(x, y + HEADING, column, height - HEADING), tree, norm=norm, cmap=cmap)
    trees.add_colour_bar(sheet.axes(key[0], key[1] + 20, 0.45 * column, 8), norm=norm, cmap=cmap)
    _draw_key(sheet, key[0] + 0.5 * column, key[1], 0.5 * column)
    letter = f"{_letter(len(ordered))} "
    bars.draw_panels(sheet, *last, data["bars"], width=column, height=heights[-1], prefix=letter)
    return sheet.figure


def _letter(index: int) -> str:
    return f"({chr(ord('a') + index)})"


def _pack(heights: list[float], column: float) -> tuple[list[tuple[float, float]], float]:
    """Corners of cells of these heights, each put into the shorter of two columns, and where the page ends."""
    filled, corners = [TITLE, TITLE], []
    for height in heights:
        shorter = int(filled[1] < filled[0])
        corners.append((MARGIN + shorter * (column + GUTTER), filled[shorter]))
        filled[shorter] += height + MARGIN
    return corners, max(filled)


def _draw_title(sheet: Sheet, data: dict[str, Any]) -> None:
    size, width = 12.0, sheet.width - 2 * MARGIN
    tail = f"”, continued by {data['model']}"
    room = width - text_width(f"“{tail}", size, "bold")
    prompt = sentence(data["prompt"], size=size, width=room, weight="bold", keep_end=True)
    sheet.line(MARGIN, 26, f"“{prompt}{tail}", size=size, width=width, weight="bold")


def _draw_key(sheet: Sheet, x: float, y: float, width: float) -> None:
    """What the marks mean."""
    axes = sheet.axes(x, y, width, KEY)
    axes.axis("off")
    end = {"marker": "|", "markersize": 8, "markeredgewidth": 2.2, "linestyle": ""}
    diamond = {"marker": "D", "markersize": 4, "linestyle": ""}
    marks = [
        Line2D([], [], color=style.ACCENT, linewidth=2.4, label="path of the best leaf"),
        Line2D([], [], color=style.EDGE, linewidth=1.4, label="wider if more probable"),
        Line2D([], [], color=style.INK, label="sequence ended", **end),
        Patch(color=bars.KEPT, label="kept"),
        Patch(color=bars.REMOVED, label="removed"),
        Line2D([], [], color=style.ACCENT, label="drawn", **diamond),
    ]
    axes.legend(handles=marks, ncols=2, loc="center left", handlelength=1.6, borderpad=0, columnspacing=1.6)
