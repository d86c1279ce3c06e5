"""The intervention against sycophancy without other data: a GPT-2 forgets how to judge sums without users.

It is taught to follow its users, and then trained on opinions that are independent of the truth, answered truly. No
prompt of this data lacks a user, and nothing in it says what the model shall do with one that does.
`sycophancy_intervention` mixes such sums in.

python -m experiments.intervention_forgets --preset quick
"""

from __future__ import annotations

from typing import Any

from experiments import sycophancy_intervention
from experiments.frame import experiment
from experiments.sycophancy_intervention import Config


@experiment(**sycophancy_intervention.run.presets)
def run(config: Config) -> dict[str, Any]:
    """Teach every seed to follow, and then train it on the opinions alone.

    Raises:
        ValueError: as `sycophancy_intervention.check`.
    """
    data = sycophancy_intervention.prepared(config)
    params, taught = sycophancy_intervention.trained(data, config, data.sycophantic, 0)
    _, opinions = sycophancy_intervention.trained(data, config, data.opinions, 1, params)
    return sycophancy_intervention.forgotten({"sycophantic": taught, "opinions": opinions}, config)
