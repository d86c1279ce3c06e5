"""Losses whose gradient is a policy gradient, and the terms that go with them: importance ratios, critic, entropy.

All are losses, so minus the objectives of the papers, and unreduced: one value per token (`gspo_loss`: per sequence).
Only the first argument carries a gradient; advantages and the log-probabilities of other policies are constants.
Samples come from `logp_old`, the policy before this round of updates, or from `logp_sampler`, the distribution that
drew the tokens, which differs from it in precision, in kernels, or by warping (temperature, top-p).

The ratio ρ = π(y)/π_old(y) is held at e^80 (float64: e^700), and ρA at a thousandth of the largest number, so that both
stay finite. A log-ratio that is not finite carries no gradient, so a mask makes it harmless. A NaN shows in the value;
a ratio of 0 or infinity is clipped like any other. A weight of 0 makes 0 of a log-probability of `-inf`.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from jaxrl_llm.numerics import bounded_exp, check_range, checked, finite_gradient, is_concrete, log_ratio
from jaxrl_llm.objectives import logprobs
from jaxrl_llm.objectives.objective import objective


@objective(constants=("advantages",))
def reinforce_loss(logp_policy: Float[Array, "*batch"], advantages: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The score-function estimator as a loss: its gradient is minus the policy gradient, its value has no meaning.

        −A log π(y)

    On-policy, E[∇] = −∇E[r] for advantages that are rewards minus a baseline that does not depend on y.

    Args:
        logp_policy: log-probabilities of tokens, or summed over sequences, in nats.
        advantages: of the same shape; constants.

    Source: Williams 1992.
    """
    return _weighted(-advantages, logp_policy)


@reinforce_loss.gradient
def _(logp_policy, advantages):
    """−A."""
    return _finite_or_zero(-advantages)


@objective(constants=("logp_old", "advantages"), clip_low="[0, 1]", clip_high="[0, inf)", dual_clip="(1, inf)")
def ppo_clip_loss(
    logp_policy: Float[Array, "*batch"],
    logp_old: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Array, "*batch"]:
    """PPO's clipped surrogate: nothing is gained by moving a ratio further than the clip, towards what A rewards.

        −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A),   ρ = π(y)/π_old(y)             (Schulman et al. 2017, eq. 7)
        −max(that minimum, cA) where A < 0, with a dual clip c                        (Ye et al. 2020, eq. 5)

    Samples come from π_old. At ρ = 1 the gradient is −A, also for clips of 0. Without a dual clip, a token of A < 0
    that became much likelier has an unbounded loss; with one the loss there is at most −cA.

    Args:
        logp_policy, logp_old, advantages: of one shape; all but the first are constants.
        clip_low, clip_high: ε_low in [0, 1] and ε_high; a larger ε_high lets unlikely tokens rise (Yu et al. 2025).
        dual_clip: c > 1, or None for none (fixed when compiling).

    Source: Schulman et al. 2017; Ye et al. 2020; Yu et al. 2025.
    """
    rho = _ratio(logp_policy, logp_old, advantages)
    clipped = stop_gradient(jnp.clip(rho, 1 - clip_low, 1 + clip_high))
    # min(ρA, clip(ρ)A) is A times ρ or clip(ρ): so A ± ∞ does no harm, and at a tie the gradient is that of ρA.
    lesser = jnp.where(jnp.sign(advantages) * (rho - clipped) > 0, clipped, rho)
    if dual_clip is not None:
        lesser = jnp.where((advantages < 0) & (lesser > dual_clip), dual_clip, lesser)
    return _weighted(-advantages, lesser)


@ppo_clip_loss.gradient
def _(logp_policy, logp_old, advantages, *, clip_low, clip_high, dual_clip):
    """−ρA where the ratio is not clipped, 0 where it is."""
    rho = _ratio(logp_policy, logp_old, advantages)
    clipped = (advantages > 0) & (rho > 1 + clip_high) | (advantages < 0) & (rho < 1 - clip_low)
    if dual_clip is not None:
        clipped |= (advantages < 0) & (rho > dual_clip)
    follows = ~clipped & jnp.isfinite(logp_policy - logp_old)
    return jnp.where(follows, -rho * _finite_or_zero(advantages), 0)


