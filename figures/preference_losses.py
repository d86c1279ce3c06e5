"""Preference losses and their slopes against the margin, and the plane of the two log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.plots import style

LABELS = {
    "dpo": "DPO",
    "cdpo": "cDPO",
    "robust_dpo": "robust DPO",
    "exo": "EXO",
    "ipo": "β² IPO",
    "hinge": "hinge",
    "discopop": "DiscoPOP (switches at 0)",
    "nca": "NCA",
    "bco": "BCO",
    "sppo": "β² SPPO",
    "apo_zero": "APO-zero = KTO",
    "apo_down": "APO-down",
    "f_dpo": "f-DPO (Jensen-Shannon)",
    "simpo": "SimPO",
    "orpo": "ORPO ≈ CPO",
}
GROUPS = {
    "(a) logistic": ("dpo", "cdpo", "robust_dpo", "exo"),
    "(b) other functions of Δ": ("ipo", "hinge", "discopop", "dpo"),
    "(c) of both, on a = −b": ("nca", "bco", "sppo", "apo_zero", "apo_down", "f_dpo"),
    "(d) no reference": ("simpo", "orpo"),
}
UNITS = ("nats", "nats; hinge, β² IPO: 1", "nats; SPPO, APO: 1", "nats")
SCALED = ("ipo", "sppo")  # squares of nats, drawn times β²
DASHES = ("-", "--", (0, (5, 1.5)), "-.", (0, (1, 1.2)), (0, (4, 1, 1, 1)))
PLANE = {"dpo": "(e) DPO, one pair", "simpo": "(f) SimPO", "orpo": "(g) ORPO"}
RUNS = {"shared": ("shared\nlogits", style.ACCENT, (-5, 4)), "own": ("own\nlogits", style.PALETTE[0], (3, 3))}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw losses, under them their slopes, then the planes with two runs of DPO, and how runs on random pairs end."""
    data = results["data"]
    changes = {name: np.asarray(values) for name, values in data["changes"].items()}
    figure = Figure(figsize=(9.6, 8.6), layout="constrained")
    fell = {name: 100 * (values < 0).mean() for name, values in changes.items()}
    style.headline(
        figure,
        f"With the same margins DPO lowers the chosen response of {fell['shared']:.0f} % of random pairs "
        f"(shared logits) or {fell['own']:.0f} % (own)",
    )
    panels = figure.subplots(3, 4, height_ratios=(0.9, 0.9, 1.15))
    for column, (title, names) in enumerate(GROUPS.items()):
        _draw_group(panels[:2, column], data, names)
        panels[0, column].set_title(title)
        panels[0, column].set_ylabel(f"loss ({UNITS[column]})")
    panels[1, 0].set_ylabel("slope (per unit of βΔ)")
    for axes, (name, title) in zip(panels[2], PLANE.items(), strict=False):
        image = _draw_plane(axes, data["plane"][name], data["run"] if name == "dpo" else None, data["reference"])
        axes.set_title(title)
    panels[2, 0].set_ylabel("log π of the rejected (nats)")
    figure.colorbar(
        image,
        ax=panels[2, :3],
        label="|gradient| over the largest, (e) to (g)",
        location="bottom",
        aspect=60,
        shrink=0.7,
    )
    _draw_changes(panels[2, 3], changes)
    return figure


def _draw_group(panels: Any, data: dict[str, Any], names: tuple[str, ...]) -> None:
    x = np.asarray(data["curves"]["x"])
    for place, name in enumerate(names):
        curve = data["curves"][name]
        scale = data["beta"] ** 2 if name in SCALED else 1.0
        grey = name == "dpo" and place > 0
        look = {
            "color": style.EDGE if grey else style.PALETTE[place],
            "linestyle": "-" if grey else DASHES[place],
            "linewidth": 3.0 if grey else 1.6,
            "zorder": 1 if grey else 2,
        }
        panels[0].plot(x, scale * np.asarray(curve["loss"]), label=LABELS[name], **look)
        panels[1].plot(x, scale * np.asarray(curve["slope"]), **look)
    for axes in panels:
        axes.axvline(0, color=style.EDGE, linewidth=0.7, linestyle=":")
        axes.set_xlim(x[0], x[-1])
    without_reference = "simpo" in names
    panels[0].set_ylim(-0.3, 7.2)
    panels[1].axhline(0, color=style.EDGE, linewidth=0.7)
    panels[1].set_xlabel("β × (log π chosen − rejected)" if without_reference else "margin βΔ")
    panels[1].set_ylim(-1.6, 1.0)
    panels[1].legend(
        *panels[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(-0.05, -0.2), labelspacing=0.25
    )


def _draw_changes(axes: Axes, changes: dict[str, np.ndarray]) -> None:
    """Draw how far the chosen response has moved on each random pair."""
    axes.plot(changes["own"], changes["shared"], "o", color=style.PALETTE[0], markersize=2.5, alpha=0.6)
    axes.axhline(0, color=style.INK, linewidth=0.8)
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set(xlabel="change with own logits (nats)", ylabel="change with shared logits (nats)")
    axes.set_title(f"(h) chosen, {len(changes['own'])} pairs")


def _draw_plane(axes: Axes, plane: dict[str, Any], run: dict[str, Any] | None, reference: list[float]) -> Any:
    axis = np.asarray(plane["axis"])
    chosen, rejected = np.asarray(plane["chosen"]), np.asarray(plane["rejected"])
    size = np.hypot(chosen, rejected)
    direction = [np.where(size > 0, part / np.where(size > 0, size, 1), 0) for part in (chosen, rejected)]
    image = axes.quiver(
        axis, axis, *direction, size / size.max(), cmap="viridis_r", scale=17, width=0.008, pivot="mid", clim=(0, 1)
    )
    axes.plot(axis[[0, -1]], axis[[0, -1]], color=style.EDGE, linewidth=0.7, linestyle=":")
    low, high = axis[0] - 0.6, 0.3
    axes.set(xlabel="log π of the chosen (nats)", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.grid(visible=False)
    if run is not None:
        for name, (label, colour, place) in RUNS.items():
            path = np.asarray(run[name]["chosen"]), np.asarray(run[name]["rejected"])
            inside = path[1] > low
            axes.plot(path[0], path[1], color=colour, linewidth=2.4)
            last = np.flatnonzero(inside)[-1]
            axes.annotate(
                label,
                (path[0][last], path[1][last]),
                xytext=place,
                textcoords="offset points",
                ha="right" if name == "shared" else "left",
                color=colour,
                fontsize=7.5,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9},
            )
        axes.plot(*reference, "o", color=style.INK, zorder=5)
    return image
