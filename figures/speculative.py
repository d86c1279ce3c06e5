"""Speculative decoding: acceptance, and tokens per round."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Measured against predicted acceptance, tokens per round against the length of the draft, and time."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    worst = next(entry["value"] for entry in results["numbers"] if entry["name"].startswith("largest |measured"))
    figure.suptitle(
        f"A draft is accepted with probability Σ min(p, q): to {worst:.1f} standard errors at most",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10.5,
    )
    acceptance, tokens, time = figure.subplots(1, 3)
    _draw_acceptance(acceptance, data["rows"])
    _draw_tokens(tokens, data["rows"], data["middle"])
    _draw_time(time, data)
    return figure


def _draw_acceptance(axes: Axes, rows: list[dict[str, float]]) -> None:
    axes.plot([0, 1], [0, 1], color=style.FAINT, linewidth=1, zorder=1)
    for row in rows:
        axes.errorbar(row["predicted"], row["accepted"], 2 * row["se"], fmt="o", color=style.PALETTE[0], capsize=2)
    lowest = min(row["accepted"] for row in rows) - 0.05
    axes.set(xlim=(lowest, 1.02), ylim=(lowest, 1.02))
    axes.set(xlabel="predicted: E Σ min(p, q)", ylabel="measured acceptance ± 2 s.e.")
    axes.set_title("(a) drafts by noisy copies")


def _draw_tokens(axes: Axes, rows: list[dict[str, float]], middle: float) -> None:
    drafts = np.arange(0, 9)
    chosen = sorted((row for row in rows if row["noise"] == middle), key=lambda row: row["drafts"])
    alpha = float(np.mean([row["accepted"] for row in chosen]))
    axes.plot(drafts, (1 - alpha ** (drafts + 1)) / (1 - alpha), color=style.FAINT, linewidth=2)
    axes.plot([row["drafts"] for row in chosen], [row["per_round"] for row in chosen], "o", color=style.PALETTE[1])
    axes.annotate(
        f"line: (1 − α$^{{γ+1}}$)/(1 − α), α = {alpha:.2f}", (0.04, 0.94), xycoords="axes fraction", fontsize=7.5,
        color=style.MUTED,
    )  # fmt: skip
    axes.set(xlabel="drafts in a round, γ", ylabel="tokens per call of the target", ylim=(0, None))
    axes.set_title(f"(b) tokens per call, noise {middle:g}")


def _draw_time(axes: Axes, data: dict[str, Any]) -> None:
    first = data["rows"][0]
    cases = [
        ("plain generation", data["plain_seconds"], 1.0),
        (f"draft of the target's size\n{first['per_round']:.1f} tokens a round", first["seconds"], first["per_round"]),
    ]
    cases += [
        (f"look-up, {kind}\n{found['per_round']:.2f} tokens a round", found["seconds"], found["per_round"])
        for kind, found in data["look_up"].items()
    ]
    places = np.arange(len(cases))[::-1]
    bars = axes.barh(places, [seconds for _, seconds, _ in cases], 0.6, color=style.PALETTE[5])
    axes.bar_label(bars, fmt="%.2f s", padding=3, fontsize=7.5)
    axes.set_yticks(places, [label for label, _, _ in cases])
    axes.set(xlabel="seconds, on this machine", xlim=(0, 1.25 * max(case[1] for case in cases)))
    axes.grid(axis="y", visible=False)
    axes.set_title("(c) no cheap draft, no gain")
