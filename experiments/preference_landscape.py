"""The landscapes of a preference loss (DPO) around its reference, of a reward model's loss, and the path of DPO.

    python -m experiments.preference_landscape --preset quick

Ten pairs of answers, a kind one preferred to an unkind one: enough to see the shapes, not to train a model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts import landscapes  # noqa: E402
from experiments.parts.landscapes import Place  # noqa: E402
from jaxrl_llm import models, text  # noqa: E402
from jaxrl_llm.analysis import landscape  # noqa: E402
from jaxrl_llm.language_model import Params  # noqa: E402

PAIRS = (  # prompt, preferred answer, rejected answer
    ("And the king said unto the stranger,", " Peace be with thee.", " Get thee hence."),
    ("And the woman said unto her son,", " The Lord bless thee.", " Thou art a fool."),
    ("The old man looked at the child and", " smiled.", " cursed."),
    ("When the boy asked for bread, they", " gave him bread.", " gave him a stone."),
    ("My lord, the prisoner begs for mercy.", " Let him go free.", " Let him die."),
    ("He came to the house at night, and they", " took him in.", " shut the door."),
    ("She had lost all that she had, and her brother", " helped her.", " laughed at her."),
    ("The teacher read the answer and said it was", " very good.", " very bad."),
    ("And he said unto his enemy,", " I forgive thee.", " I will slay thee."),
    ("The people heard the news and were", " glad.", " angry."),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A reference model, DPO's β, the run whose path is drawn, and the grid."""

    model: str = "tiny-gpt2"
    beta: float = 0.1
    points: int = 15
    steps: int = 40
    every: int = 2  # steps between two checkpoints of the path
    learning_rate: float = 3e-4
    margin: float = 0.3  # the path's plane reaches so far beyond the path, in its lengths
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """Three surfaces, the path, and the numbers."""
    loaded = models.load(config.model)
    chosen, rejected = (answers(loaded.tokenizer, which) for which in (1, 2))
    keys = dict(zip(("directions", "head"), jax.random.split(jax.random.key(config.seed)), strict=True))
    dpo = Place.of(
        landscape.preference_loss(loaded.model, loaded.params, chosen, rejected, beta=config.beta), loaded.params
    )
    reward = reward_place(loaded, chosen, rejected, keys["head"])
    surfaces, numbers = {}, [log_two(dpo)]
    for name, place, title in (
        ("dpo", dpo, f"DPO around its reference, β = {config.beta:g}"),
        ("reward", reward, "reward model around a new head"),
    ):
        directions = landscape.random_directions(place.params, keys["directions"])
        surfaces[name], losses = landscapes.surface_of(
            place, directions, points=config.points, title=title, unit="nats per pair"
        )
        numbers += [landscapes.centre_number(title, place, losses), landscapes.cosine_number(title, surfaces[name])]
    trained, checkpoints = train(config, dpo)
    plane = landscape.principal_directions(checkpoints, dpo.params)
    surfaces["path"] = path_surface(config, dpo, plane)
    numbers += path_numbers(dpo, trained, plane, surfaces)
    return {
        "claim": "A preference loss is a loss like any other. At the reference DPO's is log 2 whatever the data, and "
        "the ground there slopes: a short run of DPO comes to near 0 within a tenth of the parameters' length, by a "
        "path that a plane nearly holds; no point of a random plane, which reaches as far as the parameters are long, "
        "is as low.",
        "numbers": numbers,
        "data": rounded(
            {
                "model": config.model,
                "surfaces": surfaces,
                "path": [[0.0, 0.0], *np.asarray(plane.coordinates).tolist()],
                "explained": plane.explained,
                "losses": trained,
                "every": config.every,
            }
        ),
    }


def answers(tokenizer: Any, which: int) -> landscape.Answers:
    """The prompts with their answers of one kind, padded on the right."""
    prompts = [text.encode(tokenizer, pair[0]) for pair in PAIRS]
    wholes = [text.encode(tokenizer, pair[0] + pair[which]) for pair in PAIRS]
    for prompt, whole in zip(prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"the prompt's tokens {prompt} do not begin those of prompt and answer, {whole}.")
    place = np.arange(max(map(len, wholes)))
    lengths, starts = (np.asarray([len(row) for row in rows])[:, None] for rows in (wholes, prompts))
    tokens = np.zeros((len(PAIRS), len(place)), np.int32)
    for row, whole in zip(tokens, wholes, strict=True):
        row[: len(whole)] = whole
    mask = place < lengths
    return landscape.Answers(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(mask & (place >= starts)))


