"""Diversity of texts: distinct n-grams, repetition, Zipf's coefficient, self-BLEU.

A sequence is a list of token ids without padding, or a text, which is split at whitespace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from jaxrl_llm.analysis import bleu

Sequences = Sequence[str] | Sequence[Sequence[int]]


def distinct_n(sequences: Sequences, n: int) -> float:
    """Return distinct n-grams over n-grams of all sequences together, in [0, 1]; 0 if there are no n-grams.

    It decreases with the length and number of the sequences: compare only sets of one size.

    Raises:
        ValueError: if n is below 1 or there are no sequences.

    Source: Li et al. 2016.
    """
    grams = [gram for units in _units(sequences) for gram in _grams(units, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def seq_rep_n(sequences: Sequences, n: int) -> float:
    """Return the fraction of repeated n-grams in a sequence, in [0, 1), averaged over the sequences.

        1 − unique n-grams / n-grams

    Sequences of fewer than n tokens are left out; 0 if all are.

    Raises:
        ValueError: if n is below 1 or there are no sequences.

    Source: Welleck et al. 2020.
    """
    each = [_grams(units, n) for units in _units(sequences)]
    shares = [1 - len(set(grams)) / len(grams) for grams in each if grams]
    return sum(shares) / len(shares) if shares else 0.0


def repetition(sequences: Sequences, *, min_length: int = 2, min_repeats: int = 3) -> float:
    """Return the fraction of sequences that end in a loop: at least `min_length` tokens, repeated `min_repeats` times.

    A phrase may itself be repetitive: six equal tokens are three phrases of two. Remove a final EOS first, or no
    finished sequence ends in a loop.

    Raises:
        ValueError: if `min_length` is below 1, `min_repeats` below 2, or there are no sequences.

    Source: Holtzman et al. 2020, Table 1. (Their released script requires two occurrences of a phrase of three or more
    tokens: min_length=3 and min_repeats=2 are close to it.)
    """
    if min_length < 1 or min_repeats < 2:
        raise ValueError(
            f"min_length must be at least 1 and min_repeats at least 2, but are {min_length} and {min_repeats}."
        )
    units = _units(sequences)
    return sum(_ends_in_a_loop(each, min_length, min_repeats) for each in units) / len(units)


def zipf_coefficient(sequences: Sequences, *, max_rank: int | None = 5000) -> float:
    """Return the exponent s of Zipf's law, frequency ∝ rank^−s, for the tokens of all sequences together.

    It is minus the slope of the least-squares line of log frequency on log rank, with equal weights, over the
    `max_rank` most frequent types (all if None). This is the fit of Holtzman et al. 2020. It is not a
    maximum-likelihood estimate: the many rare types of equal frequency outweigh the head.

    Raises:
        ValueError: if there are fewer than two types of tokens, `max_rank` is below 2, or there are no sequences.
    """
    if max_rank is not None and max_rank < 2:
        raise ValueError(f"max_rank must be at least 2, but is {max_rank}: a line needs two points.")
    counts = Counter(unit for units in _units(sequences) for unit in units)
    if len(counts) < 2:
        raise ValueError(f"Zipf's law needs at least two types of tokens, but there are {len(counts)}.")
    frequencies = np.sort(np.fromiter(counts.values(), float))[::-1][:max_rank]
    log_ranks = np.log(np.arange(1, len(frequencies) + 1))
    centred = log_ranks - log_ranks.mean()
    return -float(centred @ np.log(frequencies) / (centred @ centred)) + 0.0


def self_bleu(
    texts: Sequences,
    *,
    max_order: int = 4,
    max_texts: int | None = None,
    max_hypotheses: int | None = None,
    seed: int = 0,
) -> float:
    """Return the mean `sentence_bleu` of each text against all others as references, in [0, 100]; low is diverse.

    It increases with the number of texts: compare only sets of one size. Texts are tokenised as "13a", token ids are
    used unchanged. Orders that exceed a text's length are left out; orders without a match are smoothed ("exp").

    Args:
        max_texts: the largest number of texts; of more, a random subset is used.
        max_hypotheses: the largest number of scored texts; of more, a random subset is scored against all.
        seed: random seed of both subsets.

    Raises:
        ValueError: if there are fewer than two texts, or a limit is too small.

    Source: Zhu et al. 2018; as a measure of decoding strategies Holtzman et al. 2020.
    """
    limits = (("max_order", max_order, 1), ("max_texts", max_texts, 2), ("max_hypotheses", max_hypotheses, 1))
    for name, limit, least in limits:
        if limit is not None and limit < least:
            raise ValueError(f"{name} must be at least {least}, but is {limit}.")
    if isinstance(texts, str) or len(texts) < 2:
        raise ValueError("texts must be a list of at least two, but are one or none.")
    rng = np.random.default_rng(seed)
    chosen = [texts[index] for index in _draw(rng, len(texts), max_texts)]
    tokens = [bleu.tokenise(text) if isinstance(text, str) else _unit(text) for text in chosen]
    grams = [bleu.ngrams(each, max_order) for each in tokens]
    lengths, most = [len(each) for each in tokens], _two_highest(grams)
    scores = []
    for index in _draw(rng, len(tokens), max_hypotheses):
        matches, totals = [0] * max_order, [0] * max_order
        for gram, count in grams[index].items():
            first, owner, second = most[gram]
            totals[len(gram) - 1] += count
            matches[len(gram) - 1] += min(count, second if owner == index else first)
        reference_length = bleu.closest(lengths[index], lengths[:index] + lengths[index + 1 :])
        counts = bleu.BleuCounts(matches, totals, lengths[index], reference_length)
        scores.append(bleu.score(counts, effective_order=True))
    return sum(scores) / len(scores)


def _two_highest(grams: Sequence[Counter]) -> dict[Hashable, tuple[int, int, int]]:
    """Return for each n-gram the highest count in a text, that text, and the highest count in any other."""
    most: dict[Hashable, tuple[int, int, int]] = {}
    for index, counts in enumerate(grams):
        for gram, count in counts.items():
            first, owner, second = most.get(gram, (0, -1, 0))
            most[gram] = (count, index, first) if count > first else (first, owner, max(second, count))
    return most


def _draw(rng: np.random.Generator, size: int, limit: int | None) -> list[int]:
    if limit is None or limit >= size:
        return list(range(size))
    return rng.choice(size, limit, replace=False).tolist()


def _units(sequences: Sequences) -> list[list[Hashable]]:
    if isinstance(sequences, str) or len(sequences) == 0:
        raise ValueError("sequences must be a list of at least one text or list of token ids.")
    return [_unit(sequence) for sequence in sequences]


def _unit(sequence: str | Sequence[int]) -> list[Hashable]:
    if isinstance(sequence, str):
        return sequence.split()
    tokens = np.asarray(sequence)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        found = f"{tokens.dtype}{list(tokens.shape)}"
        raise ValueError(f"a sequence must be a text or a list of token ids, but is {found}.")
    return tokens.tolist()


def _grams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, but is {n}.")
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def _ends_in_a_loop(units: Sequence[Hashable], min_length: int, min_repeats: int) -> bool:
    end = len(units)
    lengths = range(min_length, end // min_repeats + 1)
    return any(units[end - n * (min_repeats - 1) :] == units[end - n * min_repeats : end - n] for n in lengths)
