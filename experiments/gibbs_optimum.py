"""The optimum of RLHF: max E_π[r] − β KL(π‖ref) is solved by π* ∝ ref · e^{r/β}, in closed form and by ascent.

python -m experiments.gibbs_optimum --preset quick
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import ledger
from experiments.frame import experiment
from jaxrl_llm import oracle
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.tabular import TabularLM


@dataclasses.dataclass(frozen=True)
class Config:
    """One model of 81 sequences, random rewards."""

    vocab_size: int = 3
    horizon: int = 4
    beta: float = 0.5  # the price of a nat, in units of the reward
    policies: int = 60  # number of random policies, at which J* − J is compared with β KL
    steps: int = 500  # number of L-BFGS steps
    betas: int = 41  # points of the curve of optima
    seed: int = 0


@experiment(quick=Config(), full=Config(policies=400), seeds=5)
def run(config: Config) -> dict[str, Any]:
    """Compute everything in float64, on one random problem."""
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
        "claim": "RLHF's objective J has its optimum in closed form, π* ∝ ref · exp(r/β): every policy falls short of "
        "it by β KL(π‖π*), an identity, and gradient ascent on J from the reference ends there.",
        "numbers": numbers(best, log_z, gaps, climb, config),
        "data": {"best": best, "beta": config.beta, "gaps": gaps, "ascent": climb, "family": family},
    }


def identity(ref: jax.Array, rewards: jax.Array, config: Config, key: jax.Array) -> list[dict[str, float]]:
    """Compute J* − J(π) and β KL(π‖π*) of random policies, from near the optimum to far from it."""
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
    """Compute J* − J while L-BFGS climbs J from the reference, with the closed-form gradient of J."""
    best = rlhf.optimal_value(ref, rewards, beta=config.beta)
    optimiser = optax.lbfgs()

    def loss(params: Any) -> jax.Array:
        return -oracle.objective(lm, params, ref_params, rewards, beta=config.beta)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        gradient = jax.tree.map(jnp.negative, oracle.objective_grad(lm, params, ref_params, rewards, beta=config.beta))
        value = loss(params)
        updates, state = optimiser.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(params, updates), state), best + value

    start = (ref_params, optimiser.init(ref_params))
    _, gap = jax.jit(lambda start: jax.lax.scan(step, start, length=config.steps + 1))(start)
    return {"gap": np.asarray(gap).tolist()}


def sweep(ref: jax.Array, rewards: jax.Array, config: Config) -> dict[str, list[float]]:
    """Compute the mean reward of π* and KL(π*‖ref), over β."""

    def at(beta: jax.Array) -> dict[str, jax.Array]:
        optimum = rlhf.gibbs_optimum(ref, rewards, beta=beta)
        probs = jnp.exp(optimum)
        return {"beta": beta, "reward": (probs * rewards).sum(), "kl": (probs * (optimum - ref)).sum()}

    curves = jax.jit(jax.vmap(at))(jnp.geomspace(0.02, 20, config.betas))
    limits = {"largest_reward": float(rewards.max()), "ref_reward": float((jnp.exp(ref) * rewards).sum())}
    return {name: np.asarray(values).tolist() for name, values in curves.items()} | limits


def numbers(
    best: float, log_z: float, gaps: list[dict[str, float]], climb: dict[str, list[float]], config: Config
) -> list[dict[str, Any]]:
    """Return the closed form as identities, and a test that ascent, which does not know it, ends there."""
    return [
        ledger.identity(
            "J*", best, expected=log_z, tolerance=1e-12, unit="reward", source="β log Z; Rafailov et al. 2023, eq. 4"
        ),
        ledger.identity(
            "largest |J* − J(π) − β KL(π‖π*)|",
            max(abs(each["gap"] - each["beta_kl"]) for each in gaps),
            tolerance=1e-12,
            unit=f"reward, over {len(gaps)} random policies",
            source=f"exact sums over {config.vocab_size**config.horizon} sequences",
        ),
        ledger.test(
            "share of J* − J(ref) that the ascent leaves",
            climb["gap"][-1] / climb["gap"][0],
            at_most=1e-4,
            wrong=0.01,
            unit="1",
            source=f"L-BFGS from the reference, {config.steps} steps; J is not concave in the logits",
        ),
    ]
