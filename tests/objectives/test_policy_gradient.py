import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import policy_gradient as pg
from tests.objectives import cases_policy_gradient
from tests.objectives.cases import Sizes

RNG = np.random.default_rng(0)
STATIC = ("dual_clip", "length_normalised", "mode", "clip")


def jitted(function):
    names = inspect.signature(function).parameters
    return jax.jit(function, static_argnames=[name for name in STATIC if name in names])


compiled = {name: jitted(each) for name, each in vars(pg).items() if name.endswith(("_loss", "_weight"))}
closed_form = {name: jitted(each.grad) for name, each in vars(pg).items() if name.endswith("_loss")}


def f32(array):
    return np.asarray(array, np.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@functools.cache
def differentiated(name):
    loss = getattr(pg, name)

    def total(first, *rest, **settings):
        values = loss(first, *rest, **settings)
        return values.sum(), values

    static = [each for each in inspect.signature(loss).parameters if each in STATIC]
    return jax.jit(jax.grad(total, has_aux=True), static_argnames=static)


def value_and_gradient(name, *arrays, **settings):
    """The unreduced loss, and its derivative with respect to the first argument, by autodiff."""
    gradient, values = differentiated(name)(*arrays, **settings)
    return np.asarray(values), np.asarray(gradient)


def test_reinforce_is_minus_advantage_times_log_probability():
    values, gradient = value_and_gradient("reinforce_loss", f32([-1.0, -2.0]), f32([3.0, -0.5]))
    np.testing.assert_array_equal(values, [3, -1])
    np.testing.assert_array_equal(gradient, [-3, 0.5])


def test_reinforce_on_samples_of_the_policy_has_the_gradient_of_the_expected_reward():
    logits, reward = f32([0.3, -0.8, 1.1, 0.0]), f32([1.0, 2.0, -3.0, 0.5])
    probs = np.exp(logits) / np.exp(logits).sum()

    def expected_loss(logits, baseline):  # each answer with its probability, a constant
        return (probs * pg.reinforce_loss(jax.nn.log_softmax(logits), reward - baseline)).sum()

    truth = jax.jit(jax.grad(lambda logits: jax.nn.softmax(logits) @ reward))(logits)
    for baseline in (0.0, 7.0):
        close(jax.jit(jax.grad(expected_loss))(logits, baseline), -truth)


# ρ, A → loss and gradient, at clip_low .25 and clip_high .5. The interval is [.75, 1.5].
PPO = [
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.25, 2.0, -2.5, -2.5),
    (2.0, 2.0, -3.0, 0.0),  # above, and A wants it higher: clipped
    (0.5, 2.0, -1.0, -1.0),  # below, and A wants it higher: not clipped
    (0.5, -2.0, 1.5, 0.0),  # below, and A wants it lower: clipped
    (2.0, -2.0, 4.0, 4.0),  # above, and A wants it lower: not clipped
    (1.4, 2.0, -2.8, -2.8),  # inside the upper clip, outside the lower one if they were swapped
    (0.7, -2.0, 1.5, 0.0),
    (8.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("by", ["autodiff", "closed form"])
def test_ppo_clips_the_right_side_for_each_sign_of_the_advantage(by):
    ratio, advantages, loss, slope = f32(PPO).T
    arrays = (np.log(ratio) - 1, np.full(len(PPO), np.float32(-1)), advantages)
    settings = {"clip_low": 0.25, "clip_high": 0.5}
    values, gradient = value_and_gradient("ppo_clip_loss", *arrays, **settings)
    close(values, loss)
    if by == "closed form":
        (gradient,) = closed_form["ppo_clip_loss"](*arrays, **settings)
    close(gradient, slope)
    assert (np.asarray(gradient)[np.asarray(slope) == 0] == 0).all()  # exactly


@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ppo_at_ratio_one_is_reinforce(clip, dual_clip):
    advantages = f32([1.5, -2.0, 0.0])
    logp = f32([-1.0, -3.0, -0.1])
    settings = {"clip_low": clip, "clip_high": clip, "dual_clip": dual_clip}
    values, gradient = value_and_gradient("ppo_clip_loss", logp, logp, advantages, **settings)
    np.testing.assert_array_equal(values, -advantages)
    np.testing.assert_array_equal(gradient, -advantages)
    np.testing.assert_array_equal(closed_form["ppo_clip_loss"](logp, logp, advantages, **settings)[0], -advantages)


def test_ppo_is_the_formula_of_the_papers():
    d, advantages = 1.5 * RNG.normal(size=200), RNG.normal(size=200)
    ratio = np.exp(d)
    plain = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages)
    dual = np.where(advantages < 0, np.maximum(plain, 2.5 * advantages), plain)
    assert (plain != dual).any() and (plain != ratio * advantages).any()
    arrays, clips = (f32(d - 2), np.full(200, np.float32(-2)), f32(advantages)), {"clip_low": 0.2, "clip_high": 0.3}
    close(compiled["ppo_clip_loss"](*arrays, **clips), -plain)
    close(compiled["ppo_clip_loss"](*arrays, **clips, dual_clip=2.5), -dual)


def test_the_dual_clip_bounds_the_loss_of_a_token_that_became_likely():
    arrays = f32([-0.01] * 3), f32([-9.0] * 3), f32([-2.0, 2.0, 0.0])
    values, gradient = value_and_gradient("ppo_clip_loss", *arrays, dual_clip=3.0)
    close(values, [6.0, -2.4, 0.0])  # −cA; the plain clip
    np.testing.assert_array_equal(gradient, 0)
    values, gradient = value_and_gradient("ppo_clip_loss", *arrays)
    assert values[0] > 1e4 and gradient[0] > 1e4


def test_gspo_of_one_token_is_ppo_and_of_equal_tokens_too():
    logp_policy, logp_old, advantages = (f32(RNG.normal(size=20)) for _ in range(3))
    clips = {"clip_low": 0.2, "clip_high": 0.4}
    ppo = value_and_gradient("ppo_clip_loss", logp_policy, logp_old, advantages, **clips)
    for time in (1, 3):
        policy, old = (np.repeat(each[:, None], time, axis=1) for each in (logp_policy, logp_old))
        mask = np.ones((20, time), bool)
        values, gradient = value_and_gradient("gspo_loss", policy, old, advantages, mask, **clips)
        close(values, ppo[0])
        close(gradient, np.repeat(ppo[1][:, None] / time, time, axis=1))


@pytest.mark.parametrize("length_normalised", [True, False])
def test_the_clipped_log_ratio_of_completions_at_their_tokens_has_the_gradient_of_gspo(length_normalised):
    """With weights of tokens, each has its own share of it."""
    arrays, _ = case_of("gspo_loss")
    logp_policy, logp_old, advantages, mask = arrays
    mask = mask & (np.arange(5) < f32([[5], [3], [1], [4]]))
    weights = f32(np.random.default_rng(1).uniform(0.5, 1.5, mask.shape))
    clips = {"clip_low": 0.1, "clip_high": 0.15}

    @jax.jit
    def gradients(logp_policy):
        def of_tokens(logp_policy, weights):
            log_s = pg.completion_log_ratio(logp_policy, logp_old, mask, length_normalised=length_normalised)
            losses = weights * pg.ppo_clip_loss(log_s, jnp.zeros_like(log_s), advantages[:, None] + 0 * log_s, **clips)
            divisor = mask.sum(axis=1, keepdims=True) if length_normalised else 1
            return jnp.where(mask, losses / divisor, 0).sum()

        def of_sequences(logp_policy):
            each = {"length_normalised": length_normalised}
            return pg.gspo_loss(logp_policy, logp_old, advantages, mask, **clips, **each).sum()

        slope = jax.grad(of_tokens)
        return (
            slope(logp_policy, jnp.ones_like(weights)),
            slope(logp_policy, weights),
            jax.grad(of_sequences)(logp_policy),
        )

    found, weighted, expected = gradients(logp_policy)
    assert (np.abs(expected) > 0.01).any() and (expected[mask.any(axis=1)] == 0).any()
    close(found, expected)
    close(weighted, weights * expected)


def test_the_log_ratio_of_completions_shows_what_is_missing_and_keeps_its_gradient_finite():
    logp_policy, logp_old = (
        f32([[-1.0, -2.0, np.nan], [-np.inf, -1.0, 0.0]]),
        f32([[-2.0, -1.5, 0.0], [-1.0, -1.0, 0.0]]),
    )
    mask = np.asarray([[True, True, False], [True, True, False]])
    values, gradient = value_and_gradient("completion_log_ratio", logp_policy, logp_old, mask)
    np.testing.assert_array_equal(values, [[0.5, 0.5, 0], [-np.inf, -np.inf, 0]])
    np.testing.assert_array_equal(gradient, [[1, 1, 0], [0, 1, 0]])
    shown = value_and_gradient("completion_log_ratio", logp_policy, logp_old, np.ones((2, 3), bool))[0]
    assert np.isnan(shown[0]).all()


def test_gspo_by_hand():
    """Two real tokens: s = √(2 · 8) = 4, or plainly 16. A third token is hidden."""
    logp_policy = np.log(f32([[0.2, 0.8, 0.5]]))
    logp_old = np.log(f32([[0.1, 0.1, 0.01]]))
    mask = np.array([[1, 1, 0]])
    arrays = logp_policy, logp_old, f32([-3.0]), mask
    values, gradient = value_and_gradient("gspo_loss", *arrays)
    close(values, [12])
    close(gradient, [[6, 6, 0]])
    values, gradient = value_and_gradient("gspo_loss", *arrays, length_normalised=False)
    close(values, [48])
    close(gradient, [[48, 48, 0]])
    values, gradient = value_and_gradient("gspo_loss", logp_policy, logp_old, f32([3.0]), mask, clip_high=0.5)
    close(values, [-4.5])
    np.testing.assert_array_equal(gradient, 0)
    values, gradient = value_and_gradient("gspo_loss", logp_old, logp_policy, f32([-3.0]), mask, clip_low=0.5)
    close(values, [1.5])
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("junk", [-np.inf, np.nan])
def test_gspo_does_not_see_what_the_mask_hides(junk):
    shape, keep = (3, 4), np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    logp_policy, logp_old = -RNG.gamma(2.0, size=(2, *shape))
    advantages = np.array([1.0, -2.0, np.nan])  # the last row has no token
    clean = value_and_gradient("gspo_loss", f32(logp_policy), f32(logp_old), f32([1.0, -2.0, 1.0]), keep, clip_low=1)
    assert (clean[0][2], *clean[1][2]) == (0, 0, 0, 0, 0) and np.abs(clean[1][:2]).max() > 1e-3
    for sides in ((0, 2), (2, 0)):
        hidden = np.pad(keep, ((0, 0), sides))
        inside = np.s_[:, sides[0] : sides[0] + 4]
        policy, old = np.full(hidden.shape, junk), np.full(hidden.shape, junk)
        policy[inside], old[inside] = np.where(keep, logp_policy, junk), np.where(keep, logp_old, -1.0)
        arrays = f32(policy), f32(old), f32(advantages), hidden
        values, gradient = value_and_gradient("gspo_loss", *arrays, clip_low=1)
        (closed,) = closed_form["gspo_loss"](*arrays, clip_low=1)
        np.testing.assert_allclose(values, clean[0], rtol=1e-6)
        for found in (gradient, np.asarray(closed)):
            np.testing.assert_allclose(found[inside], clean[1], rtol=1e-6)
            assert (found[~hidden] == 0).all()


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    ratio, advantages = f32([0.1, 1.0, 2.0, 1e3, 1e3]), f32([1.0, 2.0, -1.0, 2.0, -2.0])
    logp_policy = f32([-1.0, -2.0, -3.0, -0.5, -0.5])
    arrays = logp_policy, logp_policy - np.log(ratio), advantages
    values, gradient = value_and_gradient("cispo_loss", *arrays)
    expected = -np.array([0.1, 2.0, -2.0, 10.0, -10.0])
    close(gradient, expected)
    close(values, expected * np.asarray(logp_policy))
    _, gradient = value_and_gradient("cispo_loss", *arrays, clip_low=0.5, clip_high=0.25)
    close(gradient, -np.array([0.5, 2.0, -1.25, 2.5, -2.5]))


def test_truncated_importance_weight_in_both_modes():
    old, sampler = np.log(f32([0.2, 0.5, 0.6, 0.6])), np.log(f32([0.4, 0.5, 0.3, 0.1]))
    weight = compiled["truncated_importance_weight"]
    close(weight(old, sampler, cap=3.0), [0.5, 1, 2, 3])
    close(weight(old, sampler, cap=3.0, mode="mask"), [0.5, 1, 2, 0])
    close(weight(old, sampler), [0.5, 1, 2, 2])
    close(weight(old, sampler, cap=3.0, floor=0.75), [0.75, 1, 2, 3])
    close(weight(old, sampler, cap=3.0, floor=0.75, mode="mask"), [0, 1, 2, 0])
    assert weight(f32(-1.0), f32(-np.inf)) == 2 and weight(f32(-1.0), f32(-np.inf), mode="mask") == 0
    assert weight(f32(-np.inf), f32(-1.0)) == 0 and np.isnan(weight(f32(np.nan), f32(-1.0)))
    for mode in ("truncate", "mask"):
        total = lambda a, b, mode=mode: pg.truncated_importance_weight(a, b, mode=mode).sum()  # noqa: E731
        assert all((gradient == 0).all() for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(old, sampler))


def test_off_policy_reinforce_without_a_cap_is_unbiased_and_with_one_is_bounded():
    logits, reward = f32([0.3, -0.8, 1.1, 0.0]), f32([1.0, 2.0, -3.0, 0.5])
    sampler = np.log(f32([0.1, 0.2, 0.3, 0.4]))

    def expected_loss(logits, cap):
        losses = pg.off_policy_reinforce_loss(jax.nn.log_softmax(logits), sampler, reward, cap=cap)
        return (np.exp(sampler) * losses).sum()

    truth = jax.jit(jax.grad(lambda logits: jax.nn.softmax(logits) @ reward))(logits)
    gradient = jax.jit(jax.grad(expected_loss))
    close(gradient(logits, 1e3), -truth)
    assert np.abs(gradient(logits, 1.0) + truth).max() > 0.1
    arrays = f32([-0.1, -0.1, -4.0]), f32([-3.0, -3.0, -1.0]), f32([2.0, -2.0, 2.0])
    weighted = -np.array([2.0, -2.0, np.exp(-3)]) * 2
    weighted[1] = 4.0
    close(closed_form["off_policy_reinforce_loss"](*arrays)[0], weighted)
    close(closed_form["off_policy_reinforce_loss"](*arrays, mode="mask")[0], weighted * [0, 0, 1])


def test_an_untruncated_weight_is_the_gradient_of_ppo_inside_the_clip():
    logp, old, advantages = f32([-1.0, -2.0]), f32([-1.1, -1.9]), f32([1.0, -2.0])
    ppo = closed_form["ppo_clip_loss"](logp, old, advantages)[0]
    close(closed_form["off_policy_reinforce_loss"](logp, old, advantages)[0], ppo)
    close(closed_form["cispo_loss"](logp, old, advantages)[0], ppo)


# V, V_old, R → loss and gradient, at ε = .5.
CRITIC = [
    (1.0, 1.0, 3.0, 2.0, -2.0),  # has not moved
    (1.25, 1.0, 3.0, 1.53125, -1.75),  # has moved by less
    (2.0, 1.0, 3.0, 1.125, 0.0),  # has moved towards R by more: held at 1.5
    (2.0, 1.0, 0.0, 2.0, 2.0),  # has moved away by more: not held
    (0.0, 1.0, -2.0, 3.125, 0.0),  # the same to the other side: held at .5
    (2.0, 1.0, 1.75, 0.03125, 0.25),  # both errors equal: the unclipped counts
    (4.0, 1.0, 2.0, 2.0, 2.0),  # has overshot
]


def test_the_critic_is_held_where_that_is_worse():
    values, values_old, returns, loss, slope = f32(CRITIC).T
    found, gradient = value_and_gradient("value_loss", values, values_old, returns, clip=0.5)
    np.testing.assert_array_equal(found, loss)
    np.testing.assert_array_equal(gradient, slope)
    np.testing.assert_array_equal(closed_form["value_loss"](values, values_old, returns, clip=0.5)[0], slope)
    found, gradient = value_and_gradient("value_loss", values, values_old, returns, clip=None)
    np.testing.assert_array_equal(found, (values - returns) ** 2 / 2)
    np.testing.assert_array_equal(gradient, values - returns)


def test_the_critic_within_the_clip_is_never_held_by_rounding():
    values = f32(RNG.normal(size=1000))
    values_old, returns = values + f32(RNG.uniform(-0.2, 0.2, 1000)) * 0.99, f32(RNG.normal(size=1000))
    _, gradient = value_and_gradient("value_loss", values, values_old, returns)
    np.testing.assert_array_equal(gradient, values - returns)


def test_entropy_loss_falls_towards_the_uniform_distribution():
    values, gradient = value_and_gradient("entropy_loss", f32([[0.0, 0, 0, 0], [2.0, 0, 0, -np.inf]]))
    close(values[0], -np.log(4))
    close(gradient[0], 0)
    assert values[1] > values[0] and gradient[1, 0] > 0.1 and gradient[1, 1] < 0 and gradient[1, 3] == 0


CASES = {function.__name__: build for function, build in cases_policy_gradient.CASES.items()}
RATIOS = sorted(set(CASES) - {"value_loss", "entropy_loss", "completion_log_ratio"})


def case_of(name):
    case = CASES[name](np.random.default_rng(5), Sizes(kept=1.0))
    arrays = [f32(array) if array.dtype != bool else array for array in (*case.differentiable, *case.constants)]
    return arrays, case.settings


@pytest.mark.parametrize("name", RATIOS)
def test_unlikely_tokens_give_finite_losses_and_gradients(name):
    arrays, settings = case_of(name)
    arrays[0][0], arrays[0][1, 1] = -1e4, -1e4
    if name != "reinforce_loss":
        arrays[1][2], arrays[1][1, 1] = -1e4, -1e4
    values, gradient = value_and_gradient(name, *arrays, **settings)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    close(closed_form[name](*arrays, **settings)[0], gradient)


@pytest.mark.parametrize("name", RATIOS)
def test_infinite_and_missing_inputs_keep_gradients_finite_and_reach_only_their_own_entry(name):
    arrays, settings = case_of(name)
    clean = value_and_gradient(name, *arrays, **settings)
    arrays[0][0, 1], arrays[0][1, 0] = -np.inf, np.nan
    if name != "reinforce_loss":
        arrays[1][0, 1:3], arrays[1][1, 2] = -np.inf, np.nan
    arrays[1 if name == "reinforce_loss" else 2][2] = np.nan
    values, gradient = value_and_gradient(name, *arrays, **settings)
    assert np.isfinite(gradient).all()
    assert np.isnan(values[1]).any() and np.isnan(values[2]).all()  # what is missing is seen in the value
    np.testing.assert_allclose(values[3], clean[0][3], rtol=1e-6)
    np.testing.assert_allclose(gradient[3], clean[1][3], rtol=1e-6)
    (closed,) = closed_form[name](*arrays, **settings)
    np.testing.assert_allclose(closed, gradient, rtol=1e-5, atol=1e-6)


def test_a_weight_of_zero_makes_zero_of_an_impossible_token():
    impossible = f32([-np.inf, -np.inf])
    np.testing.assert_array_equal(compiled["reinforce_loss"](impossible, f32([0.0, 2.0])), [0, np.inf])
    assert (compiled["cispo_loss"](impossible, f32([-1.0, -1.0]), f32([2.0, 2.0])) == 0).all()  # ρ = 0


def test_the_critic_behind_a_mask_keeps_its_gradient_finite():
    values = f32([np.inf, np.nan, 1.0])

    def total(values):
        losses = pg.value_loss(values, f32([0.0, 0.0, np.nan]), f32([0.0, 0.0, 0.5]))
        return jnp.where(jnp.asarray([False, False, True]), losses, 0).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(values), [0, 0, 0.5])


