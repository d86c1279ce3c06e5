import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.decoding import generate, search_tree
from jaxrl_llm.decoding.constraints import Constrained, from_regex
from jaxrl_llm.decoding.transforms import MinLength, NoRepeatNgram, Temperature, TopK, TopP
from jaxrl_llm.decoding.tree import node_logits
from jaxrl_llm.tabular import TabularLM
from tests.conftest import CONTEXT, TINY, VOCAB, assert_follows, kept_by_top_k, log_softmax, random_params
from tests.decoding.decoders import ended_distribution, exact_log_probs

ROOT = jnp.zeros(0, jnp.int32)  # the empty prompt
PROMPT = jnp.asarray([3, 1, 4, 1, 5])
forward = jax.jit(lambda lm, params, tokens: lm.apply(params, tokens), static_argnums=0)


def children_of(tree):
    """From each node's id (0: the root) to its children, in their order."""
    children = {0: []}
    for node in tree.nodes():
        children[node.id] = []
        children[node.parent].append(node)
    return children


def tokens_to(tree, node):
    return tuple(each.token for each in tree.path(node))


def table_distribution(lm, params):
    """From each prefix to the log-probabilities after it, in float64."""
    prefixes = [p for length in range(lm.horizon) for p in itertools.product(range(lm.vocab_size), repeat=length)]
    return dict(zip(prefixes, log_softmax(params["logits"]), strict=True))


# Every sequence -------------------------------------------------------------------------------------------------------


def test_the_full_tree_holds_every_sequence_with_its_exact_log_probability(tabular):
    lm, params = tabular
    tree = search_tree(lm, params, ROOT, branching=3, depth=4)
    exact = exact_log_probs(lm, params)
    leaves = {tokens_to(tree, leaf): leaf for leaf in tree.leaves()}
    assert sorted(leaves) == list(itertools.product(range(3), repeat=4))
    np.testing.assert_allclose([leaves[row].total_log_prob for row in sorted(leaves)], exact, atol=1e-5)
    tokens, score = tree.best()
    best = np.asarray(oracle.enumerate_sequences(lm))[np.argmax(exact)]
    np.testing.assert_array_equal(tokens, best)
    np.testing.assert_allclose(score, np.max(exact) / 4, atol=1e-5)


def test_nodes_are_numbered_from_one_with_parents_first_and_add_up(tabular):
    lm, params = tabular
    tree = search_tree(lm, params, ROOT, branching=2, depth=3)
    nodes, distribution = list(tree.nodes()), table_distribution(lm, params)
    assert [node.id for node in nodes] == list(range(1, 15))
    assert [node.level for node in nodes] == [1] * 2 + [2] * 4 + [3] * 8
    by_id = {node.id: node for node in nodes}
    for node in nodes:
        *before, token = tokens_to(tree, node)
        np.testing.assert_allclose(node.log_prob, distribution[tuple(before)][token], atol=1e-5)
        above = by_id[node.parent].total_log_prob if node.parent else 0
        np.testing.assert_allclose(node.total_log_prob, above + node.log_prob, atol=1e-5)
        np.testing.assert_allclose(node.score, node.total_log_prob / node.level, rtol=1e-6)
        assert node.parent < node.id and not node.ended
    assert [leaf.id for leaf in tree.leaves()] == list(range(7, 15))


def test_best_takes_the_most_probable_tokens_in_their_order(tabular):
    lm, params = tabular
    tree, distribution = search_tree(lm, params, ROOT, branching=2, depth=4), table_distribution(lm, params)
    prefixes = {0: ()} | {node.id: tokens_to(tree, node) for node in tree.nodes()}
    for parent, children in children_of(tree).items():
        if len(prefixes[parent]) < 4:
            expected = np.argsort(-distribution[prefixes[parent]])[:2]
            assert [child.token for child in children] == expected.tolist()


# On a transformer -----------------------------------------------------------------------------------------------------


def test_a_chain_is_greedy_generation(gpt2):
    lm, params = gpt2
    tree = search_tree(lm, params, PROMPT, branching=1, depth=16)
    generation = generate(lm, params, PROMPT[None], max_new_tokens=16, greedy=True)
    tokens, score = tree.best()
    np.testing.assert_array_equal(tokens, generation.tokens[0])
    np.testing.assert_allclose([node.log_prob for node in tree.nodes()], generation.logp[0], atol=1e-4)
    np.testing.assert_allclose(score, generation.logp.mean(), atol=1e-4)
    assert len(set(tokens.tolist())) > 3


