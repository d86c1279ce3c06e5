import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import advantages
from tests.objectives.cases import TOOLS, public_functions

# Compiled, for speed; what must be eager calls `advantages` itself.
gae, returns_to_go, rloo, centered, optimal_baseline = map(
    jax.jit,
    (advantages.gae, advantages.returns_to_go, advantages.rloo, advantages.centered, advantages.optimal_baseline),
)
grpo = jax.jit(advantages.grpo, static_argnames=("ddof", "scale"))
whiten = jax.jit(advantages.whiten, static_argnames="shift_mean")

RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(4, 6))
VALUES = RNG.normal(size=(4, 7))
# Holes inside, padding on either side, and a row without a real token.
MASK = np.array([[1, 1, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0], [0] * 6], bool)
NORMS = RNG.gamma(2.0, size=(4, 6))


def f32(array):
    return np.asarray(array, np.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def naive_gae(rewards, values, discount, lambda_, mask):
    """By the sum of eq. 16, on each row with its holes cut out."""
    result = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        real = np.flatnonzero(mask[row])
        r, v = rewards[row, real], np.append(values[row, real], values[row, -1])
        for i in range(len(real)):
            for j in range(i, len(real)):
                delta = r[j] + discount * v[j + 1] - v[j]
                result[row, real[i]] += (discount * lambda_) ** (j - i) * delta
    return result


def with_junk(array, mask, junk=(np.nan, np.inf, -np.inf, 1e30)):
    """Every masked place holds something that must not matter."""
    array = np.array(array)
    hidden = np.argwhere(~mask)
    for n, place in enumerate(hidden):
        array[tuple(place)] = junk[n % len(junk)]
    return array


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_gae_is_the_sum_over_the_real_tokens(discount, lambda_):
    rewards = with_junk(REWARDS, MASK)
    values = np.concatenate([with_junk(VALUES[:, :-1], MASK), VALUES[:, -1:]], axis=1)
    found = gae(f32(rewards), f32(values), discount=discount, lambda_=lambda_, mask=MASK)
    close(found, naive_gae(REWARDS, VALUES, discount, lambda_, MASK))
    assert (np.asarray(found)[~MASK] == 0).all()


def test_gae_by_hand():
    # δ = (1 + .5·3 − 2, 4 + .5·8 − 3) = (.5, 5);  A = (.5 + .25·5, 5)
    found = gae(f32([1.0, 4.0]), f32([2.0, 3.0, 8.0]), discount=0.5, lambda_=0.5)
    np.testing.assert_array_equal(found, [1.75, 5.0])


def test_gae_at_its_ends_is_one_step_and_the_whole_return():
    rewards, values = f32(REWARDS), f32(VALUES)
    one_step = REWARDS + 0.9 * VALUES[:, 1:] - VALUES[:, :-1]
    close(gae(rewards, values, discount=0.9, lambda_=0.0), one_step)
    ended = values * (np.arange(7) < 6)
    whole = returns_to_go(rewards, discount=0.9) - values[:, :-1]
    close(gae(rewards, ended, discount=0.9, lambda_=1.0), whole)
    bootstrapped = 0.9 ** np.arange(6, 0, -1) * VALUES[:, -1:]
    close(gae(rewards, values, discount=0.9, lambda_=1.0), whole + bootstrapped)


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_an_episode_that_was_cut_off_is_worth_what_the_critic_says(lambda_):
    """Reward 1 for ever, and a critic that knows it: no step is better than expected, unless the end counts as one."""
    rewards, values = np.ones((4, 6)), np.full((4, 7), 1 / (1 - 0.9))
    close(gae(f32(rewards), f32(values), discount=0.9, lambda_=lambda_), 0)
    ended = gae(f32(rewards), f32(values * (np.arange(7) < 6)), discount=0.9, lambda_=lambda_)
    close(ended[:, -1], -9)


def test_packed_episodes_do_not_see_each_other():
    discount = np.full((4, 6), 0.9)
    discount[:, 2] = 0
    found = gae(f32(REWARDS), f32(VALUES), discount=f32(discount), lambda_=0.8)
    first = np.concatenate([VALUES[:, :3], np.zeros((4, 1))], axis=1)
    close(found[:, :3], gae(f32(REWARDS[:, :3]), f32(first), discount=0.9, lambda_=0.8))
    close(found[:, 3:], gae(f32(REWARDS[:, 3:]), f32(VALUES[:, 3:]), discount=0.9, lambda_=0.8))
    hidden = np.where(MASK, 0.9, np.nan)  # a coefficient behind the mask does not matter either
    close(
        gae(f32(REWARDS), f32(VALUES), discount=f32(hidden), lambda_=0.8, mask=MASK),
        naive_gae(REWARDS, VALUES, 0.9, 0.8, MASK),
    )


def test_returns_to_go_by_hand_and_with_holes():
    np.testing.assert_array_equal(returns_to_go(f32([1.0, 2.0, 4.0])), [7, 6, 4])
    np.testing.assert_array_equal(returns_to_go(f32([1.0, 2.0, 4.0]), discount=0.5), [3, 4, 4])
    holes = returns_to_go(f32([1.0, np.nan, 4.0]), discount=0.5, mask=np.asarray([True, False, True]))
    np.testing.assert_array_equal(holes, [3, 0, 4])
    close(returns_to_go(f32(REWARDS), discount=0.9, mask=MASK), naive_gae(REWARDS, 0 * VALUES, 0.9, 1, MASK))


def naive_groups(rewards, mask, of_group):
    result = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        real = np.flatnonzero(mask[row])
        result[row, real] = of_group(rewards[row, real])
    return result


def naive_rloo(r):
    return [r[i] - np.delete(r, i).mean() if len(r) > 1 else 0 for i in range(len(r))]


def naive_grpo(ddof):
    return lambda r: (r - r.mean()) / (r.std(ddof=ddof) + 1e-4) if len(r) > ddof else 0 * r


GROUPS = {
    "rloo": (rloo, naive_rloo),
    "centered": (centered, lambda r: r - (r.mean() if len(r) else 0)),
    "grpo": (grpo, naive_grpo(1)),
    "grpo, ddof 0": (lambda r, **kw: grpo(r, ddof=0, **kw), naive_grpo(0)),
}
GROUP_MASK = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0], [1] * 6, [0] * 6], bool)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_against_numpy(name):
    function, of_group = GROUPS[name]
    close(function(f32(REWARDS)), naive_groups(REWARDS, np.ones((4, 6), bool), of_group))
    found = function(f32(with_junk(REWARDS, GROUP_MASK)), mask=GROUP_MASK)
    close(found, naive_groups(REWARDS, GROUP_MASK, of_group))
    assert (np.asarray(found)[~GROUP_MASK] == 0).all()
    np.testing.assert_array_equal(found[1], 0)  # alone in its group


