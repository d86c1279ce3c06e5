import functools
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.decoding import Generation, Guidance, core, generate, stream
from jaxrl_llm.decoding.generate import advance, begin, decode
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP
from jaxrl_llm.language_model import Cache, LanguageModel
from jaxrl_llm.tabular import TabularLM
from tests.conftest import (
    CONTEXT,
    TINY,
    VOCAB,
    assert_follows,
    kept_by_top_k,
    kept_by_top_p,
    log_softmax,
    random_params,
)

DRAWS = 20_000
NOTHING = jnp.zeros((DRAWS, 0), jnp.int32)  # the empty prompt, many times
KEYS = jax.random.split(jax.random.key(5), 5)
ROWS, WIDTH = 5, 12
PROMPTS = np.random.default_rng(2).integers(0, VOCAB, (ROWS, WIDTH))
LENGTHS = np.asarray([12, 7, 1, 5, 9])
NEVER = (10**6, 10**6)  # two tokens that end no row, so that one program serves with and without an end
apply = jax.jit(lambda lm, params, tokens, mask: lm.apply(params, tokens, mask=mask)[0], static_argnums=0)


# The exact law, on a table --------------------------------------------------------------------------------------------


def warped(row, transform):
    """What a transform does to one row of logits, by its definition."""
    if isinstance(transform, Chain):
        return functools.reduce(warped, transform.transforms, row)
    if isinstance(transform, Temperature):
        return row / transform.t
    keeps = kept_by_top_k(row, transform.k) if isinstance(transform, TopK) else kept_by_top_p(row, transform.p)
    return np.where(keeps, row, -np.inf)


def conditional_law(lm, params, transform=None):
    """Log-probabilities of the next token after each prefix, from the table in float64."""
    table = np.asarray(params["logits"], np.float64)
    rows = log_softmax([row if transform is None else warped(row, transform) for row in table])
    prefixes = [p for length in range(lm.horizon) for p in itertools.product(range(lm.vocab_size), repeat=length)]
    return dict(zip(prefixes, rows, strict=True))


def log_probs_under(law, sequences, *, after=()):
    return np.asarray([[law[(*after, *row[:t])][row[t]] for t in range(len(row))] for row in sequences])


def index_of(lm, tokens):
    """The place of each sequence among all, in lexicographic order."""
    return np.asarray(tokens) @ lm.vocab_size ** np.arange(tokens.shape[1] - 1, -1, -1)


@pytest.mark.parametrize(
    "transform", [None, Chain((Temperature(2.0), TopP(0.75))), Chain((TopK(2), Temperature(0.6)))], ids=str
)
def test_sequences_follow_the_product_of_the_warped_conditionals(tabular, transform):
    lm, params = tabular
    options = {"max_new_tokens": 4, "key": jax.random.key(0), "eos_id": NEVER}
    generation = generate(lm, params, NOTHING, transform=transform, **options)
    every = list(itertools.product(range(3), repeat=4))
    law = conditional_law(lm, params, transform)
    with np.errstate(invalid="ignore"):
        assert_follows(index_of(lm, generation.tokens), np.exp(log_probs_under(law, every).sum(axis=1)))
    assert generation.mask.all()
    tokens = np.asarray(generation.tokens)[:500]
    plain = conditional_law(lm, params)
    np.testing.assert_allclose(generation.logp[:500], log_probs_under(plain, tokens), atol=1e-5)
    np.testing.assert_allclose(generation.logp_sampler[:500], log_probs_under(law, tokens), atol=1e-5)


def test_logp_is_the_oracles(tabular):
    lm, params = tabular
    generation = generate(lm, params, NOTHING, max_new_tokens=4, key=jax.random.key(0), eos_id=NEVER)
    total = jax.jit(functools.partial(oracle.sequence_log_probs, lm))(params)[index_of(lm, generation.tokens)]
    np.testing.assert_allclose(generation.logp.sum(axis=1), total, atol=1e-5)


@pytest.mark.parametrize("slots", [[4, 5], [0, 1], [1, 4]], ids=["left", "right", "interior"])
def test_continuations_of_a_prompt_follow_its_conditional_law(tabular, slots):
    lm, params = tabular
    prompts, mask = np.full((DRAWS, 6), 1), np.zeros((DRAWS, 6), bool)
    prompts[:, slots], mask[:, slots] = [2, 0], True
    generation = generate(lm, params, prompts, prompt_mask=mask, max_new_tokens=2, key=jax.random.key(3), eos_id=NEVER)
    every = list(itertools.product(range(3), repeat=2))
    law = log_probs_under(conditional_law(lm, params), every, after=(2, 0))
    assert_follows(index_of(lm, generation.tokens), np.exp(law.sum(axis=1)))


