"""Statements of docs/theory.md that are proved in words there: by enumeration, or by counter-example, in float64."""

import itertools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm import oracle
from jaxrl_llm.analysis.sycophancy import amplified_agreement
from jaxrl_llm.objectives import advantages, kl, policy_gradient, preference, rlhf
from jaxrl_llm.objectives.reward_model import k_choose_2_loss, pairwise_loss
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training.methods import METHODS
from tests.conftest import log_softmax, random_params

LM = TabularLM(vocab_size=3, horizon=2)
BETA = 0.5
REWARDS = np.random.default_rng(8).normal(size=9) + 2.0
ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def tables():
    """Parameters of a policy and of a reference."""
    return [random_params(LM, seed, dtype=jnp.float64) for seed in (1, 2)]


def log_probs(params):
    return oracle.sequence_log_probs(LM, params)


def tokens_of(params):
    return oracle.token_log_probs_of(LM, params, oracle.enumerate_sequences(LM))


def logits_of(params):
    return oracle.next_token_logits(LM, params, oracle.enumerate_sequences(LM))


def divergence(p, q):
    return (jnp.exp(p) * (p - q)).sum()


def expected_gradient(per_sequence, *, params=None, sampler=None):
    """E[∇ℓ] of a loss of each sequence, as autodiff finds it on samples."""

    def loss(params, groups):
        return per_sequence(params)[groups[:, 0]]

    params = tables()[0] if params is None else params
    return jax.jit(lambda: oracle.gradient_moments(LM, params, loss, sampler_params=sampler).mean["logits"])()


def table_of(log_policy):
    """The parameters of `LM` whose sequences have these log-probabilities."""
    rows = log_policy.reshape(3, 3)
    return {"logits": jnp.concatenate([jax.nn.logsumexp(rows, axis=1)[None], rows])}