def test_grpo_divides_by_the_spread_of_the_group_or_of_the_batch_or_by_nothing():
    real = REWARDS[GROUP_MASK]
    of_batch = grpo(f32(with_junk(REWARDS, GROUP_MASK)), scale="batch", mask=GROUP_MASK)
    expected = naive_groups(REWARDS, GROUP_MASK, lambda r: (r - r.mean()) / (real.std(ddof=1) + 1e-4) if len(r) else r)
    close(of_batch, expected)
    close(grpo(f32(REWARDS), scale="none"), centered(f32(REWARDS)))
    np.testing.assert_array_equal(grpo(np.full((4, 6), 0.1, np.float32), scale="batch"), 0)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("reward", [0.1, -3.7, 1e4])
def test_a_group_of_equal_rewards_gives_exactly_zero(name, reward):
    np.testing.assert_array_equal(GROUPS[name][0](np.full((4, 6), reward, np.float32)), 0)


def test_small_differences_survive_a_large_common_reward():
    far = f32([[4096.0, 4096.5, 4097.0, 4096.25]])
    for function in (rloo, centered, grpo):
        np.testing.assert_allclose(function(far), function(far - 4096), rtol=1e-6)


def test_the_group_means_differ_by_one_reward():
    np.testing.assert_array_equal(rloo(f32([1.0, 2.0, 6.0])), [-3, -1.5, 4.5])
    np.testing.assert_array_equal(centered(f32([1.0, 2.0, 6.0])), [-2, -1, 3])
    close(rloo(f32(REWARDS)), 6 / 5 * centered(f32(REWARDS)))


