"""The numbers on the attention of a T5 over number names: what would prove the claims of `attention_maps` wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments import ledger
from experiments.parts import attention_corpus as corpora
from experiments.parts.attention_corpus import KINDS, Corpus
from jaxrl_llm.analysis import alignment
from jaxrl_llm.analysis.bootstrap import Interval, bootstrap_difference, bootstrap_interval

SHORT, LONG = (1, 2), (7, 9)  # English words of short and long names
BOUND = 0.05  # of the best head's alignment error rate
OCH_AND_NEY = "Och and Ney 2003, against the gold alignment of jaxrl_llm.data.number_names"
SHARES = {"itself": "own", "the previous word": "previous", "the next word": "next", "</s>": "last"}

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """The held-out names, the head that the training names choose, and how intervals over names are drawn."""

    held_out: Corpus
    best: tuple[int, int]
    seed: int
    resamples: int

    def interval(self, values: np.ndarray, statistic: Any = np.mean) -> Interval:
        """Over the names."""
        return bootstrap_interval(values, statistic, seed=self.seed, resamples=self.resamples)

    def error_rate(self, counts: np.ndarray) -> Interval:
        """Of a corpus, over its names."""
        return self.interval(counts, alignment.alignment_error_rate)


def at(interval: Interval, *place: int) -> dict[str, float]:
    """One place of an interval of arrays."""
    return {name: float(each[place]) for name, each in interval._asdict().items()}


def every(study: Study) -> list[Entry]:
    """All of them."""
    return [
        *exactness(study),
        *error_rates(study),
        *inversions(study),
        *words(study),
        *layers(study),
        *shares(study),
        *lengths(study),
    ]


def exactness(study: Study) -> list[Entry]:
    """Rows sum to 1 where they should, and weights are 0 elsewhere."""
    sums, elsewhere, padding = 0.0, 0.0, 0.0
    for kind in KINDS:
        weights, allowed = study.held_out.weights[kind], study.held_out.allowed[kind]
        rows = np.broadcast_to(allowed.any(axis=-1)[None, :, None], weights.shape[:-1])
        sums = max(sums, float(np.abs(weights.sum(axis=-1, dtype=float) - 1)[rows].max()))
        elsewhere = max(elsewhere, float(np.where(allowed[None, :, None], 0, weights).max()))
        padding = max(padding, float(np.where(rows[..., None], 0, weights).max()))
    shared = {"expected": 0.0, "unit": "weight", "source": "softmax over the allowed keys; T5.attention"}
    return [
        ledger.number("largest error of a row's sum", sums, tolerance=1e-5, **shared),
        ledger.number("largest weight on padding or on what is not yet written", elsewhere, tolerance=0.0, **shared),
        ledger.number("largest weight in the row of padding", padding, tolerance=0.0, **shared),
    ]


def error_rates(study: Study) -> list[Entry]:
    """Of the best head, of all, and of what they are to be held against."""
    counts = corpora.counts(study.held_out)
    best = study.error_rate(counts[:, *study.best])
    late = study.error_rate(corpora.counts(study.held_out, late=True)[:, *study.best])
    order = study.error_rate(corpora.in_order(study.held_out))
    heads = float(alignment.alignment_error_rate(counts).mean())
    rate = {"unit": "error rate", "source": OCH_AND_NEY}
    return [
        ledger.number("alignment error rate, best head", best.estimate, interval=(0.0, BOUND), **rate),
        ledger.number("alignment error rate, best head, upper end of its interval", best.high, **rate),
        ledger.number("alignment error rate, mean of all heads", heads, **rate),
        ledger.number("alignment error rate of a head that keeps the order", order.estimate, **rate),
        ledger.number("alignment error rate, best head, words read one row late", late.estimate, **rate),
    ]


def inversions(study: Study) -> list[Entry]:
    """How often the best head crosses over at "x-und-y"."""
    found = corpora.inversions(study.held_out, *study.best)
    every = [each for crossed in found.values() for each in crossed]
    below = [each for number, crossed in found.items() if 21 <= number <= 99 for each in crossed]
    crossed = {"unit": "share", "source": "the unit's row has its largest weight on the unit, the ten's on the ten"}
    name = "inversions found, best head"
    return [
        ledger.number(name, float(np.mean(every)), interval=(0.97, 1.0), **crossed),
        ledger.number("inverted tens", len(every), unit="places", source="held-out names"),
        ledger.number(f"{name}, 21 to 99", float(np.mean(below)), expected=1.0, tolerance=0.0, **crossed),
        ledger.number("inverted tens, 21 to 99", len(below), unit="names", source="held-out names"),
    ]


def words(study: Study) -> list[Entry]:
    """Which words are found; and whether the model predicts them, as it does what the maps are to explain."""
    held_out = study.held_out
    predicted = float(held_out.predicted.sum() / held_out.target_words.sum())
    entries = [ledger.number("words predicted given those before", predicted, unit="share", source="teacher forcing")]
    for name, found in corpora.aligned(held_out, *study.best).items():
        name = f"rows of {name} on a possible link, best head"
        entries.append(ledger.number(name, float(found.mean()), unit="share", source=OCH_AND_NEY))
    return entries


def layers(study: Study) -> list[Entry]:
    """How the first and the last layer differ, in each kind that has more than one."""
    entries, options = [], {"seed": study.seed, "resamples": study.resamples}
    for kind in KINDS:
        values = corpora.entropies(study.held_out, kind).mean(axis=2)
        if values.shape[1] > 1:
            name = f"entropy of {kind} attention"
            entries += [_mean(f"{name}, {which} layer", values[:, to]) for which, to in (("first", 0), ("last", -1))]
            found = bootstrap_difference(values[:, -1], values[:, 0], **options)
            entries.append(_difference(f"{name}, last layer − first", found, "nats"))
    if len(study.held_out.weights["cross"]) > 1:
        found = study.interval(corpora.counts(study.held_out), _last_less_first)
        entries.append(_difference("alignment error rate, mean of the last layer's heads − first", found, "error rate"))
    return entries


def _last_less_first(counts: np.ndarray, axis: int) -> np.ndarray:
    """How much larger the mean error rate of the last layer's heads is than that of the first's."""
    means = alignment.alignment_error_rate(counts, axis).mean(axis=-1)
    return means[..., -1] - means[..., 0]


def shares(study: Study) -> list[Entry]:
    """Where the encoder looks, in its first and its last layer."""
    parts = corpora.shares(study.held_out, "encoder")
    means = {
        f"encoder's weight on {name}, {which} layer": float(np.mean([head[kind] for head in parts[layer]]))
        for name, kind in SHARES.items()
        for which, layer in (("first", 0), ("last", -1))
    }
    source = "analysis.attention.shares, mean of the heads"
    return [ledger.number(name, value, unit="share", source=source) for name, value in means.items()]


def lengths(study: Study) -> list[Entry]:
    """How short and long names differ."""
    counts, entries = corpora.counts(study.held_out)[:, *study.best], []
    short, long = (
        (study.held_out.lengths >= least) & (study.held_out.lengths <= most) for least, most in (SHORT, LONG)
    )
    for which, (least, most), chosen in (("short", SHORT, short), ("long", LONG, long)):
        rate, source = study.error_rate(counts[chosen]), f"{chosen.sum()} names of {least} to {most} English words"
        name = f"alignment error rate, best head, {which} names"
        entries.append(ledger.number(name, rate.estimate, unit="error rate", source=source))
    for kind in KINDS:
        for relative, unit in (("", "nats"), ("relative ", "share of log n")):
            values = corpora.entropies(study.held_out, kind, normalised=bool(relative)).mean(axis=(1, 2))
            name = f"{relative}entropy of {kind} attention"
            entries += [_mean(f"{name}, {which}", values[of], unit) for which, of in (("short", short), ("long", long))]
            found = _unpaired(study, values[long], values[short])
            entries.append(_difference(f"{name}, long names − short", found, unit))
    return entries


def _unpaired(study: Study, first: np.ndarray, second: np.ndarray) -> Interval:
    """The difference of two means over different names, from resamples of each."""
    draws = []
    for index, values in enumerate((first, second)):
        rng = np.random.default_rng([study.seed, index])
        draws.append(rng.choice(values, (study.resamples, len(values))).mean(axis=1))
    low, high = np.quantile(draws[0] - draws[1], (0.025, 0.975))
    return Interval(float(first.mean() - second.mean()), float(low), float(high))


def _mean(name: str, values: np.ndarray, unit: str = "nats") -> Entry:
    return ledger.number(name, float(values.mean()), unit=unit, source="mean over the names and the heads")


def _difference(name: str, found: Interval, unit: str) -> Entry:
    """A difference whose sign is claimed if its interval has one: it must then exceed its error on that side."""
    if found.low > 0:
        bound = (found.estimate - found.low, None)
    else:
        bound = (None, found.estimate - found.high) if found.high < 0 else None
    source = f"95% bootstrap interval over the names: {found.low:.3f} to {found.high:.3f}"
    return ledger.number(name, found.estimate, interval=bound, unit=unit, source=source)
