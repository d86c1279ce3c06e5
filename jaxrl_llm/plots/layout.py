"""Figures measured in points, and text made safe, visible and short enough to be written into them."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

POINTS = 72  # an inch
LITERAL = {"parse_math": False}  # for every text that holds a user's or a model's words: "$" is then a dollar
_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "\\r"}


@functools.cache
def _glyphs() -> frozenset[int]:
    regular, bold = (findfont(FontProperties(family=["DejaVu Sans"], weight=weight)) for weight in ("normal", "bold"))
    return frozenset(get_font(regular).get_charmap()) & frozenset(get_font(bold).get_charmap())


def symbols(text: str, *, space: str) -> list[str]:
    """One printable string per character: white space made visible, characters without a glyph as Python escapes."""
    return [_symbol(character, space) for character in text]


def _symbol(character: str, space: str) -> str:
    if character == " ":
        return space
    if character in _VISIBLE:
        return _VISIBLE[character]
    # Marks would combine with whatever stands before them, perhaps with our own signs.
    stands_alone = character.isprintable() and not unicodedata.category(character).startswith("M")
    if stands_alone and ord(character) in _glyphs():
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def token_label(text: str, *, size: float, width: float, weight: str = "normal") -> str:
    """A token as drawn in a figure: "·" is a space, "␣" a space in a token of spaces, "∅" the empty token."""
    space = "·" if text.strip(" ") else "␣"  # a lone "·" would be taken for a full stop
    return fit(symbols(text, space=space), size=size, width=width, weight=weight) if text else "∅"


def sentence(text: str, *, size: float, width: float, weight: str = "normal", keep_end: bool = False) -> str:
    """Running text on one line, its spaces as they are."""
    return fit(symbols(text, space=" "), size=size, width=width, weight=weight, keep_end=keep_end)


def fit(parts: Sequence[str], *, size: float, width: float, weight: str = "normal", keep_end: bool = False) -> str:
    """Join as many of the parts as fit into `width` points, an ellipsis in place of the rest (at least one stays)."""

    def cut(kept: int) -> str:
        if kept >= len(parts):
            return "".join(parts)
        return "…" + "".join(parts[-kept:]) if keep_end else "".join(parts[:kept]) + "…"

    kept = min(len(parts), int(width / (0.2 * size)) + 2)  # hardly a letter is narrower than a fifth of its size
    while kept > 1 and text_width(cut(kept), size, weight) > width:
        kept -= 1
    return cut(kept)


@functools.lru_cache(maxsize=65536)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """The width in points that a line of text takes at this font size."""
    font = FontProperties(family=["DejaVu Sans"], size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def per_cent(probability: float) -> str:
    """A probability as a short percentage: 15.2%, 0.31%, <0.01%."""
    percentage = 100 * probability
    if 0 < percentage < 0.005:
        return "<0.01%"
    if percentage >= 99.95:
        return "100%"
    return f"{percentage:.1f}%" if percentage >= 0.995 else f"{percentage:.2f}%"


def signed(value: float) -> str:
    """Two decimals and a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


class Sheet:
    """A figure of `width` times `height` points on which axes and lines of text are placed."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / POINTS, height / POINTS))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes with their top left corner at (x, y)."""
        extent = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(extent)

    def line(self, x: float, y: float, text: str, *, size: float, width: float, **properties: Any) -> None:
        """A line of text, its base at (x, y), shortened to `width`."""
        text = sentence(text, size=size, width=width, weight=properties.get("weight", "normal"))
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **properties, **LITERAL)


def size_in_points(axes: Axes) -> tuple[float, float]:
    """The present width and height of axes."""
    inches = axes.get_window_extent().transformed(axes.get_figure().dpi_scale_trans.inverted())
    return inches.width * POINTS, inches.height * POINTS
