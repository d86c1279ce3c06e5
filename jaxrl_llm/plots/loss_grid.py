"""A loss surface as drawn: its grid checked, its holes masked, its lowest point found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

LOSS = "loss (nats per token)"


@dataclasses.dataclass(frozen=True)
class LossGrid:
    """Losses over the plane of two directions.

    Args:
        alphas: [A] the steps along the first direction, ascending; drawn along x.
        betas: [B] the steps along the second direction, ascending; drawn along y.
        loss: [A, B] masked where the loss is not finite.
        centre: the loss at the origin, whether or not that is a point of the grid.
        label: of an axis of losses, with their unit.
    """

    alphas: np.ndarray
    betas: np.ndarray
    loss: np.ma.MaskedArray
    centre: float
    label: str = LOSS

    @property
    def holes(self) -> int:
        """Return the number of points of the grid without a finite loss."""
        return int(np.ma.count_masked(self.loss))

    @property
    def minimum(self) -> tuple[float, float, float]:
        """Alpha, beta and loss of the lowest point of the grid."""
        row, column = np.unravel_index(np.ma.argmin(self.loss), self.loss.shape)
        return float(self.alphas[row]), float(self.betas[column]), float(self.loss[row, column])

    @property
    def has_origin(self) -> bool:
        """Return True if the origin is a point of the grid; of an even grid it is not."""
        return all(np.isclose(steps, 0, atol=1e-9 * np.ptp(steps)).any() for steps in (self.alphas, self.betas))


def read_grid(surface: dict[str, Any]) -> LossGrid:
    """The grid of a surface: `alphas` [A], `betas` [B], `loss` [A][B] (None where not finite) and `centre`.

    Raises:
        ValueError: if a field is missing, the grid has fewer than two steps along a direction or they do not ascend,
            the losses are not A x B, none of them is finite, or the loss at the origin is not.
    """
    if missing := [field for field in ("alphas", "betas", "loss", "centre") if field not in surface]:
        raise ValueError(f"a loss surface has alphas, betas, loss and centre; this one lacks {', '.join(missing)}.")
    alphas, betas = (read_steps(surface[name], name) for name in ("alphas", "betas"))
    rows = surface["loss"]
    widths = sorted({len(row) for row in rows})
    if len(rows) != len(alphas) or widths != [len(betas)]:
        found = f"{len(rows)} x {' or '.join(map(str, widths)) or 0}"
        raise ValueError(f"loss must be {len(alphas)} x {len(betas)} (alphas x betas), found {found}.")
    loss = read_losses([value for row in rows for value in row]).reshape(len(alphas), len(betas))
    (centre,) = np.asarray([surface["centre"]], float)
    if not np.isfinite(centre):
        raise ValueError(f"the loss at the origin must be a finite number, found {surface['centre']}.")
    label = f"loss ({surface['unit']})" if "unit" in surface else LOSS
    return LossGrid(alphas, betas, loss, float(centre), label)


def read_steps(values: Sequence[float], name: str, *, least: int = 2) -> np.ndarray:
    """Steps along a direction: at least two, ascending; a single row is a section, not a surface."""
    steps = np.asarray(values, float)
    if steps.ndim != 1 or len(steps) < least:
        hint = "; one row of a grid is drawn as a section" if steps.size == 1 else ""
        raise ValueError(f"{name} must be at least {least} numbers, found {steps.size}{hint}.")
    if not (np.isfinite(steps).all() and (np.diff(steps) > 0).all()):
        raise ValueError(f"{name} must be finite and ascending, found {', '.join(f'{step:g}' for step in steps)}.")
    return steps


def read_losses(values: Sequence[float | None]) -> np.ma.MaskedArray:
    """Losses, masked where they are None or not finite; at least one is."""
    losses = np.ma.masked_invalid(np.asarray(values, float))
    if not losses.count():
        raise ValueError(f"none of the {losses.size} losses is finite: there is nothing to draw.")
    return losses