@pytest.mark.parametrize(("model", "select"), [("gpt2", Temperature(2.0)), ("llama", "best")], ids=str)
def test_every_node_has_the_log_probability_of_its_path_scored_alone(model, select):
    lm, params = TINY[model], random_params(TINY[model])
    tree = search_tree(lm, params, PROMPT, branching=3, depth=3, select=select, key=jax.random.key(4))
    nodes = list(tree.nodes())
    paths = np.zeros((len(nodes), len(PROMPT) + 3), int)
    for row, node in zip(paths, nodes, strict=True):
        row[: len(PROMPT) + node.level] = [*PROMPT, *tokens_to(tree, node)]
    logits = jax.jit(lambda params, tokens: lm.apply(params, tokens)[0])(params, jnp.asarray(paths))
    log_probs = log_softmax(logits)
    assert len(nodes) == 3 + 9 + 27 and len({tokens_to(tree, node) for node in nodes}) == 39
    for row, path, node in zip(log_probs, paths, nodes, strict=True):
        at = len(PROMPT) - 1 + np.arange(node.level)
        chosen = row[at, path[at + 1]]
        np.testing.assert_allclose(node.log_prob, chosen[-1], atol=1e-4)
        np.testing.assert_allclose(node.total_log_prob, chosen.sum(), atol=1e-4)
    for children in children_of(tree).values():
        falling = [child.log_prob for child in children]
        assert falling == sorted(falling, reverse=True)
        assert len({child.token for child in children}) == len(children)


def test_the_bucket_of_the_prompt_changes_nothing(gpt2):
    lm, params = gpt2
    long = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, CONTEXT - 2))
    tree = search_tree(lm, params, long, branching=2, depth=2)  # up to the last place of the context
    logits, _ = jax.jit(lambda params, tokens: lm.apply(params, tokens))(params, long[None])
    first = sorted(log_softmax(logits[0, -1]), reverse=True)[:2]
    np.testing.assert_allclose(tree.log_probs[0, :2], first, atol=1e-4)
    assert np.isfinite(tree.log_probs[1, :4]).all()


# Chance ---------------------------------------------------------------------------------------------------------------


def test_the_same_key_gives_the_same_tree_and_another_key_another(gpt2):
    lm, params = gpt2
    grow = functools.partial(search_tree, lm, params, PROMPT, branching=3, depth=3, select=Temperature(2.0))
    one, two, other = grow(key=jax.random.key(0)), grow(key=jax.random.key(0)), grow(key=jax.random.key(1))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (one.tokens != other.tokens).any()


def trees(lm, params, draws, **options):
    keys = jax.random.split(jax.random.key(3), draws)
    return jax.jit(jax.vmap(lambda key: search_tree(lm, params, ROOT, key=key, **options)))(keys)


def distribution_of_sets(logits, count):
    """Of drawing `count` tokens without replacement: the probability of each set, in lexicographic order."""
    probabilities, distribution = np.exp(log_softmax(logits)), {}
    for order in itertools.permutations(range(len(probabilities)), count):
        left = 1 - np.cumsum([0, *probabilities[list(order[:-1])]])
        chance = np.prod(probabilities[list(order)] / left) if (left > 1e-12).all() else 0.0
        distribution[tuple(sorted(order))] = distribution.get(tuple(sorted(order)), 0) + chance
    return distribution


@pytest.mark.parametrize("transform", [Temperature(1.0), TopK(3)], ids=str)
def test_children_follow_the_distribution_of_draws_without_replacement(transform):
    lm = TabularLM(vocab_size=5, horizon=1)
    params = random_params(lm, 6)
    found = np.sort(np.asarray(trees(lm, params, 20_000, branching=2, depth=1, select=transform).tokens)[:, 0], axis=1)
    logits = np.asarray(params["logits"][0])
    distribution = distribution_of_sets(
        np.where(kept_by_top_k(logits, 3), logits, -np.inf) if isinstance(transform, TopK) else logits, 2
    )
    place = {pair: index for index, pair in enumerate(distribution)}
    assert_follows([place[tuple(pair)] for pair in found.tolist()], list(distribution.values()))


