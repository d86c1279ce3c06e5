"""The reward-model loss over all pairs of a prompt: what it bounds, what it does not, and how it compares to shuffling.

    python -m experiments.reward_model --preset quick

Gradient flow on two free scores, the gradient of one answer, the optimum under noisy labels and the free shift, in
float64; then the same ranked answers given to an over-parameterised linear reward model in three ways, trained from
zero by SGD and by Adam.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import command, ledger, statistics
from experiments.ledger import rounded
from experiments.parts import reward_arms as arms
from experiments.parts import reward_exact as exactly

MEASURED = {"margin": ("margin", "log-odds"), "held_out_loss": ("held-out loss", "nats")}
REMOVED, LEFT = 0.1, 0.5  # "removes the gap" leaves less than a tenth of it; "does not" leaves more than half


@dataclasses.dataclass(frozen=True)
class Config:
    """The exact part, and the reward models trained in three ways."""

    end: float = 1000.0  # of the gradient flow
    flow_steps: int = 20_000
    sizes: tuple[int, ...] = (2, 4, 9)
    draws: int = 20_000  # of random scores, for the bound of the gradient
    label_probabilities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.9, 0.95, 0.99)
    agreement: float = 0.726  # of two labellers, Ouyang et al. 2022
    prompts: int = 60
    fewest: int = 4  # answers to a prompt
    most: int = 9
    features: int = 384
    spread: float = 2.0  # standard deviation of the true scores
    sgd_rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    adam_rates: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    shown_rates: tuple[float, float] = (16.0, 0.32)  # of SGD and of Adam, along all epochs
    batch: int = 5
    epochs: int = 8
    checkpoints: int = 4  # in an epoch
    seeds: int = 12
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """Compute the exact part in float64, then the three arms under both optimisers."""
    data_key, order_key, scores_key = jax.random.split(jax.random.key(config.seed), 3)
    with jax.enable_x64(True):
        flow, flow_number = exactly.gradient_flow(config)
        bounds, bound_number = exactly.bounds(config, scores_key)
        optima, optimum_number = exactly.label_noise(config)
        shift_numbers = exactly.free_shift(scores_key)
    trained = three_ways(config, data_key, order_key)
    numbers = arm_numbers(config, trained)
    data = {
        "flow": flow,
        "bounds": bounds,
        "optima": optima,
        "arms": {name: summary(config, each) for name, each in trained.items()},
        "seeds": config.seeds,
    }
    return {
        "claim": _claim(config, {number["name"]: number["value"] for number in numbers}),
        "numbers": [flow_number, bound_number, optimum_number, *shift_numbers, *numbers],
        "data": rounded(data),
    }


def _claim(config: Config, values: dict[str, float]) -> str:
    sgd, adam = (values[f"{name}: share of the gap in the margin left at the matched rate"] for name in arms.OPTIMISERS)
    return (
        "The loss over all pairs of a prompt bounds the push on an answer by 2/K, not the margin. On a linear model, "
        f"{config.seeds} seeds, a rate matched per comparison leaves {abs(sgd):.0%} of what shuffling adds to the "
        f"margin under SGD, and {adam:.0%} under Adam. Each at its best rate, shuffling has the smaller held-out loss."
    )


def three_ways(config: Config, data_key: Array, order_key: Array) -> dict[str, dict[str, Any]]:
    """Train each optimiser's arms on the same answers: along all epochs at one rate, and one epoch at every rate."""
    data = arms.draw_data(jax.random.split(data_key, config.seeds), config)
    orders = {arm: arms.draw_batches(jax.random.fold_in(order_key, arm == "grouped"), config, arm) for arm in arms.ARMS}
    trained = {}
    for name, rates, shown in zip(
        arms.OPTIMISERS, (config.sgd_rates, config.adam_rates), config.shown_rates, strict=True
    ):
        along, at_rates = {}, {}
        for arm, batches in orders.items():
            once = {"arm": arm, "optimiser": name}
            along[arm] = jax.tree.map(np.asarray, arms.train(data, batches, jnp.asarray([shown]), **once))
            one_epoch = arms.train(data, batches[:, : config.checkpoints], jnp.asarray(rates), **once)
            at_rates[arm] = np.asarray(one_epoch["held_out_loss"][:, :, -1])
        trained[name] = {"shown": shown, "rates": rates, "along": along, "at_rates": at_rates}
    return trained


