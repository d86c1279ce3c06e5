"""The trainers on a table: the distance is the divergence, and what is spoilt is what it says."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import exact_alignment
from jaxrl_llm import oracle
from jaxrl_llm.training.methods import METHODS
from jaxrl_llm.training.policy import Online
from tests.conftest import random_params

SMALL = exact_alignment.Config(vocab_size=2, horizon=2, seeds=1, steps=3, answers=8)
RESULTS = Path(__file__).resolve().parents[2] / "results" / "exact_alignment.json"


@pytest.fixture(scope="module")
def given():
    return exact_alignment.problem(SMALL)


def test_the_distance_is_the_divergence_from_the_optimum_and_falls_short_of_j_by_beta_times_it(given):
    best = oracle.objective(given.lm, given.reference, given.reference, given.rewards, beta=SMALL.beta)
    shortfall = SMALL.beta * given.distance(given.reference)
    log_z = jax.nn.logsumexp(oracle.sequence_log_probs(given.lm, given.reference) + given.rewards / SMALL.beta)
    assert float(best + shortfall) == pytest.approx(SMALL.beta * float(log_z), abs=1e-5)
    assert float(given.distance(random_params(given.lm))) > 0


def test_a_run_begins_at_the_reference_and_ends_after_its_last_step(given):
    curve = jax.jit(exact_alignment.online(given, METHODS["rloo"]))(jax.random.key(0))
    assert curve.shape == (4,)
    assert float(curve[0]) == pytest.approx(float(given.distance(given.reference)), abs=1e-5)


def test_what_is_spoilt_is_the_last_token_of_the_mask_and_the_ratio():
    @dataclasses.dataclass
    class Rows:
        answer: jax.Array

        def _replace(self, **changes):
            return dataclasses.replace(self, **changes)

    @dataclasses.dataclass
    class Drawn:
        sequences: Rows
        logp_old: float = 1.0
        logp_sampler: float = 2.0

        def _replace(self, **changes):
            return dataclasses.replace(self, **changes)

    def give(*args, **knobs):
        return Drawn(Rows(jnp.ones((2, 3), bool)))

    trainer = Online(give, lambda *args: (give(), {}), None)
    answer = exact_alignment.without_last_token(trainer).draw().sequences.answer
    np.testing.assert_array_equal(answer, [[True, True, False]] * 2)
    assert exact_alignment.without_ratio(trainer).score()[0].logp_sampler == 1.0


def test_the_committed_runs_arrive_or_stop_elsewhere():
    data = json.loads(RESULTS.read_text())["data"]
    ends = {curve["name"]: curve["distance"] for curve in data["curves"]}
    arrived = {curve["name"] for curve in data["curves"] if curve["arrives"]}
    assert len(arrived) == 6 and len(ends) == 9
    for name, distance in ends.items():
        if name in arrived:
            assert distance["high"][-1] < 1e-3 < distance["mean"][0]
        else:
            assert distance["low"][-1] > 1e-2
