"""Distillation on the enumerable model: what the loss is, where it ends, and what it never holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrl_llm import oracle, scoring
from jaxrl_llm.objectives import kl
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import steps
from jaxrl_llm.training.distillation import distill_loss
from jaxrl_llm.training.rollout import Prompts, Sampler, rollout
from jaxrl_llm.training.steps import Frozen
from tests.conftest import random_params
from tests.training.test_steps import GPT2, KEY, answers

LM = TabularLM(3, 2)
STUDENT, TEACHER = random_params(LM), random_params(LM, 1)
EVERY = oracle.enumerate_sequences(LM)
WHOLE = jnp.ones(EVERY.shape, bool)
ALL = Sequences(EVERY, WHOLE, WHOLE)
DIVERGENCES = {"forward_kl": {}, "reverse_kl": {}, "jensen_shannon": {"mixture": 0.3}}


def divergence(params, teacher=TEACHER):
    """KL(π‖teacher) of whole sequences."""
    log_p, log_q = oracle.sequence_log_probs(LM, params), oracle.sequence_log_probs(LM, teacher)
    return float((jnp.exp(log_p) * (log_p - log_q)).sum())


def test_on_the_students_own_sequences_the_reverse_divergence_of_tokens_adds_up_to_that_of_sequences():
    loss, log_p = distill_loss(LM, LM, divergence="reverse_kl"), oracle.sequence_log_probs(LM, STUDENT)
    value = jax.jit(
        lambda row: loss(STUDENT, jax.tree.map(lambda leaf: leaf[None], row), Frozen(ref=TEACHER), KEY).value
    )
    per_sequence = np.asarray([value(Sequences(*row)) for row in zip(*ALL, strict=True)]) * LM.horizon
    assert (np.exp(log_p) * per_sequence).sum() == pytest.approx(divergence(STUDENT), rel=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_is_the_mean_divergence_of_the_completion_tokens_at_the_temperature(name):
    rng = np.random.default_rng(0)
    counted = jnp.asarray(rng.random(EVERY.shape) < 0.7)
    batch = ALL._replace(completion_mask=counted)
    functions = {"forward_kl": kl.exact_forward_kl, "reverse_kl": kl.exact_kl, "jensen_shannon": kl.jensen_shannon}
    settings = DIVERGENCES[name]

    @jax.jit
    def both(student, teacher):
        loss = distill_loss(LM, LM, divergence=name, temperature=2.0, **settings)
        found = loss(student, batch, Frozen(ref=teacher), KEY)
        logits = [LM.logits(each, scoring.hidden_before(LM, each, batch)) / 2 for each in (student, teacher)]
        return found.value, found.metrics["length"], functions[name](*logits, **settings)

    value, length, per_token = both(STUDENT, TEACHER)
    assert float(value) == pytest.approx(float(np.asarray(per_token)[np.asarray(counted)].mean()), rel=1e-5)
    assert float(length) == pytest.approx(float(counted.sum()) / len(EVERY), rel=1e-6)


def test_no_gradient_reaches_the_teacher_and_parts_of_a_batch_add_up():
    loss = distill_loss(LM, LM)
    batch, found = jax.tree.map(lambda leaf: leaf[:8], ALL), []
    of_teacher = jax.jit(jax.grad(lambda teacher: loss(STUDENT, batch, Frozen(ref=teacher), KEY).value))(TEACHER)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_teacher))
    for parts in (1, 4):
        step = steps.make_step(loss, optax.sgd(1.0), microbatches=parts)
        found.append(step(steps.initial_state(STUDENT, optax.sgd(1.0), KEY), batch, Frozen(ref=TEACHER))[0].params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *found)


def run(name, batch_of, count):
    optimizer, loss = optax.adam(optax.cosine_decay_schedule(0.1, count)), distill_loss(LM, LM, divergence=name)
    whole = steps.whole_run(
        lambda key: steps.initial_state(STUDENT, optimizer, key),
        lambda state: steps.update(loss, optimizer, state, batch_of(state), Frozen(ref=TEACHER)),
        steps=count,
    )
    return jax.jit(whole)(KEY)[0].params


@pytest.mark.parametrize("name", DIVERGENCES)
def test_on_given_completions_every_divergence_ends_at_the_teacher(name):
    assert divergence(STUDENT) > 0.1
    assert divergence(run(name, lambda state: ALL, 300)) < 1e-5


def test_on_its_own_completions_the_student_ends_at_the_teacher():
    prompts = Prompts(jnp.zeros((16, 0), jnp.int32), jnp.zeros((16, 0), bool))

    def own(state):
        return rollout(LM, state.params, prompts, state.step_key, Sampler(LM.horizon)).sequences

    assert divergence(run("reverse_kl", own, 300)) < 1e-4


def test_logits_are_never_held_for_all_positions(monkeypatch):
    lm, batch = GPT2, answers(GPT2)
    params, teacher = random_params(lm), random_params(lm, 1)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 8 * lm.vocab_size)
    whole = batch.tokens.size * lm.vocab_size
    loss = distill_loss(lm, lm)
    step = jax.grad(lambda params: loss(params, batch, Frozen(ref=teacher), KEY).value)
    assert largest_logits(jax.make_jaxpr(step)(params).jaxpr, lm.vocab_size) <= 8 * lm.vocab_size < whole


def largest_logits(jaxpr, vocab_size):
    """The number of elements of the largest array over the vocabulary but for the embeddings, in loops too."""
    shapes = [variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars]
    sizes = [np.prod(shape) for shape in shapes if len(shape) > 2 and shape[-1] == vocab_size]
    inner = [largest_logits(each, vocab_size) for equation in jaxpr.eqns for each in jaxprs_in_params(equation.params)]
    return max([*sizes, *inner], default=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "hellinger"}, "divergence must be one of forward_kl, reverse_kl, jensen_shannon, but is"),
        (
            {"divergence": "reverse_kl", "mixture": 0.5},
            "mixture must be None for reverse_kl, which has none, but is 0.5",
        ),
    ],
)
def test_what_has_no_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(LM, LM, **settings)
    with pytest.raises(ValueError, match="the teacher is needed"):
        distill_loss(LM, LM)(STUDENT, ALL, None, KEY)
