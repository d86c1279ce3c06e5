import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.decoding import thresholds
from jaxrl_llm.decoding.thresholds import HEAD
from tests.conftest import kept_by_top_k, kept_by_top_p, log_softmax

top_k, top_p = jax.jit(thresholds.top_k), jax.jit(thresholds.top_p)
SHAPES = [(1,), (6,), (3, 5), (2, 2, 4), (2, HEAD + 2), (2, 300)]
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 5.0, -50.0, -np.inf]),  # ties, both zeros, removed tokens
    st.floats(-30, 30, width=32, allow_subnormal=False),
)


@st.composite
def rows_of_logits(draw):
    """Logits of one of few shapes (each is compiled), no row of them removed altogether."""
    shape = draw(st.sampled_from(SHAPES))
    if shape[-1] < 10:
        logits = draw(hnp.arrays(np.float32, shape, elements=VALUES))
    else:  # rows that hold few different numbers, as many ties as wanted
        some = draw(hnp.arrays(np.float32, draw(st.integers(1, 30)), elements=VALUES))
        rng = np.random.default_rng(draw(st.integers(0, 2**20)))
        logits = rng.choice(some, shape)
        logits += np.float32(draw(st.sampled_from([0, 0, 1]))) * rng.normal(size=shape).astype(np.float32)
    dead = (logits == -np.inf).all(axis=-1)
    logits[dead, 0] = draw(st.floats(-5, 5, width=32, allow_subnormal=False))
    return logits


def rows(logits, numbers):
    """Each row with its number."""
    numbers = np.broadcast_to(numbers, logits.shape[:-1])
    return zip(logits.reshape(-1, logits.shape[-1]), numbers.reshape(-1), strict=True)


def kept(logits, threshold):
    return np.asarray(logits >= np.asarray(threshold)[..., None]).reshape(-1, logits.shape[-1])


def assert_nucleus(logits, numbers, result, *, ulp):
    """The nucleus of the exact sums, up to the rounding of the mass: between those of p (1 ± ulp)."""
    for (row, p), found in zip(rows(logits, numbers), kept(logits, result), strict=True):
        least, most = kept_by_top_p(row, float(p) * (1 - ulp)), kept_by_top_p(row, float(p) * (1 + ulp))
        assert (found >= least).all() and (found <= most).all(), (least.sum(), found.sum(), most.sum())


def test_what_is_too_long_for_the_sorted_head_is_among_the_tested_shapes():
    assert any(shape[-1] > 2 * HEAD for shape in SHAPES)


@settings(max_examples=200)
@given(rows_of_logits(), st.data())
def test_top_k_is_the_kth_of_the_sorted_row(logits, data):
    number = st.one_of(st.integers(1, 8), st.integers(1, logits.shape[-1] + 3), st.just(2**31 - 1))
    k = data.draw(hnp.arrays(np.int32, logits.shape[:-1], elements=number))
    result = top_k(logits, k)
    assert result.shape == logits.shape[:-1] and result.dtype == jnp.float32
    for (row, number), found in zip(rows(logits, k), kept(logits, result), strict=True):
        np.testing.assert_array_equal(found, kept_by_top_k(row, number))


@settings(max_examples=200)
@given(rows_of_logits(), st.data())
def test_top_p_is_the_nucleus_of_the_sorted_row(logits, data):
    number = st.one_of(st.floats(2**-10, 1, width=32), st.sampled_from(np.float32([1e-30, 0.5, 0.999999, 1])))
    p = data.draw(hnp.arrays(np.float32, logits.shape[:-1], elements=number))
    result = top_p(logits, p)
    assert result.shape == logits.shape[:-1] and result.dtype == jnp.float32
    assert_nucleus(logits, p, result, ulp=1e-6)
    assert kept(logits, result).any(axis=-1).all()


@pytest.mark.parametrize("k", [1, HEAD - 1, HEAD, HEAD + 1, 500, 999, 1000, 5000])
def test_top_k_on_both_sides_of_the_sorted_head(k):
    logits = np.random.default_rng(k).normal(size=(3, 1000)).astype(np.float32)
    logits[1] = np.round(logits[1], 1)  # ties
    logits[2, 400:] = -np.inf
    for row, threshold in zip(logits, top_k(logits, jnp.int32(k)), strict=True):
        assert threshold == np.sort(row)[::-1][min(k, 1000) - 1]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_top_p_on_both_sides_of_the_sorted_head(p):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 1000)) * [[0.3], [1], [3], [8]]).astype(np.float32)
    logits[1] = np.round(logits[1], 1)
    result = top_p(logits, jnp.float32(p))
    assert_nucleus(logits, p, result, ulp=1e-6)
    assert np.isin(result, logits).all(), "the threshold is one of the logits"
    if p == 0.5:
        sizes = kept(logits, result).sum(axis=-1)
        assert sizes[0] > HEAD > sizes[3], "both ways are taken"


