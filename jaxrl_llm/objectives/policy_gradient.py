"""Losses whose gradient is a policy gradient, and the terms that go with them: importance ratios, critic, entropy.

All are losses, so minus the objectives of the papers, and unreduced: one value per token (`gspo_loss`: per sequence).
Only the first argument carries a gradient; advantages and the log-probabilities of other policies are constants.
Samples come from `logp_old`, the policy before this round of updates, or from `logp_sampler`, the distribution that
really drew the tokens, which differs from it in precision, in kernels, or by warping (temperature, top-p).

The ratio ρ = π(y)/π_old(y) is held at e^80 (float64: e^700), and ρA at a thousandth of the largest number, so that both
stay finite. A log-ratio that is not finite carries no gradient: behind a mask it is harmless. A NaN is seen in the
value; a ratio of 0 or infinity is clipped like any other. A weight of 0 makes 0 of a log-probability of `-inf`.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from jaxrl_llm.numerics import (
    bounded_exp,
    check_range,
    checked,
    checked_mask,
    finite_gradient,
    floating,
    log_ratio,
)
from jaxrl_llm.objectives import logprobs


def reinforce_loss(logp_policy: Float[Array, "..."], advantages: Float[Array, "..."]) -> Float[Array, "..."]:
    """The score-function estimator as a loss: its gradient is minus the policy gradient, its value means nothing.

        −A log π(y)

    On-policy, E[∇] = −∇E[r] for advantages that are rewards minus a baseline that does not depend on y.

    Args:
        logp_policy: log-probabilities of tokens, or summed over sequences, in nats.
        advantages: of the same shape; constants.

    Raises:
        ValueError: if the shapes differ or a dtype is not floating.

    Source: Williams 1992.
    """
    logp_policy, advantages = checked(logp_policy=logp_policy, advantages=advantages)
    return _weighted(-advantages, logp_policy)


def reinforce_loss_grad(
    logp_policy: Float[Array, "..."], advantages: Float[Array, "..."]
) -> tuple[Float[Array, "..."]]:
    """Closed-form gradient of `reinforce_loss`: (−A,)."""
    _, advantages = checked(logp_policy=logp_policy, advantages=advantages)
    return (_finite_or_zero(-advantages),)


def ppo_clip_loss(
    logp_policy: Float[Array, "..."],
    logp_old: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Array, "..."]:
    """PPO's clipped surrogate: nothing is gained by moving a ratio further than the clip, towards what A rewards.

        −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A),   ρ = π(y)/π_old(y)             (Schulman et al. 2017, eq. 7)
        −max(that minimum, cA) where A < 0, with a dual clip c                        (Ye et al. 2020, eq. 5)

    Samples come from π_old. At ρ = 1 the gradient is −A, also for clips of 0. Without a dual clip, a token of A < 0
    that became much likelier has an unbounded loss; with one the loss there is at most −cA.

    Args:
        logp_policy, logp_old, advantages: of one shape; all but the first are constants.
        clip_low, clip_high: ε_low in [0, 1] and ε_high; a larger ε_high lets unlikely tokens rise (Yu et al. 2025).
        dual_clip: c > 1, or None for none (fixed when compiling).

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, or a knob leaves its range.

    Source: Schulman et al. 2017; Ye et al. 2020; Yu et al. 2025.
    """
    d, advantages = _surrogate_inputs(logp_policy, logp_old, advantages, clip_low, clip_high, dual_clip)
    return _surrogate(d, advantages, clip_low, clip_high, dual_clip)


def ppo_clip_loss_grad(
    logp_policy: Float[Array, "..."],
    logp_old: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Float[Array, "..."]]:
    """Closed-form gradient of `ppo_clip_loss`: −ρA where the ratio is not clipped, 0 where it is."""
    d, advantages = _surrogate_inputs(logp_policy, logp_old, advantages, clip_low, clip_high, dual_clip)
    return (_surrogate_slope(d, advantages, clip_low, clip_high, dual_clip),)


def gspo_loss(
    logp_policy: Float[Array, "*batch time"],
    logp_old: Float[Array, "*batch time"],
    advantages: Float[Array, "*batch"],
    mask: Bool[Array, "*batch time"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    length_normalised: bool = True,
) -> Float[Array, "*batch"]:
    """The clipped surrogate with one ratio for the whole sequence, as there is one reward for it.

        −min(sA, clip(s, 1 − ε_low, 1 + ε_high) A),   s = (π(y)/π_old(y))^{1/|y|}                    (eqs. 5-7)

    s is the geometric mean of the tokens' ratios, hence the narrow clips. A sequence without a real token has the loss
    0.

    Args:
        logp_policy, logp_old: log-probabilities of the tokens, in nats; `logp_old` and the advantages are constants.
        mask: which tokens are real.
        clip_low, clip_high: as in `ppo_clip_loss`.
        length_normalised: False takes the sequence's plain ratio, for which the clips are too narrow. A Python bool.

    Raises:
        ValueError: if the shapes do not match, a dtype is not floating, or a knob leaves its range.

    Source: Zheng et al. 2025.
    """
    d, _, advantages = _sequence_inputs(logp_policy, logp_old, advantages, mask, clip_low, clip_high, length_normalised)
    return _surrogate(d, advantages, clip_low, clip_high)


def gspo_loss_grad(
    logp_policy: Float[Array, "*batch time"],
    logp_old: Float[Array, "*batch time"],
    advantages: Float[Array, "*batch"],
    mask: Bool[Array, "*batch time"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    length_normalised: bool = True,
) -> tuple[Float[Array, "*batch time"]]:
    """Closed-form gradient of `gspo_loss`: −sA/|y| at each real token, 0 at all of them where s is clipped."""
    d, share, advantages = _sequence_inputs(
        logp_policy, logp_old, advantages, mask, clip_low, clip_high, length_normalised
    )
    return (_surrogate_slope(d, advantages, clip_low, clip_high)[..., None] * share,)


def cispo_loss(
    logp_policy: Float[Array, "..."],
    logp_old: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Float[Array, "..."]:
    """REINFORCE with a clipped importance weight: the weight is bounded, and no token loses its gradient.

        −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π(y)                                              (eqs. 4-5)

    Samples come from π_old; `sg` stops the gradient. Unbiased for the policy gradient where no weight is clipped.

    Args:
        logp_policy, logp_old, advantages: of one shape; all but the first are constants.
        clip_low, clip_high: ε_low and ε_high; an ε_low of 1 or more clips nothing from below.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, or a clip is negative.

    Source: MiniMax 2025 (M1).
    """
    logp_policy, weight = _cispo_inputs(logp_policy, logp_old, advantages, clip_low, clip_high)
    return _weighted(-weight, logp_policy)


def cispo_loss_grad(
    logp_policy: Float[Array, "..."],
    logp_old: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> tuple[Float[Array, "..."]]:
    """Closed-form gradient of `cispo_loss`: −clip(ρ, 1 − ε_low, 1 + ε_high) A."""
    _, weight = _cispo_inputs(logp_policy, logp_old, advantages, clip_low, clip_high)
    return (_finite_or_zero(-weight),)


def truncated_importance_weight(
    logp_old: Float[Array, "..."],
    logp_sampler: Float[Array, "..."],
    *,
    cap: float = 2.0,
    mode: Literal["truncate", "mask"] = "truncate",
) -> Float[Array, "..."]:
    """A constant weight that corrects for a sampler which is not the policy it stands for.

        min(π_old(y)/μ(y), C),   or with mode "mask" the ratio itself, and 0 beyond C

    μ is the distribution that drew the tokens. Without a cap the weighted mean is unbiased; C bounds its variance, at
    the price of a bias towards μ. Multiply a loss per token by it, or per sequence for summed log-probabilities. No
    gradient flows.

    Args:
        logp_old, logp_sampler: of one shape, in nats.
        cap: C > 0.
        mode: "truncate" or "mask".

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, C is not positive, or the mode is another one.

    Source: Espeholt et al. 2018 (ρ̄ below eq. 1); Yao et al. 2025.
    """
    logp_old, logp_sampler = checked(logp_old=logp_old, logp_sampler=logp_sampler)
    check_range(0, open_low=True, cap=cap)
    if mode not in ("truncate", "mask"):
        raise ValueError(f'mode must be "truncate" or "mask", but is {mode!r}.')
    ratio = bounded_exp(logp_old - logp_sampler)
    return stop_gradient(jnp.where(ratio > cap, cap if mode == "truncate" else 0, ratio).astype(ratio.dtype))


def off_policy_reinforce_loss(
    logp_policy: Float[Array, "..."],
    logp_sampler: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    cap: float = 2.0,
    mode: Literal["truncate", "mask"] = "truncate",
) -> Float[Array, "..."]:
    """REINFORCE on samples of another distribution μ, weighted by the truncated ratio.

        −sg(min(π(y)/μ(y), C)) A log π(y)

    Unbiased for the policy gradient where no ratio is above C.

    Args:
        logp_policy, logp_sampler, advantages: of one shape; all but the first are constants.
        cap, mode: as in `truncated_importance_weight`.

    Raises:
        ValueError: as `truncated_importance_weight`.

    Source: Espeholt et al. 2018; Yao et al. 2025.
    """
    logp_policy, weight = _off_policy_inputs(logp_policy, logp_sampler, advantages, cap, mode)
    return _weighted(-weight, logp_policy)


def off_policy_reinforce_loss_grad(
    logp_policy: Float[Array, "..."],
    logp_sampler: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    cap: float = 2.0,
    mode: Literal["truncate", "mask"] = "truncate",
) -> tuple[Float[Array, "..."]]:
    """Closed-form gradient of `off_policy_reinforce_loss`: −min(π/μ, C) A."""
    _, weight = _off_policy_inputs(logp_policy, logp_sampler, advantages, cap, mode)
    return (_finite_or_zero(-weight),)


def value_loss(
    values: Float[Array, "..."],
    values_old: Float[Array, "..."],
    returns: Float[Array, "..."],
    *,
    clip: float | None = 0.2,
) -> Float[Array, "..."]:
    """The critic's squared error, pessimistic about moves of more than ε from its value before the update.

        ½ max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

    Where the two are equal the first counts, so within ε of V_old the gradient is V − R. In the square of the returns'
    unit.

    Args:
        values, values_old, returns: of one shape; all but the first are constants.
        clip: ε, in the unit of the returns, or None for ½ (V − R)² (fixed when compiling).

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, or ε is negative.

    Source: Schulman et al. 2017, eq. 9 (the plain square); Engstrom et al. 2020 (the clip).
    """
    error, held_error, held = _value_errors(values, values_old, returns, clip)
    return jnp.square(jnp.where(held, held_error, error)) / 2


def value_loss_grad(
    values: Float[Array, "..."],
    values_old: Float[Array, "..."],
    returns: Float[Array, "..."],
    *,
    clip: float | None = 0.2,
) -> tuple[Float[Array, "..."]]:
    """Closed-form gradient of `value_loss`: V − R, and 0 where the clipped error is the larger one."""
    error, _, held = _value_errors(values, values_old, returns, clip)
    return (jnp.where(held, 0, _finite_or_zero(error)),)


def entropy_loss(logits: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    """Minus the entropy of the next-token distribution, in nats: times a coefficient, the entropy bonus as a loss.

        −H = Σ_v p_v log p_v,   p = softmax(logits)

    Raises:
        ValueError: as `logprobs.entropy`.

    Source: Williams and Peng 1991; Mnih et al. 2016.
    """
    return -logprobs.entropy(logits)


def entropy_loss_grad(logits: Float[Array, "... vocab"]) -> tuple[Float[Array, "... vocab"]]:
    """Closed-form gradient of `entropy_loss`: p_v (log p_v + H)."""
    (gradient,) = logprobs.entropy_grad(logits)
    return (-gradient,)


def _finite_or_zero(array: Array) -> Array:
    return jnp.where(jnp.isfinite(array), array, 0)


def _weighted(weight: Array, array: Array) -> Array:
    """weight · array, the weight a constant: its derivative is the weight, and 0 where that is not finite."""
    weight = stop_gradient(weight)
    array = jnp.where((weight == 0) & (array == -jnp.inf), 0, array)
    return jnp.where(jnp.isfinite(weight), _finite_or_zero(weight) * array, stop_gradient(weight * array))


def _ratio(d: Array, advantages: Array) -> Array:
    """e^d, held where e^d |A| would leave the range; its own derivative there too."""
    most = jnp.log(jnp.finfo(d.dtype).max) - 7 - jnp.log(jnp.maximum(jnp.abs(_finite_or_zero(advantages)), 1))
    return bounded_exp(d - stop_gradient(jnp.maximum(d - most, 0)))


def _surrogate(d: Array, advantages: Array, *clips: float | None) -> Array:
    """−min(ρA, clip(ρ)A), dual-clipped, with ρ = e^d: A times the ratio, or the bound that the ratio has crossed."""
    ratio = _ratio(d, advantages)
    low, high = _interval(advantages, *clips)
    held = stop_gradient(jnp.clip(ratio, low, high))
    return _weighted(-advantages, jnp.where((ratio < low) | (ratio > high), held, ratio))


def _surrogate_slope(d: Array, advantages: Array, *clips: float | None) -> Array:
    """The derivative of `_surrogate` with respect to d: −ρA, and 0 where the ratio has crossed a bound."""
    ratio = _ratio(d, advantages)
    low, high = _interval(advantages, *clips)
    crossed = (ratio < low) | (ratio > high)
    return jnp.where(crossed | ~jnp.isfinite(d), 0, -ratio * _finite_or_zero(advantages))


def _interval(
    advantages: Array, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Array, Array]:
    """Within which ratios the surrogate follows ρ: up to 1 + ε_high where A > 0, from 1 − ε_low (to c) where A < 0."""
    low = jnp.where(advantages < 0, 1 - clip_low, 0)
    high = jnp.where(advantages > 0, 1 + clip_high, jnp.inf)
    return low, high if dual_clip is None else jnp.where(advantages < 0, dual_clip, high)


def _check_clips(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    check_range(0, 1, clip_low=clip_low), check_range(0, clip_high=clip_high)
    if dual_clip is not None:
        check_range(1, open_low=True, dual_clip=dual_clip)


def _surrogate_inputs(
    logp_policy: Array, logp_old: Array, advantages: Array, *clips: float | None
) -> tuple[Array, Array]:
    """The log-ratio and the advantages."""
    logp_policy, logp_old, advantages = checked(logp_policy=logp_policy, logp_old=logp_old, advantages=advantages)
    _check_clips(*clips)
    return log_ratio(logp_policy, stop_gradient(logp_old)), stop_gradient(advantages)


def _sequence_inputs(
    logp_policy: Array,
    logp_old: Array,
    advantages: Array,
    mask: Array,
    clip_low: float,
    clip_high: float,
    length_normalised: bool,
) -> tuple[Array, Array, Array]:
    """log s, its derivative with respect to each token's log-probability, and the advantages, 0 for an empty row."""
    floating("logp_policy", logp_policy, ndim=1)
    logp_policy, logp_old = checked(logp_policy=logp_policy, logp_old=logp_old)
    advantages = floating("advantages", advantages)
    if advantages.shape != logp_policy.shape[:-1]:
        raise ValueError(
            f"advantages must be one per sequence, {list(logp_policy.shape[:-1])}, but have {list(advantages.shape)}."
        )
    mask = checked_mask(mask, logp_policy.shape, of="logp_policy")
    _check_clips(clip_low, clip_high)
    count = mask.sum(axis=-1).astype(logp_policy.dtype)
    divisor = jnp.maximum(count, 1) if length_normalised else jnp.ones_like(count)
    per_token = jnp.where(mask, log_ratio(logp_policy, stop_gradient(logp_old)), 0)
    share = jnp.where(mask, 1 / divisor[..., None], 0)
    return (
        finite_gradient(per_token.sum(axis=-1) / divisor),
        share,
        jnp.where(count > 0, stop_gradient(advantages), 0),
    )


