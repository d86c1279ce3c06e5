"""The gradients of k1, k2 and k3, as losses and as rewards, and what they descend."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxrl_llm.plots import style

COLOURS = {"k1": style.PALETTE[0], "k2": style.PALETTE[1], "k3": style.PALETTE[2]}
REVERSE, FORWARD = "∇KL(π‖ref)", "∇KL(ref‖π)"
FILLS = {REVERSE: "#cfe6f5", FORWARD: "#f9dcc4", "0": "#e3e5e8", None: "#ffffff"}
MODES = {
    "loss": "as a loss",
    "reward": "as a reward",
    "off-policy loss": "off-policy,\nno ratio",
    "constant ratio": "off-policy,\nconstant ratio",
    "through the ratio": "off-policy,\nthrough the ratio",
}
SMALL = 7.5


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw the table, the descents, the misspecified end, and the share that a loss over tokens misses."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    finding = "As a loss on-policy, k1 has the expected gradient 0, k2 descends KL(π‖ref), and k3 descends KL(ref‖π)"
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    (table, curves), (ends, missing) = figure.subplots(2, 2, width_ratios=(1.25, 1))
    _draw_table(table, data["table"])
    _draw_descents(curves, data["descents"])
    _draw_ends(ends, data["misspecified"])
    _draw_missing(missing, data["missing"])
    return figure


def _draw_table(axes: Axes, table: list[dict[str, Any]]) -> None:
    names, modes = list(COLOURS), list(MODES)
    for entry in table:
        column, row = names.index(entry["estimator"]), modes.index(entry["mode"])
        axes.add_patch(_cell(column, row, FILLS[entry["equals"]]))
        if entry["equals"]:
            axes.text(column, row, entry["equals"], ha="center", va="center", fontsize=8.5, weight="bold")
        else:
            cosines = f"cos {entry[f'cosine {REVERSE}']:.2f} | {entry[f'cosine {FORWARD}']:.2f}".replace("-", "−")
            axes.text(column, row, f"neither\n{cosines}", ha="center", va="center", fontsize=7, color=style.MUTED)
    axes.set(xlim=(-0.5, 2.5), ylim=(len(modes) - 0.5, -0.5))
    axes.set_xticks(range(3), names, weight="bold")
    axes.set_yticks(range(len(modes)), list(MODES.values()))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("(a) the mean gradient, to 10⁻¹⁰ (cos: with ∇KL(π‖ref) | ∇KL(ref‖π))", pad=8)


def _cell(column: int, row: int, colour: str) -> Any:
    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=colour, edgecolor=style.FAINT, linewidth=0.7)


def _draw_descents(axes: Axes, descents: dict[str, Any]) -> None:
    steps = descents["steps"]
    for label, values in descents["kl"].items():
        if label == "k1 as a reward":
            continue
        axes.plot(steps, values, color=COLOURS[label[:2]])
    axes.plot(steps, descents["kl"]["k1 as a reward"], color=COLOURS["k1"], linestyle=(0, (2, 3)), linewidth=2)
    end = {name: values[-1] for name, values in descents["kl"].items()}
    start = descents["kl"]["k1 as a loss"][0]
    axes.text(steps[-1], start * 0.75, f"k1 as a loss: stays at {start:.2f}", color=COLOURS["k1"], ha="right", va="top")
    steps_shown, k3 = len(steps), descents["kl"]["k3 as a loss"]
    place = steps_shown // 3
    axes.annotate(
        "k3 as a loss descends KL(ref‖π):\nno order with k2 follows, and they may cross",
        (steps[place], k3[place]),
        xytext=(0.02, 0.04),
        textcoords="axes fraction",
        color=COLOURS["k3"],
        fontsize=SMALL,
        arrowprops={"arrowstyle": "-", "color": style.FAINT, "linewidth": 0.7},
    )
    axes.text(
        0.98, 0.6, "k2 as a loss = k1 as a reward\n(dashed: the same path)", transform=axes.transAxes,
        color=COLOURS["k2"], ha="right", va="bottom", fontsize=SMALL,
    )  # fmt: skip
    axes.set(yscale="log", xlabel="step of gradient descent", ylabel="KL(π‖ref) (nats)", xlim=(0, steps[-1]))
    axes.set_ylim(min(end.values()) * 0.15, start * 1.8)
    axes.set_title("(b) descent on the mean gradient")


def _draw_ends(axes: Axes, found: dict[str, Any]) -> None:
    policies, divergences = found["policies"], found["divergences"]
    place = np.arange(3)
    series = (("k2 as a loss", "argmin KL(π‖ref)", "k2", -0.2), ("k3 as a loss", "argmin KL(ref‖π)", "k3", 0.2))
    for end, target, name, shift in series:
        drawn = axes.bar(place + shift, policies[end], 0.38, color=COLOURS[name])
        axes.bar_label(drawn, fmt="%.3f", fontsize=7, padding=4)
        axes.plot(place + shift, policies[target], "D", color=style.INK, markersize=4.5, markerfacecolor="none")
    lines = [
        f"{end}: KL(π‖ref) = {divergences[end]['reverse']:.2f}, KL(ref‖π) = {divergences[end]['forward']:.2f}"
        for end in ("k2 as a loss", "k3 as a loss")
    ]
    for line, height, name in zip(lines, (0.93, 0.83), ("k2", "k3"), strict=True):
        axes.text(0.99, height, line, transform=axes.transAxes, ha="right", color=COLOURS[name], weight="bold",
                  fontsize=SMALL)  # fmt: skip
    note = "◇ argmin KL(π‖ref) on k2, argmin KL(ref‖π) on k3\n"
    note += f"reference: first token a or b, repeated with probability {found['repeat']:g}"
    axes.text(0.99, 0.77, note, transform=axes.transAxes, ha="right", va="top", fontsize=SMALL)
    axes.set_xticks(place, [f"token {letter}" for letter in "abc"])
    axes.set(ylabel="probability in the policy", ylim=(0, 1.12))
    axes.grid(axis="x", visible=False)
    axes.set_title("(c) policy of independent tokens: k2 picks, k3 covers")


def _draw_missing(axes: Axes, missing: dict[str, Any]) -> None:
    lengths = [int(name) for name in missing["share"]]
    for length, values in zip(lengths, missing["share"].values(), strict=True):
        axes.plot(np.full(len(values), length - 0.12), values, "o", color=COLOURS["k2"], alpha=0.25, markeredgewidth=0)
    median, low, high = np.transpose(list(missing["median"].values()))
    bars = [median - low, high - median]
    axes.errorbar(np.asarray(lengths) + 0.12, median, bars, fmt="s", color=style.INK, capsize=3, markersize=4)
    for length, value in zip(lengths, median, strict=True):
        axes.annotate(f"{value:.2f}", (length + 0.12, value), xytext=(7, 0), textcoords="offset points", fontsize=SMALL)
    count = len(missing["share"][str(lengths[0])])
    note = f"dots: {count} random models at each length\nsquares: their median, with its 95% interval"
    axes.text(0.03, 0.97, note, transform=axes.transAxes, va="top", fontsize=SMALL)
    axes.set(xlabel="length of the sequences (tokens)", ylabel="‖∇KL − E∇Σk2‖ / ‖∇KL‖", xlim=(0.4, max(lengths) + 0.6))
    axes.set_ylim(top=1.25 * max(map(max, missing["share"].values())))
    axes.set_xticks(lengths)
    axes.set_title("(d) part of ∇KL missed by k2 over tokens")
