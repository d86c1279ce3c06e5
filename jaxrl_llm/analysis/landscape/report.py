"""A surface as plain data: what results files keep and figures draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float


def describe(
    alphas: Float[np.ndarray, "A"],
    betas: Float[np.ndarray, "B"],
    losses: Float[np.ndarray, "A B"],
    *,
    title: str,
    centre: float,
    cosine: float,
    sharpness: float | None = None,
    unit: str = "nats per token",
) -> dict[str, Any]:
    """Grid, losses (None where they are not finite), and the numbers that go with them.

    Args:
        centre: the loss at the origin, which an even grid does not hold.
        cosine: of the two directions.
        sharpness: the largest eigenvalue of the Hessian at the centre.
        unit: of the loss.

    Raises:
        ValueError: if the shapes do not match, or no loss is finite.
    """
    losses = np.asarray(losses)
    if losses.shape != (len(alphas), len(betas)):
        raise ValueError(f"losses must be [{len(alphas)}, {len(betas)}], but are {list(losses.shape)}.")
    finite = np.isfinite(losses)
    if not finite.any():
        raise ValueError(f"none of the {losses.size} losses is finite.")
    surface = {
        "title": title,
        "unit": unit,
        "alphas": [float(alpha) for alpha in alphas],
        "betas": [float(beta) for beta in betas],
        "loss": [[float(loss) if np.isfinite(loss) else None for loss in row] for row in losses],
        "centre": float(centre),
        "minimum": float(losses[finite].min()),
        "maximum": float(losses[finite].max()),
        "holes": int((~finite).sum()),
        "cosine": float(cosine),
        "centre_on_grid": bool(np.any(np.asarray(alphas) == 0) and np.any(np.asarray(betas) == 0)),
    }
    return surface if sharpness is None else surface | {"sharpness": float(sharpness)}