ONE = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pg.ppo_clip_loss(ONE, ONE, ONE, clip_low=1.5), "clip_low must lie in"),
        (lambda: pg.ppo_clip_loss(ONE, ONE, ONE, clip_high=-0.1), "clip_high must lie in"),
        (lambda: pg.ppo_clip_loss(ONE, ONE, ONE, dual_clip=1.0), "dual_clip must lie in"),
        (lambda: pg.cispo_loss(ONE, ONE, ONE, clip_low=-1.0), "clip_low must lie in"),
        (lambda: pg.truncated_importance_weight(ONE, ONE, cap=0.0), "cap must lie in"),
        (lambda: pg.truncated_importance_weight(ONE, ONE, cap=1.0, floor=1.5), r"floor must lie in \[0, 1\]"),
        (lambda: pg.off_policy_reinforce_loss(ONE, ONE, ONE, mode="clip"), '"truncate" or "mask".*clip'),
        (lambda: pg.value_loss(ONE, ONE, ONE, clip=-0.1), "clip must lie in"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_large_ratio_times_a_large_advantage_stays_finite_and_points_the_right_way():
    given = f32([0.0]), f32([-80.0]), f32([-1e4])
    value, slope = value_and_gradient("ppo_clip_loss", *given)
    assert np.isfinite(value).all() and value[0] > 1e34
    assert np.isfinite(slope).all() and slope[0] > 1e34
    np.testing.assert_allclose(closed_form["ppo_clip_loss"](*given)[0], slope, rtol=1e-6)
