"""Estimators of KL(q‖p) between Gaussians of different means: closed forms, quadrature, sampling."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxrl_llm.objectives import kl

ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}


def log_ratios(x: Float[Array, "..."], shift: float | Array) -> dict[str, Float[Array, "..."]]:
    """All three estimators at x, with policy q = N(0, 1) and reference p = N(shift, 1)."""
    logp_policy, logp_ref = (-jnp.square(x - mean) / 2 for mean in (jnp.zeros_like(x), shift))  # constants cancel
    return {name: estimator(logp_policy, logp_ref) for name, estimator in ESTIMATORS.items()}


def raw_moment(name: str, power: int, shift: float) -> float:
    """E_q[k^power], in closed form: log r is Gaussian with mean −μ²/2 and variance μ², and r = e^{log r}."""
    if name == "k1":
        return (-1) ** power * _tilted_moment(0, power, shift)
    if name == "k2":
        return _tilted_moment(0, 2 * power, shift) / 2**power
    total = 0.0  # (r − 1 − log r)^power, multiplied out
    for a in range(power + 1):
        for b in range(power - a + 1):
            c = power - a - b
            ways = math.factorial(power) // (math.factorial(a) * math.factorial(b) * math.factorial(c))
            total += ways * (-1) ** (b + c) * _tilted_moment(a, b, shift)
    return total


def central_moment(name: str, power: int, shift: float) -> float:
    """E_q[(k − E_q[k])^power], in closed form."""
    mean = raw_moment(name, 1, shift)
    return sum(
        math.comb(power, each) * raw_moment(name, each, shift) * (-mean) ** (power - each) for each in range(power + 1)
    )


def closed_form(shift: float) -> dict[str, float]:
    """Schulman's table, and the columns it follows from."""
    divergence = shift**2 / 2
    variances = {"k1": shift**2, "k2": shift**4 / 2 + shift**6 / 4, "k3": math.expm1(shift**2) - shift**2}
    spreads = {f"{name} sd/KL": math.sqrt(variance) / divergence for name, variance in variances.items()}
    return {"k2 bias/KL": shift**4 / 8 / divergence} | spreads


def standard_errors(shift: float, num_samples: int) -> dict[str, float]:
    """Of the table's entries, and of the means, from `num_samples` draws: by closed-form fourth central moments."""
    divergence, errors = shift**2 / 2, {}
    for name in ESTIMATORS:
        variance, fourth = central_moment(name, 2, shift), central_moment(name, 4, shift)
        of_variance = math.sqrt((fourth - variance**2) / num_samples)
        errors[f"{name} sd/KL"] = of_variance / (2 * math.sqrt(variance)) / divergence
        errors[f"{name} mean"] = math.sqrt(variance / num_samples)
    return errors | {"k2 bias/KL": errors["k2 mean"] / divergence}


def from_moments(mean: dict[str, float], square: dict[str, float], shift: float) -> dict[str, float]:
    """The table's entries from first and second moments."""
    divergence = shift**2 / 2
    spreads = {f"{name} sd/KL": math.sqrt(square[name] - mean[name] ** 2) / divergence for name in ESTIMATORS}
    return {"k2 bias/KL": (mean["k2"] - divergence) / divergence} | spreads


def by_quadrature(shift: float, num_points: int = 20_001) -> dict[str, float]:
    """The same from the library's estimators, summed over a fine grid that reaches where r² has its mass."""
    x = np.linspace(-12.0, 12.0 + 2 * shift, num_points)
    weight = np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    values = {name: np.asarray(each) for name, each in log_ratios(jnp.asarray(x), shift).items()}
    mean = {name: float(weight @ each) for name, each in values.items()}
    return from_moments(mean, {name: float(weight @ each**2) for name, each in values.items()}, shift)


@functools.partial(jax.jit, static_argnames=("num_chunks", "chunk_size"))
def sampled(
    key: Key[Array, ""], shifts: Float[Array, "shifts"], scale: float, *, num_chunks: int, chunk_size: int
) -> dict[str, dict[str, Array]]:
    """Sums over each chunk of draws x ~ N(0, 1): k, k² and the smallest k of every estimator and shift.

    "wide" is the reference N(0, scale²) instead: k3 alone.
    """

    def chunk(key):
        x = jax.random.normal(key, (chunk_size,), jnp.float64)
        values = jax.vmap(lambda shift: log_ratios(x, shift))(shifts)
        values["wide"] = kl.k3(-jnp.square(x) / 2, -jnp.square(x / scale) / 2 - jnp.log(scale))[None]
        return {
            name: {"sum": each.sum(-1), "squares": jnp.square(each).sum(-1), "least": each.min(-1)}
            for name, each in values.items()
        } | {"x": {"largest": x.max()}}

    return jax.lax.map(chunk, jax.random.split(key, num_chunks))


def running_sd(sums: dict[str, Array], chunk_size: int, at: np.ndarray) -> np.ndarray:
    """The standard deviation of the first `at` chunks' draws."""
    count = chunk_size * at[:, None]
    total, squares = (np.cumsum(np.asarray(sums[field]), axis=0)[at - 1] for field in ("sum", "squares"))
    return np.sqrt(squares / count - np.square(total / count))


def block_variances(sums: dict[str, Array], chunk_size: int) -> np.ndarray:
    """The variance that each chunk alone would report."""
    return np.asarray(sums["squares"]) / chunk_size - np.square(np.asarray(sums["sum"]) / chunk_size)


def _tilted_moment(tilt: int, power: int, shift: float) -> float:
    """E[r^tilt (log r)^power]: a Gaussian moment about 0 after r^tilt has moved its mean by tilt μ²."""
    mean, sd = (tilt - 0.5) * shift**2, abs(shift)
    moment = sum(
        math.comb(power, even) * mean ** (power - even) * sd**even * math.prod(range(1, even, 2))
        for even in range(0, power + 1, 2)
    )
    return math.exp((tilt**2 - tilt) * shift**2 / 2) * moment
