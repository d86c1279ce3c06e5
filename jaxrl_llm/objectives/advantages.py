"""Advantages: by how much an action was better than expected, from rewards and, where there is one, a critic.

Advantages are constants: every public function here passes its result through `jax.lax.stop_gradient`, so none has a
closed-form gradient. The rewards of sampled tokens carry no gradient; the score function, ∇log π, in `policy_gradient`,
does.

Masked entries may hold anything, NaN and infinity too, and their own result is 0. An unmasked reward, value or
advantage that is not finite raises ValueError where it can be read; under `jit` it cannot be, and there the result is
NaN or infinite.

In `rloo`, `grpo` and `centered` the last axis is a group: the N completions of one prompt.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from jaxrl_llm.numerics import check_range, checked, checked_mask, floating, violated


def returns_to_go(
    rewards: Float[Array, "*batch time"],
    *,
    discount: float | Float[Array, "..."] = 1.0,
    mask: Bool[Array, "*batch time"] | None = None,
) -> Float[Array, "*batch time"]:
    """The return to go at each token: the discounted sum of the rewards from there on.

        G_t = Σ_{s≥t} γ^{s−t} r_s

    Args:
        discount: γ, as in `gae`.
        mask: the real tokens. The others are skipped, as if they had been cut out: they do not discount, and their own
            return is 0. So masks with holes (the outputs of tools) are right too.

    Raises:
        ValueError: as `gae`.

    Source: Williams 1992; Sutton and Barto 2018, eq. 3.8.
    """
    rewards = floating("rewards", rewards, ndim=1)
    no_values = jnp.zeros((*rewards.shape[:-1], rewards.shape[-1] + 1), rewards.dtype)
    return gae(rewards, no_values, discount=discount, lambda_=1.0, mask=mask)


def gae(
    rewards: Float[Array, "*batch time"],
    values: Float[Array, "*batch time_plus_one"],
    *,
    discount: float | Float[Array, "..."],
    lambda_: float | Float[Array, "..."],
    mask: Bool[Array, "*batch time"] | None = None,
) -> Float[Array, "*batch time"]:
    """Generalised advantage estimation: returns against a critic's values; λ trades bias for variance.

        δ_t = r_t + γ V_{t+1} − V_t,      A_t = δ_t + γλ A_{t+1} = Σ_l (γλ)^l δ_{t+l}          (eq. 16)

    λ = 1 gives the returns to go minus the values, λ = 0 gives δ. A + V is the critic's target.

    Args:
        values: V at each token and, last, the bootstrap, the value after the last real token of the row, wherever that
            is: 0 for an episode that ended, the critic's value for one that was truncated.
        discount, lambda_: γ and λ, or arrays of them that broadcast to the rewards; γ_t discounts what follows t, and
            is 0 at the end of an episode that another one follows in the same row.
        mask: the real tokens. "Next" means the next real token; the others get 0.

    Raises:
        ValueError: if a dtype is not floating, the values are not one longer than the rewards, γ or λ leaves [0, 1] or
            does not broadcast, the mask does not match, or an unmasked reward or value is not finite.

    Source: Schulman et al. 2016.
    """
    rewards, values = floating("rewards", rewards, ndim=1), floating("values", values, ndim=1)
    if values.shape != (*rewards.shape[:-1], rewards.shape[-1] + 1):
        raise ValueError(
            f"values must have one place more than rewards, {list(rewards.shape)}, but have {list(values.shape)}."
        )
    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    rewards, values = rewards.astype(dtype), values.astype(dtype)
    mask = checked_mask(mask, rewards.shape, of="rewards")
    discount = _coefficients("discount", discount, rewards, mask)
    decay = discount * _coefficients("lambda_", lambda_, rewards, mask)
    rewards = _counting("rewards", rewards, mask)
    values = _counting("values", values, jnp.concatenate([mask, mask.any(axis=-1, keepdims=True)], axis=-1))

    def step(after, here):
        next_value, next_advantage = after
        reward, value, gamma, gamma_lambda, real = here
        advantage = reward + gamma * next_value - value + gamma_lambda * next_advantage
        after = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return after, jnp.where(real, advantage, 0)

    by_time = tuple(jnp.moveaxis(array, -1, 0) for array in (rewards, values[..., :-1], discount, decay, mask))
    end = values[..., -1], jnp.zeros_like(values[..., -1])
    _, advantages = jax.lax.scan(step, end, by_time, reverse=True)
    return stop_gradient(jnp.moveaxis(advantages, 0, -1))


def rloo(
    rewards: Float[Array, "*batch group"], *, mask: Bool[Array, "*batch group"] | None = None
) -> Float[Array, "*batch group"]:
    """Each completion's reward minus the mean of the *other* completions of its prompt (leave one out).

        A_i = r_i − 1/(N−1) Σ_{j≠i} r_j

    The baseline of a completion does not depend on it, so the policy gradient stays unbiased.

    Args:
        mask: the real completions; N is then their number. One that is alone in its group gets 0.

    Raises:
        ValueError: if the rewards are not floating, there are fewer than two, the mask does not match, or an unmasked
            reward is not finite.

    Source: Kool et al. 2019; Ahmadian et al. 2024.
    """
    rewards = floating("rewards", rewards, ndim=1)
    if rewards.shape[-1] < 2:
        raise ValueError(f"rewards must have at least 2 in a group, but have the shape {list(rewards.shape)}.")
    deviation, count = _deviations("rewards", rewards, checked_mask(mask, rewards.shape, of="rewards"), axis=-1)
    return stop_gradient(deviation * count / jnp.maximum(count - 1, 1))


def grpo(
    rewards: Float[Array, "*batch group"],
    *,
    scale: Literal["group", "batch", "none"] = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    mask: Bool[Array, "*batch group"] | None = None,
) -> Float[Array, "*batch group"]:
    """Each completion's reward, standardised within its group.

        A_i = (r_i − mean r) / (std r + ε)

    A group in which all rewards are equal gets exactly 0. A KL penalty must not be part of such rewards: where the
    others are equal, the division would make it as large as any reward, whatever its weight.

    Args:
        scale: the standard deviation is that of the group, of the rewards of the whole batch (arXiv 2508.08221),
            or 1 ("none"), which gives `centered`.
        ddof: the standard deviation divides by N − ddof: 1 for the sample's, 0 for the population's. A Python int.
        eps: ε, in the unit of the rewards.
        mask: the real completions. A group with no more than `ddof` of them gets 0.

    Raises:
        ValueError: as `rloo`, but for N ≤ ddof; if ε is negative; or if the scale is unknown.

    Source: Shao et al. 2024, section 4.1.2.
    """
    rewards = floating("rewards", rewards, ndim=1)
    check_range(0, eps=eps), check_range(0, ddof=ddof)
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, but is {scale!r}.")
    if rewards.shape[-1] <= ddof:
        raise ValueError(f"rewards must have more than ddof = {ddof} in a group, but have {rewards.shape[-1]}.")
    mask = checked_mask(mask, rewards.shape, of="rewards")
    deviation, count = _deviations("rewards", rewards, mask, axis=-1)
    if scale == "none":
        return stop_gradient(deviation)
    spread, compared = (deviation, count) if scale == "group" else _deviations("rewards", rewards, mask, axis=None)
    axis = -1 if scale == "group" else None
    variance = jnp.square(spread).sum(axis=axis, keepdims=True) / jnp.maximum(compared - ddof, 1)
    return stop_gradient(jnp.where(count > ddof, _quotient(deviation, jnp.sqrt(variance) + eps), 0))


def centered(
    rewards: Float[Array, "*batch group"], *, mask: Bool[Array, "*batch group"] | None = None
) -> Float[Array, "*batch group"]:
    """Each completion's reward minus the mean of its group, not divided by the standard deviation (Dr. GRPO).

        A_i = r_i − mean r

    The mean includes the completion itself, so this is (1 − 1/N) of `rloo`: the policy gradient keeps its direction,
    and is smaller by that factor.

    Args:
        mask: the real completions; the mean is over them.

    Raises:
        ValueError: as `rloo`, but for any N.

    Source: Liu et al. 2025.
    """
    rewards = floating("rewards", rewards, ndim=1)
    deviation, _ = _deviations("rewards", rewards, checked_mask(mask, rewards.shape, of="rewards"), axis=-1)
    return stop_gradient(deviation)


def whiten(
    advantages: Float[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Float[Array, "..."]:
    """The advantages of a whole batch, scaled to mean 0 and variance 1.

        (A − mean A) / √(var A + ε)

    Mean and (population) variance are over all real entries of all axes, without padding.

    Args:
        mask: the real entries; the others get 0.
        shift_mean: False adds the mean back, so that only the scale changes. A Python bool.
        eps: ε, in the square of the advantages' unit.

    Raises:
        ValueError: if the advantages are not floating, the mask does not match, ε is negative, or an unmasked
            advantage is not finite.

    Source: Ziegler et al. 2019.
    """
    advantages = floating("advantages", advantages)
    check_range(0, eps=eps)
    mask = checked_mask(mask, advantages.shape, of="advantages")
    deviation, count = _deviations("advantages", advantages, mask, axis=None)
    whitened = _quotient(deviation, jnp.sqrt(jnp.square(deviation).sum() / jnp.maximum(count, 1) + eps))
    if not shift_mean:
        mean = jnp.where(mask, advantages, 0).sum() / jnp.maximum(count, 1)
        whitened = jnp.where(mask, whitened + mean, 0)
    return stop_gradient(whitened)


def optimal_baseline(
    rewards: Float[Array, "*batch group"],
    squared_score_norms: Float[Array, "*batch group"],
    *,
    probabilities: Float[Array, "*batch group"] | None = None,
) -> Float[Array, "*batch"]:
    """The constant b that minimises the variance of (r − b) ∇log π, the score-function estimator.

        b* = E[‖∇log π‖² r] / E[‖∇log π‖²]

    It is not the mean reward, but a mean weighted towards completions whose score is large. The expectation is over the
    last axis; where all norms are 0, every b is as good, and b* is 0.

    Args:
        squared_score_norms: ‖∇log π‖² of the same completions.
        probabilities: weights of the completions, for exact expectations; by default each counts once. The reward of a
            completion of weight 0 may be anything.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, a norm or weight is negative, or a reward of positive
            weight is not finite.

    Source: Greensmith et al. 2004.
    """
    floating("rewards", rewards, ndim=1)
    given = {} if probabilities is None else {"probabilities": probabilities}
    rewards, norms, *weights = checked(rewards=rewards, squared_score_norms=squared_score_norms, **given)
    check_range(0, squared_score_norms=norms, **given)
    weight = norms if probabilities is None else norms * weights[0]
    rewards = _counting("rewards", rewards, jnp.ones(norms.shape, bool) if probabilities is None else weights[0] != 0)
    return stop_gradient(_quotient((weight * rewards).sum(axis=-1), weight.sum(axis=-1)))


def _counting(name: str, array: Array, mask: Array) -> Array:
    """The array, 0 where the mask is false; a ValueError if an unmasked entry can be read and is not finite."""
    sound = jnp.isfinite(array) | ~mask
    if violated(sound):
        place = tuple(int(index) for index in jnp.unravel_index(sound.argmin(), sound.shape))  # the first
        raise ValueError(f"{name} must be finite where they count, but hold {array[place]} at {list(place)}.")
    return jnp.where(mask, array, 0)


def _coefficients(name: str, given: float | Array, rewards: Array, mask: Array) -> Array:
    """γ or λ for each reward, 1 where the mask is false."""
    shape = jnp.shape(given)
    fits = all(size in (1, whole) for size, whole in zip(shape[::-1], rewards.shape[::-1], strict=False))
    if len(shape) > rewards.ndim or not fits:
        raise ValueError(f"{name} must broadcast to rewards, {list(rewards.shape)}, but has {list(shape)}.")
    coefficients = jnp.where(mask, jnp.asarray(given, rewards.dtype), 1)
    check_range(0, 1, **{name: coefficients if shape else given})  # an array may hold anything behind the mask
    return coefficients


def _deviations(name: str, array: Array, mask: Array, *, axis: int | None) -> tuple[Array, Array]:
    """Real entries minus their mean, 0 elsewhere; and the number of real ones (an axis of length 1 is kept).

    The smallest entry is subtracted first: equal entries then give exactly 0, and a large common part costs no digits.
    """
    array = _counting(name, array, mask)
    count = mask.sum(axis=axis, keepdims=True).astype(array.dtype)
    least = jnp.where(mask, array, jnp.inf).min(axis=axis, keepdims=True, initial=jnp.inf)
    above = jnp.where(mask, array - least, 0)
    mean = above.sum(axis=axis, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(mask, above - mean, 0), count


def _quotient(numerator: Array, denominator: Array) -> Array:
    """0 where the denominator is 0; NaN stays NaN."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))
