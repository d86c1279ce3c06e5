"""The conformance suite of all decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import exact_search, search_tree
from jaxrl_llm.decoding.generate import decode
from jaxrl_llm.decoding.transforms import Chain, Temperature
from jaxrl_llm.tabular import TabularLM
from tests.conftest import TINY, VOCAB, random_params
from tests.decoding.decoders import (
    DECODERS,
    DRAWN,
    KEYS,
    LENGTHS,
    NEW,
    NO_TRANSFORM,
    ORDER,
    PROGRAMS,
    PROMPTS,
    ROWS,
    assert_same,
    ends_of,
    expected,
    programs_of,
    rows_of,
    run,
    spread,
    steered,
    tokens_and_mask,
)

every_decoder = pytest.mark.parametrize("name", DECODERS)
FAST = ("greedy", "sampled", "beam")
MODELS = [
    *(pytest.param("gpt2", name, marks=[pytest.mark.slow] * (name not in FAST)) for name in DECODERS),
    ("llama", "greedy"),
]
TABLE = TabularLM(vocab_size=3, horizon=6)
PARAMS = random_params(TABLE, 1)
PAIR = np.asarray([[0, 1], [1, 2]])


def slow_but(*fast, never=()):
    """All decoders; those that are not fast are left to `make slow`."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in DECODERS if name not in never]


def on_table(name, prompts=PAIR, *, params=PARAMS, **options):
    """A decoder on the table; two prompts and one EOS make one program for all tests."""
    options = {"max_new_tokens": 3, "eos_id": 9, "key": KEYS[0]} | options
    return DECODERS[name](TABLE, params, prompts, **options)


@pytest.mark.parametrize(("model", "name"), MODELS)
def test_neither_padding_nor_batch_mates_change_a_row(model, name):
    whole = expected(name, model)
    for place, width in [("right", 14), ("interior", 14), ("left", 12), ("right", 16)]:
        assert_same(run(name, model, **spread(place, width, seed=width)), whole)
    assert_same(run(name, model, rows=ORDER), rows_of(whole, ORDER))
    lists = [PROMPTS[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    assert_same(run(name, model, prompts=lists, prompt_mask=None), whole)
    tokens, _ = tokens_and_mask(whole)
    assert len({row.tobytes() for row in tokens}) == ROWS, "the rows differ"


@pytest.mark.parametrize("name", slow_but("sampled", "beam"))
@pytest.mark.slow
def test_the_bucket_changes_no_row(name):
    assert_same(run(name, **spread("left", 20)), expected(name))


@pytest.mark.parametrize("name", slow_but(*FAST, "stream", "many"))
def test_a_row_ends_with_its_end_which_counts_or_at_its_limit(name):
    limits, eos = np.asarray([16, 3, 1, 9, 16]), ends_of(name)
    found = run(name, eos_id=eos, max_new_tokens=limits, pad_id=7)
    tokens, mask = tokens_and_mask(found)
    lengths = mask.sum(axis=-1)
    np.testing.assert_array_equal(mask, np.arange(NEW) < lengths[..., None])
    assert (tokens[~mask] == 7).all()
    ends = np.isin(tokens, eos) & mask
    last = np.take_along_axis(ends, np.maximum(lengths, 1)[..., None] - 1, axis=-1)[..., 0]
    at_limit = lengths == limits.reshape(-1, *[1] * (lengths.ndim - 1))
    assert (last | at_limit | (lengths == 0)).all() and (ends.sum(axis=-1) == last).all()
    assert last.any() and at_limit.any()
    for row, limit in enumerate(limits.tolist()):  # the limit of a row is that of the whole batch for it
        alone = tokens_and_mask(run(name, eos_id=eos, max_new_tokens=limit, pad_id=7))
        np.testing.assert_array_equal(tokens[row, ..., :limit], alone[0][row])
        np.testing.assert_array_equal(mask[row, ..., :limit], alone[1][row])
    for leaf in jax.tree.leaves(found):
        if leaf.shape == mask.shape and jnp.issubdtype(leaf.dtype, jnp.floating):
            assert not np.asarray(leaf)[~mask].any()


@pytest.mark.slow
def test_no_end_may_be_given_in_any_way():
    for none in (None, []):
        assert_same(on_table("beam", eos_id=none), on_table("beam"))


def assert_empty(found):
    found = getattr(found, "generation", found)
    assert found.tokens.shape == found.mask.shape and found.tokens.shape[:1] + found.tokens.shape[-1:] == (0, 3)


@pytest.mark.parametrize("name", ["sampled", "stream", "beam"])
def test_an_empty_batch_gives_an_empty_result(name):
    assert_empty(on_table(name, np.zeros((0, 3), int)))


@pytest.mark.parametrize("name", slow_but("beam", never=("stream",)))
def test_under_an_outer_jit_it_is_the_same_and_broken_logits_show_as_nan(name):
    inside = jax.jit(lambda params, prompts, key: on_table(name, prompts, params=params, key=key))
    assert_same(inside(PARAMS, PAIR, KEYS[:2]), on_table(name, key=KEYS[:2]))
    broken = inside(jax.tree.map(lambda leaf: leaf * np.nan, PARAMS), PAIR, KEYS[:2])
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(broken) if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.parametrize("name", slow_but(*FAST, "many", "look-up"))
def test_other_keys_numbers_prompts_lengths_and_ends_compile_nothing_new(name):
    expected(name)

    def call(length, count, eos, seed):
        options = {} if name in NO_TRANSFORM else steered(1.5, 1.0 + seed, (-1, seed, -1))
        options |= {"max_new_tokens": count, "eos_id": eos, "pad_id": seed, "key": jax.random.key(seed)}
        prompts = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, length))
        return lambda: run(name, prompts=prompts, prompt_mask=None, **options)

    calls = call(3, 3, [0, 1], 0), call(1, 16, [1, 1], 1), call(15, 1, [1, 22], 2), call(16, 9, jnp.asarray([0, 1]), 3)
    assert programs_of(*calls, program=PROGRAMS.get(name, decode)) == 0


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in NO_TRANSFORM])
def test_a_sequence_of_transforms_is_a_chain_and_is_heeded(name):
    one = run(name, **DRAWN)
    for transform in (tuple(DRAWN["transform"]), Chain(DRAWN["transform"])):
        assert_same(run(name, transform=transform), one)
    tokens, mask = tokens_and_mask(run(name, **steered(0.7, 1.5, (2, 0, 2))))
    assert (tokens[..., :3] == [2, 0, 2]).all() and mask.all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.bfloat16) for name in DECODERS if name != "stream"]  # others in float64: by value, in their own files
    + [(name, jnp.float64) for name in ("stochastic beam", "contrastive", "look-up", "best of n")],
)
def test_log_probabilities_are_float32_or_wider_and_a_result_prints_shortly(name, dtype):
    """The result of a decoder for an empty batch."""
    with jax.enable_x64(dtype == jnp.float64):
        params = random_params(TABLE, 1, dtype=dtype)
        found = jax.eval_shape(lambda params: on_table(name, np.zeros((0, 3), int), params=params), params)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)}
    assert len(repr(found)) < 500 and "\n" not in repr(found) and "tokens=int32[0, " in repr(found)
    assert_empty(found)


