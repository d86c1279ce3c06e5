"""Compare the attention heads of tiny-t5 with the gold alignment of number names.

    python -m experiments.attention_maps --preset quick    # some held-out names of each length
    python -m experiments.attention_maps --preset full     # all of them, and 5 samples of training names

The decoder reads the gold translation, so that its rows belong to the words of the gold alignment. The best head is
the one with the smallest error on training names, which the seed draws; all that is said of it is measured on held-out
ones. The directions of the tests are fixed in `hypotheses`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import ledger, statistics
from experiments.frame import experiment
from jaxrl_llm import models
from jaxrl_llm.analysis import attention, word_alignment
from jaxrl_llm.analysis.bootstrap import Interval, bootstrap_interval
from jaxrl_llm.data import number_names

KINDS = ("encoder", "decoder", "cross")
SHORT, LONG = (1, 2), (7, 9)  # English words of short and long names
BOUND = 0.05  # of the best head: the largest alignment error rate, and the largest share of inversions missed
ENOUGH = 25  # names, below which a bootstrap interval is too narrow to be shown
OCH_AND_NEY = "Och and Ney 2003, against the gold alignment of jaxrl_llm.data.number_names"
CROSSED = "the unit's row has its largest weight on the unit, the ten's on the ten"
Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, the number of names, and the bootstrap."""

    model: str = "tiny-t5"
    """A T5 of number names: a folder or a name."""
    per_length: int = 30
    """The largest number of names of each length, training and held-out."""
    example: int = 841_592
    """The held-out number whose maps are drawn."""
    resamples: int = 1000
    """Number of bootstrap samples."""
    seed: int = 0
    """Draws the names and the resamples."""


def named(name: str, config: Config) -> str:
    """Name the results of another model than tiny-t5 after it."""
    return name if config.model == "tiny-t5" else ledger.result_name(name, config.model)


@experiment(quick=Config(), full=Config(per_length=200), seeds=5, named=named)
def run(config: Config) -> dict[str, Any]:
    """Measure every head over the held-out names, and test the claim."""
    loaded, split = models.load(config.model), number_names.split()
    if config.example not in split.held_out:
        raise ValueError(f"example must be a held-out number, but {config.example} is not.")
    options = {"per_length": config.per_length, "seed": config.seed}
    drawn = [*(stratified(part, **options) for part in split), np.asarray([config.example])]
    together = read(loaded, np.concatenate(drawn))  # one program
    ends = np.cumsum([0, *map(len, drawn)])
    train, held_out, example = (together.part(*place) for place in itertools.pairwise(ends))
    best = word_alignment.best_head(word_alignment.alignment_error_rate(alignment_counts(train)))
    study = Study(held_out, best, seed=config.seed, resamples=config.resamples)
    data = {
        "model": config.model,
        "names": len(held_out.pairs),
        "best": list(best),
        "bound": BOUND,
        "example": maps_of(example, config.example),
        "error_rates": by_head(study.error_rate(alignment_counts(held_out))),
        "entropy": {kind: by_layer(study, entropies(held_out, kind)) for kind in KINDS},
        "shares": shares(held_out, "encoder"),
        "lengths": by_length(study),
    }
    numbers = every(study)
    return {"claim": claim(config, numbers, study), "numbers": numbers, "data": data}


def claim(config: Config, numbers: list[dict[str, Any]], study: Study) -> str:
    """Return the claim with the measured numbers."""
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


# Maps and measures of heads -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Pairs, the maps of each kind [layer, pair, head, query, key], and which keys and rows count."""

    pairs: list[number_names.NumberPair]
    lengths: np.ndarray  # English words
    weights: dict[str, np.ndarray]
    allowed: dict[str, np.ndarray]
    source_words: np.ndarray  # columns that are words: neither padding nor </s>
    target_words: np.ndarray  # rows that predict one
    predicted: np.ndarray  # rows whose word the model predicts

    def part(self, start: int, stop: int) -> Corpus:
        """Return some of its pairs."""
        of = slice(start, stop)
        weights = {kind: each[:, of] for kind, each in self.weights.items()}
        allowed = {kind: each[of] for kind, each in self.allowed.items()}
        rest = (self.source_words[of], self.target_words[of], self.predicted[of])
        return Corpus(self.pairs[of], self.lengths[of], weights, allowed, *rest)


