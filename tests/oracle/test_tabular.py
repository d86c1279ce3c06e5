import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params


def table_of(lm, params):
    """From each prefix, as a tuple of tokens, to its logits: by length, then in lexicographic order."""
    prefixes = [p for length in range(lm.horizon) for p in itertools.product(range(lm.vocab_size), repeat=length)]
    assert len(prefixes) == lm.num_prefixes
    return dict(zip(prefixes, np.asarray(params["logits"]), strict=True))


@pytest.mark.parametrize(("vocab_size", "horizon"), [(1, 1), (1, 4), (2, 5), (3, 4), (7, 2)])
def test_the_logits_after_a_prefix_are_its_row_of_the_table(vocab_size, horizon):
    lm = TabularLM(vocab_size, horizon)
    params = random_params(lm, 2)
    table = table_of(lm, params)
    sequences = np.asarray(list(itertools.product(range(vocab_size), repeat=horizon)))
    logits, cache = jax.jit(lm.apply)(params, sequences)
    assert cache is None and logits.shape == (*sequences.shape, vocab_size)
    for row, sequence in zip(np.asarray(logits), sequences, strict=True):
        for time in range(horizon - 1):
            np.testing.assert_array_equal(row[time], table[tuple(sequence[: time + 1])])
        np.testing.assert_array_equal(row[-1], np.zeros(vocab_size))  # nothing follows the horizon


def test_a_fully_masked_row_stands_at_the_root(tabular):
    lm, params = tabular
    tokens, mask = np.asarray([[2, 1, 0]] * 2), np.asarray([[False, False, False], [False, True, False]])
    logits, _ = jax.jit(lm.apply)(params, tokens, mask=mask)
    np.testing.assert_array_equal(logits, np.asarray(params["logits"])[[[0, 0, 0], [0, 1 + 1, 1 + 1]]])


def test_no_tokens_give_no_logits_and_leave_the_cache_at_the_root(tabular):
    lm, params = tabular

    @jax.jit
    def found(params):
        logits, cache = lm.apply(params, jnp.zeros((2, 0), jnp.int32), lm.init_cache(2, 3))
        return logits, cache.length, lm.apply(params, jnp.asarray([[2], [1]]), cache)[0]

    nothing, length, logits = found(params)
    assert nothing.shape == (2, 0, 3) and int(length) == 0
    np.testing.assert_array_equal(logits[:, 0], np.asarray(params["logits"])[[1 + 2, 1 + 1]])


def test_eager_jit_and_vmap_agree_exactly(tabular):
    lm, params = tabular
    tokens = np.asarray([[0, 1, 2, 0], [2, 2, 1, 1], [1, 0, 0, 2]])
    mask = np.asarray([[True, True, True, True], [False, True, False, True], [True, False, True, True]])
    eager, tables = np.asarray(lm.apply(params, tokens, mask=mask)[0]), np.asarray(params["logits"])

    @jax.jit
    def compiled(tables, tokens, mask):
        def logits(table, tokens, mask):
            return lm.apply({"logits": table}, tokens, mask=mask)[0]

        rows = jax.vmap(lambda tokens, mask: logits(tables[0], tokens[None], mask[None])[0])(tokens, mask)
        return logits(tables[0], tokens, mask), rows, jax.vmap(logits, in_axes=(0, None, None))(tables, tokens, mask)

    plain, rows, both = compiled(np.stack([tables, -2 * tables]), tokens, mask)
    np.testing.assert_array_equal(plain, eager)
    np.testing.assert_array_equal(rows, eager)
    np.testing.assert_array_equal(both, np.stack([eager, -2 * eager]))


def test_models_of_one_configuration_are_equal_and_of_two_are_not():
    assert TabularLM(3, 4) == TabularLM(3, 4) and hash(TabularLM(3, 4)) == hash(TabularLM(3, 4))
    assert TabularLM(3, 4) != TabularLM(4, 3)


def test_init_gives_standard_normal_logits():
    lm = TabularLM(10, 4)
    logits = lm.init(jax.random.key(0))["logits"]
    assert logits.shape == (1111, 10)
    assert abs(float(logits.mean())) < 4 / np.sqrt(11110) and abs(float(logits.var()) - 1) < 4 * np.sqrt(2 / 11110)


@pytest.mark.parametrize(("vocab_size", "horizon"), [(0, 3), (3, 0), (-1, 2), (10, 9)])
def test_impossible_and_enormous_tables_are_refused(vocab_size, horizon):
    with pytest.raises(ValueError, match=r"at least 1|at most 10000000 prefixes"):
        TabularLM(vocab_size, horizon)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (jnp.zeros(3, int), None, r"\[batch, time\].*int32\[3\]"),
        (jnp.zeros((2, 3)), None, "integers.*float32"),
        (jnp.full((2, 3), 3), None, r"\[0, 3\).*from 3 to 3"),
        (jnp.full((2, 3), -1), None, r"\[0, 3\).*from -1 to -1"),
        (jnp.zeros((2, 3), int), jnp.ones((2, 2), bool), r"bool\[2, 3\].*bool\[2, 2\]"),
        (jnp.zeros((2, 3), int), jnp.ones((2, 3)), r"bool\[2, 3\].*float32\[2, 3\]"),
    ],
)
def test_wrong_tokens_and_masks_are_named(tabular, tokens, mask, message):
    lm, params = tabular
    with pytest.raises(ValueError, match=message):
        lm.apply(params, tokens, mask=mask)


def test_tokens_outside_the_vocabulary_are_welcome_where_they_are_masked(tabular):
    lm, params = tabular
    mask = jnp.asarray([[False, True]])
    strange, _ = lm.apply(params, jnp.asarray([[-100, 1]]), mask=mask)
    usual, _ = lm.apply(params, jnp.asarray([[0, 1]]), mask=mask)
    np.testing.assert_array_equal(strange, usual)
