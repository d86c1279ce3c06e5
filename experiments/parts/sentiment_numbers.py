"""The numbers of the sentiment experiment: means over seeds with their intervals, leads, and over-optimisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from experiments.ledger import number, rounded
from jaxrl_llm.objectives.rlhf import best_of_n_kl_bound

MEASURED = ("gold", "proxy", "kl", "entropy", "length", "text_loss")
CURVES = ("loss", "chosen_logp", "rejected_logp", "margin", "reward", "kl", "clip_fraction", "grad_norm")


def interval(values: np.ndarray) -> dict[str, np.ndarray]:
    """The mean over the first axis, the seeds, and half the width of Student's 95 per cent interval around it."""
    count = len(values)
    spread = values.std(axis=0, ddof=1) / np.sqrt(count)
    return {"mean": values.mean(axis=0), "half_width": scipy.stats.t.ppf(0.975, count - 1) * spread}


def best_of(drawn: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """What the best of n by the proxy is worth, over all ways to draw n of the answers, with standard errors.

    Of answers in ascending order the i-th (from 1) is the best of n drawn without replacement with the probability
    C(i − 1, n − 1) / C(N, n). The divergence is the bound log n − (n − 1)/n.
    """
    proxy, gold = drawn["proxy"], drawn["gold"]
    order = np.argsort(proxy, axis=1)
    count = proxy.shape[1]
    rows = []
    n = 1
    while n <= count:
        log_weights = [
            _log_choose(i - 1, n - 1) - _log_choose(count, n) if i >= n else -np.inf for i in range(1, count + 1)
        ]
        weights = np.exp(log_weights)
        row = {"n": n, "kl": float(best_of_n_kl_bound(n))}
        for name, values in (("proxy", proxy), ("gold", gold)):
            means = (np.take_along_axis(values, order, axis=1) * weights).sum(axis=1)
            row[name] = float(means.mean())
            row[f"{name}_half_width"] = float(1.96 * means.std(ddof=1) / np.sqrt(len(means)))
        rows.append(row)
        n *= 2
    return rows


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method and strength: all that was measured at the end, with its interval over seeds."""
    rows = []
    for method, lanes in found.items():
        for place, beta in enumerate(lanes["beta"]):
            row = {"method": method, "beta": float(beta)}
            for name in MEASURED:
                row[name] = interval(lanes["snapshots"][name][:, place, -1])
            rows.append(row)
    return rows


def paths(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every snapshot on the way, means over seeds."""
    return [
        {"method": method, "beta": float(beta)}
        | {name: lanes["snapshots"][name][:, place].mean(axis=0) for name in ("gold", "proxy", "kl")}
        for method, lanes in found.items()
        for place, beta in enumerate(lanes["beta"])
    ]


def curves(found: dict[str, Any], points: int = 64) -> list[dict[str, Any]]:
    """The metrics of the steps, means over seeds, averaged to so many points."""
    rows = []
    for method, lanes in found.items():
        for place, beta in enumerate(lanes["beta"]):
            row = {"method": method, "beta": float(beta)}
            for name in CURVES:
                if name in lanes["steps"]:
                    values = lanes["steps"][name][:, place].mean(axis=0)
                    row[name] = [float(part.mean()) for part in np.array_split(values, min(points, len(values)))]
            rows.append(row)
    return rows


def result(
    config: Any,
    described: dict[str, Any],
    start: dict[str, Any],
    found: dict[str, Any],
    ablation: list[dict[str, Any]],
    drawn: dict[str, np.ndarray],
    samples: dict[str, Any],
) -> dict[str, Any]:
    """The entry of the ledger."""
    rows = summary(found)
    best = {
        method: max((row for row in rows if row["method"] == method), key=lambda row: row["gold"]["mean"])
        for method in found
    }
    ranked = sorted(best, key=lambda method: -best[method]["gold"]["mean"])
    numbers = []
    for method in found:
        row = best[method]
        gain, half = row["gold"]["mean"] - float(start["gold"]), row["gold"]["half_width"]
        numbers.append(
            number(
                f"{method}: gold reward gained over the fine-tuned model, less its interval (β = {row['beta']:g})",
                float(gain - half),
                unit="log-odds",
                source="Student's interval over seeds",
                interval=(0.0, None) if config.promised else None,
            )
        )
    first = {name: lanes["steps"] for name, lanes in found.items()}
    for method in set(found) & {"ppo", "grpo", "rloo"}:
        worst = float(np.abs(first[method]["kl"][:, :, 0]).max())
        numbers.append(
            number(
                f"{method}: KL at the first step", worst, expected=0.0, tolerance=1e-4, unit="nats", source="definition"
            )
        )
    numbers.append(
        number(
            "DPO: loss at the first step",
            float(first["dpo"]["loss"][:, :, 0].mean()),
            expected=float(np.log(2)),
            tolerance=1e-4,
            unit="nats",
            source="Rafailov et al. 2023, eq. 7 at policy = reference",
        )
    )
    numbers += [
        number(
            f"AUC of the {name} scorer on held-out films",
            auc,
            unit="probability",
            source="measured",
            interval=(0.6, 1) if config.promised else None,
        )
        for name, auc in described["auc"].items()
    ]
    lead = _lead(found, best, ranked)
    numbers.append(
        number(
            "lead of the first method over the second, in gold reward", lead["mean"], unit="log-odds", source="measured"
        )
    )
    numbers += _text_numbers(ablation, start, promised=config.promised)
    return {
        "claim": _claim(ranked, best, lead, start),
        "numbers": numbers,
        "data": rounded(
            {
                "start": start,
                "rows": rows,
                "paths": paths(found),
                "curves": curves(found),
                "best_of_n": best_of(drawn),
                "ablation": [
                    {
                        "gamma": entry["gamma"],
                        "beta": float(beta),
                        **{name: interval(entry["snapshots"][name][:, place, -1]) for name in MEASURED},
                        "text_loss_path": entry["snapshots"]["text_loss"][:, place].mean(axis=0),
                    }
                    for entry in ablation
                    for place, beta in enumerate(entry["beta"])
                ],
                "samples": samples,
                "scorers": described,
                "ranked": ranked,
                "lead": lead,
            }
        ),
    }


def _lead(found: dict[str, Any], best: dict[str, Any], ranked: list[str]) -> dict[str, float]:
    """By how much the first method is ahead of the second in gold reward: seeds are paired."""
    ends = []
    for method in ranked[:2]:
        place = int(np.argmin(np.abs(np.asarray(found[method]["beta"]) - best[method]["beta"])))
        ends.append(found[method]["snapshots"]["gold"][:, place, -1])
    return {name: float(value) for name, value in interval(ends[0] - ends[1]).items()}


def _text_numbers(ablation: list[dict[str, Any]], start: dict[str, Any], *, promised: bool) -> list[dict[str, Any]]:
    """How the loss on held-out reviews moved, at the least β, without the pretraining term and with it."""
    moved = {}
    for entry in ablation:
        ends = entry["snapshots"]["text_loss"][:, 0, -1]
        moved[entry["gamma"]] = interval(ends - float(start["text_loss"]))
    low, high = min(moved), max(moved)
    return [
        number(
            f"rise of the loss on held-out reviews, γ = {low:g}",
            float(moved[low]["mean"]),
            unit="nats per token",
            source="Ouyang et al. 2022, eq. 2",
            interval=(0.0, None) if promised else None,
        ),
        number(
            f"the same, γ = {high:g}, less that without the term",
            float(moved[high]["mean"] - moved[low]["mean"]),
            unit="nats per token",
            source="Ouyang et al. 2022, eq. 2",
            interval=(None, 0.0) if promised else None,
        ),
    ]


def _claim(ranked: list[str], best: dict[str, Any], lead: dict[str, float], start: dict[str, Any]) -> str:
    first, second = ranked[:2]
    gains = [best[method]["gold"]["mean"] - float(start["gold"]) for method in ranked]
    apart = lead["mean"] > lead["half_width"]
    verdict = "more than" if apart else "not more than"
    raised = sum(gain > best[method]["gold"]["half_width"] for gain, method in zip(gains, ranked, strict=True))
    return (
        f"{raised} of {len(ranked)} methods raise the gold sentiment of a model's reviews beyond the interval of their "
        f"seeds, by {min(gains):.2f} to {max(gains):.2f} log-odds; {first} is ahead of {second} by "
        f"{lead['mean']:.2f} ± {lead['half_width']:.2f}, {verdict} chance."
    )


def _log_choose(n: int, k: int) -> float:
    return float(scipy.special.gammaln(n + 1) - scipy.special.gammaln(k + 1) - scipy.special.gammaln(n - k + 1))