def stratified(numbers: np.ndarray, *, per_length: int, seed: int) -> np.ndarray:
    """Draw at most `per_length` numbers of each English length."""
    rng, lengths = np.random.default_rng(seed), number_names.english_lengths(numbers)
    parts = [numbers[lengths == length] for length in np.unique(lengths)]
    return np.sort(np.concatenate([rng.choice(part, min(per_length, len(part)), replace=False) for part in parts]))


def read(loaded: models.Loaded, numbers: np.ndarray) -> Corpus:
    """Return the maps of these numbers; the decoder reads the German name that it should write."""
    pairs = [number_names.pair(number) for number in numbers]
    source, target = (_tokens(loaded, [getattr(pair, side) for pair in pairs]) for side in ("source", "target"))
    (source, source_mask), (target, target_mask) = source, target
    start = np.full((len(pairs), 1), loaded.model.config.decoder_start_token_id)
    given = jnp.asarray(source), jnp.asarray(np.hstack([start, target[:, :-1]]))
    masks = {"source_mask": jnp.asarray(source_mask), "target_mask": jnp.asarray(target_mask)}
    maps = jax.jit(loaded.model.attention)(loaded.params, *given, **masks)
    lm, params = loaded.model.start(loaded.params, given[0], masks["source_mask"])
    logits, _ = jax.jit(lm.apply)(params, given[1], mask=masks["target_mask"])
    source_lengths, target_lengths = (mask.sum(axis=1, keepdims=True) - 1 for mask in (source_mask, target_mask))
    target_words = np.arange(target.shape[1]) < target_lengths
    return Corpus(
        pairs,
        source_lengths[:, 0],
        {kind: np.asarray(getattr(maps, kind)) for kind in KINDS},
        {
            "encoder": attention.allowed_keys(source_mask),
            "decoder": attention.allowed_keys(target_mask, causal=True),
            "cross": attention.allowed_keys(target_mask, source_mask),
        },
        np.arange(source.shape[1]) < source_lengths,
        target_words,
        (np.asarray(logits).argmax(axis=-1) == target) & target_words,
    )


