"""The terms of E[r − β log(π/π_SFT)] + γ E_pretrain[log π], taken away one at a time.

    python -m experiments.rlhf_terms --preset quick

On random tabular models of 81 sequences each optimum is solved for, and best-of-n's exact distribution is compared with
the Gibbs family; then a small GPT-2 is trained by REINFORCE with and without the terms.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest

from experiments import command, ledger, statistics
from experiments.ledger import rounded
from experiments.parts import rlhf_neural as neural
from experiments.parts import rlhf_tabular as tabular
from jaxrl_llm.objectives import rlhf

PAPER = "Ouyang et al. 2022, eq. 2"


@dataclasses.dataclass(frozen=True)
class Config:
    """The grid of the exact ablation, and the arms of the small GPT-2."""

    problems: int = 100  # tabular models
    betas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
    gammas: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
    forgetting: float = 0.5  # how far the SFT model's logits have moved from the pretrained ones
    ascents: int = 10  # problems on which the reward alone is ascended
    ascent_steps: int = 3000
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
    samples: int = 2  # answers to each prompt
    new_tokens: int = 16
    arms: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.02, 0.0), (0.0, 5.0))  # (β, γ); the first has neither
    draws: tuple[int, ...] = tuple(2**power for power in range(11))
    trainings: int = 2  # of each arm
    updates: int = 4
    learning_rate: float = 3e-4
    text_rows: int = 8
    text_tokens: int = 16
    seed: int = 2


def run(config: Config) -> dict[str, Any]:
    """Compute the exact ablation in float64, then the sampled one."""
    tabular_key, neural_key = jax.random.split(jax.random.key(config.seed))
    with jax.enable_x64(True):
        problems = tabular.draw_problems(tabular_key, count=config.problems, forgetting=config.forgetting)
        grid = ablation(config, problems)
        thresholds = no_rise_from(config, grid)
        best, gibbs = tabular.best_of_n(problems, config.draws), gibbs_family(problems)
        numbers = [
            *optimum_numbers(config, problems),
            *pretraining_numbers(config, problems, grid, thresholds),
            *best_of_n_numbers(config, problems, best),
        ]
    arms = neural.train(config, neural_key)
    bound = rlhf.best_of_n_kl_bound(jnp.asarray(config.draws))
    curves = {name: {field: each[field][:, 0] for field in each} for name, each in (("best", best), ("gibbs", gibbs))}
    data = {
        "betas": config.betas,
        "gammas": config.gammas,
        "best": grid["best"][:, 0, 0],
        "entropy": grid["entropy"][:, 0, 0],
        "rise": [[value if np.isfinite(value) else None for value in row] for row in grid["rise"][:, :, 0].tolist()],
        "problems": config.problems,
        "no_rise_from": np.quantile(thresholds.max(axis=0), [0.025, 0.5, 0.975]),
        "frontier": curves | {"draws": config.draws, "bound": bound},
        "neural": {"arms": arms, "letter": config.letter, "model": config.model, "answers": _answers(config)},
    }
    numbers += neural_numbers(config, arms)
    share = float(_forgets(grid).mean())
    return {
        "claim": "Without β, ascent on the reward ends on one sequence. Without γ, the loss on pretraining "
        f"text rises at every β on {share:.0%} of {config.problems} random problems, and a γ that is large enough "
        f"undoes it. A trained {config.model} forgets less with either term than with none.",
        "numbers": numbers,
        "data": rounded(data),
    }


def _answers(config: Config) -> int:
    return len(config.prompts) * config.samples


def ablation(config: Config, problems: tabular.Problems) -> dict[str, np.ndarray]:
    """Compute every optimum's terms as [β, γ, problem], and how far the loss on pretraining text has risen."""
    found = [
        [tabular.terms(problems, tabular.optimum(problems, beta, gamma)) for gamma in config.gammas]
        for beta in config.betas
    ]
    grid = {name: np.asarray([[cell[name] for cell in row] for row in found]) for name in found[0][0]}
    start = tabular.terms(problems, np.asarray(problems["log_ref"]))["pretraining_loss"]
    return grid | {"rise": grid["pretraining_loss"] - start}


