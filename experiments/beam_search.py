"""Beam search: what the number of beams, n-gram blocking and a diversity factor change in the text.

    python -m experiments.beam_search --preset quick
    python -m experiments.beam_search --model smollm2-135m-instruct

The exercise is k = 3 and 25 tokens after "I have a dream"; then also blocking of repeated 2-grams; then also three
groups with a Hamming factor of 0.1. Around it k, n and the factor are varied, over the beginnings of known works too
(`experiments.passages`). The search has no randomness: the prompts are the sample. Ending tokens are removed from
the distribution (`experiments.endless`), so that every hypothesis has 25 tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from experiments import ledger
from experiments.endless import endless
from experiments.frame import experiment
from experiments.passages import PASSAGES, chosen, first_tokens
from experiments.statistics import above_zero, significant, student
from jaxrl_llm import models, text
from jaxrl_llm.analysis.diversity import distinct_n, seq_rep_n
from jaxrl_llm.decoding import generate
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.scoring import completion_log_probs

PROMPT = "I have a dream"
Found = dict[tuple, dict[str, np.ndarray]]  # by settings


@dataclasses.dataclass(frozen=True)
class Config:
    """The exercise's settings, and the settings that vary around them."""

    model: str = "tiny-gpt2"
    passages: int = len(PASSAGES)
    """Works whose beginnings are prompts, beside the exercise's."""
    prompt_tokens: int = 12
    """Tokens of a work that are its prompt."""
    new_tokens: int = 25
    beams: int = 3
    block: int = 2
    factor: float = 0.1
    widths: tuple[int, ...] = (1, 2, 3, 5, 8, 16)
    blocks: tuple[int, ...] = (0, 4, 3, 2, 1)
    factors: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
    measured_n: int = 2
    """Length of the n-grams whose repeats are counted."""


Settings = tuple[int, int, int, float]  # beams, blocked n, groups, diversity factor


@experiment(quick=Config(passages=11, widths=(1, 3, 8), blocks=(0, 2), factors=(0.0, 0.5)), full=Config())
def run(config: Config) -> dict[str, Any]:
    """Search with every setting, measure all hypotheses, and check them against forward passes."""
    loaded = models.load(config.model)
    works = first_tokens(loaded.tokenizer, chosen(config.passages), config.prompt_tokens)
    prompts = [text.encode(loaded.tokenizer, PROMPT), *works.tolist()]
    sweeps = settings_of(config)
    wanted = [*(each for sweep in sweeps.values() for each in sweep), *examples_of(config).values()]
    found = {each: searched(config, loaded, prompts, each) for each in dict.fromkeys(wanted)}
    measured = {each: per_prompt(config, hypotheses) for each, hypotheses in found.items()}
    numbers = [*identities(config, loaded, prompts, found), *tests(config, measured), *measurements(config, measured)]
    data = {
        "model": config.model,
        "prompts": [loaded.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts],
        "new_tokens": config.new_tokens,
        "beams": config.beams,
        "block": config.block,
        "measured_n": config.measured_n,
        "widths": list(config.widths),
        "blocks": list(config.blocks),
        "factors": list(config.factors),
        "sweeps": {name: [summary(measured[each]) for each in sweep] for name, sweep in sweeps.items()},
        "examples": [{"title": title, **example(loaded, found[each])} for title, each in examples_of(config).items()],
    }
    return {"claim": claim(config, numbers), "numbers": numbers, "data": data}


def claim(config: Config, numbers: list[dict[str, Any]]) -> str:
    """Return the tested differences with their sizes."""
    value = {entry["name"]: entry["value"] for entry in numbers}
    k, widest, n = config.beams, max(config.widths), config.block
    return (
        f"With {k} beams {config.model} finds texts that are on average {value[gain(k)]:.1f} nats more "
        f"probable than greedy ones, and with {widest} beams {value[gain(widest)]:.1f} nats "
        f"({config.passages + 1} prompts, {config.new_tokens} tokens). Blocking repeated {n}-grams costs "
        f"{value[cost(config)]:.1f} nats at {k} beams."
    )


def settings_of(config: Config) -> dict[str, list[Settings]]:
    """Return the settings along which each of the three hyperparameters is varied."""
    return {
        "width": [(beams, 0, 1, 0.0) for beams in config.widths],
        "block": [(config.beams, n, 1, 0.0) for n in config.blocks],
        "factor": [(config.beams, 0, config.beams, factor) for factor in config.factors],
    }


def examples_of(config: Config) -> dict[str, Settings]:
    """Return the three searches of the exercise."""
    k, n, factor = config.beams, config.block, config.factor
    return {
        f"k = {k}": (k, 0, 1, 0.0),
        f"k = {k}, {n}-grams blocked": (k, n, 1, 0.0),
        f"k = {k}, {n}-grams blocked, {k} groups, factor {factor:g}": (k, n, k, factor),
    }


