"""Continuous batching: in any number of rows, refilled or not, each prompt has the tokens that it has alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import constraints, generate, generate_many, many, stop_strings
from jaxrl_llm.decoding.core import BLOCK
from jaxrl_llm.decoding.transforms import (
    FrequencyPenalty,
    LogitBias,
    MinLength,
    Mirostat,
    RepetitionPenalty,
    Temperature,
)
from tests.conftest import TINY, VOCAB, first_quick, random_params
from tests.decoding.decoders import assert_same, programs_of, rows_of
from tests.decoding.test_generate import CALLS, SUCCESSOR
from tests.models.test_conformance import MODELS

COUNT, LONGEST, NEW = 24, 20, 22
ROWS, TWO_AT_A_TIME = 2, 9  # nine rows are refilled by twos
KEY = jax.random.key(4)
ENDS = (1, 7)
PIECES = [b"", *(bytes([97 + token]) for token in range(VOCAB - 1))]  # a, b, c, ...


def prompts_of(lm, count=COUNT, longest=LONGEST, *, seed=0):
    """Prompts of all lengths, in no order."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.linspace(lm.min_prompt_length, longest, count).astype(int))
    return [rng.integers(0, lm.vocab_size, length).tolist() for length in lengths]


def options_of(lm):
    """Prompts, and new tokens up to the end of the context."""
    longest = min(LONGEST, lm.max_length // 2)
    limit = min(NEW, lm.max_length - longest)
    return {"prompts": prompts_of(lm, longest=longest), "max_new_tokens": limit, "eos_id": ENDS, "key": KEY}


def alone(lm, params, row, *, prompts, key, **options):
    """One of the prompts alone, with its own key."""
    return generate(lm, params, [prompts[row]], key=jax.random.fold_in(key, row)[None], **options)


@pytest.mark.parametrize("name", first_quick(["tabular", *sorted(set(MODELS) - {"tabular", "t5"})]))
def test_every_prompt_has_the_tokens_that_it_has_alone(name):
    lm = MODELS[name]
    params, options = random_params(lm), options_of(lm)
    found = generate_many(lm, params, rows=ROWS, **options)
    assert_same(found, generate(lm, params, **options))
    for row in (0, 9, 23):
        assert_same(rows_of(found, slice(row, row + 1)), alone(lm, params, row, **options))
    lengths = np.asarray(found.mask).sum(axis=1)
    assert len(set(lengths.tolist())) > 2 and lengths.max() == options["max_new_tokens"], "rows end at all times"
    assert lengths.sum() > ROWS * (many.FREE_SLOTS + 32) or name == "tabular", "the cache is moved"


@pytest.mark.slow
@pytest.mark.parametrize("rows", [TWO_AT_A_TIME, 1, 16])
def test_neither_the_rows_nor_the_order_nor_padding_change_a_prompt(rows):
    lm, params, order = TINY["gpt2"], random_params(TINY["gpt2"]), np.random.default_rng(1).permutation(COUNT)
    options = options_of(lm) | {"key": jax.vmap(lambda row: jax.random.fold_in(KEY, row))(jnp.arange(COUNT))}
    whole = generate(lm, params, **options)
    assert_same(generate_many(lm, params, rows=rows, **options), whole)
    right = np.full((COUNT, LONGEST), 3)
    for row, prompt in zip(right, (options["prompts"][i] for i in order), strict=True):
        row[: len(prompt)] = prompt
    lengths = np.asarray([len(options["prompts"][i]) for i in order])[:, None]
    options |= {"prompts": right, "prompt_mask": np.arange(LONGEST) < lengths, "key": options["key"][order]}
    assert_same(generate_many(lm, params, rows=rows, **options), rows_of(whole, order))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tabular", "llama"])
def test_in_float64_a_refilled_row_is_the_prompt_in_its_batch_to_the_last_digits(name):
    with jax.enable_x64(True):
        lm, params = TINY[name], random_params(TINY[name], dtype=jnp.float64)
        options = options_of(lm)
        found, expected = generate_many(lm, params, rows=3, **options), generate(lm, params, **options)
        assert found.logp.dtype == jnp.float64
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        for ours, theirs in zip(jax.tree.leaves(found)[2:], jax.tree.leaves(expected)[2:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.slow
def test_limits_settings_states_and_stop_strings_of_a_prompt_follow_it_into_its_row():
    lm, rng = TINY["gpt2"], np.random.default_rng(3)
    spread = functools.partial(rng.uniform, size=COUNT)
    options = options_of(lm) | {
        "max_new_tokens": rng.integers(4, NEW, COUNT),
        "stop": stop_strings(PIECES, ["de", "k", "c"]),
        "pad_id": 5,
        "transform": [
            constraints.Constrained(constraints.from_regex("[a-k]{3,}", PIECES), ENDS),
            MinLength(rng.integers(0, 6, COUNT), ENDS),
            LogitBias(rng.normal(size=(COUNT, VOCAB))),
            RepetitionPenalty(spread(1, 2)),
            FrequencyPenalty(spread(0, 1)),
            Temperature(spread(0.5, 2)),
            Mirostat(spread(2, 4), 0.3),
        ],
    }
    expected = generate(lm, random_params(lm), **options)
    assert_same(generate_many(lm, random_params(lm), rows=ROWS, **options), expected)
    last = np.asarray(expected.tokens)[np.arange(COUNT), np.asarray(expected.mask).sum(axis=1) - 1]
    at_limit = np.asarray(expected.mask).sum(axis=1) == options["max_new_tokens"]
    ended = np.isin(last, ENDS)
    assert at_limit.any() and ended.any() and (~at_limit & ~ended).any(), "rows end in all three ways"


def test_the_most_probable_tokens_need_no_key(tabular):
    lm, params = tabular
    options = {"prompts": [[], [1], [2, 0], []], "max_new_tokens": 2, "greedy": True, "eos_id": 0}
    assert_same(generate_many(lm, params, rows=1, **options), generate(lm, params, **options))


# The schedule ---------------------------------------------------------------------------------------------------------


def scheduled(counts, rows):
    """The number of steps for texts of so many tokens: rows that have ended take the next ones between blocks."""
    waiting, left, steps, group = list(counts), [0] * rows, 0, -(-rows // many.GROUP)
    while waiting or max(left) > 0:
        free = [row for row in range(rows) if left[row] <= 0]
        while waiting and len(free) >= min(group, len(waiting)):
            for row in free[:group]:
                left[row] = waiting.pop(0) - 1 if waiting else left[row]  # the first token comes with the prompt
            free = [row for row in range(rows) if left[row] <= 0]
        left, steps = [each - BLOCK for each in left], steps + BLOCK
    return steps


@pytest.mark.parametrize(("rows", "seed"), [(4, 0), (4, 1), (9, 2)])
def test_rows_are_refilled_between_blocks_and_no_step_is_wasted(rows, seed):
    counts = np.random.default_rng(seed).choice([1, 3, 9, 70], 30, p=[0.1, 0.4, 0.4, 0.1])
    CALLS.clear()
    options = {"max_new_tokens": 80, "greedy": True, "eos_id": 99, "rows": rows}
    found = generate_many(SUCCESSOR, {"none": jnp.zeros(())}, 99 - counts[:, None], **options)
    jax.block_until_ready(found)
    jax.effects_barrier()
    np.testing.assert_array_equal(found.mask.sum(axis=1), counts)
    fixed = sum(-(-(max(counts[start : start + rows]) - 1) // BLOCK) * BLOCK for start in range(0, 30, rows))
    assert CALLS.count(1) == scheduled(counts, rows) < 0.8 * fixed


def test_a_prompt_is_read_in_chunks_without_those_that_are_padding():
    CALLS.clear()
    prompts = [[1] * count for count in (100, 98, 40, 32, 5)]
    jax.block_until_ready(
        generate_many(SUCCESSOR, {"none": jnp.zeros(())}, prompts, max_new_tokens=1, greedy=True, rows=1)
    )
    jax.effects_barrier()
    assert CALLS.count(many.CHUNK) == 4 + 4 + 2 + 1 + 1


def test_one_program_serves_all_prompts_of_a_bucket_and_all_their_numbers():
    lm, params = TINY["gpt2"], random_params(TINY["gpt2"])
    generate_many(lm, params, rows=TWO_AT_A_TIME, **options_of(lm))

    def call(count, longest, new, seed):
        limits = np.random.default_rng(seed).integers(18, new + 1, count)
        options = {"max_new_tokens": limits, "key": jax.random.key(seed), "eos_id": (seed, 9), "pad_id": seed}
        return lambda: generate_many(
            lm, params, prompts_of(lm, count, longest, seed=seed), rows=TWO_AT_A_TIME, **options
        )

    assert programs_of(call(17, 17, 18, 0), call(32, 19, 22, 1), program=many.advance) == 0


@pytest.mark.slow
def test_it_runs_in_one_piece_under_an_outer_jit(tabular):
    lm, params = tabular
    prompts, options = np.asarray([[0], [1], [2], [1], [0]]), {"max_new_tokens": 3, "eos_id": 2}
    inside = jax.jit(lambda params, key: generate_many(lm, params, prompts, key=key, rows=2, **options))
    assert_same(inside(params, KEY), generate(lm, params, prompts, key=KEY, **options))


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_named(gpt2, tabular):
    with pytest.raises(ValueError, match="rows must be an integer of at least 1, but is 0"):
        generate_many(*gpt2, [[1]], max_new_tokens=2, greedy=True, rows=0)
    with pytest.raises(ValueError, match="generate_many takes models of one text, but T5LM has a source for each row"):
        generate_many(TINY["t5"], None, [[0], [0]], max_new_tokens=2, greedy=True, rows=1)
    lm, params = tabular
    broken = {"logits": params["logits"].at[1 + 2].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="row 3 at new token 0"):
        generate_many(lm, broken, [[0], [1], [0], [2]], max_new_tokens=2, greedy=True, eos_id=0, rows=1)
