"""Arithmetic of the preference losses: log-ratios and margins, checked, and derivatives back from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.numerics import (
    bounded_exp,
    check_range,
    checked,
    exp_minus_one,
    finite_gradient,
    log_ratio,
    violated,
)


def log_ratios(policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float):
    """The pair a and b, checked."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = checked(
        logp_policy_chosen=policy_chosen,
        logp_policy_rejected=policy_rejected,
        logp_ref_chosen=ref_chosen,
        logp_ref_rejected=ref_rejected,
    )
    check_range(0, open_low=True, beta=beta)
    return log_ratio(policy_chosen, ref_chosen), log_ratio(policy_rejected, ref_rejected)


def margin_of(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float
) -> Array:
    """Δ = a − b, checked."""
    return log_ratio(*log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta))


def difference(chosen: Array, rejected: Array, beta: float) -> Array:
    """The difference w − l of a loss without reference, checked."""
    chosen, rejected = checked(logp_policy_chosen=chosen, logp_policy_rejected=rejected)
    check_range(0, open_low=True, beta=beta)
    return log_ratio(chosen, rejected)


def of_log_ratios(a: Array, b: Array, of_chosen: Array, of_rejected: Array) -> tuple[Array, Array, Array, Array]:
    """The four derivatives from those for a and b; as in `log_ratio` none flows through what is not finite."""
    of_chosen, of_rejected = jnp.where(jnp.isfinite(a), of_chosen, 0), jnp.where(jnp.isfinite(b), of_rejected, 0)
    return of_chosen, of_rejected, -of_chosen, -of_rejected


def of_margin(margin: Array, slope: Array) -> tuple[Array, Array, Array, Array]:
    """The four derivatives from that for the margin."""
    return of_log_ratios(margin, margin, slope, -slope)


def logistic(x: Array, label_smoothing: float) -> Array:
    """−(1 − ε) log σ(x) − ε log σ(−x)."""
    check_range(0, 1, label_smoothing=label_smoothing)
    kept, flipped = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    return times(1 - label_smoothing, kept) + times(label_smoothing, flipped)


def logistic_slope(x: Array, label_smoothing: float) -> Array:
    """Of `logistic`: ε − σ(−x)."""
    check_range(0, 1, label_smoothing=label_smoothing)
    return label_smoothing - jax.nn.sigmoid(-x)


def times(weight: float, value: Array) -> Array:
    """weight · value, and 0 where the weight is 0, also if the value is infinite."""
    return jnp.where(jnp.asarray(weight) == 0, 0, weight * value)


def bell(x: Array) -> Array:
    """σ(x) σ(−x), the slope of σ."""
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def log_of_label(label_smoothing: float) -> tuple[Array, Array]:
    """log(1 − ε) and log ε."""
    check_range(0, 1, open_low=True, open_high=True, label_smoothing=label_smoothing)
    return jnp.log1p(-jnp.asarray(label_smoothing)), jnp.log(label_smoothing)


def p_log_ratio(x: Array, log_q: Array) -> Array:
    """σ(x) (log σ(x) − log q), 0 where σ(x) is."""
    p = jax.nn.sigmoid(x)
    return p * jnp.where(p > 0, jax.nn.log_sigmoid(x) - log_q, 0)


def modulated_exp(x: Array, temperature: float) -> Array:
    """σ(x/τ) e^{−x}, whose first factor may underflow where the second overflows; 0 at infinite x."""
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, 0)
    return jnp.where(finite, bounded_exp(jax.nn.log_sigmoid(x / temperature) - x), 0)


def score(log_u: Array, divergence: str, alpha: float) -> Array:
    """f′(u)."""
    power = power_of(divergence, alpha)
    if divergence == "jensen_shannon":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_u)
    straight = jnp.asarray(power) == 0  # the limit is log u
    return jnp.where(straight, log_u, exp_minus_one(power * log_u) / jnp.where(straight, 1, power))


