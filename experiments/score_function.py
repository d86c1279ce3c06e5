"""The gradient of an expected reward: none through the samples, all of it through the score function.

    python -m experiments.score_function --preset quick

The truth is autodiff of the exact J(π) = Σ_y π(y) r(y) of a tabular model, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments import ledger
from experiments.frame import experiment
from jaxrl_llm import decoding, oracle
from jaxrl_llm.objectives.policy_gradient import reinforce_loss
from jaxrl_llm.tabular import TabularLM

LM = TabularLM(vocab_size=3, horizon=4)
SOURCE = "Williams 1992: ∇E_π[r] = E_π[r ∇log π]"


@dataclasses.dataclass(frozen=True)
class Config:
    """Batch sizes 2^first to 2^last, each drawn anew many times; and one batch of generated sequences."""

    first_power: int = 4
    last_power: int = 16
    repeats: int = 200  # batches of each size
    generated: int = 4096  # sequences of the one batch
    seed: int = 0


@experiment(quick=Config(), full=Config(repeats=2_000), seeds=5)
def run(config: Config) -> dict[str, Any]:
    """Compute three gradients of one expected reward, then the error of the sampled one."""
    params_key, reward_key, sample_key, generate_key = jax.random.split(jax.random.key(config.seed), 4)
    with jax.enable_x64(True):
        params = {"logits": jax.random.normal(params_key, (LM.num_prefixes, LM.vocab_size), jnp.float64)}
        rewards = jax.random.normal(reward_key, (LM.vocab_size**LM.horizon,), jnp.float64)
        exact = jax.jit(jax.grad(expected_reward))(params, rewards)["logits"]
        moments = jax.jit(score_function)(params, rewards)
        through_samples, batch = from_generated(config, params, rewards, generate_key)
        total_variance = float(moments.total_variance)
        probs = jnp.exp(oracle.sequence_log_probs(LM, params))
        curve = error_curve(config, probs, score_gradients(params, rewards), exact, sample_key)
        scale = float(jnp.linalg.norm(exact))
        numbers = gradient_numbers(through_samples, -moments.mean["logits"], exact)
        squared_error = float(jnp.square(batch - exact).sum()) / (total_variance / config.generated)
        numbers += sample_numbers(config, curve, squared_error)
    gradients = {"exact": exact, "through the samples": through_samples, "one batch": batch}
    described = {name: np.ravel(value) for name, value in gradients.items()}
    predicted = [math.sqrt(total_variance / n) / scale for n in curve["n"]]
    return {
        "claim": "Differentiating the rewards of samples gives exactly 0; the score function gives the true gradient, "
        "and from n samples its error falls as 1/√n.",
        "numbers": numbers,
        "data": {"gradients": described, "generated": config.generated, "curve": curve | {"predicted": predicted}},
    }


def expected_reward(params: Any, rewards: Float[Array, "sequences"]) -> Float[Array, ""]:
    """Return J(π), exactly."""
    return oracle.expectation(LM, params, lambda sequences: rewards)


def score_function(params: Any, rewards: Float[Array, "sequences"]) -> oracle.Moments:
    """Compute mean and variance of the gradient of REINFORCE's loss on one sequence."""

    def loss(params, groups):
        return reinforce_loss(oracle.sequence_log_probs(LM, params), rewards)[groups[:, 0]]

    return oracle.gradient_moments(LM, params, loss)


def from_generated(
    config: Config, params: Any, rewards: Float[Array, "sequences"], key: Key[Array, ""]
) -> tuple[Float[Array, "prefixes vocab"], Float[Array, "prefixes vocab"]]:
    """Differentiate the mean reward of generated sequences, and REINFORCE's loss on them, with the sign of J."""
    prompts = jnp.zeros((config.generated, 0), jnp.int32)

    def generated(params):
        return decoding.generate(LM, params, prompts, max_new_tokens=LM.horizon, key=key).tokens

    def sampled_reward(params):
        return rewards[sequence_index(generated(params))].mean()

    def loss(params, tokens):
        log_probs = oracle.token_log_probs_of(LM, params, tokens).sum(axis=1)
        return reinforce_loss(log_probs, rewards[sequence_index(tokens)]).mean()

    return (
        jax.jit(jax.grad(sampled_reward))(params)["logits"],
        -jax.jit(jax.grad(loss))(params, generated(params))["logits"],
    )


