import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.extend.core import jaxprs_in_params

from jaxrl_llm.objectives.logprobs import entropy, fused_token_log_probs, sequence_log_prob, token_log_probs
from tests.conftest import log_softmax

LOGITS = np.random.default_rng(0).normal(size=(2, 5, 7)) * 4
TOKENS = np.random.default_rng(1).integers(0, 7, (2, 5))
compiled, compiled_entropy = jax.jit(token_log_probs), jax.jit(entropy)
slope = jax.jit(jax.grad(lambda logits, tokens: token_log_probs(logits, tokens).sum()))


def taken(logits, tokens):
    return np.take_along_axis(log_softmax(logits), np.asarray(tokens)[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
def test_is_the_log_softmax_of_the_token_for_any_leading_shape(shape):
    rng = np.random.default_rng(len(shape))
    logits, tokens = rng.normal(size=(*shape, 7)) * 4, rng.integers(0, 7, shape)
    result = compiled(np.float32(logits), tokens)
    assert result.shape == shape and result.dtype == jnp.float32
    np.testing.assert_allclose(result, taken(logits, tokens), rtol=1e-6, atol=1e-6)


@given(hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-1e4, 1e4, width=32)), st.integers(0, 4))
def test_any_finite_logits_give_finite_log_probabilities_that_are_never_positive(logits, token):
    result = compiled(logits, np.full((2, 3), token))
    np.testing.assert_allclose(result, taken(logits, np.full((2, 3), token)), rtol=1e-6, atol=2e-3)  # 1e4 · float32's ε
    assert np.isfinite(result).all() and (result <= 0).all()


def test_minus_infinity_is_probability_zero_and_leaves_the_others_their_distribution_and_a_finite_gradient():
    logits, tokens = np.float32([[0.0, -np.inf, 1.0]] * 3), np.array([0, 1, 2])
    result = compiled(logits, tokens)
    assert result[1] == -np.inf
    np.testing.assert_allclose(result[2], -np.log1p(np.exp(-1)), rtol=1e-6)
    expected = np.eye(3) - np.exp([-np.log1p(np.e), -np.inf, -np.log1p(1 / np.e)])
    np.testing.assert_allclose(slope(logits, tokens)[:2], expected[:2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_widened_before_the_sum(dtype):
    logits = jnp.asarray(LOGITS, dtype)
    result = compiled(logits, jnp.asarray(TOKENS))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, taken(logits.astype(jnp.float32), TOKENS), rtol=1e-6, atol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        result = compiled(jnp.asarray(LOGITS), jnp.asarray(TOKENS))
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, taken(LOGITS, TOKENS), rtol=1e-13)


def test_gradient_is_one_hot_minus_softmax():
    np.testing.assert_allclose(
        slope(np.float32(LOGITS), TOKENS), np.eye(7)[TOKENS] - np.exp(log_softmax(LOGITS)), atol=1e-6
    )


@pytest.mark.parametrize("offset", [0, 3000, -1e6])
def test_an_offset_of_all_logits_costs_no_digits(offset):
    logits = np.round(np.float32(LOGITS) * 16) / 16  # which the sum with the offset holds exactly
    found, expected = compiled(np.float32(logits + offset), TOKENS), taken(logits, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope(np.float32(logits + offset), TOKENS), slope(logits, TOKENS), atol=1e-6)


def test_a_log_probability_near_zero_is_not_zero():
    assert float(compiled(np.float32([[100, 85, 80]]), np.array([0]))[0]) == pytest.approx(-3.1e-7, abs=6e-8)


# Entropy and sequences ------------------------------------------------------------------------------------------------


def test_entropy_by_hand_and_at_its_limits():
    logits = np.float32([[0.0] * 4, [np.log(0.9), np.log(0.1), -np.inf, -np.inf], [-np.inf] * 4, [1e4, 0, 0, 0]])
    expected = [np.log(4), -0.9 * np.log(0.9) - 0.1 * np.log(0.1), 0, 0]
    np.testing.assert_allclose(compiled_entropy(logits), expected, atol=1e-6)
    assert np.isfinite(jax.jit(jax.grad(lambda z: entropy(z).sum()))(logits)).all()


def test_the_log_probability_of_a_sequence_does_not_see_its_padding():
    logits, expected = np.float32(LOGITS), taken(LOGITS, TOKENS).sum(axis=1)

    @jax.jit
    def value_and_slope(logits, tokens, mask):
        value, pull_back = jax.vjp(lambda logits: sequence_log_prob(logits, tokens, mask), logits)
        return value, pull_back(jnp.ones_like(value))[0]

    np.testing.assert_allclose(jax.jit(sequence_log_prob)(logits, TOKENS), expected, rtol=1e-6)
    for side in ((2, 0), (0, 2)):
        padded = np.pad(logits, ((0, 0), side, (0, 0)), constant_values=-np.inf)
        mask = np.pad(np.ones(TOKENS.shape, bool), ((0, 0), side))
        outside = np.pad(TOKENS, ((0, 0), side), constant_values=-1)
        value, gradient = value_and_slope(padded, outside, mask)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert np.isfinite(gradient).all() and (np.asarray(gradient)[~mask] == 0).all()


# The fused form -------------------------------------------------------------------------------------------------------

HIDDEN = np.random.default_rng(2).normal(size=(2, 5, 16))
UNEMBEDDING = np.random.default_rng(3).normal(size=(103, 16))
WORDS = np.random.default_rng(4).integers(0, 103, (2, 5))
WEIGHTS = np.random.default_rng(5).normal(size=(2, 5))


def plain_form(hidden, unembedding):
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding)
    return token_log_probs(logits, jnp.asarray(WORDS, jnp.int32))


