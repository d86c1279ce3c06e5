"""Every preference loss and its slope against the margin, and the plane of the two log-probabilities."""

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
    "discopop": "DiscoPOP",
    "nca": "NCA",
    "bco": "BCO",
    "sppo": "β² SPPO",
    "apo_zero": "APO-zero",
    "apo_down": "APO-down",
    "kto": "KTO",
    "simpo": "SimPO",
    "orpo": "ORPO",
    "cpo": "CPO",
}
GROUPS = {
    "(a) logistic": ("dpo", "cdpo", "robust_dpo", "exo"),
    "(b) other functions of Δ": ("ipo", "hinge", "discopop", "dpo"),
    "(c) of both, on a = −b": ("nca", "bco", "sppo", "apo_zero", "apo_down", "kto"),
    "(d) no reference": ("simpo", "orpo", "cpo"),
}
DASHES = ("-", "--", (0, (5, 1.5)), "-.", (0, (1, 1.2)), (0, (4, 1, 1, 1)))
PLANE = {"dpo": "(e) DPO", "ipo": "(f) IPO", "simpo": "(g) SimPO", "orpo": "(h) ORPO"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Losses, under them their slopes, under them the planes with two runs of DPO."""
    data = results["data"]
    run = data["run"]
    moved = {name: run[name]["chosen"][-1] - run[name]["chosen"][0] for name in ("free", "shared")}
    figure = Figure(figsize=(9.6, 8.2), layout="constrained")
    figure.suptitle(
        f"The same DPO margin moves the chosen response by {moved['free']:+.1f} nats (own logits) "
        f"or −{abs(moved['shared']):.1f} (shared)",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    panels = figure.subplots(3, 4, height_ratios=(1, 0.9, 1.15))
    for column, (title, names) in enumerate(GROUPS.items()):
        _draw_group(panels[:2, column], data, names)
        panels[0, column].set_title(title)
    panels[0, 0].set_ylabel("loss (nats)")
    panels[1, 0].set_ylabel("slope (per unit of βΔ)")
    for axes, (name, title) in zip(panels[2], PLANE.items(), strict=True):
        image = _draw_plane(axes, data["plane"][name], run if name == "dpo" else None, data["reference"])
        axes.set_title(title)
    panels[2, 0].set_ylabel("log π of the rejected (nats)")
    figure.colorbar(image, ax=panels[2, 3], label="|gradient| / largest", aspect=25)
    return figure


def _draw_group(panels: Any, data: dict[str, Any], names: tuple[str, ...]) -> None:
    x = np.asarray(data["curves"]["x"])
    for place, name in enumerate(names):
        curve = data["curves"][name]
        scale = data["beta"] ** 2 if name in ("ipo", "sppo") else 1.0
        grey = name == "dpo" and place > 0
        look = {
            "color": style.FAINT if grey else style.PALETTE[place],
            "linestyle": "-" if grey else DASHES[place],
            "zorder": 1 if grey else 2,
        }
        loss = scale * np.asarray(curve["loss"])
        panels[0].plot(x, np.where(loss < 9, loss, np.nan), label=LABELS[name], **look)
        panels[1].plot(x, scale * np.asarray(curve["slope"]), **look)
    for axes in panels:
        axes.axvline(0, color=style.EDGE, linewidth=0.7, linestyle=":")
        axes.set_xlim(x[0], x[-1])
    without_reference = "simpo" in names
    panels[0].set_ylim(-0.3, 13 if len(names) > 4 else 12)
    panels[1].axhline(0, color=style.EDGE, linewidth=0.7)
    panels[1].set_xlabel("β(log $\\pi_w$ − log $\\pi_l$)" if without_reference else "margin βΔ")
    panels[1].set_ylim(-2.2, 1.2)
    panels[0].legend(loc="upper left", ncols=2, handlelength=2, labelspacing=0.25, columnspacing=0.8, borderpad=0)


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
        for name, label, colour, place in (
            ("shared", "shared\nlogits", style.ACCENT, (-5, 4)),
            ("free", "own\nlogits", style.PALETTE[0], (3, 3)),
        ):
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