def assert_is(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.abs(expected).max() > 1e-2


def differ(found, other):
    return np.abs(np.asarray(found) - np.asarray(other)).max() > 1e-2


def moments(log_p, values):
    """Mean and variance of a value of each outcome."""
    p = np.exp(log_p)
    mean = (p * values).sum()
    return mean, (p * np.square(values - mean)).sum()


def variances(log_p, log_q):
    found = {
        name: moments(log_p, np.asarray(k(jnp.asarray(log_p), jnp.asarray(log_q)))) for name, k in ESTIMATORS.items()
    }
    return {name: variance for name, (_, variance) in found.items()}


# T1a ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_the_first_push_on_an_answer_is_linear_in_its_rank_and_nothing_in_the_middle(size):
    (gradient,) = k_choose_2_loss.grad(jnp.zeros(size), jnp.arange(size))
    expected = (size - 1 - 2 * np.arange(size)) / (size * (size - 1))
    np.testing.assert_allclose(-gradient, expected, atol=1e-15)
    np.testing.assert_allclose(-gradient[0] + gradient[-1], 2 / size, atol=1e-15)
    of_one_pair = pairwise_loss.grad(jnp.zeros(()), jnp.zeros(()))
    np.testing.assert_allclose(of_one_pair[1] - of_one_pair[0], 1, atol=1e-15)


def test_a_middle_answer_rests_where_its_two_gaps_are_equal():
    """The outer two are held: a wider gap on one side is a narrower one on the other."""
    places = np.linspace(-1.9, 1.9, 77)
    scores = jnp.stack([jnp.full(77, 2.0), jnp.asarray(places), jnp.full(77, -2.0)], axis=1)
    losses = jax.vmap(k_choose_2_loss, in_axes=(0, None))(scores, jnp.arange(3))
    assert abs(places[np.argmin(losses)]) < 1e-12
    (gradient,) = k_choose_2_loss.grad(scores[20], jnp.arange(3))
    assert places[20] < 0 and gradient[1] < -0.01, "below the middle it is pushed up"


def test_a_circle_of_votes_holds_the_scores_together_and_one_pair_of_it_does_not():
    def circle(scores):
        return sum(pairwise_loss(scores[i], scores[j]) for i, j in ((0, 1), (1, 2), (2, 0)))

    np.testing.assert_allclose(jax.grad(circle)(jnp.zeros(3)), 0, atol=1e-15)
    assert np.linalg.eigvalsh(jax.hessian(circle)(jnp.zeros(3)))[1] > 0.1, "convex: the minimum is at equal scores"
    leads = jnp.asarray([0.0, 5.0, 50.0])
    assert (np.diff(pairwise_loss(leads, jnp.zeros(3))) < 0).all(), "alone, the first vote parts its two for ever"


def test_the_share_of_a_label_follows_from_the_agreement_of_two_labellers():
    """Ouyang et al. 2022: two labellers agree in 72.6% of the comparisons."""
    share = (1 + math.sqrt(2 * 0.726 - 1)) / 2
    assert share**2 + (1 - share) ** 2 == pytest.approx(0.726)
    assert share == pytest.approx(0.836, abs=5e-4)
    assert math.log(share / (1 - share)) == pytest.approx(1.63, abs=5e-3)


def test_the_margin_under_gradient_flow_is_a_logarithm():
    lead = 7.598
    assert math.exp(lead) + lead == pytest.approx(2 * 1000 + 1, abs=1)
    leads = jnp.asarray([0.0, 1.0, 5.0])
    both = pairwise_loss.grad(leads, jnp.zeros(3))
    np.testing.assert_allclose(both[1] - both[0], 2 / (1 + np.exp(leads)), rtol=1e-12)


def test_adam_undoes_a_weight_of_the_loss_and_sgd_does_not():
    """So a learning rate *per comparison* means something for SGD alone."""
    gradients = np.random.default_rng(0).normal(size=(20, 4))

    def way(optimiser, weight):
        params, state = jnp.zeros(4), optimiser.init(jnp.zeros(4))
        for gradient in gradients:
            updates, state = optimiser.update(jnp.asarray(weight * gradient), state)
            params = optax.apply_updates(params, updates)
        return params

    np.testing.assert_allclose(way(optax.adam(0.1, eps=0), 1.0), way(optax.adam(0.1, eps=0), 0.2), rtol=1e-10)
    np.testing.assert_allclose(0.2 * way(optax.sgd(0.1), 1.0), way(optax.sgd(0.1), 0.2), rtol=1e-10)


# T1b ------------------------------------------------------------------------------------------------------------------


def test_dropping_answers_of_mass_m_costs_exactly_minus_log_of_one_minus_m():
    ref = np.log([0.5, 0.25, 0.15, 0.1])
    kept = np.asarray([True, True, False, False])
    policy = log_softmax(ref[kept])
    least = (np.exp(policy) * (policy - ref[kept])).sum()
    np.testing.assert_allclose(least, -math.log(1 - 0.25), rtol=1e-12)
    for logits in np.random.default_rng(0).normal(size=(50, 2)):
        other = log_softmax(logits)
        assert (np.exp(other) * (other - ref[kept])).sum() >= least


# T1d ------------------------------------------------------------------------------------------------------------------


def test_a_return_that_depends_on_the_parameters_adds_a_term_of_mean_zero():
    """G = r − β log(π/ref): autodiff through G adds −β ∇log π, which is noise around nothing."""
    policy, ref = tables()
    np.testing.assert_allclose(expected_gradient(log_probs), 0, atol=1e-15)
    exact = oracle.objective_grad(LM, policy, ref, jnp.asarray(REWARDS), beta=BETA)["logits"]

    def surrogate(params, stop):
        gain = REWARDS - BETA * (log_probs(params) - log_probs(ref))
        return log_probs(params) * jax.lax.stop_gradient(gain) + (0 if stop else gain)

    for stop in (True, False):
        assert_is(expected_gradient(lambda params, stop=stop: surrogate(params, stop)), exact)


def test_the_ratio_of_whole_answers_gives_the_policy_gradient_everywhere_and_those_of_tokens_do_not():
    policy, old = tables()
    exact = oracle.objective_grad(LM, policy, old, jnp.asarray(REWARDS), beta=0.0)["logits"]

    def of_answers(params):
        return jnp.exp(log_probs(params) - log_probs(old)) * REWARDS

    def of_tokens(params, sampler=old):
        return (jnp.exp(tokens_of(params) - tokens_of(sampler)) * REWARDS[:, None]).sum(axis=1)

    assert_is(expected_gradient(of_answers, sampler=old), exact)
    assert differ(expected_gradient(of_tokens, sampler=old), exact)
    assert_is(expected_gradient(lambda params: of_tokens(params, policy)), exact)


def grpo_field(logits, rewards, group_size):
    """E[mean of A ∇log π] over groups of answers to one prompt, in the logits of its answers."""
    probabilities = jax.nn.softmax(logits)
    groups = jnp.asarray(list(itertools.product(range(len(rewards)), repeat=group_size)))
    found = advantages.grpo(jnp.asarray(rewards)[groups], eps=0.0)
    scores = jnp.eye(len(rewards))[groups] - probabilities
    return (probabilities[groups].prod(axis=1)[:, None] * (found[..., None] * scores).mean(axis=1)).sum(axis=0)


@pytest.mark.parametrize("group_size", [2, 3])
def test_grpo_has_an_objective_for_rewards_of_two_values_and_none_for_three(group_size):
    """A gradient has a symmetric Jacobian."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=3))
    for rewards, has_objective in (([0.0, 1.0, 1.0], True), ([0.0, 1.0, 3.0], False)):
        jacobian = jax.jacobian(grpo_field)(logits, rewards, group_size)
        assert (np.abs(jacobian - jacobian.T).max() < 1e-12) == has_objective
        exact = jax.grad(lambda x, r=rewards: jax.nn.softmax(x) @ jnp.asarray(r))(logits)
        field = grpo_field(logits, rewards, group_size)
        cosine = field @ exact / jnp.linalg.norm(field) / jnp.linalg.norm(exact)
        assert (cosine > 1 - 1e-12) == has_objective, "of three values not even the direction"


def grpo_gradient(params, ref, *, kl_loss, group_size=2):
    """E[∇ loss] of GRPO's first update: sequence means of −A log π, and the penalty where `kl_loss` puts it."""
    ref_tokens, stop = tokens_of(ref), jax.lax.stop_gradient

    def loss(params, groups):
        per_token = tokens_of(params)
        gain = jnp.asarray(REWARDS)
        if kl_loss is None:
            gain = gain - BETA * stop(kl.k1(per_token, ref_tokens).sum(axis=1))
        advantage = advantages.grpo(gain[groups])[..., None]
        surrogate = policy_gradient.ppo_clip_loss(
            per_token[groups], stop(per_token[groups]), jnp.broadcast_to(advantage, (*groups.shape, 2))
        )
        penalty = {
            None: jnp.zeros(9),
            "forward": kl.k3(per_token, ref_tokens).mean(axis=1),
            "reverse": kl.k2(per_token.sum(axis=1), ref_tokens.sum(axis=1)) / 2,
        }[kl_loss]
        return surrogate.mean(axis=(1, 2)) + BETA * penalty[groups].mean(axis=1)

    def mean():
        return oracle.gradient_moments(LM, params, loss, group_size=group_size).mean["logits"]

    return np.abs(jax.jit(mean)()).max()


def test_the_optimum_of_rlhf_is_a_fixed_point_of_grpo_with_kl_in_the_reward_and_not_with_kl_in_the_loss():
    """At π* all gains are β log Z, so that every advantage is 0. As published, k3 is in the loss ("forward")."""
    _, ref = tables()
    optimum = table_of(rlhf.gibbs_optimum(log_probs(ref), jnp.asarray(REWARDS), beta=BETA))
    np.testing.assert_allclose(
        log_probs(optimum), rlhf.gibbs_optimum(log_probs(ref), jnp.asarray(REWARDS), beta=BETA), atol=1e-12
    )
    assert grpo_gradient(optimum, ref, kl_loss=None) < 1e-9
    assert grpo_gradient(optimum, ref, kl_loss="forward") > 1e-2
    assert grpo_gradient(optimum, ref, kl_loss="reverse") > 1e-2


# T1e ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "ref", "divergence_", "expected", "worse"),
    [
        ([0.99, 0.01], [0.9999, 0.0001], 0.036, {"k1": 0.21, "k2": 1.11, "k3": 0.13}, "k2"),
        ([0.99, 0.01], [0.9, 0.1], 0.071, {"k1": 0.057, "k2": 0.069, "k3": 0.443}, "k3"),
    ],
)
def test_between_two_next_token_distributions_that_are_close_k2_and_k3_may_vary_more_than_k1(
    policy, ref, divergence_, expected, worse
):
    log_policy, log_ref = np.log(policy), np.log(ref)
    assert float(kl.exact_kl(jnp.asarray(log_policy), jnp.asarray(log_ref))) == pytest.approx(divergence_, abs=5e-4)
    found = variances(log_policy, log_ref)
    assert found == pytest.approx(expected, rel=0.02)
    assert found[worse] > 5 * found["k1"]


