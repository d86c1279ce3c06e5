"""The style of every figure, figures measured in points, texts that fit, and saving with equal bytes for equal figures.

Texts of users and models are made safe, visible and short enough to be written into a figure.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.textpath import text_to_path
from PIL import Image, ImageChops, PngImagePlugin

from jaxrl_llm.files import replacing

DPI = 180
CLOSE = 26  # levels of 255 by which a palette may change a pixel
INK, MUTED, EDGE, FAINT = "#1b1f24", "#66707a", "#9aa3ac", "#c9ced4"
ACCENT = "#c8480a"  # for the main point of a figure; Okabe and Ito's vermilion, darkened so that text is legible

# Okabe and Ito (2008), distinguishable by colour-blind readers; their yellow is illegible on white and left out.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_LOOK = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so that a figure is the same on every machine
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "axes.prop_cycle": cycler(color=PALETTE),
    "image.cmap": "cividis",
    "figure.dpi": 100,
    "savefig.dpi": DPI,
    "text.hinting": "none",  # letters as wide on pixels as in the SVG, and as measured for the layout
    "svg.fonttype": "path",  # readable wherever it is opened, whatever fonts are there
    "svg.hashsalt": "jaxrl_llm",  # element ids follow from the content alone
}


def look() -> contextlib.AbstractContextManager[None]:
    """Return the library's style as a context manager or decorator; it starts from matplotlib's own defaults."""
    return matplotlib.style.context(_LOOK, after_reset=True)


def headline(figure: Figure | SubFigure, text: str) -> None:
    """Set the figure's title: the finding, at the left."""
    figure.suptitle(text, x=0.01, ha="left", weight="bold", fontsize=10.5)


def score_colours() -> Colormap:
    """Return the colour map of scores: pale yellow to blue, ordered also in grey, and pale enough for dark text."""
    return ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.02, 0.6, 256)), name="score")


