import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.extend.core import jaxprs_in_params

from jaxrl_llm.objectives.logprobs import (
    entropy,
    fused_token_log_probs,
    sequence_log_prob,
    token_log_probs,
)
from tests.conftest import log_softmax

LOGITS = np.random.default_rng(0).normal(size=(2, 5, 7)) * 4
TOKENS = np.random.default_rng(1).integers(0, 7, (2, 5))
compiled = jax.jit(token_log_probs)


def taken(logits, tokens):
    return np.take_along_axis(log_softmax(logits), np.asarray(tokens)[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
def test_is_the_log_softmax_of_the_token_for_any_leading_shape(shape):
    rng = np.random.default_rng(len(shape))
    logits, tokens = rng.normal(size=(*shape, 7)) * 4, rng.integers(0, 7, shape)
    result = compiled(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens))
    assert result.shape == shape and result.dtype == jnp.float32
    np.testing.assert_allclose(result, taken(logits, tokens), rtol=1e-6, atol=1e-6)


@given(hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-1e4, 1e4, width=32)), st.integers(0, 4))
def test_any_finite_logits_give_finite_log_probabilities_that_are_never_positive(logits, token):
    result = compiled(logits, np.full((2, 3), token))
    np.testing.assert_allclose(result, taken(logits, np.full((2, 3), token)), rtol=1e-6, atol=2e-3)  # 1e4 · float32's ε
    assert np.isfinite(result).all() and (result <= 0).all()


def test_eager_jit_and_vmap_agree():
    logits, tokens = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TOKENS)
    eager = token_log_probs(logits, tokens)
    np.testing.assert_allclose(compiled(logits, tokens), eager, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(token_log_probs)(logits, tokens), eager, rtol=1e-6)


def test_minus_infinity_is_probability_zero_and_leaves_the_others_their_distribution():
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0], [0.0, -jnp.inf, 1.0]])
    result = token_log_probs(logits, jnp.asarray([1, 2]))
    assert result[0] == -jnp.inf
    np.testing.assert_allclose(result[1], -np.log1p(np.exp(-1)), rtol=1e-6)


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
    gradient = jax.grad(lambda logits: compiled(logits, jnp.asarray(TOKENS)).sum())(jnp.asarray(LOGITS, jnp.float32))
    np.testing.assert_allclose(gradient, np.eye(7)[TOKENS] - np.exp(log_softmax(LOGITS)), atol=1e-6)


@pytest.mark.parametrize("token", [0, 1])
def test_gradient_at_minus_infinite_logits_is_finite(token):
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0]])
    gradient = jax.grad(lambda logits: compiled(logits, jnp.asarray([token])).sum())(logits)
    np.testing.assert_allclose(gradient[0], np.eye(3)[token] - np.exp([-np.log1p(np.e), -np.inf, -np.log1p(1 / np.e)]))