def test_the_draws_of_two_nodes_and_of_two_levels_are_independent():
    lm = TabularLM(vocab_size=3, horizon=2)
    logits = jnp.asarray([0.0, 0.7, -0.4])
    params = {"logits": jnp.broadcast_to(logits, (4, 3))}  # the same distribution at every node
    grown = trees(lm, params, 20_000, branching=2, depth=2, select=Temperature(1.0))
    pairs = np.stack([grown.tokens[:, 0, :2], grown.tokens[:, 1, :2], grown.tokens[:, 1, 2:]], axis=1)
    missing = 3 - pairs.sum(axis=-1)  # of each node, the one of 0, 1, 2 that is not drawn
    distribution = np.asarray([distribution_of_sets(logits, 2)[pair] for pair in [(1, 2), (0, 2), (0, 1)]])
    assert_follows(missing @ [9, 3, 1], np.einsum("i,j,k->ijk", distribution, distribution, distribution).ravel())


# Fewer children -------------------------------------------------------------------------------------------------------


def test_a_nucleus_of_fewer_tokens_gives_fewer_children():
    lm = TabularLM(vocab_size=4, horizon=2)
    peaked, flat = jnp.log(jnp.asarray([0.02, 0.95, 0.02, 0.01])), jnp.log(jnp.asarray([0.3, 0.28, 0.4, 0.02]))
    params = {"logits": jnp.stack([flat, peaked, flat, peaked, flat])}  # after token 0 and 2 there is one way on
    tree = search_tree(lm, params, ROOT, branching=4, depth=2, select=TopP(0.9), key=jax.random.key(0))
    children = children_of(tree)
    assert [child.token for child in children[0]] == [2, 0, 1]
    below = {child.token: [each.token for each in children[child.id]] for child in children[0]}
    assert below == {0: [1], 1: [2, 0, 1], 2: [1]}
    assert len(tree.leaves()) == 5 and {leaf.level for leaf in tree.leaves()} == {2}
    totals = [leaf.total_log_prob for leaf in tree.leaves()]
    np.testing.assert_allclose(
        sorted(np.exp(totals)), sorted([0.4 * 0.95, 0.3 * 0.95, *0.28 * np.asarray([0.4, 0.3, 0.28])]), rtol=1e-5
    )


def test_a_nucleus_that_keeps_as_many_tokens_as_the_branching_gives_every_node_its_children():
    lm = TabularLM(vocab_size=4, horizon=5)
    params = {"logits": 4 * random_params(lm)["logits"]}  # peaked
    grow = functools.partial(search_tree, lm, params, ROOT, branching=2, depth=5, key=jax.random.key(0))
    nodes = [len(list(grow(select=TopP(0.5, least)).nodes())) for least in (None, 1, 2)]
    assert nodes[0] == nodes[1] < nodes[2] == 2 + 4 + 8 + 16 + 32


def test_a_score_counts_the_tokens_of_the_prompt_when_asked(gpt2):
    """So that a leaf that has ended is not divided by fewer tokens alone: the best leaf may be another."""
    lm, params = gpt2
    grow = functools.partial(search_tree, lm, params, PROMPT, branching=2, depth=3)
    plain, whole = grow(), grow(score_length="all")
    for one, other in zip(plain.nodes(), whole.nodes(), strict=True):
        assert one.score == one.total_log_prob / one.level
        assert other.score == one.total_log_prob / (one.level + len(PROMPT)) and other.id == one.id
    assert plain.best()[0].tolist() == whole.best()[0].tolist(), "all leaves have one length"
    np.testing.assert_allclose(whole.best()[1], plain.best()[1] * 3 / (3 + len(PROMPT)), rtol=1e-6)
    with pytest.raises(ValueError, match="score_length must be generated or all, but is 'prompt'"):
        grow(score_length="prompt")