def test_the_table_of_gaussians():
    """By quadrature: N(0, 1) sampled, N(μ, 1) the reference."""
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    log_weights = np.log(weights / weights.sum())

    def at(size):
        d = size**2 / 2 - size * x
        found, value = variances(log_weights + 0 * d, log_weights - d), size**2 / 2
        return {name: math.sqrt(variance) / value for name, variance in found.items()}, (
            moments(log_weights, d**2 / 2)[0] / value - 1
        )

    for size, (of_k1, bias, of_k2, of_k3) in {
        0.1: (20, 0.0025, 1.4177, 1.4166),
        1.0: (2, 0.25, 1.7321, 1.6950),
        2.0: (1, 1.0, 2.449, 3.521),
    }.items():
        found, found_bias = at(size)
        assert found == pytest.approx({"k1": of_k1, "k2": of_k2, "k3": of_k3}, rel=2e-4)
        assert found_bias == pytest.approx(bias, rel=1e-6)

    def k2_less_k1(value, *, error):
        found, bias = at(math.sqrt(2 * value))
        return found["k2"] ** 2 + error * bias**2 - found["k1"] ** 2

    for value, error in ((0.618, 0), (0.6056, 1)):
        assert k2_less_k1(value - 5e-4, error=error) < 0 < k2_less_k1(value + 5e-4, error=error)
    k3_less_k1 = [found["k3"] - found["k1"] for found, _ in (at(math.sqrt(2 * value)) for value in (0.627, 0.629))]
    assert k3_less_k1[0] < 0 < k3_less_k1[1]


