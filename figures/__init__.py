"""Figures: one file each, drawing `results/<name>.json` and nothing else. Nothing here imports jax.

A module whose name begins with no underscore is a figure; it has `draw(results) -> matplotlib.figure.Figure`, and the
first line of its docstring is its title in the gallery. It may also have `interactive(results) -> str`, an HTML page
that is written beside the picture where plotly is installed.
"""
