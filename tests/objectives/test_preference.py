"""Facts about the preference losses: known values, minima, limits, and what extreme log-probabilities give."""

import functools
import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import preference
from jaxrl_llm.objectives.preference import PAIR_LOSSES

BETA = 0.3
OF_REFERENCE = {name: loss for name, loss in PAIR_LOSSES.items() if loss.needs == {"reference"}}
RATIOS = [(0.7, -1.1), (-2.0, 1.5), (3.0, 2.5), (0.0, 0.0)]  # (a, b)
MARGIN_ALONE = ("dpo", "robust_dpo", "ipo", "hinge", "exo", "discopop", "f_dpo")
DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORMULAS = {  # of a, b and β, at the defaults
    "dpo": lambda a, b, β: -log_sigmoid(β * (a - b)),
    "robust_dpo": lambda a, b, β: -log_sigmoid(β * (a - b)),
    "ipo": lambda a, b, β: (a - b - 1 / (2 * β)) ** 2,
    "hinge": lambda a, b, β: max(0.0, 1 - β * (a - b)),
    "exo": lambda a, b, β: (
        sigmoid(β * (a - b)) * (log_sigmoid(β * (a - b)) - math.log(0.999))
        + sigmoid(-β * (a - b)) * (log_sigmoid(-β * (a - b)) - math.log(0.001))
    ),
    "nca": lambda a, b, β: -log_sigmoid(β * a) - log_sigmoid(-β * a) / 2 - log_sigmoid(-β * b) / 2,
    "bco": lambda a, b, β: -log_sigmoid(β * a) - log_sigmoid(-β * b),
    "sppo": lambda a, b, β: (a - 1 / (2 * β)) ** 2 + (b + 1 / (2 * β)) ** 2,
    "apo_zero": lambda a, b, β: 1 - sigmoid(β * a) + sigmoid(β * b),
    "apo_down": lambda a, b, β: sigmoid(β * a) + 1 - sigmoid(β * (a - b)),
    "discopop": lambda a, b, β: (
        -log_sigmoid(β * (a - b)) * (1 - sigmoid(β * (a - b) / 0.05))
        + math.exp(-β * (a - b)) * sigmoid(β * (a - b) / 0.05)
    ),
    "f_dpo": lambda a, b, β: -log_sigmoid(β * (a - b)),
}


def four(a, b, dtype=np.float32):
    """Log-probabilities whose log-ratios are a and b, repeated to four pairs: with one shape little compiles."""
    a, b, zero = np.resize(a, 4), np.resize(b, 4), np.zeros(4)
    return tuple(np.asarray(each, dtype) for each in (a - 20, b - 31, zero - 20, zero - 31))


def of_four(values):
    return np.resize(np.asarray(values, np.float32), 4)


@functools.cache
def compiled(function):
    """The hyperparameters are traced, but for words."""
    return jax.jit(
        function, static_argnames=[each for each in inspect.signature(function).parameters if each == "divergence"]
    )


def of_pair(loss, a, b, **settings):
    """The loss in float64."""
    with jax.enable_x64(True):
        return np.asarray(compiled(loss)(*four(a, b, np.float64), **settings))[: np.size(a)].reshape(np.shape(a))


def slope(loss, x, **settings):
    """dL/da in closed form at a = x, b = 0, in float64."""
    with jax.enable_x64(True):
        return float(compiled(loss.grad)(*four(x, 0.0, np.float64), **settings)[0][0])


@pytest.mark.parametrize("name", OF_REFERENCE)
def test_value_is_the_formula(name):
    a, b = np.array(RATIOS).T
    expected = [FORMULAS[name](*pair, BETA) for pair in RATIOS]
    np.testing.assert_allclose(of_pair(PAIR_LOSSES[name], a, b, beta=BETA), expected, rtol=1e-12)


def test_every_loss_is_listed_by_its_name_also_in_the_table_of_the_module():
    assert all(loss.__name__ == f"{name}_loss" for name, loss in PAIR_LOSSES.items())
    assert set(OF_REFERENCE) == set(FORMULAS)
    table = re.findall(r"^\| (\w+) \|", preference.__doc__, re.MULTILINE)
    assert table == ["loss", *PAIR_LOSSES, "kto"]


