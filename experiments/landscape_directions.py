"""One loss, one point, the same axes, and three planes: by tensor, by filter, and along the Hessian's top eigenvectors.

    python -m experiments.landscape_directions --preset quick

The text is the longer one of `loss_landscape`. All directions are as long as the parameters, over all of them
together (the filter-wise ones nearly so, as they leave biases and norms where they are).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from experiments import landscapes, ledger
from experiments.frame import experiment
from experiments.landscapes import Place
from jaxrl_llm import models
from jaxrl_llm.analysis import landscape
from jaxrl_llm.language_model import Params

NAMES = {"parameter": "by tensor", "filter": "by filter", "hessian": "top Hessian eigenvectors"}
RANDOM = ("parameter", "filter")
RISE = 0.5  # nats: a section ends where its parabola has risen by this much
STEP = 0.1  # of a direction's length: where planes are compared
OFF = 0.1  # nats between loss and parabola: from there on the parabola does not hold


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, a text, the grid, and the Lanczos iterations."""

    model: str = "tiny-gpt2"
    text: str = landscapes.LONGER
    points: int = 9
    """Along each direction, odd."""
    iterations: int = 20
    """The most Lanczos iterations."""
    tolerance: float = 1e-2
    """Largest residual of the eigenpairs at which Lanczos stops, relative to the largest eigenvalue."""
    seed: int = 0
    """Random seed of the directions and of the first Lanczos vector."""


@experiment(quick=Config(), full=Config(points=25, iterations=96, tolerance=1e-4), seeds=3)
def run(config: Config) -> dict[str, Any]:
    """Compute three surfaces, three sections, the Hessian's largest eigenvalues, and the checks."""
    loaded = models.load(config.model)
    place = landscapes.of_text(loaded, config.text)
    keys = dict(zip(("directions", "lanczos"), jax.random.split(jax.random.key(config.seed)), strict=True))
    top = landscape.top_eigenpairs(
        place.loss,
        place.params,
        keys["lanczos"],
        max_iterations=config.iterations,
        tolerance=config.tolerance,
        progress=True,
    )
    sharpness = float(top.values[0])
    planes = planes_of(place.params, keys["directions"], top)
    surfaces, sections = {}, {}
    for name, directions in planes.items():
        surfaces[name] = landscapes.surface_of(place, directions, points=config.points, title=NAMES[name])
        sections[name] = section(config, place, directions[0], name, sharpness)
    flatter = {name: min(sharpness / abs(per_length(place, each)) for each in planes[name]) for name in RANDOM}
    out = steps(config, place, planes)
    return {
        "claim": "The directions decide how a landscape looks. A tenth of their length away from the same model, the "
        f"loss is at least {out['hessian']:.2f} times the model's along the Hessian's top eigenvectors, "
        f"and at most {out['random']:.2f} times along random directions of the same length."
        + ("" if top.converged.all() else f" The eigenvectors did not converge: residual {max(top.residuals):.2g}."),
        "numbers": [
            *spectrum_numbers(top),
            *flatness(place, planes["hessian"][0], sharpness, flatter),
            *step_numbers(out),
            *validity(sections),
            *landscapes.identities(surfaces.values()),
        ],
        "data": {
            "model": config.model,
            "surfaces": surfaces,
            "sections": sections,
            "sharpness": sharpness,
            "flatter": min(flatter.values()),
        },
    }


def planes_of(params: Params, key: jax.Array, top: landscape.Eigenpairs) -> dict[str, tuple[Params, Params]]:
    """Return the directions of each plane."""
    random = {scale: landscape.random_directions(params, key, scale=scale) for scale in RANDOM}
    length = landscape.norm(params)
    return random | {"hessian": tuple(landscape.rescaled(vector, length) for vector in top.vectors)}


