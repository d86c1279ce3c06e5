"""Layout of a search tree: columns for levels, a row for each leaf, so that nothing can overlap.

All lengths are points. Every leaf has a row of its own, a parent stands midway between its first and last child, and a
column is as wide as its widest label: two nodes of a level are at least one row apart, two levels never share a column.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl_llm.plots.text import per_cent, sentence, signed, text_width, token_label

TOKEN_SIZE, NUMBER_SIZE = 7.5, 6.4
ROW, BOX_HEIGHT, HEADER = 14.6, 11.8, 15.0
PADDING, TOKEN_WIDTH, PROMPT_WIDTH = 4.5, 62.0, 110.0

Node = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Box:
    """A node's box: its left edge, the height of its middle below the top, its width, and what is written in it."""

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


def place(tree: dict[str, Any], *, width: float = 0.0) -> Layout:
    """Lay the tree out, from left to right; wider than it needs if `width` asks for it.

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
        raise ValueError(f"a tree has one node without parent, found {len(roots)}.")
    children: dict[int, list[int]] = {node: [] for node in nodes}
    for node in sorted(nodes, key=lambda node: (-(nodes[node]["prob"] or 0.0), node)):
        parent = nodes[node]["parent"]
        if parent is not None and parent not in nodes:
            raise ValueError(f"node {node} has the parent {parent}, which is not in the tree.")
        if parent is not None:
            children[parent].append(node)
    return children, roots[0]


def _rows(children: dict[int, list[int]], root: int) -> dict[int, float]:
    """The row of each node reached from the root: leaves are counted from the top, parents stand in the middle."""
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
        raise ValueError(f"of {len(nodes)} nodes, only {sum(map(len, levels))} can be reached from the root.")
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
    """Room for the edges between two levels: more where they climb further."""
    return min(44.0, 17.0 + 0.1 * ROW * max(map(abs, drops), default=0.0))


def leaf_score(node: Node) -> str:
    """The score of a leaf as text; "–" where it has none."""
    return "–" if node["score"] is None else signed(node["score"])