def test_the_arguments_of_a_loss_have_names():
    policy, ref = ["logp_policy_chosen", "logp_policy_rejected"], ["logp_ref_chosen", "logp_ref_rejected"]
    for loss in PAIR_LOSSES.values():
        names = policy + (ref if "reference" in loss.needs else [])
        names += [name.replace("_c", "_tail_c").replace("_rej", "_tail_rej") for name in names] * (
            "tails" in loss.needs
        )
        names += ["length_chosen", "length_rejected"] * ("lengths" in loss.needs)
        names += ["alignment_chosen", "alignment_rejected"] * ("alignments" in loss.needs)
        assert list(inspect.signature(loss).parameters) == [*names, *loss.hyperparameters]
        assert all(name in loss.__doc__ for name in [*names, "Raises:", "Source:"])
    assert preference.simpo_loss.needs == preference.orpo_loss.needs == {"means"} and not preference.cpo_loss.needs
    assert preference.dpo_loss.hyperparameters == {"beta": 0.1, "label_smoothing": 0.0, "margin": 0.0}
    logps = four(0.7, -1.1)
    by_name = preference.dpo_loss(**dict(zip(policy + ref, logps, strict=True)))
    np.testing.assert_array_equal(by_name, preference.dpo_loss(*logps))


def test_a_loss_of_ones_own_is_checked_has_a_gradient_and_is_not_listed():
    @preference.pair_loss(margin="[0, inf)")
    def squared_loss(a, b, *, beta=0.1, margin=1.0):
        """(βΔ − m)²."""
        return jnp.square(beta * (a - b) - margin)

    @squared_loss.gradient
    def _(a, b, *, beta, margin):
        return 2 * beta * (beta * (a - b) - margin)

    arrays = four(*np.array(RATIOS).T)
    total = lambda *logps: squared_loss(*logps, margin=0.5).sum()  # noqa: E731
    expected = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*arrays)
    np.testing.assert_allclose(squared_loss.grad(*arrays, margin=0.5), expected, rtol=1e-5)
    assert "squared" not in PAIR_LOSSES and "Args:" in squared_loss.__doc__
    with pytest.raises(ValueError, match=r"margin must lie in \[0, inf\), but is -1"):
        squared_loss(*arrays, margin=-1)
    with pytest.raises(ValueError, match=r"logp_ref_chosen must be \[\*batch\] = \[4\] as in logp_policy_chosen"):
        squared_loss(*arrays[:2], arrays[2][:3], arrays[3])
    with pytest.raises(ValueError, match="must take a, b, length_chosen, length_rejected, but <lambda> takes a, b"):
        preference.pair_loss(needs=("lengths",))(lambda a, b: a - b)


@pytest.mark.parametrize("name", sorted(set(OF_REFERENCE) - {"exo"}))  # which is flat far below its optimum
def test_the_gradient_separates_a_pair_that_the_policy_has_the_wrong_way_round(name):
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = compiled(PAIR_LOSSES[name].grad)(
        *four(-1.0, 2.0), beta=BETA
    )
    assert (policy_chosen < 0).all() or name == "apo_down"
    assert (policy_rejected > 0).all()
    assert (ref_chosen == -policy_chosen).all() and (ref_rejected == -policy_rejected).all()


@pytest.mark.parametrize("loss", [preference.dpo_loss, preference.exo_loss])
@pytest.mark.parametrize("ε", [0.05, 0.3])
def test_label_smoothing_puts_the_optimum_at_the_log_odds_of_the_label(loss, ε):
    optimum = math.log((1 - ε) / ε) / BETA
    assert abs(slope(loss, optimum, beta=BETA, label_smoothing=ε)) < 1e-12
    assert slope(loss, optimum - 0.1, beta=BETA, label_smoothing=ε) < -1e-4
    assert slope(loss, optimum + 0.1, beta=BETA, label_smoothing=ε) > 1e-4


