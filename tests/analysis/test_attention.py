"""Measures of attention against their closed forms, and against the weights of real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.analysis import attention
from tests.conftest import VOCAB


def random_weights(*shape, allowed, seed=0):
    """Rows that sum to 1 over the allowed keys."""
    weights = np.random.default_rng(seed).gamma(0.5, size=shape) * allowed[None, :, None]
    sums = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, sums, out=np.zeros(shape), where=sums > 0)


def uniform(allowed):
    """The same weight on every allowed key, in one layer and head."""
    counts = allowed.sum(axis=-1, keepdims=True)
    return (allowed / np.maximum(counts, 1))[None, :, None]


RAGGED = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], bool)  # none, on the right, on the left


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_entropy_of_n_keys_alike_is_log_n(n):
    np.testing.assert_allclose(attention.entropy(np.full((3, n), 1 / n)), np.log(n), atol=1e-12)


def test_the_entropy_of_one_key_is_zero_and_never_negative_zero():
    entropy = attention.entropy(np.eye(4))
    assert (entropy == 0).all() and not np.signbit(entropy).any()


def test_entropy_of_a_coin_by_hand():
    expected = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(attention.entropy([[0.25, 0.75, 0.0]]), [expected], rtol=1e-12)


def test_normalised_entropy_is_one_for_keys_alike_whatever_their_number():
    allowed = attention.allowed_keys(RAGGED, causal=True)
    values = attention.normalised_entropy(uniform(allowed), allowed)[0, :, 0]
    counts = allowed.sum(axis=-1)
    np.testing.assert_allclose(values[counts > 1], 1, atol=1e-12)
    assert (values[counts <= 1] == 0).all()


def test_allowed_keys_are_valid_and_not_behind():
    assert attention.allowed_keys(RAGGED).sum() == 25 + 9 + 9
    causal = attention.allowed_keys(RAGGED, causal=True)
    assert causal.sum() == 15 + 6 + 6 and not np.triu(causal, 1).any()
    cross = attention.allowed_keys(RAGGED[:, :2], RAGGED)
    assert cross.shape == (3, 2, 5) and cross[1].tolist() == [[1, 1, 1, 0, 0]] * 2 and not cross[2].any()


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ([0, 1, 2, 3, 4], "own"),
        ([1, 0, 1, 2, 3], "previous"),
        ([1, 2, 3, 4, 3], "next"),
        ([0, 0, 0, 0, 0], "first"),
        ([4, 4, 4, 4, 4], "last"),
        ([2, 3, 0, 1, 2], "other"),
    ],
)
def test_a_head_that_looks_at_one_kind_of_place(keys, kind):
    queries = np.ones((1, 5), bool)
    found = attention.shares(np.eye(5)[keys][None, None, None], attention.allowed_keys(queries))
    ends = {"first": [0, 1], "last": [3, 4], "previous": [0], "next": [4], "own": [], "other": [2]}[kind]
    inner = [query for query in range(5) if query not in ends]  # where it is of no other kind too
    assert getattr(found, kind)[0, 0, 0, inner].tolist() == [1] * len(inner)


@pytest.mark.parametrize("causal", [False, True])
def test_shares_sum_to_one_and_the_ends_are_those_of_the_valid_part(causal):
    allowed = attention.allowed_keys(RAGGED, causal=causal)
    weights = random_weights(2, 3, 4, 5, 5, allowed=allowed)
    found = attention.shares(weights, allowed)
    expected = np.broadcast_to(RAGGED[None, :, None], (2, 3, 4, 5))
    np.testing.assert_allclose(np.sum(found, axis=0), expected, atol=1e-12)
    np.testing.assert_allclose(found.first[:, 2, :, 4], weights[:, 2, :, 4, 2])  # padded on the left
    np.testing.assert_allclose(found.last[:, 1, :, 0], weights[:, 1, :, 0, 2])  # padded on the right
    np.testing.assert_allclose(found.previous[:, 0, :, 1], weights[:, 0, :, 1, 0])  # it is the first one too
    assert not causal or (found.next == 0).all()


def test_means_are_over_each_sequences_own_queries():
    values = np.arange(15.0).reshape(1, 3, 1, 5)
    means = attention.mean_over_queries(values, RAGGED)
    np.testing.assert_allclose(means[0, :, 0], [2, 6, 13])


def test_weights_of_a_model_have_these_properties(neural):
    """Rows sum to 1 over what the library says a query may look at, and nowhere else."""
    lm, params = neural
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, RAGGED.shape))
    weights = jax.jit(lm.attention)(params, tokens, mask=jnp.asarray(RAGGED))
    allowed = attention.allowed_keys(RAGGED, causal=True)
    values = attention.normalised_entropy(weights, allowed)
    assert (values >= 0).all() and (values <= 1 + 1e-6).all() and (values > 0.01).any()
    np.testing.assert_allclose(
        np.sum(attention.shares(weights, allowed), axis=0),
        np.broadcast_to(RAGGED[None, :, None], values.shape),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: attention.entropy([[0.5, 0.2]]), "must sum to 1"),
        (lambda: attention.entropy([[2.0, -1.0]]), "must sum to 1"),
        (lambda: attention.entropy([[np.nan, 1.0]]), "must sum to 1"),
        (lambda: attention.entropy([1.0]), r"\[\.\.\., query, key\]"),
        (lambda: attention.allowed_keys(RAGGED, RAGGED, causal=True), "leave out keys"),
        (lambda: attention.allowed_keys(RAGGED[0]), r"\[batch, time\]"),
        (lambda: attention.shares(np.ones((1, 3, 1, 5, 1)), np.ones((3, 5, 1), bool)), "as many keys as queries"),
        (
            lambda: attention.normalised_entropy(
                uniform(attention.allowed_keys(RAGGED)), attention.allowed_keys(RAGGED, causal=True)
            ),
            "not allowed must have weight 0",
        ),
        (lambda: attention.normalised_entropy(np.eye(5), attention.allowed_keys(RAGGED)), r"\[layer, batch"),
        (
            lambda: attention.mean_over_queries(np.ones((1, 2, 1, 2)), np.eye(2)[[0, 0]] * [[1], [0]]),
            "but sequence 1 has none",
        ),
        (lambda: attention.mean_over_queries(np.ones((1, 2, 1, 2)), np.ones((2, 3))), r"\[layer, batch"),
    ],
)
def test_what_is_no_attention_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
