"""Translation: BLEU against the number of beams and the length penalty, of a T5 and a decoder-only model."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

COLOURS = {"t5": style.PALETTE[0], "gpt2": style.PALETTE[1]}
LINE, SHOWN = 50, 3  # letters of a line, and examples


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw BLEU against beams and length penalty, the paired difference, lengths, and real translations."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    style.headline(figure, _headline(data))
    grid = figure.add_gridspec(3, 4, height_ratios=(1, 0.08, 0.85))
    beams, lead, penalties, lengths = (figure.add_subplot(grid[0, column]) for column in range(4))
    penalties.sharey(beams)
    wide = _sorted(data["leads"], "beams", length_penalty=data["length_penalty"])
    _draw_scores(lead, wide, "beams", style.INK)
    for kind, shift in (("t5", -0.06), ("gpt2", 0.06)):
        rows = [row for row in data["table"] if row["kind"] == kind]
        wide = _sorted(rows, "beams", length_penalty=data["length_penalty"])
        penalised = _sorted(rows, "length_penalty", beams=data["beams"])
        _draw_scores(beams, wide, "beams", COLOURS[kind], shift, label=data["labels"][kind])
        _draw_scores(penalties, penalised, "length_penalty", COLOURS[kind], shift)
        lengths.plot([row["length_ratio"] for row in penalised], color=COLOURS[kind], marker="o")
        _name_places(lengths, penalised, "length_penalty")
    at_beams, at_penalty = f"beams, length penalty {data['length_penalty']:g}", f"length penalty, {data['beams']} beams"
    beams.set(xlabel=at_beams, ylabel="BLEU", ylim=(0, beams.get_ylim()[1]))
    beams.set_title("(a) BLEU by beams")
    lead.axhline(0, color=style.MUTED, linestyle="--", linewidth=1.2)
    lead.set(xlabel=at_beams, ylabel="BLEU, decoder-only − T5")
    lead.set_title("(b) paired difference")
    penalties.set(xlabel=at_penalty, ylabel="BLEU")
    penalties.set_title("(c) BLEU by length penalty")
    lengths.axhline(1, color=style.MUTED, linestyle="--", linewidth=1.2)
    lengths.set(xlabel=at_penalty, ylabel="length / reference's length")
    lengths.set_title("(d) length")
    key = figure.add_subplot(grid[1, :])
    key.axis("off")
    key.legend(*beams.get_legend_handles_labels(), loc="center", ncols=2)
    _draw_examples(figure.add_subplot(grid[2, :]), data)
    return figure


def _headline(data: dict[str, Any]) -> str:
    at = {"beams": data["beams"], "length_penalty": data["length_penalty"]}
    bleu = {row["kind"]: row["bleu"]["estimate"] for row in data["table"] if row.items() >= at.items()}
    scores = [f"{data['labels'][kind].split(' (')[0]} {bleu[kind]:.1f}" for kind in ("gpt2", "t5")]
    return f"BLEU of {data['sentences']} held-out sentences with {at['beams']} beams: {', '.join(scores)}"


def _sorted(rows: list[dict[str, Any]], by: str, **fixed: float) -> list[dict[str, Any]]:
    """Return the rows with these values, in the order of another field."""
    return sorted((row for row in rows if row.items() >= fixed.items()), key=lambda row: row[by])


def _draw_scores(
    axes: Axes, rows: list[dict[str, Any]], by: str, colour: str, shift: float = 0.0, label: str | None = None
) -> None:
    """Draw BLEU with its intervals, as far as it has them, at equally spaced places."""
    place, estimate = np.arange(len(rows)) + shift, np.asarray([row["bleu"]["estimate"] for row in rows])
    axes.plot(place, estimate, color=colour, marker="o", label=label)
    if all("low" in row["bleu"] for row in rows):
        low, high = ([row["bleu"][end] for row in rows] for end in ("low", "high"))
        axes.errorbar(place, estimate, np.maximum([estimate - low, high - estimate], 0), color=colour, capsize=2)
    _name_places(axes, rows, by)


def _name_places(axes: Axes, rows: list[dict[str, Any]], by: str) -> None:
    axes.set_xticks(np.arange(len(rows)), [f"{row[by]:g}" for row in rows])
    axes.grid(axis="x", visible=False)


def _draw_examples(axes: Axes, data: dict[str, Any]) -> None:
    """Write the first test sentences side by side."""
    axes.axis("off")
    note = (
        f"Bars: 95% bootstrap intervals over the sentences. Below: {SHOWN} test sentences (black), references (grey), "
        f"translations with {data['beams']} beams."
    )
    axes.text(0, 1.0, note, color=style.MUTED, fontsize=7.5, va="top")
    for column, each in enumerate(data["examples"][:SHOWN]):
        blocks = (("source", style.INK), ("reference", style.MUTED), ("t5", COLOURS["t5"]), ("gpt2", COLOURS["gpt2"]))
        height = 0.88
        for field, colour in blocks:
            lines = textwrap.wrap(each[field] or "(nothing)", LINE, max_lines=4, placeholder=" …")
            axes.text(column / SHOWN, height, "\n".join(lines), color=colour, fontsize=7.5, va="top", linespacing=1.3)
            height -= 0.075 * len(lines) + 0.045
    axes.set(xlim=(0, 1), ylim=(0, 1))
