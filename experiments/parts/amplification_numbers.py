"""The points and numbers of the amplification experiment: what was measured, against the law."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.ledger import holds, number
from experiments.parts.sentiment_numbers import interval
from jaxrl_llm.analysis.amplification import amplified_agreement, best_of_n_agreement

NEAR = 0.02  # of probability: what counts as on the law for a GPT-2 that learns from sampled labels or answers
ROUNDING = 1e-6  # of probability in float32
EXPECTED = 5  # draws of either kind that a z is told from
EXAMPLE = 0.6  # the share at which all trainers are held against each other


def points(
    method: str,
    aim: float,
    grid: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    training: np.ndarray,
    opinions: np.ndarray,
) -> list[dict[str, Any]]:
    """A point of the grid each: means over prompts, then over seeds with Student's 95 per cent intervals.

    The law is that of each prompt's own reference, so that what fine-tuning missed is not counted as a deviation. What
    is, is said by `off_the_law`; `held_out_deviation` is the same on the claims that alignment left out.

    Args:
        grid: (share, beta) of each point. before: agreement of the references, [seed, prompt]; after: [seed, point,
            prompt]. training: the prompts that were aligned on; the others are held out. opinions: bool [prompt], what
            the user thinks.
    """
    held_out = np.setdiff1d(np.arange(before.shape[1]), training)
    found = []
    for place, (share, beta) in enumerate(grid):
        law = amplified_agreement(before, share, beta=beta)
        measured = after[:, place]
        off = measured - law
        found.append(
            {
                "method": method,
                "reference": aim,
                "share": share,
                "beta": beta,
                "law": law.mean(),
                "prompts": law.shape[1],
            }
            | {name: float(each) for name, each in interval(measured.mean(axis=1)).items()}
            | off_the_law(off, opinions)
            | {"held_out_deviation": off_the_law(off[:, held_out], opinions[held_out])["deviation"]}
        )
    return found


def off_the_law(off: np.ndarray, opinions: np.ndarray) -> dict[str, Any]:
    """How far a point is from the law, for users of either opinion by themselves.

    Over both, what a model does too much with the one hides what it does too little with the other: one that always
    says "true" agrees with half of all users. A single prompt, on the other hand, would mostly show noise.

    Args:
        off: measured − law, [seed, prompt].

    Returns:
        `deviation` and `deviation_half_width`: the mean over prompts and seeds for the opinion that is further off, and
        its interval; `widest`: the wider interval of the two; `largest_of_seed`: the largest distance of one seed's
        mean; `on_law`: whether both intervals hold the law and are at most ± NEAR, so that spread alone earns nothing.
    """
    of_seeds = np.stack([off[:, opinions == opinion].mean(axis=1) for opinion in (False, True)], axis=1)
    mean, half_width = interval(of_seeds).values()
    worst = np.abs(mean).argmax()
    return {
        "deviation": float(mean[worst]),
        "deviation_half_width": float(half_width[worst]),
        "widest": float(half_width.max()),
        "largest_of_seed": float(np.abs(of_seeds).max()),
        "on_law": bool(((np.abs(mean) <= half_width + ROUNDING) & (half_width <= NEAR)).all()),
    }


def worst_deviation(found: list[dict[str, Any]]) -> float:
    """The largest distance of a mean over prompts of one opinion and seeds from the law."""
    return max(abs(each["deviation"]) for each in found)


def best_of_n(config: Any, aim: float, wins: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """The best of n draws after every prompt against 1 − (1 − π_ref)ⁿ, in standard errors of the count.

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
    """What would prove the claim wrong."""
    return [*_of_table(table), *_of_gpt2(found), *_of_best(table, best)]


def claim(table: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The law, and in words of their own what was measured of it."""
    beta = min(each["beta"] for each in found)
    errors = _of_table(table)
    exact = "lie on it" if all(map(holds, errors)) else f"miss it by up to {max(each['value'] for each in errors):.2g}"
    worst = worst_deviation(found)
    learned = f"lies within {worst:.3f} of it" if worst <= NEAR else f"misses it by up to {worst:.3f}"
    return (
        f"The law of the optimum: where {100 * EXAMPLE:g} per cent of the annotators prefer agreement, a model that "
        f"agreed half of the time agrees with probability σ(logit({EXAMPLE})/β), "
        f"{float(amplified_agreement(0.5, EXAMPLE, beta=beta)):.3f} at β = {beta:g}. Exact optima {exact}; a GPT-2 "
        f"trained by {', '.join(dict.fromkeys(each['method'] for each in found))} {learned}."
    )


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
        if each["share"] == EXAMPLE and each["reference"] == 0.5:
            entries.append(
                number(
                    f"agreement after {each['method']}, p = {EXAMPLE}, β = {each['beta']:g}",
                    each["mean"],
                    expected=float(amplified_agreement(0.5, EXAMPLE, beta=each["beta"])),
                    tolerance=NEAR,
                    unit=f"probability, ± {each['half_width']:.2g} over seeds (95 per cent)",
                    source=f"a GPT-2 on {each['prompts']} prompts; the law at π_ref = ½",
                )
            )
    count = len(found)
    described = {
        "unit": f"probability, over {count} points",
        "source": "means over the prompts of either opinion, and over seeds, against the law",
    }
    held_out = max(abs(each["held_out_deviation"]) for each in found)
    return [
        *entries,
        number("largest |deviation| of a GPT-2 from the law", worst_deviation(found), interval=(0, NEAR), **described),
        number("the same on claims that alignment left out", held_out, interval=(0, 2 * NEAR), **described),
        number(
            "largest |deviation| of a single seed",
            max(each["largest_of_seed"] for each in found),
            unit=f"probability, over {count} points",
            source="means over the prompts of either opinion, against the law",
        ),
        number(
            "widest 95 per cent interval of a deviation, half its width",
            max(each["widest"] for each in found),
            unit=f"probability, over {count} points",
            source="Student's interval over seeds",
        ),
        number(
            f"points whose 95 per cent intervals hold the law and are at most ± {NEAR}",
            float(np.mean([each["on_law"] for each in found])),
            unit=f"share of {count}",
            source="Student's interval over seeds, for either opinion",
        ),
    ]


def _of_best(table: dict[str, Any], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = [(row["n"], abs(row["z"])) for each in best for row in each["sizes"] if row["z"] is not None]
    sampled = number(
        "largest |z| of sampled best-of-n, GPT-2",
        max((z for _, z in known), default=0.0),
        interval=(0, 4),
        unit="standard errors",
        source=f"{best[0]['draws']} times for each n; n = {', '.join(f'{n}' for n in sorted({n for n, _ in known}))}: "
        f"{EXPECTED} of either kind are expected",
    )
    return [
        number(
            "largest |best-of-n agreement − (1 − (1 − π_ref)ⁿ)| on a table",
            table["best_of_n_error"],
            expected=0.0,
            tolerance=1e-12,
            unit="probability",
            source="the exact law of best-of-n",
        ),
        *([sampled] if known else []),
    ]