def test_leave_one_out_is_unbiased_and_the_mean_with_oneself_is_short_by_one_part_in_n():
    """Over all groups of 3 answers out of 4, each with its probability."""
    probs, reward, n = np.array([0.1, 0.2, 0.3, 0.4]), np.array([3.0, -1.0, 0.5, 2.0]), 3
    score = np.eye(4) - probs  # ∇log softmax of each answer
    truth = probs * (reward - probs @ reward)
    groups = np.array(list(itertools.product(range(4), repeat=n)))
    weight = probs[groups].prod(axis=1)
    for function, share in ((rloo, 1.0), (centered, 1 - 1 / n)):
        advantages = np.asarray(function(f32(reward[groups])))
        close(np.einsum("g,gi,giv->v", weight, advantages, score[groups]) / n, share * truth)


def test_whitening_knows_only_real_entries():
    found = np.asarray(whiten(f32(with_junk(REWARDS, MASK)), MASK))
    real = REWARDS[MASK]
    close(found[MASK], (real - real.mean()) / real.std())
    assert (found[~MASK] == 0).all()
    close([found[MASK].mean(), found[MASK].std()], [0, 1])
    padded = np.pad(REWARDS, ((0, 2), (3, 0)), constant_values=np.nan)
    padded_mask = np.pad(MASK, ((0, 2), (3, 0)))
    np.testing.assert_allclose(whiten(f32(padded), padded_mask)[:4, 3:], found, atol=1e-6)


def test_whitening_may_keep_the_mean_and_survives_no_spread():
    kept = np.asarray(whiten(f32(REWARDS), MASK, shift_mean=False))
    close([kept[MASK].mean(), kept[MASK].std()], [REWARDS[MASK].mean(), 1])
    assert (kept[~MASK] == 0).all()
    for eps in (1e-8, 0.0):
        np.testing.assert_array_equal(whiten(np.full((4, 6), 0.1, np.float32), eps=eps), 0)
    np.testing.assert_array_equal(whiten(f32(REWARDS), np.zeros((4, 6), bool)), 0)
    close(whiten(f32([1.0, -1.0]), eps=3.0), [0.5, -0.5])  # 1/√(1 + 3)


def test_the_optimal_baseline_is_the_one_of_least_variance():
    probs, reward = np.array([0.7, 0.2, 0.1]), np.array([5.0, -1.0, 0.5])
    norms = np.square(np.eye(3) - probs).sum(axis=1)
    best = float(optimal_baseline(f32(reward), f32(norms), probabilities=f32(probs)))

    def second_moment(b):  # the mean does not depend on b
        return probs @ (norms * np.square(reward - b))

    grid = np.linspace(-4, 4, 8001)
    assert abs(grid[np.argmin([second_moment(b) for b in grid])] - best) < 1e-3
    assert second_moment(best) < second_moment(probs @ reward) - 0.1  # and the mean reward is not it
    draws = np.repeat(np.arange(3), [7, 2, 1])
    close(optimal_baseline(f32(reward[draws]), f32(norms[draws])), best)


def test_the_optimal_baseline_without_any_score_is_zero_and_weight_zero_hides_a_reward():
    assert optimal_baseline(f32([1.0, 1.0, 1.0]), f32([0.0, 0.0, 0.0])) == 0
    rewards, norms, probs = f32([1.0, np.nan, 4.0]), f32([2.0, 5.0, 1.0]), f32([0.5, 0.0, 0.5])
    assert optimal_baseline(rewards, norms, probabilities=probs) == 2


CALLS = {
    "returns_to_go": lambda r: advantages.returns_to_go(r, discount=0.9, mask=MASK),
    "gae": lambda r: advantages.gae(r, jnp.pad(r[:, ::-1], ((0, 0), (0, 1))), discount=0.9, lambda_=0.8, mask=MASK),
    "rloo": lambda r: advantages.rloo(r, mask=GROUP_MASK),
    "grpo": lambda r: advantages.grpo(r, mask=GROUP_MASK),
    "centered": lambda r: advantages.centered(r, mask=GROUP_MASK),
    "whiten": lambda r: advantages.whiten(r, MASK),
    "optimal_baseline": lambda r: advantages.optimal_baseline(r, jnp.square(r) + 1, probabilities=jnp.square(r)),
}