def test_a_fully_masked_prompt_is_the_empty_prompt(tabular):
    lm, params = tabular
    options = {"max_new_tokens": 4, "key": jax.random.key(0), "eos_id": NEVER}
    masked = generate(lm, params, np.ones((DRAWS, 5), int), prompt_mask=np.zeros((DRAWS, 5), bool), **options)
    assert_same(masked, generate(lm, params, NOTHING, **options))


@pytest.mark.parametrize("eos", [[2, 2], [0, 2]], ids=["one end", "two ends"])
def test_ended_sequences_follow_their_law_and_count_the_end(tabular, eos):
    lm, params = tabular
    generation = generate(lm, params, NOTHING, max_new_tokens=4, key=jax.random.key(1), eos_id=eos, pad_id=7)
    law = conditional_law(lm, params)
    every = [
        row
        for length in (1, 2, 3, 4)
        for row in itertools.product(range(3), repeat=length)
        if not set(row[:-1]) & set(eos) and (length == 4 or row[-1] in eos)
    ]
    totals = [log_probs_under(law, [row]).sum() for row in every]
    lengths = np.asarray(generation.mask).sum(axis=1)
    found = [tuple(row[:n]) for row, n in zip(np.asarray(generation.tokens).tolist(), lengths, strict=True)]
    place = {row: i for i, row in enumerate(every)}
    assert_follows([place[row] for row in found], np.exp(totals))
    np.testing.assert_allclose(
        generation.logp.sum(axis=1), np.asarray(totals)[[place[row] for row in found]], atol=1e-5
    )
    mask = np.asarray(generation.mask)
    np.testing.assert_array_equal(mask, np.arange(4) < lengths[:, None])
    assert (np.asarray(generation.tokens)[~mask] == 7).all()
    assert (np.asarray(generation.logp)[~mask] == 0).all() and (np.asarray(generation.logp_sampler)[~mask] == 0).all()


@pytest.mark.parametrize("transform", [None, Temperature(3.0)], ids=str)
def test_greedy_follows_the_argmax_and_is_no_draw(tabular, transform):
    lm, params = tabular
    law = conditional_law(lm, params)
    path = ()
    while len(path) < 4:
        path += (int(np.argmax(law[path])),)
    generation = generate(lm, params, NOTHING[:2], max_new_tokens=4, greedy=True, transform=transform)
    np.testing.assert_array_equal(generation.tokens, [path, path])
    np.testing.assert_allclose(generation.logp, log_probs_under(law, [path, path]), atol=1e-5)
    np.testing.assert_array_equal(generation.logp_sampler, np.zeros((2, 4)))


def test_log_probabilities_of_bfloat16_parameters_are_float32(tabular):
    lm, params = tabular
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    generation = generate(lm, params, NOTHING, max_new_tokens=4, key=jax.random.key(2), transform=Temperature(0.7))
    law, plain = conditional_law(lm, params, Temperature(0.7)), conditional_law(lm, params)
    assert generation.logp.dtype == generation.logp_sampler.dtype == jnp.float32
    tokens = np.asarray(generation.tokens)
    np.testing.assert_allclose(generation.logp[:500], log_probs_under(plain, tokens[:500]), atol=1e-5)
    np.testing.assert_allclose(generation.logp_sampler[:500], log_probs_under(law, tokens[:500]), atol=1e-5)
    every = list(itertools.product(range(3), repeat=4))
    assert_follows(index_of(lm, tokens), np.exp(log_probs_under(law, every).sum(axis=1)))


def test_float64_parameters_give_float64_log_probabilities():
    with jax.enable_x64(True):
        lm = TabularLM(3, 4)
        params = random_params(lm, 1, dtype=jnp.float64)
        generation = generate(lm, params, NOTHING[:50], max_new_tokens=4, key=jax.random.key(0))
        assert generation.logp.dtype == generation.logp_sampler.dtype == jnp.float64
        tokens = np.asarray(generation.tokens)
        exact = log_probs_under(conditional_law(lm, params), tokens)
        np.testing.assert_allclose(generation.logp, exact, rtol=1e-12, atol=1e-14)


# The same tokens, whatever stands around a row ------------------------------------------------------------------------


def assert_same(one, two):
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.mask, two.mask)
    np.testing.assert_allclose(one.logp, two.logp, atol=1e-4)
    np.testing.assert_allclose(one.logp_sampler, two.logp_sampler, atol=1e-4)


def rows_of(generation, rows):
    return jax.tree.map(lambda leaf: leaf[rows], generation)


def spread(width, place, *, seed=0):
    """The first LENGTHS tokens of the prompts in `width` slots, with random tokens at the padding."""
    rng = np.random.default_rng(seed)
    prompts, mask = rng.integers(0, VOCAB, (ROWS, width)), np.zeros((ROWS, width), bool)
    for row, length in enumerate(LENGTHS):
        slots = {"left": np.arange(width - length, width), "right": np.arange(length)}.get(place)
        slots = np.sort(rng.permutation(width)[:length]) if slots is None else slots
        prompts[row, slots], mask[row, slots] = PROMPTS[row, :length], True
    return {"prompts": jnp.asarray(prompts), "prompt_mask": jnp.asarray(mask)}


