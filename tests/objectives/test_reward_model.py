"""Facts about the losses of a reward model."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives.reward_model import centering_loss, k_choose_2_loss, pairwise_loss, plackett_luce_loss

SCORES = np.random.default_rng(0).normal(size=(3, 5)) * 2
RANKS = np.array([[0, 1, 2, 3, 4], [3, 1, 4, 0, 2], [0, 0, 1, 2, 2]])
MASK = np.array([[True, True, False, True, True], [True, True, True, True, True], [False, True, True, False, True]])
k_choose_2, k_choose_2_grad = jax.jit(k_choose_2_loss), jax.jit(k_choose_2_loss.grad)
plackett_luce, plackett_luce_grad = jax.jit(plackett_luce_loss), jax.jit(plackett_luce_loss.grad)


def f32(array):
    return jnp.asarray(array, jnp.float32)


def naive_k_choose_2(scores, ranks, mask):
    """Pair by pair."""
    losses = [
        np.log1p(np.exp(scores[j] - scores[i]))
        for i, j in itertools.permutations(range(len(scores)), 2)
        if mask[i] and mask[j] and ranks[i] < ranks[j]
    ]
    return np.mean(losses) if losses else 0.0


def naive_plackett_luce(scores):
    return sum(np.log(np.exp(scores[k:]).sum()) - scores[k] for k in range(len(scores)))


def test_pairwise_by_hand():
    chosen, rejected = f32([0.0, math.log(3), 2.0]), f32([0.0, 0.0, 1.0])
    np.testing.assert_allclose(
        pairwise_loss(chosen, rejected), [math.log(2), math.log(4 / 3), math.log1p(math.exp(-1))], rtol=1e-6
    )
    of_chosen, of_rejected = pairwise_loss.grad(chosen, rejected)
    np.testing.assert_allclose(of_chosen[:2], [-0.5, -0.25], rtol=1e-6)
    np.testing.assert_array_equal(of_rejected, -of_chosen)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_a_label_that_holds_with_probability_p_has_its_optimum_at_logit_p(p):
    logit = math.log(p / (1 - p))
    slope = pairwise_loss.grad(f32([logit - 0.5, logit, logit + 0.5]), f32([0.0] * 3), label_noise=1 - p)[0]
    assert slope[0] < -0.01 and abs(slope[1]) < 1e-6 and slope[2] > 0.01


@pytest.mark.parametrize("margin", [1.0, jnp.array([0.5, 2.0])])
def test_the_margin_moves_the_lead_that_is_asked_for(margin):
    chosen, rejected = f32([1.0, -1.0]), f32([0.5, 0.0])
    np.testing.assert_allclose(
        pairwise_loss(chosen, rejected, margin=margin), pairwise_loss(chosen - margin, rejected), rtol=1e-6
    )
    gradient = jax.grad(lambda margin: pairwise_loss(chosen, rejected, margin=margin).sum())(jnp.asarray(margin))
    assert (gradient == 0).all()


def test_pairwise_refuses_another_margin_and_a_noise_outside_its_range():
    chosen, rejected = f32([1.0, -1.0]), f32([0.5, 0.0])
    with pytest.raises(ValueError, match=r"margin must.*\[2\].*\[3\]"):
        pairwise_loss(chosen, rejected, margin=jnp.zeros(3))
    with pytest.raises(ValueError, match="must lie in"):
        pairwise_loss(chosen, rejected, label_noise=1.5)


def test_centering_holds_the_sum_and_leaves_the_difference():
    chosen, rejected = f32([1.0, 2.0]), f32([3.0, -2.0])
    np.testing.assert_allclose(centering_loss(chosen, rejected, coefficient=0.5), [8, 0])
    np.testing.assert_allclose(centering_loss.grad(chosen, rejected, coefficient=0.5), [[4, 0], [4, 0]])


def test_k_choose_2_is_the_mean_over_the_pairs_that_remain():
    expected = [naive_k_choose_2(*row) for row in zip(SCORES, RANKS, MASK, strict=True)]
    np.testing.assert_allclose(k_choose_2(f32(SCORES), RANKS, MASK), expected, rtol=1e-5)
    everything = [naive_k_choose_2(*row) for row in zip(SCORES, RANKS, np.ones_like(MASK), strict=True)]
    np.testing.assert_allclose(k_choose_2(f32(SCORES), RANKS), everything, rtol=1e-5)


def test_k_choose_2_of_two_answers_is_pairwise():
    chosen, rejected = SCORES[:, 0], SCORES[:, 1]
    found = k_choose_2(f32(np.stack([rejected, chosen], axis=-1)), np.array([[1, 0]] * 3))
    np.testing.assert_allclose(found, pairwise_loss(f32(chosen), f32(rejected)), rtol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_no_answer_of_k_choose_2_has_a_gradient_above_two_over_k_and_the_bound_is_reached(size):
    scores = 30.0 * np.arange(size)[None] + 100  # all pairs the wrong way round
    (gradient,) = k_choose_2_grad(f32(scores), np.arange(size)[None])
    np.testing.assert_allclose(np.abs(gradient).max(), 2 / size, rtol=1e-5)
    (random,) = k_choose_2_grad(f32(SCORES[:, :size]), np.array([np.arange(size)] * 3))
    assert np.abs(random).max() < 2 / size


@pytest.mark.parametrize(
    ("ranks", "mask"), [([0, 0, 0], [True] * 3), ([0, 1, 2], [False, True, False]), ([0, 1, 2], [False] * 3)]
)
def test_k_choose_2_is_zero_where_no_pair_is_left(ranks, mask):
    arguments = f32([[1.0, -2.0, 3.0]]), np.array([ranks]), np.array([mask])
    by_autodiff = jax.grad(lambda scores: k_choose_2(scores, *arguments[1:]).sum())(arguments[0])
    assert k_choose_2(*arguments)[0] == 0
    assert (by_autodiff == 0).all() and (k_choose_2_grad(*arguments)[0] == 0).all()


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf, 1e30])
def test_what_the_mask_hides_may_be_anything(hidden):
    dirty, dirty_ranks = np.where(MASK, SCORES, hidden), np.where(MASK, RANKS, -7)
    for loss, gradient, constants, clean in (
        (k_choose_2, k_choose_2_grad, (dirty_ranks, MASK), (RANKS, MASK)),
        (plackett_luce, plackett_luce_grad, (MASK,), (MASK,)),
    ):
        np.testing.assert_allclose(loss(f32(dirty), *constants), loss(f32(SCORES), *clean), rtol=1e-6)
        by_autodiff = jax.jit(jax.grad(lambda scores: loss(scores, *constants).sum()))(f32(dirty))  # noqa: B023
        np.testing.assert_allclose(by_autodiff, gradient(f32(SCORES), *clean)[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient(f32(dirty), *constants)[0], by_autodiff, rtol=1e-5, atol=1e-6)
        assert (by_autodiff[~MASK] == 0).all()


def test_plackett_luce_is_the_likelihood_of_draws_without_replacement():
    expected = [naive_plackett_luce(row[mask]) for row, mask in zip(SCORES, MASK, strict=True)]
    np.testing.assert_allclose(plackett_luce(f32(SCORES), MASK), expected, rtol=1e-5)
    np.testing.assert_allclose(plackett_luce(f32(np.zeros((1, 5)))), [math.log(120)], rtol=1e-6)


def test_plackett_luce_gives_all_rankings_a_probability_of_one():
    scores = np.array([1.3, -0.2, 0.4, 2.0])
    rankings = np.array([scores[list(order)] for order in itertools.permutations(range(4))])
    np.testing.assert_allclose(np.exp(-plackett_luce(f32(rankings))).sum(), 1, rtol=1e-5)


def test_plackett_luce_of_two_answers_is_pairwise():
    chosen, rejected = f32(SCORES[:, 0]), f32(SCORES[:, 1])
    found = plackett_luce(jnp.stack([chosen, rejected], axis=-1))
    np.testing.assert_allclose(found, pairwise_loss(chosen, rejected), rtol=1e-5)
    np.testing.assert_array_equal(plackett_luce(f32([[1e4, -np.inf], [-np.inf, 1e4]])), [0, np.inf])


def test_nothing_changes_with_a_shift_of_all_scores():
    moved, scores = f32(SCORES + 3.0), f32(SCORES)
    np.testing.assert_allclose(k_choose_2(moved, RANKS, MASK), k_choose_2(scores, RANKS, MASK), rtol=1e-5)
    np.testing.assert_allclose(plackett_luce(moved, MASK), plackett_luce(scores, MASK), rtol=1e-5)
    np.testing.assert_allclose(pairwise_loss(*moved[:2]), pairwise_loss(*scores[:2]), rtol=1e-5)
    for (gradient,) in (k_choose_2_grad(scores, RANKS, MASK), plackett_luce_grad(scores, MASK)):
        np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-6)


def test_extreme_scores_are_finite_and_an_infinite_one_has_a_finite_gradient():
    extremes = f32(list(itertools.product([-np.inf, -1e4, 0.0, 1e4], repeat=3)))
    finite, ranks = np.isfinite(extremes).all(axis=-1), np.array([[0, 1, 2]] * 64)
    for loss, gradient, constants in ((k_choose_2, k_choose_2_grad, (ranks,)), (plackett_luce, plackett_luce_grad, ())):
        assert np.isfinite(loss(extremes, *constants)[finite]).all()
        assert not np.isnan(loss(extremes, *constants)[np.isinf(extremes).sum(axis=-1) == 1]).any()
        by_autodiff = jax.jit(jax.grad(lambda scores: loss(scores, *constants).sum()))(extremes)  # noqa: B023
        assert np.isfinite(by_autodiff).all()
        np.testing.assert_allclose(gradient(extremes, *constants)[0], by_autodiff, rtol=1e-5, atol=1e-6)


def test_a_margin_of_a_prompt_is_the_lead_that_each_of_its_pairs_should_have():
    scores, margin = np.float32([[1.0, 0.2], [0.5, 2.0]]), np.float32([0.7, 0.1])
    ranks = np.array([[0, 1], [0, 1]])
    expected = pairwise_loss(scores[:, 0], scores[:, 1], margin=margin)
    np.testing.assert_allclose(k_choose_2_loss(scores, ranks, margin=margin), expected, rtol=1e-6)
