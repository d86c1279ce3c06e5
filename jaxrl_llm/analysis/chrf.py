"""chrF, the F-score of character n-grams; with word n-grams chrF++. It needs no tokenizer."""

from __future__ import annotations

import functools
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

EPSILON = 1e-16
PUNCTUATION = frozenset(string.punctuation)


def corpus_chrf(
    hypotheses: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: float = 2.0,
    lowercase: bool = False,
    eps_smoothing: bool = False,
) -> float:
    """Compute chrF of a corpus, in [0, 100]; with word_order = 2 chrF++. The defaults are sacreBLEU's.

        F = (1 + β²) P R / (β² P + R),    P = mean_n matches_n / hypothesis n-grams,  R = mean_n matches_n / reference's

    The counts are summed over the corpus before the ratios; n runs over the orders that both sides have. Whitespace is
    removed. With several references each hypothesis is compared with the reference that gives the largest F.

    Args:
        references: one text for each hypothesis, or a list of texts for each (not sacreBLEU's transposed order).
        beta: the weight of recall relative to precision.
        eps_smoothing: take the mean of F_n over all orders, with 1e-16 for a ratio 0/0 (as in chrF++.py).

    Raises:
        ValueError: if the numbers of hypotheses and references differ, one has no reference, or an order is negative.

    Source: Popović 2015; word n-grams: Popović 2017.
    """
    options = {"char_order": char_order, "word_order": word_order, "beta": beta, "eps_smoothing": eps_smoothing}
    counts = count(hypotheses, references, lowercase=lowercase, **options)
    return score(counts.sum(axis=0), beta=beta, eps_smoothing=eps_smoothing)


def count(
    hypotheses: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: float = 2.0,
    lowercase: bool = False,
    eps_smoothing: bool = False,
) -> Int[np.ndarray, "hypothesis order 3"]:
    """Count for each hypothesis and order its n-grams, those of its best reference, and the matches.

    Arguments and errors are those of `corpus_chrf`; `beta` and `eps_smoothing` decide which reference is the best.
    """
    _check(char_order, word_order, beta)
    rows = []
    for hypothesis, several in zip(hypotheses, reference_lists(hypotheses, references), strict=True):
        grams = _grams(hypothesis, char_order, word_order, lowercase)
        counts = [_overlap(grams, _grams(each, char_order, word_order, lowercase)) for each in several]
        rows.append(max(counts, key=lambda each: score(each, beta=beta, eps_smoothing=eps_smoothing)))
    return np.asarray(rows, np.int64).reshape(-1, char_order + word_order, 3)


def sentence_chrf(
    hypothesis: str,
    references: str | Sequence[str],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: float = 2.0,
    lowercase: bool = False,
    eps_smoothing: bool = False,
) -> float:
    """Compute chrF of one text, in [0, 100]: `corpus_chrf` of a corpus of one. A utility for minimum Bayes risk."""
    return corpus_chrf(
        [hypothesis],
        [references],
        char_order=char_order,
        word_order=word_order,
        beta=beta,
        lowercase=lowercase,
        eps_smoothing=eps_smoothing,
    )


def score(counts: Int[np.ndarray, "order 3"], *, beta: float = 2.0, eps_smoothing: bool = False) -> float:
    """Compute chrF of counts, or of sums of counts, in [0, 100]; the options are those of `corpus_chrf`."""
    ours, theirs, matches = counts.T
    precision, recall = (
        np.divide(matches, total, out=np.full(len(counts), EPSILON), where=total > 0) for total in (ours, theirs)
    )
    if not eps_smoothing:
        usable = (ours > 0) & (theirs > 0)
        precision, recall = precision[usable].sum(keepdims=True), recall[usable].sum(keepdims=True)
        precision, recall = precision / max(usable.sum(), 1), recall / max(usable.sum(), 1)
    weighted = beta**2 * precision + recall
    nothing = np.full(len(weighted), EPSILON if eps_smoothing else 0.0)
    scores = np.divide((1 + beta**2) * precision * recall, weighted, out=nothing, where=weighted > 0)
    return 100 * float(scores.mean())


def reference_lists(
    hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    """Return the references of each hypothesis as a list of at least one text.

    Raises:
        ValueError: if either is a single text, the numbers differ, or an item is not a text.
    """
    for name, texts in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"{name} must be a list of texts, but is one text.")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"there must be a reference, or a list of them, for each of {len(hypotheses)} hypotheses, "
            f"but there are {len(references)}."
        )
    lists = [[each] if isinstance(each, str) else each for each in references]
    for row, (hypothesis, several) in enumerate(zip(hypotheses, lists, strict=True)):
        if len(several) == 0:
            raise ValueError(f"hypothesis {row} has no reference.")
        for text in (hypothesis, *several):
            if not isinstance(text, str):
                raise ValueError(f"hypotheses and references must be texts, but row {row} holds {text!r}.")
    return lists


def _check(char_order: int, word_order: int, beta: float) -> None:
    if char_order < 0 or word_order < 0 or char_order + word_order < 1:
        raise ValueError(f"char_order and word_order must be counts, not both 0, but are {char_order}, {word_order}.")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be finite and not negative, but is {beta}.")


@functools.lru_cache(maxsize=256)  # minimum Bayes risk compares each text with all others
def _grams(text: str, char_order: int, word_order: int, lowercase: bool) -> tuple[Counter, ...]:
    """Return the character n-grams of each order, then the word n-grams."""
    words = (text.lower() if lowercase else text).split()
    characters = "".join(words)
    orders = [Counter(characters[i : i + n] for i in range(len(characters) - n + 1)) for n in range(1, char_order + 1)]
    if word_order:
        parts = tuple(part for word in words for part in _without_punctuation(word))
        orders += [Counter(parts[i : i + n] for i in range(len(parts) - n + 1)) for n in range(1, word_order + 1)]
    return tuple(orders)


def _without_punctuation(word: str) -> tuple[str, ...]:
    """Split one punctuation mark off the end of a word, or else off its start."""
    if len(word) > 1 and word[-1] in PUNCTUATION:
        return word[:-1], word[-1]
    if len(word) > 1 and word[0] in PUNCTUATION:
        return word[0], word[1:]
    return (word,)


def _overlap(hypothesis: Sequence[Counter], reference: Sequence[Counter]) -> np.ndarray:
    """Return for each order the n-grams of the hypothesis (0 if the reference has none), the reference, and both."""
    rows = []
    for ours, theirs in zip(hypothesis, reference, strict=True):
        matches = sum(min(count, theirs[gram]) for gram, count in ours.items() if gram in theirs)
        rows.append((ours.total() if theirs else 0, theirs.total(), matches))
    return np.asarray(rows, np.int64)