def test_exo_is_a_divergence_that_vanishes_at_its_optimum_and_is_at_most_minus_log_of_the_smoothing():
    ε = 0.2
    at = of_pair(preference.exo_loss, [math.log((1 - ε) / ε), -1e4], [0.0, 0.0], beta=1.0, label_smoothing=ε)
    np.testing.assert_allclose(at, [0, -math.log(ε)], atol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_ipo_has_its_minimum_at_a_margin_of_one_over_two_beta(beta):
    assert of_pair(preference.ipo_loss, 1 / (2 * beta), 0.0, beta=beta) < 1e-20
    assert slope(preference.ipo_loss, 1 / (2 * beta) - 1, beta=beta) == pytest.approx(-2)
    assert slope(preference.ipo_loss, 1 / (2 * beta) + 1, beta=beta) == pytest.approx(2)


def test_ipo_of_averages_is_another_loss():
    sums = four(1.0, -2.0)
    averages = tuple(logp / 10 for logp in sums)
    losses = [np.asarray(compiled(preference.ipo_loss)(*each)) for each in (sums, averages)]
    assert (np.abs(losses[0] - losses[1]) > 10).all()


def test_dpo_falls_by_a_half_per_unit_of_the_margin_at_the_reference():
    assert slope(preference.dpo_loss, 0.0, beta=BETA) == pytest.approx(-BETA / 2)
    assert slope(preference.dpo_loss, 1e3, beta=BETA) == pytest.approx(0, abs=1e-100)
    assert slope(preference.dpo_loss, -1e3, beta=BETA) == pytest.approx(-BETA)


@pytest.mark.parametrize("margin", [-3.0, 0.4, 5.0])
def test_robust_dpo_over_flipped_labels_is_in_the_mean_the_clean_loss(margin):
    ε = 0.3
    kept, flipped = of_pair(preference.robust_dpo_loss, [margin, -margin], [0.0, 0.0], beta=BETA, label_smoothing=ε)
    clean = of_pair(preference.dpo_loss, margin, 0.0, beta=BETA)
    assert (1 - ε) * kept + ε * flipped == pytest.approx(clean, rel=1e-12)


def test_the_hinge_has_no_gradient_from_its_kink_on():
    gradient = compiled(preference.hinge_loss.grad)(*four([1.99, 2.0, 2.01], 0.0), beta=0.5)
    np.testing.assert_array_equal(gradient[0][:3], [-0.5, 0, 0])
    total = lambda *logps: preference.hinge_loss(*logps, beta=0.5).sum()  # noqa: E731
    by_autodiff = jax.jit(jax.grad(total))(*four(2.0, 0.0))
    assert (by_autodiff == 0).all()


def test_nca_has_its_optimum_in_the_chosen_response_at_log_two():
    assert abs(slope(preference.nca_loss, math.log(2) / BETA, beta=BETA)) < 1e-12
    assert slope(preference.nca_loss, 0.0, beta=BETA) < 0 < slope(preference.nca_loss, 3 / BETA, beta=BETA)


def test_bco_counts_rewards_from_the_shift():
    moved = of_pair(preference.bco_loss, 1.0 + 0.6 / BETA, -2.0 + 0.6 / BETA, beta=BETA, reward_shift=0.6)
    assert moved == pytest.approx(of_pair(preference.bco_loss, 1.0, -2.0, beta=BETA))
    total = lambda shift: preference.bco_loss(*four(1.0, -2.0), reward_shift=shift).sum()  # noqa: E731
    assert jax.jit(jax.grad(total))(0.6) == 0


def test_sppo_has_its_optimum_where_the_rewards_are_plus_and_minus_a_half():
    assert of_pair(preference.sppo_loss, 1 / (2 * BETA), -1 / (2 * BETA), beta=BETA) < 1e-20


@pytest.mark.parametrize(("name", "sign_of_chosen"), [("apo_zero", -1), ("apo_down", 1)])
def test_apo_moves_the_chosen_response_up_or_down(name, sign_of_chosen):
    of_chosen, of_rejected, *_ = compiled(PAIR_LOSSES[name].grad)(*four(0.0, -3.0), beta=1.0)
    assert (np.sign(of_chosen) == sign_of_chosen).all()
    assert (of_rejected > 0).all()


def test_discopop_is_logistic_far_below_and_exponential_far_above_and_not_monotone_between():
    losses = of_pair(preference.discopop_loss, [-5.0, 5.0, -0.2, 0.2], [0.0] * 4, beta=1.0)
    np.testing.assert_allclose(losses[:2], [-log_sigmoid(-5), math.exp(-5)], rtol=1e-9)
    assert losses[2] < losses[3] and losses[0] > losses[2]


def test_discopop_where_the_modulation_underflows_and_the_exponential_overflows():
    loss, arrays = preference.discopop_loss, four(-1e4, 0.0)
    np.testing.assert_allclose(compiled(loss)(*arrays, beta=1.0), 1e4, rtol=1e-6)
    np.testing.assert_allclose(compiled(loss.grad)(*arrays, beta=1.0)[0], -1, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "derivative"),
    [
        ({"divergence": "reverse_kl"}, lambda u: np.log(u)),
        ({"divergence": "forward_kl"}, lambda u: 1 - 1 / u),
        ({"divergence": "jensen_shannon"}, lambda u: np.log(2 * u / (1 + u))),
        ({"divergence": "alpha", "alpha": 0.3}, lambda u: (u**-0.7 - 1) / -0.7),
        ({"divergence": "alpha", "alpha": 2.0}, lambda u: u - 1),
        ({"divergence": "alpha", "alpha": 1.0}, lambda u: np.log(u)),
        ({"divergence": "alpha", "alpha": 0.0}, lambda u: 1 - 1 / u),
    ],
)
def test_f_dpo_scores_the_ratio_by_the_derivative_of_f(settings, derivative):
    a, b = np.array(RATIOS).T
    margin = BETA * (derivative(np.exp(a)) - derivative(np.exp(b)))
    found = of_pair(preference.f_dpo_loss, a, b, beta=BETA, **settings)
    np.testing.assert_allclose(found, np.log1p(np.exp(-margin)), rtol=1e-12)


