"""Interactive 3-D pages of loss surfaces, each one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from jaxrl_llm.plots import style
from jaxrl_llm.plots.landscape import (
    FIRST,
    SECOND,
    LossGrid,
    digits,
    fields_of,
    is_log,
    loss_limits,
    loss_norm,
    read_grid,
    ticks,
)

COLOURS = "Viridis"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MENU: dict[str, Any] = {"xanchor": "left", "y": 1.0, "yanchor": "bottom", "showactive": True, "bgcolor": "white"}
HOVER = "direction 1 %{x:.4g}<br>direction 2 %{y:.4g}<br>loss %{z:.5g}<extra></extra>"


def surface_html(surfaces: Sequence[Any], *, title: str) -> str:
    """Return a page of loss surfaces that can be rotated; it shows the loss under the pointer.

    A menu selects the surface. Two buttons select a linear or a log scale for height and colour; the page opens with
    the scale that `draw_surface` would use. Without buttons the losses are not all positive. Holes are left open, and
    the origin is marked with its loss. The page is self-contained (about 5 MB), and equal arguments give equal bytes.

    Args:
        surfaces: as in `jaxrl_llm.plots.landscape`.
        title: of the page.

    Raises:
        ValueError: without surfaces, or for one that cannot be drawn.
        ModuleNotFoundError: without plotly, which is an optional dependency.
    """
    if not surfaces:
        raise ValueError("there must be at least one surface to draw, but there is none.")
    grids = [read_grid(surface) for surface in surfaces]
    plotly = require_plotly()
    starts_log = [is_log(loss_norm(loss_limits([surface]))) for surface in surfaces]
    has_log = all(min(grid.loss.min(), grid.centre) > 0 for grid in grids)
    log = has_log and any(starts_log)
    traces = [trace for index, grid in enumerate(grids) for trace in _traces(grid, log=log, visible=index == 0)]
    names = [str(fields_of(surface).get("title", f"surface {index + 1}")) for index, surface in enumerate(surfaces)]
    menus = [_surface_menu(names)] if len(grids) > 1 else []
    menus += [_scale_menu(grids, log=log)] if has_log else []
    figure = {"data": traces, "layout": _layout(grids, menus, log=log)}
    body = plotly.io.to_html(
        figure,
        include_plotlyjs=True,
        full_html=False,
        div_id="landscape",  # else a random one
        config={"displaylogo": False, "responsive": True},
        validate=False,  # it would add plotly's template
    )
    return _page(title, _note(surfaces), body)


def require_plotly() -> Any:
    """Import plotly, which is an optional dependency.

    Raises:
        ModuleNotFoundError: naming the extra that installs it.
    """
    try:
        import plotly.io
    except ModuleNotFoundError as error:
        message = "interactive 3-D plots need plotly: pip install 'jaxrl_llm[interactive]' installs it."
        raise ModuleNotFoundError(message, name="plotly") from error
    return plotly


def _note(surfaces: Sequence[Any]) -> str:
    name = f"{fields_of(surfaces[0]).get('title', '')}. " if len(surfaces) == 1 else ""
    return (
        f"{name}Drag to rotate, scroll to zoom, point at the surface to read its loss; at holes the loss is not finite."
    )


def _traces(grid: LossGrid, *, log: bool, visible: bool) -> list[dict[str, Any]]:
    """Return the traces of the surface and of its origin."""
    surface = {"type": "surface", "x": grid.alphas.tolist(), "y": grid.betas.tolist(), "z": _rows(grid.loss)}
    surface |= {"surfacecolor": _colour_values(grid, log=log), "colorbar": _bar(grid, log=log), "colorscale": COLOURS}
    surface |= {"contours": {"x": _mesh(grid.alphas), "y": _mesh(grid.betas)}, "connectgaps": False}
    surface |= {"lighting": {"ambient": 0.8, "diffuse": 0.4, "specular": 0.05}, "hovertemplate": HOVER}
    label, top = f"{digits(grid.centre)} at the origin", max(float(grid.loss.max()), grid.centre)
    origin = {"type": "scatter3d", "x": [0, 0], "y": [0, 0], "z": [grid.centre, top], "mode": "lines+markers+text"}
    origin |= {"text": ["", label], "textposition": "top center", "textfont": {"color": style.ACCENT, "size": 13}}
    origin |= {"marker": {"size": [7, 0], "color": style.PALETTE[1], "line": {"width": 0}}, "showlegend": False}
    origin |= {"line": {"width": 4, "color": style.PALETTE[1]}, "hovertemplate": f"{label}<extra></extra>"}
    return [surface | {"visible": visible}, origin | {"visible": visible}]


def _rows(losses: np.ma.MaskedArray) -> list[list[float | None]]:
    """Return rows along beta, as plotly expects, with None at holes."""
    return np.where(np.ma.getmaskarray(losses), None, losses.data.astype(object)).T.tolist()


def _mesh(steps: np.ndarray) -> dict[str, Any]:
    """Return at most forty thin lines over the surface, through points of an even grid."""
    between = int(np.ceil((len(steps) - 1) / 40))
    size = float(np.ptp(steps)) / (len(steps) - 1) * between
    lines = {"start": float(steps[0]), "end": float(steps[-1]), "size": size, "width": 1}
    return lines | {"show": True, "color": "rgba(255,255,255,0.5)", "highlight": False}


def _colour_values(grid: LossGrid, *, log: bool) -> list[list[float | None]]:
    return _rows(np.ma.log10(grid.loss) if log else grid.loss)


def _bar(grid: LossGrid, *, log: bool) -> dict[str, Any]:
    """Return a colour bar with losses at its ticks, also on a log scale."""
    bar = {"title": {"text": grid.label, "side": "right"}, "thickness": 16, "len": 0.7, "outlinewidth": 0}
    if not log:
        return bar | {"tickmode": "auto"}
    low, high = float(grid.loss.min()), float(grid.loss.max())
    values = ticks(loss_norm((low, high)))
    return bar | {"tickmode": "array", "tickvals": np.log10(values).tolist(), "ticktext": [digits(v) for v in values]}


def _surface_menu(names: Sequence[str]) -> dict[str, Any]:
    def button(index: int) -> dict[str, Any]:
        visible = [which == index for which in range(len(names)) for _ in range(2)]  # each with its origin
        return {"label": escape(names[index]), "method": "restyle", "args": [{"visible": visible}]}

    return _MENU | {"type": "dropdown", "x": 0.0, "buttons": [button(index) for index in range(len(names))]}


def _scale_menu(grids: Sequence[LossGrid], *, log: bool) -> dict[str, Any]:
    surfaces = list(range(0, 2 * len(grids), 2))

    def button(name: str, *, log: bool) -> dict[str, Any]:
        colours = {"surfacecolor": [_colour_values(grid, log=log) for grid in grids]}
        colours |= {"colorbar": [_bar(grid, log=log) for grid in grids]}
        axis = {f"scene.zaxis.{key}": value for key, value in _height(grids, log=log).items()}
        return {"label": name, "method": "update", "args": [colours, axis, surfaces]}

    buttons = [button("linear loss", log=False), button("log loss", log=True)]
    return _MENU | {"type": "buttons", "direction": "right", "x": 0.0, "y": 0.0, "buttons": buttons, "active": int(log)}


def _height(grids: Sequence[LossGrid], *, log: bool) -> dict[str, Any]:
    """Return the vertical axis, with our ticks on a log scale: plotly would label each tenth of a decade."""
    if not log:
        return {"type": "linear", "tickmode": "auto"}
    limits = min(float(grid.loss.min()) for grid in grids), max(float(grid.loss.max()) for grid in grids)
    values = ticks(loss_norm(limits))
    return {"type": "log", "tickmode": "array", "tickvals": values.tolist(), "ticktext": [digits(v) for v in values]}


def _layout(grids: Sequence[LossGrid], menus: list[dict[str, Any]], *, log: bool) -> dict[str, Any]:
    axis = {"gridcolor": "#dfe3e7", "zeroline": False, "backgroundcolor": "#f6f7f8", "showbackground": True}
    scene = {"xaxis": axis | {"title": {"text": FIRST}}, "yaxis": axis | {"title": {"text": SECOND}}}
    scene |= {"aspectmode": "manual", "aspectratio": {"x": 1, "y": 1, "z": 0.75}}
    scene |= {"camera": {"eye": {"x": -1.0, "y": -1.6, "z": 1.1}, "center": {"x": 0, "y": 0, "z": -0.12}}}
    layout = {"margin": {"l": 0, "r": 0, "t": 40 if len(grids) > 1 else 0, "b": 24}, "updatemenus": menus}
    layout |= {"font": {"family": FONT, "size": 13, "color": style.INK}, "uirevision": "kept"}
    scene |= {"zaxis": axis | {"title": {"text": grids[0].label}} | _height(grids, log=log)}
    return layout | {"scene": scene, "paper_bgcolor": "white"}


def _page(title: str, note: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
html, body {{ height: 100%; margin: 0; background: white; color: {style.INK}; font: 15px/1.4 {FONT}; }}
body {{ display: flex; flex-direction: column; box-sizing: border-box; padding: 1rem 1.25rem; }}
h1 {{ font-size: 1.3rem; margin: 0 0 .2rem; }}
p {{ margin: 0 0 .6rem; color: {style.MUTED}; font-size: .85rem; }}
body > div {{ flex: 1; min-height: 20rem; }}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(note)}</p>
{body}
</body>
</html>
"""