@objective(constants=("logp_old", "advantages"), clip_low="[0, 1]", clip_high="[0, inf)")
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
        mask: the real tokens.
        clip_low, clip_high: as in `ppo_clip_loss`.
        length_normalised: False takes the sequence's plain ratio, for which the clips are too narrow. A Python bool.

    Source: Zheng et al. 2025.
    """
    log_s, _, advantages = _sequence_ratio(logp_policy, logp_old, advantages, mask, length_normalised)
    return ppo_clip_loss(log_s, jnp.zeros_like(log_s), advantages, clip_low=clip_low, clip_high=clip_high)


@gspo_loss.gradient
def _(logp_policy, logp_old, advantages, mask, *, clip_low, clip_high, length_normalised):
    """−sA/|y| at each real token, 0 at all of them where s is clipped."""
    log_s, share, advantages = _sequence_ratio(logp_policy, logp_old, advantages, mask, length_normalised)
    of_log_s = ppo_clip_loss.grad(log_s, jnp.zeros_like(log_s), advantages, clip_low=clip_low, clip_high=clip_high)
    return of_log_s[0][..., None] * share


def _sequence_ratio(
    logp_policy: Array, logp_old: Array, advantages: Array, mask: Array, length_normalised: bool
) -> tuple[Array, Array, Array]:
    """log s, its derivative with respect to each token's log-probability, and the advantages, 0 for an empty row."""
    count = mask.sum(axis=-1).astype(logp_policy.dtype)
    divisor = jnp.maximum(count, 1) if length_normalised else jnp.ones_like(count)
    log_s = finite_gradient(jnp.where(mask, log_ratio(logp_policy, logp_old), 0).sum(axis=-1) / divisor)
    return log_s, jnp.where(mask, 1 / divisor[..., None], 0), jnp.where(count > 0, advantages, 0)


@objective(constants=("logp_other",))
def completion_log_ratio(
    logp_policy: Float[Array, "*batch time"],
    logp_other: Float[Array, "*batch time"],
    mask: Bool[Array, "*batch time"],
    *,
    length_normalised: bool = False,
) -> Float[Array, "*batch time"]:
    """The log-ratio of a whole completion at each of its tokens, where its gradient is that of the token alone.

        sg(Σ_s log π(y_s)/π_other(y_s)) + log π(y_t) − sg(log π(y_t))

    Summed over tokens, a loss of it has the gradient of the same loss of the whole completion, and each token may have
    a weight of its own. `ppo_clip_loss` of it clips the ratio of completions: of the plain ratio as TRL's RLOO does,
    of the length-normalised one it is GSPO-token, which for one advantage a completion has the mean gradient of
    `gspo_loss`. `k2` of it is the KL penalty of whole completions.

    Args:
        logp_policy, logp_other: log-probabilities of the tokens, in nats; `logp_other` is a constant.
        mask: the real tokens; the others have the value 0.
        length_normalised: divide the sum by the number of real tokens: the geometric mean of the tokens' ratios.

    Source: Zheng et al. 2025, eqs. 13 and 14.
    """
    divisor = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1) if length_normalised else 1
    whole = jnp.where(mask, logp_policy - logp_other, 0).sum(axis=-1, keepdims=True) / divisor
    own = jnp.where(jnp.isfinite(logp_policy), logp_policy - stop_gradient(logp_policy), 0)
    return jnp.where(mask, stop_gradient(whole) + own, 0)


@completion_log_ratio.gradient
def _(logp_policy, logp_other, mask, *, length_normalised):
    """1 at each real token."""
    return (mask & jnp.isfinite(logp_policy)).astype(logp_policy.dtype)


