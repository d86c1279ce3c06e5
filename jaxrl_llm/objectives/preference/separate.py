"""Losses that push each answer for itself, the chosen and the rejected against a point of reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.numerics import checked, log_ratio
from jaxrl_llm.objectives._margins import bell, kto, log_ratios, of_log_ratios, of_margin


def nca_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """Noise-contrastive alignment: it holds the chosen reward where it should be, so that it does not fall.

        L = −log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb)

    At the reference it is 2 log 2; in a it is least at βa = log 2.

    Arguments and errors are those of `dpo_loss`.

    Source: Chen et al. 2024.
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    chosen = jax.nn.log_sigmoid(beta * a) + jax.nn.log_sigmoid(-beta * a) / 2
    return -chosen - jax.nn.log_sigmoid(-beta * b) / 2


def nca_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `nca_loss`: β (½ σ(βa) − σ(−βa)) for a, ½ β σ(βb) for b."""
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    of_chosen = beta * (jax.nn.sigmoid(beta * a) / 2 - jax.nn.sigmoid(-beta * a))
    return of_log_ratios(a, b, of_chosen, beta * jax.nn.sigmoid(beta * b) / 2)


def bco_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    reward_shift: float | Float[Array, "..."] = 0.0,
) -> Float[Array, "..."]:
    """Binary classifier optimisation: the chosen response above a threshold, the rejected one below it.

        L = −log σ(βa − δ) − log σ(−(βb − δ))

    At the reference, with δ = 0, it is 2 log 2.

    Args:
        the log-probabilities, beta: as in `dpo_loss`.
        reward_shift: δ, in the paper the running mean of the rewards βa and βb, which the caller keeps; no gradient
            flows into it.

    Raises:
        ValueError: as `dpo_loss`.

    Source: Jung et al. 2024.
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    shift = jax.lax.stop_gradient(reward_shift)
    return -jax.nn.log_sigmoid(beta * a - shift) - jax.nn.log_sigmoid(shift - beta * b)


def bco_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
    reward_shift: float | Float[Array, "..."] = 0.0,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `bco_loss`: −β σ(δ − βa) for a, β σ(βb − δ) for b."""
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    of_chosen = -beta * jax.nn.sigmoid(reward_shift - beta * a)
    return of_log_ratios(a, b, of_chosen, beta * jax.nn.sigmoid(beta * b - reward_shift))


def sppo_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """Self-play preference optimisation with hard labels (1 for the winner, 0 for the loser), in nats².

        L = (a − 1/(2β))² + (b + 1/(2β))²

    At the reference it is 1/(2β²).

    Arguments and errors are those of `dpo_loss`.

    Source: Wu et al. 2024.
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return jnp.square(a - 1 / (2 * beta)) + jnp.square(b + 1 / (2 * beta))


def sppo_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `sppo_loss`: 2a − 1/β for a, 2b + 1/β for b."""
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return of_log_ratios(a, b, 2 * (a - 1 / (2 * beta)), 2 * (b + 1 / (2 * beta)))


def apo_zero_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """Anchored preference optimisation, for chosen responses better than the policy's own: up with them.

        L = (1 − σ(βa)) + σ(βb)          (eq. 7, plus 1)

    At the reference it is 1; it lies between 0 and 2.

    Arguments and errors are those of `dpo_loss`.

    Source: D'Oosterlinck et al. 2024.
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return jax.nn.sigmoid(-beta * a) + jax.nn.sigmoid(beta * b)


