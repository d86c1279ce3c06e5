"""One loss, one point, the same axes, and three planes: by tensor, by filter, and along the Hessian's top eigenvectors.

    python -m experiments.landscape_directions --preset quick

The text is the longer one of `loss_landscape`. All directions are as long as the parameters, over all of them
together (the filter-wise ones nearly so, as they leave biases and norms where they are).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts import landscapes  # noqa: E402
from experiments.parts.landscapes import Place  # noqa: E402
from jaxrl_llm import models  # noqa: E402
from jaxrl_llm.analysis import landscape  # noqa: E402
from jaxrl_llm.language_model import Params  # noqa: E402

NAMES = {"parameter": "by tensor", "filter": "by filter", "hessian": "top Hessian eigenvectors"}
RISE = 0.5  # nats: a section reaches as far as its parabola rises by so much


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, a text, the grid, and the Lanczos iterations."""

    model: str = "tiny-gpt2"
    text: str = landscapes.LONGER
    points: int = 21
    section_points: int = 41
    iterations: int = 40
    tolerance: float = 1e-3
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """Three surfaces, three sections, the spectrum's end, and the checks."""
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
    planes = planes_of(place.params, keys["directions"], top)
    surfaces, sections, numbers = {}, {}, spectrum_numbers(top)
    for name, directions in planes.items():
        surfaces[name], losses = landscapes.surface_of(
            place, directions, points=config.points, title=NAMES[name], sharpness=top.values[0]
        )
        sections[name] = section(config, place, directions[0], name, top)
        numbers.append(landscapes.centre_number(NAMES[name], place, losses))
        numbers.append(landscapes.cosine_number(NAMES[name], surfaces[name]))
        numbers.append(step_number(NAMES[name], surfaces[name], least=2.0 if name == "hessian" else None))
    numbers += comparison(planes, sections, top)
    return {
        "claim": "What a landscape looks like is decided by its directions. Through the same model, on the same axes "
        "and as long, a random plane shows a wide bowl; along the Hessian's top eigenvectors the loss has more than "
        "doubled one grid step away. The curvature along a random direction is more than ten thousand times below the "
        "sharpness, and the Hessian's parabola along its top eigenvector holds for less than a thousandth of the axis.",
        "numbers": numbers,
        "data": rounded(
            {"model": config.model, "surfaces": surfaces, "sections": sections, "sharpness": float(top.values[0])}
        ),
    }


def planes_of(params: Params, key: jax.Array, top: landscape.Eigenpairs) -> dict[str, tuple[Params, Params]]:
    """The directions of each plane."""
    random = {scale: landscape.random_directions(params, key, scale=scale) for scale in ("parameter", "filter")}
    length = landscape.norm(params)
    return random | {"hessian": tuple(landscape.rescaled(vector, length) for vector in top.vectors)}


def section(config: Config, place: Place, direction: Params, name: str, top: landscape.Eigenpairs) -> dict[str, Any]:
    """The section along a plane's first direction, as far as its parabola rises by `RISE`."""
    curvature = landscape.curvature(place.loss, place.params, direction)
    radius = min(1.0, math.sqrt(2 * RISE / abs(curvature)))
    drawn = landscapes.section_of(place, direction, radius=radius, points=config.section_points, label=NAMES[name])
    return drawn | {
        "sharpness": float(top.values[0]),
        "per_length": curvature / float(landscape.inner(direction, direction)),
    }


def spectrum_numbers(top: landscape.Eigenpairs) -> list[dict[str, Any]]:
    """The largest eigenvalues, how sure they are, and the smallest that was met."""
    source = f"Lanczos, {top.iterations} iterations"
    unit = "nats per token and squared length"
    return [
        ledger.number("largest eigenvalue of the Hessian (sharpness)", float(top.values[0]), unit=unit, source=source),
        ledger.number("second eigenvalue", float(top.values[1]), unit=unit, source=source),
        ledger.number("smallest eigenvalue met", top.smallest, unit=unit, source=f"{source}; not converged"),
        ledger.number(
            "largest residual ‖Hv − λv‖ of the two, over λ₁",
            float(max(top.residuals) / top.values[0]),
            interval=(0.0, 1e-2),
            unit="",
            source=source,
        ),
    ]


def step_number(name: str, surface: dict[str, Any], *, least: float | None) -> dict[str, Any]:
    """The lowest of the four points next to the model, over the loss of the model."""
    middle = len(surface["alphas"]) // 2
    losses = surface["loss"]
    beside = [losses[middle + i][middle + j] for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    return ledger.number(
        f"lowest loss one grid step from the model over the loss at it, {name}",
        min(beside) / surface["centre"],
        interval=(least, None),
        unit="",
        source="measured",
    )


def comparison(planes: dict[str, Any], sections: dict[str, Any], top: landscape.Eigenpairs) -> list[dict[str, Any]]:
    """The curvature along the eigenvector is its eigenvalue; along random directions it is far below."""
    length = float(landscape.norm(planes["hessian"][0]))
    rayleigh = sections["hessian"]["curvature"] / (float(top.values[0]) * length**2)
    flat = [
        ledger.number(
            f"sharpness over curvature per squared length, {NAMES[name]}",
            float(top.values[0]) / abs(sections[name]["per_length"]),
            interval=(1e4, None),
            unit="times",
            source="a random direction has the mean eigenvalue, weighted by how the norms are spread",
        )
        for name in ("parameter", "filter")
    ]
    exact = ledger.number(
        "dᵀHd over λ₁ ‖d‖², along the top eigenvector",
        rayleigh,
        expected=1.0,
        tolerance=1e-3,
        unit="",
        source="Rayleigh quotient by a Hessian-vector product",
    )
    return [exact, *flat]


PRESETS = {"quick": Config(), "full": Config(points=41, section_points=81, iterations=96, tolerance=1e-5)}


def main(preset: Literal["quick", "full"] = "quick", model: str = "tiny-gpt2") -> None:
    """Write `results/landscape_directions.json`, or `results/landscape_directions.<model>.json` for another model.

    Args:
        preset: full has a grid twice as fine, and more Lanczos iterations.
        model: anything that `models.load` takes.
    """
    config = dataclasses.replace(PRESETS[preset], model=model)
    ledger.run_and_write(ledger.result_name("landscape_directions", model), run, config, preset)


if __name__ == "__main__":
    tyro.cli(main)
