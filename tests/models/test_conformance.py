"""The protocol of `LanguageModel`, for every model of a registry: a new model is one row of `MODELS`.

With its cache, in pieces and with padding anywhere, a model is the model without; compiled it is the model itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import GPT2, Config, Decoder, Llama, StableLM
from tests.conftest import CONTEXT, TINY, VOCAB, random_params

SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT},
}
OPT = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "max_position_embeddings": CONTEXT},
}
MODELS = {  # what a layer writes into its memory depends on what the layer below read from its own
    "gpt2": GPT2(dataclasses.replace(TINY["gpt2"].config, n_layer=2)),
    "llama": Llama(TINY["llama"].config.replace(num_hidden_layers=2)),
    "stablelm in parallel": StableLM(
        TINY["stablelm"].config.replace(use_parallel_residual=True, tie_word_embeddings=True)
    ),
    # Between them all parts of a `Description`:
    "windows": Decoder(Config("gemma2", **SIZES, sliding_window=3, attn_logit_softcapping=5.0)),
    "experts": Decoder(
        Config(
            "qwen3_moe", **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1]
        )
    ),
    "alibi": Decoder(
        Config("bloom", vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4),
    ),
    "learned positions": Decoder(Config("opt", **OPT)),
    "t5": TINY["t5"],
    "tabular": TINY["tabular"],
}

FIRST = ("gpt2", "windows", "t5", "tabular")
QUICK = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in MODELS]
LENGTH, SLOTS = 6, 9  # tokens of a row, and slots that hold them among padding
BEFORE = CONTEXT  # slots of padding before them, as many as the context has places
PADDING = {
    "left": [[3, 4, 5, 6, 7, 8]] * 3,
    "right": [[0, 1, 2, 3, 4, 5]] * 3,
    "interior": [[0, 1, 4, 5, 7, 8], [0, 2, 3, 4, 5, 8], [0, 1, 2, 6, 7, 8]],
    "each row its own": [[3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5], [1, 3, 4, 5, 6, 7]],
}
CHUNKS = {"at once": [9], "one by one": [1] * 9, "several at a time": [4, 1, 4]}
apply = jax.jit(lambda lm, params, tokens, cache, mask: lm.apply(params, tokens, cache, mask=mask), static_argnums=0)


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    """Each of the families: the model and its parameters."""
    return MODELS[request.param], random_params(MODELS[request.param])


@functools.cache
def dense(lm):
    """Three rows without padding, and their logits without a cache."""
    tokens = np.random.default_rng(7).integers(0, lm.vocab_size, (3, LENGTH))
    return tokens, np.asarray(apply(lm, random_params(lm), jnp.asarray(tokens), None, None)[0])


def padded(lm, slots, *, filler=None):
    """The same rows with their tokens at these slots, the mask, and how to read the rows' logits back."""
    tokens, _ = dense(lm)
    rows, slots = np.arange(3)[:, None], np.asarray(slots)
    spread = np.random.default_rng(8).integers(0, lm.vocab_size, (3, SLOTS))
    spread = spread if filler is None else np.full_like(spread, filler)
    spread[rows, slots] = tokens
    mask = np.zeros((3, SLOTS), bool)
    mask[rows, slots] = True
    return jnp.asarray(spread), jnp.asarray(mask), (rows, slots)


def in_chunks(lm, params, tokens, mask, sizes):
    """Logits of all tokens, appended to a cache piece by piece, and the cache."""
    dtype = jax.tree.leaves(params)[0].dtype
    cache, pieces, start = lm.init_cache(len(tokens), SLOTS, dtype=dtype), [], 0
    for size in sizes:
        logits, cache = apply(lm, params, tokens[:, start : start + size], cache, mask[:, start : start + size])
        pieces.append(logits)
        start += size
    return np.concatenate(pieces, axis=1), cache


