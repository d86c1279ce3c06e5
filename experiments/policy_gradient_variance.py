"""The exact variance and bias of policy-gradient estimators: baselines, leave-one-out, group normalisation, critics.

    python -m experiments.policy_gradient_variance --preset quick

Two random tabular models, found by a search: the median one, and the one whose mean baseline raises the variance most.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from jaxtyping import Array, Key  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts.gradient_estimators import LM, baselines, grouped, problem, single, single_losses  # noqa: E402
from jaxrl_llm import oracle  # noqa: E402
from jaxrl_llm.objectives import advantages  # noqa: E402
from jaxrl_llm.objectives.policy_gradient import reinforce_loss  # noqa: E402

SOURCE = "oracle.gradient_moments, against oracle.objective_grad"
GROUPS = {"RLOO": advantages.rloo, "centred": advantages.centered, "GRPO": advantages.grpo}
UNBIASED_GROUP = "RLOO"


@dataclasses.dataclass(frozen=True)
class Config:
    """How many random models are searched, and the price of a nat where k1 is in the reward."""

    searched: int = 400
    beta: float = 0.1
    group_sizes: tuple[int, ...] = (2, 3)
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """Search, then measure every estimator on the median model and on the counter-example."""
    keys = jax.random.split(jax.random.key(config.seed), config.searched)
    with jax.enable_x64(True):
        search = {name: np.asarray(value) for name, value in jax.jit(jax.vmap(search_one))(keys).items()}
        order = np.argsort(search["mean baseline"], kind="stable")
        chosen = {"typical": order[len(order) // 2], "counter-example": order[-1]}
        cases = {name: measure_case(config, keys[index]) for name, index in chosen.items()}
    for name, index in chosen.items():
        cases[name]["mean reward"], cases[name]["b*"] = float(search["mean reward"][index]), float(search["b*"][index])
    ratios = {name: search[name] for name in ("mean baseline", "optimal baseline")}
    worst = cases["counter-example"]["estimators"]["mean baseline"]["relative variance"]
    return {
        "claim": "Many estimators have the same mean, the exact policy gradient, but not the same variance: "
        f"subtracting the mean reward can raise it ({worst:.2f} times in one of {config.searched} models), the optimal "
        "baseline cannot.",
        "numbers": search_numbers(ratios) + [entry for name, case in cases.items() for entry in numbers(name, case)],
        "data": rounded({"search": ratios, "cases": cases}),
    }


def search_one(key: Key[Array, ""]) -> dict[str, Array]:
    """Variance with both constant baselines, relative to none; and the baselines."""
    given = problem(key)
    rewards = given.rewards.sum(axis=1)
    mean, best = baselines(given)
    plain, *others = (
        single(given, lambda params, b=b: reinforce_loss(oracle.sequence_log_probs(LM, params), rewards - b))
        for b in (0.0, mean, best)
    )
    names = ("mean baseline", "optimal baseline")
    ratios = {name: each.total_variance / plain.total_variance for name, each in zip(names, others, strict=True)}
    return ratios | {"mean reward": mean, "b*": best}


def measure_case(config: Config, key: Key[Array, ""]) -> dict[str, Any]:
    """Variance for an equal number of samples, relative to no baseline; relative bias; cosine with ∇J."""
    measured = jax.jit(functools.partial(measure, config.beta, config.group_sizes))(key)
    entries = {name: {field: float(value) for field, value in each.items()} for name, each in measured.items()}
    plain = entries["no baseline"]["variance"]
    for entry in entries.values():
        entry["relative variance"] = entry.pop("variance") / plain
    return {"estimators": entries, "beta": config.beta}


def measure(beta: float, group_sizes: tuple[int, ...], key: Key[Array, ""]) -> dict[str, dict[str, Array]]:
    """Every estimator of this experiment on one problem."""
    given = problem(key)
    whole = given.rewards.sum(axis=1)
    exact = oracle.objective_grad(LM, given.params, given.ref_params, whole, beta=0.0)["logits"]
    held = oracle.objective_grad(LM, given.params, given.ref_params, whole, beta=beta)["logits"]
    losses = single_losses(given, beta)
    found = {
        name: compared(single(given, loss), held if name.startswith("k1") else exact, 1)
        for name, loss in losses.items()
    }
    for size in group_sizes:
        for name, advantage in GROUPS.items():
            found[f"{name}, groups of {size}"] = compared(grouped(given, advantage, size), exact, size)
    return found


def compared(found: oracle.Moments, exact: Array, size: int) -> dict[str, Array]:
    """Against the true gradient, per sample: the variance of an average of groups, times the samples it took."""
    mean = -found.mean["logits"]  # of a loss
    length = jnp.linalg.norm(exact)
    return {
        "variance": size * found.total_variance,
        "bias": jnp.linalg.norm(mean - exact) / length,
        "cosine": (mean * exact).sum() / (jnp.linalg.norm(mean) * length),
        "length": (mean * exact).sum() / length**2,
    }


def search_numbers(ratios: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """How often the mean baseline does harm, and that the optimal one never does."""
    raised = float((ratios["mean baseline"] > 1).mean())
    return [
        ledger.number(
            "share of random models in which the mean baseline raises the variance",
            raised,
            interval=(0.0, 1.0),
            unit="1",
            source="exact total variance; normal logits and rewards",
        ),
        ledger.number(
            "largest Var(optimal baseline)/Var(no baseline) of all models",
            float(ratios["optimal baseline"].max()),
            interval=(0.0, 1 + 1e-12),
            unit="1",
            source="Greensmith et al. 2004",
        ),
        ledger.number(
            "largest Var(optimal baseline)/Var(mean baseline) of all models",
            float((ratios["optimal baseline"] / ratios["mean baseline"]).max()),
            interval=(0.0, 1 + 1e-12),
            unit="1",
            source="Greensmith et al. 2004",
        ),
    ]


def numbers(case: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Bias of every estimator, and the variance of the constant baselines."""
    entries = []
    for name, found in measured["estimators"].items():
        kind, _, size = name.partition(", groups of ")
        if kind in GROUPS and kind != UNBIASED_GROUP:
            entries += biased_numbers(case, name, kind, size, found)
            continue
        label = f"{case}: ‖bias‖/‖∇J‖ of {name}"
        entries.append(ledger.number(label, found["bias"], expected=0.0, tolerance=1e-10, unit="1", source=SOURCE))
    bounds = {
        "mean baseline": (1.001, None) if case == "counter-example" else (0.0, 1.0),
        "optimal baseline": (0.0, 1 + 1e-12),
        "PPO-clip, first step": (1 - 1e-10, 1 + 1e-10),
    }
    entries += [
        ledger.number(
            f"{case}: variance with {name} over none",
            measured["estimators"][name]["relative variance"],
            interval=bound,
            unit="1",
            source="exact total variance",
        )
        for name, bound in bounds.items()
    ]
    entries += [
        ledger.number(
            f"{case}: variance with {name} over none, for equal numbers of samples",
            measured["estimators"][name]["relative variance"],
            unit="1",
            source="exact total variance",
        )
        for name in ("reward-to-go", "exact critic", "RLOO, groups of 2", "RLOO, groups of 3")
    ]
    return entries


