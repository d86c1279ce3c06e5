"""DPO is the reward model's loss with β log(π/ref) for the reward: fitted on preferences, it finds RLHF's optimum.

python -m experiments.dpo_equivalence --preset quick
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts.newton import minimum  # noqa: E402
from jaxrl_llm import oracle  # noqa: E402
from jaxrl_llm.objectives import preference, reward_model, rlhf  # noqa: E402
from jaxrl_llm.tabular import TabularLM  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """One model of 27 sequences; a population that answers by Bradley-Terry."""

    vocab_size: int = 3
    horizon: int = 3
    beta: float = 0.5
    steps: int = 30
    pairs: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7)
    repeats: int = 16
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(repeats=64)}


def run(config: Config) -> dict[str, Any]:
    """Everything in float64."""
    with jax.enable_x64(True):
        lm = TabularLM(config.vocab_size, config.horizon)
        names = ("reference", "rewards", "samples")
        keys = dict(zip(names, jax.random.split(jax.random.key(config.seed), 3), strict=True))
        ref_params = jax.tree.map(lambda leaf: leaf / 2, lm.init(keys["reference"]))
        ref = oracle.sequence_log_probs(lm, ref_params)
        rewards = jax.random.normal(keys["rewards"], ref.shape)
        population = oracle.population_preferences(ref, rewards)
        fit = newton(lm, ref_params, config)
        final, history = fit(population)
        policy = oracle.sequence_log_probs(lm, final)
        optimum = rlhf.gibbs_optimum(ref, rewards, beta=config.beta)
        floor = -(population * jax.nn.log_sigmoid(rewards[:, None] - rewards)).sum()
        implied = config.beta * (policy - ref)
        data = {
            "beta": config.beta,
            "true_reward": np.asarray(rewards - rewards.mean()).tolist(),
            "implied_reward": np.asarray(implied - implied.mean()).tolist(),
            "loss": np.asarray(history).tolist(),
            "label_entropy": float(floor),
            "samples": from_samples(fit, lm, population, optimum, config, keys["samples"]),
        }
        substitution = jnp.abs(all_pairs(policy, ref, config.beta) - reward_model_pairs(policy, ref, config.beta)).max()
        error = float(jnp.abs(policy - optimum).max())
    return {
        "claim": "DPO on a population's preferences ends at RLHF's own optimum, with no reward model in between: its "
        "implied reward β log(π/ref) is the true reward up to a constant.",
        "numbers": numbers(data, error, float(substitution)),
        "data": data,
    }


def all_pairs(policy: jax.Array, ref: jax.Array, beta: float) -> jax.Array:
    """The DPO loss of every pair [chosen, rejected] of sequences."""
    chosen, rejected = (
        jnp.broadcast_to(policy[:, None], (policy.size,) * 2),
        jnp.broadcast_to(policy, (policy.size,) * 2),
    )
    ref_chosen, ref_rejected = (jnp.broadcast_to(ref[:, None], chosen.shape), jnp.broadcast_to(ref, chosen.shape))
    return preference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)


def reward_model_pairs(policy: jax.Array, ref: jax.Array, beta: float) -> jax.Array:
    """The reward model's loss of every pair, with β log(π/ref) put in for the score."""
    score = beta * (policy - ref)
    shape = (score.size, score.size)
    return reward_model.pairwise_loss(jnp.broadcast_to(score[:, None], shape), jnp.broadcast_to(score, shape))


def newton(lm: TabularLM, ref_params: Any, config: Config) -> Callable[[jax.Array], tuple[Any, jax.Array]]:
    """A function from the law of labelled pairs to the parameters that minimise DPO on it, and the loss on the way."""
    ref = oracle.sequence_log_probs(lm, ref_params)

    def fit(population: jax.Array) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            policy = oracle.sequence_log_probs(lm, params)
            return (population * all_pairs(policy, ref, config.beta)).sum()

        return minimum(loss, ref_params, steps=config.steps)

    return jax.jit(fit)


def from_samples(
    fit: Callable[..., Any], lm: TabularLM, population: jax.Array, optimum: jax.Array, config: Config, key: jax.Array
) -> list[dict[str, Any]]:
    """KL(π*‖π) of DPO fitted on finitely many labelled pairs."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    probabilities = np.asarray(population).reshape(-1)
    rows = []
    for pairs in tqdm(config.pairs, unit="size"):
        kls = []
        for _ in range(config.repeats):
            counts = rng.multinomial(pairs, probabilities / probabilities.sum()).reshape(population.shape)
            params, _ = fit(jnp.asarray(counts / pairs))
            policy = oracle.sequence_log_probs(lm, params)
            kls.append(float((jnp.exp(optimum) * (optimum - policy)).sum()))
        rows.append({"pairs": pairs, "kl": kls})
    return rows


def numbers(data: dict[str, Any], error: float, substitution: float) -> list[dict[str, Any]]:
    """What would prove the claim wrong."""
    implied = max(abs(a - b) for a, b in zip(data["true_reward"], data["implied_reward"], strict=True))
    sizes = np.log([row["pairs"] for row in data["samples"][1:]])
    logs = np.asarray([np.log(row["kl"]) for row in data["samples"][1:]])  # [size, repeat]
    slopes = ((sizes - sizes.mean()) @ logs) / np.square(sizes - sizes.mean()).sum()
    spread = float(slopes.std(ddof=1) / np.sqrt(len(slopes)))
    return [
        ledger.number(
            "DPO loss at the reference",
            data["loss"][0],
            expected=float(np.log(2)),
            tolerance=1e-12,
            unit="nats",
            source="log 2",
        ),
        ledger.number(
            "DPO loss at the end",
            data["loss"][-1],
            expected=data["label_entropy"],
            tolerance=1e-10,
            unit="nats",
            source="the entropy of the population's labels: no model can do better",
        ),
        ledger.number(
            "largest |log π − log π*|",
            error,
            expected=0.0,
            tolerance=1e-5,
            unit="nats, over 27 sequences",
            source="rlhf.gibbs_optimum; Rafailov et al. 2023, eq. 4",
        ),
        ledger.number(
            "largest |implied − true reward|, centred",
            implied,
            expected=0.0,
            tolerance=1e-5,
            unit="reward",
            source="exact",
        ),
        ledger.number(
            "largest |DPO loss − reward-model loss at β log(π/ref)|",
            substitution,
            expected=0.0,
            tolerance=1e-12,
            unit="nats, over all pairs",
            source="Rafailov et al. 2023, eqs. 5 to 7",
        ),
        ledger.number(
            "slope of log KL(π*‖π) against log pairs",
            float(slopes.mean()),
            expected=-1.0,
            tolerance=max(4 * spread, 1e-6),
            unit=f"± {spread:.2g}",
            source="maximum likelihood: KL falls as 1/pairs; from 10⁴ pairs on",
        ),
    ]


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/dpo_equivalence.json`."""
    ledger.run_and_write("dpo_equivalence", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