CHOICES = {"greedy": {"greedy": True}, "sampled": {"key": KEYS, "transform": Temperature(1.5)}}


@pytest.fixture(params=CHOICES)
def choice(request):
    """Greedy or sampled."""
    return CHOICES[request.param]


@functools.cache
def expected(lm, greedy):
    """Of left-padded prompts, 16 new tokens; computed once."""
    options = CHOICES["greedy" if greedy else "sampled"] | {"max_new_tokens": 16, "eos_id": NEVER}
    return generate(lm, random_params(lm), **spread(14, "left"), **options)


def uncached_logits(lm, prompts, lengths, tokens):
    """That the new tokens of each row were drawn from: prompt and tokens scored whole, without padding or cache."""
    rows, new = np.zeros((ROWS, CONTEXT), int), np.asarray(tokens)
    for row, length in enumerate(lengths):
        rows[row, : length + new.shape[1]] = [*prompts[row, :length], *new[row]]
    lengths = np.asarray(lengths)[:, None]
    logits = apply(lm, random_params(lm), jnp.asarray(rows), np.arange(CONTEXT) < lengths + new.shape[1])
    return np.take_along_axis(np.asarray(logits), (lengths - 1 + np.arange(new.shape[1]))[..., None], axis=1)


def assert_drawn_from(generation, logits, transform):
    """The log-probabilities are those of the model and of the warped law."""
    for found, law in [(generation.logp, logits), (generation.logp_sampler, warped_rows(logits, transform))]:
        exact = np.take_along_axis(log_softmax(law), np.asarray(generation.tokens)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(found, exact, atol=1e-4)


def warped_rows(logits, transform):
    return np.asarray([[warped(row, transform) for row in rows] for rows in logits])


def test_greedy_tokens_are_the_argmax_of_the_uncached_model(neural):
    lm, _ = neural
    generation = expected(lm, True)
    logits = uncached_logits(lm, PROMPTS, LENGTHS, generation.tokens)
    np.testing.assert_array_equal(generation.tokens, logits.argmax(axis=-1))
    assert len({tuple(row) for row in np.asarray(generation.tokens).tolist()}) >= 4


def test_log_probabilities_are_those_of_the_uncached_model(neural):
    lm, _ = neural
    generation = expected(lm, False)
    assert_drawn_from(
        generation, uncached_logits(lm, PROMPTS, LENGTHS, generation.tokens), CHOICES["sampled"]["transform"]
    )
    assert len({tuple(row) for row in np.asarray(generation.tokens).tolist()}) == ROWS


@pytest.mark.parametrize("width", [12, 15, 16, 17, 30])
@pytest.mark.parametrize("place", ["left", "right", "interior"])
def test_neither_padding_nor_the_bucket_changes_a_token(neural, choice, place, width):
    lm, params = neural
    generation = generate(lm, params, **spread(width, place, seed=width), max_new_tokens=16, eos_id=NEVER, **choice)
    assert_same(generation, expected(lm, "greedy" in choice))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32])
def test_prompts_without_padding_are_continued_as_the_uncached_model_would(neural, length):
    """On both sides of a bucket's edge, and up to the last place of the context."""
    lm, params = neural
    prompts = np.random.default_rng(length).integers(0, VOCAB, (ROWS, length))
    count = min(16, CONTEXT - length)
    generation = generate(lm, params, prompts, max_new_tokens=count, greedy=True, eos_id=NEVER)
    logits = uncached_logits(lm, prompts, [length] * ROWS, generation.tokens)
    np.testing.assert_array_equal(generation.tokens, logits.argmax(axis=-1))


@pytest.mark.parametrize(("model", "choice"), [("gpt2", "sampled"), ("llama", "greedy")])
def test_a_row_alone_is_the_row_in_its_batch(model, choice):
    lm, choice = TINY[model], CHOICES[choice]
    params, prompts, together = random_params(lm), spread(14, "left"), expected(lm, "greedy" in choice)
    for row in range(ROWS):
        one = {name: array[row : row + 1] for name, array in prompts.items()}
        keys = {"key": KEYS[row : row + 1]} if "key" in choice else {}
        alone = generate(lm, params, **one, max_new_tokens=16, eos_id=NEVER, **choice | keys)
        assert_same(alone, rows_of(together, slice(row, row + 1)))
    order = np.asarray([3, 0, 4, 1, 2])
    mixed = {name: array[order] for name, array in prompts.items()}
    keys = {"key": KEYS[order]} if "key" in choice else {}
    mixed = generate(lm, params, **mixed, max_new_tokens=16, eos_id=NEVER, **choice | keys)
    assert_same(mixed, rows_of(together, order))