def test_the_models_are_far_from_uniform_and_hear_every_token(any_model):
    lm, params = any_model
    tokens, logits = dense(lm)
    assert logits.std(axis=-1).mean() > 0.5
    for time in range(LENGTH):
        changed = tokens.copy()
        changed[:, time] = (changed[:, time] + 1) % lm.vocab_size
        other, _ = apply(lm, params, jnp.asarray(changed), None, None)
        np.testing.assert_array_equal(other[:, :time], logits[:, :time])
        assert (np.abs(other[:, time:] - logits[:, time:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("filler", [None, 0, -100, 10**6], ids=lambda filler: f"filled with {filler}")
@pytest.mark.parametrize("slots", PADDING.values(), ids=PADDING)
def test_padding_changes_nothing_without_a_cache_and_does_not_count_in_the_context(any_model, slots, filler):
    lm, params = any_model
    tokens, mask, where = padded(lm, slots, filler=filler)
    tokens, mask = (jnp.concatenate([jnp.zeros((3, BEFORE), each.dtype), each], axis=1) for each in (tokens, mask))
    logits, _ = apply(lm, params, tokens, None, mask)
    np.testing.assert_allclose(np.asarray(logits)[:, BEFORE:][where], dense(lm)[1], atol=1e-5)


def test_each_segment_of_a_row_is_read_as_if_it_stood_alone(any_model):
    """Segments of 6, 3 and 4 tokens, among padding that belongs to one of them or to none; their numbers may skip."""
    lm, params = any_model
    tokens, expected = dense(lm)
    texts = [tokens[0], tokens[1, :3], tokens[2, :4]]
    row = [0, *texts[0], 0, *texts[1], 0, *texts[2], 0, 0]
    mask = [False, *[True] * 6, False, *[True] * 3, False, *[True] * 4, False, False]
    segments = [2] * 8 + [3] * 3 + [7] * 5 + [9] * 2
    both = jnp.asarray([row, row[:8] * 2 + row[:2]]), jnp.asarray([mask, mask[:8] * 2 + mask[:2]])
    numbers = jnp.asarray([segments, [0] * 8 + [1] * 8 + [2] * 2])
    hidden, cache = jax.jit(lambda *given: lm.hidden(params, given[0], mask=given[1], segments=given[2]))(
        *both, numbers
    )
    assert cache is None
    logits = np.asarray(lm.logits(params, hidden))
    wanted = np.concatenate([expected[0], expected[1, :3], expected[2, :4]])
    np.testing.assert_allclose(logits[0][np.asarray(mask)], wanted, atol=1e-5)
    np.testing.assert_allclose(logits[1, [*range(1, 7), *range(9, 15)]], np.tile(expected[0], (2, 1)), atol=1e-5)
    if lm.min_prompt_length == 0:  # the state of no tokens, where padding begins a segment
        np.testing.assert_allclose(logits[0, 11], logits[0, 0], atol=1e-6)
        assert np.abs(logits[0, 10] - logits[0, 0]).max() > 0.1


def test_longrope_has_the_frequencies_of_each_segments_own_length():
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8, "factor": 2.0}
    factors = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}
    lm = Decoder(Config("llama", **SIZES | {"num_hidden_layers": 1}, rope_parameters=rope | factors))
    params, tokens = random_params(lm), jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (1, 18)))
    segments = jnp.asarray([[0] * 12 + [1] * 6])

    @jax.jit
    def logits(tokens):
        return lm.apply(params, tokens, segments=segments)[0][0], [
            lm.apply(params, part)[0][0] for part in (tokens[:, :12], tokens[:, 12:], tokens[:, :6])
        ]

    found, (long, short, cut) = logits(tokens)
    np.testing.assert_allclose(found, jnp.concatenate([long, short]), atol=1e-5)
    assert np.abs(long[:6] - cut).max() > 1e-3  # other frequencies


@pytest.mark.parametrize("name", ["gpt2", "tabular"])
def test_segments_that_are_not_ones_are_refused(name):
    lm, params = MODELS[name], random_params(MODELS[name])
    tokens = jnp.zeros((2, lm.max_length + 2), jnp.int32)
    halves = jnp.arange(lm.max_length + 2) // 5 * jnp.ones_like(tokens)
    lm.apply(params, tokens, segments=halves)  # each fits the context
    late = halves.at[1, 1:].set(7)
    for segments, words in [
        (halves[:, ::-1], "the segments of tokens must never fall along a row, but do in row 0"),
        (late, f"segment 7 in row 1 of tokens has {lm.max_length + 1} tokens, which do not fit"),
        (halves[:1], r"the segments of tokens must be integers \[2, \d+\], but are int32\[1, \d+\]"),
        (halves > 0, r"the segments of tokens must be integers \[2, \d+\], but are bool"),
    ]:
        with pytest.raises(ValueError, match=words):
            lm.apply(params, tokens, segments=segments)
    with pytest.raises(ValueError, match="segments must be None with a cache"):
        lm.apply(params, tokens[:, :2], lm.init_cache(2, 2), segments=halves[:, :2])


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("slots", PADDING.values(), ids=PADDING)
def test_cached_is_uncached_whatever_the_padding_and_the_chunks(any_model, slots, sizes):
    lm, params = any_model
    tokens, mask, where = padded(lm, slots)
    logits, cache = in_chunks(lm, params, tokens, mask, sizes)
    np.testing.assert_allclose(logits[where], dense(lm)[1], atol=1e-5)
    assert int(cache.length) == SLOTS
    np.testing.assert_array_equal(cache.valid, mask)


@pytest.mark.parametrize("name", QUICK)
def test_cached_is_uncached_to_float64(name):
    lm = MODELS[name]
    with jax.enable_x64(True):
        params = random_params(lm, dtype=jnp.float64)
        tokens, mask, where = padded(lm, PADDING["interior"])
        exact, _ = apply(lm, params, jnp.asarray(dense(lm)[0]), None, None)
        logits, _ = in_chunks(lm, params, tokens, mask, [3, 3, 3])
        assert logits.dtype == np.float64
        np.testing.assert_allclose(logits[where], exact, atol=1e-12)


