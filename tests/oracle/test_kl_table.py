"""Every entry of the table in `objectives.kl`, by enumeration, in float64: nothing here is sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.objectives import kl
from jaxrl_llm.tabular import TabularLM
from tests.oracle.samples import LM, distributions, gradients, mean_gradients, params, sequence_kl_grad

ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
pytestmark = pytest.mark.usefixtures("float64")


def divergence(p, q):
    """KL(p‖q) of two lists of log-probabilities."""
    return (jnp.exp(p) * (p - q)).sum()


def expected(name):
    """The table, each entry a value or a function of the policy whose gradient it is: exact divergences and sums."""
    policy, ref, sampler = (each.sequences for each in distributions())
    k = ESTIMATORS[name]
    weight = {"k1": 1.0, "k2": policy - ref, "k3": 1 - np.exp(ref - policy)}[name]
    plain = divergence(sampler, ref) - divergence(sampler, policy)
    value = divergence(policy, ref) if name != "k2" else (np.exp(policy) * (policy - ref) ** 2).sum() / 2
    off_value = {
        "k1": plain,
        "k2": (np.exp(sampler) * (policy - ref) ** 2).sum() / 2,
        "k3": plain + (np.exp(sampler) * np.exp(ref - policy)).sum() - 1,
    }[name]

    def sums(p):
        reverse, forward, of_value = divergence(p, ref), divergence(ref, p), (jnp.exp(p) * k(p, ref)).sum()
        as_loss = {"k1": 0 * reverse, "k2": reverse, "k3": forward}[name]
        return {
            "as a loss": as_loss,
            "as a reward": {"k1": reverse, "k2": of_value - reverse, "k3": reverse - forward}[name],
            "off-policy loss": (np.exp(sampler) * weight * p).sum(),
            "with a constant ratio": as_loss,
            "through the ratio": of_value if name == "k2" else reverse,
        }

    return {"value": value, "value off-policy": off_value, "value with the ratio": value}, sums


def found(name):
    """The same from samples, all of them: the values, and losses whose gradients are those that autodiff finds."""
    policy, ref, sampler = (each.sequences for each in distributions())
    k, constant = ESTIMATORS[name], np.exp(policy - sampler)

    def value(seed, weight=1.0):
        return oracle.moments(LM, params(seed), lambda groups: (weight * k(policy, ref))[groups[:, 0]]).mean

    return jax.jit(
        lambda: {"value": value(1), "value off-policy": value(3), "value with the ratio": value(3, constant)}
    )(), {
        "as a loss": lambda now: k(now.sequences, ref),
        "as a reward": lambda now: k(policy, ref) * now.sequences,
        "off-policy loss": (lambda now: k(now.sequences, ref), sampler),
        "with a constant ratio": (lambda now: constant * k(now.sequences, ref), sampler),
        "through the ratio": (lambda now: jnp.exp(now.sequences - sampler) * k(now.sequences, ref), sampler),
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_table_holds(name):
    exact, sums = expected(name)
    enumerated, losses = found(name)
    exact |= gradients(lambda now: sums(now.sequences))
    enumerated |= mean_gradients(losses)
    assert set(exact) == set(enumerated)
    for entry, value in exact.items():
        np.testing.assert_allclose(enumerated[entry], value, atol=1e-10, err_msg=entry)
        assert np.abs(value).max() > 1e-2 or (name == "k1" and entry in ("as a loss", "with a constant ratio")), entry
    assert np.abs(exact["as a loss"] - exact["through the ratio"]).max() > 1e-2, "else the table would say little"


def test_sums_over_positions_have_the_right_value_where_the_table_says_kl():
    policy, ref, _ = distributions()

    @jax.jit
    def moments():
        values = {name: k(policy.tokens, ref.tokens).sum(axis=1) for name, k in ESTIMATORS.items()}
        values["Rao-Blackwell"] = kl.rao_blackwell_kl(policy.logits, ref.logits)
        return oracle.moments(LM, params(1), lambda groups: {name: v[groups[:, 0]] for name, v in values.items()})

    found, exact = moments(), divergence(policy.sequences, ref.sequences)
    for name in ("k1", "k3", "Rao-Blackwell"):
        np.testing.assert_allclose(found.mean[name], exact, rtol=1e-12)
    assert abs(found.mean["k2"] - exact) > 1e-2
    assert found.variance["Rao-Blackwell"] < found.variance["k1"] / 5, "here; but see the next test"


def test_rao_blackwell_may_have_more_variance_than_k1():
    """The second token gives back what the first one took: every sequence has d = 1, but not the same Σ_t KL_t."""
    lm = TabularLM(vocab_size=2, horizon=2)
    first_ref = np.asarray([0.8, 0.2])
    second_ref = np.exp(-(1 - np.log(0.5 / first_ref)))  # of token 0, which the policy is sure of
    policy = jnp.asarray([[0.0, 0.0], [0.0, -1e3], [0.0, -1e3]])
    ref = jnp.log(jnp.asarray([first_ref, *np.stack([second_ref, 1 - second_ref], axis=1)]))

    @jax.jit
    def moments():
        sequences = oracle.enumerate_sequences(lm)
        logits = [oracle.next_token_logits(lm, {"logits": table}, sequences) for table in (policy, ref)]
        per_token = [oracle.token_log_probs_of(lm, {"logits": table}, sequences) for table in (policy, ref)]
        values = {"k1": kl.k1(*per_token).sum(axis=1), "Rao-Blackwell": kl.rao_blackwell_kl(*logits)}
        return oracle.moments(lm, {"logits": policy}, lambda groups: {n: v[groups[:, 0]] for n, v in values.items()})

    found = moments()
    np.testing.assert_allclose([found.mean["k1"], found.mean["Rao-Blackwell"]], 1, rtol=1e-12)
    np.testing.assert_allclose(found.variance["k1"], 0, atol=1e-20)
    np.testing.assert_allclose(found.variance["Rao-Blackwell"], np.square(np.log(4)) / 4, rtol=1e-12)


def test_gradients_of_losses_over_tokens():
    """They leave out where early tokens lead; k1 as a reward to its own token does too, and to go has both terms."""
    policy, ref, _ = distributions()
    k1 = np.asarray(kl.k1(policy.tokens, ref.tokens))
    to_go = np.cumsum(k1[:, ::-1], axis=1)[:, ::-1]

    def missing(now):
        """KL_t ∇log π(y_<t)."""
        prefixes = jnp.cumsum(now.tokens, axis=1) - now.tokens
        return (kl.exact_kl(policy.logits, ref.logits) * prefixes).sum(axis=1)

    found = mean_gradients(
        {
            "Rao-Blackwell": lambda now: kl.rao_blackwell_kl(now.logits, ref.logits),
            "k2": lambda now: kl.k2(now.tokens, ref.tokens).sum(axis=1),
            "missing": missing,
            "k1": lambda now: (k1 * now.tokens).sum(axis=1),
            "k1 to go": lambda now: (to_go * now.tokens).sum(axis=1),
        }
    )
    exact = sequence_kl_grad(params(1), params(2))["logits"]
    np.testing.assert_allclose(found["Rao-Blackwell"], found["k2"], atol=1e-12)
    np.testing.assert_allclose(found["Rao-Blackwell"], found["k1"], atol=1e-10)
    np.testing.assert_allclose(found["Rao-Blackwell"] + found["missing"], exact, atol=1e-12)
    np.testing.assert_allclose(found["k1 to go"], exact, atol=1e-12)
    assert np.abs(found["missing"]).max() > 1e-2
