"""The numbers on the attention of a T5 over number names, and the tests of what `attention_maps` claims."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.stats

from experiments import ledger, statistics
from experiments.parts import attention_corpus as corpora
from experiments.parts.attention_corpus import KINDS, Corpus
from jaxrl_llm.analysis import word_alignment
from jaxrl_llm.analysis.bootstrap import Interval, bootstrap_interval

SHORT, LONG = (1, 2), (7, 9)  # English words of short and long names
BOUND = 0.05  # of the best head: the largest alignment error rate, and the largest share of inversions missed
ENOUGH = 25  # names, below which a bootstrap interval is too narrow to be shown
OCH_AND_NEY = "Och and Ney 2003, against the gold alignment of jaxrl_llm.data.number_names"
CROSSED = "the unit's row has its largest weight on the unit, the ten's on the ten"

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """The held-out names, the head that the training names choose, and how intervals over names are drawn."""

    held_out: Corpus
    best: tuple[int, int]
    seed: int
    resamples: int

    def interval(self, values: np.ndarray, statistic: Any = np.mean) -> Interval:
        """Return a statistic of the names with its 95% bootstrap interval."""
        return bootstrap_interval(values, statistic, seed=self.seed, resamples=self.resamples)

    def error_rate(self, counts: np.ndarray) -> Interval:
        """Return the alignment error rate of a corpus, with its interval over the names."""
        return self.interval(counts, word_alignment.alignment_error_rate)


def at(interval: Interval, *place: int) -> dict[str, float]:
    """Return one place of an interval of arrays."""
    return {name: float(each[place]) for name, each in interval._asdict().items()}


def every(study: Study) -> list[Entry]:
    """Return all numbers, identities and tests first."""
    return [
        *exactness(study),
        *best_head(study),
        *hypotheses(study),
        *comparisons(study),
        *layers(study),
        *lengths(study),
    ]


def exactness(study: Study) -> list[Entry]:
    """Check that rows sum to 1 where they should, and that weights are 0 elsewhere."""
    sums, elsewhere = 0.0, 0.0
    for kind in KINDS:
        weights, allowed = study.held_out.weights[kind], study.held_out.allowed[kind]
        rows = np.broadcast_to(allowed.any(axis=-1)[None, :, None], weights.shape[:-1])
        sums = max(sums, float(np.abs(weights.sum(axis=-1, dtype=float) - 1)[rows].max()))
        elsewhere = max(elsewhere, float(np.where(allowed[None, :, None], 0, weights).max()))
    shared = {"unit": "weight", "source": "softmax over the allowed keys; T5.attention"}
    return [
        ledger.identity("largest error of a row's sum", sums, tolerance=1e-5, **shared),
        ledger.identity("largest weight on padding or on what is not yet written", elsewhere, tolerance=0.0, **shared),
    ]


def best_head(study: Study) -> list[Entry]:
    """Test that the head chosen on training names aligns held-out ones, and crosses over where the gold does."""
    error = study.error_rate(corpora.counts(study.held_out)[:, *study.best])
    crossings = corpora.inversions(study.held_out, *study.best)
    crossed = study.interval(crossings, _ratio)
    rate, found = ({"unit": "error rate", "source": OCH_AND_NEY}, {"unit": "share", "source": CROSSED})
    names = "alignment error rate, best head", "inversions found, best head"
    return [
        ledger.test(f"{names[0]}, upper end of its interval", error.high, at_most=BOUND, wrong=0.14, **rate),
        ledger.test(f"{names[1]}, lower end of its interval", crossed.low, at_least=1 - BOUND, wrong=0.86, **found),
        _estimate(names[0], error, **rate),
        _estimate(names[1], crossed, **found),
        ledger.measurement("inverted tens", int(crossings[:, 1].sum()), unit="places", source="held-out names"),
    ]


def hypotheses(study: Study) -> list[Entry]:
    """Test four differences whose directions are fixed here: one-sided over the names, Holm's correction for all."""
    held_out = study.held_out
    encoder, relative = (
        corpora.entropies(held_out, "encoder", normalised=normalised).mean(axis=2) for normalised in (False, True)
    )
    errors = word_alignment.alignment_error_rate(corpora.counts(held_out)[None]).mean(axis=2)  # each name a corpus
    falls, grows = "Wilcoxon's signed-rank test", "Spearman's rank correlation with English words"
    p_values = {
        "encoder attention is sharper in its last layer": (
            statistics.above_zero(encoder[:, 0] - encoder[:, -1]),
            falls,
        ),
        "cross-attention aligns better in its last layer": (statistics.above_zero(errors[:, 0] - errors[:, -1]), falls),
        "the encoder's entropy grows with length": (_grows(held_out.lengths, encoder), grows),
        "the encoder's relative entropy grows with length": (_grows(held_out.lengths, relative), grows),
    }
    adjusted = statistics.holm([p for p, _ in p_values.values()])
    how = "over the names, one-sided, Holm-corrected for four tests"
    return [
        ledger.test(name, p, at_most=0.05, wrong=0.5, unit="p-value", source=f"{source} {how}")
        for (name, (_, source)), p in zip(p_values.items(), adjusted, strict=True)
    ]


