"""The loss of a text around a trained GPT-2, over two random orthogonal directions, each tensor of its own norm.

    python -m experiments.loss_landscape --preset quick
    python -m experiments.loss_landscape --model PATH --text "I have a dream"

An even grid, such as 20 x 20, misses the trained model itself; an odd one has it in the middle.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments import landscapes, ledger
from experiments.frame import experiment
from jaxrl_llm import models
from jaxrl_llm.analysis import landscape


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, a short text and a longer one, and the grid."""

    model: str = "tiny-gpt2"
    text: str = landscapes.EXERCISE
    longer_text: str = landscapes.LONGER
    points: int = 11
    """Along each direction, odd, and at least 9."""
    even_points: int = 10
    """Points along each direction of the even grid, which misses the model."""
    seed: int = 0
    """Random seed of the directions."""


@experiment(quick=Config(), full=Config(points=31, even_points=30), seeds=3)
def run(config: Config) -> dict[str, Any]:
    """Compute the surfaces of both texts, the even grid, a section, and the checks."""
    loaded = models.load(config.model)
    directions = landscape.random_directions(loaded.params, jax.random.key(config.seed))
    places = {
        "short": landscapes.of_text(loaded, config.text),
        "longer": landscapes.of_text(loaded, config.longer_text),
    }
    surfaces = {}
    for name, text, points in (
        ("short", "short", config.points),
        ("longer", "longer", config.points),
        ("even", "short", config.even_points),
    ):
        words = {"short": config.text, "longer": config.longer_text}[text]
        shown = words if len(words) < 28 else words[:24].rsplit(" ", 1)[0] + " …"
        title = f"“{shown}”, {points} × {points}"
        surfaces[name] = landscapes.surface_of(places[text], directions, points=points, title=title)
    section = landscapes.section_of(
        places["longer"],
        directions[0],
        radius=config.points // 2 * landscapes.SPACING,
        points=config.points,
        label="longer",
    )
    curvature = landscapes.curvature_test(section)
    return {
        "claim": "At the trained model the surface equals the model's loss bit for bit, and its curvature equals the "
        "Hessian's to one part in a thousand.",
        "numbers": [
            curvature,
            *landscapes.identities(surfaces.values()),
            _norms(loaded.params, directions),
            *(number for name in ("short", "longer") for number in _depth(name, surfaces[name])),
        ],
        "data": {"model": config.model, "surfaces": surfaces, "section": section, "difference": curvature["value"]},
    }


def _depth(name: str, surface: dict[str, Any]) -> list[dict[str, Any]]:
    source = f"{len(surface['alphas'])} × {len(surface['betas'])} points around the model"
    facts = {
        "loss of the model": surface["centre"],
        "lowest loss − that of the model": surface["minimum"] - surface["centre"],
    }
    return [
        ledger.measurement(f"{fact}, {name} text", value, unit="nats per token", source=source)
        for fact, value in facts.items()
    ]


def _norms(params: Any, directions: tuple[Any, Any]) -> dict[str, Any]:
    def worst(direction: Any) -> float:
        ratios = jax.tree.map(
            lambda d, p: abs(float(landscape.norm(d)) / float(landscape.norm(p)) - 1) if jnp.any(p) else 0.0,
            direction,
            params,
        )
        return max(jax.tree.leaves(ratios))

    return ledger.identity(
        "largest deviation of a tensor's norm from its parameter's",
        max(map(worst, directions)),
        tolerance=1e-6,
        unit="of the norm",
        source="‖d_g‖ = ‖θ_g‖ by construction, in float32",
    )
