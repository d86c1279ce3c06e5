"""What the landscape experiments share: a loss of a text, its surface as data, and the two checks of a surface."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ledger
from jaxrl_llm import models, text
from jaxrl_llm.analysis import landscape
from jaxrl_llm.analysis.landscape.losses import LossFn
from jaxrl_llm.language_model import Params

EXERCISE = "I have a dream"
LONGER = (  # Lincoln 1863
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure."
)
SPACING = {32: 0.02, 64: 0.002}  # of second differences: above it truncation grows, below it rounding


@dataclasses.dataclass(frozen=True)
class Place:
    """A loss, the parameters around which it is looked at, and the loss there, computed on its own."""

    loss: LossFn
    params: Params
    centre: float

    @classmethod
    def of(cls, loss: LossFn, params: Params) -> Place:
        """With the loss computed."""
        return cls(loss, params, float(jax.jit(loss)(params)))


def of_text(loaded: models.Loaded, words: str, params: Params | None = None) -> Place:
    """The next-token loss of a text."""
    tokens = jnp.asarray([text.encode(loaded.tokenizer, words)])
    return Place.of(landscape.next_token_loss(loaded.model, tokens), loaded.params if params is None else params)


def surface_of(
    place: Place, directions: tuple[Params, Params], *, points: int, title: str, radius: float = 1.0, **facts: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """The surface over [−radius, radius]², as data and as it was computed."""
    axis = landscape.axis(radius, points)
    losses = landscape.loss_surface(place.loss, place.params, directions, axis, axis)
    cosine = float(landscape.cosine(*directions))
    return landscape.describe(axis, axis, losses, title=title, centre=place.centre, cosine=cosine, **facts), losses


def centre_number(name: str, place: Place, losses: np.ndarray) -> dict[str, Any]:
    """The middle of the grid is the loss, bit for bit."""
    middle = tuple(length // 2 for length in losses.shape)
    return ledger.number(
        f"centre of the surface minus the loss on its own, {name}",
        float(losses[middle]) - place.centre,
        expected=0.0,
        tolerance=0.0,
        unit="nats per token",
        source="the same parameters, bit for bit",
    )


def cosine_number(name: str, surface: dict[str, Any]) -> dict[str, Any]:
    """The two directions are orthogonal over all parameters together."""
    return ledger.number(
        f"cosine of the two directions, {name}",
        surface["cosine"],
        interval=(-1e-6, 1e-6),
        unit="",
        source="orthogonal by construction, in float32",
    )


def curvature_number(name: str, place: Place, direction: Params, *, bits: int) -> dict[str, Any]:
    """Second differences of the section through the centre against dᵀHd by a Hessian-vector product."""
    axis = landscape.axis(4 * SPACING[bits], 9)
    section = landscape.loss_section(place.loss, place.params, direction, axis)
    exact = landscape.curvature(place.loss, place.params, direction)
    return ledger.number(
        f"second difference over dᵀHd, minus 1, {name}, float{bits}",
        landscape.second_difference(section, SPACING[bits]) / exact - 1,
        expected=0.0,
        tolerance={32: 1e-3, 64: 1e-8}[bits],
        unit="",
        source="Hessian-vector product, forward over reverse",
    )


def section_of(place: Place, direction: Params, *, radius: float, points: int, label: str) -> dict[str, Any]:
    """The loss along a direction, and the parabola that slope and curvature at the centre predict."""
    axis = landscape.axis(radius, points)
    losses = landscape.loss_section(place.loss, place.params, direction, axis)
    slope = landscape.slope(place.loss, place.params, direction)
    curvature = landscape.curvature(place.loss, place.params, direction)
    return {
        "label": label,
        "alphas": axis,
        "loss": [float(loss) if np.isfinite(loss) else None for loss in losses],
        "quadratic": place.centre + slope * axis + curvature * axis**2 / 2,
        "curvature": curvature,
    }
