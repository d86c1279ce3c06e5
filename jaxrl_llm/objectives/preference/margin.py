"""Losses of the margin Δ alone: they hold the two answers apart, and do not determine where either goes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.numerics import check_range, log_ratio
from jaxrl_llm.objectives._margins import (
    bell,
    length,
    log_of_label,
    log_ratios,
    logistic,
    logistic_slope,
    margin_of,
    modulated_exp,
    of_log_ratios,
    of_margin,
    p_log_ratio,
    score,
    score_slope,
    times,
)


def dpo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Array, "..."]:
    """Direct preference optimisation, and with label smoothing its conservative form (cDPO).

        L = −(1 − ε) log σ(βΔ) − ε log σ(−βΔ)          (eq. 7, where ε = 0)

    At Δ = 0 it is log 2, with the slope −(½ − ε) per unit of βΔ; with ε > 0 it is least at βΔ = log((1 − ε)/ε).

    Args:
        logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected: log-probabilities of the
            responses, summed over their tokens, in nats.
        beta: the price of a nat of KL, in units of the reward, of the regularised objective whose optimum this is.
        label_smoothing: ε, the share of labels taken to be flipped.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, β ≤ 0, or ε lies outside [0, 1].

    Source: Rafailov et al. 2023; label smoothing: Mitchell 2023.
    """
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return logistic(beta * margin, label_smoothing)


def dpo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `dpo_loss`: β (ε − σ(−βΔ)) · (1, −1, −1, 1)."""
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return of_margin(margin, beta * logistic_slope(beta * margin, label_smoothing))


def robust_dpo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Array, "..."]:
    """DPO with the noise of the labels taken out: its mean over labels flipped with probability ε is the clean loss.

        L = (−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε)

    At Δ = 0 it is log 2, with the slope −½ / (1 − 2ε) per unit of βΔ; with ε > 0 it is not bounded below.

    Args:
        the log-probabilities, beta: as in `dpo_loss`.
        label_smoothing: ε, the known share of flipped labels, less than ½.

    Raises:
        ValueError: as `dpo_loss`, or if ε lies outside [0, ½).

    Source: Chowdhury et al. 2024.
    """
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    check_range(0, 0.5, open_high=True, label_smoothing=label_smoothing)
    x = beta * margin
    clean, flipped = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    return (times(1 - label_smoothing, clean) - times(label_smoothing, flipped)) / (1 - 2 * label_smoothing)


def robust_dpo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `robust_dpo_loss`: −β ((1 − ε) σ(−βΔ) + ε σ(βΔ)) / (1 − 2ε) · (1, −1, −1, 1)."""
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    check_range(0, 0.5, open_high=True, label_smoothing=label_smoothing)
    x = beta * margin
    weighted = (1 - label_smoothing) * jax.nn.sigmoid(-x) + label_smoothing * jax.nn.sigmoid(x)
    return of_margin(margin, -beta * weighted / (1 - 2 * label_smoothing))


def ipo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """Identity preference optimisation: a margin of a fixed size, in nats², instead of one without bound.

        L = (Δ − 1/(2β))²          (eq. 17, where β is called τ)

    At Δ = 0 it is 1/(4β²). On log-probabilities averaged over tokens it is *another* loss, with another β; whoever
    wants that one passes averages.

    Arguments and errors are those of `dpo_loss`.

    Source: Azar et al. 2023.
    """
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return jnp.square(margin - 1 / (2 * beta))


def ipo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `ipo_loss`: (2Δ − 1/β) · (1, −1, −1, 1)."""
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return of_margin(margin, 2 * (margin - 1 / (2 * beta)))


def hinge_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """The hinge on the margin of log-ratios to the reference: the loss of RSO.

        L = max(0, 1 − βΔ)

    At Δ = 0 it is 1. At the kink, βΔ = 1, the gradient is 0. (The hinge of SLiC, Zhao et al. 2023, has no reference.)

    Arguments and errors are those of `dpo_loss`.

    Source: Liu et al. 2023 (RSO), arXiv 2309.06657.
    """
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return jax.nn.relu(1 - beta * margin)


def hinge_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `hinge_loss`: −β 1[βΔ < 1] · (1, −1, −1, 1)."""
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return of_margin(margin, -beta * (1 - beta * margin > 0).astype(margin.dtype))


def exo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Float[Array, "..."]:
    """Exact optimisation on pairs: the reverse divergence of the policy's preference from the smoothed label.

        L = σ(βΔ) (log σ(βΔ) − log(1 − ε)) + σ(−βΔ) (log σ(−βΔ) − log ε)          (eq. 16)

    It is 0 at its least, βΔ = log((1 − ε)/ε), and at most −log min(ε, 1 − ε); far below it is flat, and its gradient
    vanishes.

    Args:
        the log-probabilities, beta: as in `dpo_loss`.
        label_smoothing: ε, which must not be 0.

    Raises:
        ValueError: as `dpo_loss`, or if ε lies outside (0, 1).

    Source: Ji et al. 2024.
    """
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    log_chosen, log_rejected = log_of_label(label_smoothing)
    return p_log_ratio(beta * margin, log_chosen) + p_log_ratio(-beta * margin, log_rejected)


def exo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `exo_loss`: β σ(βΔ) σ(−βΔ) (βΔ − log((1 − ε)/ε)) · (1, −1, −1, 1)."""
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    log_chosen, log_rejected = log_of_label(label_smoothing)
    x = beta * margin
    return of_margin(margin, beta * bell(x) * (x - (log_chosen - log_rejected)))