def gibbs_family(problems: tabular.Problems) -> dict[str, np.ndarray]:
    """Compute reward and KL along the Gibbs optima, β from large to small, as [β, problem]."""
    found = [tabular.terms(problems, tabular.optimum(problems, beta, 0.0)) for beta in np.geomspace(20, 0.02, 80)]
    return {name: np.stack([each[name] for each in found]) for name in ("kl", "reward")}


def no_rise_from(config: Config, grid: dict[str, np.ndarray]) -> np.ndarray:
    """Interpolate, as [β, problem], the γ from which the loss on pretraining text no longer rises."""
    gammas = np.log(config.gammas[1:])
    return np.exp([[np.interp(0, -rise, gammas) for rise in of_beta[1:].T] for of_beta in grid["rise"]])


def _forgets(grid: dict[str, np.ndarray]) -> np.ndarray:
    """Return on which problems the loss rises at every β without γ."""
    return (grid["rise"][:, 0] > 0).all(axis=0)


def optimum_numbers(config: Config, problems: tabular.Problems) -> list[ledger.Number]:
    """Check the optima by the library's gradient, and ascend the reward alone."""
    solved = [
        tabular.slope_at(problems, tabular.optimum(problems, beta, gamma), beta, gamma)
        for beta in config.betas
        for gamma in config.gammas
        if beta + gamma > 0
    ]
    few = jax.tree.map(lambda leaf: leaf[: config.ascents], problems)
    ascended = tabular.terms(few, np.asarray(tabular.ascend_reward(few, steps=config.ascent_steps)))
    return [
        ledger.identity(
            f"largest entry of the exact gradient at the optima, {config.problems} problems",
            max(solved),
            tolerance=1e-8,
            unit="units of the reward",
            source=PAPER,
        ),
        ledger.test(
            f"largest entropy after ascent on the reward alone, {config.ascents} problems",
            float(ascended["entropy"].max()),
            at_most=0.01,  # set after a first run at seed 0; the committed one is of another seed
            wrong=0.27,  # about that of the optimum at β = 0.1
            unit="nats",
            source="a linear objective has its maximum in a corner",
        ),
        ledger.measurement(
            "share of ascents on the reward alone that end on the best sequence",
            float((ascended["best"] > 0.5).mean()),
            unit="share",
            source=f"{config.ascents} problems, Adam; the others end on another sequence",
        ),
    ]


def pretraining_numbers(
    config: Config, problems: tabular.Problems, grid: dict[str, np.ndarray], thresholds: np.ndarray
) -> list[ledger.Number]:
    """Count the problems that forget without γ, and check which γ is certain to be enough."""
    probs, log_text = np.exp(np.asarray(problems["log_text"])), np.asarray(problems["log_text"])
    moved = (probs * (log_text - np.asarray(problems["log_ref"]))).sum(axis=1)
    lost = np.asarray(problems["rewards"]).max(axis=1) - (probs * np.asarray(problems["rewards"])).sum(axis=1)
    enough = np.asarray(config.betas)[:, None] + lost / moved
    beyond = (thresholds - enough).max()
    forgets = _forgets(grid)
    interval = binomtest(int(forgets.sum()), len(forgets)).proportion_ci()
    over = f"{config.problems} problems, β = {', '.join(f'{beta:g}' for beta in config.betas)}"
    low, middle, high = np.quantile(thresholds.max(axis=0), [0.025, 0.5, 0.975])
    return [
        ledger.identity(
            "largest rise of the pretraining loss from one γ to the next, if above 0",
            max(0.0, float(np.diff(grid["pretraining_loss"][1:], axis=1).max())),
            tolerance=1e-9,
            unit="nats",
            source=f"an optimum's loss cannot rise with its weight; {over}",
        ),
        ledger.identity(
            "γ from which the pretraining loss no longer rises, beyond β + (max r − E_p[r])/KL(p‖π_SFT), if above 0",
            max(0.0, float(beyond)),
            tolerance=1e-9,
            unit="1",
            source=f"J(π*) ≥ J(p), p the distribution of pretraining text; {over}",
        ),
        ledger.test(
            "share of problems on which the pretraining loss rises at every β without γ, lower end of its 95% interval",
            float(interval.low),
            at_least=0.9,
            wrong=0.8,
            unit="share",
            source=over,
        ),
        ledger.measurement(
            "share of problems on which the pretraining loss rises at every β without γ",
            float(forgets.mean()),
            confidence=(float(interval.low), float(interval.high)),
            unit="share",
            source=over,
        ),
        ledger.measurement(
            "γ from which the pretraining loss rises at no β, median problem",
            float(middle),
            unit="1",
            source=f"{over}; 95% of the problems lie from {low:.2g} to {high:.2g}",
        ),
    ]


