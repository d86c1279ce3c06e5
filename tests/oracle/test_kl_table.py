"""Every entry of the table in `objectives.kl`, by enumeration, in float64: nothing here is sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.objectives import kl
from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params

LM = TabularLM(vocab_size=3, horizon=2)
ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def laws():
    """Parameters of the policy, the reference, and another sampler."""
    return [random_params(LM, seed, dtype=jnp.float64) for seed in (1, 2, 3)]


def log_probs(params):
    return oracle.sequence_log_probs(LM, params)


def divergence(p, q):
    """KL(p‖q) of two lists of log-probabilities."""
    return (jnp.exp(p) * (p - q)).sum()


def gradient(function):
    """Of a function of the policy's log-probabilities, in its parameters."""
    return jax.grad(lambda params: function(log_probs(params)))(laws()[0])["logits"]


def expected(name):
    """The table, each entry from exact divergences and autodiff of exact sums."""
    policy, ref, sampler = map(log_probs, laws())
    k = ESTIMATORS[name]
    kl_value, kl_gradient = divergence(policy, ref), gradient(lambda p: divergence(p, ref))
    other = gradient(lambda p: divergence(ref, p))
    value = kl_value if name != "k2" else (jnp.exp(policy) * (policy - ref) ** 2).sum() / 2
    as_loss = {"k1": 0 * kl_gradient, "k2": kl_gradient, "k3": other}[name]
    of_value = gradient(lambda p: (jnp.exp(p) * k(p, ref)).sum())
    weight = {"k1": 1.0, "k2": policy - ref, "k3": 1 - jnp.exp(ref - policy)}[name]
    plain = divergence(sampler, ref) - divergence(sampler, policy)
    off_value = {
        "k1": plain,
        "k2": (jnp.exp(sampler) * (policy - ref) ** 2).sum() / 2,
        "k3": plain + (jnp.exp(sampler) * jnp.exp(ref - policy)).sum() - 1,
    }[name]
    return {
        "value": value,
        "as a loss": as_loss,
        "as a reward": {"k1": kl_gradient, "k2": of_value - kl_gradient, "k3": kl_gradient - other}[name],
        "value off-policy": off_value,
        "value with the ratio": value,
        "off-policy loss": gradient(lambda p: (jnp.exp(sampler) * weight * p).sum()),
        "with a constant ratio": as_loss,
        "through the ratio": of_value if name == "k2" else kl_gradient,
    }


