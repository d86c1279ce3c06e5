"""The points and numbers of the amplification experiment: what was measured, against the law."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.ledger import number
from experiments.parts.sentiment_numbers import interval
from jaxrl_llm.analysis.amplification import amplified_agreement, best_of_n_agreement

NEAR = 0.02  # of probability: what counts as on the law for a GPT-2 that learns from sampled labels or answers


def points(
    method: str,
    aim: float,
    grid: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    training: np.ndarray,
) -> list[dict[str, Any]]:
    """A point of the grid each: means over prompts, then over seeds with Student's 95 per cent intervals.

    The law is that of each prompt's own reference, so that what fine-tuning missed is not counted as a deviation.

    Args:
        grid: (share, beta) of each point. before: agreement of the references, [seed, prompt]; after: [seed, point,
            prompt]. training: the prompts that were aligned on; the others are held out.
    """
    held_out = np.setdiff1d(np.arange(before.shape[1]), training)
    found = []
    for place, (share, beta) in enumerate(grid):
        law = amplified_agreement(before, share, beta=beta)
        measured = after[:, place]
        deviation = interval((measured - law).mean(axis=1))
        found.append(
            {"method": method, "reference": aim, "share": share, "beta": beta, "law": law.mean()}
            | {name: float(each) for name, each in interval(measured.mean(axis=1)).items()}
            | {"deviation": float(deviation["mean"]), "deviation_half_width": float(deviation["half_width"])}
            | {"held_out_deviation": float((measured - law)[:, held_out].mean())}
        )
    return found


def worst_deviation(found: list[dict[str, Any]]) -> float:
    """The largest distance of a mean over seeds from the law."""
    return max(abs(each["deviation"]) for each in found)


def best_of_n(config: Any, aim: float, wins: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """The best of n draws after every prompt against 1 − (1 − π_ref)ⁿ, in standard errors of the count."""
    rows = []
    for n, won in zip(config.best_of, wins, strict=True):
        law = best_of_n_agreement(reference, n)
        spread = np.sqrt(config.repeats * (law * (1 - law)).sum())
        share = won / (config.repeats * law.size)
        z = (won - config.repeats * law.sum()) / max(spread, 1e-12)
        rows.append({"n": n, "law": law.mean(), "sampled": share, "z": float(z)})
    return {"reference": aim, "draws": config.repeats * reference.size, "sizes": rows}


def numbers(table: dict[str, Any], found: list[dict[str, Any]], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What would prove the claim wrong."""
    return [*_of_table(table), *_of_gpt2(found), *_of_best(table, best)]


def _of_table(table: dict[str, Any]) -> list[dict[str, Any]]:
    ways = {"gibbs": "closed form", "dpo": "DPO on the population", "rlhf": "maximum of E[r] − β KL"}
    count = len(table["law"])
    return [
        number(
            f"largest |agreement − law| on a table, {name}",
            float(np.abs(table[way] - table["law"]).max()),
            expected=0.0,
            tolerance=1e-6,
            unit=f"probability, over {count} points",
            source="σ(logit π_ref + logit(p)/β); exact, 9 answers",
        )
        for way, name in ways.items()
    ]


def _of_gpt2(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for each in found:
        if each["share"] == 0.6 and each["reference"] == 0.5:
            entries.append(
                number(
                    f"agreement after {each['method']}, p = 0.6, β = {each['beta']:g}",
                    each["mean"],
                    expected=float(amplified_agreement(0.5, 0.6, beta=each["beta"])),
                    tolerance=NEAR,
                    unit=f"probability, ± {each['half_width']:.2g} over seeds (95 per cent)",
                    source="a GPT-2 on 128 prompts; the law at π_ref = ½",
                )
            )
    inside = [abs(each["deviation"]) <= each["deviation_half_width"] for each in found]
    described = {"unit": f"probability, over {len(found)} points", "source": "means over seeds, against the law"}
    held_out = max(abs(each["held_out_deviation"]) for each in found)
    return [
        *entries,
        number("largest |deviation| of a GPT-2 from the law", worst_deviation(found), interval=(0, NEAR), **described),
        number("the same on claims that alignment left out", held_out, interval=(0, 2 * NEAR), **described),
        number(
            "points whose 95 per cent interval holds the law",
            float(np.mean(inside)),
            unit=f"share of {len(found)}",
            source="Student's interval over seeds",
        ),
    ]


def _of_best(table: dict[str, Any], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    z = max(abs(row["z"]) for each in best for row in each["sizes"])
    return [
        number(
            "largest |best-of-n agreement − (1 − (1 − π_ref)ⁿ)| on a table",
            table["best_of_n_error"],
            expected=0.0,
            tolerance=1e-12,
            unit="probability",
            source="the exact law of best-of-n",
        ),
        number(
            "largest |z| of sampled best-of-n, GPT-2",
            z,
            interval=(0, 4),
            unit="standard errors",
            source=f"{best[0]['draws']} times for each n",
        ),
    ]
