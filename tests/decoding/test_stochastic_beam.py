import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl_llm.decoding import inclusion_probability, stochastic_beam_search, stop_strings
from jaxrl_llm.decoding.transforms import MinLength, Temperature, TopK
from jaxrl_llm.tabular import TabularLM
from tests.conftest import TINY, assert_follows, kept_by_top_k, log_softmax, random_params
from tests.decoding.decoders import KEYS, log_probs_of, params_of, spread, uncached_logits

DRAWS, WIDTH, NEW, EOS = 20_000, 3, 3, 2
LM = TabularLM(3, 3)
PARAMS = random_params(LM, 4)
NOTHING = jnp.zeros((DRAWS, 0), jnp.int32)
PREFIXES = [p for length in range(3) for p in itertools.product(range(3), repeat=length)]
EVERY = [
    tokens
    for length in (1, 2, 3)
    for tokens in itertools.product(range(3), repeat=length)
    if EOS not in tokens[:-1] and (length == NEW or tokens[-1] == EOS)
]


def distribution(params, warp=lambda row: row, every=EVERY):
    """The log-probability of every sequence, from the table in float64."""
    rows = log_softmax([warp(row) for row in np.asarray(params["logits"], np.float64)])
    after = dict(zip(PREFIXES, rows, strict=True))
    return np.asarray([sum(after[tokens[:t]][tokens[t]] for t in range(len(tokens))) for tokens in every])


def indices(beams, every=EVERY):
    """Which of `every` each beam is; −1 where there is none."""
    tokens, mask = np.asarray(beams.tokens), np.asarray(beams.mask)
    codes = np.where(mask, tokens + 1, 0) @ 4 ** np.arange(tokens.shape[-1])
    place = {0: -1} | {sum((v + 1) * 4**t for t, v in enumerate(each)): i for i, each in enumerate(every)}
    return np.vectorize(place.__getitem__)(codes)


@functools.cache
def drawn():
    return stochastic_beam_search(
        LM, PARAMS, NOTHING, num_beams=WIDTH, max_new_tokens=NEW, eos_id=EOS, key=jax.random.key(0)
    )


def ordered_distribution(probs, count):
    """The probability of every ordered choice of `count` without replacement."""
    for chosen in itertools.permutations(range(len(probs)), count):
        taken, probability = 0.0, 1.0
        for i in chosen:
            probability *= probs[i] / (1 - taken)
            taken += probs[i]
        yield chosen, probability


