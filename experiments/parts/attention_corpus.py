"""Number names of every length under a T5: its attention maps with teacher forcing, and what the heads are like."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import models
from jaxrl_llm.analysis import alignment, attention
from jaxrl_llm.data import number_names

KINDS = ("encoder", "decoder", "cross")
WORDS = {"und": ("und",), "hundert": ("hundert",), "tausend": ("tausend",)}  # and units and tens: what has a meaning


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
        """Some of its pairs."""
        of = slice(start, stop)
        weights = {kind: each[:, of] for kind, each in self.weights.items()}
        allowed = {kind: each[of] for kind, each in self.allowed.items()}
        rest = (self.source_words[of], self.target_words[of], self.predicted[of])
        return Corpus(self.pairs[of], self.lengths[of], weights, allowed, *rest)


def stratified(numbers: np.ndarray, *, per_length: int, seed: int) -> np.ndarray:
    """At most so many numbers of each English length."""
    rng, lengths = np.random.default_rng(seed), number_names.english_lengths(numbers)
    parts = [numbers[lengths == length] for length in np.unique(lengths)]
    return np.sort(np.concatenate([rng.choice(part, min(per_length, len(part)), replace=False) for part in parts]))


def read(loaded: models.Loaded, numbers: np.ndarray) -> Corpus:
    """The maps of these numbers; the decoder reads the German name that it should write."""
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
    """One token for each word and one for the end, padded on the right, and their mask."""
    ids = [loaded.tokenizer(" ".join(words))["input_ids"] for words in texts]
    if any(len(row) != len(words) + 1 for row, words in zip(ids, texts, strict=True)):
        raise ValueError("the gold alignment is one of words: it needs a tokenizer with one token for each word.")
    tokens, mask = (np.zeros((len(ids), max(map(len, ids))), kind) for kind in (np.int32, bool))
    for row, each in enumerate(ids):
        tokens[row, : len(each)], mask[row, : len(each)] = each, True
    return tokens, mask


def counts(corpus: Corpus, *, late: bool = False, weights: np.ndarray | None = None) -> np.ndarray:
    """Alignment counts [pair, layer, head, 2]; `late` reads each word in the row after the one that predicts it."""
    weights = corpus.weights["cross"] if weights is None else weights
    return alignment.head_counts(
        np.roll(weights, -1, axis=-2) if late else weights,
        [pair.sure for pair in corpus.pairs],
        [pair.possible for pair in corpus.pairs],
        targets=corpus.target_words,
        sources=corpus.source_words,
    )


def in_order(corpus: Corpus) -> np.ndarray:
    """The counts of a head that keeps the order: word j looks at source word j, or at the last one; [pair, 2]."""
    source = np.minimum(np.arange(corpus.target_words.shape[1]), corpus.lengths[:, None] - 1)
    weights = np.eye(corpus.source_words.shape[1])[source][None, :, None]
    return counts(corpus, weights=weights)[:, 0, 0]


def entropies(corpus: Corpus, kind: str, *, normalised: bool = False) -> np.ndarray:
    """Of each pair, layer and head, in nats or as a share of log n; [pair, layer, head]."""
    weights, allowed = corpus.weights[kind], corpus.allowed[kind]
    if normalised:
        values, queries = attention.normalised_entropy(weights, allowed), allowed.sum(axis=-1) > 1
    else:
        values, queries = attention.entropy(weights), allowed.any(axis=-1)
    return np.moveaxis(attention.mean_over_queries(values, queries), 1, 0)


def shares(corpus: Corpus, kind: str) -> list[list[dict[str, float]]]:
    """Where self-attention falls, means over the pairs, [layer][head]."""
    queries = corpus.allowed[kind].any(axis=-1)
    parts = attention.shares(corpus.weights[kind], corpus.allowed[kind])
    means = {name: attention.mean_over_queries(part, queries).mean(axis=1) for name, part in parts._asdict().items()}
    layers, heads = means["own"].shape
    return [
        [{n: float(mean[layer, head]) for n, mean in means.items()} for head in range(heads)] for layer in range(layers)
    ]


def aligned(corpus: Corpus, layer: int, head: int) -> dict[str, np.ndarray]:
    """Of each kind of German word, whether the head looks most at a source word that the gold allows."""
    links = alignment.hard_alignment(corpus.weights["cross"], corpus.target_words, corpus.source_words)[layer, :, head]
    found: dict[str, list[bool]] = {name: [] for name in ("units, tens", *WORDS)}
    for pair, row in zip(corpus.pairs, links, strict=True):
        for place, word in enumerate(pair.target):
            found[word if word in WORDS else "units, tens"].append((int(row[place].argmax()), place) in pair.possible)
    return {name: np.asarray(each) for name, each in found.items()}


def inversions(corpus: Corpus, layer: int, head: int) -> dict[int, list[bool]]:
    """Of each number with "x-und-y", whether the head crosses over: x looks at the second word, y at the first."""
    links = alignment.hard_alignment(corpus.weights["cross"], corpus.target_words, corpus.source_words)[layer, :, head]
    found: dict[int, list[bool]] = {}
    for pair, row in zip(corpus.pairs, links, strict=True):
        source_of = {target: source for source, target in pair.sure}
        for place in (place for place, word in enumerate(pair.target) if word == "und"):
            crossed = all(row[at].argmax() == source_of[at] for at in (place - 1, place + 1))
            found.setdefault(pair.number, []).append(bool(crossed))
    return found


def example(corpus: Corpus, number: int) -> dict[str, Any]:
    """All maps of one number of the corpus, with its words and its gold alignment."""
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
