import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import core
from tests.conftest import assert_follows, log_softmax

DRAWS = 20_000
KEYS = jax.random.split(jax.random.key(0), DRAWS)
greedy = jax.jit(core.greedy)


@functools.partial(jax.jit, static_argnames="distinct")
def sample(keys, logits, *, distinct=None):
    """A draw of each key, or several distinct ones, from its row of logits or from the only one."""
    logits = jnp.broadcast_to(logits, (len(keys), logits.shape[-1]))
    return core.sample(keys, logits) if distinct is None else core.sample_distinct(keys, logits, distinct)


def draws_of(logits, keys=KEYS):
    return np.asarray(sample(keys, logits))


@pytest.mark.parametrize("vocab", [2, 3, 4, 10, 23])
def test_sample_follows_the_softmax_for_squares_and_others(vocab):
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    tokens = draws_of(logits)
    assert tokens.dtype == np.int32
    assert_follows(tokens, np.exp(log_softmax(logits)))


def test_sample_of_a_vocabulary_of_one():
    np.testing.assert_array_equal(draws_of(np.float32([-3])), 0)


@pytest.mark.parametrize("offset", [0, 500, -500, 3e38])
def test_sample_does_not_mind_an_offset(offset):
    np.testing.assert_array_equal(
        draws_of(np.float32([offset, offset, -np.inf, offset])), draws_of(np.float32([0, 0, -np.inf, 0]))
    )


@pytest.mark.parametrize("impossible", [[0], [9], [0, 1, 2], [3, 4, 5, 9], [0, 2, 4, 6, 8], list(range(9))])
def test_impossible_tokens_are_never_drawn(impossible):
    logits = np.random.default_rng(1).normal(size=10).astype(np.float32)
    logits[impossible] = -np.inf
    tokens = draws_of(logits)
    assert not np.isin(tokens, impossible).any()
    if len(impossible) < 9:
        assert_follows(tokens, np.exp(log_softmax(logits)))


def shares(weights):
    """The share of all points for which `invert` gives each index; the ends of the intervals are found by bisection."""
    count, invert = len(weights), jax.jit(core.invert)
    low, high = [0] * count, [2**63] * count  # the first point of an index above i lies between
    while low != high:
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        digits = np.int32([[min(point, 2**63 - 1) >> bits & mask for bits, mask in SHIFTS] for point in middle])
        beyond = np.asarray(invert(np.tile(np.float32(weights), (count, 1)), digits)) > np.arange(count)
        low = [a if above else min(m + 1, b) for a, b, m, above in zip(low, high, middle, beyond, strict=True)]
        high = [m if above else b for b, m, above in zip(high, middle, beyond, strict=True)]
    return np.float64([(b - a) / 2**63 for a, b in itertools.pairwise([0, *high])])


SHIFTS = ((40, 2**23 - 1), (20, 2**20 - 1), (0, 2**20 - 1))
RARE = {
    "first": [1e-12, 1e-9, 0.5, 0.5],
    "last": [0.5, 0.5, 1e-9, 1e-12],
    "between": [0.3, 1e-12, 0.7, 1e-9, 0.2, 0],
    "after many": [*[0.01] * 200, 1e-9, 1e-12, 1e-15],
    "no other": [0, 1e-30, 0],
    "of all sizes": [*10.0 ** np.random.default_rng(0).uniform(-16, 0, 100)],
}


@pytest.mark.parametrize("weights", RARE.values(), ids=RARE)
def test_every_index_has_its_share_of_the_points(weights):
    exact = np.float64(np.float32(weights)) / np.float64(np.float32(weights)).sum()
    np.testing.assert_allclose(shares(weights), exact, rtol=3e-5, atol=2.0**-63)


noise_of = jax.jit(core.gumbel_of, static_argnums=2)


def noise_at(point):
    """The noise of a point in [0, 2^64)."""
    return float(noise_of(np.uint32(point >> 32), np.uint32(point & (2**32 - 1)), jnp.float32))


@pytest.mark.parametrize("value", [-3.5, -2.0, -0.5, 0.0, 0.36, 0.37, 1.0, 8.0, 15.0, 20.7, 27.6, 34.5, 41.0])
def test_gumbel_noise_has_its_share_of_the_points_above_a_value(value):
    """Also of values that a token of probability 1e-9, 1e-12 or 1e-15 needs."""
    low, high = 0, 2**64  # the first point whose noise is above
    while low != high:
        middle = (low + high) // 2
        low, high = (low, middle) if noise_at(middle) > value else (middle + 1, high)
    below, above = math.exp(-math.exp(-value)), -math.expm1(-math.exp(-value))
    np.testing.assert_allclose([low / 2**64, (2**64 - low) / 2**64], [below, above], rtol=1e-5, atol=2.0**-64)


def test_gumbel_noise_is_that_of_jax_but_finer():
    key = jax.random.key(3)
    plain = np.asarray(jax.random.gumbel(key, (1000,)), np.float64)
    fine = np.asarray(core.gumbel(key[None], (1000,), jnp.float32)[0], np.float64)
    uniform = np.exp(-np.exp(-np.stack([plain, fine])))
    np.testing.assert_allclose(*uniform, rtol=0, atol=2.0**-22)


