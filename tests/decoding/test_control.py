import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm import oracle
from jaxrl_llm.decoding import generate, stream
from jaxrl_llm.decoding.transforms import (
    BadWords,
    Chain,
    Epsilon,
    Eta,
    ForcedTokens,
    FrequencyPenalty,
    LogitBias,
    MinLength,
    MinP,
    Mirostat,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopNSigma,
    Typical,
    bad_words,
)
from jaxrl_llm.tabular import TabularLM
from tests.conftest import assert_follows, log_softmax, random_params
from tests.decoding.decoders import assert_texts_follow, ended_distribution, index_of

PROMPT = (0, 2)  # so that penalties that see the prompt differ from those that do not
DRAWS, NEW = 5000, 4
LM = TabularLM(vocab_size=3, horizon=len(PROMPT) + NEW)
PARAMS = random_params(LM, 4)
EVERY = np.asarray(list(itertools.product(range(3), repeat=NEW)))
VALUES = st.one_of(st.sampled_from([0.0, 1.0, -1.0, -np.inf]), st.floats(-30, 30, width=32))
call = jax.jit(lambda transform, logits: transform(logits))
apply = jax.jit(lambda transform, state, logits: transform.apply(state, logits))
mass = jax.jit(lambda transform, *given: transform.kept_mass(*given))


@st.composite
def rows(draw):
    """Logits with ties and removed tokens, no row of them altogether removed."""
    logits = draw(hnp.arrays(np.float32, (3, 6), elements=VALUES))
    logits[(logits == -np.inf).all(axis=1), 0] = 1
    return logits


# The sampler's distribution is the exact one --------------------------------------------------------------------------


@jax.jit
def exact(transform):
    """The log-probability of every continuation of the prompt."""
    return oracle.sequence_log_probs(LM, PARAMS, transform, prompt=PROMPT)


def everything(
    *, r=1.0, p=0.0, f=0.0, n=9, bad=False, bias=(0.0, 0.0, 0.0), t=1.0, cuts=(0.0, 0.0, 0.0, 99.0), **other
):
    """One program for all distributions: those of the transforms that are not asked for do nothing."""
    words = bad_words(3, [[2, 1], [0, 2, 0]])
    words = words if bad else BadWords(words.before, words.last + 9)  # tokens that there are not
    filters = [kind(number) for kind, number in zip((MinP, Epsilon, Eta, TopNSigma), cuts, strict=True)]
    filters.append(Typical(other.get("typical", 1.0)))
    penalties = RepetitionPenalty(r), PresencePenalty(p), FrequencyPenalty(f)
    mirostat = Mirostat(*other.get("mirostat", (99.0, 0.0)))
    ends = MinLength(other.get("length", 0), [1])
    forced = ForcedTokens(other.get("forced", (-1, -1, -1)))
    return Chain(
        (*penalties, words, LogitBias(bias), ends, Temperature(t), *filters, mirostat, NoRepeatNgram(n), forced)
    )


def sampled(transform, *, seed=3, eos=9):
    """Return the sampled texts, and the number of each continuation among `EVERY`."""
    options = {"max_new_tokens": NEW, "key": jax.random.key(seed), "eos_id": [eos]}
    out = generate(LM, PARAMS, np.tile(PROMPT, (DRAWS, 1)), transform=transform, **options)
    return out, index_of(LM, out.tokens)


TRANSFORMS = {
    "none": everything(),
    "min-p": everything(cuts=(0.15, 0.0, 0.0, 99.0)),
    "ε": everything(cuts=(0.0, 0.12, 0.0, 99.0)),
    "η": everything(cuts=(0.0, 0.0, 0.2, 99.0)),
    "nσ": everything(cuts=(0.0, 0.0, 0.0, 1.7)),
    "typical": everything(t=1.5, typical=0.7),
    "repetition": everything(r=1.7),
    "presence and frequency": everything(p=0.5, f=0.4),
    "n-gram": everything(n=2),
    "bad words and bias": everything(bad=True, bias=(0.5, -1.0, 0.0)),
    "forced": everything(forced=(1, -1, 2)),
    "mirostat": everything(mirostat=(0.9, 0.7)),
    "several": everything(t=1.5, mirostat=(1.0, 0.6), n=3, r=1.2),
}