@pytest.mark.parametrize("count", [1, 2, 5, 15, 20])
def test_fewer_or_more_new_tokens_share_what_both_have(gpt2, count):
    lm, params = gpt2
    options = CHOICES["sampled"] | {"max_new_tokens": count, "eos_id": NEVER}
    generation = generate(lm, params, **spread(14, "left"), **options)
    assert generation.tokens.shape == (ROWS, count)
    shared = slice(0, min(count, 16))
    assert_same(rows_of(generation, np.s_[:, shared]), rows_of(expected(lm, False), np.s_[:, shared]))


def test_one_key_is_a_key_for_each_row_by_its_index(gpt2):
    lm, params = gpt2
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(9), row))(jnp.arange(ROWS))
    options = spread(14, "left") | {"max_new_tokens": 16, "transform": Temperature(1.5), "eos_id": NEVER}
    single = generate(lm, params, **options, key=jax.random.key(9))
    assert_same(single, generate(lm, params, **options, key=keys))
    assert (single.tokens != generate(lm, params, **options, key=jax.random.key(10)).tokens).any()


def test_equal_prompts_of_one_key_are_drawn_apart(gpt2):
    lm, params = gpt2
    prompts = jnp.broadcast_to(jnp.asarray([[3, 4]]), (ROWS, 2))
    options = {"max_new_tokens": 16, "key": jax.random.key(9), "transform": Temperature(1.5), "eos_id": NEVER}
    tokens = generate(lm, params, prompts, **options).tokens
    assert len({tuple(row) for row in np.asarray(tokens).tolist()}) == ROWS


@pytest.mark.parametrize("filler", [-100, -1, VOCAB, 10**6])
def test_a_pad_token_outside_the_vocabulary_is_welcome(neural, filler):
    lm, params = neural
    prompts = spread(14, "interior")
    prompts["prompts"] = jnp.where(prompts["prompt_mask"], prompts["prompts"], filler)
    eos = int(expected(lm, True).tokens[0, 3])
    generation = generate(lm, params, **prompts, max_new_tokens=16, greedy=True, eos_id=[eos, eos], pad_id=filler)
    assert_same(generation, cut(expected(lm, True), [eos], pad_id=filler))


def test_prompts_may_be_numpy_lists_or_any_integers(gpt2):
    lm, params = gpt2
    prompts = np.asarray(spread(12, "left")["prompts"])
    options = {"max_new_tokens": 16, "greedy": True, "eos_id": NEVER}
    reference = generate(lm, params, jnp.asarray(prompts), **options)
    for same in (prompts, prompts.tolist(), prompts.astype(np.uint8), prompts.astype(np.int64)):
        assert_same(generate(lm, params, same, **options), reference)


def test_an_empty_batch_gives_an_empty_generation(gpt2):
    lm, params = gpt2
    generation = generate(lm, params, np.zeros((0, 3), int), max_new_tokens=2, greedy=True)
    assert generation.tokens.shape == generation.logp.shape == (0, 2)


# Ending ---------------------------------------------------------------------------------------------------------------


def cut(generation, eos, *, pad_id=0):
    """What a generation without an end becomes if these tokens end it."""
    tokens = np.asarray(generation.tokens)
    ends = np.isin(tokens, eos)
    mask = np.cumsum(ends, axis=1) - ends == 0
    values = [np.where(mask, leaf, 0) for leaf in (generation.logp, generation.logp_sampler)]
    return Generation(np.where(mask, tokens, pad_id), mask, *values)


@pytest.mark.parametrize("times", [[2, 2], [3, 9]], ids=str)
def test_ending_early_changes_nothing_before_the_end(neural, choice, times):
    lm, params = neural
    full = expected(lm, "greedy" in choice)
    eos = [int(full.tokens[0, time]) for time in times]
    options = choice | {"max_new_tokens": 16, "pad_id": 3}
    for eos_id in (eos, jnp.asarray(eos)):
        generation = generate(lm, params, **spread(14, "left"), **options, eos_id=eos_id)
        assert_same(generation, cut(full, eos, pad_id=3))
    assert 0 < generation.mask.sum() < ROWS * 16


def test_no_end_and_one_and_an_end_that_never_comes(tabular):
    lm, params = tabular
    options = {"max_new_tokens": 4, "greedy": True}
    full = generate(lm, params, NOTHING[:2], **options, eos_id=NEVER)
    for eos_id in (None, []):
        assert_same(generate(lm, params, NOTHING[:2], **options, eos_id=eos_id), full)
    eos = int(full.tokens[0, 1])
    for eos_id in (eos, [eos], (eos, eos)):
        assert_same(generate(lm, params, NOTHING[:2], **options, eos_id=eos_id), cut(full, [eos]))


CALLS = []


