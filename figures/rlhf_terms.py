"""What each term of the RLHF objective is for: β and γ taken away, exactly and on a small GPT-2."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

GRID_COLOURS = ("#b3541e", "#d9903d", "#8fa7b5", "#5d8fb8", "#2f6ca3", "#0b3c6f")  # β from 0, the lack of it, upwards


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Above: exact optima on 81 sequences. Below: three arms of a small GPT-2."""
    data = results["data"]
    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    figure.suptitle(
        "Without β the policy collapses, without γ it forgets; a γ that is too small only holds it back",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    panels = figure.subplots(2, 3)
    _draw_collapse(panels[0, 0], data)
    _draw_forgetting(panels[0, 1], data)
    _draw_frontier(panels[0, 2], data["frontier"])
    neural = data["neural"]
    _draw_arms(panels[1, 0], neural, "reward", f"tokens with the letter {neural['letter']} (share)")
    panels[1, 0].set_title(f"(d) {neural['model']}: reward, one seed")
    _draw_arms(panels[1, 1], neural, "kl", "KL from the first model (nats per answer)")
    panels[1, 1].set_title("(e) KL, estimated by k1")
    _draw_arms(panels[1, 2], neural, "pretraining_loss", "loss on held-out text (nats per token)")
    panels[1, 2].set_title("(f) pretraining loss")
    panels[1, 2].annotate(
        "text: the first model's own,\nso its loss is least there",
        (0.03, 0.88),
        xycoords="axes fraction",
        fontsize=7,
        color=style.MUTED,
    )
    panels[1, 0].legend(loc="upper left")
    return figure


def _draw_collapse(axes: Axes, data: dict[str, Any]) -> None:
    column = data["gammas"].index(0.0)
    betas = np.asarray(data["betas"])
    place = np.arange(len(betas))
    best, entropy = (np.asarray(data["grid"][name])[:, column] for name in ("best", "entropy"))
    axes.plot(place, best, "o-", color=style.ACCENT)
    axes.annotate(
        "probability of\nthe best sequence",
        (1, best[1]),
        xytext=(10, 4),
        textcoords="offset points",
        color=style.ACCENT,
        va="center",
    )
    axes.plot(place, entropy / np.log(81), "s--", color=style.PALETTE[0])
    axes.annotate(
        "entropy / log 81",
        (place[-1], entropy[-1] / np.log(81)),
        xytext=(4, -52),
        textcoords="offset points",
        ha="right",
        va="top",
        color=style.PALETTE[0],
    )
    axes.set_xticks(place, [f"{beta:g}" for beta in betas])
    axes.set(xlabel="β (γ = 0)", ylabel="probability, or share", ylim=(-0.03, 1.08))
    axes.set_title("(a) exact optima: β = 0 collapses")


def _draw_forgetting(axes: Axes, data: dict[str, Any]) -> None:
    gammas = np.asarray(data["gammas"])
    place, beyond = np.where(gammas > 0, gammas, 0.012), []
    for beta, row, colour in zip(data["betas"], data["grid"]["pretraining_loss"], GRID_COLOURS, strict=True):
        rise = np.asarray(row) - data["start"]
        axes.plot(place[1:], rise[1:], "o-", color=colour, label=f"β = {beta:g}", markersize=3)
        if rise[0] < 5:
            axes.plot(place[0], rise[0], "o", color=colour, markersize=4)
        else:
            beyond.append(f"β = {beta:g}: +{rise[0]:.0f}")
    axes.annotate("above, at γ = 0:\n" + "\n".join(beyond), (0.008, 5.1), va="top", fontsize=7, color=style.MUTED)
    axes.axhline(0, color=style.INK, linewidth=0.9)
    axes.set(xscale="log", xlabel="γ", ylabel="rise of the pretraining loss (nats)", ylim=(-0.7, 5.2), xlim=(0.006, 14))
    axes.set_xticks([0.012, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    axes.minorticks_off()
    axes.set_title("(b) a rise at γ = 0, none at γ ≥ 2")
    axes.legend(loc="upper right", ncols=1, labelspacing=0.25)


def _draw_frontier(axes: Axes, frontier: dict[str, Any]) -> None:
    gibbs, best = frontier["gibbs"], frontier["best_of_n"]
    axes.plot(gibbs["kl"], gibbs["reward"], color=style.PALETTE[0])
    axes.annotate("Gibbs optima", (0.2, 2.15), color=style.PALETTE[0])
    axes.plot(best["kl"], best["reward"], "o", color=style.ACCENT, markersize=4)
    axes.plot(best["bound"], best["reward"], "o", markerfacecolor="white", color=style.MUTED, markersize=4)
    for kl, bound, reward in zip(best["kl"], best["bound"], best["reward"], strict=True):
        axes.plot([kl, bound], [reward, reward], color=style.EDGE, linewidth=0.8, zorder=1)
    axes.annotate("best of n = 1 … 1024,\nexact", (2.1, 1.35), color=style.ACCENT)
    axes.annotate("at the bound\nlog n − (n − 1)/n", (3.4, 0.72), color=style.MUTED)
    last = best["kl"][-1], best["bound"][-1]
    axes.annotate(
        f"n = 1024: {last[0]:.2f} against {last[1]:.2f}",
        (last[1], best["reward"][-1]),
        xytext=(6.1, 1.85),
        ha="right",
        fontsize=7,
        arrowprops={"arrowstyle": "-", "color": style.EDGE, "linewidth": 0.7},
    )
    axes.set(xlabel="KL from the SFT model (nats)", ylabel="expected reward", ylim=(0, None))
    axes.set_title("(c) reward against KL, exact")


def _draw_arms(axes: Axes, neural: dict[str, Any], field: str, label: str) -> None:
    colours = (style.ACCENT, style.PALETTE[0], style.PALETTE[2])
    for arm, colour in zip(neural["arms"], colours, strict=True):
        name = f"β = {arm['beta']:g}, γ = {arm['gamma']:g}"
        axes.plot(arm[field], color=colour, label=name)
    axes.set(xlabel="updates", ylabel=label, xlim=(0, None))
    axes.set_xticks(range(0, len(arm[field]), 5))