FAST = ("none", "typical", "forced", "several")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in TRANSFORMS])
def test_the_sampler_follows_the_exact_distribution(name):
    out, outcomes = sampled(TRANSFORMS[name])
    log_distribution = np.asarray(exact(TRANSFORMS[name]))
    distribution = np.exp(log_distribution)
    assert_follows(outcomes, distribution)
    # Not only in frequency: the decoder's log-probability of every sequence that it drew is the exact one.
    np.testing.assert_allclose(np.asarray(out.logp_sampler).sum(axis=1), log_distribution[outcomes], atol=1e-5)
    assert distribution[np.unique(outcomes)].sum() > 0.99, "and it drew nearly all"
    np.testing.assert_allclose(distribution.sum(), 1, atol=1e-6)
    plain = np.exp(exact(TRANSFORMS["none"]))
    assert np.abs(distribution - plain).sum() > 0.1 or name == "none", "the transform changes something"


def test_a_minimum_length_holds_and_the_distribution_before_and_after_it_is_the_exact_one():
    out, _ = sampled(everything(length=2), eos=1)
    lengths = np.asarray(out.mask).sum(axis=1)
    assert lengths.min() == 3 and lengths.max() == NEW
    distribution = ended_distribution(LM, exact(everything(length=2)), [1])
    found = assert_texts_follow(out, distribution)
    np.testing.assert_allclose(out.logp_sampler.sum(axis=1), np.log([distribution[row] for row in found]), atol=1e-5)


@pytest.mark.slow
def test_neither_padding_nor_the_other_rows_nor_a_stream_change_a_token():
    keys = jax.random.split(jax.random.key(1), 3)
    prompts, mask = np.asarray([[0, 2], [1, 1], [2, 0]]), np.asarray([[1, 1], [0, 1], [1, 0]], bool)
    options = {"max_new_tokens": NEW, "transform": everything(t=1.5, mirostat=(1.0, 0.6), n=2, r=1.2, p=0.5)}
    whole = generate(LM, PARAMS, prompts, prompt_mask=mask, key=keys, **options)
    pieces = stream(LM, PARAMS, prompts, prompt_mask=mask, key=keys, tokens_at_a_time=1, **options)
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces], axis=1), whole.tokens)
    wider, spread = np.ones((3, 5), int), np.zeros((3, 5), bool)
    for row, slots in [(2, [0, 3]), (1, [1]), (0, [4])]:  # the rows in the opposite order, and their padding elsewhere
        wider[row, slots], spread[row, slots] = prompts[2 - row][mask[2 - row]], True
    turned = generate(LM, PARAMS, wider, prompt_mask=spread, key=keys[::-1], **options)
    np.testing.assert_array_equal(turned.tokens[::-1], whole.tokens)
    np.testing.assert_allclose(turned.logp_sampler[::-1], whole.logp_sampler, atol=1e-6)


# Biases and bad words -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(logits=rows(), bias=hnp.arrays(np.float32, 6, elements=VALUES))
def test_a_bias_is_added(logits, bias):
    result = np.asarray(call(LogitBias(bias), logits))
    np.testing.assert_allclose(result, logits + bias, atol=1e-6)
    kept = np.where(result > -np.inf, np.exp(log_softmax(logits)), 0).sum(axis=1)
    np.testing.assert_allclose(mass(LogitBias(bias), logits), kept, rtol=1e-4)


def test_a_bias_for_each_row_and_for_all():
    logits, bias = np.ones((2, 3), np.float32), np.asarray([[1.0, 0, -np.inf], [0, -2, 0]])
    np.testing.assert_array_equal(call(LogitBias(bias), logits), [[2, 1, -np.inf], [1, -1, 1]])
    np.testing.assert_array_equal(call(LogitBias(bias[1]), logits), [[1, -1, 1]] * 2)
    np.testing.assert_array_equal(call(LogitBias(np.zeros(3)), logits), logits)