class Successor(LanguageModel):
    """After token t comes t + 1; it counts the times it really runs."""

    vocab_size, max_length, min_prompt_length = 100, 10**6, 1

    def init_cache(self, batch_size, max_length, *, dtype=jnp.float32):
        return Cache((), jnp.zeros((batch_size, max_length), bool), jnp.zeros((), jnp.int32))

    def hidden(self, params, tokens, cache=None, *, mask=None):
        jax.debug.callback(lambda: CALLS.append(tokens.shape[1]))
        return 30.0 * jax.nn.one_hot(tokens + 1, 100), cache.append(
            jnp.ones(tokens.shape, bool) if mask is None else mask
        )

    def logits(self, params, hidden):
        return hidden


SUCCESSOR = Successor()


def steps_of(run):
    """What `run` returns, and how many times the model ran on one token a row."""
    CALLS.clear()
    result = jax.block_until_ready(run())
    jax.effects_barrier()
    assert sum(length > 1 for length in CALLS) == 1, "one prefill"
    return result, CALLS.count(1)


@pytest.mark.parametrize(
    ("starts", "max_new_tokens", "steps"),
    [
        ([98, 98], 60, 0),  # the first token, which comes with the prefill, ends both rows
        ([98, 97], 60, 8),  # one block of steps
        ([97, 90], 60, 8),
        ([98, 89], 60, 16),
        ([0, 1], 60, 64),  # no row ends
        ([0, 1], 50, 56),
        ([0, 1], 9, 8),
        ([0, 1], 10, 16),
        ([0, 1], 1, 0),
    ],
)
def test_nothing_is_computed_once_all_rows_have_ended_or_have_enough(starts, max_new_tokens, steps):
    prompts, params = jnp.asarray(starts)[:, None], {"none": jnp.zeros(())}
    options = {"max_new_tokens": max_new_tokens, "greedy": True, "eos_id": 99}
    generation, taken = steps_of(lambda: generate(SUCCESSOR, params, prompts, **options))
    assert taken == steps
    row = np.asarray(starts)[:, None] + 1 + np.arange(max_new_tokens)
    np.testing.assert_array_equal(generation.mask, row <= 99)
    np.testing.assert_array_equal(generation.tokens, np.where(row <= 99, row, 0))


def test_the_cache_counts_the_tokens_of_a_row_up_to_its_end_and_no_padding_after_it():
    params, prompts = {"none": jnp.zeros(())}, jnp.asarray([[97, 0], [0, 90]])
    request = core.request(SUCCESSOR, prompts, prompts > 0, max_new_tokens=99, greedy=True, eos_id=99)

    @jax.jit
    def run(request):
        state, _ = begin(SUCCESSOR, params, request, num_slots=32)
        return advance(SUCCESSOR, params, state, request, num_steps=8)

    state, rest = run(request)
    np.testing.assert_array_equal(rest.tokens, [[99] + [0] * 7, range(92, 100)])
    np.testing.assert_array_equal(state.cache.valid.sum(axis=1), [1 + 2, 1 + 8])  # 98 and 99; 91 to 98, 99 is to be fed
    np.testing.assert_array_equal(state.done, [True, True])
    assert int(state.time) == 9


# Streams --------------------------------------------------------------------------------------------------------------


def joined(pieces, *, length, pad_id):
    """The pieces as one generation, padded to `length` as `generate` pads."""
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *pieces)
    missing = length - whole.tokens.shape[1]
    padded = jax.tree.map(lambda leaf: np.pad(leaf, ((0, 0), (0, missing))), whole)
    padded.tokens[:, length - missing :] = pad_id
    return padded


@pytest.mark.parametrize(
    ("model", "choice", "tokens_at_a_time"),
    [("gpt2", "greedy", 1), ("gpt2", "greedy", 3), ("gpt2", "greedy", 8), ("llama", "sampled", 3)],
)
def test_a_stream_is_the_generation_in_pieces(model, choice, tokens_at_a_time):
    lm = TINY[model]
    full = expected(lm, choice == "greedy")
    last = [int(full.tokens[row, 12]) for row in (0, 1)]
    options = spread(14, "left") | CHOICES[choice] | {"pad_id": 5, "tokens_at_a_time": tokens_at_a_time}
    for count, eos in [(16, NEVER), (11, NEVER), (16, last)]:
        pieces = list(stream(lm, random_params(lm), **options, max_new_tokens=count, eos_id=eos))
        sizes = [piece.tokens.shape[1] for piece in pieces]
        assert sizes[0] == 1 and set(sizes[1:-1]) <= {tokens_at_a_time} and sum(sizes) <= count
        assert_same(joined(pieces, length=count, pad_id=5), rows_of(cut(full, eos, pad_id=5), np.s_[:, :count]))


