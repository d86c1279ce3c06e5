"""Losses without a reference policy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.numerics import check_range, finite_gradient, wide
from jaxrl_llm.objectives._margins import difference, log_odds_slope, logistic, logistic_slope, odds, of_margin, times


def simpo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
) -> Float[Array, "..."]:
    """Simple preference optimisation: no reference, the average log-probability as the reward, and a target margin.

        L = −log σ(β (w − l) − γ)          (eq. 6)

    At w = l it is log(1 + e^γ). The target lead is γ/β nats per token, and the defaults, which are TRL's, ask for 5.
    The paper's models have β from 2 to 2.5 and γ/β from 0.1 to 0.8: set both.

    Args:
        logp_policy_chosen, logp_policy_rejected: w and l, log-probabilities of the responses *averaged* over their
            tokens, in nats per token.
        beta: scale of the reward, which is per token: much larger than the β of losses of sums.
        gamma: γ, by how much βw should exceed βl; in units of the reward.

    Raises:
        ValueError: as `dpo_loss`.

    Source: Meng et al. 2024.
    """
    margin = difference(logp_policy_chosen, logp_policy_rejected, beta)
    return logistic(beta * margin - gamma, 0.0)


def simpo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Closed-form gradient of `simpo_loss`: −β σ(γ − β (w − l)) · (1, −1)."""
    margin = difference(logp_policy_chosen, logp_policy_rejected, beta)
    return of_margin(margin, beta * logistic_slope(beta * margin - gamma, 0.0))[:2]


def orpo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> Float[Array, "..."]:
    """Odds ratio preference optimisation: supervised fine-tuning and a preference in one, without a reference.

        L = −w − β log σ(log odds(w) − log odds(l)),   log odds(x) = log(e^x / (1 − e^x))          (eqs. 6 and 7)

    The odds ratio's term is β log 2 at w = l. Within half a machine epsilon of 0, where the probability rounds to 1, a
    log-probability counts as −½ epsilon in the odds, so that they stay finite, and their gradient does too.

    Args:
        logp_policy_chosen, logp_policy_rejected: w and l, log-probabilities of the responses *averaged* over their
            tokens, in nats per token, ≤ 0.
        beta: weight of the odds ratio (the paper's λ).
        nll_weight: weight of −w; with 0 the odds ratio stands alone.

    Raises:
        ValueError: as `dpo_loss`, or if `nll_weight` is negative or a log-probability positive.

    Source: Hong et al. 2024. (TRL's −w is an average over the batch's tokens, the prompt's among them.)
    """
    w, _, margin = odds(logp_policy_chosen, logp_policy_rejected, beta, nll_weight)
    return times(nll_weight, -w) + beta * logistic(margin, 0.0)


def orpo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Closed-form gradient of `orpo_loss`: (−1 − β σ(−z)/(1 − e^w), β σ(−z)/(1 − e^l)), z the log odds ratio."""
    w, l, margin = odds(logp_policy_chosen, logp_policy_rejected, beta, nll_weight)  # noqa: E741
    slope = jnp.where(jnp.isfinite(margin), beta * logistic_slope(margin, 0.0), 0)
    of_chosen = jnp.where(jnp.isfinite(w), slope * log_odds_slope(w) - nll_weight, 0)
    return of_chosen, jnp.where(jnp.isfinite(l), -slope * log_odds_slope(l), 0)


def cpo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Float[Array, "..."]:
    """Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen response.

        L = −(1 − ε) log σ(β (w − l)) − ε log σ(−β (w − l)) − λ w

    Args:
        logp_policy_chosen, logp_policy_rejected: w and l, log-probabilities of the responses, summed over their tokens,
            in nats. (TRL's second term is an average over the batch's tokens instead of λ w.)
        beta, label_smoothing: as in `dpo_loss`.
        nll_weight: λ; with 0 the preference stands alone.

    Raises:
        ValueError: as `dpo_loss`, or if `nll_weight` is negative.

    Source: Xu et al. 2024.
    """
    margin = difference(logp_policy_chosen, logp_policy_rejected, beta)
    check_range(0, nll_weight=nll_weight)
    likelihood = times(nll_weight, finite_gradient(wide(jnp.asarray(logp_policy_chosen))))
    return logistic(beta * margin, label_smoothing) - likelihood


def cpo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Closed-form gradient of `cpo_loss`: (s − λ, −s) with s = β (ε − σ(−β (w − l)))."""
    margin = difference(logp_policy_chosen, logp_policy_rejected, beta)
    check_range(0, nll_weight=nll_weight)
    of_chosen, of_rejected, *_ = of_margin(margin, beta * logistic_slope(beta * margin, label_smoothing))
    return jnp.where(jnp.isfinite(jnp.asarray(logp_policy_chosen)), of_chosen - nll_weight, 0), of_rejected