def assert_unbiased(samples, expected):
    """z < 4 in every column."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    z = np.abs(samples.mean(axis=0) - expected) / error
    assert (z < 4).all(), z


# The distribution, by enumeration -------------------------------------------------------------------------------------


def test_beams_are_distinct_sorted_and_know_their_log_probability():
    beams, found = drawn(), indices(drawn())
    assert (np.sort(found, axis=1)[:, 1:] > np.sort(found, axis=1)[:, :-1]).all() and (found >= 0).all()
    np.testing.assert_allclose(beams.log_prob, distribution(PARAMS)[found], atol=1e-5)
    assert (np.diff(beams.perturbed, axis=1) <= 0).all() and (beams.perturbed[:, -1] >= beams.threshold).all()
    mask = np.asarray(beams.mask)
    np.testing.assert_array_equal(mask, np.arange(NEW) < mask.sum(axis=2, keepdims=True))
    assert (np.asarray(beams.tokens)[~mask] == 0).all()


def test_the_first_is_a_sample():
    assert_follows(indices(drawn())[:, 0], np.exp(distribution(PARAMS)))


def test_the_first_two_are_a_sample_without_replacement():
    found = indices(drawn())
    pairs, probabilities = zip(*ordered_distribution(np.exp(distribution(PARAMS)), 2), strict=True)
    place = {pair: i for i, pair in enumerate(pairs)}
    assert_follows([place[pair] for pair in map(tuple, found[:, :2].tolist())], probabilities)


def assert_included(found, probs):
    """The frequency with which each sequence is among the beams is that of sampling without replacement: z < 4."""
    expected = np.zeros(len(probs))
    for chosen, probability in ordered_distribution(probs, WIDTH):
        expected[list(chosen)] += probability
    np.testing.assert_allclose(expected.sum(), WIDTH)
    frequency = (found[..., None] == np.arange(len(probs))).any(axis=1).mean(axis=0)
    z = (frequency - expected) / np.sqrt(expected * (1 - expected) / len(found))
    assert (np.abs(z) < 4).all(), z


def test_inclusion_frequencies_are_those_of_sampling_without_replacement():
    assert_included(indices(drawn()), np.exp(distribution(PARAMS)))


@pytest.mark.parametrize(("string", "least"), [("ab", 0), ("ba", 2)])
def test_sequences_end_at_stop_strings(string, least):
    """Drawn without replacement among the sequences up to EOS, or to the token that completes the string."""
    pieces, logits = [b"a", b"ba", b""], np.asarray(PARAMS["logits"]).copy()
    logits[[len(prefix) < least for prefix in PREFIXES], EOS] = -np.inf

    def ended(row):
        for end in range(1, NEW):
            text = b"".join(pieces[token] for token in row[max(least - 1, 0) : end])
            if row[end - 1] == EOS or string.encode() in text:
                return row[:end]
        return row

    every = list(dict.fromkeys(map(ended, itertools.product(range(3), repeat=NEW))))
    every = [row for row in every if EOS not in row[:least]]
    log_probs = distribution({"logits": logits}, every=every)
    options = {"num_beams": WIDTH, "max_new_tokens": NEW, "eos_id": EOS, "key": jax.random.key(3)}
    options |= {"stop": stop_strings(pieces, [string]), "transform": MinLength(least, EOS)}
    beams = stochastic_beam_search(LM, PARAMS, NOTHING[:5000], **options)
    found = indices(beams, every)
    np.testing.assert_allclose(beams.log_prob, log_probs[found], atol=1e-5)
    assert_follows(found[:, 0], np.exp(log_probs))
    assert_included(found, np.exp(log_probs))


def test_weights_by_inclusion_probability_are_unbiased():
    beams, found = drawn(), indices(drawn())
    values = np.random.default_rng(0).normal(size=(len(EVERY), 4)) + 1
    values[:, 0] = 1
    inclusion = np.asarray(inclusion_probability(beams.log_prob, beams.threshold), np.float64)
    assert ((inclusion > 0) & (inclusion <= 1)).all() and (inclusion < 0.9).any()
    weights = np.exp(np.asarray(beams.log_prob, np.float64)) / inclusion
    assert_unbiased((weights[..., None] * values[found]).sum(axis=1), np.exp(distribution(PARAMS)) @ values)


@pytest.mark.slow
@pytest.mark.parametrize("count", [len(EVERY), len(EVERY) + 5])
def test_as_many_beams_as_sequences_find_all_with_independent_noise(count):
    rows = 1000
    beams = stochastic_beam_search(
        LM, PARAMS, NOTHING[:rows], num_beams=count, max_new_tokens=NEW, eos_id=EOS, key=jax.random.key(1)
    )
    found = indices(beams)
    np.testing.assert_array_equal(np.sort(found[:, : len(EVERY)], axis=1), np.tile(np.arange(len(EVERY)), (rows, 1)))
    assert (found[:, len(EVERY) :] == -1).all() and (beams.log_prob[:, len(EVERY) :] == -np.inf).all()
    assert (beams.threshold == -np.inf).all()
    inclusion = inclusion_probability(beams.log_prob, beams.threshold)
    np.testing.assert_array_equal(inclusion, np.broadcast_to(np.arange(count) < len(EVERY), (rows, count)))
    noise = np.zeros((rows, len(EVERY)))
    kept = slice(None, len(EVERY))
    np.put_along_axis(noise, found[:, kept], np.asarray(beams.perturbed - beams.log_prob)[:, kept], axis=1)
    for column in noise.T:
        assert scipy.stats.kstest(column, "gumbel_r").pvalue > 1e-4
    correlation = np.corrcoef(noise, rowvar=False)[np.triu_indices(len(EVERY), 1)]
    assert np.abs(correlation).max() * np.sqrt(rows) < 4


@pytest.mark.slow
def test_a_transform_shapes_the_distribution():
    options = {"num_beams": len(EVERY), "max_new_tokens": NEW, "eos_id": EOS, "key": jax.random.key(2)}
    beams = stochastic_beam_search(LM, PARAMS, NOTHING[:1000], **options, transform=[TopK(2), Temperature(2.0)])
    with np.errstate(invalid="ignore"):
        expected = distribution(PARAMS, lambda row: np.where(kept_by_top_k(row, 2), row, -np.inf) / 2)
    found, possible = indices(beams), (expected > -np.inf).sum()
    assert ((found >= 0).sum(axis=1) == possible).all() and 3 < possible < len(EVERY)
    np.testing.assert_allclose(beams.log_prob[:, :possible], expected[found[:, :possible]], atol=1e-5)
    assert_follows(found[:, 0], np.exp(expected))


def test_inclusion_probability_is_stable_where_probabilities_are_tiny():
    log_prob = jnp.asarray([[-50.0, -70.0, -jnp.inf]])
    expected = np.exp(np.asarray([[-40.0, -60.0, -np.inf]]))
    np.testing.assert_allclose(inclusion_probability(log_prob, jnp.asarray([-10.0])), expected, rtol=1e-4)
    np.testing.assert_array_equal(inclusion_probability(log_prob, jnp.asarray([-jnp.inf])), [[1.0, 1.0, 0.0]])


# Neural models --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_log_prob_is_that_of_a_forward_pass(model):
    options = {"num_beams": 4, "max_new_tokens": 10, "eos_id": 3, "key": KEYS}
    beams = stochastic_beam_search(TINY[model], params_of(model), **spread(), **options)
    of_tokens = log_probs_of(uncached_logits(model, beams.tokens), beams.tokens)
    np.testing.assert_allclose(beams.logp, np.where(beams.mask, of_tokens, 0), atol=1e-4)
    np.testing.assert_allclose(beams.log_prob, np.where(beams.mask, of_tokens, 0).sum(axis=2), atol=2e-4)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_sizes_that_are_none_are_named(size):
    with pytest.raises(ValueError, match=f"num_beams must be an integer of at least 1, but is {size}"):
        stochastic_beam_search(LM, PARAMS, NOTHING[:1], num_beams=size, max_new_tokens=3, key=KEYS[0])
