import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.decoding import Guidance, best_of_n, generate, minimum_bayes_risk, self_consistency
from jaxrl_llm.decoding.transforms import Temperature
from jaxrl_llm.objectives import rlhf
from tests.conftest import VOCAB, assert_follows, random_params
from tests.decoding.decoders import NEVER, assert_same, index_of

pytestmark = pytest.mark.slow

BATCH, N = 4000, 4
NOTHING = jnp.zeros((BATCH, 0), jnp.int32)


# Minimum Bayes risk ---------------------------------------------------------------------------------------------------


def overlap(one, other):
    """The share of places where two sequences agree, and a little for beginning alike: not symmetric."""
    agree = np.asarray(one) == np.asarray(other)
    return agree.mean() + 0.1 * (one[0] <= other[0])


def exact_distribution(lm):
    """All sequences and their log-probabilities under a table whose most probable sequence is not the best answer."""
    params = random_params(lm, 11)
    every = np.asarray(oracle.enumerate_sequences(lm))
    return every, np.asarray(jax.jit(functools.partial(oracle.sequence_log_probs, lm))(params), np.float64)


def test_with_probabilities_as_weights_it_is_the_exact_answer(tabular):
    every, log_probs = exact_distribution(tabular[0])
    exact = np.zeros(len(every))
    for (h, candidate), (y, sequence) in itertools.product(enumerate(every), enumerate(every)):
        exact[h] += np.exp(log_probs[y]) * (np.mean(candidate == sequence) + 0.1 * (candidate[0] <= sequence[0]))
    exact /= np.exp(log_probs).sum()
    for given in ({"weights": np.exp(log_probs)}, {"weights": 7 * np.exp(log_probs)}, {"log_weights": log_probs}):
        answer = minimum_bayes_risk(every, overlap, **given)
        np.testing.assert_allclose(answer.expected_utility, exact, rtol=1e-12)
        assert answer.index == exact.argmax()
    assert exact.argmax() != log_probs.argmax(), "the most probable sequence would be right by chance"
    assert np.sort(exact)[-2] < exact.max() - 1e-6


def test_samples_estimate_it(tabular):
    every, log_probs = exact_distribution(tabular[0])
    exact = minimum_bayes_risk(every, overlap, np.exp(log_probs)).expected_utility
    draws = np.random.default_rng(0).choice(len(every), 400, p=np.exp(log_probs) / np.exp(log_probs).sum())
    estimate = minimum_bayes_risk(every[draws], overlap, candidates=every).expected_utility
    utilities = np.asarray([[overlap(h, y) for y in every] for h in every])
    error = np.sqrt((utilities**2 @ np.exp(log_probs) - exact**2) / 400)
    assert np.abs((estimate - exact) / error).max() < 4
    counts = np.bincount(draws, minlength=len(every))
    distinct = minimum_bayes_risk(every, overlap, counts).expected_utility
    np.testing.assert_allclose(distinct, estimate, rtol=1e-12)


def test_of_zero_one_utility_it_is_the_most_frequent_sample():
    answer = minimum_bayes_risk(["b", "a", "c", "a", "c"], lambda h, y: h == y)
    assert answer.index == 1  # "a" and "c" as often: the first
    np.testing.assert_allclose(answer.expected_utility, [0.2, 0.4, 0.4, 0.4, 0.4])


def test_the_candidate_comes_first_in_the_utility():
    calls = []

    def utility(candidate, sample):
        calls.append((candidate, sample))
        return len(candidate)

    answer = minimum_bayes_risk(["x", "y", "z"], utility, [0.5, 0, 0.5], candidates=["p", "qq"])
    assert (answer.index, calls) == (1, [("p", "x"), ("p", "z"), ("qq", "x"), ("qq", "z")])


def test_log_weights_may_be_far_from_0():
    answer = minimum_bayes_risk([0.0, 1.0, 5.0], lambda h, y: -((h - y) ** 2), log_weights=[-5000, -5001, -np.inf])
    share = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(answer.expected_utility, [share - 1, -share, -25 * share - 16 * (1 - share)])


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "must not be empty, but are 0 and 0"),
        ([1], {"candidates": []}, "must not be empty, but are 1 and 0"),
        ([1, 2], {"weights": [1.0]}, r"each of 2 samples, but have the shape \[1\]"),
        ([1, 2], {"weights": [1.0, -1.0]}, "finite, not negative, and not all 0"),
        ([1, 2], {"weights": [1.0, np.nan]}, "finite, not negative, and not all 0"),
        ([1, 2], {"weights": [0.0, 0.0]}, "finite, not negative, and not all 0"),
        ([1, 2], {"log_weights": [-np.inf, -np.inf]}, "finite, not negative, and not all 0"),
        ([1, 2], {"weights": [1, 1], "log_weights": [0, 0]}, "not both"),
        ([1, np.nan], {}, "utility of candidate 0 against sample 1 is nan"),
    ],
)
def test_mistakes_in_minimum_bayes_risk_are_named(samples, options, message):
    with pytest.raises(ValueError, match=message):
        minimum_bayes_risk(samples, lambda h, y: h * y, **options)


