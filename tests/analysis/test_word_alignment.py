"""Alignments and their error rate against hand-made cases and against the definition over sets."""

import numpy as np
import pytest

from jaxrl_llm.analysis import word_alignment
from jaxrl_llm.analysis.bootstrap import bootstrap_interval
from jaxrl_llm.data import number_names


def error_rate(found, sure, possible):
    """Och and Ney's definition, over the sets of a corpus."""
    hits = sum(len(a & s) + len(a & p) for a, s, p in zip(found, sure, possible, strict=True))
    return 1 - hits / sum(len(a) + len(s) for a, s in zip(found, sure, strict=True))


def arrays(*links, targets=4, sources=4):
    return [word_alignment.link_array(each, targets=targets, sources=sources) for each in links]


def test_an_error_rate_by_hand():
    """A = {00, 11, 22}, S = {00, 12}, P = S and {11}: 1 − (1 + 2)/(3 + 2) = 0.4."""
    found, sure, possible = [{(0, 0), (1, 1), (2, 2)}], [{(0, 0), (1, 2)}], [{(0, 0), (1, 2), (1, 1)}]
    counts = word_alignment.alignment_counts(*arrays(found, sure, possible))
    assert counts.tolist() == [[3, 5]]
    assert word_alignment.alignment_error_rate(counts) == pytest.approx(0.4, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_rate_is_that_of_the_corpus(seed):
    rng = np.random.default_rng(seed)
    every = [(i, j) for i in range(4) for j in range(4)]
    draw = lambda share: {link for link in every if rng.random() < share}  # noqa: E731
    sure, found = [draw(0.3) for _ in range(6)], [draw(0.4) for _ in range(6)]
    possible = [each | draw(0.2) for each in sure]
    counts = word_alignment.alignment_counts(*arrays(found, sure, possible))
    assert word_alignment.alignment_error_rate(counts) == pytest.approx(error_rate(found, sure, possible), abs=1e-12)


def attention_of(pairs, key_of, *, targets, sources):
    """One head that puts 0.6 on `</s>` and most of the rest on one word, for each target word of each pair."""
    weights = np.zeros((len(pairs), targets, sources))
    for index, pair in enumerate(pairs):
        for target in range(len(pair.target)):
            weights[index, target, : len(pair.source)] = 0.1 / len(pair.source)
            weights[index, target, key_of(pair, target)] += 0.3
            weights[index, target, len(pair.source)] = 0.6
    return weights


PAIRS = [number_names.pair(number) for number in (7, 21, 100, 345_678, 999_921)]
SHAPE = {"targets": max(len(pair.target) for pair in PAIRS) + 1, "sources": max(len(pair.source) for pair in PAIRS) + 1}


def masks():
    lengths = [[len(side) for side in (pair.target, pair.source)] for pair in PAIRS]
    return {
        name: np.arange(SHAPE[name])[None] < np.asarray(lengths)[:, [axis]]
        for axis, name in enumerate(("targets", "sources"))
    }


def gold_key(pair, target):
    """A source word that the gold has for this target word: "und" has two possible ones, and no sure one."""
    return min(source for source, to in pair.possible if to == target)


def test_a_head_that_follows_the_gold_makes_no_error_and_one_that_copies_the_order_does():
    """By hand for the copy: in "twenty-one" it misses both sure links, "und" is right, and so everywhere the same."""
    heads = [attention_of(PAIRS, gold_key, **SHAPE)]
    heads.append(attention_of(PAIRS, lambda pair, target: min(target, len(pair.source) - 1), **SHAPE))
    weights = np.stack(heads, axis=1)[None]  # [layer, pair, head, target, source]
    gold = [[pair.sure for pair in PAIRS], [pair.possible for pair in PAIRS]]
    counts = word_alignment.head_counts(weights, *gold, **masks())
    assert counts.shape == (len(PAIRS), 1, 2, 2)
    rates = word_alignment.alignment_error_rate(counts)
    assert rates[0, 0] == 0
    copied = [{(min(j, len(pair.source) - 1), j) for j in range(len(pair.target))} for pair in PAIRS]
    assert rates[0, 1] == pytest.approx(error_rate(copied, *gold), abs=1e-12) and rates[0, 1] > 0.3
    assert counts[1, 0, 1].tolist() == [1, 5]
    assert word_alignment.best_head(rates) == (0, 0) and word_alignment.best_head(1 - rates) == (0, 1)
    interval = bootstrap_interval(counts, word_alignment.alignment_error_rate, seed=0, resamples=50)
    assert interval.low[0, 0] == interval.high[0, 0] == 0 and interval.low[0, 1] < rates[0, 1] < interval.high[0, 1]


def test_words_are_aligned_with_words_alone():
    weights = attention_of(PAIRS, gold_key, **SHAPE)[:, None]
    links = word_alignment.hard_alignment(weights, **masks())[:, 0]
    for pair, each in zip(PAIRS, links, strict=True):
        assert each.sum() == len(pair.target) and not each[len(pair.target) :].any()
        assert not each[:, len(pair.source) :].any(), "neither </s> nor padding, though </s> has the largest weight"


def test_a_map_read_one_row_late_is_found_out():
    """The classical slip: the row in which a word is read, instead of the row that predicts it."""
    weights = attention_of(PAIRS, gold_key, **SHAPE)[None, :, None]
    gold = [[pair.sure for pair in PAIRS], [pair.possible for pair in PAIRS]]
    late = word_alignment.head_counts(np.roll(weights, -1, axis=-2), *gold, **masks())
    assert word_alignment.alignment_error_rate(late)[0, 0] > 0.5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: arrays([{(4, 0)}]), "must lie within 4 sources and 4 targets"),
        (
            lambda: word_alignment.alignment_counts(*arrays([{(0, 0)}], [{(0, 0)}], [{(0, 1)}])),
            "must include the sure ones",
        ),
        (lambda: word_alignment.alignment_error_rate(np.zeros((3, 2))), "at least one link"),
        (
            lambda: word_alignment.hard_alignment(np.ones((1, 2, 3)), np.ones((1, 2)), np.ones((1, 3))),
            "weights must be",
        ),
        (
            lambda: word_alignment.hard_alignment(np.ones((1, 1, 2, 3)), np.ones((1, 2)), np.zeros((1, 3))),
            "must have a source word",
        ),
    ],
)
def test_what_is_no_alignment_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
