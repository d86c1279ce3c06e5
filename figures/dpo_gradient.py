"""The gradient of DPO: one weight, an up-push and a down-push."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

COLOURS = {"different": style.PALETTE[0], "nearly the same": style.PALETTE[1]}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """The weight during two runs, the two log-probabilities in each, and how far the pushes cancel."""
    runs = results["data"]["runs"]
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    fall = runs["nearly the same"][-1]["chosen"]
    figure.suptitle(
        f"Between nearly equal answers DPO's pushes cancel, and the chosen answer falls too: by {-fall:.1f} nats here",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10.5,
    )
    (different, same), (weight, cosine) = figure.subplots(2, 2)
    for axes, kind, letter in ((different, "different", "a"), (same, "nearly the same", "b")):
        _draw_answers(axes, runs[kind])
        what = "different answers" if kind == "different" else "answers that differ in the last token alone"
        axes.set_title(f"({letter}) {what}")
    _draw_field(weight, runs, "weight", r"mean weight $\sigma(\hat r_l - \hat r_w)$")
    weight.set(ylim=(0, 0.55))
    weight.set_title("(c) ½ at the start, less once a pair is ordered")
    _draw_field(cosine, runs, "cosine", "cosine of the two weighted sums")
    cosine.set(ylim=(-0.15, 1.2))
    cosine.set_title(r"(d) $\nabla\log\pi_w$ against $\nabla\log\pi_l$: at 1 the pushes cancel")
    return figure


def _draw_answers(axes: Axes, rows: list[dict[str, float]]) -> None:
    for name, colour, label in (("chosen", style.PALETTE[2], "chosen"), ("rejected", style.PALETTE[3], "rejected")):
        values = [row[name] for row in rows]
        axes.plot(values, color=colour)
        text, above = f"{label}: {values[-1]:+.1f}".replace("-", "−"), 6 if values[-1] > 0 else 22
        axes.annotate(text, (len(rows) - 1, values[-1]), xytext=(-2, above), ha="right",
                      textcoords="offset points", color=colour, fontsize=8)  # fmt: skip
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    axes.margins(y=0.12)
    axes.set(xlabel="step of gradient descent", ylabel="log π − log ref (nats per answer)")


def _draw_field(axes: Axes, runs: dict[str, list[dict[str, float]]], field: str, label: str) -> None:
    for kind, rows in runs.items():
        values = [row[field] for row in rows]
        axes.plot(values, color=COLOURS[kind])
        middle = len(rows) // 2
        axes.annotate(kind, (middle, values[middle]), xytext=(0, 6), textcoords="offset points", color=COLOURS[kind],
                      fontsize=8)  # fmt: skip
    axes.set(xlabel="step of gradient descent", ylabel=label)
