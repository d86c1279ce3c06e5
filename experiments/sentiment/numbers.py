"""The numbers of the sentiment experiment: gains at equal KL, over-optimisation, and comparisons over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from experiments.ledger import Number, identity, measurement, test
from experiments.sentiment.policies import OFFLINE, ONLINE
from experiments.statistics import holm, student
from jaxrl_llm.objectives.rlhf import best_of_n_kl_bound

LEVELS = (2.0, 5.0, 10.0)
"""Nats at which methods are compared."""
KL_PRICE = 0.1
"""Reward that a nat costs where the learning rate is chosen."""
SEEDS = "Student's t over seeds of training"


def interval(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mean over the first axis, the seeds, and half the width of Student's 95% interval around it."""
    count = len(values)
    spread = values.std(axis=0, ddof=1) / np.sqrt(count)
    return {"mean": values.mean(axis=0), "half_width": scipy.stats.t.ppf(0.975, count - 1) * spread}


def best_of(drawn: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return the rewards of the best of n by the proxy: for each seed over all ways to draw n of its answers.

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


def best_rate(tried: dict[float, dict[str, float]]) -> dict[str, Any]:
    """Return the learning rate of the greatest proxy reward less KL_PRICE a nat, and the scores of all rates."""
    scores = {rate: float(end["proxy"] - KL_PRICE * end["kl"]) for rate, end in tried.items()}
    return {"rate": max(scores, key=scores.get), "tried": [[rate, score] for rate, score in scores.items()]}


def slope_of(drawn: list[dict[str, np.ndarray]]) -> float:
    """Regress gold on proxy among the reference's answers to the same prompt: gold per unit of proxy."""
    proxy, gold = (np.concatenate([each[name] - each[name].mean(axis=1, keepdims=True) for each in drawn])
                   for name in ("proxy", "gold"))  # fmt: skip
    return float((proxy * gold).sum() / np.square(proxy).sum())


def at_level(kl: Sequence[float], values: Sequence[float], level: float) -> float:
    """Interpolate along a path from (0, 0) to where it first reaches a KL; NaN if it never does."""
    kl, values = np.append(0.0, kl), np.append(0.0, values)
    above = np.flatnonzero(kl >= level)
    if not len(above):
        return math.nan
    after = above[0]
    share = (level - kl[after - 1]) / (kl[after] - kl[after - 1])
    return float(values[after - 1] + share * (values[after] - values[after - 1]))


def gains_of(
    found: dict[str, list[dict[str, Any]]], drawn: list[dict[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """Return each method's gains over its seed's reference: along its path [seeds, snapshots], and of what is kept."""
    start = {name: np.asarray([each[name].mean() for each in drawn]) for name in ("proxy", "gold")}
    gains = {}
    for method, runs in found.items():
        path = {name: np.asarray([run["path"][name] for run in runs]) for name in ("proxy", "gold", "kl")}
        end = {name: np.asarray([float(run["end"][name]) for run in runs]) for name in path}
        for name, before in start.items():
            # At no update kept, the policy is the reference.
            path[name], end[name] = path[name] - before[:, None], end[name] - before
        gains[method] = path | {f"kept_{name}": values for name, values in end.items()}
    return gains


def levels_of(gains: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[float, dict[str, np.ndarray]]]:
    """Return gold and proxy of each method at each level of KL, one value a seed."""
    return {
        method: {
            level: {
                name: np.asarray([at_level(*each, level) for each in zip(path["kl"], path[name], strict=True)])
                for name in ("gold", "proxy")
            }
            for level in LEVELS
        }
        for method, path in gains.items()
    }


def comparisons(levels: dict[str, dict[float, dict[str, np.ndarray]]]) -> list[dict[str, Any]]:
    """Compare gold at equal KL for every two methods that reached it at all seeds: paired, two-sided, all by Holm."""
    rows = []
    for level, (first, second) in itertools.product(LEVELS, itertools.combinations(levels, 2)):
        differences = levels[first][level]["gold"] - levels[second][level]["gold"]
        if np.isfinite(differences).all():
            p = float(scipy.stats.ttest_1samp(differences, 0).pvalue)
            rows.append({"kl": level, "first": first, "second": second, "difference": interval(differences), "p": p})
    adjusted = holm([row["p"] for row in rows]) if rows else []
    return [row | {"holm": p} for row, p in zip(rows, adjusted, strict=True)]


def above_zero(values: np.ndarray) -> float:
    """Return the one-sided p-value of Student's t that the mean is not above 0."""
    return float(scipy.stats.ttest_1samp(values, 0, alternative="greater").pvalue)


def result(
    config: Any,
    described: dict[str, Any],
    found: dict[str, list[dict[str, Any]]],
    ablation: list[dict[str, Any]],
    drawn: list[dict[str, np.ndarray]],
) -> dict[str, Any]:
    """Return the result in the ledger's form."""
    gains, slope = gains_of(found, drawn), slope_of(drawn)
    levels = levels_of(gains)
    compared = comparisons(levels)
    gold = np.mean([each["kept_gold"] for each in gains.values()], axis=0)
    promised = np.mean([slope * each["kept_proxy"] for each in gains.values()], axis=0)
    significant = sum(row["holm"] <= 0.05 for row in compared)
    told = [
        test(
            "p-value of the gain in gold reward, averaged over methods",
            above_zero(gold),
            wrong=0.5,
            at_most=0.05,
            unit="probability",
            source=SEEDS,
        ),
        test(
            "p-value of the shortfall of that gain against what the proxy's gain predicts",
            above_zero(promised - gold),
            wrong=0.5,
            at_most=0.05,
            unit="probability",
            source=f"{SEEDS}; Gao et al. 2022",
        ),
        *_beginnings(found),
        _over_seeds("gain in gold reward, averaged over methods", gold, "log-odds"),
        _over_seeds("shortfall against what the proxy's gain predicts", promised - gold, "log-odds"),
        *(_over_seeds(f"{name}: gain in gold reward", each["kept_gold"], "log-odds") for name, each in gains.items()),
        *(_over_seeds(f"{name}: KL", each["kept_kl"], "nats") for name, each in gains.items()),
        *(
            measurement(f"{name}: learning rate chosen", described["rates"][name]["rate"], unit="1", source="tuning")
            for name in found
        ),
        *(
            measurement(f"AUC of {name} on held-out films", value, unit="probability", source="measured")
            for name, value in described["auc"].items()
        ),
        measurement("comparisons of methods at equal KL", len(compared), unit="1", source="2, 5 and 10 nats"),
        measurement("of these, significant", significant, unit="1", source=f"{SEEDS}, paired; Holm 1979"),
        *_text_numbers(found, ablation),
        *_held_out_numbers(config, described, found),
    ]
    data = {
        "methods": {name: _drawn(each, found[name], slope) for name, each in gains.items()},
        "levels": _levels_drawn(levels),
        "comparisons": compared,
        "best_of_n": best_of(drawn),
        "start": {name: float(np.mean([each[name] for each in drawn])) for name in ("proxy", "gold")},
        "slope": slope,
        "updates": config.updates,
        "stretch": config.updates // config.snapshots,
        "seeds": config.seeds,
        **described,
    }
    return {"claim": _claim(config, gold, promised, len(compared), significant), "numbers": told, "data": data}


def _over_seeds(name: str, values: np.ndarray, unit: str) -> Number:
    return measurement(name, *student(values), unit=unit, source=SEEDS)


def _beginnings(found: dict[str, Any]) -> list[Number]:
    """Check that policy and reference are the same before the first update."""
    rows = []
    for name, runs in found.items():
        first = {part: np.asarray([float(run["first"][part]) for run in runs]) for part in runs[0]["first"]}
        if name in ONLINE:
            at = np.abs(first["kl"]).max()
            rows.append(identity(f"{name}: KL at the first update", float(at), tolerance=1e-4, unit="nats",
                                 source="definition"))  # fmt: skip
        if name == "dpo":
            far = float(first["loss"][np.abs(first["loss"] - math.log(2)).argmax()])
            rows.append(identity("dpo: loss at the first update", far, expected=math.log(2), tolerance=1e-4,
                                 unit="nats", source="definition"))  # fmt: skip
    return rows


def _held_out_numbers(config: Any, described: dict[str, Any], found: dict[str, Any]) -> list[Number]:
    """Measure the update of the least held-out loss of each method; of DPO also that loss and its lower bound."""
    told, each = [], config.updates // config.snapshots
    for name, runs in found.items():
        if name in OFFLINE:
            at = each * np.asarray([float(run["kept"]) for run in runs])
            told.append(_over_seeds(f"{name}: updates to the least held-out loss", at, "1"))
    if "dpo" in found:
        least = np.asarray([run["held_out"].min() for run in found["dpo"]], np.float64)
        told.append(_over_seeds("dpo: least held-out loss", least, "nats a pair"))
        entropy = described["label_entropy"]
        told.append(measurement("entropy of the labels of held-out pairs", entropy, unit="nats a pair",
                                source="the proxy's Bradley-Terry probabilities"))  # fmt: skip
    return told


def _drawn(gains: dict[str, np.ndarray], runs: list[dict[str, Any]], slope: float) -> dict[str, Any]:
    """Return means over seeds, with intervals, for the figure."""
    predicted = {"predicted": slope * gains["proxy"], "kept_predicted": slope * gains["kept_proxy"]}
    return {
        **{name: interval(values) for name, values in (gains | predicted).items()},
        "kept": [int(run["kept"]) for run in runs],
        "held_out": [run["held_out"] for run in runs],
    }


def _levels_drawn(levels: dict[str, dict[float, dict[str, np.ndarray]]]) -> list[dict[str, Any]]:
    rows = []
    for method, each in levels.items():
        for level, rewards in each.items():
            reached = np.isfinite(rewards["gold"])
            row = {"method": method, "kl": level, "reached": int(reached.sum())}
            rows.append(row | ({name: interval(values) for name, values in rewards.items()} if reached.all() else {}))
    return rows


def _text_losses(runs: list[dict[str, Any]]) -> np.ndarray:
    return np.asarray([float(run["text_loss"]) for run in runs])


def _text_numbers(found: dict[str, Any], ablation: list[dict[str, Any]]) -> list[Number]:
    if not ablation:
        return []
    change = _text_losses(ablation) - _text_losses(found["rloo"])
    return [_over_seeds("rloo: change of the loss on held-out reviews by the pretraining term", change,
                        "nats per token")]  # fmt: skip


def _claim(config: Any, gold: np.ndarray, promised: np.ndarray, compared: int, significant: int) -> str:
    gain, low, high = student(gold)
    gap, nearer, further = student(promised - gold)
    verb, side = "raise" if above_zero(gold) <= 0.05 else "change", "less" if gap > 0 else "more, not less,"
    nearer, further = (nearer, further) if gap > 0 else (-further, -nearer)
    return (
        f"{len(config.methods)} methods trained on a proxy reward {verb} an independent gold reward by {gain:.2f} "
        f"log-odds on average (95% interval {low:.2f} to {high:.2f}, {config.seeds} seeds), {abs(gap):.2f} "
        f"({nearer:.2f} to {further:.2f}) {side} than the proxy's gain predicts. At equal KL, {significant} of "
        f"{compared} comparisons of methods are significant."
    )


def _log_choose(n: int, k: int) -> float:
    return float(scipy.special.gammaln(n + 1) - scipy.special.gammaln(k + 1) - scipy.special.gammaln(n - k + 1))
