"""Search trees: tokens and probabilities in boxes coloured by score, from left to right, the best path emphasised.

All lengths are points. Every leaf has its own row, a parent is midway between its first and last child, and a
column is as wide as its widest label. So nodes of a level are at least one row apart, and levels do not share columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from jaxrl_llm.plots import style
from jaxrl_llm.plots.style import LITERAL, Sheet, per_cent, sentence, signed, size_in_points, text_width, token_label

TOKEN_SIZE, NUMBER_SIZE = 7.5, 6.4
ROW, BOX_HEIGHT, HEADER = 14.6, 11.8, 15.0
PADDING, TOKEN_WIDTH, PROMPT_WIDTH = 4.5, 62.0, 110.0

TITLE_SIZE, SUBTITLE_SIZE = 9.5, 8.0
LEAST_WIDTH = 360.0  # points

Node = dict[str, Any]
Colour = Literal["score", "probability"]
SCALES = {
    "score": "score: mean log-probability per token (nats)",
    "probability": "probability of the token given those before it",
}
PROMPT_COUNTS = "score: log-probability per token, prompt too (nats)"


@dataclasses.dataclass(frozen=True)
class Box:
    """A node's box: its left edge, its middle below the top, its width, and its text."""

    x: float
    y: float
    width: float
    label: str
    probability: str

    @property
    def right(self) -> float:
        return self.x + self.width


@dataclasses.dataclass(frozen=True)
class Layout:
    """A placed tree: boxes by node id, children most probable first, and the column of the leaves' scores."""

    nodes: dict[int, Node]
    children: dict[int, list[int]]
    boxes: dict[int, Box]
    score_x: float
    width: float
    height: float

    @property
    def leaves(self) -> list[int]:
        return [node for node in self.boxes if not self.children[node] and self.nodes[node]["parent"] is not None]


def score_norm(trees: list[dict[str, Any]], *, color: Colour = "score") -> Normalize:
    """Return one colour scale for all nodes of these trees, from the smallest to the largest value of `color`."""
    values = [_value(node, color) for tree in trees for node in tree["nodes"]]
    values = [value for value in values if value is not None] or [0.0]
    spare = 0.0 if max(values) > min(values) else 0.05
    return Normalize(min(values) - spare, max(values) + spare)


def _value(node: Node, color: Colour) -> float | None:
    """Return what the colour of a node shows; None for the prompt."""
    return None if node["parent"] is None else node["prob" if color == "probability" else "score"]


def draw_tree(axes: Axes, tree: dict[str, Any], *, norm: Normalize, cmap: Colormap, color: Colour = "score") -> None:
    """Draw a tree into axes of final size, scaled down only if it does not fit.

    A box shows a token ("·" is a space, "↵" a line break) and its probability given the tokens before it. Its colour is
    its score or this probability; the number of a leaf is its score. Wider edges are more probable.

    Args:
        tree: `nodes`, each with `id`, `parent` (or None), `text`, `prob`, `score` (or None) and `ended`; and `best`,
            the ids on the path to the best leaf.
    """
    width, height = size_in_points(axes)
    layout = place(tree, width=width)
    scale = min(1.0, width / layout.width, height / layout.height)
    axes.set(xlim=(0, width / scale), ylim=(height / scale, 0))
    axes.axis("off")
    best = set(tree["best"])
    for node, box in layout.boxes.items():
        for child in layout.children[node]:
            _edge(axes, box, layout.boxes[child], layout.nodes[child]["prob"], on_best_path=child in best, scale=scale)
        value = _value(layout.nodes[node], color)
        fill = "white" if value is None else cmap(norm(value))
        _node(axes, layout, node, fill, on_best_path=node in best, scale=scale)
    for leaf in layout.leaves:
        _score(axes, layout, leaf, is_best=leaf in best, scale=scale)
    _header(axes, layout, scale)


def _edge(axes: Axes, parent: Box, child: Box, probability: float, *, on_best_path: bool, scale: float) -> None:
    middle = (parent.right + child.x) / 2
    points = [(parent.right, parent.y), (middle, parent.y), (middle, child.y), (child.x, child.y)]
    path = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    colour, least = (style.ACCENT, 1.4) if on_best_path else (style.EDGE, 0.5)
    width = scale * (least + 1.8 * probability)
    axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=width, zorder=3 if on_best_path else 1))


