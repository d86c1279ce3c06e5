import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.analysis.ngram import KneserNey
from jaxrl_llm.scoring import bits_per_byte


def distribution(model, context):
    """The model's distribution of the token after `context`, over the vocabulary."""
    return np.array([math.exp(model.log_probs(np.array([*context, w]))[-1]) for w in range(model.vocab_size)])


class SlowKneserNey:
    """The same model from dictionaries of tuples, one probability at a time."""

    def __init__(self, tokens, order, vocab_size):
        self.order, self.vocab_size = order, vocab_size
        self.counts = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
        for n in range(order - 1, 0, -1):
            longer = {tuple(tokens[i : i + n + 1]) for i in range(len(tokens) - n)}
            self.counts[n] = Counter(gram[1:] for gram in longer)

    def discount(self, n, count):
        n1, n2, n3, n4 = (sum(c == k for c in self.counts[n].values()) for k in (1, 2, 3, 4))
        if n1 == 0 or n2 == 0:
            return 0.5
        y = n1 / (n1 + 2 * n2)
        if n3 == 0 or n4 == 0:
            return y
        by_count = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}
        usable = all(0 < d <= k for k, d in by_count.items())
        return by_count[min(count, 3)] if usable else y

    def prob(self, token, context):
        context = tuple(context[max(0, len(context) - self.order + 1) :])
        n = len(context) + 1
        lower = self.prob(token, context[1:]) if n > 1 else 1 / self.vocab_size
        followers = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == context}
        total = sum(followers.values())
        if total == 0:
            return lower
        count = followers.get((*context, token), 0)
        kept = count - self.discount(n, count) if count else 0
        return (kept + sum(self.discount(n, c) for c in followers.values()) * lower) / total


def test_bigram_by_hand():
    # a b a b a c, and d never. Bigrams: ab 2, ba 2, ac 1, so N_1 = 1, N_2 = 2 and all three discounts are 1/(1 + 4).
    # Each of a, b, c has one distinct predecessor, so N_2 = 0 at order 1: discount 1/2, γ = (3/2) / 3 = 1/2.
    model = KneserNey.fit(np.array([0, 1, 0, 1, 0, 2]), order=2, vocab_size=4)
    assert model.discounts == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    one = 1 / 2 / 3 + 1 / 2 / 4
    unigram = [one, one, one, 1 / 8]
    np.testing.assert_allclose(distribution(model, []), unigram)
    # after a: total 3, γ = (2/5) / 3 = 2/15
    np.testing.assert_allclose(distribution(model, [0]), [7 / 180, 115 / 180, 55 / 180, 3 / 180])
    # after b: total 2, γ = (1/5) / 2 = 1/10
    np.testing.assert_allclose(distribution(model, [1]), [9 / 10 + 7 / 240, 7 / 240, 7 / 240, 1 / 80])
    # nothing follows c, and d was never seen
    np.testing.assert_allclose(distribution(model, [2]), unigram)
    np.testing.assert_allclose(distribution(model, [3]), unigram)
    expected = np.log([one, 115 / 180, 9 / 10 + 7 / 240, 3 / 180, 1 / 8])
    np.testing.assert_allclose(model.log_probs(np.array([0, 1, 0, 3, 3])), expected)


def test_three_discounts_by_hand():
    # N_1 = 4, N_2 = 2, N_3 = N_4 = 1: Y = 4/8, D = 1/2, 2 - 3/4, 3 - 2; γ = (4/2 + 2 · 5/4 + 1 + 1) / 15 = 13/30
    counts = [1, 1, 1, 1, 2, 2, 3, 4, 0, 0]
    model = KneserNey.fit(np.repeat(np.arange(10), counts), order=1, vocab_size=10)
    assert model.discounts == ((0.5, 1.25, 1.0),)
    np.testing.assert_allclose(distribution(model, []) * 300, [23, 23, 23, 23, 28, 28, 53, 73, 13, 13])


@pytest.mark.parametrize(
    ("numbers", "single"),
    # the second discount would be 2 - 3 = -1; the third 3 - 4/3 · 3 = -1; 2 - 0; without singletons Y is undefined
    [((1, 1, 3, 1), 1 / 3), ((1, 1, 1, 3), 1 / 3), ((1, 1, 0, 1), 1 / 3), ((0, 2, 2, 2), 1 / 2), ((2, 0, 2, 2), 1 / 2)],
)
def test_one_discount_where_three_are_unusable(numbers, single):
    counts = np.repeat([1, 2, 3, 4], numbers)
    model = KneserNey.fit(np.repeat(np.arange(len(counts)), counts), order=1, vocab_size=len(counts) + 1)
    assert model.discounts == ((pytest.approx(single),) * 3,)
    assert distribution(model, [])[-1] == pytest.approx(single * len(counts) / counts.sum() / (len(counts) + 1))


