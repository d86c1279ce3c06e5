"""Filters and their thresholds, against sorting and against their definitions in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.decoding import transforms
from jaxrl_llm.decoding.transforms import HEAD, Chain, Epsilon, Eta, MinP, Temperature, TopK, TopNSigma, TopP, Typical
from tests.conftest import kept_by_top_k, kept_by_top_p, log_softmax

top_k, top_p = jax.jit(transforms.kth_largest), jax.jit(transforms.nucleus_threshold)
SHAPES = [(1,), (2, 2, 5), (2, HEAD + 2), (2, 300)]
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


@given(rows_of_logits(), st.sampled_from([1, 3, HEAD - 1, HEAD, HEAD + 40]), st.floats(0.05, 1.0))
def test_filters_in_a_chain_keep_what_each_would(logits, k, p):
    chain = Chain((Temperature(0.7), TopK(k), TopP(p, min_tokens_to_keep=2), TopK(2 * k)))
    alone = logits
    for transform in chain.transforms:
        alone = call(transform, alone)
    np.testing.assert_array_equal(call(chain, logits), alone)
    np.testing.assert_array_equal(after(chain, logits), alone)


def test_filters_in_a_chain_sort_the_head_once():
    assert str(jax.make_jaxpr(Chain((TopK(50), TopP(0.9, 2), TopK(9))))(np.zeros((2, 300)))).count("top_k[") == 1
    assert str(jax.make_jaxpr(Chain((TopK(50), Temperature(0.5), TopP(0.9))))(np.zeros((2, 300)))).count("top_k[") == 2


def test_a_chain_applies_what_a_subclass_of_a_filter_overrides():
    class Halved(TopK):
        def __call__(self, logits):
            return super().__call__(logits) / 2

    class Later(TopP):
        def apply(self, state, logits):
            return logits

    logits = np.arange(6.0)[None]
    np.testing.assert_array_equal(call(Chain((Halved(2),)), logits), [[-np.inf] * 4 + [2, 2.5]])
    np.testing.assert_array_equal(after(Chain((Later(0.5),)), logits), logits)


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


# Filters --------------------------------------------------------------------------------------------------------------


LOGITS = np.float32([[2.0, 1.0, 1.0, -1.0, -np.inf], [0.0, 0.0, 0.0, 0.0, 0.0], [-3.0, -0.5, 4.0, 3.5, -0.5]])
WIDE = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
FILTERS = [TopK(1), TopK(2), TopK(400), TopP(0.3), TopP(0.9), TopP(0.995), Chain((TopK(300), TopP(0.9)))]
FILTERS += [MinP(0.05), MinP(1.0), Epsilon(0.002), Epsilon(0.9), Eta(0.01), Eta(0.9), TopNSigma(0.0), TopNSigma(1.5)]
IDENTITIES = [TopK(10**6), TopP(1.0), MinP(0.0), Typical(1.0), Epsilon(0.0), Eta(0.0), TopNSigma(1e6), Temperature(1.0)]
OTHERS = [MinP(0.2), Typical(0.6), Epsilon(0.2), Eta(0.3), TopNSigma(0.8)]
call = jax.jit(lambda transform, logits: transform(logits))
after = jax.jit(lambda chain, logits: chain.apply(((),) * len(chain.transforms), logits))
mass = jax.jit(lambda transform, logits: transform.kept_mass(logits))


@pytest.mark.parametrize("logits", [LOGITS, WIDE], ids=["few", "many"])
@pytest.mark.parametrize("transform", FILTERS, ids=str)
def test_a_filter_removes_or_leaves_alone_and_keeps_at_least_the_most_probable(transform, logits):
    result = np.asarray(call(transform, logits))
    kept = result > -np.inf
    np.testing.assert_array_equal(result[kept], logits[kept])
    assert kept[np.arange(3), logits.argmax(axis=1)].all()
    for row, keeps in zip(logits, kept, strict=True):  # what is kept is above what is not, and ties stand together
        assert row[~keeps & (row > -np.inf)].max(initial=-np.inf) < row[keeps].min()


def steep(vocab):
    """Logits of which most underflow when exponentiated."""
    logits = np.tile(np.linspace(0, -1e4, vocab, dtype=np.float32), (3, 1))
    logits[:, 2] = -np.inf
    return logits


EXTREMES = {"few": LOGITS, "many": WIDE, "one row": LOGITS[1], "few, steep": steep(5), "many, steep": steep(1000)}


@pytest.mark.parametrize("logits", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("transform", IDENTITIES, ids=str)
def test_at_the_end_of_its_range_a_filter_is_the_identity(transform, logits):
    np.testing.assert_array_equal(call(transform, logits), logits)


def test_top_k_and_top_p_keep_what_sorting_keeps():
    numbers = {TopK: (1, 2, 3, 4, 5, 6, 10**6), TopP: (0.01, 0.2, 0.42, 0.6, 0.8, 0.96, 0.999, 1.0)}
    for kind, by_sorting in [(TopK, kept_by_top_k), (TopP, kept_by_top_p)]:
        for number in numbers[kind]:
            expected = [np.where(by_sorting(row, number), row, -np.inf) for row in LOGITS]
            np.testing.assert_array_equal(call(kind(number), LOGITS), expected)


def test_top_p_keeps_at_least_so_many_tokens_as_asked():
    """And all that tie with the last of them; one number for each row is that of the row."""
    for p, least in itertools.product((0.01, 0.6, 0.999, 1.0), (1, 2, 4, 10**6)):
        rows = [kept_by_top_p(row, p) | kept_by_top_k(row, least) for row in LOGITS]
        expected = np.where(rows, LOGITS, -np.inf)
        np.testing.assert_array_equal(call(TopP(p, least), LOGITS), expected)
    each = np.arange(1, len(LOGITS) + 1)
    rows = [kept_by_top_p(row, 0.01) | kept_by_top_k(row, least) for row, least in zip(LOGITS, each, strict=True)]
    np.testing.assert_array_equal(call(TopP(0.01, jnp.asarray(each)), LOGITS), np.where(rows, LOGITS, -np.inf))


def threshold(transform, row):
    """The logit from which on a filter keeps, by its definition; the largest logit is always kept."""
    log_probs = log_softmax(row)
    possible = log_probs > -np.inf
    normaliser = row[possible][0] - log_probs[possible][0]
    entropy = -(np.exp(log_probs[possible]) * log_probs[possible]).sum()
    with np.errstate(divide="ignore"):
        number = np.log(np.float64(jax.tree.leaves(transform)[0]))
    if isinstance(transform, MinP):
        return row.max() + number
    if isinstance(transform, Epsilon):
        return number + normaliser
    if isinstance(transform, Eta):
        return min(number, number / 2 - entropy) + normaliser
    return row.max() - np.exp(number) * row[possible].std()


def kept_by_typical(row, p, *, slack=0.0):
    """Which tokens of one row typical sampling keeps, by sorting; with slack, those that rounding may add."""
    log_probs = log_softmax(row)
    possible = log_probs > -np.inf
    entropy = -(np.exp(log_probs[possible]) * log_probs[possible]).sum()
    distance = np.abs(-log_probs - entropy)
    order = np.argsort(distance)
    filled = np.cumsum(np.exp(log_probs[order]))
    cut = distance[order[min(np.searchsorted(filled, p * (1 + slack)), possible.sum() - 1)]]
    return (distance <= cut + slack) if p < 1 else np.ones(len(row), bool)


@pytest.mark.parametrize("kind", [MinP, Epsilon, Eta, TopNSigma])
@settings(max_examples=60)
@given(logits=rows_of_logits(), number=st.floats(0, 1, width=32))
def test_a_filter_keeps_what_its_definition_keeps(kind, logits, number):
    transform = kind(jnp.float32(number))
    result = np.asarray(call(transform, logits))
    assert result.shape == logits.shape and not np.isnan(result).any()
    for row, found in zip(logits.reshape(-1, logits.shape[-1]), result.reshape(-1, logits.shape[-1]), strict=True):
        exact = row.astype(np.float64)
        least = threshold(transform, exact)
        kept = found > -np.inf
        possible = row > -np.inf
        np.testing.assert_array_equal(found[kept], row[kept])
        assert kept[row == row.max()].all(), "the most probable stay"
        assert kept[possible & (exact > least + 1e-4)].all()
        assert not kept[(exact < least - 1e-4) & (row < row.max())].any()
        assert row[possible & ~kept].max(initial=-np.inf) < row[kept].min(), "ties stand together"


@settings(max_examples=120)
@given(rows_of_logits(), st.floats(2**-10, 1, width=32))
def test_typical_keeps_what_its_definition_keeps(logits, p):
    result = np.asarray(call(Typical(jnp.float32(p)), logits))
    assert result.shape == logits.shape and not np.isnan(result).any()
    for row, found in zip(logits.reshape(-1, logits.shape[-1]), result.reshape(-1, logits.shape[-1]), strict=True):
        kept = found > -np.inf
        possible = row > -np.inf
        np.testing.assert_array_equal(found[kept], row[kept])
        exact = row.astype(np.float64)
        assert kept.any()
        assert kept[possible & kept_by_typical(exact, p, slack=-1e-4)].all()
        assert not (kept & ~kept_by_typical(exact, p, slack=1e-4)).any()
        assert not set(row[kept]) & set(row[possible & ~kept]), "ties stand together"


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9, 0.99])
def test_typical_on_both_sides_of_the_sorted_head(p):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 1000)) * [[0.3], [1], [3], [8]]).astype(np.float32)
    logits[1] = np.round(logits[1], 1)
    kept = np.isfinite(call(Typical(jnp.float32(p)), logits))
    for row, found in zip(logits, kept, strict=True):
        assert (found >= kept_by_typical(row, p, slack=-1e-5)).all()
        assert (found <= kept_by_typical(row, p, slack=1e-5)).all()
    if p == 0.5:
        assert kept[0].sum() > HEAD > kept[3].sum(), "both ways are taken"


def test_typical_keeps_the_token_that_crosses_and_may_remove_the_most_probable():
    logits = jnp.log(jnp.asarray([0.5, 0.2, 0.2, 0.1]))  # H = 1.22: distances 0.53, 0.39, 0.39, 1.08
    for p, kept in [(0.1, [1, 2]), (0.39, [1, 2]), (0.41, [0, 1, 2]), (0.89, [0, 1, 2]), (0.91, [0, 1, 2, 3])]:
        assert np.flatnonzero(np.isfinite(call(Typical(p), logits))).tolist() == kept


def test_by_mass_with_the_logits_for_scores_is_the_nucleus():
    by_mass = jax.jit(transforms.mass_threshold)
    for p in (0.1, 0.5, 0.9, 1.0):
        np.testing.assert_array_equal(by_mass(WIDE, np.exp(WIDE), np.float32(p)), top_p(WIDE, np.float32(p)))


def test_thresholds_by_hand():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    entropy = 1.2798542
    cases = [(MinP(0.51), 2), (MinP(0.49), 3), (MinP(0.74), 2), (MinP(0.76), 1), (MinP(0.26), 3), (MinP(0.24), 4)]
    cases += [(Epsilon(0.19), 3), (Epsilon(0.21), 2), (Epsilon(0.41), 1), (Epsilon(1.0), 1)]
    root = 0.2 * np.exp(entropy)  # √ε from which on η = 0.2
    cases += [(Eta((root - 0.01) ** 2), 3), (Eta((root + 0.01) ** 2), 2), (Eta(0.01), 4), (Eta(1.0), 2)]
    cases += [(TopP(0.39), 1), (TopP(0.41), 2), (TopP(0.69), 2), (TopP(0.71), 3), (TopP(0.89), 3), (TopP(0.91), 4)]
    cases += [(TopNSigma(2.7), 4), (TopNSigma(2.6), 3), (TopNSigma(0.5), 1), (TopNSigma(0.6), 2)]  # σ = 0.5205
    for transform, count in cases:
        assert np.isfinite(call(transform, logits)).sum() == count, transform


@pytest.mark.parametrize("transform", OTHERS, ids=str)
def test_masked_logits_that_are_finite_leave_a_filter_finite(transform):
    lowest = np.finfo(np.float32).min
    logits = np.where(np.isneginf(LOGITS), lowest, LOGITS)
    result = np.asarray(call(transform, logits))
    assert not np.isnan(result).any() and (result > lowest).any(axis=1).all()


def test_top_n_sigma_does_not_depend_on_the_temperature_nor_on_removed_tokens():
    for t in (0.1, 3.0):
        kept = np.isfinite(call(Chain((Temperature(t), TopNSigma(0.9))), WIDE))
        np.testing.assert_array_equal(kept, np.isfinite(call(TopNSigma(0.9), WIDE)))
    more = np.concatenate([WIDE, np.full((3, 1000), -np.inf, np.float32)], axis=1)
    np.testing.assert_array_equal(np.isfinite(call(TopNSigma(0.9), more))[:, :1000], kept)


@pytest.mark.parametrize("transform", [MinP(0.2), TopK(3), TopNSigma(0.0)], ids=str)
def test_a_filter_relative_to_the_largest_is_idempotent(transform):
    once = call(transform, WIDE)
    np.testing.assert_array_equal(call(transform, once), once)


@pytest.mark.parametrize("transform", OTHERS, ids=str)
def test_float64_logits_are_cut_in_float64(transform):
    with jax.enable_x64(True):
        logits = 1 + 1e-12 * np.arange(6.0)  # all alike in float32
        assert call(MinP(1.0), logits).dtype == jnp.float64
        assert np.isfinite(call(MinP(1.0), logits)).sum() == 1
        result = call(transform, LOGITS.astype(np.float64))
        assert result.dtype == jnp.float64
    np.testing.assert_array_equal(result, call(transform, LOGITS))


@pytest.mark.parametrize("transform", OTHERS, ids=str)
def test_the_gradient_of_a_filter_is_that_of_what_it_keeps(transform):
    kept = np.isfinite(call(transform, LOGITS))
    by_logits = jax.jit(jax.grad(lambda logits: jax.nn.logsumexp(transform(logits), axis=-1).sum()))(LOGITS)
    np.testing.assert_allclose(by_logits, np.exp(log_softmax(np.where(kept, LOGITS, -np.inf))), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transform", [*FILTERS, *OTHERS], ids=str)
def test_the_kept_mass_is_the_probability_of_what_is_kept(transform):
    for logits in (LOGITS, WIDE):
        kept = np.isfinite(call(transform, logits))
        expected = np.where(kept, np.exp(log_softmax(logits)), 0).sum(axis=1)
        np.testing.assert_allclose(mass(transform, logits), expected, rtol=1e-5)
    assert (mass(transform, WIDE) < 1 - 1e-6).all() or isinstance(transform, Epsilon)
