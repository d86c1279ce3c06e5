import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.tabular import TabularLM
from tests.conftest import log_softmax, random_params

sequence_log_probs = jax.jit(oracle.sequence_log_probs, static_argnums=0)
expectation = jax.jit(oracle.expectation, static_argnums=(0, 2))


def naive_log_probs(lm, params):
    """Token by token, through a dictionary of prefixes, in float64."""
    prefixes = [p for length in range(lm.horizon) for p in itertools.product(range(lm.vocab_size), repeat=length)]
    distribution = dict(zip(prefixes, log_softmax(params["logits"]), strict=True))
    return np.asarray(
        [
            [distribution[sequence[:time]][token] for time, token in enumerate(sequence)]
            for sequence in itertools.product(range(lm.vocab_size), repeat=lm.horizon)
        ]
    )


def central_differences(function, table, *, step=1e-5):
    """∂function/∂table by differences of second order, one number of the table after the other."""

    def slope(index):
        nudge = np.zeros(table.shape)
        nudge[index] = step
        return (np.asarray(function(table + nudge)) - np.asarray(function(table - nudge))) / (2 * step)

    slopes = [slope(index) for index in np.ndindex(table.shape)]
    return np.moveaxis(np.asarray(slopes), 0, -1).reshape(*np.shape(slopes[0]), *table.shape)


@pytest.mark.parametrize(("vocab_size", "horizon"), [(1, 1), (1, 3), (2, 6), (3, 4), (11, 2)])
def test_enumeration_is_lexicographic_and_complete(vocab_size, horizon):
    sequences = jax.jit(oracle.enumerate_sequences, static_argnums=0)(TabularLM(vocab_size, horizon))
    assert sequences.dtype == jnp.int32
    np.testing.assert_array_equal(sequences, list(itertools.product(range(vocab_size), repeat=horizon)))


def test_too_many_sequences_are_refused():
    with pytest.raises(ValueError, match="14348907 sequences are too many"):
        oracle.enumerate_sequences(TabularLM(3, 15))


@pytest.mark.parametrize(("vocab_size", "horizon"), [(1, 3), (2, 6), (3, 4), (11, 2)])
def test_sequence_probabilities_are_products_of_the_table_and_sum_to_one(vocab_size, horizon):
    lm = TabularLM(vocab_size, horizon)
    params = random_params(lm, 3)
    log_probs = sequence_log_probs(lm, params)
    assert log_probs.shape == (vocab_size**horizon,) and log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, naive_log_probs(lm, params).sum(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(np.asarray(log_probs, np.float64)).sum(), 1, atol=1e-5)


def test_sequence_probabilities_sum_to_one_to_float64():
    with jax.enable_x64(True):
        lm = TabularLM(3, 5)
        log_probs = sequence_log_probs(lm, random_params(lm, 3, dtype=jnp.float64))
        assert log_probs.dtype == jnp.float64
        np.testing.assert_allclose(jnp.exp(log_probs).sum(), 1, rtol=1e-13)


def test_token_log_probs_count_the_first_token_and_any_shorter_sequence(tabular):
    lm, params = tabular
    sequences = oracle.enumerate_sequences(lm)
    naive = naive_log_probs(lm, params)
    for length in (1, 2, 4):
        result = jax.jit(oracle.token_log_probs_of, static_argnums=0)(lm, params, sequences[:, :length])
        np.testing.assert_allclose(result, naive[:, :length], rtol=1e-5, atol=1e-6)


def test_gradient_of_sequence_log_probs_is_that_of_finite_differences():
    with jax.enable_x64(True):
        lm = TabularLM(3, 3)
        table = np.asarray(random_params(lm, 4, dtype=jnp.float64)["logits"])
        function = jax.jit(lambda table: sequence_log_probs(lm, {"logits": table}))
        exact = jax.jit(jax.jacobian(function))(table)
        assert exact.shape == (27, 13, 3)
        np.testing.assert_allclose(exact, central_differences(function, table), atol=1e-9)
        assert np.abs(exact).max() > 0.5