# What every decoder refuses -------------------------------------------------------------------------------------------

MASK = {"prompt_mask": np.asarray([[True, False], [False, False]])}
MISTAKES = {
    "an empty prompt": (np.zeros((2, 0), int), {}, "prompt 0 is empty"),
    "an empty list": ([[1, 2], []], {}, "prompt 1 is empty"),
    "a fully masked row": ([[1, 2], [1, 2]], MASK, "prompt 1 is empty"),
    "a prompt longer than the context": (np.ones((1, 43), int), {}, "prompt 0 has 43 tokens, and .* context of 42"),
    "no room": (np.ones((1, 40), int), {"max_new_tokens": 3}, "40 tokens, and 3 new ones do not fit"),
    "no room in one row": ([[1] * 40] * 2, {"prompt_mask": np.arange(40) >= np.asarray([[9], [0]])}, "prompt 1 has 40"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, but is 0"),
    "fewer than none": ([[1]], {"max_new_tokens": -3}, "max_new_tokens must be at least 1, but is -3"),
    "half a token": ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens must be an integer.*1.5"),
    "limits of other rows": ([[1]], {"max_new_tokens": np.ones(2, int)}, "one for each of 1 rows"),
    "a negative token": ([[1, -1]], {}, r"\[0, 23\).*from -1 to 1"),
    "a token too large": ([[1, 23]], {}, r"\[0, 23\).*from 1 to 23"),
    "float tokens": ([[1.0]], {}, "prompts must be integers.*float64"),
    "boolean tokens": ([[True]], {}, "prompts must be integers.*bool"),
    "one dimension": ([1, 2], {}, r"prompts must be integers \[batch, time\].*\[2\]"),
    "three dimensions": ([[[1, 2]]], {}, r"prompts must be integers \[batch, time\].*\[1, 1, 2\]"),
    "a mask of another shape": ([[1, 2]], {"prompt_mask": np.ones((1, 3), bool)}, r"bool\[1, 2\].*bool\[1, 3\]"),
    "a mask of numbers": ([[1, 2]], {"prompt_mask": np.ones((1, 2))}, r"bool\[1, 2\].*float64\[1, 2\]"),
    "a mask of lists": ([[1, 2], [1]], {"prompt_mask": np.ones((2, 2), bool)}, "mask of prompts must be None"),
    "ragged floats": ([[1.5], [1, 2]], {}, r"prompts must be token ids.*is \[\[1.5\]"),
    "a text": ("Hello", {}, r"prompts must be token ids.*is 'Hello'.*jaxrl_llm.load\(...\)` returns takes text"),
    "texts": (["Hello", "you"], {}, r"prompts must be token ids.*is \['Hello', 'you'\]"),
    "lists of texts": ([["a"], ["b", "c"]], {}, r"prompts must be token ids"),
    "nothing": (None, {}, "prompts must be token ids.*None"),
    "an end in words": ([[1]], {"eos_id": "."}, "eos_id must be a token id or several, but is '.'"),
    "half an end": ([[1]], {"eos_id": 0.5}, "eos_id must be a token id or several, but is 0.5"),
}
KEY_MISTAKES = {
    "no key": (None, "needs key="),
    "a legacy key": (jax.random.PRNGKey(0), "made by jax.random.key, but is .*uint32"),
    "a seed for a key": (0, "made by jax.random.key, but is 0"),
    "keys for other rows": (jax.random.split(jax.random.key(0), 3), r"each of 1 rows.*\(3,\)"),
}
TRANSFORM_MISTAKES = {
    "a function": (lambda logits: logits, "transform must be a Transform or a sequence of them"),
    "a word": (["top-k"], "transform must be a Transform or a sequence of them, but is 'top-k'"),
    "numbers of other rows": (Temperature(jnp.ones(3)), "t of Temperature must be one number"),
}
DRAWING = ("sampled", "many", "stream", "stochastic beam", "speculative", "best of n")


def refused(name, prompts, message, **options):
    program, lm = PROGRAMS.get(name, decode), TINY["gpt2"]
    before = program._cache_size()
    with pytest.raises(ValueError, match=message):
        options = {"max_new_tokens": 4, "key": jax.random.key(0)} | options
        DECODERS[name](lm, None, prompts, **options)
    assert program._cache_size() == before, "nothing is compiled"


@every_decoder
@pytest.mark.parametrize(("prompts", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_anything_is_compiled(name, prompts, options, message):
    refused(name, prompts, message, **options)


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize(("key", "message"), KEY_MISTAKES.values(), ids=KEY_MISTAKES)
def test_keys_that_are_none_are_named(name, key, message):
    refused(name, [[1]], message, key=key)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in NO_TRANSFORM])
@pytest.mark.parametrize(("transform", "message"), TRANSFORM_MISTAKES.values(), ids=TRANSFORM_MISTAKES)
def test_transforms_that_are_none_are_named(name, transform, message):
    refused(name, [[1], [2]], message, transform=transform)


@pytest.mark.parametrize("search", [exact_search, search_tree])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 0 is empty"),
        ([[3, 1]], r"prompt must be one sequence \[time\], but has the shape \[1, 2\]"),
        ([0.5, 1.5], "integers.*float64"),
        ([3, -1], r"\[0, 23\).*from -1 to 3"),
        ([1] * 41, "41 tokens, and 2 new ones do not fit"),
        ("Hello", "prompt must be token ids.*'Hello'.*takes text"),
        (["Hello"], "prompt must be token ids"),
    ],
)
def test_searches_of_one_prompt_name_what_is_none(search, prompt, message):
    options = {"max_new_tokens": 2} if search is exact_search else {"branching": 2, "depth": 2}
    with pytest.raises(ValueError, match=message):
        search(TINY["gpt2"], random_params(TINY["gpt2"]), prompt, **options)


