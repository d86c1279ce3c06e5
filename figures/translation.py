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
    """BLEU with its intervals against both knobs, the length of what comes out, and real translations."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    figure.suptitle(_headline(data), fontsize=11, fontweight="bold", x=0.01, ha="left")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 0.95))
    beams, penalties, lengths = (figure.add_subplot(grid[0, column]) for column in range(3))
    penalties.sharey(beams)
    for kind, shift in (("t5", -0.06), ("gpt2", 0.06)):
        wide = [row for row in data["table"] if _of(row, kind, length_penalty=data["length_penalty"])]
        penalised = [row for row in data["table"] if _of(row, kind, beams=data["beams_of_penalties"])]
        wide.sort(key=lambda row: row["beams"])
        penalised.sort(key=lambda row: row["length_penalty"])
        label = data["labels"][kind]
        _draw_bleu(beams, wide, [f"{row['beams']}" for row in wide], kind, shift, label)
        _draw_bleu(penalties, penalised, [f"{row['length_penalty']:g}" for row in penalised], kind, shift, label)
        _draw_lengths(lengths, penalised, kind)
    low = beams.get_ylim()[1]
    beams.set(xlabel=f"beams (1 is greedy), length penalty {data['length_penalty']:g}", ylabel="BLEU", ylim=(0, low))
    beams.set_title(f"(a) more beams: {_gains(data)}")
    beams.legend(loc="lower left", fontsize=7)
    penalties.set(xlabel=f"length penalty, {data['beams_of_penalties']} beams")
    penalties.set_title(f"(b) best length penalty: {_best(data)}")
    lengths.axhline(1, color=style.MUTED, linestyle="--", linewidth=1.2)
    lengths.set(xlabel=f"length penalty, {data['beams_of_penalties']} beams", ylabel="length / reference's length")
    lengths.set_title("(c) how long translations are")
    _draw_examples(figure.add_subplot(grid[1, :]), data)
    return figure


def _headline(data: dict[str, Any]) -> str:
    at = (data["beams_of_penalties"], data["length_penalty"])
    bleu = {row["kind"]: row["bleu"] for row in data["table"] if (row["beams"], row["length_penalty"]) == at}
    parts = [f"{data['labels'][kind].split(' (')[0]} {each['estimate']:.1f}" for kind, each in bleu.items()]
    return f"BLEU of {data['sentences']} held-out sentences with {at[0]} beams: {', '.join(parts)}"


def _gains(data: dict[str, Any]) -> str:
    """What the most beams add to greedy decoding."""
    parts = []
    for kind in COLOURS:
        rows = {row["beams"]: row for row in data["table"] if _of(row, kind, length_penalty=data["length_penalty"])}
        gain = rows[max(rows)]["bleu"]["estimate"] - rows[min(rows)]["bleu"]["estimate"]
        parts.append(f"{gain:+.1f}".replace("-", "−"))
    return " and ".join(parts)


def _best(data: dict[str, Any]) -> str:
    """The length penalty of the highest BLEU."""
    best = []
    for kind in COLOURS:
        rows = [row for row in data["table"] if _of(row, kind, beams=data["beams_of_penalties"])]
        best.append(f"{max(rows, key=lambda row: row['bleu']['estimate'])['length_penalty']:g}")
    return " and ".join(best)


def _of(row: dict[str, Any], kind: str, **knobs: float) -> bool:
    return row["kind"] == kind and all(row[name] == value for name, value in knobs.items())


def _draw_bleu(axes: Axes, rows: list[dict[str, Any]], ticks: list[str], kind: str, shift: float, label: str) -> None:
    estimate, low, high = (np.asarray([row["bleu"][part] for row in rows]) for part in ("estimate", "low", "high"))
    place = np.arange(len(rows)) + shift
    errors = np.maximum(np.stack([estimate - low, high - estimate]), 0)
    axes.errorbar(place, estimate, errors, color=COLOURS[kind], marker="o", markersize=4, capsize=2, label=label)
    axes.set_xticks(np.arange(len(rows)), ticks)
    axes.grid(axis="x", visible=False)


def _draw_lengths(axes: Axes, rows: list[dict[str, Any]], kind: str) -> None:
    axes.plot([row["length_ratio"] for row in rows], color=COLOURS[kind], marker="o", markersize=4)
    axes.set_xticks(np.arange(len(rows)), [f"{row['length_penalty']:g}" for row in rows])
    axes.grid(axis="x", visible=False)


def _draw_examples(axes: Axes, data: dict[str, Any]) -> None:
    """The first test sentences, side by side."""
    axes.axis("off")
    note = (
        f"The first {SHOWN} test sentences (black), their references (grey), and what the models make of them with "
        f"{data['beams_of_penalties']} beams. Bars: 95% bootstrap intervals over the sentences."
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