# Best of n ------------------------------------------------------------------------------------------------------------


def rewards_of(tokens):
    """Few values, so many ties."""
    return (tokens == 1).sum(axis=-1) + 0.5 * (tokens[..., 0] == 2)


def best_on_table(lm, params, *, seed):
    options = {"max_new_tokens": 4, "eos_id": NEVER, "transform": Temperature(1.5), "key": jax.random.key(seed)}
    return best_of_n(lm, params, NOTHING, n=N, score=lambda samples: rewards_of(samples.tokens), **options)


def test_its_distribution_is_that_of_the_objectives(tabular):
    lm, params = tabular
    best = best_on_table(lm, params, seed=0)

    @jax.jit
    def distributions(params):
        distribution = oracle.sequence_log_probs(lm, params, Temperature(1.5))
        rewards = rewards_of(oracle.enumerate_sequences(lm)).astype(jnp.float32)
        return jnp.exp(distribution), jnp.exp(rlhf.best_of_n(distribution, rewards, n=N))

    distribution, expected = distributions(params)
    assert_follows(index_of(lm, best.generation.tokens), expected)
    assert np.abs(expected - distribution).sum() > 0.3, "nearly the distribution of one sample"
    assert_follows(index_of(lm, best.samples.tokens.reshape(-1, 4)), distribution)


def test_winners_are_the_first_of_the_highest_scores(tabular):
    best = best_on_table(*tabular, seed=1)
    scores = np.asarray(rewards_of(np.asarray(best.samples.tokens)))
    np.testing.assert_array_equal(best.scores, scores)
    np.testing.assert_array_equal(best.index, scores.argmax(axis=1))
    rows = np.arange(BATCH)
    for name in ("tokens", "mask", "logp", "logp_sampler"):
        samples = np.asarray(getattr(best.samples, name))
        assert samples.shape == (BATCH, N, 4)
        np.testing.assert_array_equal(getattr(best.generation, name), samples[rows, scores.argmax(axis=1)])
    tied = (scores == scores.max(axis=1, keepdims=True)).sum(axis=1) > 1
    assert 0.2 < tied.mean() < 0.99


PROMPTS = np.random.default_rng(4).integers(0, VOCAB, (3, 6))
LENGTHS = np.asarray([6, 1, 4])


def spread(side):
    """The prompts in 9 places, padded on one side."""
    prompts, mask = np.full((3, 9), 7), np.zeros((3, 9), bool)
    for row, length in enumerate(LENGTHS):
        places = slice(9 - length, 9) if side == "left" else slice(0, length)
        prompts[row, places], mask[row, places] = PROMPTS[row, :length], True
    return {"prompts": prompts, "prompt_mask": mask}


def run(gpt2, *, n=4, rows=slice(None), side="left", limits=(8, 5, 8), key=None, **options):
    lm, params = gpt2
    keys = jax.random.split(jax.random.key(9), 3)
    request = {name: value[rows] for name, value in spread(side).items()}
    request |= {"key": keys[rows] if key is None else key, "max_new_tokens": np.asarray(limits)[rows]}
    request |= {"score": lambda samples: samples.logp.sum(axis=-1), "eos_id": [3, 7]}
    return best_of_n(lm, params, n=n, **(request | options))


def test_each_prompt_has_its_own_limit_and_winner(gpt2):
    whole = run(gpt2)
    assert 0 < whole.samples.mask.sum() < whole.samples.mask.size
    assert whole.samples.mask[1].sum(axis=-1).max() <= 5
    assert len({*np.asarray(whole.index).tolist(), *np.asarray(whole.scores.argmin(axis=1)).tolist()}) > 1


def test_the_first_sample_is_the_same_for_every_n_and_the_others_differ(gpt2):
    one, many = run(gpt2, n=1), run(gpt2)
    assert_same(one.samples, jax.tree.map(lambda leaf: leaf[:, :1], many.samples))
    tokens = np.asarray(many.samples.tokens)
    assert all(len({tuple(sample) for sample in row}) > 1 for row in tokens)