def found(name):
    """The same from samples of which every one is taken: means of values, and of the gradients that autodiff finds."""
    policy_params, _, sampler_params = laws()
    policy, ref, sampler = map(log_probs, laws())
    k, one = ESTIMATORS[name], lambda groups: groups[:, 0]

    def value(params, per_sequence):
        return oracle.moments(LM, params, lambda groups: per_sequence[one(groups)]).mean

    def loss(per_sequence, *, sampler_params=None):
        """E[∇ℓ] of a loss that is a function of the policy's log-probabilities."""
        mean = oracle.gradient_moments(
            LM, policy_params, lambda params, groups: per_sequence(log_probs(params))[one(groups)],
            sampler_params=sampler_params,
        ).mean  # fmt: skip
        return mean["logits"]

    constant = jnp.exp(policy - sampler)
    return {
        "value": value(policy_params, k(policy, ref)),
        "as a loss": loss(lambda p: k(p, ref)),
        "as a reward": loss(lambda p: k(policy, ref) * p),
        "value off-policy": value(sampler_params, k(policy, ref)),
        "value with the ratio": value(sampler_params, constant * k(policy, ref)),
        "off-policy loss": loss(lambda p: k(p, ref), sampler_params=sampler_params),
        "with a constant ratio": loss(lambda p: constant * k(p, ref), sampler_params=sampler_params),
        "through the ratio": loss(lambda p: jnp.exp(p - sampler) * k(p, ref), sampler_params=sampler_params),
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_table_holds(name):
    exact, enumerated = jax.jit(lambda: expected(name))(), jax.jit(lambda: found(name))()
    assert set(exact) == set(enumerated)
    for entry, value in exact.items():
        np.testing.assert_allclose(enumerated[entry], value, atol=1e-10, err_msg=entry)
        assert np.abs(value).max() > 1e-2 or (name == "k1" and entry in ("as a loss", "with a constant ratio")), entry
    assert np.abs(exact["as a loss"] - exact["through the ratio"]).max() > 1e-2, "else the table would say little"


def token_terms(params):
    """What the text under the table speaks of: exact next-token divergences and the law of the prefixes."""
    sequences = oracle.enumerate_sequences(LM)
    per_token = oracle.token_log_probs_of(LM, params, sequences)
    logits, ref_logits = (oracle.next_token_logits(LM, each, sequences) for each in (params, laws()[1]))
    prefixes = jnp.cumsum(per_token, axis=1) - per_token
    ref_tokens = oracle.token_log_probs_of(LM, laws()[1], sequences)
    return per_token, ref_tokens, kl.exact_kl(logits, ref_logits), prefixes, (logits, ref_logits)


def test_sums_over_positions_have_the_right_value_where_the_table_says_kl():
    params, ref_params, _ = laws()
    per_token, ref_tokens, _, _, logits = token_terms(params)
    estimators = {name: k(per_token, ref_tokens).sum(axis=1) for name, k in ESTIMATORS.items()}
    estimators["Rao-Blackwell"] = kl.rao_blackwell_kl(*logits)
    moments = oracle.moments(LM, params, lambda groups: {name: v[groups[:, 0]] for name, v in estimators.items()})
    exact = oracle.sequence_kl(LM, params, ref_params)
    for name in ("k1", "k3", "Rao-Blackwell"):
        np.testing.assert_allclose(moments.mean[name], exact, rtol=1e-12)
    assert abs(moments.mean["k2"] - exact) > 1e-2
    assert moments.variance["Rao-Blackwell"] < moments.variance["k1"] / 5, "here; but see the next test"


def test_rao_blackwell_may_have_more_variance_than_k1():
    """The second token gives back what the first one took: every sequence has d = 1, but not the same Σ_t KL_t."""
    lm = TabularLM(vocab_size=2, horizon=2)
    first_ref = np.asarray([0.8, 0.2])
    second_ref = np.exp(-(1 - np.log(0.5 / first_ref)))  # of token 0, which the policy is sure of
    policy = jnp.asarray([[0.0, 0.0], [0.0, -1e3], [0.0, -1e3]])
    ref = jnp.log(jnp.asarray([first_ref, *np.stack([second_ref, 1 - second_ref], axis=1)]))
    sequences = oracle.enumerate_sequences(lm)
    logits = [oracle.next_token_logits(lm, {"logits": table}, sequences) for table in (policy, ref)]
    per_token = [oracle.token_log_probs_of(lm, {"logits": table}, sequences) for table in (policy, ref)]
    values = {"k1": kl.k1(*per_token).sum(axis=1), "Rao-Blackwell": kl.rao_blackwell_kl(*logits)}
    moments = oracle.moments(lm, {"logits": policy}, lambda groups: {n: v[groups[:, 0]] for n, v in values.items()})
    np.testing.assert_allclose([moments.mean["k1"], moments.mean["Rao-Blackwell"]], 1, rtol=1e-12)
    np.testing.assert_allclose(moments.variance["k1"], 0, atol=1e-20)
    np.testing.assert_allclose(moments.variance["Rao-Blackwell"], np.square(np.log(4)) / 4, rtol=1e-12)


def test_a_loss_over_tokens_leaves_out_where_early_tokens_lead():
    params, ref_params, _ = laws()

    def mean_gradient(per_sequence):
        return oracle.gradient_moments(LM, params, lambda p, groups: per_sequence(p)[groups[:, 0]]).mean["logits"]

    def through_prefixes(p):
        _, _, divergences, prefixes, _ = token_terms(p)
        return (jax.lax.stop_gradient(divergences) * prefixes).sum(axis=1)

    rao_blackwell = mean_gradient(lambda p: kl.rao_blackwell_kl(*token_terms(p)[4]))
    k2_of_tokens = mean_gradient(lambda p: kl.k2(*token_terms(p)[:2]).sum(axis=1))
    missing = mean_gradient(through_prefixes)
    exact = oracle.sequence_kl_grad(LM, params, ref_params)["logits"]
    np.testing.assert_allclose(rao_blackwell, k2_of_tokens, atol=1e-12)
    np.testing.assert_allclose(rao_blackwell + missing, exact, atol=1e-12)
    assert np.abs(missing).max() > 1e-2


def test_k1_as_reward_to_go_has_both_terms():
    params, ref_params, _ = laws()
    per_token, ref_tokens, *_ = token_terms(params)
    to_go = jnp.cumsum(kl.k1(per_token, ref_tokens)[:, ::-1], axis=1)[:, ::-1]

    def loss(p, groups):
        return (to_go * token_terms(p)[0]).sum(axis=1)[groups[:, 0]]

    mean = oracle.gradient_moments(LM, params, loss).mean["logits"]
    np.testing.assert_allclose(mean, oracle.sequence_kl_grad(LM, params, ref_params)["logits"], atol=1e-12)
