"""The points and numbers of the amplification experiment: measured agreement against the law."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats

from experiments import ledger, statistics
from jaxrl_llm.analysis.amplification import amplified_agreement, best_of_n_agreement

NEAR = 0.02  # of probability: the largest deviation that counts as on the law for a GPT-2
EXPECTED = 5  # draws of either kind that a z needs
EXAMPLE = 0.6  # the share at which all trainers are compared
FEW = 5  # seeds: fewer make a small run, which says so


def points(
    method: str,
    aim: float,
    grid: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    training: np.ndarray,
    opinions: np.ndarray,
) -> list[dict[str, Any]]:
    """Return a point of the grid each: means over prompts, then over seeds with Student's 95% intervals.

    The law is that of each prompt's own reference, so that what fine-tuning missed is not counted as a deviation.
    `off_the_law` has the deviation; `held_out_deviation` is the same on the claims that alignment left out.

    Args:
        grid: (share, beta) of each point. before: agreement of the references, [seed, prompt]; after: [seed, point,
            prompt]. training: the prompts that were aligned on; the others are held out. opinions: bool [prompt], the
            user's.
    """
    held_out = np.setdiff1d(np.arange(before.shape[1]), training)
    found = []
    for place, (share, beta) in enumerate(grid):
        law = amplified_agreement(before, share, beta=beta)
        measured = after[:, place]
        off = measured - law
        mean, low, high = statistics.student(measured.mean(axis=1))
        found.append(
            {"method": method, "reference": aim, "share": share, "beta": beta, "law": law.mean()}
            | {"mean": mean, "low": low, "high": high}
            | off_the_law(off, opinions)
            | {"held_out_deviation": off_the_law(off[:, held_out], opinions[held_out])["deviation"]}
        )
    return found


def off_the_law(off: np.ndarray, opinions: np.ndarray) -> dict[str, Any]:
    """Return the deviation of a point from the law, of users of either opinion by themselves.

    Over both, what a model does too much with the one hides what it does too little with the other: one that always
    says "true" agrees with half of all users. A single prompt, on the other hand, would mostly show noise.

    Args:
        off: measured − law, [seed, prompt].

    Returns:
        `deviation`, `deviation_low` and `deviation_high`: the mean over prompts and seeds for the opinion that is
        further off, and its interval; `p`: the larger p-value of the two opinions that the mean is off by NEAR or
        more; `largest_of_seed`: the largest distance of one seed's mean.
    """
    of_seeds = np.stack([off[:, opinions == opinion].mean(axis=1) for opinion in (False, True)])
    worst = of_seeds[np.abs(of_seeds.mean(axis=1)).argmax()]
    mean, low, high = statistics.student(worst)
    return {
        "deviation": mean,
        "deviation_low": low,
        "deviation_high": high,
        "p": max(map(beyond, of_seeds)),
        "largest_of_seed": float(np.abs(of_seeds).max()),
    }


def beyond(values: np.ndarray, *, margin: float = NEAR) -> float:
    """Return the p-value of the two one-sided t-tests that the mean of some values is `margin` or more away from 0.

    A spread of values earns nothing: the wider they scatter, the larger it is.
    """
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    room = margin - abs(mean)
    return float(scipy.stats.t.sf(room / error, len(values) - 1)) if error > 0 else float(room <= 0)


def worst_deviation(found: list[dict[str, Any]]) -> float:
    """Return the largest distance of a mean over prompts of one opinion and seeds from the law."""
    return max(abs(each["deviation"]) for each in found)


def best_of_n(config: Any, aim: float, wins: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Return the best of n draws after every prompt against 1 − (1 − π_ref)ⁿ, in standard errors of the count.

    `z` is None where fewer than `EXPECTED` draws that agree, or that do not, are expected: it is not normal there.
    """
    rows = []
    for n, won in zip(config.best_of, wins, strict=True):
        law = best_of_n_agreement(reference, n)
        spread = np.sqrt(config.repeats * (law * (1 - law)).sum())
        draws, expected = config.repeats * law.size, config.repeats * law.sum()
        normal = min(expected, draws - expected) >= EXPECTED
        z = float((won - expected) / spread) if normal else None
        rows.append({"n": n, "law": law.mean(), "sampled": won / draws, "z": z})
    return {"reference": aim, "draws": draws, "sizes": rows}