def test_take_gathers_rows_in_any_order_and_more_than_once(any_model):
    lm, params = any_model
    tokens, mask, _ = padded(lm, PADDING["each row its own"])
    full, _ = in_chunks(lm, params, tokens, mask, [4, 1, 4])
    _, cache = in_chunks(lm, params, tokens, mask, [4, 1])
    four = cache.take(jnp.asarray([2, 0, 0, 1]))
    for order, rows in (([0, 1, 2], [2, 0, 0]), ([3, 2, 1], [1, 0, 0])):
        order, rows = jnp.asarray(order), np.asarray(rows)
        logits, taken = apply(lm, params, tokens[rows, 5:], four.take(order), mask[rows, 5:])
        valid = np.asarray(mask[rows, 5:])
        np.testing.assert_allclose(np.asarray(logits)[valid], full[rows, 5:][valid], atol=1e-5)
        np.testing.assert_array_equal(taken.valid, mask[rows])


def test_a_step_of_another_row_only_is_no_step_of_this_one(any_model):
    lm, params = any_model
    tokens, logits = dense(lm)
    cache = lm.init_cache(3, SLOTS)
    _, cache = apply(lm, params, jnp.asarray(tokens[:, :4]), cache, jnp.ones((3, 4), bool))
    waiting = jnp.asarray([[True], [False], [True]])
    _, cache = apply(lm, params, jnp.asarray(tokens[:, 4:5]), cache, waiting)
    after, _ = apply(lm, params, jnp.asarray(tokens[[0, 1, 2], [5, 4, 5]][:, None]), cache, jnp.ones((3, 1), bool))
    np.testing.assert_allclose(np.asarray(after)[:, 0], logits[[0, 1, 2], [5, 4, 5]], atol=1e-5)


@pytest.mark.parametrize("written", [0, 3])
def test_appending_beyond_the_cache_raises(any_model, written):
    lm, params = any_model
    cache = lm.init_cache(2, 4)
    cache = cache.append(jnp.ones((2, written), bool))
    with pytest.raises(ValueError, match=f"4 slots, {written} are written and {5 - written} more do not fit"):
        lm.apply(params, jnp.zeros((2, 5 - written), jnp.int32), cache)


def test_more_tokens_than_slots_raise_under_jit_too(any_model):
    lm, params = any_model
    with pytest.raises(ValueError, match="4 slots, some are written and 5 more do not fit"):
        apply(lm, params, jnp.zeros((2, 5), jnp.int32), lm.init_cache(2, 4), None)


def test_a_row_of_padding_alone_gives_finite_logits_and_gradients():
    lm, params = MODELS["gpt2"], random_params(MODELS["gpt2"])
    mask = jnp.asarray([[False] * SLOTS, [True] * 6 + [False] * 3, [True] * SLOTS])
    tokens = padded(lm, PADDING["left"])[0]

    @jax.jit
    def value_and_gradient(params):
        return jax.value_and_grad(lambda params: jax.nn.logsumexp(lm.apply(params, tokens, mask=mask)[0]))(params)

    for leaf in jax.tree.leaves(value_and_gradient(params)):
        assert np.isfinite(leaf).all()


def test_a_vmap_over_parameters_is_each_of_them():
    lm, params = MODELS["llama"], random_params(MODELS["llama"])
    tokens, logits = dense(lm)
    other = jax.tree.map(lambda leaf: 0.7 * leaf, params)
    both = jax.tree.map(lambda one, two: jnp.stack([one, two]), params, other)
    results = jax.jit(jax.vmap(lambda params: lm.apply(params, jnp.asarray(tokens))[0]))(both)
    np.testing.assert_allclose(results[0], logits, atol=1e-5)
    np.testing.assert_allclose(results[1], apply(lm, other, jnp.asarray(tokens), None, None)[0], atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_eager_is_jit_apply_the_logits_of_hidden_and_one_state_can_be_unembedded(name):
    lm, params = MODELS[name], random_params(MODELS[name])
    tokens, expected = dense(lm)
    hidden, cache = lm.hidden(params, jnp.asarray(tokens))
    assert cache is None and hidden.shape[:2] == tokens.shape
    for logits in (lm.logits(params, hidden), lm.apply(params, jnp.asarray(tokens))[0]):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(lm.logits(params, hidden[1, 4]), expected[1, 4], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm in parallel"])
@pytest.mark.parametrize("padding", [0, 2])
def test_more_tokens_than_the_context_are_refused_among_padding_too(name, padding):
    lm, params = MODELS[name], random_params(MODELS[name])
    mask = jnp.arange(43 + padding)[None] >= padding
    with pytest.raises(ValueError, match="43 tokens, which do not fit the model's context of 42"):
        lm.apply(params, jnp.zeros(mask.shape, jnp.int32), mask=mask if padding else None)
