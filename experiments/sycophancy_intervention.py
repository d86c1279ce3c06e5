"""Sycophancy taught and untaught: a GPT-2 that judges sums, with and without a user's opinion of them.

It learns from answers that follow the user where there is one. The intervention goes on with answers that are true
whatever the user thinks, mixed with data that it shall not forget: sums without a user. Beside it, as many steps on
those sums alone; `intervention_forgets` has the opinions alone.

This is in the manner of Wei et al. 2023 (arXiv 2308.03958): they train on public NLP tasks, filtered by what the model
knows, and test on other tasks; here both are sums in the same words, without a filter, and say nothing of transfer.

python -m experiments.sycophancy_intervention --preset quick
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments.frame import experiment
from experiments.parts import addition_gpt2, addition_numbers


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that a processor trains in minutes."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    seeds: int = 2
    taught_steps: int = 150  # of the first stage
    steps: int = 100  # of every later one
    batch: int = 32
    learning_rate: float = 5e-3
    snapshots: int = 2  # of every stage, at which the model is asked
    evaluated: int = 150  # examples, held out
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(seeds=5, taught_steps=600, steps=480, snapshots=6, evaluated=1500)}


@experiment(**PRESETS)
def run(config: Config) -> dict[str, Any]:
    """Teach every seed to follow, and from there run each of the other stages.

    Raises:
        ValueError: as `addition_gpt2.check`.
    """
    data = addition_gpt2.prepared(config)
    params, taught = addition_gpt2.trained(data, config, data.sycophantic, 0)
    later = {"intervention": np.union1d(data.opinions, data.sums), "sums": data.sums}
    curves = {
        name: addition_gpt2.trained(data, config, rows, number, params)[1]
        for number, (name, rows) in enumerate(later.items(), 1)
    }
    return addition_numbers.result({"sycophantic": taught} | curves, config)
