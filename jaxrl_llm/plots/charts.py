"""Charts: training curves, and bars of token probabilities with kept tokens in colour and sampled ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from jaxrl_llm.plots import style
from jaxrl_llm.plots.style import LITERAL, Sheet, per_cent, sentence, size_in_points, text_width, token_label

KEPT, REMOVED = style.PALETTE[0], "#cfd4d9"
LABEL_SIZE, LABEL_WIDTH, VALUE_WIDTH = 7.0, 58.0, 44.0
HEADING, ROW = 34.0, 13.6
COLUMN, GAP, MARGIN = 170.0, 16.0, 14.0


def draw_bars(axes: Axes, bars: dict[str, Any], *, largest: float | None = None) -> None:
    """Draw tokens of a distribution as horizontal bars, in the order given; their labels take 64 points on the left.

    Args:
        bars: `tokens`, each with `text`, `prob`, `kept` and `drawn`.
        largest: the probability of a bar over the whole width; panels side by side should share it. By default the
            largest of the tokens.
    """
    tokens = bars["tokens"]
    width, height = size_in_points(axes)
    largest = largest or max((token["prob"] for token in tokens), default=0.0) or 1.0
    colours = [KEPT if token["kept"] else REMOVED for token in tokens]
    axes.barh(range(len(tokens)), [token["prob"] for token in tokens], height=0.72, color=colours)
    end = largest * width / max(width - VALUE_WIDTH, 0.2 * width)
    axes.set(xlim=(0, end), ylim=(max(len(tokens), height / (1.25 * ROW)) - 0.5, -0.5), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    size = LABEL_SIZE * min(1.0, height / (ROW * max(1, len(tokens))))
    for row, token in enumerate(tokens):
        _annotate(axes, row, token, size)
    _divide(axes, [token["kept"] for token in tokens])


def _annotate(axes: Axes, row: int, token: dict[str, Any], size: float) -> None:
    weight = "bold" if token["drawn"] else "normal"
    colour = style.ACCENT if token["drawn"] else style.INK if token["kept"] else style.MUTED
    shared = {"textcoords": "offset points", "va": "center", "fontsize": size, "weight": weight, **LITERAL}
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    axes.annotate(_label(token, size), (0, row), (-4, 0), xycoords=beside, ha="right", color=colour, **shared)
    value = ("◆ " if token["drawn"] else "") + per_cent(token["prob"])
    axes.annotate(value, (token["prob"], row), (3, 0), ha="left", color=colour, **shared)


def _label(token: dict[str, Any], size: float) -> str:
    return token_label(token["text"], size=size, width=LABEL_WIDTH, weight="bold")


def _divide(axes: Axes, kept: list[bool]) -> None:
    """Draw a line below the kept tokens if they are the first ones."""
    count = sum(kept)
    if 0 < count < len(kept) and all(kept[:count]):
        axes.axhline(count - 0.5, color=style.MUTED, linewidth=0.8, linestyle=(0, (3, 2)))


def needed_height(panels: list[dict[str, Any]]) -> float:
    """Return the height in points of panels side by side."""
    return HEADING + ROW * max(len(panel["tokens"]) for panel in panels)


def draw_panels(
    sheet: Sheet,
    x: float,
    y: float,
    panels: list[dict[str, Any]],
    *,
    width: float,
    height: float,
    prefix: str = "",
    largest: float | None = None,
) -> None:
    """Draw distributions side by side in a rectangle of the sheet, each with its title and its kept mass.

    A title that is too long loses its beginning. `largest` is that of `draw_bars`, by default of these distributions.
    """
    tokens = [token for panel in panels for token in panel["tokens"]]
    largest = largest or max((token["prob"] for token in tokens), default=0.0)
    labels = 6 + max((text_width(_label(token, LABEL_SIZE), LABEL_SIZE, "bold") for token in tokens), default=0.0)
    column = width / len(panels)
    for index, panel in enumerate(panels):
        left, room = x + index * column, column - 14
        title = f"{prefix}{panel['title']}" if index == 0 else panel["title"]
        title = sentence(title, size=9.5, width=room, weight="bold", keep_end=True)
        sheet.line(left, y + 9, title, size=9.5, width=room, weight="bold")
        kept = f"kept mass {per_cent(panel['kept_mass'])}"
        sheet.line(left, y + 23, kept, size=8, width=room, color=style.MUTED)
        axes = sheet.axes(left + labels, y + HEADING, room - labels, height - HEADING)
        draw_bars(axes, panel, largest=largest)


@style.look()
def bars_figure(panels: Sequence[dict[str, Any]], *, title: str = "", columns: int = 4) -> Figure:
    """Draw distributions in rows of `columns`, each as large as it needs, all at one scale.

    Raises:
        ValueError: if there is none, or there are more than fit into a figure.
    """
    rows = [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]
    heights = [needed_height(row) + GAP for row in rows]
    top, width = 2 * MARGIN + 8, COLUMN * min(columns, len(panels)) + MARGIN
    width = max(width, 2 * MARGIN + style.text_width(title, 9.5, "bold"))
    if not rows:
        raise ValueError("a figure must have at least 1 distribution, but is given 0.")
    if top + sum(heights) > style.TALLEST:
        most = columns * int((style.TALLEST - top) / max(heights))
        raise ValueError(f"a figure must have 1 to {most} distributions, but is given {len(panels)}.")
    sheet = Sheet(width, top + sum(heights))
    sheet.line(MARGIN, MARGIN + 6, title, size=9.5, width=width - 2 * MARGIN, weight="bold")
    largest = max(token["prob"] for panel in panels for token in panel["tokens"])
    y = top
    for row, height in zip(rows, heights, strict=True):
        draw_panels(sheet, MARGIN, y, row, width=COLUMN * len(row), height=height - GAP, largest=largest)
        y += height
    return sheet.figure


def draw_training_curve(
    axes: Axes, log: Sequence[dict[str, Any]], *, baseline: tuple[str, float] | None = None
) -> None:
    """Draw the training and held-out loss (nats per token) of a run's log against tokens seen, with a baseline."""
    millions = [row["tokens"] / 1e6 for row in log]
    axes.plot(millions, [row["loss"] for row in log], color=style.PALETTE[0], label="training text")
    held_out = [(at, row["held_out_loss"]) for at, row in zip(millions, log, strict=True) if "held_out_loss" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=style.PALETTE[1], marker="o", label="held-out text")
    if baseline is not None:
        name, value = baseline
        axes.axhline(value, color=style.MUTED, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{name}, held-out text: {value:.2f}",
            (0, value),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",  # a falling curve is above the line here
            color=style.MUTED,
            fontsize=7.5,
        )
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", xlim=(0, None))
    axes.legend(loc="upper right")