def test_f_dpo_passes_into_the_reverse_divergence_as_alpha_nears_one_and_takes_a_traced_alpha():
    expected = of_pair(preference.dpo_loss, 0.7, -1.1, beta=BETA)
    near = [
        of_pair(preference.f_dpo_loss, 0.7, -1.1, beta=BETA, divergence="alpha", alpha=1 + d) for d in (1e-9, -1e-9)
    ]
    np.testing.assert_allclose(near, expected, rtol=1e-8)

    @jax.jit
    def slope_at(alpha):
        return preference.f_dpo_loss.grad(*four(0.7, -1.1), beta=BETA, divergence="alpha", alpha=alpha)[0]

    np.testing.assert_allclose(
        slope_at(1.0), compiled(preference.dpo_loss.grad)(*four(0.7, -1.1), beta=BETA)[0], rtol=1e-5
    )
    assert (abs(slope_at(0.5) - slope_at(1.0)) > 1e-3).all()


FLAT = np.float32([-40, -30, -20, -5, 0.5, 5, 20, 40])


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in OF_REFERENCE if name in MARGIN_ALONE]
    + [("f_dpo", {"divergence": each}) for each in DIVERGENCES[1:]]
    + [("f_dpo", {"divergence": "alpha", "alpha": each}) for each in (0.3, 0.0, 1.7)],
)
def test_at_equal_log_ratios_of_any_size_the_loss_is_that_of_the_reference_under_jit_too(name, settings):
    """A difference of two large equal terms would be the rounding error of one of them, by a fused multiply-add."""
    loss, zero = PAIR_LOSSES[name], np.zeros_like(FLAT)
    found = [jax.jit(functools.partial(loss, **settings))(each, each.copy(), zero, zero) for each in (FLAT, zero)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.parametrize("c", [-1.0, -0.7, 0.5, 1.0])
def test_a_difference_of_powers_keeps_its_digits(c):
    a = np.float32([-40, -20, 3, 30])
    step = np.float32([1e-3, -1e-2, 1e-4, -1e-3])
    b = (a + step).astype(np.float32)
    found = jax.jit(preference._power_difference, static_argnums=2)(a, b, c)
    wide = [each.astype(np.float64) for each in (a, b)]
    expected = -np.exp(c * wide[0]) * np.expm1(c * (wide[1] - wide[0])) / c
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*sorted(set(OF_REFERENCE) - {"ipo", "sppo"}), "simpo", "cpo", "kto"])
def test_autodiff_of_a_saturated_loss_has_its_digits(name):
    """Of σ(x) (1 − σ(x)) nothing is left in float32 from x = 17 on."""
    x = np.float32([-40, -20, -16, -12, -3, 3, 12, 16, 20, 40])
    loss, zero = getattr(preference, f"{name}_loss"), np.zeros_like(x)
    policy = (x, zero + 1) if name != "kto" else (x,)
    reference = (zero,) * len(policy) if "reference" in getattr(loss, "needs", ("reference",)) else ()
    constants = (np.arange(x.size) % 2 == 0, zero) if name == "kto" else ()

    @jax.jit
    def slopes(*given):
        total = lambda first: loss(first, *given[1:], *constants, beta=1.0).sum()  # noqa: E731
        return jax.grad(total)(given[0]), loss.grad(*given, *constants, beta=1.0)[0]

    by_autodiff, closed = slopes(*policy, *reference)
    np.testing.assert_allclose(by_autodiff, closed, rtol=1e-5, atol=1e-37)
    assert np.count_nonzero(closed) >= x.size // 2