def test_the_gradient_of_a_bias_is_finite():
    logits, bias = jnp.asarray([0.0, 1.0, -jnp.inf, 2.0]), jnp.asarray([1.0, -jnp.inf, 1.0, 0.0])
    grads = jax.jit(jax.grad(lambda t, z: jax.nn.logsumexp(t(z)), argnums=(0, 1)))(LogitBias(bias), logits)
    distribution = np.exp([1, -np.inf, -np.inf, 2]) / np.exp([1.0, 2.0]).sum()
    np.testing.assert_allclose(grads[0].bias, distribution, rtol=1e-5)
    np.testing.assert_allclose(grads[1], distribution, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 3), (1, 3), (2, 2, 3)])
def test_a_bias_for_another_vocabulary_or_batch_is_named(shape):
    with pytest.raises(ValueError, match=r"shape \[3\] or \[2, 3\], but has"):
        LogitBias(np.zeros(shape))(jnp.zeros((2, 3)))


def test_biases_by_token_id_are_named():
    with pytest.raises(ValueError, match=r"bias must be an array \[vocab\] or \[batch, vocab\], but is \{1: 2\.0\}"):
        LogitBias({1: 2.0})


def test_bad_words_are_a_table():
    words = bad_words(9, [[3], [1, 2, 3], (4, 5), np.asarray([7]), 8])
    np.testing.assert_array_equal(words.before, [[-1, -1], [1, 2], [-1, 4], [-1, -1], [-1, -1]])
    np.testing.assert_array_equal(words.last, [3, 3, 5, 7, 8])
    assert isinstance(words, BadWords) and words.looks_back


# Lengths and forced tokens --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(logits=rows(), count=hnp.arrays(np.int32, 3, elements=st.integers(0, 5)), n=st.integers(0, 5))
def test_an_end_is_removed_until_the_length_is_reached(logits, count, n):
    result = np.asarray(apply(MinLength(jnp.int32(n), [2, 5, 99]), count, logits))
    without = logits.copy()
    without[:, [2, 5]] = -np.inf
    cut = (count < n) & (without > -np.inf).any(axis=1)
    np.testing.assert_array_equal(result, np.where(cut[:, None], without, logits))
    assert (result > -np.inf).any(axis=1).all()


@settings(max_examples=60)
@given(logits=rows(), count=hnp.arrays(np.int32, 3, elements=st.integers(0, 4)), each=st.booleans(), data=st.data())
def test_a_forced_token_is_the_only_one(logits, count, each, data):
    tokens = data.draw(hnp.arrays(np.int32, (3, 3) if each else 3, elements=st.sampled_from([-1, 0, 1, 5, 6])))
    result = np.asarray(apply(ForcedTokens(tokens), count, logits))
    for row in range(3):
        forced = [*(tokens[row] if each else tokens), -1, -1][count[row]]
        expected = logits[row] if forced == -1 else np.where(np.arange(6) == forced, logits[row], -np.inf)
        np.testing.assert_array_equal(result[row], expected)


@pytest.mark.slow
def test_lengths_and_forced_tokens_of_each_row_in_a_decoder(gpt2):
    eos = 4

    def run(n, forced, bias):
        chain = Chain((MinLength(jnp.asarray(n), eos), LogitBias(np.eye(23)[eos] * bias), ForcedTokens(forced)))
        options = {"max_new_tokens": 8, "key": jax.random.key(0), "eos_id": eos}
        return generate(*gpt2, [[1, 2, 3]] * 3, transform=chain, **options)

    nothing = np.full((3, 3), -1)
    np.testing.assert_array_equal(run([0, 3, 99], nothing, 50).mask.sum(axis=1), [1, 4, 8])
    np.testing.assert_array_equal(run([2, 1, 0], nothing, 50).mask.sum(axis=1), [3, 2, 1])
    out = run([0, 0, 0], np.asarray([[5, eos, 7], [eos, 6, 7], [-1, 8, eos]]), -50)
    np.testing.assert_array_equal(out.mask.sum(axis=1), [2, 1, 3])
    np.testing.assert_array_equal(out.tokens[:2, :2], [[5, eos], [eos, 0]])
    np.testing.assert_array_equal(out.tokens[2, 1:3], [8, eos])
    np.testing.assert_array_equal(np.asarray(out.logp_sampler)[:, 1], 0)
    assert (np.asarray(out.logp)[0, :2] < -0.1).all() and out.logp_sampler[2, 0] < 0


