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
LITERAL = {"parse_math": False}  # for texts of a user or a model, in which "$" is a dollar sign
_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "\\r"}


@functools.cache
def _glyphs() -> frozenset[int]:
    regular, bold = (findfont(FontProperties(family=["DejaVu Sans"], weight=weight)) for weight in ("normal", "bold"))
    return frozenset(get_font(regular).get_charmap()) & frozenset(get_font(bold).get_charmap())


def symbols(text: str, *, space: str) -> list[str]:
    """Return a printable string for each character: white space visible, characters without a glyph as escapes."""
    return [_symbol(character, space) for character in text]


def _symbol(character: str, space: str) -> str:
    if character == " ":
        return space
    if character in _VISIBLE:
        return _VISIBLE[character]
    # A combining mark would combine with the character before it, which may be one of our signs.
    stands_alone = character.isprintable() and not unicodedata.category(character).startswith("M")
    if stands_alone and ord(character) in _glyphs():
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def token_label(text: str, *, size: float, width: float, weight: str = "normal") -> str:
    """Return a token's label: "·" for a space, "␣" for a space in a token of spaces, "∅" for the empty token."""
    space = "·" if text.strip(" ") else "␣"  # a lone "·" would be taken for a full stop
    return fit(symbols(text, space=space), size=size, width=width, weight=weight) if text else "∅"


def sentence(text: str, *, size: float, width: float, weight: str = "normal", keep_end: bool = False) -> str:
    """Return running text on one line, spaces unchanged, shortened to `width` points."""
    return fit(symbols(text, space=" "), size=size, width=width, weight=weight, keep_end=keep_end)


def fit(parts: Sequence[str], *, size: float, width: float, weight: str = "normal", keep_end: bool = False) -> str:
    """Join as many parts as fit into `width` points, at least one; an ellipsis replaces the others."""

    def cut(kept: int) -> str:
        if kept >= len(parts):
            return "".join(parts)
        return "…" + "".join(parts[-kept:]) if keep_end else "".join(parts[:kept]) + "…"

    kept = min(len(parts), int(width / (0.2 * size)) + 2)  # few letters are narrower than a fifth of the font size
    while kept > 1 and text_width(cut(kept), size, weight) > width:
        kept -= 1
    return cut(kept)


@functools.lru_cache(maxsize=65536)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width in points of a line of text at this font size."""
    font = FontProperties(family=["DejaVu Sans"], size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def per_cent(probability: float) -> str:
    """Return a probability as a short percentage: 15.2%, 0.31%, <0.01%."""
    percentage = 100 * probability
    if 0 < percentage < 0.005:
        return "<0.01%"
    if percentage >= 99.95:
        return "100%"
    return f"{percentage:.1f}%" if percentage >= 0.995 else f"{percentage:.2f}%"


def signed(value: float) -> str:
    """Return a number with two decimals and a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


class Sheet:
    """A figure of `width` × `height` points on which axes and lines of text are placed from the top left."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / POINTS, height / POINTS))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Add axes with their top left corner at (x, y)."""
        extent = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(extent)

    def line(self, x: float, y: float, text: str, *, size: float, width: float, **properties: Any) -> None:
        """Write a line of text with its base at (x, y), shortened to `width`."""
        text = sentence(text, size=size, width=width, weight=properties.get("weight", "normal"))
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **properties, **LITERAL)


def size_in_points(axes: Axes) -> tuple[float, float]:
    """Return the present width and height of axes in points."""
    inches = axes.get_window_extent().transformed(axes.get_figure().dpi_scale_trans.inverted())
    return inches.width * POINTS, inches.height * POINTS
