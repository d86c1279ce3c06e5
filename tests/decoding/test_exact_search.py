import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.decoding.exact_search import _step, exact_search
from jaxrl_llm.tabular import TabularLM
from tests.conftest import log_softmax, random_params

LM = TabularLM(3, 6)
PREFIXES = [p for length in range(6) for p in itertools.product(range(3), repeat=length)]
PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def table(seed):
    params = random_params(LM, seed, dtype=jnp.float64)
    return params, dict(zip(PREFIXES, log_softmax(params["logits"]), strict=True))


def best_of_all(distribution, count, penalty, eos, prompt):
    """By enumeration: the best sequence and its log-probability."""
    found = []
    for length in range(1, count + 1):
        for tokens in itertools.product(range(3), repeat=length):
            if not set(tokens[:-1]) & set(eos) and (length == count or tokens[-1] in eos):
                log_prob = sum(distribution[(*prompt, *tokens[:t])][tokens[t]] for t in range(length))
                found.append((log_prob / length**penalty, log_prob, tokens))
    return max(found), len(found)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("eos", [(), (2,), (0, 2)], ids=str)
def test_it_finds_what_enumeration_finds(penalty, eos):
    visited = []
    for seed, prompt in itertools.product(range(5), ((), (1,), (2, 0))):
        params, distribution = table(seed)
        (score, log_prob, tokens), _ = best_of_all(distribution, 4, penalty, eos, prompt)
        found = exact_search(
            LM, params, np.asarray(prompt, int), max_new_tokens=4, length_penalty=penalty, eos_id=eos or None
        )
        assert tuple(found.tokens.tolist()) == tokens
        np.testing.assert_allclose([found.log_prob, found.score], [log_prob, score], rtol=1e-12)
        visited.append(found.num_nodes)
    if penalty == 0:  # the bound cuts: of 40 prefixes (7 where two tokens end) most are never looked at
        assert np.mean(visited) < {0: 20, 1: 12, 2: 4}[len(eos)]


def test_the_nodes_are_those_that_cannot_be_left_out():
    """At least the prefixes that are more probable than the answer, and at most all."""
    params, distribution = table(0)
    found = exact_search(LM, params, np.zeros(0, int), max_new_tokens=4)
    needed = sum(
        sum(distribution[p[:t]][p[t]] for t in range(len(p))) > found.log_prob for p in PREFIXES if 0 < len(p) < 4
    )
    assert needed + 1 <= found.num_nodes <= 40


@pytest.mark.slow
def test_it_is_what_a_beam_search_may_miss(gpt2):
    lm, params = gpt2
    prompt = np.asarray([3, 1, 4])
    options = {"max_new_tokens": 5, "eos_id": 7}
    found = exact_search(lm, params, prompt, **options)
    beams = beam_search(lm, params, prompt[None], num_beams=8, **options)
    assert found.log_prob >= float(beams.log_prob[0, 0]) - 1e-4
    text = jnp.asarray([*prompt, *found.tokens])[None]
    log_probs = log_softmax(lm.apply(params, text)[0])[0]
    total = sum(log_probs[len(prompt) - 1 + t, token] for t, token in enumerate(found.tokens))
    np.testing.assert_allclose(found.log_prob, total, atol=1e-4)


def test_one_program_serves_all_depths_and_penalties():
    lm = TabularLM(2, 8)  # a model that no other test compiles
    before = _step._cache_size()
    for length, count, penalty in [(0, 4, 0.0), (3, 5, 1.0), (2, 2, -1.0)]:
        exact_search(lm, random_params(lm), np.ones(length, int), max_new_tokens=count, length_penalty=penalty)
    assert _step._cache_size() - before == 1


def test_too_many_nodes_are_refused():
    params, _ = table(0)
    options = {"max_new_tokens": 4, "length_penalty": 2.0}
    needed = exact_search(LM, params, np.zeros(0, int), **options).num_nodes
    assert exact_search(LM, params, np.zeros(0, int), **options, max_nodes=needed).num_nodes == needed
    with pytest.raises(RuntimeError, match=f"max_nodes must be larger than {needed - 1}: .*best score so far"):
        exact_search(LM, params, np.zeros(0, int), **options, max_nodes=needed - 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length_penalty": np.nan}, "length_penalty must be one finite number"),
        ({"max_nodes": 0}, "max_nodes must be an integer of at least 1, but is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, but is 0"),
    ],
)
def test_mistakes_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        exact_search(LM, table(0)[0], **{"prompt": np.zeros(0, int), "max_new_tokens": 4} | wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_logits_that_are_no_distribution_raise(value, row):
    logits = table(0)[0]["logits"].at[0].set(jnp.asarray([9.0, 0, 0]))  # token 0 is looked at first
    with pytest.raises(FloatingPointError, match="NaN, \\+inf, or all −inf"):
        exact_search(LM, {"logits": logits.at[row].set(value)}, np.zeros(0, int), max_new_tokens=4)


def test_impossible_tokens_are_left_out():
    logits = jnp.where(jnp.arange(3) == 1, table(0)[0]["logits"], -jnp.inf)
    found = exact_search(LM, {"logits": logits}, np.zeros(0, int), max_new_tokens=4)
    assert found.tokens.tolist() == [1] * 4 and found.log_prob == 0 and found.num_nodes == 4