# Mirostat -------------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(logits=rows(), mu=hnp.arrays(np.float32, 3, elements=st.floats(-5, 12, width=32)))
def test_mirostat_keeps_what_surprises_at_most_by_mu(logits, mu):
    result = np.asarray(apply(Mirostat(3.0, 0.1), mu, logits))
    surprise = -log_softmax(logits) / np.log(2)
    kept = result > -np.inf
    np.testing.assert_array_equal(result[kept], logits[kept])
    largest = logits == logits.max(axis=1, keepdims=True)
    assert kept[largest].all()
    assert kept[(surprise < mu[:, None] - 1e-4)].all()
    assert not kept[(surprise > mu[:, None] + 1e-4) & ~largest].any()


def test_mu_starts_at_twice_tau_and_moves_against_the_error_of_the_model():
    transform, nothing = Mirostat(np.float32([2.0, 1.0, 3.0]), 0.5), np.zeros((3, 9), np.int32)
    mu = transform.init(nothing, nothing > 0, np.asarray([9, 9, 9]))
    np.testing.assert_array_equal(mu, [4, 2, 6])
    with np.errstate(divide="ignore"):
        logits = np.log(np.float32([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]))
    update = jax.jit(transform.update)
    np.testing.assert_allclose(update(mu, np.asarray([1, 0, 0]), logits), [4, 2, 6])  # 2 bits for 2, 1 for 1
    after = update(mu, np.asarray([0, 1, 0]), logits)
    np.testing.assert_allclose(after, [4.5, 1.5, 6])  # too little, too much, and a token that cannot be


def test_mirostat_is_the_loop_of_its_definition():
    """In a decoder, against one in plain Python that is given the tokens that were drawn."""
    tau, eta = 1.1, 0.8
    out, _ = sampled(everything(mirostat=(tau, eta)), seed=8)
    tokens, sampler = np.asarray(out.tokens)[:100], np.asarray(out.logp_sampler)[:100]
    texts = np.concatenate([np.tile(PROMPT, (100, 1)), tokens], axis=1)
    surprises = -log_softmax(jax.jit(LM.apply)(PARAMS, texts)[0]) / np.log(2)
    for row in range(100):
        mu = 2 * tau
        for place in range(NEW):
            surprise, token = surprises[row, len(PROMPT) - 1 + place], tokens[row, place]
            kept = surprise <= max(mu, surprise.min())
            assert kept[token]
            expected = 2.0 ** -surprise[token] / (2.0 ** -surprise[kept]).sum()
            np.testing.assert_allclose(np.exp(sampler[row, place]), expected, rtol=1e-4)
            mu -= eta * (surprise[token] - tau)


def test_mirostat_holds_the_mean_surprise():
    """The errors s − τ sum to (μ₀ − μ) / η, and μ stays bounded: so their mean falls as one over the length."""
    tau, rows, length = np.repeat(np.float32([2.5, 3.0]), 4), 8, 400
    transform = Mirostat(tau, 0.5)

    def step(mu, key):
        keys = jax.random.split(key)
        logits = 2 * jax.random.normal(keys[0], (rows, 50))
        token = jax.random.categorical(keys[1], transform.apply(mu, logits))
        after = transform.update(mu, token, logits)
        return after, -jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0] / jnp.log(2)

    mu, surprise = jax.lax.scan(step, 2 * tau, jax.random.split(jax.random.key(0), length))
    surprise = np.asarray(surprise, np.float64)
    np.testing.assert_allclose((surprise - tau).sum(axis=0), (2 * tau - mu) / 0.5, atol=1e-4)
    np.testing.assert_allclose(surprise.mean(axis=0), tau, atol=0.05)


def test_float64_logits_stay_float64_through_a_decoder():
    with jax.enable_x64(True):
        params = random_params(LM, 4, dtype=jnp.float64)
        chain = Chain((RepetitionPenalty(1.5), LogitBias(np.float32([0, 1, 0])), Mirostat(0.9, 0.7)))
        out = generate(LM, params, np.asarray([PROMPT]), max_new_tokens=NEW, transform=chain, key=jax.random.key(0))
        assert out.logp_sampler.dtype == jnp.float64 and np.isfinite(out.logp_sampler).all()
