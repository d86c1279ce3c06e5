"""The style of every figure, and saving: atomically, with equal bytes for equal figures."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.colors import Colormap, ListedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure

DPI = 180
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

    Saving an equal figure again gives equal bytes.

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
    return write_atomically(path, buffer.getvalue())


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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
    return path