def section(config: Config, place: Place, direction: Params, name: str, sharpness: float) -> dict[str, Any]:
    """Return the section along a plane's first direction, as far as its parabola rises by `RISE`."""
    curvature = landscape.curvature(place.loss, place.params, direction)
    radius = min(1.0, math.sqrt(2 * RISE / abs(curvature)))
    drawn = landscapes.section_of(place, direction, radius=radius, points=4 * config.points + 1, label=NAMES[name])
    return drawn | {"sharpness": sharpness, "per_length": per_length(place, direction)}


def per_length(place: Place, direction: Params) -> float:
    """Return the curvature per squared length."""
    return landscape.curvature(place.loss, place.params, direction) / float(landscape.inner(direction, direction))


def spectrum_numbers(top: landscape.Eigenpairs) -> list[dict[str, Any]]:
    """Return the largest eigenvalue, and how well it has converged."""
    source = f"Lanczos, {top.iterations} iterations"
    return [
        ledger.measurement(
            "largest eigenvalue of the Hessian (sharpness)",
            float(top.values[0]),
            unit="nats per token and squared length",
            source=source,
        ),
        ledger.measurement(
            "largest residual ‖Hv − λv‖ of the two largest, over λ₁",
            float(max(top.residuals) / top.values[0]),
            unit="",
            source=source,
        ),
    ]


def flatness(place: Place, eigenvector: Params, sharpness: float, flatter: dict[str, float]) -> list[dict[str, Any]]:
    """Compare the curvature along the eigenvector with its eigenvalue, and with those along random directions."""
    return [
        ledger.identity(
            "dᵀHd over λ₁ ‖d‖², along the top eigenvector",
            per_length(place, eigenvector) / sharpness,
            expected=1.0,
            tolerance=1e-3,  # of Lanczos's iterations in float32
            unit="",
            source="Rayleigh quotient by a Hessian-vector product",
        ),
        *(
            ledger.measurement(
                f"sharpness over curvature per squared length, random directions {NAMES[name]}",
                value,
                unit="times",
                source="the smaller of the plane's two directions",
            )
            for name, value in flatter.items()
        ),
    ]


def steps(config: Config, place: Place, planes: dict[str, Any]) -> dict[str, float]:
    """Return losses `STEP` away over that of the model: the lowest on eigenvectors, the highest on random ones."""

    def over_centre(name: str) -> list[float]:
        axis = landscape.axis(STEP, config.points)  # as many as the grid has, for which it is compiled already
        ends = [landscape.loss_section(place.loss, place.params, each, axis)[[0, -1]] for each in planes[name]]
        return (np.concatenate(ends) / place.centre).tolist()

    return {
        "hessian": min(over_centre("hessian")),
        "random": max(value for name in RANDOM for value in over_centre(name)),
    }


def step_numbers(out: dict[str, float]) -> list[dict[str, Any]]:
    """Test that the loss rises more along the eigenvectors than along any random direction."""
    about = {"unit": "times", "source": f"both sides of the model along each direction, {STEP:g} of its length away"}
    return [
        ledger.test(
            f"loss {STEP:g} away over that of the model, lowest along top eigenvectors less highest along random ones",
            out["hessian"] - out["random"],
            at_least=0.0,
            wrong=-0.1,  # if some random direction were as steep
            **about,
        ),
        ledger.measurement(
            f"lowest loss {STEP:g} away over that of the model, top Hessian eigenvectors", out["hessian"], **about
        ),
        ledger.measurement(
            f"highest loss {STEP:g} away over that of the model, random directions", out["random"], **about
        ),
    ]


def validity(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure the distance at which the Hessian's parabola is off by `OFF`, within each section."""

    def reach(drawn: dict[str, Any]) -> float:
        gaps = np.abs(np.asarray(drawn["loss"], float) - drawn["quadratic"])
        off = np.abs(drawn["alphas"])[gaps > OFF]
        return float(off.min() if off.size else np.abs(drawn["alphas"]).max())

    return [
        ledger.measurement(
            f"distance up to which the Hessian's parabola is within {OFF:g} nats, {NAMES[name]}",
            reach(drawn),
            unit="of the direction's length",
            source="along the first direction, at most to where the parabola has risen by 0.5",
        )
        for name, drawn in sections.items()
    ]