def test_of_one_sample_it_is_generate_with_the_samples_key(gpt2):
    lm, params = gpt2
    best = run(gpt2, n=1, key=jax.random.key(2))
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(2), row), 0) for row in range(3)]
    options = {"max_new_tokens": np.asarray((8, 5, 8)), "eos_id": [3, 7]}
    plain = generate(lm, params, **spread("left"), key=jnp.stack(keys), **options)
    assert_same(best.generation, plain)


def test_guidance_is_repeated_with_its_prompts(gpt2):
    lm, params = gpt2
    masks = np.asarray([[1, 1], [0, 1], [1, 1]], bool)
    best = run(gpt2, guidance=Guidance(PROMPTS[:, :2], 1.7, masks))
    rows = np.repeat(np.arange(3), 4)
    keys = jax.random.split(jax.random.key(9), 3)
    options = {"max_new_tokens": np.asarray((8, 5, 8))[rows], "eos_id": [3, 7]}
    options["key"] = jnp.stack([jax.random.fold_in(keys[row], i) for row in range(3) for i in range(4)])
    options["guidance"] = Guidance(PROMPTS[rows, :2], 1.7, masks[rows])
    plain = generate(lm, params, **{name: value[rows] for name, value in spread("left").items()}, **options)
    assert_same(jax.tree.map(lambda leaf: leaf.reshape(12, 8), best.samples), plain)
    assert not np.array_equal(best.samples.tokens, run(gpt2).samples.tokens)


def test_a_scorer_may_be_a_host_function_of_integers_and_reject(gpt2):
    def score(samples):
        tokens = np.asarray(samples.tokens)
        return np.where(np.arange(4) == 2, 0.0, -np.inf) + 0 * tokens[..., 0]

    np.testing.assert_array_equal(run(gpt2, score=score).index, [2, 2, 2])
    integers = run(gpt2, score=lambda samples: np.asarray(samples.mask).sum(axis=-1))
    assert integers.scores.dtype == jnp.float32
    np.testing.assert_array_equal(integers.scores, integers.samples.mask.sum(axis=-1))
    nothing_left = run(gpt2, score=lambda samples: np.full((3, 4), -np.inf))
    np.testing.assert_array_equal(nothing_left.index, [0, 0, 0])


def test_fewer_than_one_sample_are_refused(gpt2):
    with pytest.raises(ValueError, match="n must be an integer of at least 1, but is 0"):
        run(gpt2, n=0)


def test_scores_that_rank_nothing_are_named(gpt2):
    with pytest.raises(ValueError, match=r"real numbers \[3, 4\], but are float32\[3\]"):
        run(gpt2, score=lambda samples: samples.logp.sum(axis=(1, 2)))
    with pytest.raises(ValueError, match="complex64"):
        run(gpt2, score=lambda samples: jnp.zeros((3, 4), jnp.complex64))
    with pytest.raises(FloatingPointError, match="a score is NaN"):
        run(gpt2, score=lambda samples: jnp.full((3, 4), jnp.nan))


# Self-consistency -----------------------------------------------------------------------------------------------------


def test_the_majority_answers():
    vote = self_consistency(["4", None, "5", "5", None, "4", "5"])
    assert vote == ("5", 3 / 5, {"4": 2, None: 2, "5": 3})
    assert vote.unparsable == 2


def test_of_answers_as_frequent_the_first_seen_wins():
    assert self_consistency([3, 1, 2, 1, 2, 3]).answer == 3
    assert self_consistency([None, (1, 2), (0,)]) == ((1, 2), 0.5, {None: 1, (1, 2): 1, (0,): 1})


def test_votes_may_have_weights():
    assert self_consistency(["a", "b", "a"], [0.25, 1.0, 0.25]) == ("b", 1 / 1.5, {"a": 0.5, "b": 1.0})
    assert self_consistency(["a", None], [0.0, 2.0]) == (None, 0.0, {"a": 0.0, None: 2.0})


def test_without_a_readable_answer_there_is_none():
    vote = self_consistency([None, None])
    assert vote == (None, 0.0, {None: 2}) and vote.unparsable == 2
    assert self_consistency([1]).unparsable == 0


def test_self_consistency_is_minimum_bayes_risk_of_equality():
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers = rng.integers(0, 4, rng.integers(1, 9)).tolist()
        assert answers[minimum_bayes_risk(answers, lambda h, y: h == y).index] == self_consistency(answers).answer


@pytest.mark.parametrize(
    ("answers", "weights", "message"),
    [
        ([], None, "answers must not be empty"),
        (["a"], [1.0, 1.0], r"each of 1 samples, but have the shape \[2\]"),
        (["a", "b"], [1.0, -1.0], "finite, not negative"),
    ],
)
def test_mistakes_in_votes_are_named(answers, weights, message):
    with pytest.raises(ValueError, match=message):
        self_consistency(answers, weights)
