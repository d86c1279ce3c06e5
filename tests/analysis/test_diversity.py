import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.analysis.bleu import corpus_bleu, sentence_bleu
from jaxrl_llm.analysis.diversity import distinct_n, repetition, self_bleu, seq_rep_n, zipf_coefficient

sequences = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5)


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b", "a c"], 1) == 3 / 6
    assert distinct_n(["a b a b", "a c"], 2) == 3 / 4  # ab ba ab, ac
    assert distinct_n([[1, 2, 3], np.asarray([1, 2])], 2) == 2 / 3
    assert distinct_n([[1], []], 2) == 0


def test_seq_rep_n_is_averaged_over_the_sequences_that_are_long_enough():
    assert seq_rep_n(["a b a b a", "a b c"], 2) == pytest.approx(((1 - 2 / 4) + 0) / 2)
    assert seq_rep_n(["a b a b a", "a"], 2) == pytest.approx(1 - 2 / 4)
    assert seq_rep_n([[1], []], 2) == 0
    assert seq_rep_n([[7] * 101], 1) == pytest.approx(100 / 101)


@settings(max_examples=60)
@given(sequences, st.integers(1, 4))
def test_shares_agree_with_counting(rows, n):
    each = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    together = [gram for grams in each for gram in grams]
    assert distinct_n(rows, n) == (len(set(together)) / len(together) if together else 0)
    shares = [1 - len(set(grams)) / len(grams) for grams in each if grams]
    assert seq_rep_n(rows, n) == pytest.approx(np.mean(shares) if shares else 0)
    if len(rows) == 1 and together:
        assert seq_rep_n(rows, n) == pytest.approx(1 - distinct_n(rows, n))


@pytest.mark.parametrize(
    ("text", "options", "loops"),
    [
        ("x a b a b a b", {}, True),
        ("x a b a b", {}, False),
        ("a b a b a b x", {}, False),
        ("b a b a b", {}, False),
        ("x a a a a a", {}, False),
        ("x a a a a a a", {}, True),
        ("x a a a", {"min_length": 1}, True),
        ("x a b c a b c", {"min_repeats": 2}, True),
        ("x a b c a b d", {"min_repeats": 2}, False),
        ("x a b a b", {"min_length": 3, "min_repeats": 2}, False),
        ("", {}, False),
    ],
)
def test_a_loop_is_a_phrase_repeated_at_the_end(text, options, loops):
    assert repetition([text], **options) == loops
    ids = [ord(word) for word in text.split()]
    assert repetition([ids, [1, 2, 3], []], **options) == pytest.approx(loops / 3)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 1), max_size=14), st.integers(1, 3), st.integers(2, 4))
def test_loops_agree_with_trying_every_phrase(row, length, repeats):
    found = any(row[-n * repeats :] == row[-n:] * repeats and n * repeats <= len(row) for n in range(length, 15))
    assert repetition([row], min_length=length, min_repeats=repeats) == found


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_zipf_coefficient_of_an_exact_power_law(exponent):
    counts = [round(3600 * rank**-exponent) for rank in (1, 2, 3, 4, 5, 6)]
    tokens = np.repeat(np.arange(6), counts)
    rows = np.array_split(np.random.default_rng(0).permutation(tokens), 3)
    assert zipf_coefficient(rows) == pytest.approx(exponent, abs=1e-3)


def test_zipf_coefficient_is_the_slope_of_a_regression_on_the_most_frequent():
    tokens = np.minimum(np.random.default_rng(1).zipf(1.7, 3000), 400).tolist()
    frequencies = sorted((tokens.count(each) for each in set(tokens)), reverse=True)
    for limit in (None, 5000, 2, 20):
        kept = frequencies[:limit]
        slope = scipy.stats.linregress(np.log(np.arange(1, len(kept) + 1)), np.log(kept)).slope
        assert zipf_coefficient([tokens], max_rank=limit) == pytest.approx(-slope)
    assert zipf_coefficient([tokens], max_rank=20) != pytest.approx(zipf_coefficient([tokens]), rel=0.01)


def random_texts(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list("abcde,."), rng.integers(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_self_bleu_is_the_mean_bleu_of_each_text_against_the_others(order):
    for seed, count in [(0, 2), (1, 3), (2, 7)]:
        texts = random_texts(seed, count)
        expected = [sentence_bleu(text, texts[:i] + texts[i + 1 :], max_order=order) for i, text in enumerate(texts)]
        assert self_bleu(texts, max_order=order) == pytest.approx(np.mean(expected))
        assert 0 < np.mean(expected) < 100


def test_self_bleu_of_equal_and_of_unrelated_texts():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(100)
    assert self_bleu(["a b c d e", "f g h i j", ""]) == 0
    assert self_bleu([[1, 2, 3, 4, 5], np.asarray([1, 2, 3, 4, 5])]) == pytest.approx(100)


def test_self_bleu_of_a_sample():
    texts = random_texts(3, 12)
    scores = [sentence_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    singles = {round(self_bleu(texts, max_hypotheses=1, seed=seed), 9) for seed in range(40)}
    assert len(singles) > 5 and singles <= {round(score, 9) for score in scores}
    assert self_bleu(texts, max_texts=12, max_hypotheses=99) == pytest.approx(np.mean(scores))
    assert self_bleu(texts, max_texts=5, seed=1) == self_bleu(texts, max_texts=5, seed=1) != self_bleu(texts)
    pairs = {round((sentence_bleu(a, b) + sentence_bleu(b, a)) / 2, 9) for i, a in enumerate(texts) for b in texts[:i]}
    assert round(self_bleu(texts, max_texts=2, seed=2), 9) in pairs


def test_token_ids_are_tokens_of_bleu():
    rows = [[5, 6, 7, 8, 9], [5, 6, 7, 9, 8, 1], [1, 5, 6]]
    texts = [" ".join(f"w{token}" for token in row) for row in rows]
    assert self_bleu(rows) == pytest.approx(self_bleu(texts))
    expected = [corpus_bleu([t], [texts[:i] + texts[i + 1 :]], effective_order=True) for i, t in enumerate(texts)]
    assert self_bleu(rows) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distinct_n("a text", 1), "must be a list of at least one text"),
        (lambda: distinct_n([], 1), "must be a list of at least one text"),
        (lambda: distinct_n(["a"], 0), "n must be at least 1, but is 0"),
        (lambda: distinct_n([[0.5]], 1), r"token ids, but is float64\[1\]"),
        (lambda: distinct_n(np.ones((1, 2, 2), int), 1), r"token ids, but is int64\[2, 2\]"),
        (lambda: seq_rep_n(["a"], -1), "n must be at least 1, but is -1"),
        (lambda: repetition(["a"], min_length=0), "min_length must be at least 1"),
        (lambda: repetition(["a"], min_repeats=1), "min_repeats at least 2, but are 2 and 1"),
        (lambda: zipf_coefficient(["a a a"]), "at least two types of tokens, but there are 1"),
        (lambda: zipf_coefficient(["a b"], max_rank=1), "max_rank must be at least 2, but is 1"),
        (lambda: self_bleu(["a"]), "must be a list of at least two"),
        (lambda: self_bleu("ab"), "must be a list of at least two"),
        (lambda: self_bleu(["a", "b"], max_texts=1), "max_texts must be at least 2, but is 1"),
        (lambda: self_bleu(["a", "b"], max_hypotheses=0), "max_hypotheses must be at least 1, but is 0"),
        (lambda: self_bleu(["a", "b"], max_order=0), "max_order must be at least 1, but is 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