@pytest.mark.parametrize("word", [0, 1, 2**32 - 1])
def test_a_coin_of_a_small_probability_needs_more_than_a_small_number(monkeypatch, word):
    """With the words 0, uniform numbers are the smallest: below 2^-56."""
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, word, dtype))
    probability = np.float32([[0, 1e-20, 2e-17 if word == 0 else 5e-17, 1e-7, 1 - 2.0**-23, 1]])
    expected = [False] * 5 + [True] if word > 1 else [False] * 2 + [True] * 4
    np.testing.assert_array_equal(core.bernoulli(KEYS[:1], probability)[0], expected)


def test_coins_fall_as_often_as_they_should():
    probability = np.float32([0, 0.01, 0.3, 0.99, 1])
    heads = np.asarray(core.bernoulli(KEYS, jnp.broadcast_to(probability, (DRAWS, 5)))).mean(axis=0)
    assert (abs(heads - probability) <= 4 * np.sqrt(probability * (1 - probability) / DRAWS)).all()


def test_very_peaked_and_very_flat_distributions():
    peaked = np.full(1000, -30, np.float32)
    peaked[617] = 0
    np.testing.assert_array_equal(draws_of(peaked), 617)  # all else together has probability 1e-10
    flat = draws_of(np.zeros(1000, np.float32))
    assert_follows(flat, np.full(1000, 1e-3))


def test_rare_tokens_are_drawn_as_often_as_they_should():
    logits = np.log(np.append([1 - 0.005], np.full(999, 0.005 / 999))).astype(np.float32)
    rare = (draws_of(logits) > 0).sum()
    assert abs(rare - 0.005 * DRAWS) < 4 * np.sqrt(0.005 * DRAWS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_drawn_from_as_finely_as_wide_ones(dtype):
    logits = (np.random.default_rng(2).normal(size=23) * 3).astype(dtype)
    np.testing.assert_array_equal(draws_of(logits), draws_of(logits.astype(np.float32)))
    narrow, wide = (sample(KEYS[:100], each, distinct=4) for each in (logits, logits.astype(np.float32)))
    np.testing.assert_array_equal(narrow, wide)


def test_float64_logits():
    with jax.enable_x64(True):
        logits = np.random.default_rng(3).normal(size=7)
        assert_follows(draws_of(logits), np.exp(log_softmax(logits)))


def test_the_draw_of_a_row_is_of_its_key_and_its_logits_alone():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(50, 23)), jnp.float32)
    together = np.asarray(sample(KEYS[:50], logits))
    order = np.random.default_rng(5).permutation(50)
    np.testing.assert_array_equal(sample(KEYS[:50][order], logits[order]), together[order])
    assert len(set(together.tolist())) > 5


def test_two_draws_of_one_row_are_independent():
    first, second = (
        draws_of(np.float32([0, 1, 0.5])),
        draws_of(np.float32([0.3, 0, 1]), jax.random.split(jax.random.key(1), DRAWS)),
    )
    distribution = np.exp(log_softmax([0, 1, 0.5]))[:, None] * np.exp(log_softmax([0.3, 0, 1]))
    assert_follows(3 * first + second, distribution.ravel())


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 7), (2, 3, 23)])
def test_greedy_is_the_first_argmax(shape):
    rng = np.random.default_rng(6)
    for logits in (rng.normal(size=shape), rng.integers(0, 3, shape), np.where(rng.random(shape) < 0.7, -np.inf, 1.0)):
        result = greedy(jnp.asarray(logits, jnp.float32))
        np.testing.assert_array_equal(result, np.argmax(logits, axis=-1))
        assert result.dtype == jnp.int32


def test_greedy_stays_in_the_vocabulary_where_the_logits_are_nan():
    assert 0 <= greedy(jnp.full(5, jnp.nan)) < 5


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sample_distinct_follows_sequential_sampling_without_replacement(count):
    logits = np.float32([0.0, 1.0, -1.0, 0.5])
    tokens = np.asarray(sample(KEYS, logits, distinct=count))
    orders = list(itertools.permutations(range(4), count))
    probabilities, distribution = np.exp(log_softmax(logits)), []
    for order in orders:
        left = 1 - np.cumsum([0, *probabilities[list(order[:-1])]])
        distribution.append(np.prod(probabilities[list(order)] / left))
    index = {order: place for place, order in enumerate(orders)}
    assert_follows([index[tuple(row)] for row in tokens.tolist()], distribution)


def test_sample_distinct_puts_the_possible_tokens_first():
    tokens = np.asarray(sample(KEYS[:200], np.float32([-np.inf, 0.0, -np.inf, 1.0]), distinct=3))
    assert (np.sort(tokens[:, :2], axis=1) == [1, 3]).all() and np.isin(tokens[:, 2], [0, 2]).all()
