import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.decoding import DraftModel, PromptLookup, core, speculative, speculative_generate
from jaxrl_llm.decoding.speculative import acceptance_probability, residual, verify
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP, Transform
from jaxrl_llm.tabular import TabularLM
from tests.conftest import (
    TINY,
    VOCAB,
    assert_follows,
    first_quick,
    kept_by_top_k,
    kept_by_top_p,
    log_softmax,
    random_params,
)
from tests.decoding import decoders
from tests.decoding.decoders import (
    NEVER,
    NEW,
    ROWS,
    assert_same,
    assert_texts_follow,
    ended_distribution,
    exact_log_probs,
    expected,
    index_of,
    params_of,
    spread,
    token_log_probs,
)

DRAWS = 8000
LM = TabularLM(vocab_size=3, horizon=4)
TARGET, OTHER = random_params(LM, 1), random_params(LM, 2)


def random_distributions(rng, *shape):
    """Distributions over the last axis; some have impossible tokens."""
    weights = rng.gamma(0.7, size=shape) * (rng.random(shape) < 0.8)
    weights[..., 0] += 1e-3
    return weights / weights.sum(axis=-1, keepdims=True)


# The rule, by enumeration ---------------------------------------------------------------------------------------------


@pytest.fixture
def x64():
    """Float64 everywhere."""
    with jax.enable_x64(True):
        yield


@jax.jit
def rule(p, q):
    """The library's probability of accepting each token, and its distribution of the token drawn instead."""
    tokens = jnp.broadcast_to(jnp.arange(p.shape[-1]), p.shape)
    accept = [acceptance_probability(p, q, tokens[..., token]) for token in range(p.shape[-1])]
    return jnp.stack(accept, axis=-1), residual(p, q)


@pytest.mark.parametrize("vocab", [1, 2, 3, 4])
def test_one_token_follows_the_target_whatever_the_draft(x64, vocab):
    rng = np.random.default_rng(vocab)
    p, q = random_distributions(rng, 300, vocab), random_distributions(rng, 300, vocab)
    q[0], q[1] = 0, p[1]  # no draft; the target itself
    q[2:5], p[5:8] = np.eye(vocab)[-1], np.eye(vocab)[-1]  # point masses
    accept, instead = rule(jnp.asarray(p), jnp.asarray(q))
    rejected = np.where(q.any(axis=-1), (q * (1 - accept)).sum(axis=-1), 1)
    np.testing.assert_allclose(q * accept + rejected[:, None] * instead, p, rtol=0, atol=1e-12)


def test_the_rule_at_its_edges(x64):
    p, q = jnp.asarray([0.5, 0.5, 0.0]), jnp.asarray([0.25, 0.0, 0.75])
    tokens = jnp.arange(3)
    found = acceptance_probability(jnp.stack([p] * 3), jnp.stack([q] * 3), tokens)
    np.testing.assert_array_equal(found, [1, 0, 0])
    np.testing.assert_array_equal(acceptance_probability(q, p, jnp.asarray(0)), 0.5)
    np.testing.assert_allclose(residual(p, q), [1 / 3, 2 / 3, 0])
    np.testing.assert_array_equal(residual(p, p), p)  # nothing is left: never drawn, and no NaN
    np.testing.assert_array_equal(residual(p, jnp.zeros(3)), p)


def distribution_by_speculation(p, q, num_draft, vocab, horizon):
    """The distribution of whole sequences: prefill, then rounds, over all drafts and outcomes; p and q by prefix."""
    prefixes, distribution = list(p), {}
    tables = [jnp.asarray([each[prefix] for prefix in prefixes]) for each in (p, q)]
    accept, instead = (dict(zip(prefixes, np.asarray(each), strict=True)) for each in rule(*tables))

    def play(prefix, probability):
        if len(prefix) == horizon:
            distribution[prefix] = distribution.get(prefix, 0) + probability
            return
        for drafts in itertools.product(range(vocab), repeat=min(num_draft, horizon - len(prefix))):
            drawn = probability * np.prod([q[prefix + drafts[:i]][draft] for i, draft in enumerate(drafts)])
            for place, draft in enumerate(drafts):
                here = prefix + drafts[:place]
                for token in range(vocab):
                    play((*here, token), drawn * (1 - accept[here][draft]) * instead[here][token])
                drawn *= accept[here][draft]
            here = prefix + drafts
            for token in range(vocab if len(here) < horizon else 0):  # behind the last draft
                play((*here, token), drawn * p[here][token])
            if len(here) == horizon:
                play(here, drawn)

    for token in range(vocab):
        play((token,), p[()][token])
    return distribution