def apo_zero_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `apo_zero_loss`: −β σ(βa) σ(−βa) for a, β σ(βb) σ(−βb) for b."""
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return of_log_ratios(a, b, -beta * bell(beta * a), beta * bell(beta * b))


def apo_down_loss(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """Anchored preference optimisation, for chosen responses worse than the policy's own: down, the rejected further.

        L = σ(βa) + (1 − σ(βΔ))          (eq. 8, plus 1)

    At the reference it is 1; it lies between 0 and 2.

    Arguments and errors are those of `dpo_loss`.

    Source: D'Oosterlinck et al. 2024.
    """
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    return jax.nn.sigmoid(beta * a) + jax.nn.sigmoid(-beta * log_ratio(a, b))


def apo_down_loss_grad(
    logp_policy_chosen: Float[Array, "..."],
    logp_policy_rejected: Float[Array, "..."],
    logp_ref_chosen: Float[Array, "..."],
    logp_ref_rejected: Float[Array, "..."],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, "..."], ...]:
    """Closed-form gradient of `apo_down_loss`: β (s(βa) − s(βΔ)) for a, β s(βΔ) for b, with s = σ(·) σ(−·)."""
    a, b = log_ratios(logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected, beta)
    of_margin = jnp.where(jnp.isfinite(a - b), beta * bell(beta * (a - b)), 0)
    return of_log_ratios(a, b, beta * bell(beta * a) - of_margin, of_margin)


def kto_loss(
    logp_policy: Float[Array, "..."],
    logp_ref: Float[Array, "..."],
    desirable: Bool[Array, "..."],
    kl: float | Float[Array, "..."],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "..."]:
    """Kahneman-Tversky optimisation: answers that are each good or bad, against a reference point; no pairs.

        L = λ_D (1 − σ(β (a − z))) if desirable, λ_U (1 − σ(β (z − a))) if not,   z = max(0, kl)

    with a = log π(y) − log ref(y). At a = z it is λ/2.

    Args:
        logp_policy, logp_ref: log-probabilities of the responses, summed over their tokens, in nats.
        desirable: which answers are good.
        kl: the reference point, one number or one per answer; a constant, in the paper an estimate of KL(π‖ref) from
            mismatched pairs: see `kto_reference_point`.
        beta: as in `dpo_loss`.
        desirable_weight, undesirable_weight: λ_D and λ_U, to make up for unequal numbers of good and bad answers.

    Raises:
        ValueError: as `dpo_loss`, if `desirable` is not boolean, if it or `kl` does not match, or a weight is negative.

    Source: Ethayarajh et al. 2024.
    """
    _, x, weight, _ = kto(logp_policy, logp_ref, desirable, kl, beta, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-x)


def kto_loss_grad(
    logp_policy: Float[Array, "..."],
    logp_ref: Float[Array, "..."],
    desirable: Bool[Array, "..."],
    kl: float | Float[Array, "..."],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Closed-form gradient of `kto_loss`: ∓λ β σ(x) σ(−x) · (1, −1), x = β (a − z), − for the desirable."""
    a, x, weight, sign = kto(logp_policy, logp_ref, desirable, kl, beta, desirable_weight, undesirable_weight)
    return of_margin(a, -sign * weight * beta * bell(x))[:2]


def kto_reference_point(
    logp_policy_mismatched: Float[Array, "batch"], logp_ref_mismatched: Float[Array, "batch"]
) -> Float[Array, ""]:
    """The reference point of `kto_loss`, from answers that belong to other prompts; no gradient flows through it.

        z = max(0, mean of log π(y′ | x) − log ref(y′ | x))

    Usually y′ are the batch's own answers, moved on by one prompt. It takes at least two different prompts: with one,
    y′ is the answer itself, z is its own a, and β (a − z) is 0 whatever the policy does.

    Args:
        logp_policy_mismatched, logp_ref_mismatched: log-probabilities of the mismatched responses, summed over their
            tokens, in nats.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, or there are fewer than two answers.

    Source: Ethayarajh et al. 2024.
    """
    logp_policy, logp_ref = checked(
        logp_policy_mismatched=logp_policy_mismatched, logp_ref_mismatched=logp_ref_mismatched
    )
    if logp_policy.size < 2:
        raise ValueError(f"logp_policy_mismatched must hold at least 2 answers, but holds {logp_policy.size}.")
    return jax.lax.stop_gradient(jnp.maximum(log_ratio(logp_policy, logp_ref).mean(), 0))
