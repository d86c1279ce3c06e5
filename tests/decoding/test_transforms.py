import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP
from tests.conftest import kept_by_top_k, kept_by_top_p, log_softmax

LOGITS = np.float32([[2.0, 1.0, 1.0, -1.0, -np.inf], [0.0, 0.0, 0.0, 0.0, 0.0], [-3.0, -0.5, 4.0, 3.5, -0.5]])
WIDE = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
FILTERS = [TopK(1), TopK(2), TopK(400), TopP(0.3), TopP(0.9), TopP(0.995), Chain((TopK(300), TopP(0.9)))]
call = jax.jit(lambda transform, logits: transform(logits))


@pytest.mark.parametrize("logits", [LOGITS, WIDE], ids=["few", "many"])
@pytest.mark.parametrize("transform", FILTERS, ids=str)
def test_a_filter_removes_or_leaves_alone_and_keeps_at_least_the_most_probable(transform, logits):
    result = np.asarray(call(transform, logits))
    kept = result > -np.inf
    np.testing.assert_array_equal(result[kept], logits[kept])
    assert kept[np.arange(3), logits.argmax(axis=1)].all()
    for row, keeps in zip(logits, kept, strict=True):  # what is kept is above what is not, and ties stand together
        assert row[~keeps].max(initial=-np.inf) < row[keeps].min()


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
    for kind, numbers in [(Temperature, t), (TopK, k), (TopP, p)]:
        rows = [call(kind(number), row) for number, row in zip(numbers, WIDE, strict=True)]
        np.testing.assert_allclose(call(kind(numbers), WIDE), rows, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_filter_keeps_the_dtype(dtype):
    logits = jnp.asarray(LOGITS, dtype)
    for transform in (TopK(2), TopP(0.5), Temperature(0.5), Chain((Temperature(0.5), TopK(2)))):
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
        counted(Chain((Temperature(wrap(t)), TopK(k), TopP(wrap(p)))), WIDE)
    assert counted._cache_size() == 1


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [(Temperature, t, "temperature must be a finite number above 0") for t in (0, 0.0, -1.0, np.inf, -np.inf, np.nan)]
    + [(TopP, p, r"p must be in \(0, 1\]") for p in (0, 0.0, -0.1, 1.0001, 2, np.inf, np.nan)]
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
