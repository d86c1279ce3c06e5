"""The sentiment experiment: its numbers against their definitions, and its data handling on a small model."""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import sentiment_alignment, statistics
from experiments.sentiment import models as sentiment_models
from experiments.sentiment import numbers as sentiment_numbers
from experiments.sentiment import policies as sentiment_policies
from figures import sentiment_alignment as figure
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.plots.style import text_width
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training.rollout import Prompts


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


def test_rewards_are_interpolated_where_a_path_first_reaches_a_kl():
    assert sentiment_numbers.at_level([4.0, 3.0, 6.0], [1.0, 9.0, 2.0], 2.0) == pytest.approx(0.5)
    assert sentiment_numbers.at_level([4.0, 3.0, 6.0], [1.0, 9.0, 2.0], 5.0) == pytest.approx(9 - 7 * 2 / 3)
    assert math.isnan(sentiment_numbers.at_level([4.0, 3.0], [1.0, 2.0], 5.0))


def test_methods_are_compared_seed_by_seed_and_all_are_corrected_for():
    rng = np.random.default_rng(2)
    gold = {name: {level: {"gold": rng.normal(size=4)} for level in sentiment_numbers.LEVELS} for name in "abc"}
    gold["c"][10.0]["gold"][0] = math.nan  # one seed does not get there
    rows = sentiment_numbers.comparisons(gold)
    assert [(row["first"], row["second"]) for row in rows if row["kl"] == 10.0] == [("a", "b")] and len(rows) == 7
    expected = [
        scipy.stats.ttest_rel(*(gold[row[side]][row["kl"]]["gold"] for side in ("first", "second"))).pvalue
        for row in rows
    ]
    np.testing.assert_allclose([row["p"] for row in rows], expected)
    np.testing.assert_allclose([row["holm"] for row in rows], statistics.holm(expected))


def test_the_slope_compares_answers_to_the_same_prompt_only():
    proxy = np.array([[0.0, 1.0], [10.0, 12.0]])
    gold = np.array([[5.0, 5.5], [-7.0, -6.0]])  # between the prompts it falls
    assert sentiment_numbers.slope_of([{"proxy": proxy, "gold": gold}]) == pytest.approx(0.5)


def test_every_method_is_given_the_same_number_of_updates():
    config = sentiment_alignment.run.presets["full"]
    lm = GPT2(GPT2Config(vocab_size=8, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    tools = sentiment_policies.Tools(lm, ScalarHead(lm), config)
    world = types.SimpleNamespace(reference=lm.init(jax.random.key(0)))
    for name in config.methods:
        _, rows = sentiment_policies.program_of(tools, name).start(world, jax.random.key(0))
        online = name in sentiment_policies.ONLINE
        settings = sentiment_policies.Settings(0.0, 0.0, 0.0)
        each = rows.shape[1] * (sentiment_policies.method_of(tools, name, settings).epochs if online else 1)
        assert config.snapshots * each == config.updates
        assert rows.shape[0] == config.snapshots * (1 if online else sentiment_policies.LONGEST)


def test_words_count_once_a_review_and_only_where_they_are_real():
    rng = np.random.default_rng(3)
    tokens, mask = rng.integers(0, 5, (6, 9)), rng.random((6, 9)) < 0.8
    weights = rng.normal(size=5 + sentiment_models.BUCKETS).astype(np.float32)
    found = jax.jit(sentiment_models.word_scores, static_argnums=0)(5, weights, tokens, mask)
    for row, real, score in zip(tokens, mask & (tokens != 0), found, strict=True):
        words = {int(word) for word in row[real]}
        words |= {5 + (int(a) * 1000003 + int(b) * 7919) % sentiment_models.BUCKETS
                  for a, b, both in zip(row, row[1:], real[1:] & real[:-1], strict=False) if both}  # fmt: skip
        assert float(score) == pytest.approx(sum(weights[list(words)]), abs=1e-5)


def test_gold_learns_what_good_reviews_say(monkeypatch):
    monkeypatch.setattr(sentiment_models, "BUCKETS", 2**10)
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 8, (400, 6))
    positive = (tokens == 3).any(axis=1)
    rows = Sequences(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, bool))
    weights = sentiment_models.gold_scorer(8, sentiment_models.Reviews(rows, positive), penalty=1.0)
    assert weights[:8].argmax() == 3
    scores = sentiment_models.word_scores(8, jnp.asarray(weights), *rows[:2])
    assert sentiment_models.area_under_curve(np.asarray(scores), positive) > 0.99


@pytest.mark.parametrize(
    ("losses", "kept", "kept_later", "last"),
    [
        ([3, 2, 1, 2, 2, 2, 0, 0], 2, 2, 5),  # three stretches without a gain end it
        ([1, 2, 3, 4, 0, 0, 0, 0], 0, 0, 3),  # but not before every method's updates are done
        ([9, 8, 7, 6, 5, 4, 3, 2], 3, 7, 7),  # nor while the loss falls
        (None, 3, 3, 3),  # an online method keeps the last
    ],
)
def test_the_parameters_of_the_least_held_out_loss_are_kept(losses, kept, kept_later, last):
    program = sentiment_policies.Program(
        start=lambda world, key: (0, jnp.zeros((7 if losses else 3, 2))),
        stretch=lambda world, pairs, state, rows, settings: (state + 1, {"loss": np.arange(2.0) + state}),
        policy=lambda state: state,
        loss=losses and (lambda world, pairs, beta, params: losses[params]),
    )
    settings = sentiment_policies.Settings(0.1, 0.1, 0.0)
    for path, expected, end in ((False, kept, 3), (True, kept_later, last)):
        found = sentiment_policies.trained(
            program, None, None, settings, jax.random.key(0), lambda params: {"kl": np.float32(params)},
            stretches=3, path=path,
        )  # fmt: skip
        assert found["kept"] == expected and found["params"] == expected and found["end"]["kl"] == expected
        assert found["first"] == {"loss": 0.0} and found["held_out"].tolist() == (losses or [])[: end + 1]
        assert not path or found["path"]["kl"].tolist() == [1, 2, 3]


