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
    """Draw Gaussians, their heavy tail, exact sequences, and a language model."""
    data, numbers = results["data"], {entry["name"]: entry for entry in results["numbers"]}
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    finding = "Between Gaussians, k2 has less variance than k1 only below KL = 0.618 nats, and k3 only below 0.628"
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    (gaussians, tail), (sequences, model) = figure.subplots(2, 2, width_ratios=(1.15, 1))
    _draw_gaussians(gaussians, data["gaussians"], numbers)
    _draw_tail(tail, data["gaussians"])
    _draw_sequences(sequences, data["tabular"])
    _draw_model(model, data["model"])
    return figure


def _power(count: int) -> str:
    """Write a number of draws as a · 10ᵇ."""
    digits, exponent = f"{count:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}·{power}"


def _draw_gaussians(axes: Axes, gaussians: dict[str, Any], numbers: dict[str, Any]) -> None:
    table, draws = gaussians["table"], _power(gaussians["draws"])
    divergence = np.logspace(np.log10(0.004), np.log10(3), 300)
    square = 2 * divergence
    variances = {"k1": square, "k2": square**2 / 2 + square**3 / 4, "k3": np.expm1(square) - square}
    for name, variance in variances.items():
        axes.plot(divergence, np.sqrt(variance) / divergence, color=COLOURS[name])
        values, errors = (
            np.asarray([row[field][f"{name} sd/KL"] for row in table]) for field in ("sampled", "standard error")
        )
        bars = np.minimum(1.96 * errors, [0.9 * values, np.full_like(values, np.inf)])  # to be drawn on a log axis
        places = [row["shift"] ** 2 / 2 for row in table]
        axes.errorbar(places, values, bars, fmt="o", color=COLOURS[name], markersize=3.5, capsize=2, elinewidth=1)
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
        f"bars: 95%\nk3 at μ = {last['shift']:g}:\ns.e. {last['standard error']['k3 sd/KL']:.1f}",
        (last["shift"] ** 2 / 2, last["sampled"]["k3 sd/KL"]),
        xytext=(1.0, 0.87),
        textcoords="axes fraction",
        ha="right",
        fontsize=7,
        color=COLOURS["k3"],
        arrowprops={"arrowstyle": "-", "color": style.FAINT, "linewidth": 0.7},
    )
    axes.set(xscale="log", yscale="log", xlabel="KL(policy‖reference) = μ²/2 (nats)", ylabel="sd of one sample / KL")
    axes.set_ylim(0.8, 26)
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_title(f"(a) N(0, 1) against N(μ, 1): exact, and {draws} draws")


def _draw_tail(axes: Axes, gaussians: dict[str, Any]) -> None:
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
    note = f"of blocks of {_power(gaussians['block'])} draws, {gaussians['blocks below']:.0%}\n"
    note += "show less than the true Var(k3) at μ = 2"
    axes.text(0.97, 0.24, note, transform=axes.transAxes, ha="right", fontsize=SMALL)
    axes.set(xscale="log", yscale="log", xlabel="draws so far", ylabel="sd of k3 in these draws (nats)")
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
        xscale="log",
        yscale="log",
        xlabel="KL(policy‖reference) of sequences (nats)",
        ylabel="sd or |bias| (nats; of k2: nats²)",
    )
    axes.set(xlim=(max(divergence[0], 0.01), divergence[-1]), ylim=(2e-3, 6e2))
    note = "Rao-Blackwell varies least here, not on every distribution"
    if np.ptp(np.sign(tabular["bias"]["k2, sequence"])) > 0:
        note += ";\n|bias| of k2 dips where the bias changes its sign"
    axes.legend(
        loc="upper left", ncols=2, fontsize=7, columnspacing=1.2, handlelength=1.8, title=note, title_fontsize=7,
        alignment="left",
    )  # fmt: skip
    axes.set_title("(c) 81 sequences of 4 tokens, enumerated: exact sd and bias")


def _draw_model(axes: Axes, model: dict[str, Any]) -> None:
    ticks, labels, widest = [], [], 0.05
    for group, reference in enumerate(model["references"]):
        estimates = reference["estimates"]
        centre = estimates["Rao-Blackwell"]["mean"]
        for index, name in enumerate(COLOURS):
            place, entry = -(5.6 * group + index), estimates[name]
            relative, error = entry["mean"] / centre, (entry["high"] - entry["mean"]) / centre
            widest = max(widest, abs(relative - 1) + error)
            axes.errorbar(relative, place, xerr=error, fmt="o", color=COLOURS[name], capsize=2.5)
            written = f"{entry['mean']:.4f} ± {error * centre:.4f}"
            axes.text(1.01, place, written, fontsize=7, va="center", transform=axes.get_yaxis_transform())
            ticks.append(place)
            labels.append(name + (" (biased)" if name == "k2" else ""))
        axes.text(
            0.01,
            0.75 - 5.6 * group,
            f"reference: {reference['reference']}",
            transform=axes.get_yaxis_transform(),
            fontsize=SMALL,
            weight="bold",
        ).set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.axvline(1, color=style.MUTED, linewidth=0.8, linestyle="--", zorder=0.5)
    axes.set_yticks(ticks, labels)
    axes.set(ylim=(-9.4, 1.5), xlim=(1 - 1.1 * widest, 1 + 1.1 * widest))
    axes.set_xlabel("estimate / Rao-Blackwell; at the right: nats per token")
    axes.grid(axis="y", visible=False)
    axes.set_title(f"(d) {model['name']}: {model['rows']} samples of {model['tokens']} tokens, ± 95%")
