"""max E_π[r] − β KL(π‖ref) is solved by π* ∝ ref · e^{r/β}: in closed form, and by climbing there.

python -m experiments.gibbs_optimum --preset quick
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from jaxrl_llm import oracle  # noqa: E402
from jaxrl_llm.objectives import rlhf  # noqa: E402
from jaxrl_llm.tabular import TabularLM  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """One model of 81 sequences, random rewards."""

    vocab_size: int = 3
    horizon: int = 4
    beta: float = 0.5
    policies: int = 60  # random ones, at which J* − J is held against β KL
    steps: int = 500
    betas: int = 41
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(policies=400)}


def run(config: Config) -> dict[str, Any]:
    """Everything in float64."""
    with jax.enable_x64(True):
        lm = TabularLM(config.vocab_size, config.horizon)
        keys = dict(
            zip(("reference", "rewards", "policies"), jax.random.split(jax.random.key(config.seed), 3), strict=True)
        )
        ref_params = lm.init(keys["reference"])
        rewards = jax.random.normal(keys["rewards"], (config.vocab_size**config.horizon,))
        ref = oracle.sequence_log_probs(lm, ref_params)
        gaps = identity(ref, rewards, config, keys["policies"])
        climb = ascent(lm, ref_params, ref, rewards, config)
        family = sweep(ref, rewards, config)
        best = float(rlhf.optimal_value(ref, rewards, beta=config.beta))
        log_z = float(config.beta * jnp.log((jnp.exp(ref) * jnp.exp(rewards / config.beta)).sum()))
    return {
        "claim": "The policy that RLHF looks for has a closed form, π* ∝ ref · exp(r/β): every other falls short of "
        "it by exactly β KL(π‖π*), and gradient ascent on J ends there.",
        "numbers": numbers(best, log_z, gaps, climb, config),
        "data": {"best": best, "beta": config.beta, "gaps": gaps, "ascent": climb, "family": family},
    }


def identity(ref: jax.Array, rewards: jax.Array, config: Config, key: jax.Array) -> list[dict[str, float]]:
    """J* − J(π) and β KL(π‖π*) of random policies, from near the optimum to far from it."""
    optimum = rlhf.gibbs_optimum(ref, rewards, beta=config.beta)
    best = rlhf.optimal_value(ref, rewards, beta=config.beta)

    @jax.jit
    @jax.vmap
    def both(key: jax.Array, spread: jax.Array) -> tuple[jax.Array, jax.Array]:
        policy = jax.nn.log_softmax(optimum + spread * jax.random.normal(key, optimum.shape))
        gap = best - rlhf.regularised_objective(policy, ref, rewards, beta=config.beta)
        return gap, config.beta * (jnp.exp(policy) * (policy - optimum)).sum()

    keys, spreads = jax.random.split(key, config.policies), jnp.geomspace(0.03, 6, config.policies)
    return [{"gap": float(gap), "beta_kl": float(kl)} for gap, kl in zip(*both(keys, spreads), strict=True)]


def ascent(
    lm: TabularLM, ref_params: Any, ref: jax.Array, rewards: jax.Array, config: Config
) -> dict[str, list[float]]:
    """J* − J and KL(π‖π*) while L-BFGS climbs J from the reference, with the closed-form gradient of J."""
    optimum = rlhf.gibbs_optimum(ref, rewards, beta=config.beta)
    best = rlhf.optimal_value(ref, rewards, beta=config.beta)
    optimiser = optax.lbfgs()

    def loss(params: Any) -> jax.Array:
        return -oracle.objective(lm, params, ref_params, rewards, beta=config.beta)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array]]:
        params, state = carry
        gradient = jax.tree.map(jnp.negative, oracle.objective_grad(lm, params, ref_params, rewards, beta=config.beta))
        value = loss(params)
        policy = oracle.sequence_log_probs(lm, params)
        measured = best + value, (jnp.exp(policy) * (policy - optimum)).sum()
        updates, state = optimiser.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(params, updates), state), measured

    start = (ref_params, optimiser.init(ref_params))
    _, (gap, kl) = jax.jit(lambda start: jax.lax.scan(step, start, length=config.steps))(start)
    return {"gap": np.asarray(gap).tolist(), "kl": np.asarray(kl).tolist()}


def sweep(ref: jax.Array, rewards: jax.Array, config: Config) -> dict[str, list[float]]:
    """Mean reward, KL(π*‖ref) and the probability of the best sequence, over β."""

    def at(beta: jax.Array) -> dict[str, jax.Array]:
        optimum = rlhf.gibbs_optimum(ref, rewards, beta=beta)
        probs = jnp.exp(optimum)
        return {
            "beta": beta,
            "reward": (probs * rewards).sum(),
            "kl": (probs * (optimum - ref)).sum(),
            "best": probs[best],
        }

    best = jnp.argmax(rewards)
    curves = jax.jit(jax.vmap(at))(jnp.geomspace(0.02, 20, config.betas))
    limits = {"largest_reward": float(rewards.max()), "ref_reward": float((jnp.exp(ref) * rewards).sum())}
    return {name: np.asarray(values).tolist() for name, values in curves.items()} | limits


def numbers(
    best: float, log_z: float, gaps: list[dict[str, float]], climb: dict[str, list[float]], config: Config
) -> list[dict[str, Any]]:
    """What would prove the claim wrong."""
    worst = max(abs(each["gap"] - each["beta_kl"]) for each in gaps)
    equation = "Rafailov et al. 2023, eq. 4"
    return [
        ledger.number("J*", best, expected=log_z, tolerance=1e-12, unit="reward", source=f"β log Z; {equation}"),
        ledger.number(
            "largest |J* − J(π) − β KL(π‖π*)|",
            worst,
            expected=0.0,
            tolerance=1e-12,
            unit=f"reward, over {len(gaps)} policies",
            source="exact, 81 sequences",
        ),
        ledger.number("largest J* − J(π) among them", max(each["gap"] for each in gaps), unit="reward", source="exact"),
        ledger.number(
            "J* − J where the ascent ends",
            climb["gap"][-1],
            expected=0.0,
            tolerance=1e-7,
            unit="reward",
            source=f"L-BFGS, {config.steps} steps",
        ),
        ledger.number(
            "KL(π‖π*) where the ascent ends", climb["kl"][-1], expected=0.0, tolerance=2e-7, unit="nats", source="exact"
        ),
        ledger.number(
            "J* − J(ref)", climb["gap"][0], interval=(0.1, None), unit="reward", source="exact: room to climb"
        ),
    ]


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/gibbs_optimum.json`."""
    ledger.run_and_write("gibbs_optimum", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