@pytest.mark.parametrize(
    ("logits", "tokens", "message"),
    [
        (jnp.zeros((2, 5, 7)), jnp.zeros((2, 4), int), r"\[2, 5\].*\[2, 4\]"),
        (jnp.zeros((2, 5, 7)), jnp.zeros((5,), int), r"\[2, 5\].*\[5\]"),
        (jnp.zeros(()), jnp.zeros((), int), "shape"),
        (jnp.zeros((2, 5, 7)), jnp.zeros((2, 5)), "integer.*float32"),
        (jnp.zeros((2, 5, 7), int), jnp.zeros((2, 5), int), "floating.*int32"),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(logits, tokens, message):
    with pytest.raises(ValueError, match=message):
        token_log_probs(logits, tokens)


# Entropy and sequences ------------------------------------------------------------------------------------------------


def test_entropy_by_hand_and_at_its_limits():
    logits = jnp.asarray([[0.0] * 4, [jnp.log(0.9), jnp.log(0.1), -jnp.inf, -jnp.inf], [-jnp.inf] * 4, [1e4, 0, 0, 0]])
    expected = [np.log(4), -0.9 * np.log(0.9) - 0.1 * np.log(0.1), 0, 0]
    np.testing.assert_allclose(entropy(logits), expected, atol=1e-6)
    assert np.isfinite(jax.grad(lambda z: entropy(z).sum())(logits)).all()


@pytest.mark.parametrize("left", [True, False])
def test_the_log_probability_of_a_sequence_does_not_see_its_padding(left):
    logits, tokens = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TOKENS)
    expected = taken(LOGITS, TOKENS).sum(axis=1)
    np.testing.assert_allclose(sequence_log_prob(logits, tokens), expected, rtol=1e-6)
    side = (2, 0) if left else (0, 2)
    padded = jnp.pad(logits, ((0, 0), side, (0, 0)), constant_values=-jnp.inf)
    mask = jnp.pad(jnp.ones(tokens.shape, bool), ((0, 0), side))
    outside = jnp.pad(tokens, ((0, 0), side), constant_values=-1)
    np.testing.assert_allclose(sequence_log_prob(padded, outside, mask), expected, rtol=1e-6)
    gradient = jax.grad(lambda z: sequence_log_prob(z, outside, mask).sum())(padded)
    assert np.isfinite(gradient).all() and (gradient[~mask] == 0).all()


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


@pytest.mark.parametrize("chunk_size", [1, 10, 50, 103, 5000, None])
def test_fused_equals_plain_in_values_and_gradients_for_any_chunk(chunk_size):
    hidden, unembedding = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(UNEMBEDDING, jnp.float32)
    tokens = jnp.asarray(WORDS, jnp.int32)
    fused = weighted(lambda h, w: fused_token_log_probs(h, w, tokens, chunk_size=chunk_size))(hidden, unembedding)
    plain = weighted(plain_form)(hidden, unembedding)
    for one, other in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_fused_in_float64():
    with jax.enable_x64(True):
        tokens = jnp.asarray(WORDS)
        fused = weighted(lambda h, w: fused_token_log_probs(h, w, tokens, chunk_size=10))(HIDDEN, UNEMBEDDING)
        plain = weighted(plain_form)(jnp.asarray(HIDDEN), jnp.asarray(UNEMBEDDING))
        for one, other in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
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


def test_fused_closed_form_is_the_gradient_of_the_plain_form():
    hidden, unembedding = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(UNEMBEDDING, jnp.float32)
    found = fused_token_log_probs.grad(hidden, unembedding, jnp.asarray(WORDS, jnp.int32), chunk_size=10)
    expected = jax.grad(lambda h, w: plain_form(h, w).sum(), argnums=(0, 1))(hidden, unembedding)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_fused_never_holds_the_logits_of_all_places():
    """No array in forward or backward is as large as [batch, time, vocab]."""
    hidden, unembedding, tokens = jnp.zeros((4, 64, 8)), jnp.zeros((5000, 8)), jnp.zeros((4, 64), jnp.int32)
    step = jax.grad(lambda h, w: fused_token_log_probs(h, w, tokens, chunk_size=100).sum(), argnums=(0, 1))
    assert largest_array(jax.make_jaxpr(step)(hidden, unembedding).jaxpr) <= 5000 * 8 < 4 * 64 * 5000
    plain = jax.grad(lambda h, w: token_log_probs(h @ w.T, tokens).sum())
    assert largest_array(jax.make_jaxpr(plain)(hidden, unembedding).jaxpr) >= 4 * 64 * 5000


def largest_array(jaxpr):
    """The number of elements of the largest value of a program, in its loops too."""
    sizes = [np.prod(variable.aval.shape) for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [largest_array(each) for equation in jaxpr.eqns for each in jaxprs_in_params(equation.params)]
    return max([*sizes, *inner], default=0)


@pytest.mark.parametrize(
    ("hidden", "unembedding", "tokens", "settings", "message"),
    [
        (
            (2, 3, 4),
            (9, 5),
            (2, 3),
            {},
            r"unembedding must be \[vocab, width\] = \[vocab, 4\] as in hidden, but has the shape \[9, 5\]",
        ),
        (
            (2, 3, 4),
            (9, 4),
            (3, 2),
            {},
            r"tokens must be \[\*places\] = \[2, 3\] as in hidden, but has the shape \[3, 2\]",
        ),
        ((2, 3, 4), (9, 4), (2, 3), {"chunk_size": 0}, "chunk_size must be at least 1, but is 0"),
    ],
)
def test_fused_bad_input_is_named(hidden, unembedding, tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        fused_token_log_probs(jnp.zeros(hidden), jnp.zeros(unembedding), jnp.zeros(tokens, jnp.int32), **settings)


def test_fused_tokens_outside_the_vocabulary():
    hidden, unembedding = jnp.ones((2, 4)), jnp.ones((9, 4))
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 9\), but one is 9"):
        fused_token_log_probs(hidden, unembedding, jnp.asarray([1, 9]))
    result = jax.jit(fused_token_log_probs)(hidden, unembedding, jnp.asarray([1, 9]))
    np.testing.assert_allclose(result[0], -np.log(9), rtol=1e-6)
    assert np.isnan(result[1])
