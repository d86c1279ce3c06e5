"""The trainers that serve a GPT-2, on a model that can be enumerated: do they reach the Gibbs optimum?

π* ∝ π_ref e^{r/β} maximises E[r] − β KL(π‖π_ref); the distance KL(π‖π*) of the policy that is trained is computed over
all sequences at every step. Beside the methods stand the same trainers with one thing wrong.

python -m experiments.exact_alignment --preset quick
"""

from __future__ import annotations

from jaxrl_llm import runtime

runtime.set_up()  # before jax: its compilation cache

import dataclasses  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any, Literal  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger  # noqa: E402
from jaxrl_llm import oracle  # noqa: E402
from jaxrl_llm.decoding.transforms import Temperature  # noqa: E402
from jaxrl_llm.models.heads import ScalarHead  # noqa: E402
from jaxrl_llm.objectives import rlhf  # noqa: E402
from jaxrl_llm.tabular import TabularLM  # noqa: E402
from jaxrl_llm.training import policy, rewards, steps  # noqa: E402
from jaxrl_llm.training.methods import METHODS, Method  # noqa: E402
from jaxrl_llm.training.preference import PairBatch, preference_loss  # noqa: E402
from jaxrl_llm.training.rollout import Prompts, Sampler  # noqa: E402
from jaxrl_llm.training.sequences import Sequences  # noqa: E402

NEAR, FAR = 1e-3, 1e-2  # nats from the optimum: what counts as reached, and what surely does not


@dataclasses.dataclass(frozen=True)
class Config:
    """One table of 27 sequences."""

    vocab_size: int = 3
    horizon: int = 3
    beta: float = 0.5
    seeds: int = 2
    steps: int = 400
    answers: int = 512
    learning_rate: float = 0.05
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(seeds=8, steps=1000)}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A reference, rewards of all sequences, and the law that is best."""

    lm: TabularLM
    reference: Any
    rewards: jax.Array
    optimum: jax.Array
    config: Config

    def distance(self, params: Any) -> jax.Array:
        """KL(π‖π*) of whole sequences, in nats."""
        log_probs = oracle.sequence_log_probs(self.lm, params)
        return (jnp.exp(log_probs) * (log_probs - self.optimum)).sum()

    def optimizer(self, updates: int) -> optax.GradientTransformation:
        """Adam with clipped gradients; the rate falls to 0, so that the noise of sampling dies out."""
        schedule = optax.cosine_decay_schedule(self.config.learning_rate, updates)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def problem(config: Config) -> Problem:
    """Drawn at random, from the seed."""
    lm = TabularLM(config.vocab_size, config.horizon)
    ref_key, reward_key = jax.random.split(jax.random.key(config.seed))
    reference = lm.init(ref_key)
    log_probs = oracle.sequence_log_probs(lm, reference)
    values = jax.random.normal(reward_key, log_probs.shape)
    return Problem(lm, reference, values, rlhf.gibbs_optimum(log_probs, values, beta=config.beta), config)


def online(
    given: Problem,
    method: Method,
    *,
    spoil: Callable[[policy.Online], policy.Online] = lambda trainer: trainer,
    sampler: Sampler | None = None,
) -> Callable[[jax.Array], jax.Array]:
    """A whole run of a policy-gradient method, as a function of its key: the distance before each step, and at last."""
    config, lm = given.config, given.lm
    critic = ScalarHead(lm) if method.has_critic else None
    optimizer = given.optimizer(config.steps * method.epochs * method.minibatches)
    trainer = spoil(policy.online(lm, optimizer, critic=critic))
    places = lm.vocab_size ** jnp.arange(lm.horizon - 1, -1, -1)
    reward = rewards.of_tokens(lambda rows: given.rewards[(rows.tokens * places).sum(axis=1)])
    empty = (config.answers // method.group_size, 0)
    prompts = Prompts(jnp.zeros(empty, jnp.int32), jnp.zeros(empty, bool))

    def trained_policy(state: steps.TrainState) -> Any:
        return state.params["policy"] if method.has_critic else state.params

    def initial(key: jax.Array) -> steps.TrainState:
        params = given.reference
        if method.has_critic:
            params = {"policy": params, "critic": critic.init(key)}
        return steps.initial_state(params, optimizer, key)

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, jax.Array]:
        before = given.distance(trained_policy(state))
        state, _ = trainer.step(
            state,
            prompts,
            reward,
            method=method,
            sampler=sampler or Sampler(lm.horizon),
            frozen={"ref": given.reference},
        )
        return state, before

    return _with_last(
        steps.whole_run(initial, advance, steps=config.steps), lambda s: given.distance(trained_policy(s))
    )


def offline(given: Problem) -> Callable[[jax.Array], jax.Array]:
    """DPO on every pair of sequences, weighted by how often the population would choose so."""
    lm, config = given.lm, given.config
    every = oracle.enumerate_sequences(lm)
    law = oracle.population_preferences(oracle.sequence_log_probs(lm, given.reference), given.rewards)
    first, second = (each.ravel() for each in jnp.indices(law.shape))
    whole = jnp.ones((len(first), lm.horizon), bool)
    chosen, rejected = (Sequences(every[rows], whole, whole) for rows in (first, second))
    batch = PairBatch(chosen, rejected, weight=law.ravel())
    optimizer = given.optimizer(config.steps)
    loss = preference_loss(lm, "dpo", beta=config.beta)

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, jax.Array]:
        before = given.distance(state.params)
        return steps.update(loss, optimizer, state, batch, {"ref": given.reference})[0], before

    run_all = steps.whole_run(
        lambda key: steps.initial_state(given.reference, optimizer, key), advance, steps=config.steps
    )
    return _with_last(run_all, lambda state: given.distance(state.params))


def _with_last(run_all: Callable[..., Any], distance: Callable[..., jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def distances(key: jax.Array) -> jax.Array:
        state, before = run_all(key)
        return jnp.append(before, distance(state))

    return distances


def without_last_token(trainer: policy.Online) -> policy.Online:
    """A mask that leaves out the last token of each answer, as one that takes EOS for padding does."""

    def draw(*args: Any, **knobs: Any) -> Any:
        drawn = trainer.draw(*args, **knobs)
        answer = drawn.sequences.answer.at[:, -1].set(False)
        return drawn._replace(sequences=drawn.sequences._replace(answer=answer))

    return trainer._replace(draw=draw)


def without_ratio(trainer: policy.Online) -> policy.Online:
    """Answers of another law taken for the policy's own."""

    def score(*args: Any) -> Any:
        batch, metrics = trainer.score(*args)
        return batch._replace(logp_sampler=batch.logp_old), metrics

    return trainer._replace(score=score)


