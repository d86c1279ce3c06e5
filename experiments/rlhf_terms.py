"""What each term of E[r − β log(π/π_SFT)] + γ E_pretrain[log π] is for: taken away one at a time.

    python -m experiments.rlhf_terms --preset quick

On a tabular model of 81 sequences each optimum is found along the exact gradient, and best-of-n's exact law stands
beside the Gibbs family; then a small GPT-2 is trained by REINFORCE with and without the terms.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts import rlhf_neural as neural  # noqa: E402
from experiments.parts import rlhf_tabular as tabular  # noqa: E402
from jaxrl_llm import oracle  # noqa: E402
from jaxrl_llm.objectives import rlhf  # noqa: E402

PAPER = "Ouyang et al. 2022, eq. 2"


@dataclasses.dataclass(frozen=True)
class Config:
    """The grid of the exact ablation, and the arms of the small GPT-2."""

    betas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
    gammas: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 10.0)
    forgetting: float = 0.5  # how far the SFT model's logits have moved from the pretrained ones
    ascent_steps: int = 4500
    model: str = "tiny-gpt2"
    prompts: tuple[str, ...] = (
        "And the king said",
        "In the morning",
        "There was a man",
        "The people of the city",
        "I have a dream",
        "She looked at him",
        "It was not until",
        "My lord, the queen",
    )
    letter: str = "e"
    samples: int = 4
    new_tokens: int = 16
    arms: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.02, 0.0), (0.0, 5.0))
    draws: tuple[int, ...] = tuple(2**power for power in range(11))
    updates: int = 14
    learning_rate: float = 3e-4
    text_rows: int = 16
    text_tokens: int = 32
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """The exact ablation in float64, then the sampled one."""
    tabular_key, neural_key = jax.random.split(jax.random.key(config.seed))
    with jax.enable_x64(True):
        problem = tabular.instance(tabular_key, forgetting=config.forgetting)
        grid, start = ablation(config, problem)
        curves = tabular.frontier(problem, draws=list(config.draws))
        numbers = [
            *collapse_numbers(config, problem, grid),
            *gibbs_numbers(config, problem, grid),
            *pretraining_numbers(config, grid, start),
            *best_of_n_numbers(config, curves),
        ]
    written = neural.train(config, neural_key)
    shown = ("reward", "kl", "entropy", "best", "pretraining_loss")
    data = {
        "betas": config.betas,
        "gammas": config.gammas,
        "grid": {name: grid[name] for name in shown},
        "start": start,
        "thresholds": thresholds(config, grid, start),
        "frontier": curves,
        "neural": written | {"letter": config.letter, "model": config.model, "new_tokens": config.new_tokens},
    }
    rise = {gamma: grid["pretraining_loss"][:, column] - start for column, gamma in enumerate(config.gammas)}
    enough = min(gamma for gamma in config.gammas if (rise[gamma] <= 0).all())
    return {
        "claim": "On 81 sequences, without β the policy collapses onto the best one; without γ the loss on pretraining "
        f"text rises at every β, by {rise[0.0].min():.2f} nats or more, and with γ of {enough:g} or more not; a "
        f"smaller γ only slows it. {config.model}'s loss on text of its own rises by {_rises(written)} nats per "
        "token.",
        "numbers": [*numbers, *neural_numbers(config, written)],
        "data": rounded(jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, data)),
    }


def _rises(written: dict[str, Any]) -> str:
    parts = []
    for arm in written["arms"]:
        rise = arm["pretraining_loss"][-1] - arm["pretraining_loss"][0]
        parts.append(f"{rise:.2f} (β = {arm['beta']:g}, γ = {arm['gamma']:g})")
    return ", ".join(parts)


def ablation(config: Config, problem: dict[str, Any]) -> tuple[dict[str, np.ndarray], float]:
    """Every optimum's terms, as [β, γ, ...], and the loss on pretraining text before."""
    betas, gammas = (jnp.asarray(axis.ravel()) for axis in np.meshgrid(config.betas, config.gammas, indexing="ij"))
    found = tabular.maximise(problem, betas, gammas, steps=config.ascent_steps)
    shape = (len(config.betas), len(config.gammas))
    grid = {name: np.asarray(value).reshape(*shape, *value.shape[1:]) for name, value in found.items()}
    before = tabular.terms(problem, oracle.sequence_log_probs(tabular.LM, problem["ref"]))
    return grid, float(before["pretraining_loss"])


def thresholds(config: Config, grid: dict[str, np.ndarray], start: float) -> list[float]:
    """For each β the γ from which the loss on pretraining text no longer rises, between the grid's points."""
    return [float(np.exp(np.interp(-start, -row[1:], np.log(config.gammas[1:])))) for row in grid["pretraining_loss"]]


