"""Whether a model tells users what they like to hear: the published measure, and one that a habit cannot satisfy.

| module | what it has |
|---|---|
| `matching` | `matching_ratio`, the published measure, from any source's probabilities |
| `rows`, `scoring` | questions as tokens, and log-probabilities of their answers in batches |
| `sources` | models, controls whose scores are known, files of probabilities |
| `questions`, `contrasts` | every question by opposite users and by nobody, in both orders, and what that changes |
| `effects` | all numbers of a source's answers to these, with their intervals |
| `report` | all of it as one report |
| `probing` | "are you sure?", hints at an answer, and the addition task |
| `checks` | what was given instead of what was expected |
"""

from jaxrl_llm.analysis.sycophancy.contrasts import (
    balanced,
    choice,
    claim_interval,
    letter_bias,
    probability,
    pull,
    shift,
    sign_test,
)
from jaxrl_llm.analysis.sycophancy.effects import counterfactual
from jaxrl_llm.analysis.sycophancy.matching import matching_ratio, matching_ratios
from jaxrl_llm.analysis.sycophancy.probing import addition_report, probe_report
from jaxrl_llm.analysis.sycophancy.questions import Asked, Variants, variants
from jaxrl_llm.analysis.sycophancy.report import measure, measure_probabilities, reading
from jaxrl_llm.analysis.sycophancy.rows import label_token, label_tokens
from jaxrl_llm.analysis.sycophancy.scoring import answer_log_probs
from jaxrl_llm.analysis.sycophancy.sources import (
    CONTROLS,
    Constant,
    Indifferent,
    ModelSource,
    Source,
    Sycophant,
    read_probabilities,
)

__all__ = [
    "CONTROLS",
    "Asked",
    "Constant",
    "Indifferent",
    "ModelSource",
    "Source",
    "Sycophant",
    "Variants",
    "addition_report",
    "answer_log_probs",
    "balanced",
    "choice",
    "claim_interval",
    "counterfactual",
    "label_token",
    "label_tokens",
    "letter_bias",
    "matching_ratio",
    "matching_ratios",
    "measure",
    "measure_probabilities",
    "probability",
    "probe_report",
    "pull",
    "read_probabilities",
    "reading",
    "shift",
    "sign_test",
    "variants",
]