def _node(axes: Axes, layout: Layout, node: int, fill: Any, *, on_best_path: bool, scale: float) -> None:
    box, entry = layout.boxes[node], layout.nodes[node]
    edge, width = (style.ACCENT, 1.5) if on_best_path else (style.EDGE, 0.6)
    outline = f"round,pad=0,rounding_size={BOX_HEIGHT * 0.3}"
    corner = (box.x, box.y - BOX_HEIGHT / 2)
    patch = FancyBboxPatch(corner, box.width, BOX_HEIGHT, boxstyle=outline, facecolor=fill, edgecolor=edge, zorder=4)
    patch.set(linewidth=width * scale, clip_on=False)  # the root's outline is half outside the axes
    axes.add_patch(patch)
    if entry["ended"]:
        axes.add_patch(_end_bar(box.right + 1.5, box.y))
    ink, weight = style.ink_on(fill), "bold" if on_best_path or not box.probability else "normal"
    shared = {"va": "center_baseline", "color": ink, "zorder": 5, **LITERAL}
    axes.text(box.x + PADDING, box.y, box.label, fontsize=TOKEN_SIZE * scale, weight=weight, **shared)
    numbers = {"fontsize": NUMBER_SIZE * scale, "ha": "right"}
    axes.text(box.right - PADDING, box.y, box.probability, **numbers, **shared)


def _end_bar(x: float, y: float) -> Rectangle:
    """Return the mark of a sequence that ended with EOS."""
    return Rectangle((x, y - BOX_HEIGHT / 2), 2.2, BOX_HEIGHT, facecolor=style.INK, edgecolor="none", zorder=4)


def _score(axes: Axes, layout: Layout, leaf: int, *, is_best: bool, scale: float) -> None:
    box, text = layout.boxes[leaf], leaf_score(layout.nodes[leaf])
    colour, weight = (style.ACCENT, "bold") if is_best else (style.MUTED, "normal")
    fonts = {"fontsize": NUMBER_SIZE * scale, "weight": weight, "color": colour}
    axes.text(layout.score_x, box.y, text, ha="right", va="center_baseline", **fonts, **LITERAL)
    leader = [box.right + 6, layout.score_x - text_width(text, NUMBER_SIZE, weight) - 4]
    if leader[1] - leader[0] > 12:
        axes.plot(leader, [box.y, box.y], color=style.FAINT, linewidth=0.7 * scale, linestyle=(0, (1, 2)), zorder=0)


def _header(axes: Axes, layout: Layout, scale: float) -> None:
    fonts = {"fontsize": NUMBER_SIZE * scale, "color": style.MUTED, "va": "center_baseline", **LITERAL}
    columns = sorted({(box.x, box.width) for box in layout.boxes.values()})
    for level, (x, width) in enumerate(columns):
        text = ("prompt", "token 1")[level] if level < 2 else str(level)
        axes.text(x + width / 2, HEADER / 2 - 2, text, ha="center", **fonts)
    axes.text(layout.score_x, HEADER / 2 - 2, "score", ha="right", **fonts)


def add_colour_bar(
    axes: Axes, *, norm: Normalize, cmap: Colormap, color: Colour = "score", prompt_counts: bool = False
) -> None:
    """Draw the colour scale into these axes, horizontally."""
    bar = axes.get_figure().colorbar(ScalarMappable(norm, cmap), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10])  # more labels of two decimals would touch
    axes.set_xlabel(PROMPT_COUNTS if color == "score" and prompt_counts else SCALES[color], fontsize=7.5)
    axes.tick_params(labelsize=7, length=2.5)


@style.look()
def tree_figure(
    tree: dict[str, Any], *, model: str = "", norm: Normalize | None = None, color: Colour = "score"
) -> Figure:
    """Draw a figure of one tree, as large as the tree needs, with title, best continuation and colour scale.

    Args:
        color: the score of a node, or the probability of its token given those before it.

    Raises:
        ValueError: for another `color`.
    """
    if color not in SCALES:
        raise ValueError(f"color must be one of {', '.join(SCALES)}, but is {color!r}.")
    norm, cmap = norm or score_norm([tree], color=color), style.score_colours()
    layout = place(tree, width=LEAST_WIDTH)
    margin, top, bottom = 14.0, 42.0, 46.0
    height = min(layout.height, style.TALLEST)
    sheet = Sheet(layout.width + 2 * margin, top + height + bottom)
    title = f"{tree['title']}, {model}" if model else tree["title"]
    draw_heading(sheet, margin, 8, tree, title=title, width=layout.width)
    draw_tree(sheet.axes(margin, top, layout.width, height), tree, norm=norm, cmap=cmap, color=color)
    scale = {"norm": norm, "cmap": cmap, "color": color, "prompt_counts": tree.get("prompt_counts", False)}
    add_colour_bar(sheet.axes(margin, top + height + 12, 200, 7), **scale)
    return sheet.figure