# Generation and speculation: test_generate, test_speculative.
@pytest.mark.parametrize("name", slow_but("beam", "stochastic beam", "contrastive"))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_distribution_raise_where_they_are_met(name, value):
    prompts = np.zeros((2, 0), int)
    only = PARAMS["logits"].at[0].set(jnp.asarray([-jnp.inf, -jnp.inf, 0]))  # every row begins with token 2
    for row in (0, 1 + 2):
        with pytest.raises(FloatingPointError, match=r"(row 0 .*)?NaN, \+inf, or all −inf( in row 0)?"):
            on_table(name, prompts, params={"logits": only.at[row].set(value)})
    on_table(name, prompts, params={"logits": only.at[1].set(value)})  # after token 0, which never comes


@every_decoder
def test_a_pad_token_outside_the_vocabulary_is_welcome(name):
    for filler in (-100, VOCAB, 10**6):
        prompts = spread("interior")
        prompts["prompts"] = jnp.where(prompts["prompt_mask"], prompts["prompts"], filler)
        found = run(name, **prompts, eos_id=ends_of(name), pad_id=filler)
        tokens, mask = tokens_and_mask(found)
        plain, _ = tokens_and_mask(run(name, eos_id=ends_of(name)))
        np.testing.assert_array_equal(tokens, np.where(mask, plain, filler))


@every_decoder
def test_prompts_may_be_of_any_integers(name):
    prompts = np.asarray(spread(width=12)["prompts"])
    reference = run(name, prompts=prompts, prompt_mask=None)
    for same in (prompts.tolist(), prompts.astype(np.uint8), prompts.astype(np.int64)):
        assert_same(run(name, prompts=same, prompt_mask=None), reference)


def test_one_key_is_a_key_for_each_row_by_its_index():
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(9), row))(jnp.arange(ROWS))
    for name in (*DRAWING, "sampled beam"):
        single = run(name, key=jax.random.key(9))
        assert_same(single, run(name, key=keys))
        other = tokens_and_mask(run(name, key=jax.random.key(10)))[0]
        assert (tokens_and_mask(single)[0] != other).any()
