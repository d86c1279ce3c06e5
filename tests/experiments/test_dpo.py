"""What the committed results say of the optimum of RLHF and of DPO, with the bounds that the claims need."""

import json

import pytest

from experiments import ledger

PROMISED = {
    "gibbs_optimum": {
        "J*": 1e-12,
        "largest |J* − J(π) − β KL(π‖π*)|": 1e-12,
        "J* − J where the ascent ends": 1e-7,
    },
    "dpo_equivalence": {
        "DPO loss at the reference": 1e-12,
        "largest |log π − log π*|": 1e-5,
        "largest |implied − true reward|, centred": 1e-5,
        "largest |DPO loss − reward-model loss at β log(π/ref)|": 1e-12,
    },
    "dpo_gradient": {
        "closed form against jax.grad, at the reference": 1e-12,
        "closed form against jax.grad, away from it": 1e-12,
        "weight at the start, different": 1e-6,
        "weight at the start, nearly the same": 1e-6,
        "loss at the start, different": 1e-6,
    },
}


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_number_is_there_and_tightly_bound(name):
    entry = json.loads((ledger.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    numbers = {number["name"]: number for number in entry["numbers"]}
    assert entry["holds"]
    for wanted, bound in PROMISED[name].items():
        assert numbers[wanted]["tolerance"] <= bound
        assert abs(numbers[wanted]["value"] - numbers[wanted]["expected"]) <= bound


def test_the_wrong_sign_of_the_sigmoid_is_seen_only_away_from_the_reference():
    entry = json.loads((ledger.RESULTS / "dpo_gradient.json").read_text(encoding="utf-8"))
    exact = entry["data"]["exact"]
    assert exact["turned start"] < 1e-12 < 0.1 < exact["turned later"]


def test_displacement_was_measured_between_nearly_equal_answers():
    runs = json.loads((ledger.RESULTS / "dpo_gradient.json").read_text(encoding="utf-8"))["data"]["runs"]
    assert runs["nearly the same"][-1]["chosen"] < 0 < runs["different"][-1]["chosen"]
    assert all(rows[-1]["rejected"] < rows[-1]["chosen"] for rows in runs.values())
