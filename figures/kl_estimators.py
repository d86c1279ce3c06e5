"""Value, bias and variance of k1, k2, k3 and Rao-Blackwell."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

COLOURS = {"k1": style.PALETTE[0], "k2": style.PALETTE[1], "k3": style.PALETTE[2], "Rao-Blackwell": style.PALETTE[3]}
SMALL = 7.5


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Gaussians, their heavy tail, exact sequences, and a language model."""
    data, numbers = results["data"], {entry["name"]: entry for entry in results["numbers"]}
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    figure.suptitle(
        "Between Gaussians, k2 has less variance than k1 only below KL = 0.618 nats, and k3 only below 0.628",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10.5,
    )
    (gaussians, tail), (sequences, model) = figure.subplots(2, 2, width_ratios=(1.15, 1))
    _draw_gaussians(gaussians, data["gaussians"]["table"], numbers)
    _draw_tail(tail, data["gaussians"], numbers)
    _draw_sequences(sequences, data["tabular"])
    _draw_model(model, data["model"])
    return figure


def _draw_gaussians(axes: Axes, table: list[dict[str, Any]], numbers: dict[str, Any]) -> None:
    divergence = np.logspace(np.log10(0.004), np.log10(3), 300)
    square = 2 * divergence
    variances = {"k1": square, "k2": square**2 / 2 + square**3 / 4, "k3": np.expm1(square) - square}
    for name, variance in variances.items():
        axes.plot(divergence, np.sqrt(variance) / divergence, color=COLOURS[name])
        values, errors = ([row[field][f"{name} sd/KL"] for row in table] for field in ("sampled", "standard error"))
        places = [row["shift"] ** 2 / 2 for row in table]
        axes.errorbar(places, values, errors, fmt="o", color=COLOURS[name], markersize=3.5, capsize=2, elinewidth=1)
    for name, place in (("k1", (0.03, 9.6)), ("k2", (0.012, 1.17)), ("k3", (0.98, 2.95))):
        axes.text(*place, name, color=COLOURS[name], weight="bold")
    crossing = [numbers[f"{name} has less variance than k1 up to KL ="]["value"] for name in ("k2", "k3")]
    for value in crossing:
        axes.axvline(value, color=style.INK, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"crossings: k2 {crossing[0]:.3f}, k3 {crossing[1]:.3f}",
        (crossing[0], 14),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        fontsize=SMALL,
    )
    last = table[-1]
    axes.annotate(
        f"k3 at μ = {last['shift']:g}:\ns.e. {last['standard error']['k3 sd/KL']:.1f} after\n10⁷ draws",
        (last["shift"] ** 2 / 2, last["sampled"]["k3 sd/KL"] + last["standard error"]["k3 sd/KL"]),
        xytext=(18, 16),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color=COLOURS["k3"],
    )
    axes.set(xscale="log", yscale="log", xlabel="KL(policy‖reference) = μ²/2 (nats)", ylabel="sd of one sample / KL")
    axes.set_ylim(0.8, 26)
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_title("(a) N(0, 1) against N(μ, 1): lines exact, points 10⁷ draws")