def ink_on(colour: str | tuple[float, ...]) -> str:
    """Return the text colour, dark or white, that is more legible on this colour (WCAG's relative luminance)."""
    rgb = np.asarray(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.2 else INK


def save_as(figure: Figure, path: str | Path, *, source: str | None = None) -> Path:
    """Write one file, atomically and without a date, in the format of its suffix.

    Saving an equal figure again gives equal bytes. A PNG has a palette of 256 colours, about a third of the size, if
    that changes no channel of any pixel by more than `CLOSE` of 255 levels.

    Args:
        source: a name of the figure's data, for the metadata of a PNG or SVG.

    Raises:
        ValueError: if matplotlib does not write such files.
    """
    path = Path(path)
    file_format = check_suffix(path)
    undated = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
    metadata = undated.get(file_format)
    if source is not None and file_format in ("png", "svg"):
        metadata = metadata | {"Source": source}
    buffer = io.BytesIO()
    with look():
        figure.savefig(buffer, format=file_format, metadata=metadata)
    content = buffer.getvalue()
    return write_atomically(path, _with_palette(content) if file_format == "png" else content)


def _with_palette(png: bytes) -> bytes:
    """Return a PNG with a palette of 256 colours and the same metadata, or as it is if a pixel would change visibly."""
    picture = Image.open(io.BytesIO(png))
    full = picture.convert("RGB")
    if picture.convert("RGBA").getextrema()[3] != (255, 255):
        return png  # what is transparent stays so
    small = full.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    if max(high for _, high in ImageChops.difference(full, small.convert("RGB")).getextrema()) > CLOSE:
        return png
    buffer, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in picture.text.items():
        texts.add_text(name, text)
    small.save(buffer, format="png", optimize=True, pnginfo=texts, dpi=picture.info["dpi"])
    return buffer.getvalue()


def shown(figure: Figure) -> Figure:
    """Make a figure without pyplot show itself in a notebook, once."""

    def png() -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        with look():
            figure.savefig(buffer, format="png", dpi=DPI)
        width, height = (round(100 * inches) for inches in figure.get_size_inches())  # on the screen; dpi make it crisp
        return _with_palette(buffer.getvalue()), {"width": width, "height": height}

    figure._repr_png_ = png
    return figure


def check_suffix(path: Path) -> str:
    """Return the format of a file's suffix; call it before a long computation whose result is a figure.

    Raises:
        ValueError: if matplotlib does not write such files.
    """
    file_format, formats = path.suffix[1:].lower(), Figure().canvas.get_supported_filetypes()
    if file_format not in formats:
        raise ValueError(
            f"cannot write a figure to {path.name}: the suffix must be one of {', '.join(sorted(formats))}."
        )
    return file_format


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file atomically, and make its folder if it is missing."""
    with replacing(path) as partial:
        partial.write_bytes(content)
    return path


# Points and texts -----------------------------------------------------------------------------------------------------

POINTS = 72  # an inch
FAMILIES = ["DejaVu Sans"]  # and fonts of other scripts, from the first text on that needs them
LITERAL = {"parse_math": False, "family": FAMILIES}  # for texts of a user or a model, in which "$" is a dollar sign
_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "\\r"}


@functools.cache
def _characters(family: str) -> frozenset[int]:
    """Return the code points that a font has, both regular and bold."""
    files = {findfont(FontProperties(family=[family], weight=weight)) for weight in ("normal", "bold")}
    try:
        fonts = [get_font(file) for file in files]
    except (OSError, RuntimeError):
        return frozenset()
    # The pictures of emoji cannot be scaled.
    return frozenset.intersection(*(frozenset(font.get_charmap() if font.scalable else ()) for font in fonts))


@functools.cache
def _other_families() -> list[str]:
    """Return the other installed fonts, those of Noto Sans first: it has most scripts."""
    boxes = ("Last Resort", "LastResort", "cm", *FAMILIES)  # and fonts with signs in the places of others
    regular = (font for font in fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal"))
    names = {font.name for font in regular if not font.name.startswith(boxes)}
    return sorted(names, key=lambda name: (not name.startswith("Noto Sans"), name))


@functools.cache
def _is_drawn(character: str) -> bool:
    """Return True if a font has the character; one that is not ours joins `FAMILIES`."""
    families = itertools.chain(FAMILIES[:1], _other_families())
    family = next((name for name in families if ord(character) in _characters(name)), None)
    if family is None and unicodedata.category(character) not in ("Cn", "Co", "Cs"):
        _say_what_to_install()
    if family not in (None, *FAMILIES):
        FAMILIES.append(family)
    return family is not None


@functools.cache
def _say_what_to_install() -> None:
    warnings.warn(
        "some characters are drawn as escapes, such as \\u4eca, for no installed font has them: Noto Sans has nearly "
        "all scripts (packages fonts-noto-core and fonts-noto-cjk).",
        stacklevel=2,
    )


def symbols(text: str, *, space: str) -> list[str]:
    """Return a printable string for each character: white space visible, characters without a glyph as escapes.

    A combining mark belongs to the letter before it.
    """
    found: list[str] = []
    follows = False  # a letter, rather than a sign of ours
    for character in text:
        mark = unicodedata.category(character).startswith("M")
        if mark and follows and _is_drawn(character):
            found[-1] += character
            continue
        if character == " ":
            found.append(space)
        elif character.isprintable() and not mark and _is_drawn(character):
            found.append(character)
        else:
            escaped = character.encode("unicode_escape", "backslashreplace").decode("ascii")
            found.append(_VISIBLE.get(character, escaped))
        follows = found[-1] == character
    return found


def told_apart(labels: Sequence[str]) -> list[str]:
    """Return labels with their number, as a subscript, where one occurs several times: the₁, cat, the₂."""
    counts, seen = Counter(labels), Counter()
    found = []
    for label in labels:
        seen[label] += 1
        found.append(label + str(seen[label]).translate(_SUBSCRIPT) if counts[label] > 1 else label)
    return found


_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


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
    font = FontProperties(family=FAMILIES, size=size, weight=weight)
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


TALLEST = 7200.0  # points; what is taller is scaled down, for a PNG is limited to 65536 pixels


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
