"""Shared by the landscape experiments: the loss of a text, its surface as data, and the checks of a surface."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ledger
from jaxrl_llm import models, text
from jaxrl_llm.analysis import landscape
from jaxrl_llm.analysis.landscape.surface import LossFn
from jaxrl_llm.language_model import Params

EXERCISE = "I have a dream"
LONGER = (  # Lincoln 1863
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure."
)
SPACING = 0.02  # of second differences in float32: above it truncation grows, below it rounding


@dataclasses.dataclass(frozen=True)
class Place:
    """A loss, the parameters at the centre of its plots, and the loss there, computed on its own."""

    loss: LossFn
    params: Params
    centre: float

    @classmethod
    def of(cls, loss: LossFn, params: Params) -> Place:
        """Return the place with its loss computed."""
        return cls(loss, params, float(jax.jit(loss)(params)))


def of_text(loaded: models.Loaded, words: str, params: Params | None = None) -> Place:
    """Return the place of the next-token loss of a text, by default around the loaded parameters."""
    tokens = jnp.asarray([text.encode(loaded.tokenizer, words)])
    return Place.of(landscape.next_token_loss(loaded.model, tokens), loaded.params if params is None else params)


def surface_of(
    place: Place, directions: tuple[Params, Params], *, points: int, title: str, radius: float = 1.0, **facts: Any
) -> dict[str, Any]:
    """Return the surface over [−radius, radius]² as data."""
    axis = landscape.axis(radius, points)
    return landscape.surface_of(place.loss, place.params, directions, axis, axis, title=title, **facts).as_dict()


def identities(surfaces: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the identities of every surface: its centre is the loss, bit for bit; its directions are orthogonal."""
    surfaces = list(surfaces)
    apart = [_centre(each) - each["centre"] for each in surfaces if each["centre_on_grid"]]
    return [
        ledger.identity(
            "largest |centre of a surface − the loss on its own|",
            max(map(abs, apart)),
            tolerance=0.0,
            unit=surfaces[0]["unit"],
            source="the same parameters, bit for bit",
        ),
        ledger.identity(
            "largest |cosine| of the two directions of a surface",
            max(abs(each["cosine"]) for each in surfaces),
            tolerance=1e-6,
            unit="",
            source="orthogonal over all parameters by construction, in float32",
        ),
    ]


def _centre(surface: dict[str, Any]) -> float:
    return surface["loss"][surface["alphas"].index(0)][surface["betas"].index(0)]


def curvature_test(section: dict[str, Any]) -> dict[str, Any]:
    """Compare the second difference of a section at its middle with dᵀHd by a Hessian-vector product."""
    alphas = section["alphas"]
    return ledger.identity(
        "second difference of the surface over dᵀHd, minus 1",
        landscape.second_difference(section["loss"], alphas[1] - alphas[0]) / section["curvature"] - 1,
        expected=0.0,
        tolerance=1e-3,  # of the second difference's truncation
        unit="",
        source="Hessian-vector product, forward over reverse, in float32, along the first direction",
    )


def section_of(place: Place, direction: Params, *, radius: float, points: int, label: str) -> dict[str, Any]:
    """Return the loss along a direction, and the parabola that slope and curvature at the centre predict."""
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