@pytest.mark.parametrize("select", ["best", [TopK(2)], [NoRepeatNgram(1)]], ids=str)
def test_the_distributions_after_nodes_are_the_tables_and_what_the_selection_leaves_of_them(tabular, select):
    lm, params = tabular
    tree = search_tree(lm, params, ROOT, branching=2, depth=3, select=select, key=jax.random.key(0))
    nodes, distribution = list(tree.nodes()), table_distribution(lm, params)
    inner = sorted({node.parent for node in nodes})[::-1]
    logits, left = node_logits(lm, params, ROOT, tree, inner, select=select)
    for node, own, kept in zip(inner, log_softmax(logits), np.asarray(left) > -np.inf, strict=True):
        path = tokens_to(tree, nodes[node - 1]) if node else ()
        np.testing.assert_allclose(own, distribution[path], atol=1e-5)
        expected = np.ones(3, bool)
        if select == [TopK(2)]:
            expected = kept_by_top_k(distribution[path], 2)
        elif select != "best":
            expected = [token not in path for token in range(3)]
        assert kept.tolist() == list(expected), path
        assert all(kept[child.token] for child in nodes if child.parent == node)
    last = len(nodes)
    for node, said in (
        (last, f"must have children, but {last} is a leaf"),
        (99, rf"must be in \[0, {last}\], but is 99"),
    ):
        with pytest.raises(ValueError, match=said):
            node_logits(lm, params, ROOT, tree, [0, node], select=select)


def test_the_distributions_after_nodes_of_a_transformer_are_those_of_a_forward_pass(gpt2):
    lm, params = gpt2
    tree = search_tree(lm, params, PROMPT, branching=2, depth=3)
    logits, left = node_logits(lm, params, PROMPT, tree, range(7))
    np.testing.assert_array_equal(logits, left)
    for node, found in zip([None, *tree.nodes()][:7], log_softmax(logits), strict=True):
        row = np.zeros(len(PROMPT) + 3, int)
        path = [*PROMPT, *(tokens_to(tree, node) if node else ())]
        row[: len(path)] = path
        expected, _ = forward(lm, params, row[None])
        np.testing.assert_allclose(found, log_softmax(expected[0, len(path) - 1]), atol=1e-4)


@pytest.mark.parametrize("select", ["best", Temperature(1.0)], ids=str)
def test_impossible_tokens_are_no_children(tabular, select):
    lm, params = tabular
    params = {"logits": params["logits"].at[0, 1].set(-jnp.inf).at[1 + 2, :2].set(-jnp.inf)}
    tree = search_tree(lm, params, ROOT, branching=3, depth=2, select=select, key=jax.random.key(0))
    paths = {tokens_to(tree, leaf) for leaf in tree.leaves()}
    assert paths == {(0, 0), (0, 1), (0, 2), (2, 2)}


@pytest.mark.parametrize("eos", [2, [0, 2]], ids=str)
def test_ended_nodes_have_no_children_and_compete_for_the_best(tabular, eos):
    lm, params = tabular
    ends = np.atleast_1d(eos)
    distribution = table_distribution(lm, params)
    for boost in (-4.0, 4.0):  # with much on the end, a short sequence is best
        distribution_of = {
            prefix: log_softmax(row + boost * np.isin(np.arange(3), ends)) for prefix, row in distribution.items()
        }
        table = {"logits": params["logits"].at[:, ends].add(boost)}
        tree = search_tree(lm, table, ROOT, branching=3, depth=4, eos_id=eos)
        every = [
            row
            for length in (1, 2, 3, 4)
            for row in itertools.product(range(3), repeat=length)
            if not set(row[:-1]) & set(ends) and (length == 4 or row[-1] in ends)
        ]
        scores = [np.mean([distribution_of[row[:t]][row[t]] for t in range(len(row))]) for row in every]
        assert sorted(tokens_to(tree, leaf) for leaf in tree.leaves()) == sorted(every)
        assert all(leaf.ended == (leaf.token in ends) for leaf in tree.leaves())
        tokens, score = tree.best()
        assert tuple(tokens) == every[int(np.argmax(scores))]
        np.testing.assert_allclose(score, max(scores), atol=1e-5)
        assert (len(tokens) < 4) == (boost > 0)


def test_if_every_node_ends_the_tree_stops_there(tabular):
    lm, params = tabular
    tree = search_tree(lm, params, ROOT, branching=2, depth=4, eos_id=[0, 1, 2])
    assert len(list(tree.nodes())) == 2 and all(node.ended and node.level == 1 for node in tree.nodes())