def biased_numbers(case: str, name: str, kind: str, size: str, found: dict[str, float]) -> list[dict[str, Any]]:
    """A mean that includes the sample itself shortens the gradient; a division by the spread also turns it."""
    if kind == "centred":
        return [
            ledger.number(
                f"{case}: E[estimate] of {name}, as a multiple of ∇J",
                found["length"],
                expected=1 - 1 / int(size),
                tolerance=1e-10,
                unit="1",
                source="1 − 1/N: the mean includes the sample itself",
            ),
            ledger.number(
                f"{case}: 1 − cosine of {name}",
                1 - found["cosine"],
                expected=0.0,
                tolerance=1e-10,
                unit="1",
                source=SOURCE,
            ),
        ]
    return [
        ledger.number(f"{case}: ‖bias‖/‖∇J‖ of {name}", found["bias"], interval=(1e-3, None), unit="1", source=SOURCE),
        ledger.number(f"{case}: cosine of {name} with ∇J", found["cosine"], interval=(-1, 1), unit="1", source=SOURCE),
    ]


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/policy_gradient_variance.json`.

    Args:
        preset: full searches ten times as many models.
    """
    ledger.run_and_write("policy_gradient_variance", run, PRESETS[preset], preset)


PRESETS = {"quick": Config(), "full": Config(searched=4_000)}

if __name__ == "__main__":
    tyro.cli(main)