@pytest.mark.parametrize(("vocab", "horizon", "num_draft"), [(2, 3, 1), (2, 3, 2), (3, 2, 1), (3, 3, 2)])
def test_whole_sequences_follow_the_target_by_enumeration(x64, vocab, horizon, num_draft):
    prefixes = [p for length in range(horizon) for p in itertools.product(range(vocab), repeat=length)]
    rng = np.random.default_rng(num_draft)
    target, other = (
        dict(zip(prefixes, random_distributions(rng, len(prefixes), vocab), strict=True)) for _ in range(2)
    )
    distribution = distribution_by_speculation(target, other, num_draft, vocab, horizon)
    for row in itertools.product(range(vocab), repeat=horizon):
        exact = np.prod([target[row[:t]][row[t]] for t in range(horizon)])
        assert abs(distribution[row] - exact) < 1e-12


def test_verify_draws_the_outcomes_of_the_rule():
    rng, count = np.random.default_rng(0), 40_000
    p, q = random_distributions(rng, 3, 3), random_distributions(rng, 2, 3)
    outcomes = {}
    drafts = np.stack([rng.choice(3, count, p=distribution) for distribution in q], axis=1)
    p, q = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
    many = [jnp.broadcast_to(distribution, (count, *distribution.shape)) for distribution in (p, q)]
    accepted, token = jax.jit(verify)(jax.random.split(jax.random.key(1), count), jnp.asarray(drafts), *many)
    accept, instead = (np.asarray(each) for each in rule(p[:2], q))
    for first, second in itertools.product(range(3), repeat=2):
        drawn = float(q[0, first] * q[1, second])
        for place, draft in enumerate((first, second)):
            for other in range(3):
                outcomes[first, second, place, other] = drawn * (1 - accept[place, draft]) * instead[place, other]
            drawn *= accept[place, draft]
        for other in range(3):
            outcomes[first, second, 2, other] = drawn * p[2, other]
    index = {outcome: number for number, outcome in enumerate(outcomes)}
    found = zip(*drafts.T.tolist(), accepted.tolist(), token.tolist(), strict=True)
    assert_follows([index[outcome] for outcome in found], list(outcomes.values()))


# The decoder's distribution, on a table -------------------------------------------------------------------------------


class AfterLast(Transform):
    """Looks back: adds b to the logit of the last real token, and of the one before it."""

    looks_back: ClassVar[bool] = True
    b: float

    def __call__(self, logits, tokens, mask):
        order = jnp.argsort(mask, axis=1, stable=True)
        tokens, mask = jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)
        one_hot = jax.nn.one_hot(tokens[:, -2:], logits.shape[-1]) * mask[:, -2:, None]
        return logits + self.b * one_hot.sum(axis=1)


class Tiring(Transform):
    """Has a state: the temperature grows with the sum of the model's own log-probabilities so far."""

    rate: float

    def init(self, prompts, mask, limits):
        return jnp.zeros(limits.shape)

    def apply(self, surprise, logits):
        return logits / (1 + self.rate * surprise[:, None])

    def update(self, surprise, token, logits):
        return surprise - jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]


def warped(row, transform, prefix, surprise):
    """Apply a transform to one row of logits, by its definition."""
    match transform:
        case None:
            return row
        case Chain():
            return functools.reduce(lambda row, each: warped(row, each, prefix, surprise), transform.transforms, row)
        case Temperature():
            return row / transform.t
        case TopK():
            return np.where(kept_by_top_k(row, transform.k), row, -np.inf)
        case TopP():
            return np.where(kept_by_top_p(row, transform.p), row, -np.inf)
        case AfterLast():
            return row + transform.b * sum(np.eye(len(row))[token] for token in prefix[-2:])
        case Tiring():
            return row / (1 + transform.rate * surprise)


