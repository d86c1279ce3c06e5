"""What the attention heads of tiny-t5 look at, against the gold alignment of number names; and tiny-gpt2's entropy.

    python -m experiments.attention_maps --preset quick    # some held-out names of each length
    python -m experiments.attention_maps --preset full     # all of them

The decoder reads the gold translation, so that its rows belong to the words of the gold alignment. The head that is
called the best is chosen on training names and measured on held-out ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts import attention_corpus as corpora  # noqa: E402
from experiments.parts import attention_numbers  # noqa: E402
from experiments.parts.attention_corpus import KINDS  # noqa: E402
from experiments.parts.attention_numbers import BOUND, Study, at  # noqa: E402
from experiments.parts.passages import PASSAGES  # noqa: E402
from jaxrl_llm import models, text  # noqa: E402
from jaxrl_llm.analysis import alignment, attention  # noqa: E402
from jaxrl_llm.analysis.bootstrap import Interval, bootstrap_interval  # noqa: E402
from jaxrl_llm.data import number_names  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "tiny-t5"
    text_model: str = "tiny-gpt2"
    per_length: int = 30  # held-out names of each length, as far as there are so many
    examples: tuple[int, int] = (81, 841_592)  # a short and a long held-out name, drawn in full
    passages: int = 20
    passage_tokens: int = 48
    resamples: int = 1000
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(per_length=200, passages=60)}


def run(config: Config) -> dict[str, Any]:
    """Measure every head over the held-out names, and draw two of them in full."""
    loaded, split = models.load(config.model), number_names.split()
    missing = sorted(set(config.examples) - set(split.held_out.tolist()))
    if missing:
        raise ValueError(f"examples must be held-out names, but {missing} are not.")
    options = {"per_length": config.per_length, "seed": config.seed}
    drawn = [*(corpora.stratified(part, **options) for part in split), np.asarray(config.examples)]
    together = corpora.read(loaded, np.concatenate(drawn))  # one program
    ends = np.cumsum([0, *map(len, drawn)])
    train, held_out, examples = (together.part(*place) for place in itertools.pairwise(ends))
    best = alignment.best_head(alignment.alignment_error_rate(corpora.counts(train)))
    study = Study(held_out, best, seed=config.seed, resamples=config.resamples)
    data = {
        "model": config.model,
        "names": len(held_out.pairs),
        "best": list(best),
        "bound": BOUND,
        "examples": [corpora.example(examples, number) for number in config.examples],
        "error_rates": by_head(study.error_rate(corpora.counts(held_out))),
        "entropy": {kind: by_layer(study, corpora.entropies(held_out, kind)) for kind in KINDS},
        "shares": {kind: corpora.shares(held_out, kind) for kind in ("encoder", "decoder")},
        "aligned": {name: float(each.mean()) for name, each in corpora.aligned(held_out, *best).items()},
        "lengths": by_length(study),
        "text": of_text(config),
    }
    numbers = attention_numbers.every(study)
    return {"claim": claim(config, numbers, study), "numbers": numbers, "data": ledger.rounded(data)}


def claim(config: Config, numbers: list[dict[str, Any]], study: Study) -> str:
    """In one sentence, by the numbers."""
    value = {entry["name"]: entry["value"] for entry in numbers}
    layer, head = study.best
    return (
        f"Cross-attention head {layer}.{head} of {config.model} finds the words of {len(study.held_out.pairs)} "
        f"unseen number names with an alignment error rate of {value['alignment error rate, best head']:.1%}, and in "
        f"{value['inversions found, best head']:.1%} of their inverted tens it looks first at the unit and then back "
        f"at the ten."
    )


# Intervals ------------------------------------------------------------------------------------------------------------


def by_head(interval: Interval) -> list[list[dict[str, float]]]:
    """An interval of arrays [layer, head] as nested lists."""
    layers, heads = interval.estimate.shape
    return [[at(interval, layer, head) for head in range(heads)] for layer in range(layers)]


def by_layer(study: Study, values: np.ndarray) -> dict[str, Any]:
    """Of values [name, layer, head], each head's mean, and each layer's with its interval."""
    interval = study.interval(values.mean(axis=2))
    return {"heads": values.mean(axis=0), "layers": [at(interval, layer) for layer in range(values.shape[1])]}


def by_length(study: Study) -> list[dict[str, Any]]:
    """For each number of English words: the best head's error rate, and each kind's entropy, absolute and relative."""
    counts, rows = corpora.counts(study.held_out)[:, *study.best], []
    values = {
        (kind, normalised): corpora.entropies(study.held_out, kind, normalised=normalised).mean(axis=(1, 2))
        for kind in KINDS
        for normalised in (False, True)
    }
    for words in np.unique(study.held_out.lengths):
        chosen = study.held_out.lengths == words
        row = {
            "words": int(words),
            "names": int(chosen.sum()),
            "error_rate": study.error_rate(counts[chosen])._asdict(),
        }
        for (kind, normalised), each in values.items():
            row[f"{kind}{'_normalised' if normalised else ''}"] = study.interval(each[chosen])._asdict()
        rows.append(row)
    return rows


def of_text(config: Config) -> dict[str, Any]:
    """The entropy of a decoder-only model's heads over passages of English, all of one length."""
    loaded = models.load(config.text_model)
    places = np.linspace(0, len(PASSAGES) - 1, config.passages).round().astype(int)
    rows = [text.encode(loaded.tokenizer, PASSAGES[place].text)[: config.passage_tokens] for place in places]
    tokens = jnp.asarray([row for row in rows if len(row) == config.passage_tokens], jnp.int32)
    weights = jax.jit(loaded.model.attention)(loaded.params, tokens)
    allowed = attention.allowed_keys(np.ones(tokens.shape, bool), causal=True)
    values = np.moveaxis(attention.mean_over_queries(attention.entropy(weights), allowed.any(axis=-1)), 1, 0)
    interval = bootstrap_interval(values.mean(axis=2), seed=config.seed, resamples=config.resamples)
    uniform = np.log(np.arange(1, config.passage_tokens + 1)).mean()
    return {
        "model": config.text_model,
        "passages": len(tokens),
        "tokens": config.passage_tokens,
        "uniform": float(uniform),
        "heads": values.mean(axis=0),
        "layers": [at(interval, layer) for layer in range(values.shape[1])],
    }


def main(preset: Literal["quick", "full"] = "quick", model: str | None = None) -> None:
    """Write `results/attention_maps.json`.

    Args:
        preset: quick takes some held-out names of each length, full all of them.
        model: another T5 of number names: a folder.
    """
    config = PRESETS[preset] if model is None else dataclasses.replace(PRESETS[preset], model=model)
    ledger.run_and_write("attention_maps", run, config, preset)


if __name__ == "__main__":
    tyro.cli(main)
