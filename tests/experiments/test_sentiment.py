"""The sentiment experiment: its numbers against what they are by definition, and its data handling on a small model."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.parts import sentiment_models, sentiment_numbers, sentiment_policies
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training.rollout import Prompts
from jaxrl_llm.training.sequences import Sequences


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(size=(5, 2))
    found = sentiment_numbers.interval(values)
    for place in range(2):
        expected = scipy.stats.ttest_1samp(values[:, place], 0).confidence_interval(0.95)
        np.testing.assert_allclose(found["mean"][place] - found["half_width"][place], expected.low, rtol=1e-10)
        np.testing.assert_allclose(found["mean"][place] + found["half_width"][place], expected.high, rtol=1e-10)


def test_the_best_of_n_is_the_mean_over_all_ways_to_draw_n():
    rng = np.random.default_rng(1)
    drawn = {"proxy": rng.normal(size=(3, 8)), "gold": rng.normal(size=(3, 8))}
    rows = {row["n"]: row for row in sentiment_numbers.best_of([drawn, drawn])}
    assert sorted(rows) == [1, 2, 4, 8]
    for n, row in rows.items():
        ways = [list(way) for way in itertools.combinations(range(8), n)]
        picked = np.array([[way[drawn["proxy"][p, way].argmax()] for way in ways] for p in range(3)])
        for name in drawn:
            expected = np.take_along_axis(drawn[name], picked, axis=1).mean()
            np.testing.assert_allclose(row[name]["mean"], expected, rtol=1e-10)
            assert row[name]["half_width"] == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(row["kl_bound"], np.log(n) - (n - 1) / n, rtol=1e-6, atol=1e-12)


def test_the_area_under_the_curve_counts_pairs_and_ties_half():
    values, positive = np.array([0.0, 1.0, 1.0, 2.0, 3.0]), np.array([False, True, False, False, True])
    pairs = [(good, bad) for good in values[positive] for bad in values[~positive]]
    expected = np.mean([(good > bad) + 0.5 * (good == bad) for good, bad in pairs])
    assert sentiment_models.area_under_curve(values, positive) == pytest.approx(expected)


def test_gains_pair_the_seeds_with_the_reference():
    snapshots = {name: np.zeros((2, 1, 3)) for name in sentiment_numbers.MEASURED}
    snapshots["gold"][:, 0, -1] = [1.0, 3.0]
    start = [{"gold": 0.5}, {"gold": 2.3}]
    (row,) = sentiment_numbers.summary({"dpo": {"beta": np.array([0.1]), "snapshots": snapshots}}, start)
    expected = scipy.stats.ttest_1samp([0.5, 0.7], 0).confidence_interval(0.95)
    assert row["gain"]["mean"] - row["gain"]["half_width"] == pytest.approx(expected.low)


def test_the_lead_pairs_the_seeds():
    def lanes(gold):
        return {"beta": np.array([0.1, 1.0]), "snapshots": {"gold": np.asarray(gold)[:, :, None]}}

    found = {"a": lanes([[1.0, 3.0], [2.0, 4.1]]), "b": lanes([[0.5, 0.0], [1.6, 0.0]])}
    lead = sentiment_numbers._lead(found, {"a": {"beta": 1.0}, "b": {"beta": 0.1}}, ["a", "b"])
    assert lead["mean"] == pytest.approx(2.5) and lead["half_width"] == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def world():
    """A random GPT-2 with a proxy that counts one token, and the pairs of its answers."""
    lm = GPT2(GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    head = ScalarHead(lm)
    params = lm.init(jax.random.key(0))
    config = types.SimpleNamespace(new_tokens=4, pairs=512, pairs_at_once=256)
    tools = sentiment_policies.Tools(lm, head, config)
    scorer = sentiment_models.Scorer(head.init(jax.random.key(1), params), jnp.zeros(()))
    prompts = Prompts(jnp.array([[1, 2], [3, 4], [5, 6]]), jnp.ones((3, 2), bool))
    text = Sequences(*(jnp.ones((1, 4), kind) for kind in (jnp.int32, bool, bool)))
    world = sentiment_policies.World(params, scorer, scorer, prompts, prompts, text, text)
    pairs = jax.jit(lambda key: sentiment_policies.judged_pairs(tools, world, key))(jax.random.key(2))
    return tools, world, pairs


def test_pairs_are_judged_by_the_law_of_bradley_and_terry(world):
    """The expected share of pairs whose chosen answer scores higher, and its mean gain: both to z < 4."""
    tools, world, pairs = world
    score = jax.jit(lambda rows: tools.reward(world.proxy, rows))
    chosen, rejected = (np.asarray(score(side)) for side in (pairs.chosen, pairs.rejected))
    gap = np.abs(chosen - rejected)
    law = 1 / (1 + np.exp(-gap))
    wins = (chosen > rejected)[gap > 0]
    law = law[gap > 0]
    z = (wins - law).sum() / np.sqrt((law * (1 - law)).sum())
    assert len(wins) > 400 and abs(z) < 4
    np.testing.assert_array_equal(pairs.chosen.tokens[:, :2], pairs.rejected.tokens[:, :2])


def test_mismatched_answers_are_those_of_the_next_prompt(world):
    tools, world, pairs = world
    few = jax.tree.map(lambda leaf: leaf[:4], pairs)
    batch = jax.jit(lambda few: sentiment_policies.judged(tools, world, few))(few)
    np.testing.assert_array_equal(batch.mismatched.tokens[:, :2], batch.answers.tokens[:, :2])
    np.testing.assert_array_equal(batch.mismatched.tokens[:, 2:], np.roll(batch.answers.tokens[:, 2:], 1, axis=0))
    np.testing.assert_array_equal(np.asarray(batch.desirable), np.arange(8) < 4)