def by_definition(sequences, transform, params=TARGET, *, start=0):
    """log p of each token: of the model, and after the transform; the tokens before `start` are a prompt."""
    table = np.asarray(params["logits"], np.float64)
    first = [sum(3**shorter for shorter in range(t)) for t in range(4)]
    both = np.zeros((2, len(sequences), 4))
    for number, row in enumerate(sequences):
        surprise = 0.0
        for t, token in enumerate(row):
            logits = table[first[t] + sum(int(x) * 3 ** (t - 1 - i) for i, x in enumerate(row[:t]))]
            with np.errstate(invalid="ignore"):
                distribution = log_softmax(warped(logits, transform, tuple(row[:t]), surprise))
            both[:, number, t] = log_softmax(logits)[token], distribution[token]
            surprise -= log_softmax(logits)[token] if t >= start else 0
    return both


EVERY = np.asarray(list(itertools.product(range(3), repeat=4)))


def steps(t=1.0, k=3, p=1.0, *, b=0.0, rate=0.0):
    """One program for all: by default they do nothing."""
    return Chain((AfterLast(b), Tiring(rate), Temperature(t), TopK(k), TopP(p)))


FILTERED, BACK = steps(2.0, 2, 0.7), steps(b=1.0, rate=0.5)
NEXT = DraftModel(LM, OTHER)
CASES = {
    "a far draft": (None, NEXT, 2),
    "transforms on both": (FILTERED, DraftModel(LM, OTHER, steps(0.5)), 2),
    "transforms with states": (BACK, DraftModel(LM, OTHER, BACK), 2),
    "look-up": (Temperature(0.5), PromptLookup(2), 3),
}


@pytest.mark.parametrize("transform", [None, FILTERED, BACK], ids=["model", "filters", "states"])
def test_the_exact_distribution_under_a_transform_is_that_of_its_definition(transform):
    for prompt in ((), (2, 1)):
        rows = EVERY[(EVERY[:, : len(prompt)] == prompt).all(axis=1)]
        exact = by_definition(rows, transform, start=len(prompt))[1][:, len(prompt) :].sum(axis=1)
        np.testing.assert_allclose(exact_log_probs(LM, TARGET, transform, prompt=prompt), exact, atol=1e-5)
    if transform is None:
        by_function = jax.jit(
            lambda params: oracle.sequence_log_probs(LM, params, lambda logits: logits, prompt=prompt)
        )
        np.testing.assert_allclose(exact, by_function(TARGET))


def test_what_is_no_transform_is_named():
    with pytest.raises(ValueError, match=r"transform must be a function of logits.*but is 3"):
        oracle.sequence_log_probs(LM, TARGET, [Temperature(1.0), 3])
    with pytest.raises(ValueError, match="at most 4 tokens, but has 5"):
        oracle.sequence_log_probs(LM, TARGET, prompt=(0,) * 5)


def speculate(draft=NEXT, *, params=TARGET, **options):
    options = {"max_new_tokens": 4, "key": jax.random.key(0), "eos_id": NEVER} | options
    return speculative_generate(LM, params, jnp.zeros((DRAWS, 0), jnp.int32), draft=draft, **options)


@pytest.mark.parametrize(("transform", "draft", "num_draft"), first_quick(CASES.values()), ids=CASES)
def test_sequences_follow_the_targets_distribution(transform, draft, num_draft):
    result = speculate(draft, transform=transform, num_draft=num_draft)
    tokens, log_probs = np.asarray(result.generation.tokens), exact_log_probs(LM, TARGET, transform)
    assert_follows(index_of(LM, tokens), np.exp(log_probs))
    assert result.generation.mask.all()
    exact = token_log_probs(LM, TARGET, tokens)
    np.testing.assert_allclose(result.generation.logp, exact, atol=1e-5)
    sampler = result.generation.logp_sampler.sum(axis=1)
    np.testing.assert_allclose(sampler, log_probs[index_of(LM, tokens)], atol=2e-5)
    assert 0.1 < result.acceptance_rate < 0.95
    assert (result.accepted + result.rounds >= 3).all() and (result.judged <= result.drafted).all()


def test_ended_sequences_follow_their_distribution():
    generation = speculate(num_draft=2, eos_id=(2, 2)).generation
    assert_texts_follow(generation, ended_distribution(LM, exact_log_probs(LM, TARGET), [2]))


