"""Every decoding strategy against what a human wrote next: perplexity, repetition, Zipf, diversity."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
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
    ("perplexity", "perplexity", "by the model, log scale"),
    ("seq_rep_4", "seq-rep-4", "share of 4-grams"),
    ("loops", "loops", "share of texts"),
    ("zipf", "Zipf", "exponent"),
    ("distinct_2", "distinct-2", "share of 2-grams"),
    ("self_bleu", "self-BLEU", "BLEU, 0 to 100"),
)


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw a panel a metric, a row a strategy, and the human text's interval as a band."""
    data = results["data"]
    rows = data["rows"]
    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    style.headline(figure, _title(results))
    grid = figure.add_gridspec(2, len(PANELS), height_ratios=(1, 0.17), width_ratios=(1.35, 1, 1, 1, 1, 1))
    first = figure.add_subplot(grid[0, 0])
    panels = [first, *(figure.add_subplot(grid[0, column], sharey=first) for column in range(1, len(PANELS)))]
    for index, (axes, (field, title, unit)) in enumerate(zip(panels, PANELS, strict=True)):
        _draw_metric(axes, rows, field, hollow=data["perplexity_like_human"] if field == "perplexity" else ())
        axes.set_title(f"({chr(ord('a') + index)}) {title}")
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


def _title(results: dict[str, Any]) -> str:
    if not results.get("holds"):
        return f"{len(results['data']['rows']) - 1} decoding strategies of {results['data']['model']}, and human text"
    repeats, perplexity = (
        {row["name"]: row[field]["estimate"] for row in results["data"]["rows"]}
        for field in ("seq_rep_4", "perplexity")
    )
    return (
        f"Greedy text repeats {repeats['greedy']:.0%} of its 4-grams, human text {repeats['human']:.0%}: "
        f"perplexity {perplexity['greedy']:.1f} against {perplexity['human']:.0f}"
    )


def _draw_metric(axes: Axes, rows: list[dict[str, Any]], field: str, *, hollow: Sequence[str]) -> None:
    human = rows[0][field]
    axes.axvspan(human["low"], human["high"], color=style.FAINT, alpha=0.5, linewidth=0)
    axes.axvline(human["estimate"], color=style.INK, linewidth=0.9)
    for place, row in enumerate(rows):
        each, colour = row[field], COLOURS[row["family"]]
        axes.plot([each["low"], each["high"]], [place, place], color=colour, linewidth=1.3, solid_capstyle="butt")
        fill = {"markerfacecolor": "white"} if row["name"] in hollow else {}
        axes.plot(each["estimate"], place, "o", color=colour, markersize=4, **fill)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _draw_foot(axes: Axes, data: dict[str, Any]) -> None:
    """Explain the colours, the band and the intervals."""
    marks = [Line2D([], [], color=colour, marker="o", linewidth=1, label=name) for name, colour in COLOURS.items()]
    axes.legend(handles=marks, loc="lower left", ncols=len(marks), columnspacing=1.6, bbox_to_anchor=(0, 0.78))
    seen = "" if data["model"] != "tiny-gpt2" else f", {data['in_corpus']} of them from works it was trained on"
    caption = (
        f"{data['model']}, {data['passages']} passages{seen}; {data['new_tokens']} tokens each, no early end; one "
        "setting of each strategy. Line and band: human text. 95% intervals: Student's t (perplexity, seq-rep-4; of no "
        "width where nothing repeats), Wilson (texts that end in a loop), jackknife (the others). Hollow: perplexity "
        "not told from that of human text (Wilcoxon, Holm over all strategies, 5%), which is lower where the model "
        "knows it by heart."
    )
    axes.text(0, 0.7, textwrap.fill(caption, 132), fontsize=7.5, color=style.MUTED, va="top", linespacing=1.4)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