# Transforms that look back or have a state ----------------------------------------------------------------------------


@pytest.mark.slow
def test_transforms_with_a_state_or_that_look_back_follow_their_branch(tabular):
    lm, params = tabular
    both = [[NoRepeatNgram(n), MinLength(least, 2)] for n, least in ((1, 0), (9, 3), (1, 2))]  # n of 9 does nothing
    for transforms in (*both, [Constrained(from_regex("ab*|ba", "abc"), 2)]):
        tree = search_tree(lm, params, ROOT, branching=3, depth=4, select=transforms, key=jax.random.key(0), eos_id=2)
        with np.errstate(divide="ignore"):
            distribution = ended_distribution(lm, exact_log_probs(lm, params, transforms), [2])
        assert {tokens_to(tree, leaf) for leaf in tree.leaves()} == {row for row, p in distribution.items() if p > 0}
        assert len(tree.leaves()) < 31, "something is removed"
    with pytest.raises(FloatingPointError, match="no token could be chosen after a node"):
        search_tree(
            *(lm, params, ROOT), branching=3, depth=4, select=[NoRepeatNgram(1), MinLength(3, 2)],
            key=jax.random.key(0), eos_id=2,
        )  # fmt: skip


# What cannot be -------------------------------------------------------------------------------------------------------


def test_log_probabilities_of_bfloat16_parameters_are_float32(tabular):
    lm, params = tabular
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tree = search_tree(lm, params, ROOT, branching=3, depth=4)
    assert tree.log_probs.dtype == jnp.float32
    distribution = table_distribution(lm, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    for leaf in tree.leaves():
        row = tokens_to(tree, leaf)
        exact = sum(distribution[row[:time]][token] for time, token in enumerate(row))
        np.testing.assert_allclose(leaf.total_log_prob, exact, atol=1e-5)


@pytest.mark.parametrize("select", ["best", Temperature(0.5)], ids=["best", "sampled"])
@pytest.mark.parametrize("values", [[jnp.nan, 0, 0], [jnp.nan] * 3, [0, jnp.inf, 0], [-jnp.inf] * 3], ids=str)
@pytest.mark.parametrize("row", [0, 2], ids=["root", "below"])
def test_logits_that_are_no_distribution_raise(tabular, select, values, row):
    lm, params = tabular
    params = {"logits": params["logits"].at[row].set(jnp.asarray(values, jnp.float32))}
    with pytest.raises(FloatingPointError, match=r"NaN, \+inf, or all −inf"):
        search_tree(lm, params, ROOT, branching=3, depth=2, select=select, key=jax.random.key(0))


def test_logits_that_are_no_distribution_do_no_harm_below_an_end(tabular):
    lm, params = tabular
    params = {"logits": params["logits"].at[1 + 2].set(jnp.nan)}
    tree = search_tree(lm, params, ROOT, branching=3, depth=2, eos_id=2)
    assert len(tree.leaves()) == 1 + 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branching": 0}, r"branching must be in \[1, 23\].*are 0 and 2"),
        ({"branching": 24}, r"branching must be in \[1, 23\].*are 24 and 2"),
        ({"depth": 0}, r"depth at least 1.*are 2 and 0"),
        ({"branching": 2, "depth": 13}, r"2\*\*13 leaves are more than the 4096"),
        ({"branching": 23, "depth": 30}, r"23\*\*30 leaves are more than the 4096"),
        ({"select": "nonsense"}, "select must be \"best\" or a transform, but is 'nonsense'"),
        ({"select": 3}, "transform must be a Transform"),
        ({"select": TopK(jnp.ones(2, int))}, "k of TopK must be one number"),
        ({"select": TopK(3)}, "needs key="),
        ({"select": TopK(3), "key": jax.random.PRNGKey(0)}, "made by jax.random.key, but is .*uint32"),
        ({"select": TopK(3), "key": jax.random.split(jax.random.key(0), 2)}, r"shape \(2,\)"),
    ],
)
def test_mistakes_are_named(gpt2, options, message):
    lm, params = gpt2
    with pytest.raises(ValueError, match=message):
        search_tree(lm, params, PROMPT, **{"branching": 2, "depth": 2} | options)