def test_both_zeros_tie_beyond_the_head():
    logits = np.where(np.arange(600) % 2 == 0, np.float32(0.0), np.float32(-0.0))[None]
    logits[0, 500:] = -1
    for k, count in [(1, 500), (200, 500), (499, 500), (501, 600)]:
        assert kept(logits, top_k(logits, jnp.int32(k))).sum() == count
    assert kept(logits, top_p(logits, jnp.float32(0.5))).sum() == 500


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_smallest_and_largest_floats_are_told_apart_beyond_the_head(sign):
    finfo = np.finfo(np.float32)
    scale = np.concatenate([np.full(200, finfo.max), np.full(200, 1), np.full(200, finfo.tiny)])
    logits = np.sort((sign * scale).astype(np.float32))[::-1][None].copy()
    for k in (150, 200, 201, 400, 401, 600):
        assert top_k(logits, jnp.int32(k)) == logits[0, k - 1]


def test_float64_is_resolved_to_its_last_bit():
    vocab = 600
    with jax.enable_x64(True):
        logits = np.nextafter(1.0, 2) ** np.arange(vocab)[None]  # neighbours, one ulp apart
        assert len(np.unique(logits)) == vocab and len(np.unique(logits.astype(np.float32))) == 1
        for k in (1, 7, vocab // 2, vocab - 1):
            threshold = top_k(logits, jnp.int32(k))
            assert threshold.dtype == jnp.float64 and threshold == np.sort(logits[0])[::-1][k - 1]
        spread = np.random.default_rng(3).normal(size=(1, vocab))
        for p in (0.3, 0.9):
            assert_nucleus(spread, p, top_p(spread, p), ulp=1e-14)


def test_bfloat16_logits_are_counted_and_summed_in_float32():
    vocab = 600
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(2, vocab)), jnp.bfloat16)
    exact = np.asarray(logits, np.float64)
    for row, threshold in zip(exact, top_k(logits, jnp.int32(vocab // 2)), strict=True):
        assert threshold == np.sort(row)[::-1][vocab // 2 - 1]
    assert_nucleus(exact, 0.8, top_p(logits, jnp.float32(0.8)), ulp=1e-6)


def test_the_answer_of_a_row_does_not_depend_on_the_other_rows():
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=(4, 1000)) * [[0.1], [1], [5], [20]]).astype(np.float32)
    k, p = np.int32([1, 30, 300, 900]), np.float32([0.2, 0.5, 0.9, 1.0])
    order = np.asarray([2, 0, 3, 1])
    for function, numbers in [(top_k, k), (top_p, p)]:
        together = np.asarray(function(logits, numbers))
        np.testing.assert_array_equal(function(logits[order], numbers[order]), together[order])
        for row in range(4):  # and neither on whether any of them needs the slow way
            alone = function(np.repeat(logits[row : row + 1], 4, axis=0), np.repeat(numbers[row], 4))
            np.testing.assert_array_equal(alone, together[row])


def test_a_row_on_the_edge_of_its_nucleus_stays_there_when_another_row_needs_the_slow_way():
    rng = np.random.default_rng(7)
    logits = (3 * rng.normal(size=(300, 1000))).astype(np.float32)
    mass = np.cumsum(np.exp(log_softmax(np.sort(logits, axis=1)[:, ::-1])), axis=1)
    p = mass[np.arange(300), rng.integers(5, 60, 300)].astype(np.float32)  # where rounding decides
    alone = np.asarray(top_p(logits, p))
    logits[0], p[0] = 0, 0.5
    together = np.asarray(top_p(logits, p))
    np.testing.assert_array_equal(together[1:], alone[1:])
    assert together[0] == 0


def test_p_of_one_gives_no_threshold():
    logits = np.float32([[0, -1e4, -np.inf], [3, 3, -200]])
    np.testing.assert_array_equal(top_p(logits, jnp.float32(1)), [-np.inf, -np.inf])