def summary(config: Config, trained: dict[str, Any]) -> dict[str, Any]:
    """Average over the seeds, with 95% intervals."""
    epoch = np.arange(config.epochs * config.checkpoints + 1) / config.checkpoints
    described = {
        arm: {
            **{name: _with_interval(values[0]) for name, values in trained["along"][arm].items()},
            "after_one_epoch": _with_interval(trained["at_rates"][arm].T),
        }
        for arm in arms.ARMS
    }
    return {"shown": trained["shown"], "rates": trained["rates"], "epoch": epoch, "arms": described}


def _with_interval(values: np.ndarray) -> dict[str, list[float]]:
    """Return the mean over the first axis, and Student's 95% interval, for each column."""
    return dict(
        zip(("mean", "low", "high"), np.transpose([statistics.student(each) for each in values.T]), strict=True)
    )


def arm_numbers(config: Config, trained: dict[str, Any]) -> list[dict[str, Any]]:
    """Test what a matched rate leaves of the gap, and which arm is better at its own best rate; measure the rest."""
    measured, p_values = [], {}
    for name, each in trained.items():
        source = f"{config.seeds} seeds, paired, one epoch of {name} at {each['shown']:g}"
        for field, (label, unit) in MEASURED.items():
            grouped, shuffled, matched = (each["along"][arm][field][0, :, config.checkpoints] for arm in arms.ARMS)
            gap, left = shuffled - grouped, matched - grouped
            title = f"{name}: {label}, shuffled − grouped"
            measured.append(_measured(title, *statistics.student(gap), unit=unit, source=source))
            title = f"{name}: share of the gap in the {label} left at the matched rate"
            measured.append(_measured(title, *_ratio(left, gap), unit="share", source=source))
            if name == "SGD":
                sides = [statistics.above_zero(REMOVED * gap + sign * left) for sign in (1, -1)]
                p_values[f"{name}: the matched rate leaves less than {REMOVED:.0%} of the gap in the {label}"] = max(
                    sides
                )
            else:
                over = statistics.above_zero(left - LEFT * gap)
                p_values[f"{name}: the matched rate leaves more than {LEFT:.0%} of the gap in the {label}"] = over
        best = {arm: _at_best_rate(each["at_rates"][arm]) for arm in ("grouped", "shuffled")}
        source = "the rate chosen on every other seed, the loss measured on the rest, one epoch"
        for arm, losses in best.items():
            title = f"{name}: held-out loss of {arm} at its best rate"
            measured.append(_measured(title, *statistics.student(losses), unit="nats", source=source))
        better = statistics.above_zero(best["grouped"] - best["shuffled"])
        p_values[f"{name}: shuffled has less held-out loss than grouped, each at its best rate"] = better
    source = f"one-sided Wilcoxon over seeds, Holm over {len(p_values)}"
    adjusted = zip(p_values, statistics.holm(list(p_values.values())), strict=True)
    tests = [ledger.test(f"p, {name}", p, at_most=0.05, wrong=0.5, unit="1", source=source) for name, p in adjusted]
    return [*tests, *measured]


def _measured(name: str, mean: float, low: float, high: float, **about: str) -> dict[str, Any]:
    return ledger.measurement(name, mean, confidence=(low, high), **about)


def _ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of two means of paired values, with its 95% interval to first order."""
    ratio = float(part.mean() / whole.mean())
    _, low, high = statistics.student((part - ratio * whole) / whole.mean())
    return ratio, ratio + low, ratio + high


def _at_best_rate(losses: np.ndarray) -> np.ndarray:
    """Return the losses [rate, seed] of the odd seeds at the rate that is best on the even ones."""
    return losses[losses[:, ::2].mean(axis=1).argmin(), 1::2]


PRESETS = {"quick": Config(), "full": Config(seeds=48, epochs=16)}


if __name__ == "__main__":
    command.main("reward_model", run, PRESETS)
