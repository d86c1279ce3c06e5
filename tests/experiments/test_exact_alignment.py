"""The trainers on tables: the distance is the divergence, and the deliberate mistakes are what they are called."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import exact_alignment, ledger
from jaxrl_llm import oracle
from jaxrl_llm.training.policy import METHODS, Trainer
from tests.conftest import random_params

SMALL = exact_alignment.Config(vocab_size=2, horizon=2, tables=2, steps=3, answers=8)


@pytest.fixture(scope="module")
def given():
    return jax.jit(functools.partial(exact_alignment.problem, SMALL))(jax.random.key(0))


@jax.jit
def distance(given, params):
    return given.distance(params)


def test_the_distance_is_the_divergence_from_the_optimum_and_falls_short_of_j_by_beta_times_it(given):
    @jax.jit
    def both(given):
        best = oracle.objective(given.lm, given.reference, given.reference, given.rewards, beta=SMALL.beta)
        log_z = jax.nn.logsumexp(oracle.sequence_log_probs(given.lm, given.reference) + given.rewards / SMALL.beta)
        return best, log_z

    best, log_z = map(float, both(given))
    shortfall = SMALL.beta * float(distance(given, given.reference))
    assert best + shortfall == pytest.approx(SMALL.beta * log_z, abs=1e-5)
    assert float(distance(given, random_params(given.lm))) > 0


def test_a_run_begins_at_the_reference_and_ends_after_its_last_step(given):
    curve = jax.jit(exact_alignment.online(given, METHODS["rloo"]))(jax.random.key(0))
    assert curve.shape == (4,)
    assert float(curve[0]) == pytest.approx(float(distance(given, given.reference)), abs=1e-5)


def test_what_is_spoilt_is_the_last_token_of_the_mask_and_the_ratio():
    @dataclasses.dataclass
    class Rows:
        completion_mask: jax.Array

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

    trainer = Trainer(give, lambda *args: (give(), {}), None)
    answer = exact_alignment.without_last_token(trainer).draw().sequences.completion_mask
    np.testing.assert_array_equal(answer, [[True, True, False]] * 2)
    assert exact_alignment.without_ratio(trainer).score()[0].logp_sampler == 1.0


def test_near_the_optimum_the_distance_is_not_lost_in_rounding(given):
    """Summed as π (log π − log π*), it is rounding of either sign there."""
    log_probs = jax.jit(functools.partial(oracle.sequence_log_probs, given.lm))
    shifted = dataclasses.replace(given, optimum=log_probs(given.reference))
    assert 0 <= float(distance(shifted, given.reference)) < 1e-12
    near = jax.tree.map(lambda leaf: leaf.at[..., 0].add(1e-3), given.reference)
    with jax.enable_x64(True):
        at_near, optimum = (
            np.asarray(log_probs(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), each)))
            for each in (near, given.reference)
        )
    exact = (np.exp(at_near) * (at_near - optimum)).sum()
    assert float(distance(shifted, near)) == pytest.approx(exact, rel=1e-2)


def test_trainers_are_judged_by_the_tables_on_which_they_arrive():
    trainers = exact_alignment.arms(SMALL)
    arrived, elsewhere = np.geomspace(1e-5, 1e-3, 16), np.geomspace(0.02, 0.9, 16)
    left = {name: arrived if arm.ends == exact_alignment.ARRIVES else elsewhere for name, arm in trainers.items()}
    assert ledger.verdict(exact_alignment.numbers(trainers, left)) is True
    for name in ("RLOO", "GRPO as published (k3 in the loss)"):
        half = np.where(np.arange(16) % 2 == 0, left[name], 0.011 if name == "RLOO" else 0.009)
        assert ledger.verdict(exact_alignment.numbers(trainers, left | {name: half})) is False
