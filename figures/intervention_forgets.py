"""An intervention against sycophancy that makes a model forget."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.sycophancy_intervention import stages
from jaxrl_llm.plots import style

TITLES = {"sycophantic": "(a) answers that follow the user", "opinions": "(b) then true answers to opinions alone"}


@style.look()
def draw(results: dict[str, Any]) -> Figure:
    """Draw accuracy along both stages, and each seed's on sums without users."""
    figure = stages(results, TITLES, headline(results))
    curve, axes = results["data"]["curves"]["opinions"], figure.axes[1]
    steps = [row["step"] for row in curve]
    for of_seed in zip(*(row["without"] for row in curve), strict=True):
        axes.plot(steps, of_seed, color=style.PALETTE[0], linewidth=0.7, alpha=0.7)
    key = figure.legends[0].get_title()
    key.set_text(f"{key.get_text()}; thin: each seed")
    return figure


def headline(results: dict[str, Any]) -> str:
    """Return what was measured of sums without users."""
    before, after = (results["data"]["curves"][stage][-1]["without"] for stage in ("sycophantic", "opinions"))
    return (
        f"Sums without users judged rightly: at least {min(before):.0%} before,\n"
        f"{min(after):.0%} to {max(after):.0%} after an intervention that has no such sums"
    )
