import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import contrastive, generate
from jaxrl_llm.decoding.contrastive import contrastive_search
from jaxrl_llm.tabular import TabularLM
from tests.conftest import CONTEXT, TINY, VOCAB, log_softmax, random_params
from tests.decoding.decoders import LENGTHS, NEVER, PROMPTS, ROWS, assert_same, spread

pytestmark = pytest.mark.slow

NEW = 12
GPT2 = TINY["gpt2"]


@pytest.fixture(scope="module")
def params():
    """Of GPT-2."""
    return random_params(GPT2)


def search(params, **options):
    options = {"top_k": 4, "alpha": 0.6, "max_new_tokens": NEW, "eos_id": NEVER} | spread() | options
    return contrastive_search(GPT2, params, **options)


@functools.partial(jax.jit, static_argnums=0)
def states_and_logits(lm, params, tokens, mask):
    hidden, _ = lm.hidden(params, tokens, mask=mask)
    return hidden, lm.logits(params, hidden)


def reference(params, prompt, *, top_k, alpha, count):
    """By its definition, in float64, without cache or padding: every candidate is scored with all before it."""
    row, logp, runner_up = list(prompt), [], []

    def score(rows):
        tokens, lengths = np.zeros((VOCAB, CONTEXT), int), len(rows[0])
        for number, each in enumerate(rows):
            tokens[number, :lengths] = each
        found = states_and_logits(GPT2, params, jnp.asarray(tokens), jnp.arange(CONTEXT) < lengths + 0 * tokens)
        return (np.asarray(each, np.float64)[: len(rows), :lengths] for each in found)

    for _ in range(count):
        before, logits = (each[0] for each in score([row]))
        distribution = log_softmax(logits[-1])
        candidates = np.argsort(-distribution, kind="stable")[:top_k]
        hidden, _ = score([[*row, token] for token in candidates])
        cosine = (hidden[:, -1] @ before.T) / np.outer(
            np.linalg.norm(hidden[:, -1], axis=-1), np.linalg.norm(before, axis=-1)
        )
        scores = (1 - alpha) * np.exp(distribution[candidates]) - alpha * cosine.max(axis=1)
        row.append(int(candidates[scores.argmax()]))
        logp.append(distribution[row[-1]])
        runner_up.append(np.sort(scores)[-1] - np.sort(scores)[-2])
    assert min(runner_up) > 1e-5, "a choice too close to compare"
    return row[len(prompt) :], logp


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_tokens_are_those_of_the_definition(params, alpha):
    generation = search(params, alpha=alpha)
    greedy = generate(GPT2, params, **spread(), max_new_tokens=NEW, greedy=True, eos_id=NEVER)
    for row, length in enumerate(LENGTHS[:3]):
        tokens, logp = reference(params, PROMPTS[row, :length], top_k=4, alpha=alpha, count=NEW)
        np.testing.assert_array_equal(generation.tokens[row], tokens)
        np.testing.assert_allclose(generation.logp[row], logp, atol=1e-4)
    assert (generation.tokens != greedy.tokens).any(axis=1).all()
    assert generation.mask.all() and not generation.logp_sampler.any()


@pytest.mark.parametrize(("top_k", "alpha"), [(4, 0.0), (4, 0), (1, 0.9)])
def test_no_penalty_or_no_choice_is_greedy(params, top_k, alpha):
    greedy = generate(GPT2, params, **spread(), max_new_tokens=NEW, greedy=True, eos_id=NEVER)
    assert_same(search(params, top_k=top_k, alpha=alpha), greedy)


def test_a_row_ends_with_its_end_or_its_limit_and_each_has_its_alpha(params):
    alphas, limits = np.asarray([0.0, 0.3, 0.6, 0.6, 1.0]), np.asarray([12, 12, 1, 12, 12])
    single = {alpha: search(params, alpha=float(alpha)) for alpha in set(alphas.tolist())}
    full = [np.asarray(single[alpha].tokens[row]) for row, alpha in enumerate(alphas.tolist())]
    ends = [int(full[0][7]), int(full[1][5])]
    generation = search(params, alpha=alphas, max_new_tokens=limits, eos_id=ends, pad_id=-7)
    for row in range(ROWS):
        at = [place for place, token in enumerate(full[row]) if token in ends]
        length = min([place + 1 for place in at] + [limits[row]])
        np.testing.assert_array_equal(generation.mask[row], np.arange(NEW) < length)
        np.testing.assert_array_equal(generation.tokens[row], np.where(np.arange(NEW) < length, full[row], -7))
        assert not generation.logp[row, length:].any() and generation.logp[row, :length].all()
    assert not generation.mask.all(axis=1)[:3].any()


