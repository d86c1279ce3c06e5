"""The numbers of the sentiment experiment: means over seeds with their intervals, leads, and over-optimisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from experiments.ledger import number, rounded
from jaxrl_llm.objectives.rlhf import best_of_n_kl_bound

MEASURED = ("gold", "proxy", "kl", "entropy", "length", "text_loss")
CURVES = ("loss", "kl_chosen", "kl_rejected", "margin", "reward", "kl", "clip_fraction", "grad_norm")


def interval(values: np.ndarray) -> dict[str, np.ndarray]:
    """The mean over the first axis, the seeds, and half the width of Student's 95 per cent interval around it."""
    count = len(values)
    spread = values.std(axis=0, ddof=1) / np.sqrt(count)
    return {"mean": values.mean(axis=0), "half_width": scipy.stats.t.ppf(0.975, count - 1) * spread}


def best_of(drawn: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """What the best of n by the proxy is worth: for each seed over all ways to draw n of its answers.

    Of N answers in ascending order the i-th (from 1) is the best of n drawn without replacement with the probability
    C(i − 1, n − 1) / C(N, n). `kl_bound` is log n − (n − 1)/n, which the divergence does not exceed.
    """
    count = drawn[0]["proxy"].shape[1]
    rows, n = [], 1
    while n <= count:
        log_weights = [
            _log_choose(i - 1, n - 1) - _log_choose(count, n) if i >= n else -np.inf for i in range(1, count + 1)
        ]
        means = [_mean_of_best(each, np.exp(log_weights)) for each in drawn]
        rewards = {name: interval(np.asarray([mean[name] for mean in means])) for name in ("proxy", "gold")}
        rows.append({"n": n, "kl_bound": float(best_of_n_kl_bound(n)), **rewards})
        n *= 2
    return rows


def _mean_of_best(drawn: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
    order = np.argsort(drawn["proxy"], axis=1)
    ordered = {name: np.take_along_axis(values, order, axis=1) for name, values in drawn.items()}
    return {name: float((values * weights).sum(axis=1).mean()) for name, values in ordered.items()}


def summary(found: dict[str, Any], start: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and strength: all that was measured at the end, with its interval over seeds.

    `gain` is in gold reward over the reference, seed by seed with the same prompts and keys.
    """
    before = np.asarray([float(each["gold"]) for each in start])
    rows = []
    for method, lanes in found.items():
        for place, beta in enumerate(lanes["beta"]):
            ends = {name: lanes["snapshots"][name][:, place, -1] for name in MEASURED}
            row = {name: interval(values) for name, values in ends.items()}
            rows.append({"method": method, "beta": float(beta), **row, "gain": interval(ends["gold"] - before)})
    return rows


def paths(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every snapshot on the way, with its interval over seeds."""
    return [
        {"method": method, "beta": float(beta)}
        | {name: interval(lanes["snapshots"][name][:, place]) for name in ("gold", "proxy", "kl")}
        for method, lanes in found.items()
        for place, beta in enumerate(lanes["beta"])
    ]


def curves(found: dict[str, Any], points: int = 16) -> list[dict[str, Any]]:
    """The metrics of the steps, averaged to so many points, with their intervals over seeds."""
    rows = []
    for method, lanes in found.items():
        for place, beta in enumerate(lanes["beta"]):
            row = {"method": method, "beta": float(beta)}
            for name in CURVES:
                if name in lanes["steps"]:
                    values = lanes["steps"][name][:, place]
                    parts = np.array_split(values, min(points, values.shape[1]), axis=1)
                    row[name] = interval(np.stack([part.mean(axis=1) for part in parts], axis=1))
            rows.append(row)
    return rows


def result(
    config: Any,
    described: dict[str, Any],
    start: list[dict[str, Any]],
    found: dict[str, Any],
    ablation: list[dict[str, Any]],
    drawn: list[dict[str, np.ndarray]],
    samples: dict[str, Any],
) -> dict[str, Any]:
    """The entry of the ledger. Of each method the β counts that pleased the proxy most: gold only looks on."""
    rows = summary(found, start)
    best = {
        method: max((row for row in rows if row["method"] == method), key=lambda row: row["proxy"]["mean"])
        for method in found
    }
    ranked = sorted(best, key=lambda method: -best[method]["gain"]["mean"])
    lead = _lead(found, best, ranked)
    told = [
        *_gains(best, promised=config.promised),
        *_beginnings(found),
        *_scorers(described, promised=config.promised),
        _reported("lead of the first method over the second, in gold reward", lead["mean"], "log-odds"),
        *_text_numbers(ablation, start, promised=config.promised),
    ]
    data = {
        "start": {name: float(np.mean([each[name] for each in start])) for name in MEASURED},
        "rows": rows,
        "paths": paths(found),
        "curves": curves(found),
        "best_of_n": best_of(drawn),
        "ablation": _ablation(ablation),
        "samples": samples,
        "scorers": described,
        "best": {method: row["beta"] for method, row in best.items()},
        "ranked": ranked,
        "lead": lead,
    }
    return {"claim": _claim(ranked, best, lead), "numbers": told, "data": rounded(data)}


def _gains(best: dict[str, Any], *, promised: bool) -> list[dict[str, Any]]:
    return [
        number(
            f"{method}: gold reward gained over the fine-tuned model, less its interval (β = {row['beta']:g})",
            float(row["gain"]["mean"] - row["gain"]["half_width"]),
            unit="log-odds",
            source="Student's 95 per cent interval over seeds",
            interval=(0.0, None) if promised else None,
        )
        for method, row in best.items()
    ]


def _beginnings(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Policy and reference are one before the first step."""
    rows = [
        number(
            f"{method}: KL at the first step",
            float(np.abs(found[method]["steps"]["kl"][:, :, 0]).max()),
            expected=0.0,
            tolerance=1e-4,
            unit="nats",
            source="definition",
        )
        for method in found
        if method in ("ppo", "grpo", "rloo")
    ]
    loss = number(
        "DPO: loss at the first step",
        float(found["dpo"]["steps"]["loss"][:, :, 0].mean()),
        expected=float(np.log(2)),
        tolerance=1e-4,
        unit="nats",
        source="Rafailov et al. 2023, eq. 7 at policy = reference",
    )
    return [*rows, loss]


def _scorers(described: dict[str, Any], *, promised: bool) -> list[dict[str, Any]]:
    return [
        number(
            f"AUC of the {name} scorer on held-out films",
            auc,
            unit="probability",
            source="measured",
            interval=(0.6, 1) if promised else None,
        )
        for name, auc in described["auc"].items()
    ]


def _reported(name: str, value: float, unit: str) -> dict[str, Any]:
    return number(name, float(value), unit=unit, source="measured")


def _lead(found: dict[str, Any], best: dict[str, Any], ranked: list[str]) -> dict[str, float]:
    """By how much the first method is ahead of the second in gold reward: seeds are paired."""
    ends = []
    for method in ranked[:2]:
        place = int(np.argmin(np.abs(np.asarray(found[method]["beta"]) - best[method]["beta"])))
        ends.append(found[method]["snapshots"]["gold"][:, place, -1])
    return {name: float(value) for name, value in interval(ends[0] - ends[1]).items()}


def _ablation(ablation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"gamma": entry["gamma"], "beta": float(beta)}
        | {name: interval(entry["snapshots"][name][:, place, -1]) for name in MEASURED}
        for entry in ablation
        for place, beta in enumerate(entry["beta"])
    ]


def _text_numbers(
    ablation: list[dict[str, Any]], start: list[dict[str, Any]], *, promised: bool
) -> list[dict[str, Any]]:
    """How the loss on held-out reviews moved, at the least β, without the pretraining term and with it."""
    before = float(np.mean([each["text_loss"] for each in start]))
    ends = {entry["gamma"]: entry["snapshots"]["text_loss"][:, 0, -1] for entry in ablation}
    low, high = min(ends), max(ends)
    told = {
        f"rise of the loss on held-out reviews, γ = {low:g}": (ends[low].mean() - before, (0.0, None)),
        f"the same, γ = {high:g}, less that without the term": ((ends[high] - ends[low]).mean(), (None, 0.0)),
    }
    return [
        number(
            name,
            float(value),
            unit="nats per token",
            source="Ouyang et al. 2022, eq. 2",
            interval=bound if promised else None,
        )
        for name, (value, bound) in told.items()
    ]


def _claim(ranked: list[str], best: dict[str, Any], lead: dict[str, float]) -> str:
    first, second = ranked[:2]
    gains = [best[method]["gain"] for method in ranked]
    verdict = "more than" if lead["mean"] > lead["half_width"] else "not more than"
    raised = sum(gain["mean"] > gain["half_width"] for gain in gains)
    return (
        f"{raised} of {len(ranked)} methods raise the gold sentiment of a model's reviews beyond the interval over "
        f"seeds, by {gains[-1]['mean']:.2f} to {gains[0]['mean']:.2f} log-odds at the β of each that the proxy likes "
        f"best; {first} is ahead of {second} by {lead['mean']:.2f} ± {lead['half_width']:.2f}, {verdict} chance."
    )


def _log_choose(n: int, k: int) -> float:
    return float(scipy.special.gammaln(n + 1) - scipy.special.gammaln(k + 1) - scipy.special.gammaln(n - k + 1))
