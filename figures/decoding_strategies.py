"""Every decoding strategy against what a human wrote next: perplexity, repetition, Zipf, diversity."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from jaxrl_llm.plots import style

COLOURS = {
    "human": style.INK,
    "maximisation": style.PALETTE[1],
    "penalised maximisation": style.PALETTE[4],
    "sampling": style.PALETTE[0],
    "choice among samples": style.PALETTE[2],
}
PANELS = (
    ("perplexity", "perplexity", "under the model"),
    ("seq_rep_4", "seq-rep-4", "share of 4-grams"),
    ("loops", "ends in a loop", "share of texts"),
    ("zipf", "Zipf", "exponent"),
    ("distinct_2", "distinct-2", "share of 2-grams"),
    ("self_bleu", "self-BLEU", "BLEU, 0 to 100"),
)


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """A panel a metric, a row a strategy, and the human text's interval as a band."""
    data = results["data"]
    rows = data["rows"]
    repeated = {row["name"]: row["seq_rep_4"]["estimate"] for row in rows}
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    figure.suptitle(
        f"Greedy text repeats {repeated['greedy']:.0%} of its 4-grams, human text {repeated['human']:.0%}: "
        f"perplexity {_estimate(rows, 'greedy'):.1f} against {_estimate(rows, 'human'):.0f}",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    grid = figure.add_gridspec(2, len(PANELS), height_ratios=(1, 0.13), width_ratios=(1.35, 1, 1, 1, 1, 1))
    first = figure.add_subplot(grid[0, 0])
    panels = [first, *(figure.add_subplot(grid[0, column], sharey=first) for column in range(1, len(PANELS)))]
    for axes, (field, title, unit) in zip(panels, PANELS, strict=True):
        _draw_metric(axes, rows, field)
        axes.set_title(title)
        axes.set_xlabel(unit)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    first.set_xscale("log")
    first.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter("{x:g}")
    first.set_yticks(range(len(rows)), [row["name"] for row in rows])
    first.get_yticklabels()[0].set_fontweight("bold")
    first.set_ylim(len(rows) - 0.4, -0.6)
    _draw_foot(figure.add_subplot(grid[1, :]), data)
    return figure


def _estimate(rows: list[dict[str, Any]], name: str) -> float:
    return next(row["perplexity"]["estimate"] for row in rows if row["name"] == name)


def _draw_metric(axes: Axes, rows: list[dict[str, Any]], field: str) -> None:
    human = rows[0][field]
    axes.axvspan(human["low"], human["high"], color=style.FAINT, alpha=0.5, linewidth=0)
    axes.axvline(human["estimate"], color=style.INK, linewidth=0.9)
    for place, row in enumerate(rows):
        each, colour = row[field], COLOURS[row["family"]]
        axes.plot([each["low"], each["high"]], [place, place], color=colour, linewidth=1.3, solid_capstyle="butt")
        axes.plot(each["estimate"], place, "o", color=colour, markersize=4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _draw_foot(axes: Axes, data: dict[str, Any]) -> None:
    """What the colours, the band and the intervals are."""
    marks = [Line2D([], [], color=colour, marker="o", linewidth=1, label=name) for name, colour in COLOURS.items()]
    axes.legend(handles=marks, loc="lower left", ncols=len(marks), columnspacing=1.6, bbox_to_anchor=(0, 0.78))
    seen = "" if data["model"] != "tiny-gpt2" else f", {data['in_corpus']} of them from works it was trained on"
    caption = (
        f"{data['model']}, {data['passages']} passages{seen}; {data['new_tokens']} tokens each, no early end. Line and "
        "band: human text. 95% intervals: bootstrap over texts (perplexity, seq-rep-4, loops; of no width where none "
        "was seen), jackknife (the others). What the model knows by heart lowers the human text's perplexity."
    )
    axes.text(0, 0.7, textwrap.fill(caption, 132), fontsize=7.5, color=style.MUTED, va="top", linespacing=1.4)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