def sequence_index(tokens: Array) -> Array:
    """Return the row of a sequence in `oracle.enumerate_sequences`."""
    return tokens @ (LM.vocab_size ** jnp.arange(LM.horizon - 1, -1, -1))


def score_gradients(params: Any, rewards: Array) -> Float[Array, "sequences parameters"]:
    """Return r ∇log π of every sequence: minus the gradient of REINFORCE's loss."""
    gradients = jax.jacrev(lambda each: reinforce_loss(oracle.sequence_log_probs(LM, each), rewards))(params)["logits"]
    return -gradients.reshape(len(rewards), -1)


def error_curve(
    config: Config, probs: Array, per_sequence: Array, exact: Array, key: Key[Array, ""]
) -> dict[str, list[float]]:
    """Compute error and cosine of the estimate from n draws over all sequences, for every n."""
    powers = range(config.first_power, config.last_power + 1)
    curve = {field: [] for field in ("n", "error", "standard error", "cosine", "cosine low", "cosine high")}
    for power, each in zip(powers, jax.random.split(key, len(powers)), strict=True):
        squares, cosines = estimates(each, probs, per_sequence, exact.ravel(), 2**power, config.repeats)
        mean = float(squares.mean())
        error = math.sqrt(mean)
        of_mean = float(squares.std(ddof=1)) / math.sqrt(config.repeats)
        low, middle, high = (float(jnp.quantile(cosines, level)) for level in (0.05, 0.5, 0.95))
        row = (2**power, error, of_mean / (2 * error), middle, low, high)
        for field, value in zip(curve, row, strict=True):
            curve[field].append(value)
    return curve


@functools.partial(jax.jit, static_argnames=("repeats",))
def estimates(
    key: Key[Array, ""], probs: Array, per_sequence: Array, exact: Array, num_samples: int, repeats: int
) -> tuple[Array, Array]:
    """Return relative squared errors of independent batches, and cosines with the exact gradient."""
    counts = jax.random.multinomial(key, num_samples, probs, shape=(repeats, len(probs)), dtype=jnp.float64)
    found = counts @ per_sequence / num_samples
    length = jnp.linalg.norm(exact)
    cosines = found @ exact / (jnp.linalg.norm(found, axis=1) * length)
    return jnp.square(found - exact).sum(axis=1) / length**2, cosines


def gradient_numbers(through_samples: Array, score: Array, exact: Array) -> list[dict[str, Any]]:
    """Compare the two gradients with the true one."""
    return [
        ledger.identity(
            "largest entry of the gradient through the samples",
            float(jnp.abs(through_samples).max()),
            tolerance=0.0,
            unit="reward per nat",
            source="jax.grad of the mean reward of decoding.generate's sequences",
        ),
        ledger.identity(
            "E[r ∇log π] − ∇J, largest entry",
            float(jnp.abs(score - exact).max()),
            tolerance=1e-10,
            unit="reward per nat",
            source=f"{SOURCE}; against jax.grad of the exact J",
        ),
    ]


def sample_numbers(config: Config, curve: dict[str, list[float]], squared_error: float) -> list[dict[str, Any]]:
    """Test the error of draws over n, and that of one batch from the library's own generation loop.

    The squared error of a batch over its expectation is a mean of squared normals, weighted by the eigenvalues of the
    covariance: as wide as χ²₈/8, which exceeds 4 with a probability of 10⁻⁴.
    """
    x, y = np.log(curve["n"]), np.log(curve["error"])
    weight = np.divide(curve["error"], curve["standard error"])
    return [
        ledger.test(
            "slope of log error against log n",
            float(np.polyfit(x, y, 1, w=weight)[0]),
            expected=-0.5,
            tolerance=0.02,
            wrong=-1.0,
            unit="1",
            source=f"the variance of a mean; weighted fit, {config.repeats} batches of each size",
        ),
        ledger.test(
            "squared error of a batch of generated sequences, over its expectation",
            squared_error,
            at_most=4.0,
            wrong=20.0,
            unit="1",
            source=f"the exact total variance over n = {config.generated}; larger if the mean is not ∇J",
        ),
    ]
