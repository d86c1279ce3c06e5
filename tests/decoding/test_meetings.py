"""Features that meet: guidance, penalties, minimum lengths, stop strings, constraints, beams, rows, `jit`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import Guidance, beam_search, generate, search_tree, stochastic_beam_search, stop_strings
from jaxrl_llm.decoding.constraints import Constrained, from_regex
from jaxrl_llm.decoding.generate import decode
from jaxrl_llm.decoding.transforms import (
    ForcedTokens,
    FrequencyPenalty,
    LogitBias,
    MinLength,
    Mirostat,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    bad_words,
)
from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params
from tests.decoding.decoders import exact_log_probs

LM = TabularLM(vocab_size=3, horizon=4)
EMPTY = jnp.zeros((4, 0), jnp.int32)
COMMON = {"max_new_tokens": 4, "key": jax.random.key(1)}


@functools.cache
def table():
    return LM, random_params(LM)


def some_slow(cases, fast):
    """All of a table as parameters; those of which no name is given take long together."""
    return [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name not in fast)) for name, case in cases.items()]


def drawn(rows=EMPTY, **options):
    return generate(*table(), rows, **COMMON | options)


@pytest.mark.slow
def test_guidance_of_scale_one_is_plain_under_penalties_too():
    """They depend on where the logits have their zero."""
    prompts, penalties = np.asarray([[0], [1], [2], [1]]), [RepetitionPenalty(3.0), FrequencyPenalty(0.5)]
    options = {"max_new_tokens": 3, "transform": penalties}
    plain = drawn(prompts, **options)
    guided = drawn(prompts, guidance=Guidance(prompts[::-1], 1.0), **options)
    np.testing.assert_array_equal(guided.tokens, plain.tokens)
    np.testing.assert_allclose(guided.logp_sampler, plain.logp_sampler, rtol=1e-6)


@pytest.mark.parametrize("least", [0, 1, 2, 3, 4])
def test_a_minimum_length_holds_back_stop_strings(least):
    """Text before the n-th new token is not searched."""
    rows, transform = jnp.zeros((64, 0), jnp.int32), [Temperature(3.0), MinLength(least, [])]
    free = drawn(rows, transform=transform)
    held = drawn(rows, transform=transform, stop=stop_strings([b"a", b"b", b"c"], ["a"]))
    for whole, mask in zip(np.asarray(free.tokens), np.asarray(held.mask), strict=True):
        ends = [count for count in range(max(least, 1), 5) if whole[count - 1] == 0]
        assert mask.sum() == min([*ends, 4])


def constrained(allowed=(0.0, 0.0, 0.0), *, bad=(0, 0), forced=-1, least=0):
    """One chain for all, so that they share a program; by default it does nothing to the first token."""
    words = bad_words(3, [bad, [0, 0]])
    return [LogitBias(allowed), words, ForcedTokens([forced]), MinLength(least, 2)]


ONLY = (-np.inf, -np.inf, 0.0)
CONTRADICTIONS = {
    "an allowed token that is a bad word": constrained(ONLY, bad=[2]),
    "a forced bad word": constrained(bad=[1], forced=1),
    "a forced token that is not allowed": constrained(ONLY, forced=0),
    "a forced token outside the vocabulary": constrained(forced=7),
    "no token allowed": constrained([-np.inf] * 3),
    "a minimum length where EOS alone is allowed": constrained(ONLY, least=1),
}


@pytest.mark.parametrize("turn", [1, -1], ids=["in order", "reversed"])
@pytest.mark.parametrize("chain", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_constraints_that_contradict_are_an_error_in_any_order(chain, turn):
    drawn(transform=constrained()[::turn])
    with pytest.raises(FloatingPointError, match="no token could be drawn in row 0 at new token 0"):
        drawn(transform=chain[::turn])


@pytest.mark.slow
@pytest.mark.parametrize("chain", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_beams_have_no_hypothesis_where_constraints_contradict(chain):
    assert not beam_search(*table(), EMPTY, num_beams=2, max_new_tokens=4, transform=chain).mask.any()


@pytest.mark.slow
def test_a_constraint_may_be_closed_over_by_jit():
    constraint, params = Constrained(from_regex("a+b", ["a", "b", ""]), 2), table()[1]
    options = {"max_new_tokens": 4, "eos_id": 2, "transform": constraint}
    inside = jax.jit(lambda params: generate(LM, params, EMPTY, key=COMMON["key"], **options).tokens)
    np.testing.assert_array_equal(inside(params), drawn(**options).tokens)
    beams = jax.jit(lambda params: beam_search(LM, params, EMPTY, num_beams=2, **options).tokens)
    np.testing.assert_array_equal(beams(params), beam_search(LM, params, EMPTY, num_beams=2, **options).tokens)


# Beams ----------------------------------------------------------------------------------------------------------------

REWEIGHING = {
    "temperature": Temperature(0.5),
    "a bias": LogitBias([1.0, 0.0, -2.0]),
    "a repetition penalty": RepetitionPenalty(2.0),
    "a penalty, then a filter": (FrequencyPenalty(1.5), TopK(2)),
}


@pytest.mark.parametrize("transform", some_slow(REWEIGHING, fast=("a penalty, then a filter",)))
def test_wide_beams_find_the_most_probable_texts_of_the_transformed_distribution(transform):
    found = beam_search(*table(), EMPTY[:1], num_beams=81, max_new_tokens=4, transform=transform)
    exact = np.sort(exact_log_probs(*table(), transform))[::-1]
    np.testing.assert_allclose(found.log_prob[0], exact, atol=1e-5)


PER_ROW = {
    "numbers": lambda each: Temperature(jnp.asarray([0.5, 1.0, 2.0])[each]),
    "biases": lambda each: LogitBias(jnp.asarray([[0.0, 1, 2], [0, 0, -jnp.inf], [3, 0, 1]])[each]),
    "forced tokens": lambda each: ForcedTokens(jnp.asarray([[0, -1], [2, 1], [1, 2]])[each]),
    "biases and forced tokens": lambda each: (
        LogitBias(jnp.asarray([[0.0, 1, 2], [0, 0, -jnp.inf], [3, 0, 1]])[each]),
        ForcedTokens(jnp.asarray([[0, -1], [-1, 1], [-1, 2]])[each]),
    ),
    "in a chain": lambda each: (
        TopP(jnp.asarray([0.5, 0.9, 1.0])[each]),
        Mirostat(jnp.asarray([1.0, 2, 3])[each], 0.1),
    ),
}


@pytest.mark.parametrize("transform", some_slow(PER_ROW, fast=()))
def test_a_value_for_each_row_is_that_of_the_row_with_beams_too(transform):
    every, rows = transform(jnp.arange(3)), EMPTY[:3]
    options = {"num_beams": 2, "max_new_tokens": 4}
    found = beam_search(*table(), rows, transform=every, **options)
    keys = jax.random.split(jax.random.key(2), 3)
    sampled = stochastic_beam_search(*table(), rows, transform=every, key=keys, **options)
    for row in range(3):
        alone = beam_search(*table(), rows[:1], transform=transform(row), **options)
        np.testing.assert_array_equal(found.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(found.log_prob[row], alone.log_prob[0], rtol=1e-6)
        one = stochastic_beam_search(*table(), rows[:1], transform=transform(row), key=keys[row : row + 1], **options)
        np.testing.assert_array_equal(sampled.tokens[row], one.tokens[0])


@pytest.mark.parametrize("rows", [2, 4])
def test_values_for_another_number_of_rows_are_named(rows):
    for transform in (Temperature(jnp.ones(rows)), LogitBias(jnp.zeros((rows, 3))), ForcedTokens([[0]] * rows)):
        for call in (
            drawn,
            lambda prompts, **how: beam_search(*table(), prompts, num_beams=2, max_new_tokens=4, **how),
        ):
            with pytest.raises(ValueError, match=r"must be one .*, or one for each of 3 rows, but has the shape"):
                call(EMPTY[:3], transform=transform)


def test_stochastic_beams_know_the_models_own_log_probability():
    found = stochastic_beam_search(*table(), EMPTY[:1], num_beams=3, transform=[Temperature(0.5), TopK(2)], **COMMON)
    own, sampler = (exact_log_probs(*table(), each) for each in (None, [Temperature(0.5), TopK(2)]))
    places = (np.asarray(found.tokens[0]) * 3 ** np.arange(4)[::-1]).sum(axis=1)
    np.testing.assert_allclose(found.logp[0].sum(axis=-1), np.asarray(own)[places], rtol=1e-5)
    np.testing.assert_allclose(found.log_prob[0], np.asarray(sampler)[places], rtol=1e-5)


def test_a_tree_takes_the_values_of_its_one_row():
    bias = jnp.asarray([0.0, 5.0, -jnp.inf])
    one, row = (
        search_tree(*table(), [], branching=2, depth=2, select=LogitBias(each), key=jax.random.key(0))
        for each in (bias, bias[None])
    )
    np.testing.assert_array_equal(one.tokens, row.tokens)


# Programs -------------------------------------------------------------------------------------------------------------


def test_numbers_of_any_type_share_one_program():
    drawn(transform=[Temperature(0.7), TopK(2)])
    before = decode._cache_size()
    for t, k in (
        (1, 2),
        (np.float32(0.5), np.int64(1)),
        (jnp.float32(0.5), jnp.int32(2)),
        (np.float64(2), np.uint8(2)),
    ):
        drawn(transform=[Temperature(t), TopK(k)])
    assert decode._cache_size() == before
