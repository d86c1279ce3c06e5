import itertools

import numpy as np
import pytest
import scipy.stats

from jaxrl_llm.analysis import bootstrap
from jaxrl_llm.analysis.bleu import corpus_bleu
from jaxrl_llm.analysis.bootstrap import bootstrap_difference, bootstrap_interval, mean_interval, sign_test

VALUES = np.random.default_rng(0).normal(3, 2, 50)


def test_quantiles_of_all_resamples_of_three_values():
    """Of the 27 means of 3 draws from {0, 3, 9}, exactly; 4000 resamples come within a cell of them."""
    values = np.asarray([0.0, 3.0, 9.0])
    means = np.sort([np.mean(each) for each in itertools.product(values, repeat=3)])
    interval = bootstrap_interval(values, seed=0, resamples=4000, level=0.8)
    assert interval.estimate == 4
    assert (interval.low, interval.high) == pytest.approx((means[2], means[24]))  # 10 and 90 per cent lie inside ties
    assert means[1] == means[3] == 1 and means[23] == means[24] == 7


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    low, high = scipy.stats.norm.interval(0.9, VALUES.mean(), VALUES.std() / np.sqrt(len(VALUES)))
    interval = bootstrap_interval(VALUES, seed=1, resamples=4000, level=0.9)
    assert interval.estimate == pytest.approx(VALUES.mean())
    np.testing.assert_allclose([interval.low, interval.high], [low, high], atol=0.1 * (high - low) / 2)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(400):
        interval = bootstrap_interval(rng.exponential(size=60), seed=seed, resamples=200, level=0.8)
        hits += interval.low <= 1 <= interval.high
    assert scipy.stats.binomtest(hits, 400, 0.8).pvalue > 1e-3


def test_an_array_and_a_list_are_resampled_alike():
    array = bootstrap_interval(VALUES, np.median, seed=3)
    items = bootstrap_interval(VALUES.tolist(), np.median, seed=3)
    np.testing.assert_allclose(array, items)
    assert all(isinstance(each, float) for each in (*array, *items))
    assert array.low < array.estimate < array.high


def test_the_seed_decides_and_the_block_does_not_matter(monkeypatch):
    first = bootstrap_interval(VALUES, seed=3)
    assert first == bootstrap_interval(VALUES, seed=3) != bootstrap_interval(VALUES, seed=4)
    monkeypatch.setattr(bootstrap, "BLOCK", 7 * len(VALUES))
    assert first == bootstrap_interval(VALUES, seed=3)


def test_a_wider_level_contains_a_narrower_one():
    wide, narrow = (bootstrap_interval(VALUES, seed=3, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_whole_groups_are_resampled():
    """Ten values that are all the same within each of 8 groups tell no more than one of each."""
    groups = np.random.default_rng(2).normal(size=8)
    repeated = np.repeat(groups[:, None], 10, axis=1)
    expected = bootstrap_interval(groups, seed=0)
    by_array = bootstrap_interval(repeated, lambda samples, axis: samples.mean(axis=(axis, axis + 1)), seed=0)
    by_list = bootstrap_interval(list(repeated), np.mean, seed=0)
    np.testing.assert_allclose(by_array, expected)
    np.testing.assert_allclose(by_list, expected)
    alone = bootstrap_interval(repeated.ravel(), seed=0)
    assert alone.high - alone.low < 0.5 * (expected.high - expected.low)


def test_a_statistic_may_have_several_numbers():
    table = np.stack([VALUES, -VALUES], axis=1)
    interval = bootstrap_interval(table, seed=3)
    single = bootstrap_interval(VALUES, seed=3)
    np.testing.assert_allclose(interval.estimate, [single.estimate, -single.estimate])
    np.testing.assert_allclose(interval.low, [single.low, -single.high])


def test_items_may_be_texts():
    pairs = [("a b c d", "a b c d"), ("a b x", "a b c"), ("q", "a b"), ("a c d e", "a c d e f")] * 3
    interval = bootstrap_interval(pairs, lambda items: corpus_bleu(*zip(*items, strict=True)), seed=0, resamples=100)
    assert interval.estimate == corpus_bleu(*zip(*pairs, strict=True))
    assert 0 <= interval.low < interval.estimate < interval.high <= 100


def test_a_paired_difference_forgets_what_the_pairs_share():
    rng = np.random.default_rng(7)
    shared, noise = 10 * rng.normal(size=80), 0.1 * rng.normal(size=80)
    paired = bootstrap_difference(shared + 1 + noise, shared, seed=0)
    of_differences = bootstrap_interval(1 + noise, seed=0)
    np.testing.assert_allclose(paired, of_differences, atol=1e-9)
    swapped = bootstrap_difference(shared, shared + 1 + noise, seed=0)
    np.testing.assert_allclose(swapped, [-paired.estimate, -paired.high, -paired.low], atol=1e-9)
    medians = bootstrap_difference(list(shared), list(shared), np.median, seed=0)
    assert medians == (0, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([], seed=0), "there must be values to resample"),
        (lambda: bootstrap_interval(np.zeros((0, 3)), seed=0), "there must be values to resample"),
        (lambda: bootstrap_interval(VALUES, seed=0, resamples=0), "resamples must be at least 1"),
        (lambda: bootstrap_interval(VALUES, seed=0, level=1.0), r"level in \(0, 1\), but are 1000 and 1.0"),
        (lambda: bootstrap_interval(VALUES, lambda samples, axis: samples.mean(), seed=0), r"each of 1 .*shape \[\]"),
        (lambda: bootstrap_interval(VALUES, lambda samples, axis: samples.mean(axis=0), seed=0), r"shape \[50\]"),
        (lambda: bootstrap_difference(VALUES, VALUES[:-1], seed=0), "have 50 and 49 values"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_signs_are_those_of_groups():
    values, groups = np.asarray([0.5, 0.1, -0.2, -0.3, 0.0, np.nan, 0.4, 0.4]), [0, 0, 1, 1, 2, 3, 4, 5]
    p = scipy.stats.binomtest(3, 4).pvalue
    assert sign_test(values, groups) == {"positive": 3, "negative": 1, "zero": 1, "p": pytest.approx(p)}
    assert sign_test(np.zeros(3), [0, 1, 2]) == {"positive": 0, "negative": 0, "zero": 3, "p": 1.0}


def test_values_of_a_group_are_drawn_together():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=50), 20)  # 20 values of a group say what one says
    found = mean_interval(values, np.repeat(np.arange(50), 20))
    assert found["high"] - found["low"] == pytest.approx(3.92 * values.std() / np.sqrt(50), rel=0.2)
    assert mean_interval(np.asarray([np.nan]), [0]) is None
    one = {"estimate": 0.5, "low": None, "high": None}
    assert mean_interval([0.0, 1.0, np.nan], [3, 3, 4]) == one, "a group without a value does not count"