def searched(
    config: Config, loaded: models.Loaded, prompts: list[list[int]], settings: Settings
) -> dict[str, np.ndarray]:
    """Return the hypotheses of a setting, with their log-probability by forward passes after the prompt and after none.

    Raises:
        RuntimeError: if a hypothesis is missing or short.
    """
    beams, block, groups, factor = settings
    padded, mask = text.left_pad(prompts)
    result = beam_search(
        endless(loaded),
        loaded.params,
        padded,
        prompt_mask=mask,
        num_beams=beams,
        num_groups=groups,
        diversity_penalty=factor,
        no_repeat_ngram=block,
        max_new_tokens=config.new_tokens,
    )
    tokens = np.asarray(result.tokens)
    if not np.asarray(result.mask).all():
        raise RuntimeError(f"a hypothesis is missing or short with the settings {settings}.")
    flat = tokens.reshape(-1, config.new_tokens)
    owners = [prompt for prompt in prompts for _ in range(beams)]
    nothing = [text.encode(loaded.tokenizer, "")] * len(owners)
    after_prompt, after_nothing = (
        np.stack(completion_log_probs(endless(loaded), loaded.params, each, flat.tolist(), batch_size=64))
        .sum(axis=1)
        .reshape(-1, beams)
        for each in (owners, nothing)
    )
    return {
        "tokens": tokens,
        "log_prob": np.asarray(result.log_prob),
        "rescored": after_prompt,
        "relevance": (after_prompt - after_nothing) / config.new_tokens,
    }


def summary(measured: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return each measure's mean over prompts with its 95% interval of Student's t, and every log-probability."""
    fields = ("estimate", "low", "high")
    means = {name: dict(zip(fields, student(values), strict=True)) for name, values in measured.items()}
    return {**means, "log_probs": measured["log_prob"]}


def example(loaded: models.Loaded, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the hypotheses after the first prompt."""
    texts = [loaded.tokenizer.decode(row) for row in found["tokens"][0].tolist()]
    return {"texts": texts, "log_probs": found["log_prob"][0]}


# Measurements ---------------------------------------------------------------------------------------------------------


def per_prompt(config: Config, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the measures of each prompt's hypotheses, [prompt]: of the best one, and of all k together."""
    n = config.measured_n
    return {
        "log_prob": found["log_prob"][:, 0].astype(float),
        "mean_log_prob": found["log_prob"].mean(axis=1).astype(float),
        "repeated": np.asarray([seq_rep_n(rows[:1], n) for rows in found["tokens"]]),
        "distinct": np.asarray([distinct_n(list(rows), n) for rows in found["tokens"]]),
        "relevance": found["relevance"][:, 0].astype(float),
    }


def greedy_tokens(config: Config, loaded: models.Loaded, prompts: list[list[int]]) -> np.ndarray:
    """Decode the prompts greedily, by `generate`."""
    padded, mask = text.left_pad(prompts)
    options = {"prompt_mask": mask, "max_new_tokens": config.new_tokens, "greedy": True}
    return np.asarray(generate(endless(loaded), loaded.params, padded, **options).tokens)


def blocked_again(prompts: list[list[int]], tokens: np.ndarray, n: int) -> int:
    """Count the new tokens that complete an n-gram of the prompt and the text before them."""
    count = 0
    for prompt, rows in zip(prompts, tokens.tolist(), strict=True):
        for row in rows:
            whole = [*prompt, *row]
            grams = [tuple(whole[end - n : end]) for end in range(n, len(whole) + 1)]
            first_new = max(len(prompt) - n + 1, 0)
            count += sum(grams[i] in grams[:i] for i in range(first_new, len(grams)))
    return count


def identities(config: Config, loaded: models.Loaded, prompts: list[list[int]], found: Found) -> list[dict[str, Any]]:
    """Return the identities, which hold for every model."""
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
    """Return the name of the gain of `beams` beams over greedy decoding."""
    return f"log-probability of the best hypothesis, k = {beams} − greedy"


def cost(config: Config) -> str:
    """Return the name of the cost of blocking."""
    return f"log-probability of the best hypothesis, k = {config.beams} − with {config.block}-grams blocked"


def differences(config: Config, measured: dict[tuple, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the differences of log-probability that the claim says are positive, by prompt."""
    best = {settings: each["log_prob"] for settings, each in measured.items()}
    greedy, plain = best[(1, 0, 1, 0.0)], best[(config.beams, 0, 1, 0.0)]
    widest = max(config.widths)
    return {
        gain(config.beams): plain - greedy,
        gain(widest): best[(widest, 0, 1, 0.0)] - greedy,
        cost(config): plain - best[(config.beams, config.block, 1, 0.0)],
    }


def tests(config: Config, measured: dict[tuple, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return a test of each difference: at a level of 5% for all of them together."""
    found = differences(config, measured)
    p_values = {f"p-value: {name}": above_zero(each) for name, each in found.items()}
    source = f"one-sided Wilcoxon signed-rank test over prompts, Holm over {len(found)}"
    return significant(p_values, unit="", source=source)


def measurements(config: Config, measured: dict[tuple, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
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
        source = f"mean over {len(each)} prompts; interval of Student's t"
        entries.append(ledger.measurement(name, *student(each), unit=unit, source=source))
    return entries