def _grows(lengths: np.ndarray, values: np.ndarray) -> float:
    """Return the one-sided p-value of values [name, layer] whose mean does not grow with length."""
    return float(scipy.stats.spearmanr(lengths, values.mean(axis=1), alternative="greater").pvalue)


def comparisons(study: Study) -> list[Entry]:
    """Measure what the best head is held against, what it misses, and whether the model predicts the words."""
    held_out = study.held_out
    late = study.error_rate(corpora.counts(held_out, late=True)[:, *study.best])
    order = study.error_rate(corpora.in_order(held_out))
    misses = study.interval(corpora.misses(held_out, *study.best), _ratio)
    predicted = float(held_out.predicted.sum() / held_out.target_words.sum())
    rate = {"unit": "error rate", "source": OCH_AND_NEY}
    return [
        _estimate("alignment error rate of a head that keeps the order", order, **rate),
        _estimate("alignment error rate, best head, words read one row late", late, **rate),
        _estimate('rows off the gold alignment that are "und", best head', misses, unit="share", source=OCH_AND_NEY),
        ledger.measurement("words predicted given those before", predicted, unit="share", source="teacher forcing"),
    ]


def layers(study: Study) -> list[Entry]:
    """Measure the first and the last layer: sharpness of encoder and cross-attention, and alignment."""
    entries, counts = [], corpora.counts(study.held_out)
    for which, layer in (("first", 0), ("last", -1)):
        for kind in ("encoder", "cross"):
            values = corpora.entropies(study.held_out, kind)[:, layer].mean(axis=1)
            entries.append(_mean(f"entropy of {kind} attention, {which} layer", values))
        rate = study.interval(counts[:, layer], _mean_error_rate)
        name = f"alignment error rate, mean of the {which} layer's heads"
        entries.append(_estimate(name, rate, unit="error rate", source=OCH_AND_NEY))
    return entries


def lengths(study: Study) -> list[Entry]:
    """Measure short and long names: the best head's error rate, and the entropies."""
    counts, entries = corpora.counts(study.held_out)[:, *study.best], []
    for which, (least, most) in (("short", SHORT), ("long", LONG)):
        chosen = (study.held_out.lengths >= least) & (study.held_out.lengths <= most)
        name, source = f"alignment error rate, best head, {which} names", f"names of {least} to {most} English words"
        rate = study.error_rate(counts[chosen])
        entries.append(_estimate(name, rate, unit="error rate", source=source, names=int(chosen.sum())))
        for kind, normalised in (("encoder", False), ("encoder", True), ("cross", False)):
            values = corpora.entropies(study.held_out, kind, normalised=normalised).mean(axis=(1, 2))[chosen]
            name = f"{'relative ' if normalised else ''}entropy of {kind} attention, {which} names"
            entries.append(_mean(name, values, "share of log n" if normalised else "nats"))
    return entries


def _mean_error_rate(counts: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean error rate of some heads."""
    return word_alignment.alignment_error_rate(counts, axis).mean(axis=-1)


def _ratio(counts: np.ndarray, axis: int) -> np.ndarray:
    """Return the ratio of two summed counts, and 0 where the second is 0."""
    part, whole = np.moveaxis(counts.sum(axis=axis), -1, 0)
    return part / np.maximum(whole, 1)


def _mean(name: str, values: np.ndarray, unit: str = "nats") -> Entry:
    mean, low, high = statistics.student(values)
    source = "mean over the heads; mean of the names, interval of Student's t"
    return ledger.measurement(name, mean, unit=unit, source=source, confidence=(low, high))


def _estimate(name: str, found: Interval, *, unit: str, source: str, names: int = ENOUGH) -> Entry:
    """Return an estimate, with its bootstrap interval where there are enough names for one."""
    confidence = (found.low, found.high) if names >= ENOUGH else None
    return ledger.measurement(name, found.estimate, unit=unit, source=source, confidence=confidence)
