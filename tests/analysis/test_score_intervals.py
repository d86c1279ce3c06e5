import numpy as np
import pytest

from jaxrl_llm.analysis import bleu, bootstrap, chrf
from jaxrl_llm.analysis.bleu import corpus_bleu, corpus_chrf
from jaxrl_llm.analysis.bootstrap import (
    bleu_difference,
    bleu_interval,
    bootstrap_difference,
    bootstrap_interval,
    chrf_difference,
    chrf_interval,
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "it", "too", "dogs,", "not", "cats."]


def systems(size, seed=0, *, noise=(0.15, 0.3)):
    """References and two translations of them, of which the first has fewer words wrong."""
    rng = np.random.default_rng(seed)
    references = [list(rng.choice(WORDS, rng.integers(5, 15))) for _ in range(size)]
    texts = [
        [
            " ".join(str(rng.choice(WORDS)) if rng.random() < share else str(word) for word in each)
            for each in references
        ]
        for share in noise
    ]
    return [" ".join(map(str, each)) for each in references], *texts


REFERENCES, GOOD, BAD = systems(60)
CASES = {
    "bleu": (bleu_interval, bleu_difference, corpus_bleu, {}),
    "bleu of 2": (bleu_interval, bleu_difference, corpus_bleu, {"max_order": 2, "tokenize": "none", "lowercase": True}),
    "smoothed": (bleu_interval, bleu_difference, corpus_bleu, {"smoothing": "add-k", "smooth_value": 2.0}),
    "chrf": (chrf_interval, chrf_difference, corpus_chrf, {}),
    "chrf++": (chrf_interval, chrf_difference, corpus_chrf, {"word_order": 2, "beta": 1.0, "eps_smoothing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_interval_is_that_of_counting_every_resample_anew(case):
    interval, difference, score, options = CASES[case]
    fast = interval(GOOD, REFERENCES, seed=3, resamples=12, **options)
    pairs = list(zip(GOOD, REFERENCES, strict=True))
    slow = bootstrap_interval(pairs, lambda drawn: score(*zip(*drawn, strict=True), **options), seed=3, resamples=12)
    np.testing.assert_allclose(fast, slow, rtol=1e-12)
    assert fast.estimate == score(GOOD, REFERENCES, **options) and fast.low < fast.estimate < fast.high
    others = list(zip(BAD, REFERENCES, strict=True))
    slow = bootstrap_difference(
        pairs, others, lambda drawn: score(*zip(*drawn, strict=True), **options), seed=3, resamples=12
    )
    np.testing.assert_allclose(difference(GOOD, BAD, REFERENCES, seed=3, resamples=12, **options), slow, rtol=1e-10)


@pytest.mark.parametrize("case", ["bleu", "chrf"])
def test_it_is_the_corpus_that_is_scored_and_not_the_sentences(case):
    interval, _, score, _ = CASES[case]
    hypotheses, references = ["a b c d e f", "x"], ["a b c d e f", "q r s t u v w"]
    result = interval(hypotheses, references, seed=0, resamples=200)
    assert result.estimate == score(hypotheses, references) != pytest.approx((100 + 0) / 2, abs=1)
    assert (result.low, result.high) == (0, pytest.approx(100)), "resamples of one of the two alone"


@pytest.mark.parametrize("case", ["bleu", "chrf"])
def test_a_paired_difference_is_narrower_than_two_intervals(case):
    interval, difference, _, _ = CASES[case]
    references, good, bad = systems(300, 1, noise=(0.25, 0.3))
    paired = difference(good, bad, references, seed=0)
    ones = [interval(each, references, seed=0) for each in (good, bad)]
    assert paired.low < paired.estimate < paired.high
    assert paired.high - paired.low < sum(each.high - each.low for each in ones)
    assert difference(good, good, references, seed=0) == (0, 0, 0)
    assert difference(GOOD, BAD, REFERENCES, seed=0).low > 0, "twice as many wrong words are worse, surely"


def test_several_references_and_empty_hypotheses():
    several = [[reference] * (1 + place % 3) for place, reference in enumerate(REFERENCES)]
    assert bleu_interval(GOOD, several, seed=1) == bleu_interval(GOOD, REFERENCES, seed=1)
    assert chrf_interval(GOOD, several, seed=1) == chrf_interval(GOOD, REFERENCES, seed=1)
    for interval in (bleu_interval, chrf_interval):
        assert interval([""] * 60, REFERENCES, seed=0) == (0, 0, 0)


@pytest.mark.slow
def test_the_interval_covers_the_score_of_a_large_corpus():
    references, good, _ = systems(4000, 2)
    truth = corpus_bleu(good, references)
    hits = 0
    for start in range(0, 4000, 100):
        part = slice(start, start + 100)
        interval = bleu_interval(good[part], references[part], seed=start, resamples=200, level=0.9)
        hits += interval.low <= truth <= interval.high
    assert 31 <= hits <= 40, "of 40; by a binomial distribution of 0.9 it is fewer than once in 200"


@pytest.mark.parametrize(("case", "module"), [("bleu", bleu), ("chrf", chrf)])
def test_each_sentence_is_counted_once(case, module, monkeypatch):
    calls, count = [], module.count
    monkeypatch.setattr(module, "count", lambda *texts, **options: calls.append(texts) or count(*texts, **options))
    interval, difference, *_ = CASES[case]
    interval(GOOD, REFERENCES, seed=0)
    assert calls == [(GOOD, REFERENCES)]
    difference(GOOD, BAD, REFERENCES, seed=0)
    assert calls[1:] == [(GOOD, REFERENCES), (BAD, REFERENCES)]


def test_mistakes_are_named():
    for interval in (bleu_interval, chrf_interval):
        with pytest.raises(ValueError, match="there must be values to resample"):
            interval([], [], seed=0)
        with pytest.raises(ValueError, match="each of 1 hypotheses, but there are 2"):
            interval(["a"], ["a", "b"], seed=0)
        with pytest.raises(TypeError, match="unexpected keyword argument 'order'"):
            interval(["a"], ["a"], seed=0, order=3)
    with pytest.raises(ValueError, match="smoothing must be one of"):
        bleu_interval(["a"], ["a"], seed=0, smoothing="laplace")
    with pytest.raises(ValueError, match="each of 1 hypotheses, but there are 2"):
        bootstrap.bleu_difference(["a", "b"], ["a"], ["a", "b"], seed=0)
