import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.objectives.logprobs import token_log_probs
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


def test_minus_infinity_is_probability_zero_and_leaves_the_others_their_law():
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
