"""The committed results on decoding: what they hold, what their figures show, and the arithmetic behind them."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import beam_search, decoding_strategies, search_trees, speculative
from figures.search_trees import pruned
from jaxrl_llm.decoding import Tree
from tests.experiments import entry


def test_the_exercise_shows_its_three_searches():
    data = entry("beam_search")["data"]
    assert data["prompts"][0] == "I have a dream"
    assert (data["beams"], data["new_tokens"]) == (3, 25)
    assert [len(each["texts"]) for each in data["examples"]] == [3, 3, 3]
    assert [("blocked" in each["title"], "0.1" in each["title"]) for each in data["examples"]] == [
        (False, False),
        (True, False),
        (True, True),
    ]


def test_the_prompts_of_beam_search_are_a_sample_of_different_ones():
    prompts = entry("beam_search")["data"]["prompts"]
    assert len(set(prompts)) == len(prompts) >= 24


def test_gains_over_greedy_decoding_that_chance_explains_are_not_held():
    by_setting = {(k, 0, 1, 0.0): {"log_prob": np.zeros(30)} for k in (1, 3, 16)}
    by_setting[(3, 2, 1, 0.0)] = {"log_prob": np.tile([1.0, -1.0], 15)}

    class Config:
        beams, block, widths = 3, 2, (1, 3, 16)

    numbers = beam_search.tests(Config, by_setting)
    assert len(numbers) == 3
    assert all(each["value"] > each["interval"][1] for each in numbers)


@pytest.mark.parametrize("name", ["decoding_strategies" + of for of in ("", ".smollm2-135m-instruct", ".gemma-3-270m")])
def test_every_strategy_has_every_metric_with_an_interval(name):
    rows = entry(name)["data"]["rows"]
    assert rows[0]["name"] == "human"
    assert len({row["name"] for row in rows}) == len(rows) == 18
    for row in rows:
        for metric in ("perplexity", "loops", "seq_rep_4", "zipf", "distinct_1", "distinct_2", "self_bleu"):
            assert row[metric]["low"] <= row[metric]["estimate"] <= row[metric]["high"], (row["name"], metric)
        assert row["loops"]["low"] < row["loops"]["high"], "a share of few texts is not known exactly"


def test_a_strategy_is_told_from_human_text_only_by_more_than_chance():
    rng = np.random.default_rng(0)
    human = rng.normal(size=40)
    surprise = {name: human + rng.normal(size=40) for name in decoding_strategies.FAMILIES} | {"human": human}
    assert decoding_strategies.like_human(surprise) == list(decoding_strategies.FAMILIES)
    surprise["greedy"] = human - 2
    assert "greedy" not in decoding_strategies.like_human(surprise)


def full_tree(probabilities: list[list[float]]) -> Tree:
    """Return a tree of two branches; row l has the probability of each node of level l + 1 given its parent."""
    width = len(probabilities[-1])
    log_probs = np.log([row + [1.0] * (width - len(row)) for row in probabilities])
    totals = log_probs.copy()
    for level in range(1, len(totals)):
        totals[level] += np.repeat(totals[level - 1], 2)[:width]
    exists = np.asarray([[slot < len(row) for slot in range(width)] for row in probabilities])
    tokens = jnp.zeros(exists.shape, jnp.int32)
    return Tree(tokens, jnp.asarray(log_probs), jnp.asarray(totals), exists, exists & False, branching=2)


def test_the_gain_of_the_best_leaf_is_over_the_path_of_most_probable_tokens():
    tree = full_tree([[0.5, 0.4], [0.3, 0.2, 0.9, 0.05]])
    assert search_trees.greedy_leaf(tree) == pytest.approx(np.log(0.5 * 0.3) / 2, abs=1e-6)
    assert search_trees.gain(tree) == pytest.approx(np.log(0.4 * 0.9) / 2 - np.log(0.5 * 0.3) / 2, abs=1e-6)
    assert search_trees.gain(full_tree([[0.5, 0.4], [0.9, 0.05, 0.9, 0.05]])) == 0
    assert search_trees.missed([0.0, 0.1, 0.2]) == 2


def test_the_published_score_of_the_best_leaf_counts_the_tokens_of_the_prompt():
    tree = full_tree([[0.5, 0.4], [0.3, 0.2, 0.9, 0.05]])
    best = search_trees.known_numbers(full_tree([[0.5]] * 5), tree, 4)[-1]
    assert best["value"] == pytest.approx(np.log(0.4 * 0.9) / (2 + 4), abs=1e-6) and "prompt" in best["name"]
    assert tree.best()[1] == pytest.approx(np.log(0.4 * 0.9) / 2, abs=1e-6)


def test_a_pruned_tree_holds_its_best_leaves_and_their_ancestors():
    parents = {0: None, 1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}
    scores = {3: -1.0, 4: -4.0, 5: -2.0, 6: -3.0}
    nodes = [{"id": node, "parent": parent, "score": scores.get(node, -9.0)} for node, parent in parents.items()]
    tree = {"title": "full", "nodes": nodes, "best": [0, 1, 3]}
    shown = pruned(tree, 2)
    assert [node["id"] for node in shown["nodes"]] == [0, 1, 2, 3, 5]
    assert shown["title"] == "full: the 2 best of 4 leaves"
    assert pruned(tree, 4)["nodes"] == nodes


@pytest.mark.parametrize(("rate", "count", "tokens"), [(0.9, 4, 47), (0.3, 1, 5), (0.7, 8, 20)])
def test_tokens_per_round_with_the_last_round_cut_are_those_of_a_simulation(rate, count, tokens):
    rng = np.random.default_rng(0)
    rounds = []
    for _ in range(4000):
        left, here = tokens, 0
        while left > 0:
            accepted = int(np.cumprod(rng.random(count) < rate).sum())
            left, here = left - accepted - 1, here + 1
        rounds.append(here)
    expected = speculative.formula_with_cut(rate, count, tokens)
    error = np.std(rounds) / np.sqrt(len(rounds))
    assert tokens / expected == pytest.approx(np.mean(rounds), abs=4 * error)
    assert expected < speculative.formula(rate, count)


def test_the_cut_of_the_last_round_matters_less_the_longer_the_text():
    assert speculative.formula_with_cut(1.0, 4, 47) == 4.7
    assert speculative.formula_with_cut(0.8, 4, 10_000) == pytest.approx(speculative.formula(0.8, 4), rel=1e-3)