@given(st.data(), st.integers(1, 5), st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_agrees_with_dictionaries(data, order, vocab_size):
    token = st.integers(0, vocab_size - 1)
    train = data.draw(st.lists(token, min_size=order, max_size=60))
    text = data.draw(st.lists(token, min_size=1, max_size=12))
    slow = SlowKneserNey(train, order, vocab_size)
    expected = [math.log(slow.prob(w, text[:t])) for t, w in enumerate(text)]
    actual = KneserNey.fit(np.array(train), order=order, vocab_size=vocab_size).log_probs(np.array(text))
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_agrees_with_dictionaries_on_a_longer_stream():
    rng = np.random.default_rng(0)
    train, text = (np.minimum(rng.geometric(0.3, size), 8) - 1 for size in (600, 40))
    model, slow = KneserNey.fit(train, order=3, vocab_size=8), SlowKneserNey(train.tolist(), 3, 8)
    assert len(set(model.discounts[2])) == 3  # this stream is long enough for three discounts
    expected = [math.log(slow.prob(w, text[:t].tolist())) for t, w in enumerate(text.tolist())]
    np.testing.assert_allclose(model.log_probs(text), expected, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_distribution_sums_to_one(order):
    rng = np.random.default_rng(order)
    train = rng.integers(0, 6, 300) * rng.integers(0, 2, 300)
    model = KneserNey.fit(train, order=order, vocab_size=7)  # token 6 is never seen
    seen = [train[i : i + order - 1] for i in (0, 17, len(train) - order + 1)]
    for context in [*seen, [], [6], [6, 0], [0, 6], [5, 5, 5, 5], [0, 0, 0, 0, 0]]:
        assert distribution(model, context).sum() == pytest.approx(1, abs=1e-10)
        assert distribution(model, context).min() > 0


def test_a_bigram_source_is_learnt():
    rng = np.random.default_rng(0)
    source = rng.dirichlet(np.full(10, 0.3), size=10)
    cumulative, draws, stream = source.cumsum(axis=1), rng.random(120_000), [0]
    for draw in draws:
        stream.append(min(int(np.searchsorted(cumulative[stream[-1]], draw)), 9))
    train, text = np.array(stream[:100_000]), np.array(stream[100_000:])
    entropy = -np.log(source[text[:-1], text[1:]]).mean()
    costs = [-KneserNey.fit(train, order=n, vocab_size=10).log_probs(text)[1:].mean() for n in (1, 2, 3)]
    assert costs[0] > entropy + 0.3
    assert entropy < costs[1] < entropy + 0.003
    assert costs[1] < costs[2] < entropy + 0.03


def test_only_the_last_tokens_count():
    train = np.random.default_rng(0).integers(0, 4, 500)
    model = KneserNey.fit(train, order=3, vocab_size=4)
    np.testing.assert_array_equal(distribution(model, [0, 1, 2, 3]), distribution(model, [3, 3, 2, 3]))
    assert not np.array_equal(distribution(model, [2, 3]), distribution(model, [1, 3]))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint64])
def test_unsigned_tokens_of_a_large_vocabulary(dtype):
    stream = np.random.default_rng(0).integers(40_000, 50_257, 3_000)
    log_probs = KneserNey.fit(stream, order=5, vocab_size=50_257).log_probs(stream)
    unsigned = stream.astype(dtype)
    np.testing.assert_array_equal(KneserNey.fit(unsigned, order=5, vocab_size=50_257).log_probs(unsigned), log_probs)
    assert (log_probs[2:] > math.log(1e-3)).all()  # it knows the stream by heart


def test_errors():
    model = KneserNey.fit(np.array([0, 1, 2]), order=2, vocab_size=3)
    for tokens in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
            KneserNey.fit(np.array(tokens), order=1, vocab_size=3)
        with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
            model.log_probs(np.array(tokens))
    for tokens in (np.array([], np.uint16), np.zeros((2, 2), int)):
        with pytest.raises(ValueError, match="one stream of at least one token"):
            KneserNey.fit(tokens, order=1, vocab_size=3)
        with pytest.raises(ValueError, match="one stream of at least one token"):
            model.log_probs(tokens)
    with pytest.raises(TypeError, match="must be integers, but are float64"):
        model.log_probs(np.array([0.0]))
    with pytest.raises(ValueError, match="order and vocab_size must be at least 1, but are 0 and 3"):
        KneserNey.fit(np.array([0]), order=0, vocab_size=3)
    with pytest.raises(ValueError, match="must have at least 3 tokens for order 3, but has 2"):
        KneserNey.fit(np.array([0, 1]), order=3, vocab_size=3)


def test_bits_per_byte():
    assert bits_per_byte(3 * math.log(256), 6) == pytest.approx(4)
    with pytest.raises(ValueError, match="num_bytes must be at least 1, but is 0"):
        bits_per_byte(1.0, 0)