logits = hnp.arrays(np.float64, 5, elements=st.floats(-4, 4))


@given(logits, logits)
def test_the_variance_of_k2_is_at_most_that_of_k1_times_the_largest_squared_log_ratio(policy, ref):
    log_policy, log_ref = log_softmax(policy), log_softmax(ref)
    found = variances(log_policy, log_ref)
    assert found["k2"] <= np.square(log_policy - log_ref).max() * found["k1"] * (1 + 1e-9) + 1e-15


@given(logits, logits)
def test_k3_varies_no_more_than_k1_where_the_reference_is_at_most_twice_the_policy(policy, ref):
    """An even mixture with the reference is such a policy."""
    log_ref = log_softmax(ref)
    log_policy = np.log((np.exp(log_softmax(policy)) + np.exp(log_ref)) / 2)
    found = variances(log_policy, log_ref)
    assert found["k3"] <= found["k1"] * (1 + 1e-9) + 1e-15


def test_the_leading_orders_of_variance_and_bias():
    """Along π ∝ ref e^{εh}: Var k1 = 2 KL = O(ε²), Var k2 = Var k3 = ¼ Var d² = O(ε⁴), bias of k2 = E[d³]/6 = O(ε³)."""
    rng = np.random.default_rng(0)
    log_ref, direction = log_softmax(rng.normal(size=6)), rng.normal(size=6)

    def at(size):
        log_policy = log_softmax(log_ref + size * direction)
        d = log_policy - log_ref
        found, value = variances(log_policy, log_ref), moments(log_policy, d)[0]
        u = np.expm1(-d)
        bias = moments(log_policy, d**2 / 2)[0] - value
        return {
            "Var k1 / 2 KL": found["k1"] / (2 * value),
            "Var k3 / Var k2": found["k3"] / found["k2"],
            "bias k2 / (E[d³]/6)": bias / (moments(log_policy, d**3)[0] / 6),
            "λ*": -moments(log_policy, d * u)[0] / moments(log_policy, u)[1],
        }, np.asarray([found["k1"], found["k2"], bias])

    (coarse, _), (ratios, here), (_, half) = at(1e-2), at(1e-3), at(5e-4)
    for name, ratio in ratios.items():
        assert abs(ratio - 1) < 5e-3 and abs(ratio - 1) < abs(coarse[name] - 1) / 5, name
    np.testing.assert_allclose(np.log2(here / half), [2, 4, 3], atol=5e-3)


