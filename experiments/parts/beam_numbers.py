"""Measurements of the hypotheses of `experiments/beam_search.py`, and the tests of its claim."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from experiments import ledger
from experiments.parts.endless import endless
from experiments.statistics import above_zero, holm, student
from jaxrl_llm import models, text
from jaxrl_llm.analysis.diversity import distinct_n, seq_rep_n
from jaxrl_llm.decoding import generate

Found = dict[tuple, dict[str, np.ndarray]]  # by settings


def per_prompt(config: Any, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what is measured of each prompt's hypotheses, [prompt]: of the best one, and of all k together."""
    n = config.measured_n
    return {
        "log_prob": found["log_prob"][:, 0].astype(float),
        "mean_log_prob": found["log_prob"].mean(axis=1).astype(float),
        "repeated": np.asarray([seq_rep_n(rows[:1], n) for rows in found["tokens"]]),
        "distinct": np.asarray([distinct_n(list(rows), n) for rows in found["tokens"]]),
        "relevance": found["relevance"][:, 0].astype(float),
    }


def greedy_tokens(config: Any, loaded: models.Loaded, prompts: list[list[int]]) -> np.ndarray:
    """Decode the prompts greedily, by `generate`."""
    padded, mask = text.left_pad(prompts)
    options = {"prompt_mask": mask, "max_new_tokens": config.new_tokens, "greedy": True}
    return np.asarray(generate(endless(loaded), loaded.params, padded, **options).tokens)


def blocked_again(prompts: list[list[int]], tokens: np.ndarray, n: int) -> int:
    """Count the new tokens that complete an n-gram which the prompt and the text before them contain already."""
    count = 0
    for prompt, rows in zip(prompts, tokens.tolist(), strict=True):
        for row in rows:
            whole = [*prompt, *row]
            grams = [tuple(whole[end - n : end]) for end in range(n, len(whole) + 1)]
            first_new = max(len(prompt) - n + 1, 0)
            count += sum(grams[i] in grams[:i] for i in range(first_new, len(grams)))
    return count


def identities(config: Any, loaded: models.Loaded, prompts: list[list[int]], found: Found) -> list[dict[str, Any]]:
    """Return what holds of every run, whatever the model."""
    greedy = greedy_tokens(config, loaded, prompts)
    one, apart = found[(1, 0, 1, 0.0)]["tokens"], found[(config.beams, 0, config.beams, 0.0)]["tokens"]
    again = sum(blocked_again(prompts, each["tokens"], s[1]) for s, each in found.items() if s[1])
    beams = [rows for settings, each in found.items() if settings[2] == 1 for rows in each["tokens"].tolist()]
    alike = sum(len(rows) - len(set(map(tuple, rows))) for rows in beams)
    return [
        ledger.identity(
            "tokens of beam search with k = 1 that are not greedy's",
            int((one[:, 0] != greedy).sum()),
            tolerance=0,
            unit=f"of {greedy.size}",
            source="decoding.generate, greedy",
        ),
        ledger.identity(
            f"tokens of {config.beams} groups of one beam with factor 0 that are not greedy's",
            int((apart != greedy[:, None]).sum()),
            tolerance=0,
            unit=f"of {apart.size}",
            source="without a penalty the groups do not see each other (Vijayakumar et al. 2018)",
        ),
        ledger.identity(
            "n-grams repeated where they are blocked",
            again,
            tolerance=0,
            unit="new tokens that complete one",
            source="all hypotheses, prompt included",
        ),
        ledger.identity(
            "hypotheses of a prompt that are the same, without groups",
            alike,
            tolerance=0,
            unit="hypotheses",
            source="the beams of a search are different texts",
        ),
        ledger.identity(
            "largest error of a hypothesis's Σ log p",
            float(max(np.abs(each["log_prob"] - each["rescored"]).max() for each in found.values())),
            tolerance=1e-3,
            unit="nats",
            source="a forward pass without a cache, in float32",
        ),
    ]


def gain(beams: int) -> str:
    """Return the name of what so many beams gain over greedy decoding."""
    return f"log-probability of the best hypothesis, k = {beams} − greedy"


def cost(config: Any) -> str:
    """Return the name of what blocking costs."""
    return f"log-probability of the best hypothesis, k = {config.beams} − with {config.block}-grams blocked"


def differences(config: Any, measured: dict[tuple, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the differences of log-probability that the claim says are positive, by prompt."""
    best = {settings: each["log_prob"] for settings, each in measured.items()}
    greedy, plain = best[(1, 0, 1, 0.0)], best[(config.beams, 0, 1, 0.0)]
    widest = max(config.widths)
    return {
        gain(config.beams): plain - greedy,
        gain(widest): best[(widest, 0, 1, 0.0)] - greedy,
        cost(config): plain - best[(config.beams, config.block, 1, 0.0)],
    }


def tests(config: Any, measured: dict[tuple, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return a test of each difference: at a level of 5% for all of them together."""
    found = differences(config, measured)
    return [
        ledger.test(
            f"p-value: {name}",
            p_value,
            at_most=0.05,
            wrong=0.5,
            unit="",
            source=f"one-sided Wilcoxon signed-rank test over prompts, Holm over {len(found)}",
        )
        for name, p_value in zip(found, holm([above_zero(each) for each in found.values()]), strict=True)
    ]


def measurements(config: Any, measured: dict[tuple, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return means over prompts, with their intervals."""
    k, n = config.beams, config.measured_n
    ladder = [measured[(beams, 0, 1, 0.0)]["log_prob"] for beams in sorted(config.widths)]
    worse = np.stack([after < before - 1e-3 for before, after in itertools.pairwise(ladder)]).mean(axis=0)
    greedy, plain = measured[(1, 0, 1, 0.0)], measured[(k, 0, 1, 0.0)]
    values = {
        **{name: (each, "nats per sequence") for name, each in differences(config, measured).items()},
        "steps of k at which the wider beam is worse": (worse, "share, drops of more than 0.001 nats"),
        f"repeated {n}-grams of the best hypothesis, greedy": (greedy["repeated"], "share"),
        f"repeated {n}-grams of the best hypothesis, k = {k}": (plain["repeated"], "share"),
    }
    entries = []
    for name, (each, unit) in values.items():
        mean, low, high = student(each)
        source = f"mean over {len(each)} prompts; interval of Student's t"
        entries.append(ledger.measurement(name, mean, unit=unit, source=source, confidence=(low, high)))
    return entries