def test_length_normalised_dpo_is_dpo_of_log_ratios_per_token():
    logps, lengths = four([6.0, -2.0], [2.0, 1.0]), (np.array([3, 4] * 2), np.array([2, 5] * 2))
    per_token = four([2.0, -0.5], [1.0, 0.2])
    normalised, dpo = compiled(preference.length_normalised_dpo_loss), compiled(preference.dpo_loss)
    np.testing.assert_allclose(normalised(*logps, *lengths), dpo(*per_token), rtol=1e-5)
    ones, smoothed = np.ones((2, 4), int), {"label_smoothing": 0.2}
    np.testing.assert_allclose(normalised(*logps, *ones, **smoothed), dpo(*logps, **smoothed), rtol=1e-6)


def test_length_normalised_dpo_wants_lengths_of_at_least_one():
    logps = four([6.0, -2.0], [2.0, 1.0])
    with pytest.raises(ValueError, match=r"length_rejected must be at least 1"):
        preference.length_normalised_dpo_loss(*logps, jnp.ones(4, int), jnp.array([2, 0, 1, 1]))
    traced = compiled(preference.length_normalised_dpo_loss)(*logps, np.array([1, 0, 1, 1]), np.ones(4, int))
    np.testing.assert_allclose(traced, compiled(preference.dpo_loss)(*logps), rtol=1e-6)


def test_a_margin_of_dpo_is_an_offset_of_its_reward_and_may_be_one_for_each_pair():
    margins = np.array([0.5, -0.2, 0.0, 2.0], np.float32)
    moved = compiled(preference.dpo_loss)(*four(0.7, -1.1), beta=BETA, margin=margins)
    for found, margin in zip(moved, margins, strict=True):
        assert float(found) == pytest.approx(-log_sigmoid(BETA * 1.8 - float(margin)), rel=1e-5)
    total = lambda margin: preference.dpo_loss(*four(0.7, -1.1), margin=margin).sum()  # noqa: E731
    assert (jax.jit(jax.grad(total))(margins) == 0).all()
    with pytest.raises(ValueError, match=r"margin must be a number or \[\*batch\] = \[4\] as in logp_policy_chosen"):
        preference.dpo_loss(*four(0.7, -1.1), margin=margins[:3])


def test_ld_dpo_is_dpo_at_alpha_one_and_without_the_tails_at_alpha_zero():
    a, b = np.array(RATIOS).T
    whole, tails = four(a, b), four(a / 3, 0 * b)
    loss, dpo = compiled(preference.ld_dpo_loss), compiled(preference.dpo_loss)
    np.testing.assert_allclose(loss(*whole, *tails, beta=BETA, alpha=1.0), dpo(*whole, beta=BETA), rtol=1e-5)
    np.testing.assert_allclose(
        loss(*whole, *tails, beta=BETA, alpha=0.0), dpo(*four(2 * a / 3, b), beta=BETA), rtol=1e-5
    )


def test_the_weight_of_wpo_is_at_most_one_and_the_product_of_both_alignments():
    pairs, s_w, s_l = four(0.7, -1.1), np.float32([-1, -1, 2, 0.5]), np.float32([-0.5, 0.25, -3, 1])
    found = compiled(preference.wpo_loss)(*pairs, s_w, s_l, beta=BETA)
    dpo = compiled(preference.dpo_loss)(*pairs, beta=BETA)
    np.testing.assert_allclose(found / dpo, [math.exp(-1.5), math.exp(-0.75), math.exp(-1), 1], rtol=1e-5)


