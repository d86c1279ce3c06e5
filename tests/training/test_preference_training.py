"""Preference losses by name: their values at the reference, what they are given, and where they end."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.objectives import preference as objectives
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import steps
from jaxrl_llm.training.preference import (
    LOSSES,
    NAMES,
    JudgedBatch,
    PairBatch,
    pair_sums,
    preference_loss,
    with_reference,
)
from jaxrl_llm.training.steps import Frozen
from tests.conftest import random_params
from tests.training.test_steps import KEY, LM, PAIRS, answers

BETA = 0.1
POLICY, REFERENCE = random_params(LM), random_params(LM, 1)
SUMS = jax.jit(functools.partial(pair_sums, LM))
UNWEIGHTED = PAIRS._replace(weight=None)
AT_REFERENCE = {  # the value of a loss whose log-ratios are all 0
    "dpo": math.log(2),
    "robust_dpo": math.log(2),
    "length_normalised_dpo": math.log(2),
    "hinge": 1.0,
    "ipo": (1 / (2 * BETA)) ** 2,
    "kto": 0.5,
    "apo_zero": 1.0,
    "bco": 2 * math.log(2),
}
JUDGED = JudgedBatch(answers(seed=0), jnp.arange(8) % 2 == 0, answers(seed=3))


def batch_of(name):
    return JUDGED if name == "kto" else UNWEIGHTED


def first_step(name, params, batch, frozen, **knobs):
    optimizer = optax.sgd(0.01)
    step = steps.make_step(preference_loss(LM, name, **knobs), optimizer)
    return step(steps.initial_state(params, optimizer, KEY), batch, frozen)


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_the_first_step_at_the_reference_has_the_known_loss(name):
    _, metrics = first_step(name, REFERENCE, batch_of(name), Frozen(ref=REFERENCE), beta=BETA)
    assert float(metrics["loss"]) == pytest.approx(AT_REFERENCE[name], rel=1e-5)
    assert float(metrics["margin"]) == pytest.approx(0, abs=1e-5) and float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_objective_of_sums_or_averages(name):
    policy, ref = SUMS(POLICY, UNWEIGHTED), SUMS(REFERENCE, UNWEIGHTED)
    function = LOSSES[name].objective
    if name in ("simpo", "orpo"):
        expected = function(policy.chosen / policy.length_chosen, policy.rejected / policy.length_rejected)
    elif name == "cpo":
        expected = function(policy.chosen, policy.rejected)
    else:
        lengths = (policy.length_chosen, policy.length_rejected) if name == "length_normalised_dpo" else ()
        expected = function(policy.chosen, policy.rejected, ref.chosen, ref.rejected, *lengths)
    loss = jax.jit(preference_loss(LM, name))
    found = loss(POLICY, UNWEIGHTED, Frozen(ref=REFERENCE), KEY)
    assert float(found.value) == pytest.approx(float(expected.mean()), rel=1e-4)
    weighted = loss(POLICY, PAIRS, Frozen(ref=REFERENCE), KEY)
    assert float(weighted.value) == pytest.approx(float(np.average(expected, weights=PAIRS.weight)), rel=1e-4)


def test_every_pair_loss_of_the_objectives_has_its_name():
    public = {name.removesuffix("_loss") for name in objectives.__all__ if name.endswith("_loss")}
    assert public == set(NAMES)


def test_kto_takes_its_reference_point_from_mismatched_answers():
    def sums(params, rows):
        return SUMS(params, PairBatch(rows, rows)).chosen

    point = objectives.kto_reference_point(sums(POLICY, JUDGED.mismatched), sums(REFERENCE, JUDGED.mismatched))
    expected = objectives.kto_loss(
        sums(POLICY, JUDGED.answers), sums(REFERENCE, JUDGED.answers), JUDGED.desirable, point
    )
    found = jax.jit(preference_loss(LM, "kto"))(POLICY, JUDGED, Frozen(ref=REFERENCE), KEY)
    assert float(found.value) == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_in_the_step_or_once_ahead(name):
    batch = batch_of(name)
    inside, _ = first_step(name, POLICY, batch, Frozen(ref=REFERENCE))
    ahead, _ = first_step(name, POLICY, with_reference(LM, REFERENCE, batch), None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), ahead.params, inside.params)
    with pytest.raises(ValueError, match="the reference is needed"):
        first_step(name, POLICY, batch, None)


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "simpo", "kto"))]
)
def test_no_step_changes_the_reference(name):
    before = jax.tree.map(np.asarray, REFERENCE)
    optimizer = optax.adam(0.01)
    step = steps.make_step(preference_loss(LM, name), optimizer)
    state = steps.initial_state(REFERENCE, optimizer, KEY)
    for _ in range(3):
        state, _ = step(state, batch_of(name), Frozen(ref=REFERENCE))
    jax.tree.map(np.testing.assert_array_equal, REFERENCE, before)
    assert any((new != old).any() for new, old in zip(*map(jax.tree.leaves, (state.params, REFERENCE)), strict=True))


@pytest.mark.slow
def test_on_the_populations_preferences_dpo_ends_at_the_optimum_of_rlhf():
    """And the metrics say what happens: the margin grows from 0."""
    lm, beta = TabularLM(3, 2), 0.5
    ref = random_params(lm)
    every = oracle.enumerate_sequences(lm)
    rewards = jax.random.normal(KEY, (len(every),))
    log_probs = oracle.sequence_log_probs(lm, ref)
    law = oracle.population_preferences(log_probs, rewards)
    first, second = (each.ravel() for each in jnp.indices(law.shape))
    whole = jnp.ones((len(first), 2), bool)
    batch = PairBatch(*(Sequences(every[at], whole, whole) for at in (first, second)), weight=law.ravel())
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 300))
    loss = preference_loss(lm, "dpo", beta=beta)
    run = steps.whole_run(
        lambda key: steps.initial_state(ref, optimizer, key),
        lambda state: steps.update(loss, optimizer, state, batch, Frozen(ref=ref)),
        steps=300,
    )
    state, metrics = jax.jit(run)(KEY)
    found, best = oracle.sequence_log_probs(lm, state.params), rlhf.gibbs_optimum(log_probs, rewards, beta=beta)
    assert float((jnp.exp(found) * (found - best)).sum()) < 1e-4
    assert float(metrics["loss"][0]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(metrics["margin"][0]) == pytest.approx(0, abs=1e-6) and float(metrics["margin"][-1]) > 0.1


def test_wrong_names_knobs_and_batches_are_refused():
    with pytest.raises(ValueError, match=r"the loss must be one of dpo, .*kto, but is 'ppo'"):
        preference_loss(LM, "ppo")
    with pytest.raises(ValueError, match=r"the loss ipo has no label_smoothing: its knobs are beta\."):
        preference_loss(LM, "ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match="it takes a PairBatch, but was given JudgedBatch"):
        first_step("dpo", POLICY, JUDGED, Frozen(ref=REFERENCE))
    with pytest.raises(ValueError, match="kto takes a JudgedBatch, but was given PairBatch"):
        first_step("kto", POLICY, UNWEIGHTED, Frozen(ref=REFERENCE))
