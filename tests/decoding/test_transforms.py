import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxrl_llm.decoding import beam_search, generate, thresholds
from jaxrl_llm.decoding.thresholds import HEAD
from jaxrl_llm.decoding.transforms import (
    Chain,
    Epsilon,
    Eta,
    MinLength,
    MinP,
    Mirostat,
    NoRepeatNgram,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)
from jaxrl_llm.decoding.transforms.base import begin, require_stateless
from jaxrl_llm.tabular import TabularLM
from tests.conftest import kept_by_top_k, kept_by_top_p, log_softmax
from tests.decoding.test_thresholds import rows_of_logits
from tests.goldens import make_transform_goldens as goldens

LOGITS = np.float32([[2.0, 1.0, 1.0, -1.0, -np.inf], [0.0, 0.0, 0.0, 0.0, 0.0], [-3.0, -0.5, 4.0, 3.5, -0.5]])
WIDE = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
FILTERS = [TopK(1), TopK(2), TopK(400), TopP(0.3), TopP(0.9), TopP(0.995), Chain((TopK(300), TopP(0.9)))]
FILTERS += [MinP(0.05), MinP(1.0), Epsilon(0.002), Epsilon(0.9), Eta(0.01), Eta(0.9), TopNSigma(0.0), TopNSigma(1.5)]
IDENTITIES = [TopK(10**6), TopP(1.0), MinP(0.0), Typical(1.0), Epsilon(0.0), Eta(0.0), TopNSigma(1e6), Temperature(1.0)]
NEW = {"min-p": MinP(0.2), "typical": Typical(0.6), "ε": Epsilon(0.2), "η": Eta(0.3), "nσ": TopNSigma(0.8)}
call = jax.jit(lambda transform, logits: transform(logits))
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


@pytest.mark.parametrize("logits", [LOGITS, WIDE, LOGITS[1]], ids=["few", "many", "one row"])
@pytest.mark.parametrize("transform", IDENTITIES, ids=str)
def test_at_the_end_of_its_range_a_filter_is_the_identity(transform, logits):
    np.testing.assert_array_equal(call(transform, logits), logits)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 10**6])
def test_top_k_keeps_what_sorting_keeps(k):
    expected = [np.where(kept_by_top_k(row, k), row, -np.inf) for row in LOGITS]
    np.testing.assert_array_equal(call(TopK(k), LOGITS), expected)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.42, 0.6, 0.8, 0.96, 0.999, 1.0])
def test_top_p_keeps_what_sorting_keeps(p):
    expected = [np.where(kept_by_top_p(row, p), row, -np.inf) for row in LOGITS]
    np.testing.assert_array_equal(call(TopP(p), LOGITS), expected)


def test_top_p_keeps_the_token_that_crosses_p():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    for p, count in [(0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4)]:
        assert np.isfinite(call(TopP(p), logits)).sum() == count


@pytest.mark.parametrize("vocab", [4, 1000])
def test_top_p_of_one_keeps_every_token_of_positive_probability(vocab):
    logits = jnp.linspace(0, -1e4, vocab).at[2].set(-jnp.inf)  # most underflow when exponentiated
    np.testing.assert_array_equal(call(TopP(1.0), logits), logits)


def test_temperature_divides_and_leaves_impossible_tokens_impossible():
    for t in (0.25, 1.0, 7.0):
        np.testing.assert_allclose(Temperature(t)(jnp.asarray(LOGITS)), LOGITS / t, rtol=1e-6)