def collapse_numbers(config: Config, problem: dict[str, Any], grid: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """β = 0, γ = 0: argmax r."""
    row, source = config.betas.index(0.0), f"argmax r, {PAPER}"
    return [
        ledger.number(
            "probability of the best sequence, β = 0, γ = 0",
            float(grid["best"][row, 0]),
            expected=1.0,
            tolerance=1e-4,
            unit="probability",
            source=source,
        ),
        ledger.number(
            "entropy of the policy, β = 0, γ = 0",
            float(grid["entropy"][row, 0]),
            expected=0.0,
            tolerance=1e-3,
            unit="nats",
            source=source,
        ),
        ledger.number(
            "reward − largest reward, β = 0, γ = 0",
            float(grid["reward"][row, 0] - problem["rewards"].max()),
            expected=0.0,
            tolerance=1e-4,
            unit="units of the reward",
            source=source,
        ),
    ]


def gibbs_numbers(config: Config, problem: dict[str, Any], grid: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """γ = 0: what Adam found against π_SFT e^{r/β}/Z."""
    ref = oracle.sequence_log_probs(tabular.LM, problem["ref"])
    source, entries = "π* ∝ π_ref e^{r/β}, Rafailov et al. 2023, eq. 4", []
    for beta, reached in zip(config.betas, jnp.asarray(grid["log_probs"][:, 0]), strict=True):
        if beta == 0:
            continue
        optimum = rlhf.gibbs_optimum(ref, problem["rewards"], beta=beta)
        value = rlhf.regularised_objective(reached, ref, problem["rewards"], beta=beta)
        gap = rlhf.optimal_value(ref, problem["rewards"], beta=beta) - value
        divergence = -rlhf.regularised_objective(reached, optimum, jnp.zeros_like(reached), beta=1.0)
        found = [("KL(π‖π*)", divergence, "nats"), ("J* − J", gap, "units of the reward")]
        if beta >= 0.5:  # below, sequences of negligible probability are still on their way
            found.append(("largest |Δ log π|", jnp.abs(reached - optimum).max(), "nats"))
        for name, miss, unit in found:
            title = f"{name} of the optimum found, β = {beta:g}, γ = 0"
            entries.append(ledger.number(title, float(miss), expected=0.0, tolerance=1e-6, unit=unit, source=source))
    return entries


def pretraining_numbers(config: Config, grid: dict[str, np.ndarray], start: float) -> list[dict[str, Any]]:
    """How far the loss on pretraining text has risen, by γ: the least and the largest over all β."""
    entries = []
    for column, gamma in enumerate(config.gammas):
        rise = grid["pretraining_loss"][:, column] - start
        if gamma in (0.0, 0.3, 1.0, 10.0) or (rise <= 0).all():
            bound = {0.0: (1e-3, None)}.get(gamma, (None, 0.0) if gamma >= 3 else None)
            for name, value in (("smallest", rise.min()), ("largest", rise.max())):
                title = f"{name} rise of the pretraining loss over β, γ = {gamma:g}"
                entries.append(ledger.number(title, float(value), interval=bound, unit="nats", source=PAPER))
    for beta, gamma in zip(config.betas, thresholds(config, grid, start), strict=True):
        title = f"γ from which the pretraining loss no longer rises, β = {beta:g}"
        entries.append(ledger.number(title, gamma, unit="1", source="interpolated between the grid's points"))
    return entries


def best_of_n_numbers(config: Config, curves: dict[str, Any]) -> list[dict[str, Any]]:
    """The exact KL of best-of-n stays below log n − (n − 1)/n."""
    best, source = curves["best_of_n"], "log n − (n − 1)/n, Beirami et al. 2024"
    gibbs_reward = np.interp(best["kl"], curves["gibbs"]["kl"], curves["gibbs"]["reward"])
    return [
        ledger.number(
            f"largest KL of best-of-n − its bound, n = 2 to {config.draws[-1]}",
            float(jnp.max(best["kl"][1:] - best["bound"][1:])),
            interval=(None, 0.0),
            unit="nats",
            source=source,
        ),
        ledger.number(
            f"KL of best-of-{config.draws[-1]}", float(best["kl"][-1]), unit="nats", source="exact law, 81 sequences"
        ),
        ledger.number(f"bound on it, n = {config.draws[-1]}", float(best["bound"][-1]), unit="nats", source=source),
        ledger.number(
            "largest reward of best-of-n − reward of the Gibbs optimum at equal KL",
            float(np.max(np.asarray(best["reward"]) - gibbs_reward)),
            interval=(None, 1e-2),
            unit="units of the reward",
            source="no law has more reward at that KL; up to interpolation between 80 values of β",
        ),
    ]


def neural_numbers(config: Config, written: dict[str, Any]) -> list[dict[str, Any]]:
    """First and last of every arm: one seed, so reported, and bounded only in direction."""
    entries = []
    for arm in written["arms"]:
        source = f"{config.model}, {config.updates} updates, one seed"
        for name, unit in (("reward", "share of tokens"), ("kl", "nats"), ("pretraining_loss", "nats per token")):
            change = arm[name][-1] - arm[name][0]
            title = f"change of the {name.replace('_', ' ')}, β = {arm['beta']:g}, γ = {arm['gamma']:g}".replace(
                "kl", "KL"
            )
            entries.append(ledger.number(title, change, unit=unit, source=source))
    plain, *others = written["arms"]
    for arm in others:
        title = f"last pretraining loss, β = {arm['beta']:g}, γ = {arm['gamma']:g}, against neither term"
        saved = arm["pretraining_loss"][-1] - plain["pretraining_loss"][-1]
        entries.append(ledger.number(title, saved, interval=(None, 0.0), unit="nats per token", source=source))
    return entries


PRESETS = {"quick": Config(), "full": Config(updates=36)}


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/rlhf_terms.json`.

    Args:
        preset: full trains the small GPT-2 twice as long.
    """
    ledger.run_and_write("rlhf_terms", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