def test_up_to_the_last_place_of_the_context(params):
    prompts = np.random.default_rng(1).integers(0, VOCAB, (1, CONTEXT - 3))
    found = contrastive_search(GPT2, params, prompts, top_k=4, alpha=0.6, max_new_tokens=3)
    np.testing.assert_array_equal(found.tokens[0], reference(params, prompts[0], top_k=4, alpha=0.6, count=3)[0])


# On a table the hidden state is the row of logits ---------------------------------------------------------------------


LM = TabularLM(vocab_size=3, horizon=4)


def on_a_table(table, alpha, top_k, horizon=4):
    """The path, by the definition; coordinates that are infinite count as 0."""
    first = [sum(3**shorter for shorter in range(t)) for t in range(5)]
    path, states = (), []

    def row(path):
        index = sum(token * 3 ** (len(path) - 1 - i) for i, token in enumerate(path))
        return table[first[len(path)] + index] if len(path) < 4 else np.zeros(3)

    def cosine(one, two):
        one, two = np.where(np.isinf(one), 0, one), np.where(np.isinf(two), 0, two)
        return one @ two / max(np.linalg.norm(one) * np.linalg.norm(two), 1e-300)

    while len(path) < horizon:
        distribution = np.exp(log_softmax(row(path)))
        scores = {}
        for token in np.argsort(-distribution, kind="stable")[:top_k]:
            if distribution[token] > 0:
                penalty = max((cosine(row((*path, int(token))), state) for state in states), default=0)
                scores[int(token)] = (1 - alpha) * distribution[token] - alpha * penalty
        path = (*path, max(scores, key=scores.get))
        states.append(row(path))
    return path


@pytest.mark.parametrize("impossible", [False, True])
def test_on_a_table_also_from_nothing_and_with_impossible_tokens(impossible):
    paths = []
    for seed, alpha in itertools.product(range(6), (0.2, 0.7)):
        table = np.array(random_params(LM, seed)["logits"], np.float64)
        if impossible:
            table[np.random.default_rng(seed).random(table.shape) < 0.4] = -np.inf
            table[:, 0] = np.where(np.isinf(table).all(axis=1), 0.5, table[:, 0])
        lm_params = {"logits": jnp.asarray(table, jnp.float32)}
        options = {"top_k": 3, "alpha": alpha, "max_new_tokens": 4, "eos_id": NEVER}
        found = contrastive_search(LM, lm_params, jnp.zeros((1, 0), jnp.int32), **options)
        paths.append(on_a_table(table, alpha, 3))
        np.testing.assert_array_equal(found.tokens[0], paths[-1])
        assert np.isfinite(found.logp).all()
    assert len(set(paths)) > 5


def test_float64_parameters_give_float64_log_probabilities():
    with jax.enable_x64(True):
        table = random_params(LM, 1, dtype=jnp.float64)
        found = contrastive_search(LM, table, jnp.zeros((1, 0), jnp.int32), top_k=2, alpha=0.5, max_new_tokens=4)
    assert found.logp.dtype == jnp.float64
    path = on_a_table(np.asarray(table["logits"]), 0.5, 2)
    np.testing.assert_array_equal(found.tokens[0], path)
    np.testing.assert_allclose(found.logp[0, 0], log_softmax(table["logits"][0])[path[0]], rtol=1e-12)


# Programs and mistakes ------------------------------------------------------------------------------------------------


def test_another_alpha_compiles_nothing_new(params):
    search(params)
    before = contrastive.decode._cache_size()
    for alpha in (0.0, 1, jnp.float32(0.25), np.full(5, 0.5)):
        search(params, alpha=alpha)
    assert contrastive.decode._cache_size() == before


MISTAKES = {
    "no candidates": ({"top_k": 0}, r"top_k must be an integer in \[1, 23\].*is 0"),
    "more than the vocabulary": ({"top_k": 24}, r"top_k must be an integer in \[1, 23\].*is 24"),
    "half a candidate": ({"top_k": 2.5}, r"top_k must be an integer.*is 2.5"),
    "alpha above 1": ({"alpha": 1.1}, r"alpha must be in \[0, 1\]"),
    "alpha below 0": ({"alpha": -0.1}, r"alpha must be in \[0, 1\]"),
    "alpha NaN": ({"alpha": np.nan}, r"alpha must be in \[0, 1\]"),
    "alphas of other rows": ({"alpha": np.ones(3)}, "one for each of 5 rows"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_anything_is_compiled(params, options, message):
    before = contrastive.decode._cache_size()
    with pytest.raises(ValueError, match=message):
        search(params, **options)
    assert contrastive.decode._cache_size() == before
