"""Word alignment read off cross-attention, and its error against a gold alignment.

The row of a target word is that of the query which predicts it. A decoder that reads [start, y_1, y_2, ...] predicts
y_t in row t − 1: counted from 0, word j of the target has row j of the map, not the row in which it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Links = Iterable[tuple[int, int]]  # (source word, target word), counted from 0


def link_array(links: Sequence[Links], *, targets: int, sources: int) -> Bool[np.ndarray, "pair target source"]:
    """Each pair's links as a matrix, true where one is.

    Raises:
        ValueError: if a link is outside.
    """
    array = np.zeros((len(links), targets, sources), bool)
    for pair, each in enumerate(links):
        for source, target in each:
            if not (0 <= source < sources and 0 <= target < targets):
                raise ValueError(f"the link {(source, target)} is not within {sources} sources and {targets} targets.")
            array[pair, target, source] = True
    return array


def hard_alignment(
    weights: Float[Any, "*batch pair head target source"],
    targets: Bool[np.ndarray, "pair target"],
    sources: Bool[np.ndarray, "pair source"],
) -> Bool[np.ndarray, "*batch pair head target source"]:
    """For each target word the source word with the largest weight, as links; none for what is no word.

    Args:
        weights: a row for each target word (see above).
        targets: which rows are words: neither padding nor `</s>`.
        sources: which columns are: weight on `</s>` says that a head looks at no word, which the gold does not know.

    Raises:
        ValueError: if the shapes do not fit, or a pair has target words but no source word.
    """
    weights, targets, sources = np.asarray(weights, float), np.asarray(targets, bool), np.asarray(sources, bool)
    expected = (len(targets), targets.shape[-1], sources.shape[-1])
    if weights.ndim < 4 or (weights.shape[-4], *weights.shape[-2:]) != expected or len(sources) != len(targets):
        raise ValueError(
            "weights must be [..., pair, head, target, source], targets [pair, target] and sources [pair, source], "
            f"but are {list(weights.shape)}, {list(targets.shape)} and {list(sources.shape)}."
        )
    if (targets.any(axis=1) & ~sources.any(axis=1)).any():
        raise ValueError("a pair has target words, but no source word to align them with.")
    largest = np.where(sources[:, None, None], weights, -1.0).argmax(axis=-1)
    return (np.arange(weights.shape[-1]) == largest[..., None]) & targets[:, None, :, None]


def alignment_counts(
    links: Bool[np.ndarray, "*batch target source"],
    sure: Bool[np.ndarray, "*#batch target source"],
    possible: Bool[np.ndarray, "*#batch target source"],
) -> Int[np.ndarray, "*batch 2"]:
    """(|A ∩ S| + |A ∩ P|, |A| + |S|) of each pair: a corpus has the sums of its pairs' counts.

    Raises:
        ValueError: if a sure link is not possible, or the shapes do not fit.
    """
    links, sure, possible = (np.asarray(each, bool) for each in (links, sure, possible))
    if (sure & ~possible).any():
        raise ValueError("a sure link is not among the possible ones: possible links include the sure ones.")
    hits, size = (links & sure).astype(int) + (links & possible), links.astype(int) + sure
    return np.stack([hits.sum(axis=(-2, -1)), size.sum(axis=(-2, -1))], axis=-1)


def alignment_error_rate(counts: Int[np.ndarray, "pair *batch 2"], axis: int = 0) -> Float[np.ndarray, "*batch"]:
    """The alignment error rate of a corpus, in [0, 1]; 0 is without error:

        AER = 1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|)          (Och and Ney 2003)

    for links A, sure gold links S and possible ones P ⊇ S, counted over all pairs. It is 0 if and only if A has every
    sure link and only possible ones.

    Args:
        counts: of `alignment_counts`.
        axis: of the pairs; with it, this is a statistic for `bootstrap_interval`.

    Raises:
        ValueError: if there is no link at all, found or sure.
    """
    hits, size = np.moveaxis(np.asarray(counts), -1, 0).sum(axis=axis + 1)
    if not np.all(size):
        raise ValueError("the alignment error rate of no links is not defined.")
    return 1 - hits / size


def head_counts(
    weights: Float[Any, "layer pair head target source"],
    sure: Sequence[Links],
    possible: Sequence[Links],
    *,
    targets: Bool[np.ndarray, "pair target"],
    sources: Bool[np.ndarray, "pair source"],
) -> Int[np.ndarray, "pair layer head 2"]:
    """`alignment_counts` of every head's `hard_alignment`, pairs first, as intervals are taken over them.

    Raises:
        ValueError: as the two do.
    """
    links = hard_alignment(weights, targets, sources)
    size = {"targets": links.shape[-2], "sources": links.shape[-1]}
    gold = [link_array(each, **size)[None, :, None] for each in (sure, possible)]
    return np.moveaxis(alignment_counts(links, *gold), 1, 0)


def best_head(error_rates: Float[np.ndarray, "layer head"]) -> tuple[int, int]:
    """(layer, head) of the lowest error rate. Choose on other pairs than those that the rate is reported on."""
    layer, head = np.unravel_index(np.argmin(error_rates), np.shape(error_rates))
    return int(layer), int(head)