def test_one_number_a_row():
    t, k, p = jnp.asarray([0.5, 1.0, 2.0]), jnp.asarray([1, 2, 3]), jnp.asarray([0.3, 1.0, 0.7])
    kinds = [(MinP, p), (Typical, p), (Epsilon, p / 100), (Eta, p / 100), (TopNSigma, t)]
    for kind, numbers in [(Temperature, t), (TopK, k), (TopP, p), *kinds]:
        rows = [call(kind(number), row) for number, row in zip(numbers, WIDE, strict=True)]
        np.testing.assert_allclose(call(kind(numbers), WIDE), rows, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_filter_keeps_the_dtype(dtype):
    logits = jnp.asarray(LOGITS, dtype)
    for transform in (TopK(2), TopP(0.5), Temperature(0.5), Chain((Temperature(0.5), TopK(2))), *NEW.values()):
        assert call(transform, logits).dtype == dtype


def test_a_chain_applies_its_transforms_in_their_order():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    sharpened_first = call(
        Chain((Temperature(0.25), TopP(0.65))), logits
    )  # 256 : 81 : 16 : 1, of which the first is 72%
    cut_first = call(Chain((TopP(0.65), Temperature(0.25))), logits)
    np.testing.assert_array_equal(np.isfinite(sharpened_first), [True, False, False, False])
    np.testing.assert_array_equal(np.isfinite(cut_first), [True, True, False, False])
    np.testing.assert_allclose(cut_first[:2], 4 * logits[:2], rtol=1e-6)


def test_a_nucleus_after_top_k_is_that_of_what_top_k_left():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    assert np.isfinite(call(Chain((TopK(2), TopP(0.55))), logits)).sum() == 1  # 4 / 7 of what is left
    assert np.isfinite(call(Chain((TopP(0.55), TopK(2))), logits)).sum() == 2


def test_a_chain_of_none_or_of_chains_is_a_chain():
    logits = jnp.asarray(LOGITS)
    np.testing.assert_array_equal(Chain(())(logits), logits)
    nested, flat = Chain([Chain((Temperature(0.5),)), TopK(2)]), Chain((Temperature(0.5), TopK(2)))
    np.testing.assert_array_equal(call(nested, logits), call(flat, logits))


def test_transforms_are_trees_of_their_numbers():
    chain = Chain((Temperature(0.5), TopK(4), TopP(0.9)))
    assert jax.tree.leaves(chain) == [0.5, 4, 0.9]
    assert jax.tree.map(lambda number: number, chain) == chain
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(chain)]
    assert names == [".transforms[0].t", ".transforms[1].k", ".transforms[2].p"]


def test_jit_vmap_and_eager_agree():
    logits = jnp.asarray(WIDE)
    chain = Chain((Temperature(0.7), TopP(0.9)))
    eager = chain(logits)
    np.testing.assert_allclose(call(chain, logits), eager, rtol=1e-6)
    several = Chain((Temperature(jnp.asarray([0.7, 2.0])), TopP(jnp.asarray([0.9, 0.2]))))
    results = jax.vmap(lambda transform: jax.vmap(call, in_axes=(None, 0))(transform, logits))(several)
    np.testing.assert_allclose(results[0], eager, rtol=1e-6)
    np.testing.assert_allclose(results[1], call(Chain((Temperature(2.0), TopP(0.2))), logits), rtol=1e-6)


def test_gradients_with_respect_to_the_temperature_and_the_logits():
    logits = jnp.asarray(LOGITS[2])
    by_transform = jax.grad(lambda transform: transform(logits)[2])(Temperature(0.5))
    np.testing.assert_allclose(by_transform.t, -4.0 / 0.5**2)  # a gradient need not be a valid temperature
    by_logits = jax.grad(lambda logits: jax.nn.logsumexp(call(Chain((TopK(2), Temperature(0.5))), logits)))(logits)
    expected = np.exp(log_softmax(np.where(kept_by_top_k(logits, 2), logits, -np.inf) / 0.5)) / 0.5
    np.testing.assert_allclose(by_logits, expected, rtol=1e-5)


