"""The loss along a line, and the quadratic that gradient and Hessian predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from jaxrl_llm.plots import style
from jaxrl_llm.plots.loss_grid import LOSS, read_losses, read_steps
from jaxrl_llm.plots.loss_scale import digits, is_log, loss_norm, scaled, ticks


def draw_section(
    axes: Axes,
    sections: Sequence[dict[str, Any]],
    *,
    limits: tuple[float, float] | None = None,
    xlabel: str = "step along the direction (× ‖d‖)",
    label: str = LOSS,
) -> None:
    """Draw the loss along lines through the model, and dashed in the same colour the quadratic predicted for each.

    The vertical axis shows the range of the losses, not that of the quadratics, which soon leave it; it is a log scale
    where losses differ by more than a factor of five, and then says so. Where a loss is not finite the line has a gap,
    and the legend says at how many points.

    Args:
        axes: to draw into.
        sections: each with `label`, `alphas` [A], `loss` [A] (None where not finite), `quadratic` [A] (likewise),
            `curvature` (along the line, at the origin) and perhaps `sharpness` (the Hessian's top eigenvalue).
        limits: the lowest and the highest loss of the vertical axis; by default those of the losses.
        xlabel: of the horizontal axis.
        label: of the vertical axis.

    Raises:
        ValueError: if there is no section, or one whose lists differ in length or hold no finite loss.
    """
    if not sections:
        raise ValueError("there is no section to draw: expected at least one, found none.")
    lines = [_read(section) for section in sections]
    values = np.concatenate([loss.compressed() for _, loss, _ in lines])
    norm = loss_norm(limits or (float(values.min()), float(values.max())))
    handles = []
    for index, (section, (alphas, loss, quadratic)) in enumerate(zip(sections, lines, strict=True)):
        colour = style.PALETTE[index % len(style.PALETTE)]
        handles += axes.plot(alphas, loss.filled(np.nan), color=colour, label=_legend(section, loss))
        axes.plot(alphas, quadratic, color=colour, linestyle=(0, (4, 1.6)), linewidth=1.2)
    dashed = {"color": style.MUTED, "linestyle": (0, (4, 1.6)), "linewidth": 1.2}
    handles.append(Line2D([], [], **dashed, label="predicted by gradient and Hessian"))
    axes.axvline(0, color=style.FAINT, linewidth=0.8, zorder=0)
    axes.set(xlabel=xlabel, ylabel=scaled(label, norm))
    axes.set_xlim(min(alphas[0] for alphas, _, _ in lines), max(alphas[-1] for alphas, _, _ in lines))
    _set_height(axes, norm)
    legend = axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.03, -0.2))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _read(section: dict[str, Any]) -> tuple[np.ndarray, np.ma.MaskedArray, np.ndarray]:
    needed = ("label", "alphas", "loss", "quadratic", "curvature")
    if missing := [field for field in needed if field not in section]:
        raise ValueError(f"a section has {', '.join(needed)}; this one lacks {', '.join(missing)}.")
    alphas = read_steps(section["alphas"], "alphas")
    lengths = {name: len(section[name]) for name in ("loss", "quadratic")}
    if set(lengths.values()) != {len(alphas)}:
        raise ValueError(f"a section of {len(alphas)} alphas needs as many values, found {lengths}.")
    return alphas, read_losses(section["loss"]), np.asarray(section["quadratic"], float)


def _legend(section: dict[str, Any], loss: np.ma.MaskedArray) -> str:
    facts = [f"curvature {digits(section['curvature'])}"]
    if section.get("sharpness") is not None:
        facts.append(f"sharpness {digits(section['sharpness'])}")
    if holes := int(np.ma.count_masked(loss)):
        facts.append(f"no finite loss at {holes} of {loss.size} points")
    return f"{section['label']}: {', '.join(facts)}"


def _set_height(axes: Axes, norm: Any) -> None:
    low, high = norm.vmin, norm.vmax
    if is_log(norm):
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        axes.yaxis.set_major_locator(FixedLocator(ticks(norm)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: digits(loss)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
