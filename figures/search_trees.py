"""Search trees and token probabilities of four ways to continue a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxrl_llm.plots import charts, style
from jaxrl_llm.plots import tree as trees
from jaxrl_llm.plots.style import Sheet, sentence, text_width
from jaxrl_llm.plots.tree import place

WIDTH, MARGIN, GAP, HEADING, TITLE, TOP = 619.0, 20.0, 14.0, 34.0, 40.0, 104.0
LEAVES = {"full": 12, "top_k": 8, "nucleus": 8}  # shown of each tree
TOKENS = 22  # shown in a panel of probabilities, beside those drawn


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the best leaf's gain after all prompts, the trees after one of them below each other, and the bars."""
    data = results["data"]
    ordered = sorted(data["trees"], key=lambda tree: tree["name"] != "greedy")
    ordered = [pruned(tree, LEAVES.get(tree["name"], 1)) for tree in ordered]
    column = max(WIDTH - 2 * MARGIN, *(place(tree).width for tree in ordered))
    panels = [panel | {"tokens": _shown(panel["tokens"])} for panel in data["bars"]]
    heights = [HEADING + place(tree).height for tree in ordered]
    bottom = TITLE + TOP + sum(heights) + (len(heights) + 1) * GAP + charts.needed_height(panels) + MARGIN
    sheet = Sheet(2 * MARGIN + column, bottom)
    _draw_title(sheet, results)
    norm, cmap = trees.score_norm(ordered), style.score_colours()
    if data.get("gains"):
        _draw_gains(sheet, data, 0.56 * column)
    left = MARGIN + 0.62 * column
    trees.add_colour_bar(sheet.axes(left, TITLE + 4, 0.36 * column, 8), norm=norm, cmap=cmap)
    _draw_key(sheet, left, TITLE + 42, 0.36 * column)
    y = TITLE + TOP + GAP
    for index, (tree, height) in enumerate(zip(ordered, heights, strict=True), start=1):
        trees.draw_heading(sheet, MARGIN, y, tree, title=f"{_letter(index)} {tree['title']}", width=column)
        trees.draw_tree(sheet.axes(MARGIN, y + HEADING, column, height - HEADING), tree, norm=norm, cmap=cmap)
        y += height + GAP
    letter = f"{_letter(len(ordered) + 1)} "
    charts.draw_panels(sheet, MARGIN, y, panels, width=column, height=charts.needed_height(panels), prefix=letter)
    return sheet.figure


def _letter(index: int) -> str:
    return f"({chr(ord('a') + index)})"


def pruned(tree: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the tree with its `count` best leaves only, and a title that names the count."""
    nodes = {node["id"]: node for node in tree["nodes"]}
    parents = {node["parent"] for node in tree["nodes"]}
    leaves = [node for node in tree["nodes"] if node["id"] not in parents and node["parent"] is not None]
    best = sorted(leaves, key=lambda node: -node["score"])[:count]
    kept = set()
    for node in best:
        while node["id"] not in kept:
            kept.add(node["id"])
            node = nodes[node["parent"]] if node["parent"] is not None else node
    title = f"{tree['title']}: the {len(best)} best of {len(leaves)} leaves"
    return tree | {
        "nodes": [node for node in tree["nodes"] if node["id"] in kept],
        "title": title if len(best) < len(leaves) else tree["title"],
    }


def _shown(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [token for place, token in enumerate(tokens) if place < TOKENS or token["drawn"]]


def _draw_title(sheet: Sheet, results: dict[str, Any]) -> None:
    data, size, width = results["data"], 10.0, sheet.width - 2 * MARGIN
    if results.get("holds") and data.get("gains"):
        gains = data["gains"]
        text = f"Greedy misses the best of {data['leaves']} leaves after {sum(each > 0 for each in gains)} of "
        text += f"{len(gains)} prompts: mean lead {np.mean(gains):.2f} nats per token"
        sheet.line(MARGIN, 22, text, size=size, width=width, weight="bold")
        return
    tail = f"”, continued by {data['model']}"
    room = width - text_width(f"“{tail}", size, "bold")
    prompt = sentence(data["prompt"], size=size, width=room, weight="bold", keep_end=True)
    sheet.line(MARGIN, 22, f"“{prompt}{tail}", size=size, width=width, weight="bold")


def _draw_gains(sheet: Sheet, data: dict[str, Any], width: float) -> None:
    """Draw the lead of the best leaf after each prompt, the largest first, that of the trees below in colour."""
    gains = np.asarray(data["gains"])
    order = np.argsort(-gains, kind="stable")
    drawn = int(np.flatnonzero(order == 0)[0])  # the first prompt is that of the trees
    axes = sheet.axes(MARGIN + 32, TITLE + 14, width - 32, TOP - 40)
    colours = [style.ACCENT if each == 0 else style.PALETTE[5] for each in order]
    axes.bar(np.arange(len(gains)), gains[order], color=colours, width=0.75)
    axes.annotate(
        "the prompt below",
        (drawn, gains[0]),
        xytext=(0, 3),
        textcoords="offset points",
        color=style.ACCENT,
        fontsize=7,
        ha="left",
        va="bottom",
    )
    axes.grid(axis="x", visible=False)
    axes.set(xlim=(-0.8, len(gains) - 0.2), xticks=[], ylabel="nats per token")
    axes.set_xlabel(f"{len(gains)} prompts; no bar: greedy decoding finds the best leaf")
    title = f"(a) best leaf − greedy decoding, {data['model']}"
    sheet.line(MARGIN, TITLE + 6, title, size=9.5, width=width, weight="bold")


def _draw_key(sheet: Sheet, x: float, y: float, width: float) -> None:
    """Draw the legend of the marks."""
    axes = sheet.axes(x, y, width, TOP - 46)
    axes.axis("off")
    end = {"marker": "|", "markersize": 8, "markeredgewidth": 2.2, "linestyle": ""}
    diamond = {"marker": "D", "markersize": 4, "linestyle": ""}
    marks = [
        Line2D([], [], color=style.ACCENT, linewidth=2.4, label="path of the best leaf"),
        Line2D([], [], color=style.EDGE, linewidth=1.4, label="wider if more probable"),
        Line2D([], [], color=style.INK, label="sequence ended", **end),
        Patch(color=charts.KEPT, label="kept"),
        Patch(color=charts.REMOVED, label="removed"),
        Line2D([], [], color=style.ACCENT, label="drawn", **diamond),
    ]
    axes.legend(handles=marks, ncols=2, loc="center left", handlelength=1.4, borderpad=0, columnspacing=1.2)