@pytest.mark.parametrize("wrap", [float, jnp.float32], ids=["python numbers", "arrays"])
def test_other_numbers_do_not_compile_again(wrap):
    counted = jax.jit(lambda transform, logits: transform(logits))
    for t, k, p in [(0.5, 3, 0.9), (1.3, 500, 0.99), (2.0, 10**6, 1.0)]:
        cuts = [kind(wrap(p)) for kind in (TopP, MinP, Typical, Epsilon, Eta, TopNSigma)]
        counted(Chain((Temperature(wrap(t)), TopK(k), *cuts)), WIDE)
    assert counted._cache_size() == 1


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [(Temperature, t, "temperature must be a finite number above 0") for t in (0, 0.0, -1.0, np.inf, -np.inf, np.nan)]
    + [(kind, p, r"p must be in \(0, 1\]") for kind in (TopP, Typical) for p in (0, 0.0, -0.1, 1.0001, np.inf, np.nan)]
    + [(MinP, p, r"p must be in \[0, 1\]") for p in (-0.1, 1.0001, np.inf, np.nan)]
    + [(kind, e, r"ε must be in \[0, 1\]") for kind in (Epsilon, Eta) for e in (-0.1, 1.0001, np.nan)]
    + [(TopNSigma, n, "n must be a finite number of at least 0") for n in (-0.1, np.inf, np.nan)]
    + [(TopK, k, "k must be an integer of at least 1") for k in (0, -1, np.nan)],
)
def test_numbers_out_of_range_are_named(kind, number, message):
    with pytest.raises(ValueError, match=message):
        kind(number)
    with pytest.raises(ValueError, match=message):
        kind(jnp.asarray([1, number]))  # one bad row is enough
    with pytest.raises(ValueError, match=message):
        Chain((kind(number),))


def test_a_traced_number_is_taken_on_trust():
    result = jax.jit(lambda t: Temperature(t)(jnp.asarray([1.0, 2.0])))(0.5)
    np.testing.assert_allclose(result, [2, 4])


# Filters against their definitions, in float64 ------------------------------------------------------------------------


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
    for p, kept in [
        (0.1, [0, 1, 1, 0]),
        (0.39, [0, 1, 1, 0]),
        (0.41, [1, 1, 1, 0]),
        (0.89, [1, 1, 1, 0]),
        (0.91, [1] * 4),
    ]:
        np.testing.assert_array_equal(np.isfinite(call(Typical(p), logits)), np.asarray(kept, bool))


def test_by_mass_with_the_logits_for_scores_is_the_nucleus():
    weights = np.exp(WIDE)
    for p in (0.1, 0.5, 0.9, 1.0):
        np.testing.assert_array_equal(
            thresholds.by_mass(WIDE, weights, jnp.float32(p)), thresholds.top_p(WIDE, jnp.float32(p))
        )


def test_thresholds_by_hand():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    entropy = 1.2798542
    cases = [(MinP(0.51), 2), (MinP(0.49), 3), (MinP(0.74), 2), (MinP(0.76), 1), (MinP(0.26), 3), (MinP(0.24), 4)]
    cases += [(Epsilon(0.19), 3), (Epsilon(0.21), 2), (Epsilon(0.41), 1), (Epsilon(1.0), 1)]
    root = 0.2 * np.exp(entropy)  # √ε from which on η = 0.2
    cases += [(Eta((root - 0.01) ** 2), 3), (Eta((root + 0.01) ** 2), 2), (Eta(0.01), 4), (Eta(1.0), 2)]
    cases += [(TopNSigma(2.7), 4), (TopNSigma(2.6), 3), (TopNSigma(0.5), 1), (TopNSigma(0.6), 2)]  # σ = 0.5205
    for transform, count in cases:
        assert np.isfinite(call(transform, logits)).sum() == count, transform


@pytest.mark.parametrize("name", NEW)
def test_a_row_of_impossible_tokens_stays_and_disturbs_no_other(name):
    logits = np.concatenate([LOGITS, np.full((1, 5), -np.inf, np.float32)])
    result = np.asarray(call(NEW[name], logits))
    assert (result[3] == -np.inf).all()
    np.testing.assert_array_equal(result[:3], call(NEW[name], LOGITS))


@pytest.mark.parametrize("name", NEW)
def test_masked_logits_that_are_finite_leave_a_filter_finite(name):
    lowest = np.finfo(np.float32).min
    logits = np.where(np.isneginf(LOGITS), lowest, LOGITS)
    result = np.asarray(call(NEW[name], logits))
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