def test_aot_compares_quantiles_of_a_batch_and_of_one_pair_is_dpo():
    a, b = np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.2, 0.1, -4.0, 1.0])
    pairs = four(a, b)  # whose reference prefers the chosen ones by 11
    policy = np.sort(np.asarray(pairs[0]) - pairs[1]) - 11
    paired = compiled(preference.aot_loss)(*pairs, beta=BETA)
    np.testing.assert_allclose(paired, [-log_sigmoid(BETA * each) for each in policy], rtol=1e-5)
    unpaired = compiled(preference.aot_unpaired_loss)(*pairs, beta=BETA)
    np.testing.assert_allclose(unpaired, [-log_sigmoid(BETA * each) for each in np.sort(a) - np.sort(b)], rtol=1e-5)
    one = [each[:1] for each in pairs]
    for loss in (preference.aot_loss, preference.aot_unpaired_loss):
        np.testing.assert_allclose(loss(*one, beta=BETA), preference.dpo_loss(*one, beta=BETA), rtol=1e-6)


def test_the_aot_gradient_is_that_of_the_pair_with_the_quantile():
    policy = np.float32([3, 1, 2, 0])
    slopes = compiled(preference.aot_loss.grad)(policy, *[np.zeros(4, np.float32)] * 3, beta=1.0)
    np.testing.assert_allclose(slopes[0], [-sigmoid(-float(each)) for each in policy], rtol=1e-5)


@pytest.mark.parametrize("alpha", [1e-6, -1e-6, 0.0])
def test_alphapo_passes_into_simpo(alpha):
    w, l = of_four([-1.0, -0.5]), of_four([-2.0, -0.75])  # noqa: E741
    found = compiled(preference.alphapo_loss)(w, l, beta=2.0, gamma=0.5, alpha=alpha)
    np.testing.assert_allclose(found, compiled(preference.simpo_loss)(w, l, beta=2.0, gamma=0.5), rtol=1e-5)


def test_alphapo_by_hand():
    found = preference.alphapo_loss(of_four(-1.0), of_four(-2.0), beta=2.0, gamma=0.5, alpha=0.25)
    lead = 2 * (math.exp(0.5) - math.exp(0.25)) / 0.25
    np.testing.assert_allclose(found, -log_sigmoid(lead - 0.5), rtol=1e-5)


def test_simpo_at_equal_averages_and_at_its_target_margin():
    w, l = of_four([-1.0, -0.5]), of_four([-1.0, -0.75])  # noqa: E741
    found = compiled(preference.simpo_loss)(w, l, beta=2.0, gamma=0.5)
    np.testing.assert_allclose(found[:2], [math.log1p(math.exp(0.5)), math.log(2)], rtol=1e-6)


def test_orpo_by_hand():
    # p_w = ½ and p_l = ⅓ have the odds 1 and ½: the odds ratio is 2, and σ(log 2) = ⅔.
    w, l = of_four(math.log(1 / 2)), of_four(math.log(1 / 3))  # noqa: E741
    expected = math.log(2) + 0.4 * math.log(1.5)
    np.testing.assert_allclose(compiled(preference.orpo_loss)(w, l, beta=0.4), expected, rtol=1e-6)
    np.testing.assert_allclose(compiled(preference.orpo_loss)(w, l, beta=1.0, nll_weight=0.0), math.log(1.5), rtol=1e-6)
    of_chosen, of_rejected = compiled(preference.orpo_loss.grad)(
        w, l, beta=0.4
    )  # σ(−log 2) = ⅓; 1 − p_w = ½, 1 − p_l = ⅔
    np.testing.assert_allclose(of_chosen, -1 - 0.4 / 3 * 2, rtol=1e-6)
    np.testing.assert_allclose(of_rejected, 0.4 / 3 * 1.5, rtol=1e-6)


