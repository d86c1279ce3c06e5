"""Every preference loss and its gradient against the margin, and where each drives the two log-probabilities.

    python -m experiments.preference_losses --preset quick

Gradients are the losses' closed forms. Losses that are not functions of the margin alone are drawn on the
symmetric path a = −b = Δ/2. The plane shows −gradient by log π_w and log π_l, and a real run of DPO on one pair of a
tabular model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402
from jaxtyping import Array  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts import preference_anchors as anchors  # noqa: E402
from experiments.parts import preference_curves as losses  # noqa: E402
from jaxrl_llm import oracle  # noqa: E402
from jaxrl_llm.objectives import preference  # noqa: E402
from jaxrl_llm.tabular import TabularLM  # noqa: E402

LM = TabularLM(vocab_size=3, horizon=3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Knobs of the losses, the range of the margin, and the run of DPO."""

    beta: float = 0.1
    beta_without_reference: float = 1.0  # of losses that take log-probabilities per token
    smoothing: float = 0.1  # of cDPO, robust DPO and EXO
    temperature: float = 0.05  # of DiscoPOP
    largest_margin: float = 6.0  # βΔ, to either side
    points: int = 97
    deepest: float = -9.0  # log-probability, of the plane
    arrows: int = 11
    law: tuple[float, ...] = (0.2, 0.3, 0.5)  # of every token, where the run of DPO starts
    pair: tuple[tuple[int, ...], ...] = ((0, 1, 2), (0, 1, 1))  # chosen, rejected
    beta_of_run: float = 0.5
    steps: int = 150
    learning_rate: float = 0.2
    seed: int = 0  # nothing is drawn


def run(config: Config) -> dict[str, Any]:
    """Curves, anchors, arrows and the run, in float64."""
    with jax.enable_x64(True):
        trained = displacement(config)
        data = {
            "beta": config.beta,
            "smoothing": config.smoothing,
            "groups": {"margin": losses.OF_THE_MARGIN, "both": losses.OF_BOTH, "without": losses.WITHOUT_REFERENCE},
            "curves": losses.curves(config),
            "plane": {name: losses.arrows(name, config) for name in losses.PLANE},
            "reference": losses.reference_of_run(config),
            "run": trained,
        }
        numbers = [*anchors.logistic_anchors(config), *anchors.other_anchors(config), *run_numbers(config, trained)]
    shared, free = (float(trained[name]["chosen"][-1] - trained[name]["chosen"][0]) for name in ("shared", "free"))
    return {
        "claim": "A loss of the margin alone does not say where the two log-probabilities go: DPO on the same pair "
        f"from the same law moves the chosen response by {shared:+.2f} nats where all positions share their logits and "
        f"by {free:+.2f} where each prefix has its own, with the same margin at every step.",
        "numbers": numbers,
        "data": rounded(data),
    }


def displacement(config: Config) -> dict[str, Any]:
    """DPO on one pair, from one law, with a row of logits for every prefix (free) and one row for all (shared)."""
    chosen, rejected = (jnp.asarray(config.pair)[i] @ LM.vocab_size ** jnp.arange(LM.horizon)[::-1] for i in (0, 1))
    row = jnp.log(jnp.asarray(config.law))
    table = jnp.broadcast_to(row, (LM.num_prefixes, LM.vocab_size))
    parametrisations = {
        "free": (table, lambda table: table),
        "shared": (row, lambda row: jnp.broadcast_to(row, table.shape)),
    }

    def pair_log_probs(params: Array, build: Callable[[Array], Array]) -> Array:
        return oracle.sequence_log_probs(LM, {"logits": build(params)})[jnp.stack([chosen, rejected])]

    runs = {}
    for name, (start, build) in parametrisations.items():
        log_probs = functools.partial(pair_log_probs, build=build)
        path, speed = descend(start, log_probs, config)
        shown = np.unique(np.geomspace(1, config.steps, 60).astype(int)) - 1
        runs[name] = {"chosen": path[shown, 0], "rejected": path[shown, 1], "speed": float(speed)}
    return {"step": shown, "law": config.law, "pair": config.pair, "beta": config.beta_of_run, **runs}


def descend(start: Array, log_probs: Callable[[Array], Array], config: Config) -> tuple[np.ndarray, Array]:
    """log π of the pair along gradient descent on DPO's loss; and at the start the rate at which log π_w moves."""
    reference = log_probs(start)
    optimiser = optax.sgd(config.learning_rate)

    def loss(params: Array) -> tuple[Array, Array]:
        pair = log_probs(params)
        return preference.dpo_loss(*pair, *reference, beta=config.beta_of_run), pair

    def step(state: tuple, _: None) -> tuple[tuple, Array]:
        params, optimiser_state = state
        slopes, pair = jax.grad(loss, has_aux=True)(params)
        updates, optimiser_state = optimiser.update(slopes, optimiser_state)
        return (optax.apply_updates(params, updates), optimiser_state), pair

    run = jax.jit(lambda start: jax.lax.scan(step, (start, optimiser.init(start)), length=config.steps))
    upwards = jax.grad(lambda params: log_probs(params)[0])(start)
    return np.asarray(run(start)[1]), -(upwards * jax.grad(loss, has_aux=True)(start)[0]).sum()


def run_numbers(config: Config, runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the chosen response goes, and the closed form of how fast it sets out."""
    law, (chosen, rejected) = np.asarray(config.law), config.pair
    count = {name: np.bincount(pair, minlength=3) for name, pair in (("w", chosen), ("l", rejected))}
    shared = (count["w"] - len(chosen) * law) @ (count["w"] - count["l"])
    free = 1 - law[chosen[-1]] + law[rejected[-1]]
    source = "β/2 ⟨∇log π_w, ∇log π_w − ∇log π_l⟩, Rafailov et al. 2023, section 4"
    leads = [runs[name]["chosen"] - runs[name]["rejected"] for name in ("free", "shared")]
    apart = float(np.abs(leads[0] - leads[1]).max())
    entries = [anchors.anchored("largest difference of the two runs' margins", apart, 0.0, "∇Δ is the same in both")]
    for name, product, bound in (("free", free, (1e-3, None)), ("shared", shared, (None, -1e-3))):
        run = runs[name]
        margin = run["chosen"] - run["rejected"]
        title = f"change of the chosen log-probability, {name} rows"
        change = float(run["chosen"][-1] - run["chosen"][0])
        entries += [
            anchors.anchored(
                f"speed of log π_w at the start, {name} rows",
                run["speed"],
                config.beta_of_run / 2 * float(product),
                source,
                "nats per unit of time",
            ),
            ledger.number(title, change, interval=bound, unit="nats", source=f"{config.steps} steps of DPO, one pair"),
            ledger.number(
                f"change of the margin, {name} rows",
                float(margin[-1] - margin[0]),
                interval=(1e-3, None),
                unit="nats",
                source=f"{config.steps} steps of DPO, one pair",
            ),
        ]
    return entries


PRESETS = {"quick": Config(), "full": Config(points=241, arrows=15)}


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/preference_losses.json`.

    Args:
        preset: full draws finer curves and more arrows.
    """
    ledger.run_and_write("preference_losses", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