@pytest.mark.parametrize("name", NEW)
def test_float64_logits_are_cut_in_float64(name):
    with jax.enable_x64(True):
        logits = 1 + 1e-12 * np.arange(6.0)  # all alike in float32
        assert call(MinP(1.0), logits).dtype == jnp.float64
        assert np.isfinite(call(MinP(1.0), logits)).sum() == 1
        result = call(NEW[name], LOGITS.astype(np.float64))
        assert result.dtype == jnp.float64
    np.testing.assert_array_equal(result, call(NEW[name], LOGITS))


@pytest.mark.parametrize("name", NEW)
def test_the_gradient_of_a_filter_is_that_of_what_it_keeps(name):
    kept = np.isfinite(call(NEW[name], LOGITS))
    by_logits = jax.grad(lambda logits: jax.nn.logsumexp(call(NEW[name], logits), axis=-1).sum())(jnp.asarray(LOGITS))
    np.testing.assert_allclose(by_logits, np.exp(log_softmax(np.where(kept, LOGITS, -np.inf))), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transform", [*FILTERS, *NEW.values()], ids=str)
def test_the_kept_mass_is_the_probability_of_what_is_kept(transform):
    for logits in (LOGITS, WIDE):
        kept = np.isfinite(call(transform, logits))
        expected = np.where(kept, np.exp(log_softmax(logits)), 0).sum(axis=1)
        np.testing.assert_allclose(mass(transform, logits), expected, rtol=1e-5)
    assert (mass(transform, WIDE) < 1 - 1e-6).all() or isinstance(transform, Epsilon)


def test_a_decoder_without_history_refuses_transforms_that_need_more():
    require_stateless(Chain(tuple(NEW.values())), decoder="this")
    for transform in (NoRepeatNgram(2), Mirostat(3.0, 0.1), MinLength(2, 0)):
        with pytest.raises(ValueError, match=f"this takes .* but {type(transform).__name__} needs more"):
            require_stateless(Chain((MinP(0.1), transform)), decoder="this")
        with pytest.raises((NotImplementedError, TypeError)):
            transform(LOGITS)


def test_a_chain_begins_with_the_memory_of_each():
    chain = Chain((MinP(0.1), Mirostat(3.0, 0.1), MinLength(2, 0), NoRepeatNgram(2)))
    prompts = jnp.ones((2, 3), jnp.int32)
    context = begin(chain, prompts, prompts > 0, jnp.asarray([5, 5]), num_slots=7)
    assert [np.shape(each) for each in context.memory] == [(0,), (2,), (2,), (0,)]
    assert context.history.tokens.shape == (2, 7)


# Goldens: what transformers makes of the same logits ------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return load_file(goldens.PATH)


def test_the_goldens_are_of_these_inputs_and_cases(golden):
    expected = goldens.inputs(0)
    assert set(golden) == set(goldens.CASES) | set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(golden[name], array)


@pytest.mark.parametrize("name", goldens.CASES)
def test_a_transform_is_the_processor_of_transformers(golden, name):
    result = goldens.ours(name, golden["logits"], golden["tokens"])
    np.testing.assert_allclose(result, golden[name], rtol=1e-6, atol=1e-6)


# What decoders refuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        (
            generate,
            {"transform": Temperature(jnp.ones(3))},
            r"t of Temperature must be one number, or one for each of 2",
        ),
        (generate, {"transform": Chain((TopK(jnp.ones((2, 1), int)),))}, "k of TopK must be one number"),
        (generate, {"transform": [TopK(2)]}, "transform must be a Transform"),
        (generate, {"transform": lambda logits: logits}, "transform must be a Transform"),
        (generate, {"stop": ["x"]}, "stop must be made by decoding.stop_strings"),
        (beam_search, {"transform": TopP(jnp.asarray([0.5, 0.9]))}, "p of TopP must be one number with beams"),
        (beam_search, {"length_penalty": 200.0}, "out of range"),
    ],
)
def test_decoders_name_what_they_cannot_take(decoder, options, message):
    lm = TabularLM(vocab_size=3, horizon=3)
    own = {"greedy": True} if decoder is generate else {"num_beams": 2}
    with pytest.raises(ValueError, match=message):
        decoder(lm, lm.init(jax.random.key(0)), jnp.zeros((2, 0), jnp.int32), max_new_tokens=3, **own, **options)