def score_slope(log_u: Array, divergence: str, alpha: float) -> Array:
    """u f″(u), the derivative of `score` for log u."""
    power = power_of(divergence, alpha)
    return jax.nn.sigmoid(-log_u) if divergence == "jensen_shannon" else bounded_exp(power * log_u)


def power_of(divergence: str, alpha: float) -> float:
    """c of f′(u) = (u^c − 1)/c, the form that all divergences but the Jensen-Shannon one have."""
    check_range(0, jnp.inf, open_high=True, alpha=alpha)
    powers = {"reverse_kl": 0.0, "forward_kl": -1.0, "jensen_shannon": 0.0, "alpha": alpha - 1}
    if divergence not in powers:
        raise ValueError(f"divergence must be one of {', '.join(powers)}, but is {divergence!r}.")
    return powers[divergence]


def length(length: Array, like: Array, name: str) -> Array:
    """A number of tokens, checked, of the dtype of the log-probabilities."""
    length = jnp.asarray(length)
    if length.shape != like.shape:
        wanted, found = list(like.shape), list(length.shape)
        raise ValueError(f"{name} must have the shape of logp_policy_chosen, {wanted}, but has {found}.")
    if violated(length >= 1):
        raise ValueError(f"{name} must be at least 1, but one is {length.min()}.")
    return jax.lax.stop_gradient(jnp.maximum(length, 1).astype(like.dtype))


def odds(chosen: Array, rejected: Array, beta: float, nll_weight: float) -> tuple[Array, Array, Array]:
    """Both log-probabilities, checked and with a finite gradient, and the log odds ratio."""
    chosen, rejected = checked(logp_policy_chosen=chosen, logp_policy_rejected=rejected)
    check_range(0, open_low=True, beta=beta)
    check_range(0, nll_weight=nll_weight)
    if violated((jnp.maximum(chosen, rejected) <= 0) | jnp.isnan(chosen + rejected)):
        raise ValueError("log-probabilities must not be positive: orpo takes averages over tokens, in nats.")
    chosen, rejected = finite_gradient(chosen), finite_gradient(rejected)
    return chosen, rejected, log_ratio(log_odds(chosen), log_odds(rejected))


def log_odds(x: Array) -> Array:
    """x − log(1 − e^x) without cancellation; the derivative does not fall to 0 where x is held below 0."""
    highest = -jnp.finfo(x.dtype).eps / 2
    x = jnp.where(x < highest, x, highest + (x - jax.lax.stop_gradient(x)))
    near = x > -0.7
    of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -0.7)))
    return x - jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -0.7, x))))


def log_odds_slope(x: Array) -> Array:
    """1/(1 − e^x)."""
    return -1 / jnp.expm1(jnp.minimum(x, -jnp.finfo(x.dtype).eps / 2))


def kto(logp_policy, logp_ref, desirable, kl, beta, desirable_weight, undesirable_weight):
    """The log-ratio a; ±β (a − z), + for the desirable; the weight of each answer; and that sign."""
    logp_policy, logp_ref = checked(logp_policy=logp_policy, logp_ref=logp_ref)
    check_range(0, open_low=True, beta=beta)
    check_range(0, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    desirable, kl = jnp.asarray(desirable), jnp.asarray(kl, logp_policy.dtype)
    if desirable.dtype != bool or desirable.shape != logp_policy.shape:
        wanted, found = f"bool{list(logp_policy.shape)}", f"{desirable.dtype}{list(desirable.shape)}"
        raise ValueError(f"desirable must be boolean and of the shape of logp_policy, {wanted}, but is {found}.")
    if kl.shape not in ((), logp_policy.shape):
        raise ValueError(f"kl must be a number or have the shape {list(logp_policy.shape)}, but has {list(kl.shape)}.")
    a = log_ratio(logp_policy, logp_ref)
    sign = jnp.where(desirable, 1, -1).astype(a.dtype)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight).astype(a.dtype)
    return a, sign * beta * (a - jax.lax.stop_gradient(jnp.maximum(kl, 0))), weight, sign