@pytest.fixture(scope="module")
def world():
    """A random GPT-2 with a proxy that counts one token, and the pairs of its answers."""
    lm = GPT2(GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    head = ScalarHead(lm)
    params = lm.init(jax.random.key(0))
    config = types.SimpleNamespace(new_tokens=4, pairs=512, held_out_pairs=128, pairs_at_once=320, simpo_margin=0.5)
    tools = sentiment_policies.Tools(lm, head, config)
    proxy = head.init(jax.random.key(1), params)
    prompts = Prompts(jnp.array([[1, 2], [3, 4], [5, 6]]), jnp.ones((3, 2), bool))
    text = Sequences(*(jnp.ones((1, 4), kind) for kind in (jnp.int32, bool, bool)))
    gold = jnp.zeros(8 + sentiment_models.BUCKETS)
    world = sentiment_policies.World(params, proxy, gold, jnp.zeros(2), prompts, text, text)
    pairs = jax.jit(lambda key: sentiment_policies.judged_pairs(tools, world, key))(jax.random.key(2))
    return tools, world, pairs


@pytest.mark.slow
def test_pairs_are_judged_by_the_distribution_of_bradley_and_terry(world):
    """The expected share of pairs whose chosen answer scores higher, and the probabilities of the labels: to z < 4."""
    tools, world, pairs = world
    assert len(pairs.train.chosen.tokens) == 512 and len(pairs.held_out.chosen.tokens) == 128
    score = jax.jit(lambda rows: tools.proxy(world, rows))
    chosen, rejected = (np.asarray(score(side)) for side in (pairs.train.chosen, pairs.train.rejected))
    gap = np.abs(chosen - rejected)
    distribution = 1 / (1 + np.exp(-gap))
    wins = (chosen > rejected)[gap > 0]
    distribution = distribution[gap > 0]
    z = (wins - distribution).sum() / np.sqrt((distribution * (1 - distribution)).sum())
    assert len(wins) > 400 and abs(z) < 4
    np.testing.assert_array_equal(pairs.train.chosen.tokens[:, :2], pairs.train.rejected.tokens[:, :2])
    held_out = score(pairs.held_out.chosen) - score(pairs.held_out.rejected)
    np.testing.assert_allclose(pairs.probability, jax.nn.sigmoid(held_out), atol=1e-6)


@pytest.mark.slow
def test_the_held_out_loss_is_expected_over_the_labels(world):
    """At the reference all log-ratios are 0: log 2 for dpo, 1/(2β)² for ipo, 1/2 for kto; simpo by its definition."""
    tools, world, pairs = world
    losses = jax.jit(
        lambda world: {
            name: sentiment_policies.held_out_loss(tools, world, name, pairs, jnp.float32(0.5), world.reference)
            for name in sentiment_policies.OFFLINE
        }
    )
    loss = jax.tree.map(float, losses(world))
    assert [loss[name] for name in ("dpo", "ipo", "kto")] == pytest.approx([math.log(2), 1.0, 0.5], rel=1e-5)
    means = [
        np.asarray(each) / np.asarray(side.completion_mask.sum(axis=1))
        for each, side in (
            (pairs.held_out.logp_ref_chosen, pairs.held_out.chosen),
            (pairs.held_out.logp_ref_rejected, pairs.held_out.rejected),
        )
    ]
    margin, p = 0.5 * (means[0] - means[1]), np.asarray(pairs.probability)
    expected = (p * np.logaddexp(0, 0.5 - margin) + (1 - p) * np.logaddexp(0, 0.5 + margin)).mean()
    assert loss["simpo"] == pytest.approx(expected, rel=1e-5)


def test_mismatched_answers_are_those_of_the_next_prompt(world):
    tools, world, pairs = world
    few = jax.tree.map(lambda leaf: leaf[:4], pairs.train)
    batch = jax.jit(lambda few: sentiment_policies.judged(tools, world, few))(few)
    np.testing.assert_array_equal(batch.mismatched.tokens[:, :2], batch.completions.tokens[:, :2])
    np.testing.assert_array_equal(batch.mismatched.tokens[:, 2:], np.roll(batch.completions.tokens[:, 2:], 1, axis=0))
    np.testing.assert_array_equal(np.asarray(batch.desirable), np.arange(8) < 4)


def test_a_review_ends_with_a_whole_character_and_is_cut_after_a_word():
    tokenizer = types.SimpleNamespace(
        decode=lambda ids, **_: "".join({1: "film", 2: " good\ufffd"}[int(i)] for i in ids)
    )
    text = {"tokens": [[1, 2, 2]], "mask": [[True, True, False]], "gold": [0.5], "proxy": [1.0]}
    assert sentiment_alignment.sample(tokenizer, text, 1) == [
        {"prompt": "film", "answer": " good", "gold": 0.5, "proxy": 1.0}
    ]
    cut = figure.at_words("one two three four", size=8, width=text_width("one two three f", 8))
    assert cut == "one two …"
    assert figure.at_words("one two", size=8, width=200) == "one two"