@pytest.mark.parametrize(("start", "pieces", "steps"), [(98, 1, 0), (95, 2, 3), (94, 3, 4), (90, 4, 8), (0, 7, 18)])
def test_a_stream_stops_when_all_rows_have_ended(start, pieces, steps):
    prompts, params = jnp.asarray([[98], [start]]), {"none": jnp.zeros(())}
    options = {"max_new_tokens": 19, "greedy": True, "eos_id": 99, "tokens_at_a_time": 3}
    result, taken = steps_of(lambda: list(stream(SUCCESSOR, params, prompts, **options)))
    assert (len(result), taken) == (pieces, steps)


# Inside other transformations -----------------------------------------------------------------------------------------


def test_generate_inside_jit(gpt2):
    lm, params = gpt2

    @jax.jit
    def inside(params, prompts, keys, t):
        return generate(lm, params, **prompts, max_new_tokens=16, key=keys, transform=Temperature(t))

    assert_same(inside(params, spread(14, "left"), KEYS, 1.5), expected(lm, False))


def test_generate_under_vmap_over_keys_and_over_parameters(gpt2):
    lm, params = gpt2
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    keys = jnp.stack([KEYS, jax.random.split(jax.random.key(77), ROWS)])
    options = spread(14, "left") | {"max_new_tokens": 16, "transform": Temperature(1.5), "eos_id": NEVER}
    results = jax.jit(jax.vmap(lambda params, keys: generate(lm, params, **options, key=keys)))(both, keys)
    assert_same(rows_of(results, 0), expected(lm, False))
    assert_same(rows_of(results, 1), generate(lm, other, **options, key=keys[1]))


MESH = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from tests.conftest import TINY, random_params
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxrl_llm.decoding import generate
    from jaxrl_llm.decoding.transforms import Chain, Temperature, TopP

    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    lm, params = TINY["gpt2"], random_params(TINY["gpt2"])
    prompts = np.random.default_rng(0).integers(0, lm.vocab_size, (16, 9))
    mask = np.arange(9) >= np.arange(16)[:, None] % 9
    keys = jax.random.split(jax.random.key(0), 16)
    options = {"max_new_tokens": 12, "transform": Chain((Temperature(1.5), TopP(0.95))), "eos_id": [3, 7, 8]}
    single = generate(lm, params, prompts, prompt_mask=mask, key=keys, **options)
    shared = jax.device_put((prompts, mask, keys), rows)
    spread = generate(
        lm, jax.device_put(params, everywhere), shared[0], prompt_mask=shared[1], key=shared[2], **options
    )
    assert len(spread.tokens.sharding.device_set) == 8, spread.tokens.sharding
    assert {shard.data.shape for shard in spread.tokens.addressable_shards} == {(2, 12)}, spread.tokens.sharding
    np.testing.assert_array_equal(spread.tokens, single.tokens)
    np.testing.assert_array_equal(spread.mask, single.mask)
    np.testing.assert_allclose(spread.logp, single.logp, atol=1e-4)
    assert 0 < spread.mask.sum() < 16 * 12
    print("same tokens")
