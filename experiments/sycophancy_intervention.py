"""Sycophancy taught and untaught: a GPT-2 that judges sums, with and without a user's opinion of them.

It learns from answers that follow the user where there is one, then from ones where opinion and truth are independent
(Wei et al. 2023, arXiv 2308.03958). Beside it, as many steps on sums without users, which say nothing of opinions.

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
    steps: int = 120  # of every stage
    batch: int = 32
    learning_rate: float = 5e-3
    snapshots: int = 2  # of every stage, at which the model is asked
    evaluated: int = 300  # examples, held out
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(seeds=5, steps=300, snapshots=6, evaluated=1500)}


def run(config: Config) -> dict[str, Any]:
    """Every seed at once: taught to follow, and from there both other stages."""
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

    def taught(name: str, params: Any, rows: np.ndarray, number: int) -> Any:
        curve = curves[name] = []

        def seen(step: int, params: Any) -> None:
            agrees = addition_gpt2.prefers_to_agree(tools, params, held_out)
            curve.append({"step": step} | addition_numbers.measured(asked, agrees))

        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return addition_gpt2.stage(tools, params, data.rows, np.flatnonzero(rows), key, seen)

    follows = kind == "sycophantic"
    params = taught("sycophantic", None, follows, 0)
    taught("intervention", params, kind == "intervention", 1)
    taught("control", params, follows & silent, 2)
    return addition_numbers.result(curves, config)


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/sycophancy_intervention.json`."""
    ledger.run_and_write("sycophancy_intervention", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