def weighted(form):
    """A sum in which every place has a weight of its own, some negative; its value and gradients."""

    def total(hidden, unembedding):
        log_probs = form(hidden, unembedding)
        return (jnp.asarray(WEIGHTS, log_probs.dtype) * log_probs).sum(), log_probs

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@functools.cache
def plain(dtype):
    """The values and gradients of the plain form."""
    with jax.enable_x64(dtype == np.float64):
        return jax.tree.map(np.asarray, weighted(plain_form)(HIDDEN.astype(dtype), UNEMBEDDING.astype(dtype)))


@pytest.mark.parametrize("chunk_size", [1, 10, 103, 5000, None])
def test_fused_equals_plain_in_values_and_gradients_for_any_chunk(chunk_size):
    fused = weighted(lambda h, w: fused_token_log_probs(h, w, WORDS.astype(np.int32), chunk_size=chunk_size))
    found = fused(np.float32(HIDDEN), np.float32(UNEMBEDDING))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain(np.float32)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_fused_in_float64():
    with jax.enable_x64(True):
        fused = weighted(lambda h, w: fused_token_log_probs(h, w, WORDS, chunk_size=10))(HIDDEN, UNEMBEDDING)
        for one, other in zip(jax.tree.leaves(fused), jax.tree.leaves(plain(np.float64)), strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_fused_accumulates_bfloat16_in_float32():
    narrow = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(UNEMBEDDING, jnp.bfloat16)
    (value, log_probs), gradients = weighted(
        lambda h, w: fused_token_log_probs(h, w, jnp.asarray(WORDS, jnp.int32), chunk_size=10)
    )(*narrow)
    wide = [each.astype(jnp.float32) for each in narrow]
    (_, expected), exact = weighted(plain_form)(*wide)
    assert log_probs.dtype == value.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, expected, atol=1e-4)
    for gradient, other in zip(gradients, exact, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(jnp.float32), other, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize("chunk_size", [100, None])
def test_no_fused_log_probability_is_above_zero(chunk_size):
    """At logits near 83, whose rounding errors are far larger than the log-probabilities."""
    unembedding = np.random.default_rng(0).normal(0, 1, (1000, 768)).astype(np.float32)
    hidden, tokens = unembedding[:64] * np.float32(3 / 768**0.5), np.arange(64)
    fused = jax.jit(functools.partial(fused_token_log_probs, chunk_size=chunk_size))(hidden, unembedding, tokens)
    assert (fused <= 0).all()
    exact = taken(hidden.astype(np.float64) @ unembedding.T.astype(np.float64), tokens)
    np.testing.assert_allclose(fused, exact, atol=2e-4)  # the rounding of the matrix product


def test_fused_never_holds_the_logits_of_all_places():
    """No array in forward or backward is as large as [batch, time, vocab]."""
    hidden, unembedding = np.zeros((4, 64, 8), np.float32), np.zeros((5000, 8), np.float32)
    tokens = np.zeros((4, 64), np.int32)
    step = jax.grad(lambda h, w: fused_token_log_probs(h, w, tokens, chunk_size=100).sum(), argnums=(0, 1))
    assert largest_array(jax.make_jaxpr(step)(hidden, unembedding).jaxpr) <= 5000 * 8 < 4 * 64 * 5000
    plain = jax.grad(lambda h, w: token_log_probs(h @ w.T, tokens).sum())
    assert largest_array(jax.make_jaxpr(plain)(hidden, unembedding).jaxpr) >= 4 * 64 * 5000


def largest_array(jaxpr):
    """The number of elements of the largest value of a program, in its loops too."""
    sizes = [np.prod(variable.aval.shape) for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [largest_array(each) for equation in jaxpr.eqns for each in jaxprs_in_params(equation.params)]
    return max([*sizes, *inner], default=0)


def test_fused_chunks_of_no_token_and_tokens_outside_the_vocabulary():
    hidden, unembedding = np.ones((2, 4), np.float32), np.ones((9, 4), np.float32)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, but is 0"):
        fused_token_log_probs(hidden, unembedding, np.asarray([1, 2]), chunk_size=0)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 9\), but one is 9"):
        fused_token_log_probs(hidden, unembedding, np.asarray([1, 9]))
    result = jax.jit(fused_token_log_probs)(hidden, unembedding, np.asarray([1, 9]))
    np.testing.assert_allclose(result[0], -np.log(9), rtol=1e-6)
    assert np.isnan(result[1])