def test_k2_is_not_an_f_divergence():
    """½ (log u)² bends the other way beyond u = e, and merging two outcomes may make E[k2] larger."""
    second = jax.vmap(jax.grad(jax.grad(lambda u: jnp.square(jnp.log(u)) / 2)))(jnp.exp(jnp.asarray([0.0, 0.9, 1.1])))
    np.testing.assert_allclose(second[0], 1)
    assert second[1] > 0 > second[2]
    policy, ref = np.asarray([0.98, 0.01, 0.01]), np.asarray([0.18, 0.02, 0.8])

    def mean_k2(p, q):
        return (p * np.square(np.log(p / q)) / 2).sum()

    merged = [np.asarray([each[0], each[1] + each[2]]) for each in (policy, ref)]
    assert mean_k2(*merged) > mean_k2(policy, ref) + 1e-3
    assert (merged[0] * np.log(merged[0] / merged[1])).sum() <= (policy * np.log(policy / ref)).sum(), "KL may not"


# T1f ------------------------------------------------------------------------------------------------------------------


def test_the_best_control_variate_has_the_weight_of_a_regression():
    """−log u + λ (u − 1) is least variable at λ* = −Cov(k1, u − 1)/Var u, which needs both distributions."""
    log_policy, log_ref = (log_softmax(np.random.default_rng(seed).normal(size=6)) for seed in (0, 1))
    d = log_policy - log_ref
    u = np.expm1(-d)
    mean, variance = moments(log_policy, d)
    np.testing.assert_allclose(moments(log_policy, u)[0], 0, atol=1e-15)
    covariance, spread = moments(log_policy, d * u)[0], moments(log_policy, u)[1]
    best = -covariance / spread

    def at(weight):
        found = moments(log_policy, d + weight * u)
        np.testing.assert_allclose(found[0], mean, rtol=1e-12)
        return found[1]

    np.testing.assert_allclose(at(best), variance - covariance**2 / spread, rtol=1e-12)
    assert at(best) < min(at(best - 0.01), at(best + 0.01), at(0.0), at(1.0)) and abs(best - 1) > 0.05
    np.testing.assert_allclose(at(1.0), variances(log_policy, log_ref)["k3"], rtol=1e-12)