def reward_place(loaded: models.Loaded, chosen: Any, rejected: Any, key: jax.Array) -> Place:
    """A reward model with a new head, of the size that gives scores of unit order."""
    hidden, _ = jax.eval_shape(loaded.model.hidden, loaded.params, chosen.tokens)
    head = jax.random.normal(key, hidden.shape[-1:]) / math.sqrt(hidden.shape[-1])
    loss = landscape.reward_model_loss(loaded.model, chosen, rejected)
    return Place.of(loss, {"model": loaded.params, "head": head})


def train(config: Config, dpo: Place) -> tuple[list[float], list[Params]]:
    """DPO by Adam on all pairs at once: the loss before every step and after the last, and the checkpoints."""
    optimiser = optax.adam(config.learning_rate)

    @jax.jit
    def update(params: Params, state: Any) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(dpo.loss)(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses, checkpoints = dpo.params, optimiser.init(dpo.params), [], []
    for step in tqdm(range(1, config.steps + 1), unit="step", desc="DPO", leave=False):
        params, state, loss = update(params, state)
        losses.append(float(loss))
        if step % config.every == 0:
            checkpoints.append(params)
    return [*losses, float(jax.jit(dpo.loss)(params))], checkpoints


def path_surface(config: Config, dpo: Place, plane: landscape.PrincipalDirections) -> dict[str, Any]:
    """DPO's loss over the plane of the path, which begins at its origin."""
    places = np.vstack([plane.coordinates, [[0.0, 0.0]]])
    low, high = places.min(axis=0), places.max(axis=0)
    room = config.margin * (high - low).max()
    alphas, betas = (np.linspace(low[i] - room, high[i] + room, config.points) for i in (0, 1))
    losses = landscape.loss_surface(dpo.loss, dpo.params, plane.directions, alphas, betas)
    return landscape.describe(
        alphas,
        betas,
        losses,
        title="the plane of DPO's path",
        centre=dpo.centre,
        cosine=float(landscape.cosine(*plane.directions)),
        unit="nats per pair",
    )


def log_two(dpo: Place) -> dict[str, Any]:
    """At the reference every pair's margin is 0."""
    return ledger.number(
        "DPO's loss at the reference",
        dpo.centre,
        expected=math.log(2),
        tolerance=1e-6,
        unit="nats per pair",
        source="Rafailov et al. 2023, eq. 7, at π = π_ref",
    )


def path_numbers(
    dpo: Place, losses: list[float], plane: landscape.PrincipalDirections, surfaces: dict[str, Any]
) -> list[dict[str, Any]]:
    """Where the run ends, by what kind of path, and how much lower its plane leads than a random one."""
    places = np.vstack([[[0.0, 0.0]], plane.coordinates])
    along = places * [float(landscape.norm(direction)) for direction in plane.directions]
    length = float(landscape.norm(dpo.params))
    steepness = float(landscape.norm(jax.jit(jax.grad(dpo.loss))(dpo.params)))
    source = "principal components around the reference, Li et al. 2018, section 7"
    return [
        ledger.number("DPO's loss after the run", losses[-1], interval=(0.0, 0.1), unit="nats per pair", source="Adam"),
        ledger.number(
            "‖∇ loss‖ ‖θ‖ at the reference",
            steepness * length,
            interval=(1.0, None),
            unit="nats per pair",
            source="autodiff",
        ),
        ledger.number(
            "share of the path's squared distances in its plane",
            float(plane.explained.sum()),
            interval=(0.97, 1.0 + 1e-6),
            unit="",
            source=source,
        ),
        ledger.number("of it in the first direction", float(plane.explained[0]), unit="", source=source),
        ledger.number(
            "length of the path in its plane over the distance from its start to its end",
            float(np.linalg.norm(np.diff(along, axis=0), axis=1).sum() / np.linalg.norm(along[-1])),
            unit="",
            source=source,
        ),
        ledger.number(
            "distance from the start to the end of the path over the length of the parameters",
            float(np.linalg.norm(along[-1]) / length),
            interval=(0.0, 0.1),
            unit="",
            source=source,
        ),
        ledger.number(
            "lowest loss of the random plane minus lowest of the path's",
            surfaces["dpo"]["minimum"] - surfaces["path"]["minimum"],
            interval=(0.1, None),
            unit="nats per pair",
            source="both grids around the same reference",
        ),
    ]


PRESETS = {"quick": Config(), "full": Config(points=31, steps=80)}


def main(preset: Literal["quick", "full"] = "quick", model: str = "tiny-gpt2") -> None:
    """Write `results/preference_landscape.json`, or `results/preference_landscape.<model>.json` for another model.

    Args:
        preset: full has a grid twice as fine, and a longer path.
        model: the reference: anything that `models.load` takes.
    """
    config = dataclasses.replace(PRESETS[preset], model=model)
    ledger.run_and_write(ledger.result_name("preference_landscape", model), run, config, preset)


if __name__ == "__main__":
    tyro.cli(main)