"""


@pytest.mark.slow
def test_a_batch_spread_over_eight_devices_gives_the_same_tokens():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(MESH), str(Path(__file__).resolve().parents[2])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "same tokens" in result.stdout, result.stderr[-3000:]


# Compiling once -------------------------------------------------------------------------------------------------------


def programs_of(*runs):
    """How many programs `decode` was compiled to by these."""
    before = decode._cache_size()
    for run in runs:
        run()
    return decode._cache_size() - before


@pytest.mark.parametrize("wrap", [float, jnp.float32], ids=["python numbers", "arrays"])
def test_other_numbers_keys_and_prompts_compile_nothing_new(wrap):
    lm = TabularLM(vocab_size=2, horizon=12 if wrap is float else 13)  # models that no other test compiles
    params = random_params(lm)

    def run(t, k, p, seed, length, count, eos_id=0, pad_id=0):
        chain = Chain((Temperature(wrap(t)), TopK(k if wrap is float else jnp.int32(k)), TopP(wrap(p))))
        prompts = np.random.default_rng(seed).integers(0, 2, (3, length))
        options = {"transform": chain, "key": jax.random.key(seed), "eos_id": eos_id, "pad_id": pad_id}
        return lambda: generate(lm, params, prompts, max_new_tokens=count, **options)

    first = run(0.5, 1, 0.5, 0, 3, 4)
    others = [
        run(1.7, 1, 0.5, 0, 3, 4),
        run(0.5, 2, 0.5, 0, 3, 4),
        run(0.5, 1, 1.0, 0, 3, 4),
        run(0.5, 1, 0.5, 1, 3, 4),
        run(0.5, 1, 0.5, 0, 0, 4),
        run(0.5, 1, 0.5, 0, 6, 4),
        run(0.5, 1, 0.5, 0, 3, 1),
        run(0.5, 1, 0.5, 0, 3, 8),
        run(0.5, 1, 0.5, 0, 3, 4, eos_id=1, pad_id=-1),
        run(0.5, 1, 0.5, 0, 3, 4, eos_id=[1]),
    ]
    assert programs_of(first, *others) == 1


def test_a_bucket_of_prompts_and_of_new_tokens_is_one_program():
    def run(length, count):
        prompts = np.ones((7, length), int)  # of as many rows as in no other test
        return lambda: generate(SUCCESSOR, {"none": jnp.zeros(())}, prompts, max_new_tokens=count, greedy=True)

    assert programs_of(run(1, 1), run(15, 9), run(16, 17)) == 1
    assert programs_of(run(17, 1), run(32, 17)) == 1
    assert programs_of(run(1, 18), run(16, 33)) == 1


# What cannot be -------------------------------------------------------------------------------------------------------


LEGACY_KEY = jax.random.PRNGKey(0)
MISTAKES = {
    "an empty prompt": (np.zeros((2, 0), int), {}, "prompt 0 is empty"),
    "a fully masked row": (
        [[1, 2], [1, 2]],
        {"prompt_mask": np.asarray([[True, False], [False, False]])},
        "prompt 1 is empty",
    ),
    "a prompt longer than the context": (
        np.ones((1, 43), int),
        {},
        "row 0 of prompts comes to 43 tokens.*context of 42",
    ),
    "no room for the new tokens": (
        np.ones((1, 40), int),
        {"max_new_tokens": 3},
        "40 tokens, and 3 new ones do not fit",
    ),
    "no room in one row": ([[1] * 40] * 2, {"prompt_mask": np.arange(40) >= np.asarray([[9], [0]])}, "prompt 1 has 40"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, but is 0"),
    "fewer than no new tokens": ([[1]], {"max_new_tokens": -3}, "max_new_tokens must be at least 1, but is -3"),
    "no key": ([[1]], {"key": None}, "needs key="),
    "a legacy key": ([[1]], {"key": LEGACY_KEY}, "made by jax.random.key, but is .*uint32"),
    "a seed for a key": ([[1]], {"key": 0}, "made by jax.random.key, but is 0"),
    "keys for other rows": ([[1]], {"key": jax.random.split(jax.random.key(0), 3)}, r"each of 1 rows.*\(3,\)"),
    "a negative token": ([[1, -1]], {}, r"\[0, 23\).*from -1 to 1"),
    "a token too large": ([[1, 23]], {}, r"\[0, 23\).*from 1 to 23"),
    "float tokens": ([[1.0]], {}, "prompts must be integers.*float32"),
    "boolean tokens": ([[True]], {}, "prompts must be integers.*bool"),
    "one dimension": ([1, 2], {}, r"prompts must be integers \[batch, time\].*\[2\]"),
    "three dimensions": ([[[1, 2]]], {}, r"prompts must be integers \[batch, time\].*\[1, 1, 2\]"),
    "a mask of another shape": ([[1, 2]], {"prompt_mask": np.ones((1, 3), bool)}, r"bool\[1, 2\].*bool\[1, 3\]"),
    "a mask of numbers": ([[1, 2]], {"prompt_mask": np.ones((1, 2))}, r"bool\[1, 2\].*float32\[1, 2\]"),
}


def streamed(*args, **options):
    return list(stream(*args, **options))


@pytest.mark.parametrize("decoder", [generate, streamed], ids=["generate", "stream"])
@pytest.mark.parametrize(("prompts", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_anything_is_compiled(gpt2, decoder, prompts, options, message):
    lm, params = gpt2
    before = decode._cache_size()
    with pytest.raises(ValueError, match=message):
        decoder(lm, params, prompts, **{"max_new_tokens": 4, "key": jax.random.key(0)} | options)
    assert decode._cache_size() == before


@pytest.mark.parametrize("tokens_at_a_time", [0, -1])
def test_a_stream_of_no_tokens_at_a_time_is_refused(gpt2, tokens_at_a_time):
    with pytest.raises(ValueError, match="tokens_at_a_time must be an integer of at least 1"):
        next(stream(*gpt2, [[1]], max_new_tokens=4, greedy=True, tokens_at_a_time=tokens_at_a_time))


def broken(params, kind, row):
    """A table whose logits of one prefix are no law."""
    values = {"NaN": [jnp.nan, 0, 0], "all NaN": [jnp.nan] * 3, "+inf": [0, jnp.inf, 0], "all -inf": [-jnp.inf] * 3}
    return {"logits": params["logits"].at[row].set(jnp.asarray(values[kind]))}


@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        (generate, {"greedy": True}),
        (generate, {"key": jax.random.key(0)}),
        (generate, {"key": jax.random.key(0), "transform": TopK(2)}),
        (streamed, {"key": jax.random.key(0)}),
    ],
    ids=["greedy", "sampled", "warped", "stream"],
)
@pytest.mark.parametrize("kind", ["NaN", "all NaN", "+inf", "all -inf"])
def test_logits_that_are_no_law_raise_where_they_are_met(tabular, decoder, options, kind):
    lm, params = tabular
    for row, time in [(0, 0), (1 + 2, 1)]:  # at the root; after token 2, which the table is made to begin with
        table = broken({"logits": params["logits"].at[0].set(jnp.asarray([-jnp.inf, -jnp.inf, 0]))}, kind, row)
        with pytest.raises(FloatingPointError, match=f"row 0 at new token {time}: .* NaN, \\+inf, or all −inf"):
            decoder(lm, table, NOTHING[:2], max_new_tokens=3, **options)


def test_logits_that_are_no_law_do_no_harm_where_they_are_not_met(tabular):
    lm, params = tabular
    table = broken({"logits": params["logits"].at[0, 2].set(-jnp.inf)}, "all NaN", 1 + 2)
    options = {"max_new_tokens": 3, "key": jax.random.key(0)}
    generation = generate(lm, table, NOTHING, **options, eos_id=NEVER)
    assert not (generation.tokens[:, 0] == 2).any() and np.isfinite(generation.logp).all()
    ended = generate(lm, broken(params, "NaN", 1 + 2), NOTHING, **options, eos_id=(2, 2))
    assert (ended.tokens[:, 0] == 2).any() and np.isfinite(ended.logp).all()


@pytest.mark.parametrize("decoder", [generate, streamed], ids=["generate", "stream"])
def test_nan_parameters_raise(gpt2, decoder):
    lm, params = gpt2
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(FloatingPointError, match="row 0 at new token 0"):
        decoder(lm, params, **spread(14, "left"), max_new_tokens=16, greedy=True, eos_id=NEVER)


def test_under_an_outer_jit_a_law_that_broke_down_shows_as_nan(tabular):
    lm, params = tabular
    inside = jax.jit(lambda params: generate(lm, params, NOTHING[:2], max_new_tokens=3, greedy=True))
    logp = inside(broken({"logits": params["logits"].at[0, 2].set(9.0)}, "all NaN", 1 + 2)).logp
    np.testing.assert_array_equal(np.isnan(logp), [[False, True, False]] * 2)


def test_guidance_of_scale_one_is_generation_and_of_others_excludes_what_either_prompt_does():
    lm = TabularLM(vocab_size=3, horizon=3)
    params = {"logits": jnp.asarray(np.random.default_rng(0).normal(size=(lm.num_prefixes, 3)), jnp.float32)}
    params["logits"] = params["logits"].at[1, 2].set(-jnp.inf).at[2, 0].set(-jnp.inf)  # after "0" and after "1"
    first, second = jnp.asarray([[0]]), jnp.asarray([[1]])
    keys = jax.random.split(jax.random.key(0), 400)
    rows = {"prompts": jnp.tile(first, (400, 1)), "max_new_tokens": 1, "key": keys}
    guided = generate(lm, params, **rows, guidance=Guidance(jnp.tile(second, (400, 1)), 1.0))
    np.testing.assert_array_equal(guided.tokens, generate(lm, params, **rows).tokens)
    assert set(np.unique(guided.tokens)) == {0, 1}
    between = generate(lm, params, **rows, guidance=Guidance(jnp.tile(second, (400, 1)), 0.5))
    assert set(np.unique(between.tokens)) == {1}


def test_guidance_mixes_the_two_laws_whatever_the_padding():
    lm = TabularLM(vocab_size=3, horizon=3)
    params = {"logits": jnp.asarray(np.random.default_rng(1).normal(size=(lm.num_prefixes, 3)), jnp.float32)}
    own, other = (log_softmax(params["logits"][row]) for row in (1, 2))  # after "0" and after "1"
    expected = log_softmax(other + 2.5 * (own - other))
    padded = Guidance(jnp.asarray([[1, 0, 0]]), 2.5, jnp.asarray([[True, False, False]]))
    found = generate(lm, params, jnp.asarray([[0]]), max_new_tokens=1, key=jax.random.key(3), guidance=padded)
    np.testing.assert_allclose(found.logp_sampler[0, 0], expected[found.tokens[0, 0]], rtol=1e-5)
    np.testing.assert_allclose(found.logp[0, 0], own[found.tokens[0, 0]], rtol=1e-5)


def test_each_row_has_its_own_limit():
    lm = TabularLM(vocab_size=3, horizon=3)
    found = generate(
        lm, lm.init(jax.random.key(0)), jnp.zeros((3, 0), jnp.int32), max_new_tokens=np.asarray([1, 3, 2]), greedy=True
    )
    np.testing.assert_array_equal(found.mask.sum(axis=1), [1, 3, 2])
    assert (found.logp[~found.mask] == 0).all()