def _draw_tail(axes: Axes, gaussians: dict[str, Any], numbers: dict[str, Any]) -> None:
    running = gaussians["running"]
    labels = {
        "wide": ("N(0, 3): the true sd is infinite", style.ACCENT, 1.55),
        "2": ("N(2, 1)", style.PALETTE[0], 0.76),
    }
    labels["1"] = ("N(1, 1)", style.PALETTE[2], 1.12)
    exact = {f"{row['shift']:g}": row["closed form"]["k3 sd/KL"] * row["shift"] ** 2 / 2 for row in gaussians["table"]}
    for name, (label, colour, lift) in labels.items():
        axes.plot(running["samples"], running["sd"][name], color=colour)
        height = running["sd"][name][0] if name != "wide" else running["sd"][name][0] * 0.82
        axes.text(running["samples"][0] * 1.15, height * lift, label, color=colour, fontsize=SMALL, weight="bold")
        if name in exact:
            axes.axhline(exact[name], color=colour, linestyle="--", linewidth=1)
            middle = running["samples"][len(running["samples"]) // 2]
            axes.text(middle, exact[name] * 1.06, f"true: {exact[name]:.2f}", color=colour, fontsize=SMALL)
    name = next(name for name in numbers if "under-read" in name)
    note = f"of blocks of 10⁴ draws, {numbers[name]['value']:.0%}\nunder-read Var(k3) at μ = 2"
    axes.text(0.97, 0.24, note, transform=axes.transAxes, ha="right", fontsize=SMALL)
    axes.set(xscale="log", yscale="log", xlabel="draws so far", ylabel="sd of k3 that they show (nats)")
    axes.set_ylim(0.6, 18)
    axes.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    axes.set_title("(b) heavy ratios: the spread of k3 does not settle")


def _draw_sequences(axes: Axes, tabular: dict[str, Any]) -> None:
    names = {
        "k1, sequence": ("k1", "-", "k1"),
        "k2, sequence": ("k2", "-", "k2"),
        "k3, sequence": ("k3", "-", "k3"),
        "k2, tokens": ("k2", "--", "k2, Σ tokens"),
        "k3, tokens": ("k3", "--", "k3, Σ tokens"),
        "Rao-Blackwell": ("Rao-Blackwell", "-", "Rao-Blackwell"),
    }
    divergence = np.asarray(tabular["kl"])
    for name, (colour, line, label) in names.items():
        axes.plot(divergence, np.asarray(tabular["sd"][name]), line, color=COLOURS[colour], label=label)
    for name, line in (("k2, sequence", "-"), ("k2, tokens", "--")):
        axes.plot(divergence, np.abs(tabular["bias"][name]), line, color=style.EDGE, linewidth=1.1,
                  label=f"|bias| of k2{', Σ tokens' if 'tokens' in name else ''}")  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="KL(policy‖reference) of sequences (nats)", ylabel="sd or |bias| (nats)"
    )
    axes.set(xlim=(divergence[0], divergence[-1]), ylim=(2e-3, 2e2))
    axes.legend(loc="upper left", ncols=2, fontsize=7, columnspacing=1.2, handlelength=1.8)
    note = "k2's bias changes sign;\nRao-Blackwell: least here,\nnot on every law"
    axes.text(0.98, 0.03, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, color=style.MUTED)
    axes.set_title("(c) 81 sequences of 4 tokens, enumerated: exact sd and bias")


def _draw_model(axes: Axes, model: dict[str, Any]) -> None:
    ticks, labels = [], []
    for group, reference in enumerate(model["references"]):
        estimates = reference["estimates"]
        centre = estimates["Rao-Blackwell"]["mean"]
        for index, name in enumerate(COLOURS):
            place, entry = -(5.6 * group + index), estimates[name]
            relative, error = entry["mean"] / centre, entry["error"] / centre
            axes.errorbar(relative, place, xerr=error, fmt="o", color=COLOURS[name], capsize=2.5)
            axes.text(1.125, place, f"{entry['mean']:.4f} ± {entry['error']:.4f}", fontsize=7, va="center")
            ticks.append(place)
            labels.append(name + (" (biased)" if name == "k2" else ""))
        heading = axes.text(
            0.838, 0.62 - 5.6 * group, f"reference: {reference['reference']}", fontsize=SMALL, weight="bold"
        )
        heading.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.axvline(1, color=style.MUTED, linewidth=0.8, linestyle="--", zorder=0.5)
    axes.set_yticks(ticks, labels)
    axes.set(
        xlim=(0.83, 1.24), ylim=(-9.4, 1.3), xlabel="estimate / Rao-Blackwell (written out: nats per token ± s.e.)"
    )
    axes.set_xticks([0.9, 1.0, 1.1])
    axes.grid(axis="y", visible=False)
    axes.set_title(f"(d) {model['name']}: {model['rows']} samples of {model['tokens']} tokens")