def test_gradient_of_an_expectation_is_that_of_finite_differences():
    with jax.enable_x64(True):
        lm = TabularLM(2, 4)
        table = np.asarray(random_params(lm, 5, dtype=jnp.float64)["logits"])
        reward = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)))
        function = jax.jit(lambda table: oracle.expectation(lm, {"logits": table}, lambda sequences: reward))
        exact = jax.jit(jax.jacobian(function))(table)
        np.testing.assert_allclose(exact, central_differences(function, table), atol=1e-10)
        assert np.abs(exact).max() > 0.05


def test_gradient_of_an_expectation_is_the_score_function_identity(tabular):
    lm, params = tabular
    reward = jnp.asarray(np.random.default_rng(0).normal(size=81), jnp.float32)
    direct = jax.grad(expectation, argnums=1)(lm, params, lambda sequences: reward)["logits"]
    scores = jax.jit(jax.jacobian(functools.partial(oracle.sequence_log_probs, lm)))(params)["logits"]
    probabilities = jnp.exp(sequence_log_probs(lm, params))
    np.testing.assert_allclose(direct, jnp.einsum("y,y,yij->ij", probabilities, reward, scores), atol=1e-6)
    np.testing.assert_allclose(jnp.einsum("y,yij->ij", probabilities, scores), 0, atol=1e-6)  # the score has mean 0


def test_expectation_of_an_indicator_is_its_probability(tabular):
    lm, params = tabular
    every, first = expectation(lm, params, lambda y: (jnp.eye(81, dtype=bool), y[:, 0, None] == jnp.arange(3)))
    np.testing.assert_allclose(every, np.exp(naive_log_probs(lm, params).sum(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(first, jax.nn.softmax(params["logits"][0]), rtol=1e-5)


def test_expectation_takes_trees_of_any_shape_and_integers(tabular):
    lm, params = tabular
    value = expectation(lm, params, lambda y: {"one": jnp.ones(81), "tokens": y, "outer": y[:, :, None] * y[:, None]})
    weights = np.exp(naive_log_probs(lm, params).sum(axis=1))
    sequences = np.asarray(oracle.enumerate_sequences(lm))
    np.testing.assert_allclose(value["one"], 1, rtol=1e-5)
    np.testing.assert_allclose(value["tokens"], weights @ sequences, rtol=1e-5)
    outer = np.einsum("y,yi,yj->ij", weights, sequences, sequences)
    np.testing.assert_allclose(value["outer"], outer, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(lm, params, value):
    return jax.value_and_grad(lambda params: oracle.expectation(lm, params, lambda sequences: value))(params)


@pytest.mark.parametrize("extreme", [np.inf, -np.inf, np.nan])
def test_an_impossible_sequence_adds_nothing_whatever_its_value(tabular, extreme):
    lm, params = tabular
    impossible = {"logits": params["logits"].at[0, 2].set(-jnp.inf)}  # no sequence begins with token 2
    value = np.where(np.arange(81) < 54, np.arange(81.0), extreme).astype(np.float32)
    result, gradient = value_and_gradient(lm, impossible, value)
    weights = np.exp(naive_log_probs(lm, impossible).sum(axis=1))
    np.testing.assert_allclose(result, weights[:54] @ np.arange(54), rtol=1e-5)
    assert np.isfinite(gradient["logits"]).all() and np.abs(gradient["logits"]).max() > 0.1


def test_an_infinite_value_of_a_possible_sequence_is_not_hidden(tabular):
    lm, params = tabular
    assert expectation(lm, params, lambda y: jnp.where(jnp.arange(81) == 3, jnp.inf, 1.0)) == jnp.inf


def test_a_function_of_the_wrong_length_is_named(tabular):
    lm, params = tabular
    with pytest.raises(ValueError, match=r"each of 81 sequences, got \(80,\)"):
        expectation(lm, params, lambda sequences: jnp.zeros(80))
