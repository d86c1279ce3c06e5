"""What `experiments/beam_search.py` measures of its hypotheses, and what would prove its claim wrong."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from experiments import ledger
from experiments.parts.endless import endless
from jaxrl_llm import models, text
from jaxrl_llm.analysis.bootstrap import bootstrap_difference
from jaxrl_llm.analysis.diversity import distinct_n, seq_rep_n
from jaxrl_llm.decoding import generate


def per_prompt(config: Any, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is measured of each prompt's hypotheses, [prompt]: of the best one, and of all k together."""
    n = config.measured_n
    return {
        "log_prob": found["log_prob"][:, 0].astype(float),
        "mean_log_prob": found["log_prob"].mean(axis=1).astype(float),
        "repeated": np.asarray([seq_rep_n(rows[:1], n) for rows in found["tokens"]]),
        "distinct": np.asarray([distinct_n(list(rows), n) for rows in found["tokens"]]),
        "relevance": found["relevance"][:, 0].astype(float),
        "different": np.asarray([len({tuple(row) for row in rows.tolist()}) for rows in found["tokens"]], float),
    }


def greedy_tokens(config: Any, loaded: models.Loaded, prompts: list[list[int]]) -> np.ndarray:
    """Greedy decoding of the prompts, by `generate`."""
    padded, mask = text.left_pad(prompts)
    options = {"prompt_mask": mask, "max_new_tokens": config.new_tokens, "greedy": True}
    return np.asarray(generate(endless(loaded), loaded.params, padded, **options).tokens)


def blocked_again(prompts: list[list[int]], tokens: np.ndarray, n: int) -> int:
    """New tokens that complete an n-gram which the prompt and the text before them contain already."""
    count = 0
    for prompt, rows in zip(prompts, tokens.tolist(), strict=True):
        for row in rows:
            whole = [*prompt, *row]
            grams = [tuple(whole[end - n : end]) for end in range(n, len(whole) + 1)]
            first_new = max(len(prompt) - n + 1, 0)
            count += sum(grams[i] in grams[:i] for i in range(first_new, len(grams)))
    return count


def exact_numbers(
    config: Any, loaded: models.Loaded, prompts: list[list[int]], found: dict[tuple, dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """What holds of every run, whatever the model."""
    greedy = greedy_tokens(config, loaded, prompts)
    one, apart = found[(1, 0, 1, 0.0)], found[(config.beams, 0, config.beams, 0.0)]
    blocked = {
        n: sum(blocked_again(prompts, each["tokens"], n) for s, each in found.items() if s[1] == n)
        for n in config.blocks
        if n
    }
    plain = [each for settings, each in found.items() if settings[2] == 1]
    duplicates = sum(each["tokens"].shape[1] - per_prompt(config, each)["different"] for each in plain).sum()
    exact = {"expected": 0, "tolerance": 0}
    return [
        ledger.number(
            "tokens of beam search with k = 1 that are not greedy's",
            int((one["tokens"][:, 0] != greedy).sum()),
            unit=f"of {greedy.size}",
            source="decoding.generate, greedy",
            **exact,
        ),
        ledger.number(
            f"tokens of {config.beams} groups of one beam with factor 0 that are not greedy's",
            int((apart["tokens"] != greedy[:, None]).sum()),
            unit=f"of {apart['tokens'].size}",
            source="without a penalty the groups do not see each other (Vijayakumar et al. 2018)",
            **exact,
        ),
        *(
            ledger.number(
                f"{n}-grams repeated where {n}-grams are blocked",
                count,
                unit="new tokens that complete one",
                source="all hypotheses, prompt included",
                **exact,
            )
            for n, count in blocked.items()
        ),
        ledger.number(
            "hypotheses of a prompt that are the same, without groups",
            int(duplicates),
            unit="hypotheses",
            source="the beams of a search are different texts",
            **exact,
        ),
        ledger.number(
            "largest error of a hypothesis's Σ log p",
            float(max(np.abs(each["log_prob"] - each["rescored"]).max() for each in found.values())),
            expected=0.0,
            tolerance=1e-3,
            unit="nats",
            source="a forward pass without a cache",
        ),
    ]


def measured_numbers(config: Any, found: dict[tuple, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """What was measured of this model: means over prompts, and differences with their standard errors."""
    k, n = config.beams, config.measured_n
    measured = {settings: per_prompt(config, each) for settings, each in found.items()}
    greedy, plain = measured[(1, 0, 1, 0.0)], measured[(k, 0, 1, 0.0)]
    widest, blocked = measured[(max(config.widths), 0, 1, 0.0)], measured[(k, config.block, 1, 0.0)]
    groups = {factor: measured[(k, 0, k, factor)] for factor in config.factors}
    ladder = [measured[(beams, 0, 1, 0.0)]["log_prob"] for beams in sorted(config.widths)]
    worse = np.stack([after < before - 1e-3 for before, after in itertools.pairwise(ladder)])
    beaten = np.stack([each < ladder[0] - 1e-3 for each in ladder[1:]])
    best = "log-probability of the best hypothesis"

    def gain(name: str, more: np.ndarray, less: np.ndarray, unit: str = "nats per sequence") -> dict[str, Any]:
        """A paired difference that the claim says is positive: it must be larger than its own error."""
        value, low, _ = bootstrap_difference(more, less, seed=config.seed)
        source = f"{len(more)} prompts, paired; bound: from the estimate to the lower end of its 95% bootstrap interval"
        return ledger.number(name, value, interval=(value - low, None), unit=unit, source=source)

    def plain_number(name: str, value: float, unit: str) -> dict[str, Any]:
        return ledger.number(name, float(value), unit=unit, source=f"mean over {config.prompts} prompts")

    def share(name: str, value: float) -> dict[str, Any]:
        return ledger.number(
            name, float(value), interval=(0.0, 1.0), unit="share", source="drops of more than 0.001 nats"
        )

    top = config.factors[-1]
    return [
        plain_number(f"{best}, greedy", greedy["log_prob"].mean(), "nats per sequence"),
        plain_number(f"{best}, k = {k}", plain["log_prob"].mean(), "nats per sequence"),
        plain_number(f"{best}, greedy, per token", greedy["log_prob"].mean() / config.new_tokens, "nats per token"),
        plain_number(f"{best}, k = {k}, per token", plain["log_prob"].mean() / config.new_tokens, "nats per token"),
        gain(f"{best}, k = {k} − greedy", plain["log_prob"], greedy["log_prob"]),
        gain(f"{best}, k = {max(config.widths)} − greedy", widest["log_prob"], greedy["log_prob"]),
        gain(f"{best}, k = {k} − with {config.block}-grams blocked", plain["log_prob"], blocked["log_prob"]),
        share("prompts and steps of k at which the wider beam is worse", worse.mean()),
        share("prompts and k above 1 at which beam search is worse than greedy", beaten.mean()),
        plain_number(f"repeated {n}-grams of the best hypothesis, greedy", greedy["repeated"].mean(), "share"),
        plain_number(f"repeated {n}-grams of the best hypothesis, k = {k}", plain["repeated"].mean(), "share"),
        *(
            plain_number(f"distinct {n}-grams of {k} hypotheses, {name}", each["distinct"].mean(), "share")
            for name, each in (("one group", plain), *((f"{k} groups, factor {f:g}", groups[f]) for f in groups))
        ),
        gain(
            f"distinct {n}-grams, {k} groups, factor {top:g} − factor 0",
            groups[top]["distinct"],
            groups[0.0]["distinct"],
            "share",
        ),
    ]
