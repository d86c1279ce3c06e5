"""Beam search: what the number of beams, n-gram blocking and a diversity factor change in the text.

    python -m experiments.beam_search --preset quick
    python -m experiments.beam_search --model smollm2-135m-instruct

The exercise is k = 3 and 25 tokens after "I have a dream"; then also blocking of repeated 2-grams; then also three
groups with a Hamming factor of 0.1. Around it k, n and the factor are varied, over the beginnings of known works too
(`experiments.parts.passages`). The search has no randomness: the prompts are the sample. Ending tokens are removed from
the distribution (`experiments.parts.endless`), so that every hypothesis has 25 tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments import command
from experiments.parts import beam_numbers
from experiments.parts.endless import endless, log_probs
from experiments.parts.passages import PASSAGES, chosen, first_tokens
from experiments.statistics import student
from jaxrl_llm import models, text
from jaxrl_llm.decoding.beam import beam_search

PROMPT = "I have a dream"


@dataclasses.dataclass(frozen=True)
class Config:
    """The exercise's settings, and what is varied around them."""

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


PRESETS = {
    "quick": Config(passages=11, widths=(1, 3, 8), blocks=(0, 2), factors=(0.0, 0.5)),
    "full": Config(),
}
Settings = tuple[int, int, int, float]  # beams, blocked n, groups, diversity factor


def run(config: Config) -> dict[str, Any]:
    """Search with every setting, measure all hypotheses, and check them against forward passes."""
    loaded = models.load(config.model)
    works = first_tokens(loaded.tokenizer, chosen(config.passages), config.prompt_tokens)
    prompts = [text.encode(loaded.tokenizer, PROMPT), *works.tolist()]
    sweeps = settings_of(config)
    wanted = [*(each for sweep in sweeps.values() for each in sweep), *examples_of(config).values()]
    found = {each: searched(config, loaded, prompts, each) for each in dict.fromkeys(wanted)}
    measured = {each: beam_numbers.per_prompt(config, hypotheses) for each, hypotheses in found.items()}
    numbers = [
        *beam_numbers.identities(config, loaded, prompts, found),
        *beam_numbers.tests(config, measured),
        *beam_numbers.measurements(config, measured),
    ]
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
    """Return what is tested, with its size, in two sentences."""
    value = {entry["name"]: entry["value"] for entry in numbers}
    k, widest, n = config.beams, max(config.widths), config.block
    return (
        f"With {k} beams {config.model} finds texts that are on average {value[beam_numbers.gain(k)]:.1f} nats more "
        f"probable than greedy ones, and with {widest} beams {value[beam_numbers.gain(widest)]:.1f} nats "
        f"({config.passages + 1} prompts, {config.new_tokens} tokens). Blocking repeated {n}-grams costs "
        f"{value[beam_numbers.cost(config)]:.1f} nats at {k} beams."
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
        log_probs(endless(loaded), loaded.params, each, flat).sum(axis=1).reshape(-1, beams)
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


if __name__ == "__main__":
    command.main("beam_search", run, PRESETS)
