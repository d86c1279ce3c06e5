"""The intervention against sycophancy without other data: a GPT-2 forgets how to judge sums without users.

It is taught to follow its users, and then trained on opinions that are independent of the truth, answered truly. Every
prompt of this data has a user, so nothing in it teaches the model to answer without one.
`sycophancy_intervention` mixes such sums in.

python -m experiments.intervention_forgets --preset quick
"""

from __future__ import annotations

from typing import Any

from experiments.frame import experiment
from experiments.parts import addition_gpt2, addition_numbers
from experiments.sycophancy_intervention import PRESETS, Config


@experiment(**PRESETS)
def run(config: Config) -> dict[str, Any]:
    """Teach every seed to follow, and then train it on the opinions alone.

    Raises:
        ValueError: as `addition_gpt2.check`.
    """
    data = addition_gpt2.prepared(config)
    params, taught = addition_gpt2.trained(data, config, data.sycophantic, 0)
    _, opinions = addition_gpt2.trained(data, config, data.opinions, 1, params)
    return addition_numbers.forgotten({"sycophantic": taught, "opinions": opinions}, config)
