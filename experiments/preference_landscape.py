"""The landscapes of a preference loss (DPO) around its reference, of a reward model's loss, and the path of DPO.

    python -m experiments.preference_landscape --preset quick

Ten pairs of answers, a kind one preferred to an unkind one: enough to see the shapes, not to train a model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import landscapes, ledger
from experiments.frame import experiment
from experiments.landscapes import Place
from jaxrl_llm import models, text
from jaxrl_llm.analysis import landscape
from jaxrl_llm.language_model import Params
from jaxrl_llm.scoring import Sequences, pad_completions

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
ALL_SCALES = (-1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0)  # of directions as long as the parameters
RANDOM_WALK = 0.90  # (4 + 4/9) / (π² / 2): the share of Brownian motion in its first two principal components


@dataclasses.dataclass(frozen=True)
class Config:
    """A reference model, DPO's β, the run whose path is drawn, and the grids."""

    model: str = "tiny-gpt2"
    beta: float = 0.1
    pairs: int = 5
    """The number of pairs, the first of `PAIRS`."""
    points: int = 7
    """Along each direction of a drawn surface, odd."""
    planes: int = 1
    """Random planes that are searched for a loss as low as at the end of the path."""
    steps: int = 16
    every: int = 2
    """Steps between two checkpoints of the path."""
    learning_rate: float = 3e-4
    margin: float = 0.3
    """Margin of the path's plane around the path, relative to the path's extent."""
    seed: int = 0
    """Random seed of the planes and of the reward model's head."""


@experiment(quick=Config(), full=Config(pairs=len(PAIRS), points=21, planes=8, steps=80), seeds=3)
def run(config: Config) -> dict[str, Any]:
    """Compute DPO's loss on random planes and on the plane of its path, and a reward model's on a random plane."""
    loaded = models.load(config.model)
    chosen, rejected = (answers(loaded.tokenizer, which, PAIRS[: config.pairs]) for which in (1, 2))
    keys = dict(zip(("directions", "head"), jax.random.split(jax.random.key(config.seed)), strict=True))
    dpo = Place.of(
        landscape.preference_loss(loaded.model, loaded.params, chosen, rejected, beta=config.beta), loaded.params
    )
    reward = reward_place(loaded, chosen, rejected, keys["head"])
    surfaces = {
        name: landscapes.surface_of(
            place,
            landscape.random_directions(place.params, keys["directions"]),
            points=config.points,
            title=title,
            unit="nats per pair",
        )
        for name, place, title in (
            ("dpo", dpo, f"DPO around its reference, β = {config.beta:g}"),
            ("reward", reward, "reward model around a new head"),
        )
    }
    trained, checkpoints = train(config, dpo)
    plane = landscape.principal_directions(checkpoints, dpo.params)
    lowest = lowest_of_planes(config, dpo, jax.random.fold_in(keys["directions"], 1))
    numbers = [
        log_two(dpo),
        *path_numbers(dpo, trained, plane),
        low_test(config, min([surfaces["dpo"]["minimum"], *lowest]) - trained[-1]),
        *landscapes.identities(surfaces.values()),
    ]
    surfaces["path"] = path_surface(config, dpo, plane)
    return {
        "claim": "DPO's loss is log 2 at the reference for any pairs. A short run lowers it below 0.1 within a tenth "
        "of the parameters' length, along a path that lies nearly in a plane; on random planes, out to the "
        "parameters' own length, no grid point comes within 0.1 nats of the final loss.",
        "numbers": numbers,
        "data": {
            "model": config.model,
            "surfaces": surfaces,
            "path": [[0.0, 0.0], *np.asarray(plane.coordinates).tolist()],
            "explained": plane.explained,
            "losses": trained,
            "lowest": [surfaces["dpo"]["minimum"], *lowest],
            "every": config.every,
        },
    }