def discopop_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    temperature: float = 0.05,
) -> Float[Array, "..."]:
    """The log-ratio-modulated loss that a search by a language model found: logistic below 0, exponential above.

        L = −(1 − m) log σ(x) + m e^{−x},   x = βΔ, m = σ(x/τ)          (eq. 5)

    At Δ = 0 it is ½ log 2 + ½. It is not monotone: as x passes 0 it climbs from a local minimum to a local maximum,
    from 0.786 (x = −0.12) to 0.878 (x = 0.07) at the default τ, and from log 2 to 1 as τ → 0. m e^{−x} is held at e^80
    (float64: e^700), which only τ > 1 can reach.

    Args:
        the log-probabilities, beta: as in `dpo_loss`.
        temperature: τ, over how much of x the one form passes into the other.

    Raises:
        ValueError: as `dpo_loss`, or if τ ≤ 0.

    Source: Lu et al. 2024.
    """
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    check_range(0, open_low=True, temperature=temperature)
    x = beta * margin
    return -jax.nn.sigmoid(-x / temperature) * jax.nn.log_sigmoid(x) + modulated_exp(x, temperature)


def discopop_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    temperature: float = 0.05,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `discopop_loss`.

    β (−(1 − m) σ(−x) + m (1 − m) log σ(x)/τ + m e^{−x} ((1 − m)/τ − 1)) · (1, −1, −1, 1)
    """
    margin = margin_of(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    check_range(0, open_low=True, temperature=temperature)
    x = beta * margin
    rest = jax.nn.sigmoid(-x / temperature)
    logistic = -rest * jax.nn.sigmoid(-x) + bell(x / temperature) * jax.nn.log_sigmoid(x) / temperature
    return of_margin(margin, beta * (logistic + modulated_exp(x, temperature) * (rest / temperature - 1)))


def f_dpo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Float[Array, "..."]:
    """DPO where an f-divergence other than the reverse KL holds the policy at the reference.

        L = −log σ(β f′(u_w) − β f′(u_l)),   u = π(y)/ref(y)

    with f′(u) = log u (`"reverse_kl"`: DPO), 1 − 1/u (`"forward_kl"`), log(2u/(1 + u)) (`"jensen_shannon"`) or
    (u^{α−1} − 1)/(α − 1) (`"alpha"`: the forward KL at α = 0, the reverse one at α → 1; the paper's α is 1 − α).
    At u_w = u_l it is log 2. Powers of u are held at e^80 (float64: e^700).

    Args:
        the log-probabilities, beta: as in `dpo_loss`.
        divergence: one of the four names; a Python string.
        alpha: α ≥ 0, of `"alpha"` alone.

    Raises:
        ValueError: as `dpo_loss`, or if the divergence is unknown or α is negative.

    Source: Wang et al. 2023.
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    score_chosen, score_rejected = (score(log_u, divergence, alpha) for log_u in (a, b))
    return logistic(beta * log_ratio(score_chosen, score_rejected), 0.0)


def f_dpo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `f_dpo_loss`: −β σ(−x) u f″(u), of u_w for a and minus that of u_l for b.

    u f″(u) is 1 (reverse KL), 1/u (forward KL), 1/(1 + u) (Jensen-Shannon) or u^{α−1} (alpha).
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    margin = score(a, divergence, alpha) - score(b, divergence, alpha)
    slope = jnp.where(jnp.isfinite(margin), beta * logistic_slope(beta * margin, 0.0), 0)
    return of_log_ratios(a, b, slope * score_slope(a, divergence, alpha), -slope * score_slope(b, divergence, alpha))


def length_normalised_dpo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    length_chosen: Int[Array, "..."],
    length_rejected: Int[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Array, "..."]:
    """DPO on log-ratios per token, so that a long response does not win by its length.

        L = −(1 − ε) log σ(x) − ε log σ(−x),   x = β (a/|y_w| − b/|y_l|)

    At the reference it is log 2. It wants a β larger than DPO's, by about the length of a response.

    Args:
        logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta, label_smoothing: as in
            `dpo_loss`: sums, which are divided here.
        length_chosen, length_rejected: how many tokens each sum has, at least 1; constants.

    Raises:
        ValueError: as `dpo_loss`, or if a length has another shape or is below 1. (Under `jit` lengths cannot be read:
            there one below 1 counts as 1.)

    Source: Lambert et al. 2024 (Tülu 3), arXiv 2411.15124; TRL's `sigmoid_norm`.
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    a, b = a / length(length_chosen, a, "length_chosen"), b / length(length_rejected, b, "length_rejected")
    return logistic(beta * log_ratio(a, b), label_smoothing)


def length_normalised_dpo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    length_chosen: Int[Array, "..."],
    length_rejected: Int[Array, "..."],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `length_normalised_dpo_loss`: β (ε − σ(−x)) /|y_w| for a, minus the same /|y_l| for b."""
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    of_chosen = 1 / length(length_chosen, a, "length_chosen")
    of_rejected = 1 / length(length_rejected, b, "length_rejected")
    margin = a * of_chosen - b * of_rejected
    slope = jnp.where(jnp.isfinite(margin), beta * logistic_slope(beta * margin, label_smoothing), 0)
    return of_log_ratios(a, b, slope * of_chosen, -slope * of_rejected)
