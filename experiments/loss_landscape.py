"""The loss of a text around a trained GPT-2, over two random orthogonal directions, each tensor of its own norm.

    python -m experiments.loss_landscape --preset quick
    python -m experiments.loss_landscape --model PATH --text "I have a dream"

The exercise has 20 x 20 points, which miss the trained model itself; 21 x 21 have it in the middle.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts import landscapes  # noqa: E402
from jaxrl_llm import models  # noqa: E402
from jaxrl_llm.analysis import landscape  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, a short text and a longer one, and the grid."""

    model: str = "tiny-gpt2"
    text: str = landscapes.EXERCISE
    longer_text: str = landscapes.LONGER
    points: int = 21
    even_points: int = 20
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """The surfaces of both texts, the even grid, and the checks."""
    loaded = models.load(config.model)
    directions = landscape.random_directions(loaded.params, jax.random.key(config.seed))
    surfaces, numbers = {}, []
    for name, words, points in (
        ("short", config.text, config.points),
        ("longer", config.longer_text, config.points),
        ("even", config.text, config.even_points),
    ):
        place = landscapes.of_text(loaded, words)
        shown = words if len(words) < 28 else words[:24].rsplit(" ", 1)[0] + " …"
        surfaces[name], losses = landscapes.surface_of(
            place, directions, points=points, title=f"“{shown}”, {points} × {points}"
        )
        if points % 2:
            numbers.append(landscapes.centre_number(name, place, losses))
        numbers += _extremes(name, surfaces[name])
    numbers.append(landscapes.cosine_number("over all parameters together", surfaces["short"]))
    numbers.append(_norms(loaded.params, directions))
    numbers += _curvatures(config, loaded, directions)
    numbers.append(_missed(surfaces["even"]))
    return {
        "claim": "The surface goes exactly through the trained model: the centre of an odd grid is its loss bit for "
        "bit, the two directions are orthogonal over all parameters together and keep every tensor's norm, and the "
        "curvature at the centre is that of the Hessian. An even grid misses the model.",
        "numbers": numbers,
        "data": rounded({"model": config.model, "surfaces": surfaces}),
    }


def _extremes(name: str, surface: dict[str, Any]) -> list[dict[str, Any]]:
    facts = ("centre", "minimum", "maximum") if surface["centre_on_grid"] else ("minimum", "maximum")
    return [ledger.number(f"{fact}, {name}", surface[fact], unit="nats per token", source="measured") for fact in facts]


def _norms(params: Any, directions: tuple[Any, Any]) -> dict[str, Any]:
    def worst(direction: Any) -> float:
        ratios = jax.tree.map(
            lambda d, p: abs(float(landscape.norm(d)) / float(landscape.norm(p)) - 1) if jnp.any(p) else 0.0,
            direction,
            params,
        )
        return max(jax.tree.leaves(ratios))

    return ledger.number(
        "largest deviation of a tensor's norm from its parameter's",
        max(map(worst, directions)),
        interval=(0.0, 1e-6),
        unit="of the norm",
        source="‖d_g‖ = ‖θ_g‖ by construction, in float32",
    )


def _curvatures(config: Config, loaded: models.Loaded, directions: tuple[Any, Any]) -> list[dict[str, Any]]:
    numbers = [
        landscapes.curvature_number(
            "longer, first direction", landscapes.of_text(loaded, config.longer_text), directions[0], bits=32
        )
    ]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), loaded.params)
        place = landscapes.of_text(loaded, config.longer_text, params)
        numbers.append(landscapes.curvature_number("longer, first direction", place, directions[0], bits=64))
    return numbers


def _missed(surface: dict[str, Any]) -> dict[str, Any]:
    return ledger.number(
        "distance from the model to the nearest point of the even grid",
        float(np.hypot(np.abs(surface["alphas"]).min(), np.abs(surface["betas"]).min())),
        interval=(1e-3, None),
        unit="of the direction's length",
        source="20 x 20 points over [−1, 1]²",
    )


PRESETS = {"quick": Config(), "full": Config(points=41, even_points=40)}


def main(
    preset: Literal["quick", "full"] = "quick", model: str | None = None, text: str | None = None, seed: int = 0
) -> None:
    """Write `results/loss_landscape.json`, or `results/loss_landscape.<model>.json` for another model.

    Args:
        preset: full has a grid twice as fine.
        model: a folder or name that `models.load` takes, instead of the preset's.
        text: the short text, instead of "I have a dream".
        seed: of the directions.
    """
    config = dataclasses.replace(PRESETS[preset], seed=seed)
    given = {"model": model, "text": text}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    ledger.run_and_write(ledger.result_name("loss_landscape", config.model), run, config, preset)


if __name__ == "__main__":
    tyro.cli(main)