def arms(given: Problem) -> dict[str, tuple[bool, Callable[[jax.Array], jax.Array]]]:
    """Name to whether it should arrive, and its run."""
    config = given.config

    def method(name: str, **changes: Any) -> Method:
        return dataclasses.replace(METHODS[name], beta=config.beta, **changes)

    # What PPO's defaults add for large models (λ < 1, means over tokens, whitening) is left out: it has a bias.
    exact = {"whiten": False, "lambda_": 1.0, "mode": "sequence_sum", "epochs": 2, "value_clip": None}
    tempered = Sampler(config.horizon, transform=Temperature(2.0))
    return {
        "REINFORCE": (True, online(given, method("reinforce"))),
        "RLOO": (True, online(given, method("rloo"))),
        "PPO with a critic": (True, online(given, method("ppo", **exact))),
        "GRPO": (True, online(given, method("grpo"))),
        "RLOO, k2 as loss": (True, online(given, method("rloo", kl_loss="reverse"))),
        "DPO on the population": (True, offline(given)),
        "k3 as loss": (False, online(given, method("rloo", kl_loss="forward"))),
        "another law, no ratio": (
            False,
            online(given, method("rloo", kl_loss="reverse"), spoil=without_ratio, sampler=tempered),
        ),
        "mask without the last token": (False, online(given, method("rloo"), spoil=without_last_token)),
    }


def run(config: Config) -> dict[str, Any]:
    """Every arm over all seeds at once."""
    given = problem(config)
    keys = jax.random.split(jax.random.key(config.seed + 1), config.seeds)
    found = {}
    for name, (arrives, distances) in tqdm(arms(given).items(), unit="arm"):
        found[name] = (arrives, np.asarray(jax.jit(jax.vmap(distances))(keys)))
    numbers = []
    for name, (arrives, curves) in found.items():
        worst, best = float(curves[:, -1].max()), float(curves[:, -1].min())
        numbers.append(
            ledger.number(
                f"KL(π‖π*) at the end, {name}",
                worst if arrives else best,
                unit="nats",
                source="the farthest of all seeds" if arrives else "the nearest of all seeds",
                interval=(None, NEAR) if arrives else (FAR, None),
            )
        )
    right = sum(arrives for arrives, _ in found.values())
    return {
        "claim": f"{right} trainers reach the optimum of RLHF to {NEAR:g} nats from the same reference and rewards; "
        "with k3 as a loss, without the importance ratio or with a wrong mask they stop elsewhere.",
        "numbers": numbers,
        "data": ledger.rounded(
            {
                "near": NEAR,
                "curves": [
                    {"name": name, "arrives": arrives, "distance": _thinned(curves)}
                    for name, (arrives, curves) in found.items()
                ],
            }
        ),
    }


def _thinned(curves: np.ndarray, points: int = 120) -> dict[str, Any]:
    """Mean and range over seeds, at about so many steps, dense at the beginning."""
    last = curves.shape[1] - 1
    at = np.unique(np.concatenate([[0], np.geomspace(1, last, points).round()])).astype(int)
    kept = np.maximum(curves[:, at], 1e-9)  # rounding can leave less than nothing
    return {"step": at, "mean": kept.mean(axis=0), "low": kept.min(axis=0), "high": kept.max(axis=0)}


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/exact_alignment.json`."""
    ledger.run_and_write("exact_alignment", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