def test_sums_of_token_estimators_have_each_another_gradient():
    """The second table of `objectives.kl`: k1 none, k2 and Rao-Blackwell E Σ ∇KL_t, k3 E Σ ∇KL_t(ref‖π)."""
    policy, ref = tables()

    def of(function):
        return expected_gradient(lambda params: function(logits_of(params), logits_of(ref)).sum(axis=1))

    reverse, forward = of(kl.exact_kl), of(kl.exact_forward_kl)
    found = {
        name: expected_gradient(lambda params, k=k: k(tokens_of(params), tokens_of(ref)).sum(axis=1))
        for name, k in ESTIMATORS.items()
    }
    np.testing.assert_allclose(found["k1"], 0, atol=1e-12)
    assert_is(found["k2"], reverse)
    assert_is(found["k3"], forward)
    assert differ(forward, reverse)
    whole = {
        "KL(π‖ref)": jax.grad(lambda params: divergence(log_probs(params), log_probs(ref)))(policy)["logits"],
        "KL(ref‖π)": jax.grad(lambda params: divergence(log_probs(ref), log_probs(params)))(policy)["logits"],
    }
    for exact in whole.values():
        assert differ(reverse, exact) and differ(forward, exact), "none is that of whole answers"
    at_prefixes_of_ref = expected_gradient(
        lambda params: kl.exact_forward_kl(logits_of(params), logits_of(ref)).sum(axis=1), sampler=ref
    )
    assert_is(at_prefixes_of_ref, whole["KL(ref‖π)"])


def test_k1_as_a_reward_goes_to_its_own_token_and_to_those_before_it():
    policy, ref = tables()
    k1 = kl.k1(tokens_of(policy), tokens_of(ref))
    to_go = jnp.cumsum(k1[:, ::-1], axis=1)[:, ::-1]

    def credited(weights):
        return expected_gradient(lambda params: (weights * tokens_of(params)).sum(axis=1))

    exact = oracle.sequence_kl_grad(LM, policy, ref)["logits"]
    own = expected_gradient(lambda params: kl.rao_blackwell_kl(logits_of(params), logits_of(ref)))
    assert_is(credited(to_go), exact)
    assert_is(credited(k1), own)
    assert_is(credited(to_go - k1), exact - own)


# T2b, T2c -------------------------------------------------------------------------------------------------------------


def test_from_finitely_many_pairs_dpo_may_have_no_minimum():
    """An answer that never lost: the loss falls along a ray on which KL(π*‖π) is unbounded. It happens at every n."""
    ref, rewards, pairs = jnp.log(jnp.asarray([0.5, 0.3, 0.2])), jnp.asarray([0.0, 0.5, 1.0]), 50
    population = oracle.population_preferences(ref, rewards)
    optimum = rlhf.gibbs_optimum(ref, rewards, beta=BETA)
    loses = population[:, 2].sum() - population[2, 2]
    assert (1 - loses) ** pairs > 1e-3, "the probability that it loses none of 50 pairs"
    chosen, rejected = jnp.asarray([(0, 1), (1, 0), (2, 0), (2, 1)]).T

    def loss(log_policy):
        given = log_policy[chosen], log_policy[rejected], ref[chosen], ref[rejected]
        return preference.dpo_loss(*given, beta=BETA).mean()

    ray = [jax.nn.log_softmax(ref + step * jnp.asarray([0.0, 0.0, 1.0])) for step in (0, 10, 20, 40, 80)]
    losses, divergences = [loss(each) for each in ray], [divergence(optimum, each) for each in ray]
    assert (np.diff(losses) < 0).all() and (np.diff(divergences) > 0).all() and divergences[-1] > 10
    assert divergence(ray[-1], optimum) < -optimum[2] + 1e-9, "the other divergence stays finite"


