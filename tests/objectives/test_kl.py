import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.objectives import kl
from tests.conftest import log_softmax

ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
EXACT = {"exact_kl": kl.exact_kl, "exact_forward_kl": kl.exact_forward_kl}
compiled = {name: jax.jit(each) for name, each in (ESTIMATORS | EXACT).items()}
FORMULAS = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.expm1(-d) + d}


@pytest.mark.parametrize("name", ESTIMATORS)
@given(d=hnp.arrays(np.float32, 8, elements=st.floats(-80, 80, width=32)))
def test_stable_for_log_ratios_of_any_size_up_to_80(name, d):
    found = compiled[name](d, np.zeros(8, np.float32))
    np.testing.assert_allclose(found, FORMULAS[name](d.astype(np.float64)), rtol=1e-4, atol=1e-12)


def test_k3_keeps_its_digits_where_its_terms_cancel():
    """To first order the difference would be 0; the second is the answer. Against a long series, in float64."""
    d = np.outer([1, -1], [1e-6, 1e-3, 0.049, 0.051, 0.5]).reshape(-1)
    for dtype, rtol in ((np.float32, 2e-5), (np.float64, 1e-12)):
        with jax.enable_x64(dtype == np.float64):
            series = sum((-d.astype(dtype).astype(np.float64)) ** n / scipy.special.factorial(n) for n in range(2, 20))
            np.testing.assert_allclose(compiled["k3"](d.astype(dtype), np.zeros(10, dtype)), series, rtol=rtol)


@given(hnp.arrays(np.float32, 8, elements=st.floats(-50, 50, width=32)))
def test_k2_and_k3_are_never_negative(d):
    for name in ("k2", "k3"):
        assert (compiled[name](d, np.zeros(8, np.float32)) >= 0).all()


def test_the_policy_comes_first():
    """KL(π‖ref) of [0.9, 0.1] from [0.5, 0.5]; the other way round it is 0.511."""
    policy, ref = np.log(np.asarray([[0.9, 0.1], [0.5, 0.5]], np.float32))
    found = jax.jit(lambda *given: {name: each(*given) for name, each in (ESTIMATORS | EXACT).items()})(policy, ref)
    np.testing.assert_allclose(found["exact_kl"], 0.368064, rtol=1e-5)
    np.testing.assert_allclose(found["exact_forward_kl"], 0.510826, rtol=1e-5)
    np.testing.assert_allclose(np.exp(policy) @ found["k1"], 0.368064, rtol=1e-5)
    np.testing.assert_allclose(np.exp(policy) @ found["k3"], 0.368064, rtol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_exact_divergences_are_the_sums_and_a_shift_of_all_logits_changes_nothing(name):
    rng = np.random.default_rng(0)
    logits, others = rng.normal(size=(2, 3, 4, 7)) * 3
    p, q = log_softmax(logits), log_softmax(others)
    if name == "exact_forward_kl":
        p, q = q, p
    logits, others = logits.astype(np.float32), others.astype(np.float32)
    np.testing.assert_allclose(compiled[name](logits, others), (np.exp(p) * (p - q)).sum(axis=-1), rtol=1e-5)
    assert abs(compiled[name](logits, logits + np.float32(7.0))).max() < 1e-6


def both_gradients(function):
    """The summed values, their gradients by autodiff, and in closed form."""

    def of(policy, ref):
        value, slopes = jax.value_and_grad(lambda *given: function(*given).sum(), argnums=(0, 1))(policy, ref)
        return value, jnp.stack(slopes), jnp.stack(function.grad(policy, ref))

    return jax.jit(of)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_log_probabilities_of_minus_ten_thousand_are_finite_and_pull_the_right_way(name):
    policy, ref = np.asarray([(-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4)], np.float32).T
    _, slopes, closed = both_gradients(ESTIMATORS[name])(policy, ref)
    assert np.isfinite(compiled[name](np.resize(policy, 8), np.resize(ref, 8))).all() and np.isfinite(slopes).all()
    np.testing.assert_allclose(slopes, closed, rtol=1e-6)
    if name == "k3":
        assert slopes[0, 0] < -1e30, "towards more probability, not less"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_a_mask_hides_leaves_a_finite_gradient(name):
    """The first row counts; the others are behind the mask."""
    policy, ref = np.asarray(
        [(-1.0, -2.0), (-np.inf, -1.0), (-1.0, -np.inf), (-np.inf, -np.inf), (np.nan, -1.0)], np.float32
    ).T

    @jax.jit
    def masked(policy, ref):
        def total(*given):
            return jnp.where(np.arange(5) == 0, ESTIMATORS[name](*given), 0).sum()

        value, slopes = jax.value_and_grad(total, argnums=(0, 1))(policy, ref)
        return value, jnp.stack(slopes), jnp.stack(ESTIMATORS[name].grad(policy, ref))

    value, slopes, closed = masked(policy, ref)
    np.testing.assert_allclose(value, FORMULAS[name](1.0), rtol=1e-6)
    assert np.isfinite(slopes).all() and (slopes[:, 1:] == 0).all()
    np.testing.assert_allclose(closed, slopes, rtol=1e-6)


def test_tokens_that_both_distributions_exclude_add_nothing_and_an_infinite_divergence_has_a_finite_gradient():
    policy, ref = np.asarray(
        [[[1.0, -np.inf, 0.5], [0.0, 0.0, -np.inf]], [[0.3, -np.inf, 2.0], [0.0, -np.inf, -np.inf]]], np.float32
    )
    for name, function in EXACT.items():
        found = jax.jit(function)(policy, ref)
        without = jax.jit(function)(np.float32([[1.0, 0.5]]), np.float32([[0.3, 2.0]]))
        np.testing.assert_allclose(found[0], without[0], rtol=1e-6)
        np.testing.assert_allclose(found[1], np.inf if name == "exact_kl" else np.log(2), rtol=1e-6)
        _, slopes, _ = both_gradients(function)(policy, ref)
        assert np.isfinite(slopes).all() and np.abs(slopes[:, 0]).max() > 0.01


def test_rao_blackwell_reads_nothing_behind_the_mask():
    rng = np.random.default_rng(0)
    logits, others = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    mask = np.asarray([[True, True, False, False], [False, True, False, True], [False] * 4])
    expected = (np.asarray(compiled["exact_kl"](logits, others)) * mask).sum(axis=1)
    assert expected[2] == 0

    @jax.jit
    def value_and_slopes(*given):
        total = jax.grad(lambda *given: kl.rao_blackwell_kl(*given, mask).sum(), argnums=(0, 1))
        return kl.rao_blackwell_kl(*given, mask), total(*given)

    for filler in (0.0, 1e4, -np.inf):
        hidden = [np.where(mask[..., None], each, np.float32(filler)) for each in (logits, others)]
        value, slopes = value_and_slopes(*hidden)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for slope in np.asarray(slopes):
            assert np.isfinite(slope).all() and (slope[~mask] == 0).all() and np.abs(slope[mask]).max() > 0.01