def best_of_n_numbers(config: Config, problems: tabular.Problems, best: dict[str, np.ndarray]) -> list[ledger.Number]:
    """Hold best-of-n against the bound on its KL, and against the best reward that its KL can buy."""
    bound = np.asarray(rlhf.best_of_n_kl_bound(jnp.asarray(config.draws)))[:, None]
    over = [
        best["reward"]
        - beta * best["kl"]
        - np.asarray(rlhf.optimal_value(problems["log_ref"], problems["rewards"], beta=beta))
        for beta in np.geomspace(20, 0.02, 20)
    ]
    about = {"tolerance": 1e-9, "source": "log n − (n − 1)/n, Beirami et al. 2024"}
    return [
        ledger.identity(
            f"largest KL of best-of-n beyond its bound, n to {config.draws[-1]}, if above 0",
            max(0.0, float((best["kl"] - bound).max())),
            unit="nats",
            **about,
        ),
        ledger.identity(
            "largest E[r] − β KL of best-of-n beyond the optimum's, if above 0",
            max(0.0, float(np.max(over))),
            unit="units of the reward",
            **about | {"source": "β log E_SFT[e^{r/β}], 20 values of β"},
        ),
    ]


def neural_numbers(config: Config, arms: list[dict[str, Any]]) -> list[ledger.Number]:
    """Test that either term holds the loss back, over the trainings; measure how far it rises."""
    source = f"{config.model}, {config.updates} updates, {config.trainings} trainings"
    last = [arm["pretraining_loss"][:, -1] for arm in arms]
    saved = [f"β = {arm['beta']:g}, γ = {arm['gamma']:g}" for arm in arms]
    p_values = statistics.holm([statistics.above_zero(last[0] - each) for each in last[1:]])
    numbers = [
        ledger.test(
            f"p, the pretraining loss ends lower with {name} than with neither term",
            p,
            at_most=0.05,
            wrong=0.5,
            unit="1",
            source=f"{source}, paired; one-sided Wilcoxon, Holm over {len(p_values)}",
        )
        for name, p in zip(saved[1:], p_values, strict=True)
    ]
    for name, arm in zip(saved, arms, strict=True):
        for field, label, unit in (
            ("pretraining_loss", "rise of the pretraining loss", "nats per token"),
            ("kl", "KL from the first model at the end", "nats per answer"),
        ):
            mean, low, high = statistics.student(arm[field][:, -1] - arm[field][:, 0])
            title = f"{label}, {name}"
            numbers.append(ledger.measurement(title, mean, confidence=(low, high), unit=unit, source=source))
    return numbers


PRESETS = {
    "quick": Config(),
    "full": Config(problems=400, ascents=100, trainings=6, updates=20, samples=4, text_rows=16, text_tokens=32),
}


if __name__ == "__main__":
    command.main("rlhf_terms", run, PRESETS)