def test_orpo_near_a_probability_of_one():
    log_odds = {x: x - math.log(-math.expm1(x)) for x in (-1e-7, -1.0)}
    near, far, at_one = of_four(-1e-7), of_four(-1.0), of_four(0.0)
    expected = math.log1p(math.exp(log_odds[-1e-7] - log_odds[-1.0]))
    np.testing.assert_allclose(compiled(preference.orpo_loss)(far, near, beta=1.0, nll_weight=0.0), expected, rtol=1e-5)
    of_chosen, of_rejected = compiled(preference.orpo_loss.grad)(far, at_one, beta=1.0)
    assert np.isfinite(of_chosen).all() and np.isfinite(of_rejected).all()
    assert (of_rejected > 1e6).all()  # it does not vanish there


def test_orpo_gradient_is_the_difference_quotient():
    with jax.enable_x64(True):
        w, l, step = np.array([-0.01, -0.6931, -0.71, -3.0]), np.full(4, -1.2), 1e-6  # noqa: E741
        above, below = (np.asarray(compiled(preference.orpo_loss)(w + d, l, beta=1.0)) for d in (step, -step))
        (slope, _) = compiled(preference.orpo_loss.grad)(w, l, beta=1.0)
        np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-6)


def test_cpo_is_dpo_with_a_uniform_reference_plus_the_likelihood_of_the_chosen_response():
    w, l, uniform = of_four([-3.0, -9.0]), of_four([-5.0, -2.0]), of_four(-11.0)  # noqa: E741
    dpo = compiled(preference.dpo_loss)(w, l, uniform, uniform, beta=BETA, label_smoothing=0.1)
    found = compiled(preference.cpo_loss)(w, l, beta=BETA, label_smoothing=0.1, nll_weight=0.5)
    np.testing.assert_allclose(found, dpo - 0.5 * w, rtol=1e-6)