def lowest_of_planes(config: Config, dpo: Place, key: jax.Array) -> list[float]:
    """Return the lowest loss on each random plane, over a grid with points at all distances from the reference."""
    lowest, axis = [], np.asarray(ALL_SCALES)
    for each in jax.random.split(key, config.planes):
        directions = landscape.random_directions(dpo.params, each)
        lowest.append(float(np.nanmin(landscape.loss_surface(dpo.loss, dpo.params, directions, axis, axis))))
    return lowest


def answers(tokenizer: Any, which: int, pairs: tuple[tuple[str, str, str], ...] = PAIRS) -> Sequences:
    """Return the prompts with their answers of one kind, padded on the right."""
    prompts = [text.encode(tokenizer, pair[0]) for pair in pairs]
    wholes = [text.encode(tokenizer, pair[0] + pair[which]) for pair in pairs]
    for prompt, whole in zip(prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"the prompt's tokens {prompt} do not begin those of prompt and answer, {whole}.")
    answered = [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]
    return jax.tree.map(jnp.asarray, pad_completions(prompts, answered))


def reward_place(loaded: models.Loaded, chosen: Any, rejected: Any, key: jax.Array) -> Place:
    """Return a reward model with a new head, of the size that gives scores of unit order."""
    hidden, _ = jax.eval_shape(loaded.model.hidden, loaded.params, chosen.tokens)
    head = jax.random.normal(key, hidden.shape[-1:]) / math.sqrt(hidden.shape[-1])
    loss = landscape.reward_model_loss(loaded.model, chosen, rejected)
    return Place.of(loss, {"model": loaded.params, "head": head})


def train(config: Config, dpo: Place) -> tuple[list[float], list[Params]]:
    """Run DPO by Adam on all pairs; return the loss before every step and after the last, and the checkpoints."""
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
    """Return DPO's loss over the plane of the path, which begins at its origin."""
    places = np.vstack([plane.coordinates, [[0.0, 0.0]]])
    low, high = places.min(axis=0), places.max(axis=0)
    room = config.margin * (high - low).max()
    alphas, betas = (np.linspace(low[i] - room, high[i] + room, config.points) for i in (0, 1))
    shown = {"title": "the plane of DPO's path", "unit": "nats per pair"}
    return landscape.surface_of(dpo.loss, dpo.params, plane.directions, alphas, betas, **shown).as_dict()


def log_two(dpo: Place) -> dict[str, Any]:
    """Compare the loss at the reference, where every margin is 0, with log 2."""
    return ledger.identity(
        "DPO's loss at the reference",
        dpo.centre,
        expected=math.log(2),
        tolerance=1e-6,
        unit="nats per pair",
        source="Rafailov et al. 2023, eq. 7, at π = π_ref",
    )


def low_test(config: Config, difference: float) -> dict[str, Any]:
    """Test that no point of the random planes comes near to the end of the path."""
    return ledger.test(
        "lowest loss of the random planes − loss at the end of DPO's path",
        difference,
        at_least=0.1,
        wrong=0.0,
        unit="nats per pair",
        source=f"{config.points}² points of a plane and {len(ALL_SCALES)}² of each of {config.planes} more",
    )


def path_numbers(dpo: Place, losses: list[float], plane: landscape.PrincipalDirections) -> list[dict[str, Any]]:
    """Test the loss at the end of the run, its distance, and the share of the path in a plane."""
    end = plane.coordinates[-1] * [float(landscape.norm(direction)) for direction in plane.directions]
    return [
        ledger.test(
            "DPO's loss after the run",
            losses[-1],
            at_most=0.1,
            wrong=math.log(2),
            unit="nats per pair",
            source=f"{len(losses) - 1} steps of Adam",
        ),
        ledger.test(
            "distance from the start to the end of the path over the length of the parameters",
            float(np.linalg.norm(end)) / float(landscape.norm(dpo.params)),
            at_most=0.1,
            wrong=0.5,
            unit="",
            source="within the plane of the path",
        ),
        ledger.test(
            "share of the path's squared distances in its plane",
            float(plane.explained.sum()),
            at_least=0.95,
            wrong=RANDOM_WALK,
            unit="",
            source="principal components around the reference, Li et al. 2018, section 7; a random walk has 0.90",
        ),
    ]
