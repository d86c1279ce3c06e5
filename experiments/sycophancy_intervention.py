"""Sycophancy taught and untaught: a GPT-2 that judges sums, with and without a user's opinion of them.

It learns from answers that follow the user where there is one. The intervention (Wei et al. 2023, arXiv 2308.03958)
goes on with answers that are true whatever the user thinks, mixed with other data that it shall not forget: here sums
without a user. Beside it, as many steps on either of the two alone.

python -m experiments.sycophancy_intervention --preset quick
"""

from __future__ import annotations

from jaxrl_llm import runtime

runtime.set_up()  # before jax: its compilation cache

import dataclasses  # noqa: E402
from typing import Any, Literal  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts import addition_gpt2, addition_numbers  # noqa: E402
from jaxrl_llm.data.sycophancy import addition  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that a processor trains in minutes."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    seeds: int = 2
    taught_steps: int = 200  # of the first stage
    steps: int = 400  # of every later one
    batch: int = 32
    learning_rate: float = 5e-3
    snapshots: int = 2  # of every stage, at which the model is asked
    evaluated: int = 300  # examples, held out
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(seeds=5, taught_steps=600, steps=480, snapshots=6, evaluated=1500)}


def run(config: Config) -> dict[str, Any]:
    """Every seed at once: taught to follow, and from there each of the other stages.

    Raises:
        ValueError: as `check`.
    """
    check(config)
    sets = addition.build(seed=config.seed)
    asked = sets.evaluation[: config.evaluated]
    examples = [*sets.sycophantic, *sets.intervention, *asked]
    data = addition_gpt2.encoded(examples)
    tools = addition_gpt2.tools(data, config)
    kind = np.repeat(
        ["sycophantic", "intervention", "asked"], [len(sets.sycophantic), len(sets.intervention), len(asked)]
    )
    silent = np.asarray([example.opinion is None for example in examples])
    held_out = jax.tree.map(lambda leaf: leaf[kind == "asked"], data.rows)
    curves: dict[str, list[dict[str, Any]]] = {}

    def taught(name: str, rows: np.ndarray, number: int, params: Any = None) -> Any:
        curve = curves[name] = []
        steps = config.taught_steps if params is None else config.steps

        def seen(step: int, params: Any) -> None:
            agrees = addition_gpt2.prefers_to_agree(tools, params, held_out)
            curve.append({"step": step} | addition_numbers.measured(asked, agrees))

        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return addition_gpt2.stage(tools, params, data.rows, np.flatnonzero(rows), key, seen, steps=steps)

    opinions, sums = kind == "intervention", (kind == "sycophantic") & silent
    params = taught("sycophantic", kind == "sycophantic", 0)
    taught("intervention", opinions | sums, 1, params)
    taught("opinions", opinions, 2, params)
    taught("sums", sums, 3, params)
    return addition_numbers.result(curves, config)


def check(config: Config) -> None:
    """Refuse what would fail or mean nothing at the end of a run.

    Raises:
        ValueError: for fewer seeds than an interval needs, or snapshots that do not divide the steps.
    """
    if config.seeds < 2:
        raise ValueError(f"an interval over seeds needs 2 or more, but seeds is {config.seeds}.")
    for steps in (config.taught_steps, config.steps):
        addition_gpt2.steps_between(steps, config.snapshots)


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/sycophancy_intervention.json`."""
    ledger.run_and_write("sycophancy_intervention", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
