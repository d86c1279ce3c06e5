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
FORMULAS = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.expm1(-d) + d}


@pytest.mark.parametrize("name", ESTIMATORS)
@given(d=hnp.arrays(np.float32, 8, elements=st.floats(-80, 80, width=32)))
def test_stable_for_log_ratios_of_any_size_up_to_80(name, d):
    found = ESTIMATORS[name](jnp.asarray(d), jnp.zeros(8))
    np.testing.assert_allclose(found, FORMULAS[name](d.astype(np.float64)), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.049, 0.051, 0.5])
def test_k3_keeps_its_digits_where_its_terms_cancel(size):
    """To first order the difference would be 0; the second is the answer. Against a long series, in float64."""
    for d in (size, -size):
        series = sum((-d) ** n / scipy.special.factorial(n) for n in range(2, 20))
        np.testing.assert_allclose(kl.k3(jnp.float32(d), jnp.float32(0)), series, rtol=2e-5)
        with jax.enable_x64(True):
            np.testing.assert_allclose(kl.k3(jnp.float64(d), jnp.float64(0)), series, rtol=1e-12)


@given(hnp.arrays(np.float32, 16, elements=st.floats(-50, 50, width=32)))
def test_k2_and_k3_are_never_negative(d):
    assert (kl.k2(jnp.asarray(d), jnp.zeros(16)) >= 0).all()
    assert (kl.k3(jnp.asarray(d), jnp.zeros(16)) >= 0).all()


def test_the_policy_comes_first():
    """KL(π‖ref) of [0.9, 0.1] from [0.5, 0.5]; the other way round it is 0.511."""
    policy, ref = jnp.log(jnp.asarray([0.9, 0.1])), jnp.log(jnp.asarray([0.5, 0.5]))
    np.testing.assert_allclose(kl.exact_kl(policy, ref), 0.368064, rtol=1e-5)
    np.testing.assert_allclose(kl.exact_forward_kl(policy, ref), 0.510826, rtol=1e-5)
    np.testing.assert_allclose((jnp.exp(policy) * kl.k1(policy, ref)).sum(), 0.368064, rtol=1e-5)
    np.testing.assert_allclose((jnp.exp(policy) * kl.k3(policy, ref)).sum(), 0.368064, rtol=1e-5)


@pytest.mark.parametrize("function", [kl.exact_kl, kl.exact_forward_kl])
def test_exact_divergences_are_the_sums(function):
    rng = np.random.default_rng(0)
    logits, others = rng.normal(size=(2, 3, 4, 7)) * 3
    p, q = log_softmax(logits), log_softmax(others)
    if function is kl.exact_forward_kl:
        p, q = q, p
    found = function(jnp.asarray(logits, jnp.float32), jnp.asarray(others, jnp.float32))
    np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(axis=-1), rtol=1e-5)


def test_a_shift_of_all_logits_changes_nothing():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)
    assert abs(kl.exact_kl(logits, logits + 7.0)).max() < 1e-6


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("policy", "ref"), [(-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4)])
def test_log_probabilities_of_minus_ten_thousand_are_finite_and_pull_the_right_way(name, policy, ref):
    value, slopes = jax.value_and_grad(ESTIMATORS[name], argnums=(0, 1))(jnp.float32(policy), jnp.float32(ref))
    assert np.isfinite(value) and np.isfinite(slopes).all()
    np.testing.assert_allclose(slopes, ESTIMATORS[name].grad(jnp.float32(policy), jnp.float32(ref)), rtol=1e-6)
    if name == "k3" and policy < ref:
        assert slopes[0] < -1e30, "towards more probability, not less"


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("policy", "ref"), [(-np.inf, -1.0), (-1.0, -np.inf), (-np.inf, -np.inf), (np.nan, -1.0)])
def test_what_a_mask_hides_leaves_a_finite_gradient(name, policy, ref):
    mask = jnp.asarray([True, False])

    def masked(policy, ref):
        return jnp.where(mask, ESTIMATORS[name](policy, ref), 0).sum()

    values, slopes = jax.value_and_grad(masked, argnums=(0, 1))(jnp.asarray([-1.0, policy]), jnp.asarray([-2.0, ref]))
    np.testing.assert_allclose(values, FORMULAS[name](1.0), rtol=1e-6)
    assert np.isfinite(slopes).all() and slopes[0][1] == 0 and slopes[1][1] == 0
    closed = ESTIMATORS[name].grad(jnp.asarray([-1.0, policy]), jnp.asarray([-2.0, ref]))
    np.testing.assert_allclose(closed, slopes, rtol=1e-6)


def test_tokens_that_both_distributions_exclude_add_nothing():
    logits, others = jnp.asarray([[1.0, -jnp.inf, 0.5]]), jnp.asarray([[0.3, -jnp.inf, 2.0]])
    without = [jnp.asarray([[1.0, 0.5]]), jnp.asarray([[0.3, 2.0]])]
    for function in (kl.exact_kl, kl.exact_forward_kl):
        np.testing.assert_allclose(function(logits, others), function(*without), rtol=1e-6)
        slopes = jax.grad(lambda *given, f=function: f(*given).sum(), argnums=(0, 1))(logits, others)
        assert np.isfinite(slopes).all() and np.abs(slopes).max() > 0.01


def test_an_infinite_divergence_is_infinite_and_its_gradient_is_finite():
    policy, ref = jnp.asarray([[0.0, 0.0]]), jnp.asarray([[0.0, -jnp.inf]])
    assert kl.exact_kl(policy, ref)[0] == jnp.inf
    np.testing.assert_allclose(kl.exact_forward_kl(policy, ref), np.log(2), rtol=1e-6)
    slopes = jax.grad(lambda *given: kl.exact_kl(*given).sum(), argnums=(0, 1))(policy, ref)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("filler", [0.0, 1e4, -np.inf])
def test_rao_blackwell_reads_nothing_behind_the_mask(filler):
    rng = np.random.default_rng(0)
    logits, others = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    mask = jnp.asarray([[True, True, False, False], [False, True, False, True], [False] * 4])
    hidden = [jnp.where(mask[..., None], each, filler) for each in (logits, others)]
    expected = (kl.exact_kl(logits, others) * mask).sum(axis=1)
    np.testing.assert_allclose(kl.rao_blackwell_kl(*hidden, mask), expected, rtol=1e-6)
    assert expected[2] == 0
    slopes = jax.grad(lambda *given: kl.rao_blackwell_kl(*given, mask).sum(), argnums=(0, 1))(*hidden)
    for slope in slopes:
        assert np.isfinite(slope).all() and (slope[~mask] == 0).all() and np.abs(slope[mask]).max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kl.k1(jnp.zeros((2, 3)), jnp.zeros(3)),
            r"logp_ref must be \[\*batch\] = \[2, 3\] as in logp_policy, but has the shape \[3\]",
        ),
        (lambda: kl.k3(jnp.zeros(3, int), jnp.zeros(3)), "logp_policy must be floating, but is int32"),
        (
            lambda: kl.exact_kl(jnp.zeros(()), jnp.zeros(())),
            r"logits_policy must be \[\*batch, vocab\], but has the shape \[\]",
        ),
        (
            lambda: kl.rao_blackwell_kl(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)), jnp.ones((2, 4), bool)),
            r"mask must be \[\*batch, time\] = \[2, 3\] as in logits_policy, but has the shape \[2, 4\]",
        ),
    ],
)
def test_bad_input_is_named_also_under_jit(call, message):
    for attempt in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=message):
            attempt()