def test_kto_by_hand():
    found = compiled(preference.kto_loss)(
        of_four([-7.0, -7.0, -8.5]),
        of_four(-9.0),
        np.array([True, False, True, True]),
        of_four([0.5, 0.5, -7.0]),
        beta=BETA,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    good, bad, clipped = 2 * (1 - sigmoid(BETA * 1.5)), 3 * (1 - sigmoid(-BETA * 1.5)), 2 * (1 - sigmoid(BETA * 0.5))
    np.testing.assert_allclose(found[:3], [good, bad, clipped], rtol=1e-6)


def test_kto_pushes_the_desirable_up_and_the_undesirable_down():
    policy, ref, desirable = of_four(-3.0), of_four([-3.0, -4.0]), np.array([True, False] * 2)
    of_policy, of_ref = compiled(preference.kto_loss.grad)(policy, ref, desirable, 0.1, beta=1.0)
    assert of_policy[0] < 0 < of_policy[1]
    np.testing.assert_array_equal(of_ref, -of_policy)
    np.testing.assert_allclose(compiled(preference.kto_loss)(policy, policy, desirable, 0.0), 0.5)


def test_kto_reference_point():
    policy, ref = np.float32([-3.0, -5.0]), np.float32([-4.0, -5.5])
    assert preference.kto_reference_point(policy, ref) == pytest.approx(0.75)
    assert preference.kto_reference_point(ref, policy) == 0
    assert (jax.jit(jax.grad(preference.kto_reference_point))(policy, ref) == 0).all()
    with pytest.raises(ValueError, match="at least 2"):
        preference.kto_reference_point(policy[:1], ref[:1])


def test_kto_with_a_batch_of_one_would_cancel_its_own_signal():
    policy, ref = np.float32([-3.0]), np.float32([-4.0])
    own = (policy - ref)[0]
    found = [
        compiled(preference.kto_loss)(policy + shift, ref, np.array([True]), own + shift)[0] for shift in (0.0, 5.0)
    ]
    np.testing.assert_allclose(found, [0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *[
            (name, {"beta": beta}, r"beta must lie in \(0, inf\)")
            for name in sorted({*PAIR_LOSSES} - {"sft"})
            for beta in (0.0, -1.0)
        ],
        ("ld_dpo", {"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ("dpo", {"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\]"),
        ("cpo", {"label_smoothing": 1.1}, r"label_smoothing must lie in \[0, 1\]"),
        ("robust_dpo", {"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
        ("exo", {"label_smoothing": 0.0}, r"label_smoothing must lie in \(0, 1\)"),
        ("discopop", {"temperature": 0.0}, "temperature must lie in"),
        ("f_dpo", {"divergence": "hellinger"}, "reverse_kl, forward_kl, jensen_shannon, alpha.*hellinger"),
        ("f_dpo", {"divergence": "alpha", "alpha": -1.0}, "alpha must lie in"),
        ("f_dpo", {"divergence": "forward_kl", "alpha": 0.3}, 'alpha must be given with the divergence "alpha" alone'),
        ("f_dpo", {"alpha": 0.3}, 'alpha must be given with the divergence "alpha" alone'),
        ("orpo", {"nll_weight": -1.0}, "nll_weight must lie in"),
        ("cpo", {"nll_weight": -1.0}, "nll_weight must lie in"),
    ],
)
def test_hyperparameters_out_of_range_are_refused_by_loss_and_gradient(name, settings, message):
    arrays = [
        np.full(2, -1.0, np.float32) for each in inspect.signature(PAIR_LOSSES[name]).parameters if each[:4] == "logp"
    ]
    arrays += [np.ones(2, int)] * 2 if "lengths" in PAIR_LOSSES[name].needs else []
    arrays += [np.zeros(2, np.float32)] * 2 if "alignments" in PAIR_LOSSES[name].needs else []
    for function in (PAIR_LOSSES[name], PAIR_LOSSES[name].grad):
        with pytest.raises(ValueError, match=message):
            function(*arrays, **settings)


def test_orpo_refuses_a_positive_log_probability():
    for function in (preference.orpo_loss, preference.orpo_loss.grad):
        with pytest.raises(ValueError, match="log-probabilities must not be positive"):
            function(jnp.array([0.1, -1.0]), jnp.full(2, -1.0))


def test_beta_may_be_traced():
    found = jax.jit(lambda beta: preference.ipo_loss(*four(1.0, -2.0), beta=beta))(BETA)
    np.testing.assert_allclose(found, FORMULAS["ipo"](1.0, -2.0, BETA), rtol=1e-5)


GRID = np.array(list(itertools.product([-np.inf, -1e4, -3.0, -1e-7, 0.0], repeat=4)), np.float32).T
SETTINGS = {
    **{name: {} for name in (*PAIR_LOSSES, "kto")},
    "dpo smoothed": {"label_smoothing": 0.1},
    "discopop": {"temperature": 1.5},
    **{f"f_dpo {each}": {"divergence": each} | ({"alpha": 0.4} if each == "alpha" else {}) for each in DIVERGENCES},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_extreme_log_probabilities(name):
    """At -1e4 all is finite; at -inf the gradient is, is what autodiff finds, and one -inf gives no NaN."""
    loss = getattr(preference, f"{name.split()[0]}_loss")
    count = 4 if "reference" in getattr(loss, "needs", ()) else 2
    tails = "tails" in getattr(loss, "needs", ())
    grid = GRID[:, np.isfinite(GRID).all(axis=0)] if name.startswith("aot") else GRID  # which mixes the pairs
    arrays = list(grid[:count]) + list(grid / 2) * tails
    size = arrays[0].size
    constants = {
        "kto": (np.arange(size) % 2 == 0, np.ones(size, np.float32)),
        "length_normalised_dpo": (np.full(size, 3), np.full(size, 2)),
        "wpo": (np.float32(GRID[1]), np.ones(size, np.float32)),
    }.get(name, ())

    settings = SETTINGS[name] | ({"beta": BETA} if name != "sft" else {})

    @jax.jit
    def everything(*arrays):
        value, pull_back = jax.vjp(lambda *logps: loss(*logps, *constants, **settings), *arrays)
        return value, pull_back(jnp.ones_like(value)), loss.grad(*arrays, *constants, **settings)

    value, by_autodiff, closed = everything(*arrays)
    infinite = np.isinf(arrays[:count]).sum(axis=0)
    assert np.isfinite(value[infinite == 0]).all()
    assert not np.isnan(value[infinite <= 1]).any()
    assert np.isfinite(by_autodiff).all() and np.isfinite(closed).all()
    np.testing.assert_allclose(closed, by_autodiff, rtol=1e-4, atol=1e-6)
    assert all((gradient[np.isinf(array)] == 0).all() for gradient, array in zip(closed, arrays, strict=False))
