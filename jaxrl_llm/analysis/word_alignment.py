"""Word alignment from cross-attention, and its error against a gold alignment.

The row of a target word is the row of the query that predicts it. A decoder that reads [start, y_1, y_2, ...] predicts
y_t in row t − 1. So word j of the target (from 0) has row j of the map, not the row in which it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Links = Iterable[tuple[int, int]]  # (source word, target word), counted from 0


def link_array(links: Sequence[Links], *, targets: int, sources: int) -> Bool[np.ndarray, "pair target source"]:
    """Return each pair's links as a boolean matrix.

    Raises:
        ValueError: if a link is outside of the matrix.
    """
    array = np.zeros((len(links), targets, sources), bool)
    for pair, each in enumerate(links):
        for source, target in each:
            if not (0 <= source < sources and 0 <= target < targets):
                raise ValueError(
                    f"a link must lie within {sources} sources and {targets} targets, but is {(source, target)}."
                )
            array[pair, target, source] = True
    return array


def hard_alignment(
    weights: Float[Any, "*batch pair head target source"],
    targets: Bool[np.ndarray, "pair target"],
    sources: Bool[np.ndarray, "pair source"],
) -> Bool[np.ndarray, "*batch pair head target source"]:
    """Link each target word to the source word with the largest weight.

    Args:
        weights: one row for each target word (see above).
        targets: true for rows that are words: not padding and not `</s>`.
        sources: true for columns that are words. Weight on `</s>` means that a head attends to no word, which a gold
            alignment cannot express.

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
        raise ValueError("a pair with target words must have a source word, but one has none.")
    largest = np.where(sources[:, None, None], weights, -1.0).argmax(axis=-1)
    return (np.arange(weights.shape[-1]) == largest[..., None]) & targets[:, None, :, None]


def alignment_counts(
    links: Bool[np.ndarray, "*batch target source"],
    sure: Bool[np.ndarray, "*#batch target source"],
    possible: Bool[np.ndarray, "*#batch target source"],
) -> Int[np.ndarray, "*batch 2"]:
    """Return (|A ∩ S| + |A ∩ P|, |A| + |S|) of each pair; the counts of a corpus are the sums over its pairs.

    Raises:
        ValueError: if a sure link is not possible, or the shapes do not fit.
    """
    links, sure, possible = (np.asarray(each, bool) for each in (links, sure, possible))
    if (sure & ~possible).any():
        raise ValueError("possible links must include the sure ones, but a sure link is missing.")
    hits, size = (links & sure).astype(int) + (links & possible), links.astype(int) + sure
    return np.stack([hits.sum(axis=(-2, -1)), size.sum(axis=(-2, -1))], axis=-1)


def alignment_error_rate(counts: Int[np.ndarray, "pair *batch 2"], axis: int = 0) -> Float[np.ndarray, "*batch"]:
    """Return the alignment error rate of a corpus, in [0, 1].

        AER = 1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|)

    A are the links, S the sure gold links and P ⊇ S the possible ones, counted over all pairs. AER is 0 if and only if
    A has every sure link and only possible ones.

    Args:
        counts: from `alignment_counts`.
        axis: the axis of the pairs, as `bootstrap_interval` passes it to a statistic.

    Raises:
        ValueError: if there are neither links nor sure links.

    Source: Och and Ney 2003.
    """
    hits, size = np.moveaxis(np.asarray(counts), -1, 0).sum(axis=axis + 1)
    if not np.all(size):
        raise ValueError("the alignment error rate needs at least one link, but there are no links.")
    return 1 - hits / size


def head_counts(
    weights: Float[Any, "layer pair head target source"],
    sure: Sequence[Links],
    possible: Sequence[Links],
    *,
    targets: Bool[np.ndarray, "pair target"],
    sources: Bool[np.ndarray, "pair source"],
) -> Int[np.ndarray, "pair layer head 2"]:
    """Return `alignment_counts` of every head's `hard_alignment`, pairs first, for intervals over pairs.

    Raises:
        ValueError: as `hard_alignment` and `alignment_counts`.
    """
    links = hard_alignment(weights, targets, sources)
    size = {"targets": links.shape[-2], "sources": links.shape[-1]}
    gold = [link_array(each, **size)[None, :, None] for each in (sure, possible)]
    return np.moveaxis(alignment_counts(links, *gold), 1, 0)


def best_head(error_rates: Float[np.ndarray, "layer head"]) -> tuple[int, int]:
    """Return (layer, head) of the lowest error rate. Select on other pairs than the reported rate is computed on."""
    layer, head = np.unravel_index(np.argmin(error_rates), np.shape(error_rates))
    return int(layer), int(head)