def _cispo_inputs(
    logp_policy: Array, logp_old: Array, advantages: Array, clip_low: float, clip_high: float
) -> tuple[Array, Array]:
    """log π and its weight, clip(ρ) A, which `_weighted` holds constant."""
    logp_policy, logp_old, advantages = checked(logp_policy=logp_policy, logp_old=logp_old, advantages=advantages)
    check_range(0, clip_low=clip_low, clip_high=clip_high)
    return logp_policy, jnp.clip(bounded_exp(logp_policy - logp_old), 1 - clip_low, 1 + clip_high) * advantages


def _off_policy_inputs(
    logp_policy: Array, logp_sampler: Array, advantages: Array, cap: float, mode: str
) -> tuple[Array, Array]:
    """log π and its weight, min(π/μ, C) A."""
    arrays = checked(logp_policy=logp_policy, logp_sampler=logp_sampler, advantages=advantages)
    return arrays[0], truncated_importance_weight(*arrays[:2], cap=cap, mode=mode) * arrays[2]


def _value_errors(values: Array, values_old: Array, returns: Array, clip: float | None) -> tuple[Array, Array, Array]:
    """V − R; the error at V_old ± ε; and where that is the larger one, V having left the interval."""
    values, values_old, returns = checked(values=values, values_old=values_old, returns=returns)
    values_old, returns = stop_gradient(values_old), stop_gradient(returns)
    error = finite_gradient(values - returns)
    if clip is None:
        return error, jnp.zeros_like(error), jnp.zeros(error.shape, bool)
    check_range(0, clip=clip)
    moved = stop_gradient(values) - values_old
    held_error = values_old + jnp.clip(moved, -clip, clip) - returns
    return error, held_error, (jnp.abs(moved) > clip) & (jnp.abs(held_error) > jnp.abs(error))