def draw_heading(sheet: Sheet, x: float, y: float, tree: dict[str, Any], *, title: str, width: float) -> None:
    """Write the title and, below it, the best continuation with its score."""
    sheet.line(x, y + 9, title, size=TITLE_SIZE, width=width, weight="bold")
    per = "token, prompt too" if tree.get("prompt_counts") else "token"
    score = f"” ({signed(tree['best_score'])} nats per {per})"
    room = width - text_width(f"best: “{score}", SUBTITLE_SIZE)
    best = sentence(tree["best_text"].strip(" "), size=SUBTITLE_SIZE, width=room)
    sheet.line(x, y + 23, f"best: “{best}{score}", size=SUBTITLE_SIZE, width=width, color=style.ACCENT)


# Layout ---------------------------------------------------------------------------------------------------------------


def place(tree: dict[str, Any], *, width: float = 0.0) -> Layout:
    """Lay out the tree from left to right, at least `width` wide.

    Raises:
        ValueError: if the nodes are not one tree with one root.
    """
    nodes = {node["id"]: node for node in tree["nodes"]}
    children, root = _children(nodes)
    rows = _rows(children, root)
    labels = {node: _labels(nodes[node]) for node in rows}
    levels = _levels(nodes, children, root)
    widths = [max(_box_width(*labels[node], is_root=node == root) for node in level) for level in levels]
    gaps = [_gap([rows[child] - rows[node] for node in level for child in children[node]]) for level in levels[:-1]]
    score_width = text_width("−00.00", NUMBER_SIZE, "bold") + 14
    natural = sum(widths) + sum(gaps) + score_width
    stretch = max(0.0, width - natural) / max(1, len(gaps))
    left = [sum(widths[:level]) + sum(gaps[:level]) + level * stretch for level in range(len(levels))]
    boxes = {
        node: Box(left[level], HEADER + ROW * (rows[node] + 0.5), widths[level], *labels[node])
        for level, members in enumerate(levels)
        for node in members
    }
    total = max(natural, width)
    return Layout(nodes, children, boxes, total - 2, total, HEADER + ROW * (max(rows.values()) + 1))


def _children(nodes: dict[int, Node]) -> tuple[dict[int, list[int]], int]:
    roots = [node for node, entry in nodes.items() if entry["parent"] is None]
    if len(roots) != 1:
        raise ValueError(f"a tree must have one node without parent, but has {len(roots)}.")
    children: dict[int, list[int]] = {node: [] for node in nodes}
    for node in sorted(nodes, key=lambda node: (-(nodes[node]["prob"] or 0.0), node)):
        parent = nodes[node]["parent"]
        if parent is not None and parent not in nodes:
            raise ValueError(f"parents must be nodes of the tree, but the parent {parent} of node {node} is not.")
        if parent is not None:
            children[parent].append(node)
    return children, roots[0]


def _rows(children: dict[int, list[int]], root: int) -> dict[int, float]:
    """Return the row of each node reached from the root: leaves in order from the top, parents midway."""
    order, stack = [], [root]
    while stack:
        order.append(stack.pop())
        stack.extend(reversed(children[order[-1]]))
    leaves = [node for node in order if not children[node]]
    rows: dict[int, float] = {leaf: row for row, leaf in enumerate(leaves)}
    for node in reversed(order):
        if children[node]:
            rows[node] = (rows[children[node][0]] + rows[children[node][-1]]) / 2
    return {node: rows[node] for node in order}


def _levels(nodes: dict[int, Node], children: dict[int, list[int]], root: int) -> list[list[int]]:
    levels = [[root]]
    while below := [child for node in levels[-1] for child in children[node]]:
        levels.append(below)
    if sum(map(len, levels)) != len(nodes):
        raise ValueError(f"all {len(nodes)} nodes must be reachable from the root, but {sum(map(len, levels))} are.")
    return levels


def _labels(node: Node) -> tuple[str, str]:
    if node["parent"] is None:
        return sentence(node["text"], size=TOKEN_SIZE, width=PROMPT_WIDTH, weight="bold", keep_end=True) or "prompt", ""
    is_special = not node["text"] or (node["text"].startswith("<") and node["text"].endswith(">"))
    text = "⟨end⟩" if node["ended"] and is_special else node["text"]
    return token_label(text, size=TOKEN_SIZE, width=TOKEN_WIDTH, weight="bold"), per_cent(node["prob"])


def _box_width(label: str, probability: str, *, is_root: bool) -> float:
    number = 0.0 if is_root else PADDING + text_width(probability, NUMBER_SIZE)
    return max(30.0, text_width(label, TOKEN_SIZE, "bold") + number + 2 * PADDING)


def _gap(drops: list[float]) -> float:
    """Return the width between two levels: more if edges climb further."""
    return min(44.0, 17.0 + 0.1 * ROW * max(map(abs, drops), default=0.0))


def leaf_score(node: Node) -> str:
    """Return the score of a leaf as text, "–" if it has none."""
    return "–" if node["score"] is None else signed(node["score"])
