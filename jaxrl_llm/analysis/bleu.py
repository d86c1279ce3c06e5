"""BLEU as sacreBLEU defines it, of corpora and of single texts; `corpus_chrf` is importable from here too."""

from __future__ import annotations

import functools
import math
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple, get_args

from jaxrl_llm.analysis.chrf import corpus_chrf, reference_lists

__all__ = [
    "BleuCounts", "Tokenizer", "TooShortForBleu", "corpus_bleu", "corpus_chrf", "count", "score", "sentence_bleu",
    "summed", "tokenise",
]  # fmt: skip

Tokenizer = Literal["13a", "intl", "char", "zh", "none"]

SMOOTH_VALUES = {"exp": None, "none": None, "floor": 0.1, "add-k": 1.0}  # Chen and Cherry 2014
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# The rules of the script mteval-v13a: punctuation marks are separated, except apostrophes, full stops and commas
# between digits, and hyphens that do not follow a digit.
RULES = (
    (re.compile(r"([ -&(-+/:-@\[-`{-~])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
# Characters that "zh" separates: as sacreBLEU's code compares them, the first range is also that of much punctuation
# and of symbols; kana and Hangul are not among them.
CHINESE = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5"
    "\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)


class TooShortForBleu(UserWarning):
    """BLEU is 0 because no hypothesis has as many tokens as the longest n-gram, however well the shorter ones match."""


class BleuCounts(NamedTuple):
    """The counts from which BLEU is computed, of a text or, summed, of a corpus."""

    matches: list[int]  # n-grams of each order that also occur in a reference, clipped
    totals: list[int]  # n-grams of each order
    length: int  # tokens
    reference_length: int  # of the reference closest in length

    @property
    def too_short(self) -> bool:
        """True if something matches, but no hypothesis has an n-gram of the highest order, so that BLEU is undefined.

        `score` is then 0, unless it takes the effective order or smooths by "add-k".
        """
        return any(self.matches) and self.totals[-1] == 0


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    *,
    max_order: int = 4,
    smoothing: str = "exp",
    smooth_value: float | None = None,
    tokenize: Tokenizer = "13a",
    lowercase: bool = False,
    effective_order: bool = False,
) -> float:
    """Compute BLEU of a corpus, in [0, 100]. The defaults are sacreBLEU's.

        100 · min(1, exp(1 − r/c)) · exp(mean_{n ≤ max_order} log p_n),    p_n = matches_n / totals_n

    An n-gram matches at most as often as it occurs in the reference with the most occurrences. Matches, totals, the
    length c and the closest reference length r (the shorter one of a tie) are summed over the corpus before the ratios.

    Args:
        references: one text for each hypothesis, or a list of texts for each (not sacreBLEU's transposed order).
        smoothing: for orders without a match: "exp" counts 1/2, 1/4, ... matches, order by order; "floor" counts
            `smooth_value` (0.1) matches; "none" counts 0. "add-k" adds `smooth_value` (1) to matches and totals of
            every order above 1. Without a match of any order BLEU is 0.
        tokenize: "13a", as the script mteval-v13a; "intl", as mteval-v14, with all of Unicode's punctuation and
            symbols; "zh", Chinese characters one by one and the rest by the rules of 13a; "char", every character that
            is not whitespace; or "none" to split at whitespace.
        effective_order: leave out orders that exceed the hypotheses' length.

    Raises:
        ValueError: if the numbers of hypotheses and references differ, one has no reference, or an option is unknown.

    Warns:
        TooShortForBleu: if the value is 0 because no hypothesis has `max_order` tokens, although some tokens match.
            `effective_order`, a lower `max_order`, another `tokenize` and chrF are ways out.

    Source: Papineni et al. 2002; sacreBLEU: Post 2018; smoothing: Chen and Cherry 2014.
    """
    counts = count(hypotheses, references, max_order=max_order, tokenize=tokenize, lowercase=lowercase)
    corpus = summed(counts, max_order=max_order)
    value = score(corpus, smoothing=smoothing, smooth_value=smooth_value, effective_order=effective_order)
    if value == 0 and corpus.too_short and not effective_order and smoothing != "add-k":
        warnings.warn(
            f"BLEU is 0 because no hypothesis has {max_order} tokens: take effective_order=True, a lower max_order, "
            "another tokenize, or chrF.",
            TooShortForBleu,
            stacklevel=2,
        )
    return value


def count(
    hypotheses: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    *,
    max_order: int = 4,
    tokenize: Tokenizer = "13a",
    lowercase: bool = False,
) -> list[BleuCounts]:
    """Count n-grams and matches of each hypothesis; arguments and errors are those of `corpus_bleu`."""
    if tokenize not in get_args(Tokenizer):
        raise ValueError(f"tokenize must be one of {', '.join(get_args(Tokenizer))}, but is {tokenize!r}.")
    if max_order < 1:
        raise ValueError(f"max_order must be at least 1, but is {max_order}.")

    def grams(text: str) -> Counter:
        return ngrams(tokenise(text.lower() if lowercase else text, tokenize), max_order)

    lists = reference_lists(hypotheses, references)
    return [
        _count(grams(hypothesis), [grams(each) for each in several], max_order)
        for hypothesis, several in zip(hypotheses, lists, strict=True)
    ]


def sentence_bleu(
    hypothesis: str,
    references: str | Sequence[str],
    *,
    max_order: int = 4,
    smoothing: str = "exp",
    smooth_value: float | None = None,
    tokenize: Tokenizer = "13a",
    lowercase: bool = False,
    effective_order: bool = True,
) -> float:
    """Compute BLEU of one text, in [0, 100]: `corpus_bleu` of a corpus of one, with the effective order by default.

    Its mean over texts is not the BLEU of their corpus.
    """
    return corpus_bleu(
        [hypothesis],
        [references],
        max_order=max_order,
        smoothing=smoothing,
        smooth_value=smooth_value,
        tokenize=tokenize,
        lowercase=lowercase,
        effective_order=effective_order,
    )


def score(
    counts: BleuCounts, *, smoothing: str = "exp", smooth_value: float | None = None, effective_order: bool = False
) -> float:
    """Compute BLEU of counts, in [0, 100]; the options are those of `corpus_bleu`."""
    value = _smooth_value(smoothing, smooth_value)
    if not any(counts.matches):
        return 0.0
    logs, halvings = [], 0
    for order, (matches, total) in enumerate(zip(counts.matches, counts.totals, strict=True), 1):
        if smoothing == "add-k" and order > 1:
            matches, total = matches + value, total + value
        if total == 0:  # and so of all higher orders
            if not effective_order:
                return 0.0
            break
        if matches == 0 and smoothing == "exp":
            halvings += 1
            matches = 0.5**halvings
        elif matches == 0 and smoothing == "floor":
            matches = value
        if matches == 0:
            return 0.0
        logs.append(math.log(matches / total))
    log_brevity = min(0.0, 1 - counts.reference_length / counts.length)
    return 100 * math.exp(log_brevity + sum(logs) / len(logs))


def tokenise(text: str, tokenize: Tokenizer = "13a") -> list[str]:
    """Return the tokens of a text by one of the rules that `corpus_bleu` names."""
    if tokenize == "none":
        return text.split()
    if tokenize == "char":
        return [character for character in text if not character.isspace()]
    text = text.rstrip()
    if tokenize == "intl":
        rules = _international_rules()
    elif tokenize == "zh":
        text, rules = CHINESE.sub(r" \1 ", text.strip()), RULES
    else:
        text, rules = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " "), RULES
        for entity, character in ENTITIES:
            text = text.replace(entity, character)
        text = f" {text} "
    for rule, replacement in rules:
        text = rule.sub(replacement, text)
    return text.split()


@functools.cache
def _international_rules() -> tuple[tuple[re.Pattern, str], ...]:
    """Return the rules of mteval-v14: punctuation is separated except between numbers, and all symbols are."""
    kinds: dict[str, list[str]] = {"N": [], "P": [], "S": []}
    for character in map(chr, range(sys.maxunicode + 1)):
        kinds.get(unicodedata.category(character)[0], []).append(character)
    number, mark, symbol = (re.escape("".join(each)) for each in kinds.values())
    rules = (f"([^{number}])([{mark}])", r"\1 \2 "), (f"([{mark}])([^{number}])", r" \1 \2"), (f"([{symbol}])", r" \1 ")
    return tuple((re.compile(rule), replacement) for rule, replacement in rules)


def summed(counts: Sequence[BleuCounts], *, max_order: int = 4) -> BleuCounts:
    """Return the counts of a corpus, the sums of those of its texts."""
    matches, totals = (
        [sum(each) for each in zip([0] * max_order, *(getattr(one, name) for one in counts), strict=True)]
        for name in ("matches", "totals")
    )
    return BleuCounts(matches, totals, sum(one.length for one in counts), sum(one.reference_length for one in counts))


def ngrams(tokens: Sequence[Hashable], max_order: int) -> Counter:
    """Count the n-grams of the orders 1 to `max_order`, as tuples."""
    tokens = tuple(tokens)
    return Counter(tokens[i : i + n] for n in range(1, max_order + 1) for i in range(len(tokens) - n + 1))


def _count(hypothesis: Counter, references: Sequence[Counter], max_order: int) -> BleuCounts:
    matches, totals = [0] * max_order, [0] * max_order
    for gram, count in hypothesis.items():
        totals[len(gram) - 1] += count
        matches[len(gram) - 1] += min(count, max(reference[gram] for reference in references))
    return BleuCounts(matches, totals, totals[0], closest(totals[0], [_length(each) for each in references]))


def _length(grams: Counter) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def closest(length: int, others: Sequence[int]) -> int:
    """Return the length in `others` that is closest to `length`, the shorter one of a tie."""
    return min(others, key=lambda other: (abs(other - length), other))


def _smooth_value(smoothing: str, smooth_value: float | None) -> float | None:
    if smoothing not in SMOOTH_VALUES:
        raise ValueError(f"smoothing must be one of {', '.join(SMOOTH_VALUES)}, but is {smoothing!r}.")
    if smooth_value is None:
        return SMOOTH_VALUES[smoothing]
    if SMOOTH_VALUES[smoothing] is None:
        raise ValueError(f"smooth_value is for 'floor' and 'add-k'; {smoothing!r} has none.")
    if not 0 <= smooth_value < math.inf:
        raise ValueError(f"smooth_value must be finite and not negative, but is {smooth_value}.")
    return smooth_value