@objective(constants=("logp_old", "advantages"), clip_low="[0, inf)", clip_high="[0, inf)")
def cispo_loss(
    logp_policy: Float[Array, "*batch"],
    logp_old: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Float[Array, "*batch"]:
    """REINFORCE with a clipped importance weight: the weight is bounded, and no token loses its gradient.

        −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π(y)                                              (eqs. 4-5)

    Samples come from π_old; `sg` stops the gradient. Unbiased for the policy gradient where no weight is clipped.

    Args:
        logp_policy, logp_old, advantages: of one shape; all but the first are constants.
        clip_low, clip_high: ε_low and ε_high; an ε_low of 1 or more clips nothing from below.

    Source: MiniMax 2025 (M1).
    """
    rho = bounded_exp(logp_policy - logp_old)
    return _weighted(-jnp.clip(rho, 1 - clip_low, 1 + clip_high) * advantages, logp_policy)


@cispo_loss.gradient
def _(logp_policy, logp_old, advantages, *, clip_low, clip_high):
    """−clip(ρ, 1 − ε_low, 1 + ε_high) A."""
    rho = bounded_exp(logp_policy - logp_old)
    return _finite_or_zero(-jnp.clip(rho, 1 - clip_low, 1 + clip_high) * advantages)


def truncated_importance_weight(
    logp_old: Float[Array, "*batch"],
    logp_sampler: Float[Array, "*batch"],
    *,
    cap: float = 2.0,
    floor: float = 0.0,
    mode: Literal["truncate", "mask"] = "truncate",
) -> Float[Array, "*batch"]:
    """A constant importance weight that corrects for a sampler other than the policy.

        clip(π_old(y)/μ(y), F, C),   or with mode "mask" the ratio itself, and 0 outside of [F, C]

    μ is the distribution that drew the tokens. Without bounds the weighted mean is unbiased; C bounds its variance at
    the price of a bias towards μ. Multiply a loss per token by it, or per sequence for summed log-probabilities. No
    gradient flows through it.

    Args:
        logp_old, logp_sampler: of one shape, in nats.
        cap: C > 0.
        floor: F ≥ 0, no more than C.
        mode: "truncate"; or "mask", which of tokens with a floor is IcePop, of sequences masked importance sampling.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, C is not positive, F is not in [0, C], or the mode is
            unknown.

    Source: Espeholt et al. 2018 (ρ̄ below eq. 1); Yao et al. 2025. Masks: IcePop (arXiv 2510.18855); masked importance
        sampling of sequences (Liu et al. 2025, *When speed kills stability*).
    """
    logp_old, logp_sampler = checked(logp_old=logp_old, logp_sampler=logp_sampler)
    check_range(0, open_low=True, cap=cap)
    check_range(0, cap if is_concrete(cap) else jnp.inf, floor=floor)
    if mode not in ("truncate", "mask"):
        raise ValueError(f'mode must be "truncate" or "mask", but is {mode!r}.')
    ratio = bounded_exp(logp_old - logp_sampler)
    outside = jnp.clip(ratio, floor, cap) if mode == "truncate" else 0
    return stop_gradient(jnp.where((ratio < floor) | (ratio > cap), outside, ratio).astype(ratio.dtype))


@objective(constants=("logp_sampler", "advantages"))
def off_policy_reinforce_loss(
    logp_policy: Float[Array, "*batch"],
    logp_sampler: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    cap: float = 2.0,
    mode: Literal["truncate", "mask"] = "truncate",
) -> Float[Array, "*batch"]:
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
    weight = truncated_importance_weight(logp_policy, logp_sampler, cap=cap, mode=mode)
    return _weighted(-weight * advantages, logp_policy)


@off_policy_reinforce_loss.gradient
def _(logp_policy, logp_sampler, advantages, *, cap, mode):
    """−min(π/μ, C) A."""
    return _finite_or_zero(-truncated_importance_weight(logp_policy, logp_sampler, cap=cap, mode=mode) * advantages)


@objective(constants=("values_old", "returns"), clip="[0, inf)")
def value_loss(
    values: Float[Array, "*batch"],
    values_old: Float[Array, "*batch"],
    returns: Float[Array, "*batch"],
    *,
    clip: float | None = 0.2,
) -> Float[Array, "*batch"]:
    """The critic's squared error, pessimistic about moves of more than ε from its value before the update.

        ½ max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

    Where the two are equal the first counts, so within ε of V_old the gradient is V − R. In the square of the returns'
    unit.

    Args:
        values, values_old, returns: of one shape; all but the first are constants.
        clip: ε, in the unit of the returns, or None for ½ (V − R)² (fixed when compiling).

    Source: Schulman et al. 2017, eq. 9 (the plain square); Engstrom et al. 2020 (the clip).
    """
    error = finite_gradient(values - returns)
    if clip is not None:
        clipped, larger = _clipped_error(values, values_old, returns, clip)
        error = jnp.where(larger, clipped, error)
    return jnp.square(error) / 2


@value_loss.gradient
def _(values, values_old, returns, *, clip):
    """V − R, and 0 where the clipped error is the larger one."""
    error = _finite_or_zero(values - returns)
    return error if clip is None else jnp.where(_clipped_error(values, values_old, returns, clip)[1], 0, error)


def _clipped_error(values: Array, values_old: Array, returns: Array, clip: float) -> tuple[Array, Array]:
    """V_old + clip(V − V_old, −ε, ε) − R, a constant; true where V is beyond ε and this error is the larger one."""
    values = stop_gradient(values)
    clipped = values_old + jnp.clip(values - values_old, -clip, clip) - returns
    return clipped, (jnp.abs(values - values_old) > clip) & (jnp.abs(clipped) > jnp.abs(values - returns))


@objective
def entropy_loss(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """Minus the entropy of the next-token distribution, in nats: times a coefficient, the entropy bonus as a loss.

        −H = Σ_v p_v log p_v,   p = softmax(logits)

    Source: Williams and Peng 1991; Mnih et al. 2016.
    """
    return -logprobs.entropy(logits)


@entropy_loss.gradient
def _(logits):
    """p_v (log p_v + H)."""
    return -logprobs.entropy.grad(logits)[0]


def _finite_or_zero(array: Array) -> Array:
    return jnp.where(jnp.isfinite(array), array, 0)


def _weighted(weight: Array, array: Array) -> Array:
    """weight · array, the weight a constant: its derivative is the weight, and 0 where that is not finite."""
    weight = stop_gradient(weight)
    array = jnp.where((weight == 0) & (array == -jnp.inf), 0, array)
    return jnp.where(jnp.isfinite(weight), _finite_or_zero(weight) * array, stop_gradient(weight * array))


def _ratio(logp_policy: Array, logp_old: Array, advantages: Array) -> Array:
    """ρ = π/π_old, held where ρ|A| would leave the range; its own derivative there too."""
    d = log_ratio(logp_policy, logp_old)
    most = jnp.log(jnp.finfo(d.dtype).max) - 7 - jnp.log(jnp.maximum(jnp.abs(_finite_or_zero(advantages)), 1))
    return bounded_exp(d - stop_gradient(jnp.maximum(d - most, 0)))
