"""Seven ways to teach a small GPT-2 to write good reviews: held-out losses, rewards at equal KL, over-optimisation."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style
from jaxrl_llm.plots.style import LITERAL, sentence, signed

LABELS = {
    "reference": "reference",
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "simpo": "SimPO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
}
COLOURS = dict(zip(LABELS, (style.INK, *style.PALETTE), strict=True)) | {"rloo": "#7a4fa3"}
OFFLINE = ("dpo", "ipo", "kto", "simpo")
SHOWN = ("reference", "dpo", "ppo", "rloo")
"""Whose reviews are shown."""
WIDTH, PANELS, LINE = 10.4, 10.8, 0.19  # inches: of the figure, of the panels' height, of a line of text


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw held-out losses, gold and the proxy's prediction on the way, gold at equal KL, kept policies, samples."""
    data = results["data"]
    shown = [(name, data["samples"][name][0]) for name in SHOWN if name in data["samples"]]
    below = LINE * (len(shown) + 3)
    figure = Figure(figsize=(WIDTH, PANELS + below), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[PANELS, below])
    style.headline(upper, _title(results))
    axes = upper.subplots(3, 2)
    _draw_dpo(axes[0, 0], data)
    _draw_ratios(axes[0, 1], data)
    offline = [name for name in data["methods"] if name in OFFLINE]
    online = [name for name in data["methods"] if name not in OFFLINE]
    _draw_paths(axes[1, 0], data, offline, "(c) preference losses: gold and proxy on the way")
    _draw_paths(axes[1, 1], data, online, "(d) policy gradients: gold and proxy on the way")
    axes[1, 1].sharey(axes[1, 0])
    _draw_levels(axes[2, 0], data)
    _draw_kept(axes[2, 1], data)
    _draw_samples(lower, shown, below)
    return figure


def _title(results: dict[str, Any]) -> str:
    """Return the part of the claim that is tested and holds; without a verdict, the subject."""
    tests = [number for number in results["numbers"] if number.get("kind") == "test"]
    raises, by_less = (number["value"] <= number["interval"][1] for number in tests)
    if results["holds"] is None or not raises:
        return "Alignment to a proxy reward, judged by an independent gold reward"
    less = ", by less than the proxy's gain predicts" if by_less else ""
    return f"Optimising a proxy raises an independent gold reward, on average over methods{less}"


