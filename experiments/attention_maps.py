"""Compare the attention heads of tiny-t5 with the gold alignment of number names.

    python -m experiments.attention_maps --preset quick    # some held-out names of each length
    python -m experiments.attention_maps --preset full     # all of them, and 5 samples of training names

The decoder reads the gold translation, so that its rows belong to the words of the gold alignment. The best head is
the one with the smallest error on training names, which the seed draws; all that is said of it is measured on held-out
ones. The directions that are tested are written down in `experiments.parts.attention_numbers.hypotheses`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from experiments import command, ledger
from experiments.parts import attention_corpus as corpora
from experiments.parts import attention_numbers
from experiments.parts.attention_corpus import KINDS
from experiments.parts.attention_numbers import BOUND, ENOUGH, Study, at
from jaxrl_llm import models
from jaxrl_llm.analysis import word_alignment
from jaxrl_llm.analysis.bootstrap import Interval
from jaxrl_llm.data import number_names


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "tiny-t5"
    """A T5 of number names: a folder or a name."""
    per_length: int = 30
    """Names of each length, training and held-out, as far as there are so many."""
    example: int = 841_592
    """The held-out number whose maps are drawn."""
    resamples: int = 1000
    """Number of bootstrap samples."""
    seed: int = 0
    """Draws the names and the resamples."""


PRESETS = {"quick": Config(), "full": Config(per_length=200)}  # no length has more than 200 held-out names


def run(config: Config) -> dict[str, Any]:
    """Measure every head over the held-out names, and test what is claimed of them."""
    loaded, split = models.load(config.model), number_names.split()
    if config.example not in split.held_out:
        raise ValueError(f"example must be a held-out number, but {config.example} is not.")
    options = {"per_length": config.per_length, "seed": config.seed}
    drawn = [*(corpora.stratified(part, **options) for part in split), np.asarray([config.example])]
    together = corpora.read(loaded, np.concatenate(drawn))  # one program
    ends = np.cumsum([0, *map(len, drawn)])
    train, held_out, example = (together.part(*place) for place in itertools.pairwise(ends))
    best = word_alignment.best_head(word_alignment.alignment_error_rate(corpora.counts(train)))
    study = Study(held_out, best, seed=config.seed, resamples=config.resamples)
    data = {
        "model": config.model,
        "names": len(held_out.pairs),
        "best": list(best),
        "bound": BOUND,
        "example": corpora.example(example, config.example),
        "error_rates": by_head(study.error_rate(corpora.counts(held_out))),
        "entropy": {kind: by_layer(study, corpora.entropies(held_out, kind)) for kind in KINDS},
        "shares": corpora.shares(held_out, "encoder"),
        "lengths": by_length(study),
    }
    numbers = attention_numbers.every(study)
    return {"claim": claim(config, numbers, study), "numbers": numbers, "data": data}


def claim(config: Config, numbers: list[dict[str, Any]], study: Study) -> str:
    """Return the claim, in the numbers that were measured."""
    value = {entry["name"]: entry["value"] for entry in numbers}
    entropy, error = (
        [value[name.format(which)] for which in ("first", "last")]
        for name in ("entropy of encoder attention, {} layer", "alignment error rate, mean of the {} layer's heads")
    )
    layer, head = study.best
    return (
        f"Cross-attention head {layer}.{head} of {config.model}, chosen on training names, aligns "
        f"{len(study.held_out.pairs):,} held-out ones with {value['alignment error rate, best head']:.1%} error and "
        f"finds {value['inversions found, best head']:.1%} of the inversions. From first to last layer the encoder's "
        f"entropy goes from {entropy[0]:.2f} to {entropy[1]:.2f} nats, the heads' mean error from {error[0]:.0%} to "
        f"{error[1]:.0%}; the encoder's entropy grows with length."
    )


# Intervals ------------------------------------------------------------------------------------------------------------


def by_head(interval: Interval) -> list[list[dict[str, float]]]:
    """Return an interval of arrays [layer, head] as nested lists."""
    layers, heads = interval.estimate.shape
    return [[at(interval, layer, head) for head in range(heads)] for layer in range(layers)]


def by_layer(study: Study, values: np.ndarray) -> dict[str, Any]:
    """Return, of values [name, layer, head], each head's mean, and each layer's with its interval."""
    interval = study.interval(values.mean(axis=2))
    return {"heads": values.mean(axis=0), "layers": [at(interval, layer) for layer in range(values.shape[1])]}


def by_length(study: Study) -> list[dict[str, Any]]:
    """Return, for each number of English words, the best head's error rate and the encoder's entropy."""
    counts = corpora.counts(study.held_out)[:, *study.best]
    entropy, rows = corpora.entropies(study.held_out, "encoder").mean(axis=(1, 2)), []
    for words in np.unique(study.held_out.lengths):
        chosen = study.held_out.lengths == words
        row = {"words": int(words), "names": int(chosen.sum())}
        found = {"error_rate": study.error_rate(counts[chosen]), "entropy": study.interval(entropy[chosen])}
        for name, interval in found.items():
            row[name] = interval._asdict() if chosen.sum() >= ENOUGH else {"estimate": interval.estimate}
        rows.append(row)
    return rows


def named(name: str, config: Config) -> str:
    """Name the results of another model than tiny-t5 after it."""
    return name if config.model == "tiny-t5" else ledger.result_name(name, config.model)


if __name__ == "__main__":
    command.main("attention_maps", run, PRESETS, named=named, seeds=5)