def numbers(table: dict[str, Any], found: list[dict[str, Any]], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the exact optima, the test of the GPT-2 against the law, and that of best-of-n."""
    return [*_of_table(table), *_of_gpt2(found), *_of_best(table, best)]


def claim(table: dict[str, Any], found: list[dict[str, Any]], config: Any) -> str:
    """Return the law, and how much of it was measured."""
    agreement = float(amplified_agreement(0.5, EXAMPLE, beta=0.1))
    exact = "lie" if ledger.verdict(_of_table(table)) is not False else "do not lie"
    near, (*methods, last) = sum(each["p"] <= 0.05 for each in found), dict.fromkeys(each["method"] for each in found)
    trained = f"{', '.join(methods)} and {last}" if methods else last
    among = f"all {near}" if near == len(found) else f"{near} of {len(found)}"
    return (
        f"If {EXAMPLE:.0%} of annotators prefer agreement, the optimum agrees with probability σ(logit π_ref + "
        f"logit({EXAMPLE})/β): {agreement:.3f} from ½ at β = 0.1. Optima on tables {exact} on this law; "
        f"{'in this small run, ' if config.seeds < FEW else ''}a GPT-2 (layers: {config.layers}, width: "
        f"{config.width}, answers of one token) trained by {trained} is shown to be within {NEAR} of it at {among} "
        f"points, in the mean over {config.seeds} seeds."
    )


def _of_table(table: dict[str, Any]) -> list[dict[str, Any]]:
    ways = {"gibbs": "closed form", "dpo": "DPO on the population", "rlhf": "maximum of E[r] − β KL"}
    return [
        ledger.identity(
            f"largest |agreement − law| on a table, {name}",
            float(np.abs(table[way] - table["law"]).max()),
            tolerance=1e-10,
            unit=f"probability, over {len(table['law'])} points",
            source="σ(logit π_ref + logit(p)/β); exact, 9 answers",
        )
        for way, name in ways.items()
    ]


def _of_gpt2(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    described = {
        "unit": f"probability, over {len(found)} points",
        "source": "means over the prompts of either opinion, and over seeds, against the law",
    }
    entries = [
        ledger.test(
            f"largest p-value that a mean is {NEAR} or more off the law, GPT-2",
            max(each["p"] for each in found),
            at_most=0.05,
            wrong=0.5,  # of a mean that is off by the margin
            unit="probability",
            source=f"two one-sided t-tests over seeds, for either opinion at {len(found)} points; all must be small, "
            "so that none is corrected",
        ),
        ledger.measurement("largest |deviation| of a GPT-2 from the law", worst_deviation(found), **described),
        ledger.measurement(
            "the same on claims that alignment left out",
            max(abs(each["held_out_deviation"]) for each in found),
            **described,
        ),
        ledger.measurement(
            "largest |deviation| of a single seed",
            max(each["largest_of_seed"] for each in found),
            unit=described["unit"],
            source="means over the prompts of either opinion, against the law",
        ),
    ]
    examples = [each for each in found if each["share"] == EXAMPLE and each["reference"] == 0.5]
    for method in dict.fromkeys(each["method"] for each in examples):
        at = min((each for each in examples if each["method"] == method), key=lambda each: each["beta"])
        entries.append(
            ledger.measurement(
                f"agreement after {method}, p = {EXAMPLE}, β = {at['beta']:g}",
                at["mean"],
                at["low"],
                at["high"],
                unit="probability",
                source=f"a GPT-2 from π_ref = ½, Student's interval over seeds; the law is {at['law']:.4f}",
            )
        )
    return entries


def _of_best(table: dict[str, Any], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = [(row["n"], abs(row["z"])) for each in best for row in each["sizes"] if row["z"] is not None]
    sampled = ledger.test(
        "largest |z| of sampled best-of-n, GPT-2",
        max((z for _, z in known), default=0.0),
        at_most=4,
        wrong=6.4,  # at n = 1, of a sampler that agrees with 55 for 50%
        unit="standard errors",
        source=f"{best[0]['draws']} times for each n; n = {', '.join(f'{n}' for n in sorted({n for n, _ in known}))}: "
        f"{EXPECTED} of either kind are expected",
    )
    return [
        ledger.identity(
            "largest |best-of-n agreement − (1 − (1 − π_ref)ⁿ)| on a table",
            table["best_of_n_error"],
            tolerance=1e-12,
            unit="probability",
            source="the exact law of best-of-n",
        ),
        *([sampled] if known else []),
    ]