def _tokens(loaded: models.Loaded, texts: list[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Return one token for each word and one for the end, padded on the right, and their mask."""
    ids = [loaded.tokenizer(" ".join(words))["input_ids"] for words in texts]
    if any(len(row) != len(words) + 1 for row, words in zip(ids, texts, strict=True)):
        raise ValueError("the gold alignment is one of words: it needs a tokenizer with one token for each word.")
    tokens, mask = (np.zeros((len(ids), max(map(len, ids))), kind) for kind in (np.int32, bool))
    for row, each in enumerate(ids):
        tokens[row, : len(each)], mask[row, : len(each)] = each, True
    return tokens, mask


def alignment_counts(corpus: Corpus, *, late: bool = False, weights: np.ndarray | None = None) -> np.ndarray:
    """Return alignment counts [pair, layer, head, 2]; `late` reads each word one row after its prediction."""
    weights = corpus.weights["cross"] if weights is None else weights
    return word_alignment.head_counts(
        np.roll(weights, -1, axis=-2) if late else weights,
        [pair.sure for pair in corpus.pairs],
        [pair.possible for pair in corpus.pairs],
        targets=corpus.target_words,
        sources=corpus.source_words,
    )


def in_order(corpus: Corpus) -> np.ndarray:
    """Return the counts of a head that keeps the order: word j looks at source word j or the last; [pair, 2]."""
    source = np.minimum(np.arange(corpus.target_words.shape[1]), corpus.lengths[:, None] - 1)
    weights = np.eye(corpus.source_words.shape[1])[source][None, :, None]
    return alignment_counts(corpus, weights=weights)[:, 0, 0]


def entropies(corpus: Corpus, kind: str, *, normalised: bool = False) -> np.ndarray:
    """Return the entropy of each pair, layer and head, in nats or as a share of log n; [pair, layer, head]."""
    weights, allowed = corpus.weights[kind], corpus.allowed[kind]
    if normalised:
        values, queries = attention.normalised_entropy(weights, allowed), allowed.sum(axis=-1) > 1
    else:
        values, queries = attention.entropy(weights), allowed.any(axis=-1)
    return np.moveaxis(attention.mean_over_queries(values, queries), 1, 0)


def shares(corpus: Corpus, kind: str) -> list[list[dict[str, float]]]:
    """Return the shares of self-attention by kind of key, means over the pairs, [layer][head]."""
    queries = corpus.allowed[kind].any(axis=-1)
    parts = attention.shares(corpus.weights[kind], corpus.allowed[kind])
    means = {name: attention.mean_over_queries(part, queries).mean(axis=1) for name, part in parts._asdict().items()}
    layers, heads = means["own"].shape
    return [
        [{n: float(mean[layer, head]) for n, mean in means.items()} for head in range(heads)] for layer in range(layers)
    ]


def misses(corpus: Corpus, layer: int, head: int) -> np.ndarray:
    """Return for each pair the rows off the gold alignment at "und", and those at any word; [pair, 2].

    A row is off it if its largest weight is on a source word that is not even a possible link.
    """
    found = np.zeros((len(corpus.pairs), 2), int)
    for index, (pair, row) in enumerate(zip(corpus.pairs, _links(corpus, layer, head), strict=True)):
        off = [word for place, word in enumerate(pair.target) if (int(row[place].argmax()), place) not in pair.possible]
        found[index] = off.count("und"), len(off)
    return found


def inversions(corpus: Corpus, layer: int, head: int) -> np.ndarray:
    """Return for each pair how often the head crosses over at "x-und-y", and how often there is one; [pair, 2].

    It crosses over if x looks at the second source word and y at the first.
    """
    found = np.zeros((len(corpus.pairs), 2), int)
    for index, (pair, row) in enumerate(zip(corpus.pairs, _links(corpus, layer, head), strict=True)):
        source_of = {target: source for source, target in pair.sure}
        for und in (place for place, word in enumerate(pair.target) if word == "und"):
            found[index] += all(row[at].argmax() == source_of[at] for at in (und - 1, und + 1)), 1
    return found


def _links(corpus: Corpus, layer: int, head: int) -> np.ndarray:
    """Return the source word with the largest weight in each row of a cross-attention head, [pair, target, source]."""
    weights = corpus.weights["cross"][layer : layer + 1, :, head : head + 1]
    return word_alignment.hard_alignment(weights, corpus.target_words, corpus.source_words)[0, :, 0]


def maps_of(corpus: Corpus, number: int) -> dict[str, Any]:
    """Return all maps of one number of the corpus, with its words and its gold alignment."""
    (place,) = [place for place, pair in enumerate(corpus.pairs) if pair.number == number]
    pair = corpus.pairs[place]
    sizes = {"source": len(pair.source) + 1, "target": len(pair.target) + 1}
    axes = {"encoder": ("source", "source"), "decoder": ("target", "target"), "cross": ("target", "source")}
    maps = {
        kind: np.round(corpus.weights[kind][:, place, :, : sizes[queries], : sizes[keys]].astype(float), 4).tolist()
        for kind, (queries, keys) in axes.items()
    }
    return {
        "number": number,
        "source": [*pair.source, "</s>"],
        "target": [*pair.target, "</s>"],
        "source_text": pair.source_text,
        "target_text": pair.target_text,
        "sure": sorted(pair.sure),
        "possible": sorted(pair.possible),
        **maps,
    }


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
    counts = alignment_counts(study.held_out)[:, *study.best]
    entropy, rows = entropies(study.held_out, "encoder").mean(axis=(1, 2)), []
    for words in np.unique(study.held_out.lengths):
        chosen = study.held_out.lengths == words
        row = {"words": int(words), "names": int(chosen.sum())}
        found = {"error_rate": study.error_rate(counts[chosen]), "entropy": study.interval(entropy[chosen])}
        for name, interval in found.items():
            row[name] = interval._asdict() if chosen.sum() >= ENOUGH else {"estimate": interval.estimate}
        rows.append(row)
    return rows


# Numbers --------------------------------------------------------------------------------------------------------------


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
    error = study.error_rate(alignment_counts(study.held_out)[:, *study.best])
    crossings = inversions(study.held_out, *study.best)
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
        entropies(held_out, "encoder", normalised=normalised).mean(axis=2) for normalised in (False, True)
    )
    errors = word_alignment.alignment_error_rate(alignment_counts(held_out)[None]).mean(axis=2)  # each name a corpus
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
    """Measure the baselines of the best head, its misses, and the share of words that the model predicts."""
    held_out = study.held_out
    late = study.error_rate(alignment_counts(held_out, late=True)[:, *study.best])
    order = study.error_rate(in_order(held_out))
    missed = study.interval(misses(held_out, *study.best), _ratio)
    predicted = float(held_out.predicted.sum() / held_out.target_words.sum())
    rate = {"unit": "error rate", "source": OCH_AND_NEY}
    return [
        _estimate("alignment error rate of a head that keeps the order", order, **rate),
        _estimate("alignment error rate, best head, words read one row late", late, **rate),
        _estimate('rows off the gold alignment that are "und", best head', missed, unit="share", source=OCH_AND_NEY),
        ledger.measurement("words predicted given those before", predicted, unit="share", source="teacher forcing"),
    ]


def layers(study: Study) -> list[Entry]:
    """Measure the first and the last layer: sharpness of encoder and cross-attention, and alignment."""
    entries, counts = [], alignment_counts(study.held_out)
    for which, layer in (("first", 0), ("last", -1)):
        for kind in ("encoder", "cross"):
            values = entropies(study.held_out, kind)[:, layer].mean(axis=1)
            entries.append(_mean(f"entropy of {kind} attention, {which} layer", values))
        rate = study.interval(counts[:, layer], _mean_error_rate)
        name = f"alignment error rate, mean of the {which} layer's heads"
        entries.append(_estimate(name, rate, unit="error rate", source=OCH_AND_NEY))
    return entries


def lengths(study: Study) -> list[Entry]:
    """Measure short and long names: the best head's error rate, and the entropies."""
    counts, entries = alignment_counts(study.held_out)[:, *study.best], []
    for which, (least, most) in (("short", SHORT), ("long", LONG)):
        chosen = (study.held_out.lengths >= least) & (study.held_out.lengths <= most)
        name, source = f"alignment error rate, best head, {which} names", f"names of {least} to {most} English words"
        rate = study.error_rate(counts[chosen])
        entries.append(_estimate(name, rate, unit="error rate", source=source, names=int(chosen.sum())))
        for kind, normalised in (("encoder", False), ("encoder", True), ("cross", False)):
            values = entropies(study.held_out, kind, normalised=normalised).mean(axis=(1, 2))[chosen]
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
    source = "mean over the heads; mean of the names, interval of Student's t"
    return ledger.measurement(name, *statistics.student(values), unit=unit, source=source)


def _estimate(name: str, found: Interval, *, unit: str, source: str, names: int = ENOUGH) -> Entry:
    """Return an estimate, with its bootstrap interval where there are enough names for one."""
    return ledger.measurement(name, *(found if names >= ENOUGH else found[:1]), unit=unit, source=source)