def _draw_dpo(axes: Axes, data: dict[str, Any]) -> None:
    """Draw DPO's loss, that of the reference, and that of the proxy itself."""
    axes.set(title="(a) DPO: loss on held-out pairs", xlabel="updates", ylabel="expected loss (nats a pair)")
    if "dpo" not in data["methods"]:
        return
    _draw_losses(axes, data, "dpo")
    for value, text in ((np.log(2), "log 2"), (data["label_entropy"], "entropy of the labels (the proxy itself)")):
        axes.axhline(value, color=style.MUTED, linewidth=1, linestyle=":")
        axes.annotate(text, (0.99, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", fontsize=7.5, color=style.MUTED)  # fmt: skip
    _mark_end(axes, data)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.45 * (high - low), high)
    title = (
        f"lines: {data['seeds']} seeds; triangles: parameters kept\nother panels: means over these seeds, bars: 95% "
        "interval"
    )
    axes.legend(loc="lower left", title=title, alignment="left", title_fontsize=7.5)


def _draw_ratios(axes: Axes, data: dict[str, Any]) -> None:
    """Draw the other preference losses, relative to their start."""
    axes.set(title="(b) the others: held-out loss / at the start", xlabel="updates", ylabel="ratio")
    names = [name for name in data["methods"] if name in OFFLINE and name != "dpo"]
    for name in names:
        _draw_losses(axes, data, name, relative=True)
    if names:
        axes.axhline(1, color=style.MUTED, linewidth=1, linestyle=":")
        _mark_end(axes, data)
        axes.legend()
    else:
        axes.text(0.5, 0.5, "not run at this preset", transform=axes.transAxes, ha="center", color=style.MUTED)


def _draw_losses(axes: Axes, data: dict[str, Any], name: str, *, relative: bool = False) -> None:
    """Draw a line for each seed, with a mark where its parameters were kept."""
    method = data["methods"][name]
    for seed, (losses, kept) in enumerate(zip(method["held_out"], method["kept"], strict=True)):
        values = np.asarray(losses) / (losses[0] if relative else 1)
        at = data["stretch"] * np.arange(len(values))
        axes.plot(at, values, color=COLOURS[name], linewidth=1, label=None if seed else LABELS[name])
        axes.plot(at[kept], values[kept], marker="v", color=COLOURS[name], markersize=6, linestyle="")


def _mark_end(axes: Axes, data: dict[str, Any]) -> None:
    axes.axvline(data["updates"], color=style.MUTED, linewidth=1, linestyle="--", label="end of the equal updates")


def _draw_paths(axes: Axes, data: dict[str, Any], names: list[str], title: str) -> None:
    """Draw the gain of gold on the way, and the gain that the proxy's predicts."""
    axes.set(title=title, xlabel=r"√KL(π‖π$_\mathrm{ref}$) (√nats)", ylabel="gain in gold reward (log-odds)")
    for name in names:
        method = data["methods"][name]
        root = np.sqrt(np.maximum([0.0, *method["kl"]["mean"]], 0))
        for which, line in (("gold", "-"), ("predicted", "--")):
            mean, half = ([0.0, *method[which][part]] for part in ("mean", "half_width"))
            label = f"{LABELS[name]}, learning rate {data['rates'][name]['rate']:g}" if which == "gold" else None
            axes.plot(root, mean, line, color=COLOURS[name], label=label, linewidth=1.4)
            if which == "gold":
                axes.errorbar(root, mean, half, color=COLOURS[name], linestyle="", elinewidth=0.8)
    rows = data["best_of_n"]
    root = np.sqrt([row["kl_bound"] for row in rows])
    for which, scale, line in (("gold", 1, "-"), ("proxy", data["slope"], "--")):
        mean = scale * (np.asarray([row[which]["mean"] for row in rows]) - rows[0][which]["mean"])
        label = f"best of n ≤ {rows[-1]['n']}, at its bound of KL" if which == "gold" else None
        axes.plot(root, mean, line, color=style.MUTED, label=label, linewidth=1.4)
    axes.plot([], [], "--", color=style.INK, label="dashed: predicted by the proxy's gain")
    axes.legend()


def _draw_levels(axes: Axes, data: dict[str, Any]) -> None:
    """Draw gold where each method's path reaches a KL; below, list methods that miss it at some seed."""
    axes.set(title="(e) gold at equal KL, interpolated (colours: f)", ylabel="gain in gold reward (log-odds)",
             xlabel=r"KL(π‖π$_\mathrm{ref}$) (nats)")  # fmt: skip
    names, levels = list(data["methods"]), sorted({row["kl"] for row in data["levels"]})
    ticks = [f"{level:g}" for level in levels]
    for row in data["levels"]:
        place = levels.index(row["kl"])
        if "gold" in row:
            at = place + 0.1 * (names.index(row["method"]) - (len(names) - 1) / 2)
            axes.errorbar(at, row["gold"]["mean"], row["gold"]["half_width"], color=COLOURS[row["method"]], marker="o")
    for place, level in enumerate(levels):
        short = [row for row in data["levels"] if row["kl"] == level and "gold" not in row]
        if short:
            told = ", ".join(f"{LABELS[row['method']]} {row['reached']}/{data['seeds']}" for row in short)
            ticks[place] += "\n" + textwrap.fill(f"seeds that reach it: {told}", 26)
    axes.axhline(0, color=style.MUTED, linewidth=1, linestyle=":")
    axes.set_xticks(range(len(levels)), ticks)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.grid(visible=False, axis="x")


def _draw_kept(axes: Axes, data: dict[str, Any]) -> None:
    """Draw the kept policies: gold, and the proxy's prediction."""
    axes.set(title="(f) the policies that are kept", xlabel="gain in gold reward (log-odds)")
    names = list(data["methods"])
    for place, name in enumerate(names):
        method = data["methods"][name]
        for which, offset, face in (("kept_gold", 0.13, COLOURS[name]), ("kept_predicted", -0.13, "white")):
            axes.errorbar(method[which]["mean"], place + offset, xerr=method[which]["half_width"], color=COLOURS[name],
                          marker="o", markerfacecolor=face, elinewidth=1)  # fmt: skip
    axes.axvline(0, color=style.MUTED, linewidth=1, linestyle=":")
    kl = [data["methods"][name]["kept_kl"]["mean"] for name in names]
    axes.set_yticks(
        range(len(names)), [f"{LABELS[name]}\n{value:.1f} nats" for name, value in zip(names, kl, strict=True)]
    )
    axes.set_ylim(len(names) - 0.4, -1.1)
    axes.plot([], [], "o", color=style.INK, label="gold")
    axes.plot([], [], "o", color=style.INK, markerfacecolor="white", label="predicted by the proxy's gain")
    axes.legend(loc="upper center", ncols=2)
    axes.grid(visible=False, axis="y")


def _draw_samples(figure: Any, shown: list[tuple[str, dict[str, Any]]], height: float) -> None:
    """Write one review each, after the same prompt (grey)."""
    y = 1 - LINE / height
    figure.text(0.01, y, "After the same prompt (grey), the first draw of the first seed; before it proxy and gold "
                "reward (log-odds)", weight="bold", fontsize=9)  # fmt: skip
    for name, row in shown:
        y -= 1.2 * LINE / height
        figure.text(0.01, y, LABELS[name], color=COLOURS[name], weight="bold", fontsize=8)
        figure.text(0.135, y, signed(row["proxy"]), fontsize=8, ha="right")
        figure.text(0.185, y, signed(row["gold"]), fontsize=8, ha="right")
        place = 0.2
        text = at_words(row["prompt"] + row["answer"], size=8, width=(1 - place - 0.01) * WIDTH * 72)
        figure.text(place, y, text, fontsize=8, **LITERAL)
        figure.text(place, y, text[: len(row["prompt"])], fontsize=8, color=style.MUTED, **LITERAL)


def at_words(text: str, *, size: float, width: float) -> str:
    """Return the part of a text that fits, cut after a word."""
    text = " ".join(text.split())
    cut = sentence(text, size=size, width=width)
    return cut if cut == text or " " not in cut else cut[:-1].rsplit(" ", 1)[0] + " …"
