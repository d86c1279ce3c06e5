"""The terms of the RLHF objective: β and γ taken away, exactly and on a small GPT-2."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrl_llm.plots import style

GRID_COLOURS = ("#b3541e", "#d9903d", "#8fa7b5", "#5d8fb8", "#2f6ca3", "#0b3c6f")  # β from 0, the lack of it, upwards


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw exact optima on 81 sequences; below, three arms of a small GPT-2."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    finding = (
        "Without β the policy ends on one sequence; without γ the pretraining loss mostly rises,\n"
        "and a large γ undoes that"
    )
    style.headline(figure, finding if results["holds"] else __doc__.splitlines()[0].rstrip("."))
    panels = figure.subplots(2, 3)
    _draw_collapse(panels[0, 0], data)
    _draw_forgetting(panels[0, 1], data)
    _draw_frontier(panels[0, 2], data["frontier"])
    neural = data["neural"]
    _draw_arms(panels[1, 0], neural, "reward", f"tokens with the letter {neural['letter']} (share)")
    panels[1, 0].set_title(f"(d) {neural['model']}, {neural['answers']} answers per update")
    _draw_arms(panels[1, 1], neural, "kl", "KL from the first model (nats per answer)")
    panels[1, 1].set_title("(e) KL, Rao-Blackwell over tokens")
    _draw_arms(panels[1, 2], neural, "pretraining_loss", "rise of the loss on held-out text\n(nats per token)")
    panels[1, 2].set_title("(f) pretraining loss")
    note = "text: the first model's own,\nso its loss is least at the start"
    panels[1, 2].text(0.03, 0.97, note, transform=panels[1, 2].transAxes, va="top", fontsize=7, color=style.MUTED)
    trainings = len(neural["arms"][0]["reward"])
    panels[1, 0].legend(loc="upper left", title=f"thick: mean of {trainings} trainings, thin: each", title_fontsize=7)
    panels[1, 0].margins(y=0.35)
    return figure


def _draw_collapse(axes: Axes, data: dict[str, Any]) -> None:
    betas = np.asarray(data["betas"])
    place = np.arange(len(betas))
    best, entropy = (np.asarray(data[name]) for name in ("best", "entropy"))
    axes.plot(place, best, "o-", color=style.ACCENT, label="probability of the best sequence")
    axes.plot(place, entropy / np.log(81), "s--", color=style.PALETTE[0], label="entropy / log 81")
    axes.legend(loc="upper center")
    axes.set_xticks(place, [f"{beta:g}" for beta in betas])
    axes.set(xlabel="β (units of the reward per nat; γ = 0)", ylabel="probability, or share", ylim=(-0.03, 1.3))
    axes.set_title("(a) exact optima of one problem")


def _draw_forgetting(axes: Axes, data: dict[str, Any]) -> None:
    gammas = np.asarray(data["gammas"])
    place, beyond = np.where(gammas > 0, gammas, 0.012), []
    for beta, row, colour in zip(data["betas"], data["rise"], GRID_COLOURS, strict=True):
        axes.plot(place[1:], row[1:], "o-", color=colour, label=f"β = {beta:g}", markersize=3)
        if row[0] is not None and row[0] < 5:
            axes.plot(place[0], row[0], "o", color=colour, markersize=4)
        else:
            beyond.append(f"β = {beta:g}: {'+∞' if row[0] is None else f'+{row[0]:.0f}'}")
    axes.text(0.008, 7.7, "above, at γ = 0:\n" + "\n".join(beyond), va="top", fontsize=7, color=style.MUTED)
    axes.axhline(0, color=style.INK, linewidth=0.9)
    low, middle, high = data["no_rise_from"]
    axes.axvspan(low, high, color=style.FAINT, alpha=0.45, linewidth=0, zorder=0)
    axes.axvline(middle, color=style.MUTED, linewidth=0.9, linestyle=":")
    note = f"no rise at any β from γ = {middle:.1f}:\nmedian of {data['problems']} problems; band: 95% of them"
    axes.text(0.03, 0.01, note, transform=axes.transAxes, va="bottom", fontsize=7, color=style.MUTED)
    axes.set(xscale="log", xlabel="γ (units of the reward per nat)", ylabel="rise of the pretraining loss (nats)")
    axes.set(xlim=(0.006, 14), ylim=(-2.0, 8.0))
    axes.set_xticks([0.012, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    axes.minorticks_off()
    axes.set_title("(b) forgetting, on the same problem")
    axes.legend(loc="upper center", bbox_to_anchor=(0.54, 1), labelspacing=0.25)


def _draw_frontier(axes: Axes, frontier: dict[str, Any]) -> None:
    gibbs, best, bound = frontier["gibbs"], frontier["best"], frontier["bound"]
    axes.plot(gibbs["kl"], gibbs["reward"], color=style.PALETTE[0])
    for kl, most, reward in zip(best["kl"], bound, best["reward"], strict=True):
        if most > kl + 0.05:  # nearer than this the two markers are one
            axes.plot([kl, most], [reward, reward], color=style.EDGE, linewidth=0.8, zorder=1)
            axes.plot(most, reward, "o", markerfacecolor="white", color=style.MUTED, markersize=4)
    axes.plot(best["kl"], best["reward"], "o", color=style.ACCENT, markersize=4, zorder=3)
    axes.text(0.97, 0.42, "Gibbs optima", color=style.PALETTE[0], transform=axes.transAxes, ha="right")
    draws = f"best of n = {frontier['draws'][0]} … {frontier['draws'][-1]}, exact"
    axes.text(0.97, 0.34, draws, color=style.ACCENT, transform=axes.transAxes, ha="right")
    note = "○ the bound log n − (n − 1)/n on its KL,\ndrawn where it is more than 0.05 above"
    axes.text(0.97, 0.18, note, color=style.MUTED, transform=axes.transAxes, ha="right", fontsize=7.5)
    note = f"n = {frontier['draws'][-1]}: {best['kl'][-1]:.2f} of at most {bound[-1]:.2f} nats"
    axes.text(0.97, 0.08, note, transform=axes.transAxes, ha="right", fontsize=7.5)
    axes.set(xlabel="KL from the SFT model (nats)", ylabel="expected reward (its own units)", ylim=(0, None))
    axes.set_title("(c) reward against KL, exact")


def _draw_arms(axes: Axes, neural: dict[str, Any], field: str, label: str) -> None:
    colours = (style.ACCENT, style.PALETTE[0], style.PALETTE[2])
    for arm, colour in zip(neural["arms"], colours, strict=True):
        curves = np.asarray(arm[field])
        if field == "pretraining_loss":  # each training has text of its own
            curves = curves - curves[:, :1]
        axes.plot(curves.T, color=colour, linewidth=0.6, alpha=0.45)
        axes.plot(curves.mean(axis=0), color=colour, label=f"β = {arm['beta']:g}, γ = {arm['gamma']:g}", linewidth=2)
    axes.set(xlabel="updates", ylabel=label, xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