def test_bradley_terry_of_the_implied_reward_is_the_ratio_of_powers():
    """P(w ≻ l) = e^{r_w}/(e^{r_w} + e^{r_l}) with r = β log(π/ref) + β log Z(x): Z cancels."""
    policy, ref = (log_softmax(np.random.default_rng(seed).normal(size=2)) for seed in (0, 1))
    powers = np.exp(BETA * (policy - ref))
    for log_z in (0.0, 3.0):
        rewards = np.exp(BETA * (policy - ref) + BETA * log_z)
        np.testing.assert_allclose(rewards[0] / rewards.sum(), powers[0] / powers.sum(), rtol=1e-12)
    loss = preference.dpo_loss(*(jnp.asarray(each) for each in (*policy, *ref)), beta=BETA)
    np.testing.assert_allclose(np.exp(-loss), powers[0] / powers.sum(), rtol=1e-12)


def test_the_prefactor_beta_scales_the_step_and_a_label_of_share_p_ends_at_logit_p_over_beta():
    zeros = (jnp.zeros(()),) * 3
    for beta in (0.01, 0.1, 1.0):
        np.testing.assert_allclose(preference.dpo_loss.grad(jnp.zeros(()), *zeros, beta=beta)[0], -beta / 2, rtol=1e-12)
        margin = math.log(0.8 / 0.2) / beta
        slope = preference.dpo_loss.grad(jnp.asarray(margin), *zeros, beta=beta, label_smoothing=0.2)[0]
        np.testing.assert_allclose(slope, 0, atol=1e-12)
    weight = -preference.dpo_loss.grad(jnp.asarray(5.0), *zeros, beta=1e-6)[0] / 1e-6
    np.testing.assert_allclose(weight, 0.5, atol=1e-5, err_msg="as β falls, no pair is ever done")


# Amplification, losses, methods ---------------------------------------------------------------------------------------


def test_a_slight_majority_is_amplified_as_far_as_beta_and_the_reference_allow():
    table = {0.5: [0.600, 0.611, 0.692, 0.983], 0.01: [0.015, 0.016, 0.022, 0.368]}
    for reference, row in table.items():
        np.testing.assert_allclose(
            amplified_agreement(reference, 0.6, beta=np.asarray([1, 0.9, 0.5, 0.1])), row, atol=5e-4
        )
    assert float(amplified_agreement(0.01, 0.6, beta=0.01)) > 1 - 1e-12


def test_discopop_has_a_local_minimum_and_maximum_around_the_reference():
    x = jnp.linspace(-0.5, 0.5, 100_001)
    zeros = jnp.zeros_like(x)
    losses = np.asarray(preference.discopop_loss(x, zeros, zeros, zeros, beta=1.0))
    turns = np.flatnonzero(np.diff(np.sign(np.diff(losses)))) + 1
    np.testing.assert_allclose(losses[turns], [0.786, 0.878], atol=5e-4)
    edges = jnp.asarray([-1e-3, 1e-3])
    sharp = preference.discopop_loss(edges, *(jnp.zeros(2),) * 3, beta=1.0, temperature=1e-5)
    np.testing.assert_allclose(sharp, [math.log(2), 1], atol=2e-3)


def test_simpo_at_its_defaults_asks_for_five_nats_per_token():
    lead = jnp.asarray([0.0, 5.0])
    losses = preference.simpo_loss(lead, jnp.zeros(2))
    np.testing.assert_allclose(losses, [math.log1p(math.exp(0.5)), math.log(2)], rtol=1e-12)


def test_the_table_of_methods_in_the_documents_is_that_of_the_code():
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| (\d+) \|$", text, flags=re.MULTILINE)
    assert {row[0]: row[1:] for row in rows} == {
        name: (method.advantage, method.surrogate, method.mode, str(method.epochs)) for name, method in METHODS.items()
    }
    assert all(method.kl_loss is None for method in METHODS.values()), "KL in the reward, as the page says"
