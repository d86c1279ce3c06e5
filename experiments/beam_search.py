"""Beam search: what the number of beams, n-gram blocking and a diversity factor change in the text.

    python -m experiments.beam_search --preset quick
    python -m experiments.beam_search --model smollm2-135m-instruct

The exercise is k = 3 and 25 tokens after "I have a dream"; then also blocking of repeated 2-grams; then also three
groups with a Hamming factor of 0.1. Around it k, n and the factor are varied, over several prompts. `full` has more of
them. Ending tokens are removed from the law (`experiments.parts.endless`), so that every hypothesis has 25 tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts.beam_numbers import exact_numbers, measured_numbers, per_prompt  # noqa: E402
from experiments.parts.endless import endless, log_probs  # noqa: E402
from jaxrl_llm import models, text  # noqa: E402
from jaxrl_llm.analysis.bootstrap import bootstrap_interval  # noqa: E402
from jaxrl_llm.decoding.beam import beam_search  # noqa: E402

PROMPTS = (
    "I have a dream",
    "In the beginning God created",
    "The jury said on Friday that",
    "My lord, the king is",
    "The children went out to play and",
    "It was a cold night, and the old man",
    "She opened the letter and",
    "The president of the company told",
    "What is the meaning of",
    "And it came to pass, that",
    "Once upon a time there was",
    "The history of the city begins",
    "He could not sleep, because",
    "Let us go up to the mountain,",
    "The new law will",
    "Love is not",
    "The river was high, and the boat",
    "To make good bread you",
    "When the war was over,",
    "There is no man who",
    "The doctor looked at the child and said,",
    "On the first day of summer",
    "Nothing in the world is",
    "The music stopped, and",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The exercise's settings, and what is varied around them."""

    model: str = "tiny-gpt2"
    prompts: int = 16
    new_tokens: int = 25
    beams: int = 3
    block: int = 2
    factor: float = 0.1
    widths: tuple[int, ...] = (1, 2, 3, 5, 8, 16)
    blocks: tuple[int, ...] = (0, 4, 3, 2, 1)
    factors: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
    measured_n: int = 2  # of the repeated and the distinct n-grams
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(prompts=len(PROMPTS))}
Settings = tuple[int, int, int, float]  # beams, blocked n, groups, diversity factor


def run(config: Config) -> dict[str, Any]:
    """Search with every setting, measure all hypotheses, and check them against forward passes."""
    loaded = models.load(config.model)
    prompts = [text.encode(loaded.tokenizer, prompt) for prompt in PROMPTS[: config.prompts]]
    sweeps = settings_of(config)
    wanted = [*(each for sweep in sweeps.values() for each in sweep), *examples_of(config).values()]
    found = {each: searched(config, loaded, prompts, each) for each in dict.fromkeys(wanted)}
    data = {
        "model": config.model,
        "prompts": list(PROMPTS[: config.prompts]),
        "new_tokens": config.new_tokens,
        "beams": config.beams,
        "widths": list(config.widths),
        "blocks": list(config.blocks),
        "factors": list(config.factors),
        "sweeps": {name: [summary(config, found[each]) for each in sweep] for name, sweep in sweeps.items()},
        "examples": [{"title": title, **example(loaded, found[each])} for title, each in examples_of(config).items()],
    }
    numbers = [*exact_numbers(config, loaded, prompts, found), *measured_numbers(config, found)]
    return {"claim": claim(config, numbers), "numbers": numbers, "data": ledger.rounded(data)}


def claim(config: Config, numbers: list[dict[str, Any]]) -> str:
    """What was measured, in two sentences."""
    value = {entry["name"]: entry["value"] for entry in numbers}
    k, n, best = config.beams, config.block, "log-probability of the best hypothesis"
    gain, cost = value[f"{best}, k = {k} − greedy"], value[f"{best}, k = {k} − with {n}-grams blocked"]
    repeated = value[f"repeated {config.measured_n}-grams of the best hypothesis, k = {k}"]
    worse = value["prompts and steps of k at which the wider beam is worse"]
    return (
        f"A beam of {k} finds text that {config.model} holds for more probable than greedy decoding's, by {gain:.1f} "
        f"nats on average, and {repeated:.0%} of its {config.measured_n}-grams are repeats; blocking {n}-grams leaves "
        f"none and costs {cost:.1f} nats. A wider beam helps on average, but is worse in {worse:.0%} of the cases."
    )


def settings_of(config: Config) -> dict[str, list[Settings]]:
    """The settings along which each of the three knobs is varied."""
    return {
        "width": [(beams, 0, 1, 0.0) for beams in config.widths],
        "block": [(config.beams, n, 1, 0.0) for n in config.blocks],
        "factor": [(config.beams, 0, config.beams, factor) for factor in config.factors],
    }


def examples_of(config: Config) -> dict[str, Settings]:
    """The three searches of the exercise."""
    k, n, factor = config.beams, config.block, config.factor
    return {
        f"k = {k}": (k, 0, 1, 0.0),
        f"k = {k}, {n}-grams blocked": (k, n, 1, 0.0),
        f"k = {k}, {n}-grams blocked, {k} groups, factor {factor:g}": (k, n, k, factor),
    }


def searched(
    config: Config, loaded: models.Loaded, prompts: list[list[int]], settings: Settings
) -> dict[str, np.ndarray]:
    """The hypotheses of a setting, with what forward passes say of them after the prompt and after no prompt."""
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


def summary(config: Config, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """The mean over prompts of each measure with its 95% bootstrap interval; of log-probability every prompt's too."""
    measured = per_prompt(config, found)
    intervals = {name: bootstrap_interval(values, seed=config.seed)._asdict() for name, values in measured.items()}
    return {**intervals, "log_probs": measured["log_prob"]}


def example(loaded: models.Loaded, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """The hypotheses after the first prompt."""
    texts = [loaded.tokenizer.decode(row) for row in found["tokens"][0].tolist()]
    return {"texts": texts, "log_probs": found["log_prob"][0]}


def main(preset: Literal["quick", "full"] = "quick", model: str = "tiny-gpt2") -> None:
    """Write `results/beam_search.json`, and `results/beam_search.<model>.json` for a model other than tiny-gpt2.

    Args:
        preset: full has more prompts.
        model: anything that `models.load` takes.
    """
    config = dataclasses.replace(PRESETS[preset], model=model)
    ledger.run_and_write(ledger.result_name("beam_search", model), run, config, preset)


if __name__ == "__main__":
    tyro.cli(main)
