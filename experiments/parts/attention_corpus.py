"""Number names of every length under a T5: its attention maps with teacher forcing, and measures of the heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import models
from jaxrl_llm.analysis import attention, word_alignment
from jaxrl_llm.data import number_names

KINDS = ("encoder", "decoder", "cross")


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
    """Draw at most so many numbers of each English length."""
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
    return word_alignment.head_counts(
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
    """Return the entropy of each pair, layer and head, in nats or as a share of log n; [pair, layer, head]."""
    weights, allowed = corpus.weights[kind], corpus.allowed[kind]
    if normalised:
        values, queries = attention.normalised_entropy(weights, allowed), allowed.sum(axis=-1) > 1
    else:
        values, queries = attention.entropy(weights), allowed.any(axis=-1)
    return np.moveaxis(attention.mean_over_queries(values, queries), 1, 0)


def shares(corpus: Corpus, kind: str) -> list[list[dict[str, float]]]:
    """Return where self-attention falls, means over the pairs, [layer][head]."""
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


def example(corpus: Corpus, number: int) -> dict[str, Any]:
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