def test_every_function_is_called_below():
    everything = public_functions(skip=TOOLS)
    assert {name.removeprefix("advantages.") for name in everything if name.startswith("advantages.")} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_no_gradient_flows_jit_and_vmap_agree_with_eager_and_masked_places_may_hold_anything(name):
    def total(r):
        found = CALLS[name](r)
        return jnp.square(found).sum(), found

    two = np.stack([f32(REWARDS), -2 * f32(REWARDS)[::-1], np.ones((4, 6), np.float32)])
    (values, found), gradients = jax.jit(jax.vmap(jax.value_and_grad(total, has_aux=True)))(two)
    assert values[0] > 0.1
    np.testing.assert_array_equal(gradients, 0)
    eager = np.stack([CALLS[name](each) for each in jnp.asarray(two)])
    np.testing.assert_allclose(found, eager, rtol=1e-5, atol=1e-6)
    if name != "optimal_baseline":
        junk = two[0].copy()
        junk[1, 0], junk[3, 2] = np.nan, -np.inf  # both masks hide these
        np.testing.assert_array_equal(CALLS[name](jnp.asarray(junk)), eager[0])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "optimal_baseline"])
def test_a_reward_that_counts_must_be_finite(name):
    compiled = jax.jit(CALLS[name])
    right = compiled(f32(REWARDS))
    for wrong in (np.nan, np.inf):
        rewards = np.array(REWARDS)
        rewards[2, 1] = wrong  # both masks show it
        with pytest.raises(ValueError, match=r"must be finite .* at \[2, 1\]"):
            CALLS[name](jnp.asarray(rewards, jnp.float32))
        found = np.asarray(compiled(f32(rewards)))
        assert not np.isfinite(found[2, :2]).all()  # seen, not hidden
        if name != "whiten":
            np.testing.assert_array_equal(found[[0, 1, 3]], right[np.array([0, 1, 3])])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantages.rloo(jnp.ones((3, 1))), r"at least 2 .*\[3, 1\]"),
        (lambda: advantages.grpo(jnp.ones((3, 1))), "more than ddof = 1 .* 1"),
        (lambda: advantages.grpo(jnp.ones(3), eps=-1.0), "eps must"),
        (lambda: advantages.grpo(jnp.ones(3), scale="all"), "scale must be group, batch or none, but is 'all'"),
        (lambda: advantages.rloo(jnp.ones((2, 3), int)), "rewards must be floating.*int32"),
        (lambda: advantages.centered(jnp.ones((2, 3)), mask=jnp.ones(3)), r"mask must .*\[2, 3\].*\[3\]"),
        (
            lambda: advantages.gae(jnp.ones((2, 3)), jnp.ones((2, 3)), discount=1.0, lambda_=1.0),
            r"one place more .*\[2, 3\]",
        ),
        (lambda: advantages.gae(jnp.ones(3), jnp.ones(4), discount=1.1, lambda_=1.0), "discount must lie in"),
        (lambda: advantages.gae(jnp.ones(3), jnp.ones(4), discount=1.0, lambda_=-0.1), "lambda_ must lie in"),
        (
            lambda: advantages.gae(jnp.ones(3), jnp.ones(4), discount=jnp.ones(2), lambda_=1.0),
            r"discount must broadcast.*\[2\]",
        ),
        (
            lambda: advantages.gae(jnp.ones(3), jnp.asarray([1, jnp.nan, 1, 1]), discount=1.0, lambda_=1.0),
            r"values .* at \[1\]",
        ),
        (lambda: advantages.optimal_baseline(jnp.ones(3), jnp.ones(2)), r"squared_score_norms must have the shape"),
        (lambda: advantages.optimal_baseline(jnp.ones(3), -jnp.ones(3)), "squared_score_norms must lie in"),
        (
            lambda: advantages.optimal_baseline(jnp.asarray([1.0, jnp.inf]), jnp.ones(2)),
            r"rewards must be finite .* at \[1\]",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_grpo_needs_more_real_answers_than_ddof():
    np.testing.assert_array_equal(grpo(np.ones((3, 1), np.float32), ddof=0), 0)
    np.testing.assert_array_equal(grpo(f32([1.0, 2.0, 5.0]), ddof=2, mask=np.array([1, 1, 0])), 0)


def test_float64_stays_and_narrow_rewards_are_widened():
    with jax.enable_x64(True):
        found = gae(jnp.asarray(REWARDS), jnp.asarray(VALUES), discount=0.9, lambda_=0.8, mask=MASK)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, naive_gae(REWARDS, VALUES, 0.9, 0.8, MASK), rtol=1e-12, atol=1e-12)
    assert grpo(jnp.asarray(REWARDS, jnp.bfloat16)).dtype == jnp.float32