@pytest.mark.slow
def test_drafts_of_the_target_itself_are_accepted_also_with_states():
    result = speculate(DraftModel(LM, TARGET, BACK), transform=BACK, num_draft=2)
    np.testing.assert_array_equal(result.accepted, 2)  # the third new token is drawn behind them
    np.testing.assert_array_equal(result.judged, 2)
    np.testing.assert_array_equal(result.rounds, 1)
    assert result.acceptance_rate == 1
    plain = speculate(DraftModel(LM, TARGET), num_draft=2, max_new_tokens=3)
    np.testing.assert_array_equal(plain.drafted, 2)  # and none for which there is no room
    assert plain.acceptance_rate == 1 and plain.generation.tokens.shape == (DRAWS, 3)


@pytest.mark.parametrize("kind", ["model", pytest.param("look-up", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_float64_parameters_give_float64_log_probabilities(x64, kind):
    draft = PromptLookup(2) if kind == "look-up" else DraftModel(LM, random_params(LM, 2, dtype=jnp.float64))
    params = random_params(LM, 1, dtype=jnp.float64)
    options = {"max_new_tokens": 4, "key": jax.random.key(0), "num_draft": 2, "draft": draft}
    generation = speculative_generate(LM, params, jnp.zeros((20, 0), jnp.int32), **options).generation
    exact, _ = by_definition(np.asarray(generation.tokens), None, params)
    np.testing.assert_allclose(generation.logp, exact, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(generation.logp_sampler, exact, rtol=1e-12, atol=1e-14)


# Neural models --------------------------------------------------------------------------------------------------------


@functools.cache
def drafter(model, kind):
    """The target itself, a draft model near to it, one far from it, one of another family; look-up."""
    if kind == "look-up":
        return PromptLookup(3)
    lm = TINY["gpt2"] if kind == "other" else TINY[model]
    params, noise = (jax.tree.map(np.asarray, random_params(lm, seed)) for seed in (0, 1))
    scale = {"itself": 0.0, "near": 0.1}.get(kind)
    draft = noise if scale is None else jax.tree.map(lambda one, two: one + np.float32(scale) * two, params, noise)
    return DraftModel(lm, draft)


def run(model="gpt2", kind="near", **options):
    """Greedily on the shared prompts."""
    lm = TINY[model]
    options = {"max_new_tokens": NEW, "eos_id": NEVER, "greedy": True, "draft": drafter(model, kind)} | options
    return speculative_generate(lm, params_of(model), **spread("left", 20), **options)


@pytest.mark.parametrize(
    ("model", "kind"),
    [("gpt2", "itself"), ("gpt2", "near"), ("gpt2", "far"), ("gpt2", "look-up"), ("llama", "other")],
)
def test_greedy_tokens_are_those_of_generate(model, kind):
    result = run(model, kind)
    assert_same(result.generation, expected("greedy", model))
    counts = [np.asarray(each) for each in (result.accepted, result.rounds, result.judged, result.drafted)]
    accepted, rounds, judged, drafted = counts
    assert (accepted <= judged).all() and (judged <= drafted).all()
    if kind == "itself":
        np.testing.assert_array_equal(accepted, judged)
        np.testing.assert_array_equal(rounds, 3)  # of 5 tokens each
    else:  # every round brings one token that is no draft, but for a last one that ends with a draft
        assert set((accepted + rounds).tolist()) <= {NEW - 1, NEW}
        assert (accepted < judged).all()
    assert len(set(rounds.tolist())) > 1 or kind not in ("near", "look-up")


@pytest.mark.parametrize("kind", ["itself", "near", "look-up"])
def test_a_row_ends_with_its_end_or_its_limit(kind):
    full = expected("greedy")
    ends = [int(full.tokens[row, 12]) for row in (0, 1)]
    limits = np.asarray([16, 3, 1, 9, 16])
    result = run(kind=kind, eos_id=ends, max_new_tokens=limits, pad_id=-7)
    whole = decoders.run("greedy", eos_id=ends, max_new_tokens=limits, pad_id=-7)
    assert_same(result.generation, whole)
    assert int(whole.mask.sum()) < limits.sum()
    assert result.rounds[2] == result.drafted[2] == 0
    # a round emits what is accepted and at most one token more
    lengths = np.asarray(result.generation.mask).sum(axis=1)
    assert (lengths <= 1 + result.accepted + result.rounds).all() and (result.accepted < lengths).all()


def test_up_to_the_last_place_of_the_context():
    prompts = np.random.default_rng(0).integers(0, VOCAB, (ROWS, 42 - NEW))
    lm, params = TINY["gpt2"], params_of("gpt2")
    options = {"max_new_tokens": NEW, "greedy": True, "eos_id": NEVER}
    found = speculative_generate(lm, params, prompts, draft=drafter("gpt2", "near"), **options).generation
    whole = jnp.concatenate([prompts, found.tokens], axis=1)
    logits = jax.jit(lambda tokens: lm.apply(params, tokens)[0])(whole)[:, -NEW - 1 : -1]
    np.testing.assert_array_equal(found.tokens, logits.argmax(axis=-1))
    exact = np.take_along_axis(log_softmax(logits), np.asarray(found.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.logp, exact, atol=1e-4)


# Drafts from the row itself -------------------------------------------------------------------------------------------


def test_look_up_finds_the_latest_of_the_longest_matches():
    rows = [
        [1, 2, 3, 9, 2, 3, 7, 1, 2, 3],  # 1 2 3 at the start, although 2 3 stands later
        [5, 2, 3, 9, 4, 2, 3, 7, 2, 3],  # 2 3 twice: the later one
        [8, 8, 8],  # a loop goes on
        [4, 5, 4, 5],
        [1, 2, 3],  # 3 is new
        [6],
    ]
    width = max(map(len, rows))
    tokens, mask = np.full((6, width), 3), np.zeros((6, width), bool)
    for number, row in enumerate(rows):
        tokens[number, width - len(row) :], mask[number, width - len(row) :] = row, True
    request = core.request(TINY["gpt2"], tokens, mask, max_new_tokens=9, greedy=True)
    last = [row[-1] for row in rows]  # the last token is not read yet

    @functools.partial(jax.jit, static_argnames="ngram")
    def look_up(alive, *, ngram):
        draft, room = PromptLookup(ngram), jnp.asarray([9, 9, 9, 2, 9, 9])
        before = dataclasses.replace(request, mask=request.mask.at[:, -1].set(False))
        state = draft.init(before, num_slots=40)
        return draft.propose(state, None, jnp.asarray(last), alive, room, num_draft=4)[0]

    drafts = look_up(jnp.ones(6, bool), ngram=3)
    np.testing.assert_array_equal(drafts.exists, np.arange(4) < np.asarray([4, 4, 4, 2, 0, 0])[:, None])
    np.testing.assert_array_equal(drafts.tokens[:4], [[9, 2, 3, 7], [7, 2, 3, 7], [8, 8, 8, 8], [4, 5, 4, 5]])
    shorter = look_up(jnp.ones(6, bool), ngram=2)
    np.testing.assert_array_equal(shorter.tokens[0], [7, 1, 2, 3])
    assert not look_up(jnp.zeros(6, bool), ngram=2).exists.any()
    np.testing.assert_array_equal(look_up(jnp.ones(6, bool), ngram=10**6).tokens, drafts.tokens, "no longer than texts")


def test_a_model_that_repeats_is_drafted_by_look_up():
    lm = TabularLM(vocab_size=2, horizon=12)
    last = np.concatenate([np.arange(2**length) % 2 for length in range(lm.horizon)])
    alternating = {"logits": jnp.asarray(20.0 * np.eye(2)[1 - last], jnp.float32)}
    prompts = jnp.asarray([[0, 1, 0, 1], [1, 0, 1, 0]])
    options = {"max_new_tokens": 8, "draft": PromptLookup(2), "key": jax.random.key(0)}
    result = speculative_generate(lm, alternating, prompts, **options)
    np.testing.assert_array_equal(result.generation.tokens, [[0, 1] * 4, [1, 0] * 4])
    np.testing.assert_array_equal(result.rounds, 2)  # 1 + 5 + 2 tokens
    np.testing.assert_array_equal(result.accepted, 4 + 2)
    assert result.acceptance_rate == 1


# Memory, programs, mistakes -------------------------------------------------------------------------------------------


def test_what_is_cached_by_slot_is_told_from_its_shapes():
    assert all(speculative.caches_by_slot(TINY[name]) for name in ("gpt2", "llama", "t5"))
    assert speculative.caches_by_slot(dataclasses.replace(TINY["t5"], num_sources=3))
    assert not speculative.caches_by_slot(TINY["tabular"])


def test_rewinding_forgets_in_both_ways():
    tokens = jnp.asarray([[1, 2, 0], [2, 1, 1]])
    kept = jnp.asarray([[True, False, False], [True, True, False]])

    def both_ways(lm, params):
        before = lm.apply(params, tokens[:, :2], lm.init_cache(2, 6))[1]
        after = speculative.rewind(lm, params, before, lm.apply(params, tokens, before)[1], tokens, kept)
        exact = lm.apply(params, tokens, before, mask=kept)[1]
        return [(cache.valid, lm.apply(params, tokens[:, :1], cache)[0]) for cache in (after, exact)]

    for lm in (
        TINY["t5"],
        TINY["tabular"],
    ):  # GPT-2 and Llama: after rejected drafts the tokens are those of `generate`
        (valid, found), (exactly_valid, exact) = jax.jit(both_ways, static_argnums=0)(lm, random_params(lm))
        np.testing.assert_array_equal(valid, exactly_valid)
        np.testing.assert_allclose(found, exact, atol=1e-5)


def test_other_numbers_compile_nothing_new():
    def run(t, k, p, other, seed, count, prompt=(), eos=NEVER):
        prompts = np.ones((DRAWS, len(prompt)), int) * np.asarray(prompt, int)
        options = {"key": jax.random.key(seed), "max_new_tokens": count, "eos_id": eos, "num_draft": 2}
        options |= {"transform": steps(t, k, p), "draft": DraftModel(LM, OTHER, steps(other))}
        speculative_generate(LM, TARGET, prompts, **options)

    run(2.0, 2, 0.7, 0.5, 0, 4)
    before = speculative.decode._cache_size()
    run(0.5, 3, 0.9, 2.0, 1, 3, prompt=(2,))
    run(1.5, 1, 1.0, 1.0, 2, 1, eos=(1, 0))
    assert speculative.decode._cache_size() == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_logits_raise_and_name_whose(value):
    begins = np.array(TARGET["logits"])
    begins[0] = [-np.inf, -np.inf, 0]  # every row begins with token 2

    def broken(row):
        table = begins.copy()
        table[row] = value
        return {"logits": jnp.asarray(table)}

    for row, time in [(0, 0), (1 + 2, 1)]:
        with pytest.raises(FloatingPointError, match=f"row 0 at new token {time}"):
            speculate(params=broken(row), num_draft=2)
    speculate(params=broken(1), num_draft=2)  # after token 0, which never comes
    with pytest.raises(FloatingPointError, match=r"the draft model's logits are NaN.*row 0"):
        speculate(DraftModel(LM, broken(1 + 2)), params={"logits": jnp.asarray(begins)}, num_draft=2)


GPT2 = TINY["gpt2"]
MISTAKES = {
    "no drafts": ({"draft": None}, "draft must be a DraftModel or a PromptLookup, but is None"),
    "a model alone": ({"draft": GPT2}, "draft must be a DraftModel or a PromptLookup"),
    "another vocabulary": ({"draft": DraftModel(LM, {})}, "vocabulary of 23 tokens, but has 3"),
    "no draft at a time": ({"num_draft": 0}, "num_draft must be an integer of at least 1, but is 0"),
    "half a draft": ({"num_draft": 1.5}, "num_draft must be an integer of at least 1, but is 1.5"),
    "an n-gram of nothing": ({"draft": PromptLookup(0)}, "ngram must be an integer of at least 1, but is 0"),
    "no transform": ({"draft": DraftModel(GPT2, {}, "top-k")}, "transform must be a Transform"),
    "numbers of other rows": ({"draft": DraftModel(GPT2, {}, Temperature(jnp.ones(3)))}, "one for each of 2 rows"),
    "a draft of short context": (
        {"draft": DraftModel(TabularLM(23, 3), {})},
        "prompt 0 has 2 tokens, and 4 new ones do not fit .* context of 3",
    ),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_anything_is_compiled(options, message):
    before = speculative.decode._cache_size()
    with pytest.raises(ValueError, match=message):
        options = {"max_new_tokens": 4, "key": jax.random.key(0), "draft": DraftModel(GPT2, {})} | options
        speculative_generate(GPT2, None, np.ones((2, 2), int), **options)
    assert speculative.decode._cache_size() == before
