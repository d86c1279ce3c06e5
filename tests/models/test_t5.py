"""T5 as a function: its buckets, its sizes, what may and may not change its logits, and its attention weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxrl_llm.decoding import generate
from jaxrl_llm.models.t5 import T5, T5LM, T5Config, relative_buckets
from jaxrl_llm.objectives.logprobs import token_log_probs
from tests.conftest import TINY_T5, VOCAB, random_params

pytestmark = pytest.mark.slow

VARIANTS = {  # T5 1.1 has the parts of both; its goldens try it
    "umT5": T5(dataclasses.replace(TINY_T5.config, model_type="umt5")),
    "plain and tied": T5(
        dataclasses.replace(
            TINY_T5.config, feed_forward_proj="relu", tie_word_embeddings=True, num_decoder_layers=1, num_layers=3
        )
    ),
}
RNG = np.random.default_rng(3)
SOURCE, TARGET = RNG.integers(0, VOCAB, (3, 12)), RNG.integers(0, VOCAB, (3, 16))  # the last bucket begins at 12
OTHER_TARGET = RNG.integers(0, VOCAB, (3, 16))
LENGTHS, TARGET_LENGTHS = (9, 4, 4), (13, 6, 6)
PADDING = {
    "right": lambda length, width: np.arange(width) < length,
    "left": lambda length, width: np.arange(width) >= width - length,
    "between": lambda length, width: np.isin(np.arange(width), np.linspace(0, width - 1, length).round()),
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    t5 = VARIANTS[request.param]
    times = 0.8 if request.param == "umT5" else 1.0  # its attention is sharp, and would round more
    return t5, jax.tree.map(lambda leaf: times * leaf, random_params(t5))


@functools.partial(jax.jit, static_argnums=0)
def outputs(t5, params, source, target, source_mask=None, target_mask=None):
    """Logits and attention weights."""
    lm, started = t5.start(params, source, source_mask)
    maps = t5.attention(params, source, target, source_mask=source_mask, target_mask=target_mask)
    return lm.apply(started, target, mask=target_mask)[0], maps


def logits_of(*arguments):
    return np.asarray(outputs(*arguments)[0])


@functools.partial(jax.jit, static_argnums=0)
def logits_alone(t5, params, source, target):
    """A smaller program."""
    lm, started = t5.start(params, source)
    return lm.apply(started, target)[0]


def spread(rows, lengths, side):
    """The first so many tokens of each row, among padding, and the mask."""
    tokens = np.random.default_rng(5).integers(0, VOCAB, rows.shape)
    mask = np.stack([PADDING[side](length, rows.shape[1]) for length in lengths])
    assert (mask.sum(axis=1) == lengths).all()
    for row, valid, own, length in zip(tokens, mask, rows, lengths, strict=True):
        row[valid] = own[:length]
    return tokens, mask


# Relative positions ---------------------------------------------------------------------------------------------------


def bucket(relative, *, num_buckets, max_distance, bidirectional):
    """Of one relative position, in whole numbers: bucket E + j begins where (n / E)^(B − E) ≥ (max_distance / E)^j."""
    ahead = 0
    if bidirectional:
        num_buckets //= 2
        ahead = num_buckets if relative > 0 else 0
    distance = abs(relative) if bidirectional else max(-relative, 0)
    exact = num_buckets // 2
    if distance < exact:
        return ahead + distance
    wide, power = 0, num_buckets - exact
    while distance**power * exact ** (wide + 1) >= exact**power * max_distance ** (wide + 1):
        wide += 1
    return ahead + min(exact + wide, num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@given(num_buckets=st.integers(4, 40), further=st.integers(1, 150))
@example(num_buckets=32, further=112)  # the published models'
def test_buckets_are_those_of_the_definition(bidirectional, num_buckets, further):
    sizes = {"num_buckets": num_buckets, "max_distance": num_buckets // 2 + further, "bidirectional": bidirectional}
    positions = range(-sizes["max_distance"], sizes["max_distance"] + 1)
    assert relative_buckets(**sizes).tolist() == [bucket(each, **sizes) for each in positions]


def test_far_positions_are_told_apart_up_to_the_maximum_distance_only(model):
    """A token moved further away changes nothing, once it is further than the maximum distance."""
    t5, params = model
    keys = jnp.asarray([[0, 4, 11, 12, 13, 40, 10**6]])
    biases = jax.jit(lambda params: t5.merge(params).encoder.biases(jnp.asarray([[0]]), keys))(params)
    assert len(biases) == t5.config.num_layers
    for layer, bias in enumerate(np.asarray(biases)[:, 0, :, 0]):
        block = params["encoder"]["block"][layer if t5.config.model_type == "umt5" else 0]["layer"][0]
        table = block["SelfAttention"]["relative_attention_bias"]["embedding"]
        np.testing.assert_array_equal(bias[:, 0], table[0])
        assert (bias[:, 3:] == bias[:, 3:4]).all() and (bias[:, 0] != bias[:, 1]).all()
    assert jax.eval_shape(t5.encode, params, SOURCE).shape == (3, 12, 16)


# Sizes and initial parameters -----------------------------------------------------------------------------------------

V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SMALL = V11 | {"d_ff": 1024, "num_layers": 8, "num_heads": 6}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 60_506_624),  # t5-small, t5-base, flan-t5-small, mt5-small and umt5-small, as published
        ({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, 222_903_552),
        (SMALL, 76_961_152),
        (SMALL | {"model_type": "mt5", "vocab_size": 250112}, 300_176_768),
        (SMALL | {"model_type": "umt5", "vocab_size": 256384}, 306_601_984),
    ],
)
def test_the_number_of_parameters_is_the_published_one(fields, count):
    assert T5(T5Config(**fields)).num_params() == count


def test_it_starts_as_published():
    config = T5Config(vocab_size=600, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=5, **V11)
    leaves = jax.tree_util.tree_leaves_with_path(T5(config).init(jax.random.key(0)))
    expected = {"q": (64 * 16) ** -0.5, "o": 80**-0.5, "wo": 96**-0.5, "shared": 1.0, "lm_head": 1.0}
    for path, leaf in leaves:
        module, kind = path[-2].key, path[-1].key
        if kind == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:
            std = expected.get(module, 64**-0.5)
            assert np.std(leaf) == pytest.approx(std, rel=5 / math.sqrt(2 * leaf.size)), path
    assert len(leaves) == 2 + 2 * 9 + 1 + 2 * 14 + 1 + 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_heads": 0}, "num_heads must be a positive integer, but is 0"),
        ({"model_type": "t0"}, "model_type must be one of t5, mt5, umt5, but is 't0'"),
        (
            {"model_type": "mt5", "scale_decoder_outputs": True},
            "scale_decoder_outputs must be false in mt5, but is true",
        ),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id must be a token id, 0 or above, but is -1"),
        ({"decoder_start_token_id": 32128}, "decoder_start_token_id must lie in the vocabulary of 32128, but is 32128"),
        ({"feed_forward_proj": "gated"}, 'feed_forward_proj must be one of gelu_new, .* or "gated-" and one of them'),
        ({"feed_forward_proj": "gated-tanh"}, "but is 'gated-tanh'"),
        ({"relative_attention_num_buckets": 3}, "must be at least 4, but is 3"),
        ({"relative_attention_max_distance": 16}, "they are 16 and 32"),
        ({"scale_decoder_outputs": 1}, "scale_decoder_outputs must be true or false, but is 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_an_error(fields, said):
    with pytest.raises(ValueError, match=said):
        T5Config(**fields)


# What may and may not change ------------------------------------------------------------------------------------------


def test_every_token_of_the_source_and_the_past_is_heard_and_none_of_the_future(model):
    logits = logits_of(*model, SOURCE, TARGET)
    assert logits.std(axis=-1).mean() > 0.25
    for time in range(SOURCE.shape[1]):
        changed = SOURCE.copy()
        changed[:, time] = (changed[:, time] + 1) % VOCAB
        assert (np.abs(logits_of(*model, changed, TARGET) - logits).max(axis=-1) > 1e-4).all()
    for time in range(TARGET.shape[1]):
        changed = TARGET.copy()
        changed[:, time] = (changed[:, time] + 1) % VOCAB
        other = logits_of(*model, SOURCE, changed)
        np.testing.assert_array_equal(other[:, :time], logits[:, :time])
        assert (np.abs(other - logits)[:, time:].max(axis=-1) > 1e-6).all()


def test_padding_its_tokens_and_the_batch_change_nothing_and_weights_sum_to_one_over_what_they_may_see(model):
    t5 = model[0]
    layers = t5.config.num_layers, t5.config.decoder_layers, t5.config.decoder_layers
    rows = [(SOURCE[:1, :9], TARGET[:1, :13]), (SOURCE[1:, :4], TARGET[1:, :6])]
    alone = [logits for source, target in rows for logits in logits_alone(*model, source, target)]
    for source_side in PADDING:
        for target_side in PADDING:
            source, source_mask = spread(SOURCE, LENGTHS, source_side)
            target, target_mask = spread(TARGET, TARGET_LENGTHS, target_side)
            logits, maps = outputs(*model, source, target, source_mask, target_mask)
            for row, valid, expected in zip(np.asarray(logits), target_mask, alone, strict=True):
                np.testing.assert_allclose(row[valid], expected, rtol=0, atol=2e-5)
            filled = np.where(source_mask, source, -100), np.where(target_mask, target, 10**6)
            again = logits_of(*model, *filled, source_mask, target_mask)
            np.testing.assert_array_equal(again[target_mask], np.asarray(logits)[target_mask])
            allowed = (
                source_mask[:, :, None] & source_mask[:, None],
                target_mask[:, :, None] & target_mask[:, None] & np.tri(16, dtype=bool),
                target_mask[:, :, None] & source_mask[:, None],
            )
            queries = source_mask, target_mask, target_mask
            for weights, count, may, valid in zip(map(np.asarray, maps), layers, allowed, queries, strict=True):
                assert weights.shape == (count, 3, 2, *may.shape[1:])
                may = np.broadcast_to(may[None, :, None], weights.shape)
                assert (weights[~may] == 0).all() and (weights[may] > 0).all()
                sums = np.broadcast_to(valid[None, :, None], weights.shape[:-1])
                np.testing.assert_allclose(weights.sum(axis=-1), sums, rtol=0, atol=1e-6)


def test_a_mask_without_padding_is_no_mask_and_rows_are_the_sources_each_repeated(model):
    target, ones = np.stack([TARGET, OTHER_TARGET], axis=1).reshape(6, 16), np.ones(SOURCE.shape, bool)
    logits, maps = outputs(*model, SOURCE, target, ones, np.ones(target.shape, bool))
    for index, single in enumerate((TARGET, OTHER_TARGET)):
        expected, single_maps = outputs(*model, SOURCE, single, ones, np.ones(single.shape, bool))
        np.testing.assert_allclose(logits[index::2], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(maps.encoder, single_maps.encoder, rtol=0, atol=1e-6)
        np.testing.assert_allclose(maps.cross[:, index::2], single_maps.cross, rtol=0, atol=1e-6)
        np.testing.assert_allclose(maps.decoder[:, index::2], single_maps.decoder, rtol=0, atol=1e-6)
        unmasked, unmasked_maps = outputs(*model, SOURCE, single)
        np.testing.assert_allclose(unmasked, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(unmasked_maps.encoder.sum(axis=-1), 1, rtol=0, atol=1e-6)


def test_a_cache_of_several_sources_gives_what_no_cache_gives(model):
    """In pieces, with padding in both; with rows taken in another order, each goes on reading its own source."""
    source, source_mask = spread(SOURCE, LENGTHS, "left")
    lm, started = model[0].start(model[1], source, source_mask)
    target, mask = spread(np.repeat(TARGET, 2, axis=0), np.repeat(TARGET_LENGTHS, 2), "between")
    expected = logits_of(*model, source, target, source_mask, mask)
    cache, rows = lm.init_cache(6, 16), np.arange(6)
    read, take = jax.jit(lm.apply), jax.jit(lambda cache, order: cache.take(order))
    orders = {1: [4, 0, 5, 1, 1, 3], 2: [0, 2, 3, 1, 5, 5], 9: [3, 3, 1, 0, 2, 4], 16: range(6)}
    for begin, (end, order) in zip((0, *orders), orders.items(), strict=False):
        logits, cache = read(started, target[rows, begin:end], cache, mask=mask[rows, begin:end])
        valid = mask[rows, begin:end]
        np.testing.assert_allclose(logits[valid], expected[rows, begin:end][valid], rtol=0, atol=1e-5)
        cache, rows = take(cache, jnp.asarray(order)), rows[np.asarray(order)]


# Numbers --------------------------------------------------------------------------------------------------------------


def test_the_gradient_reaches_every_parameter_and_is_the_derivative():
    t5 = VARIANTS["umT5"]  # smooth
    source, source_mask = spread(SOURCE, LENGTHS, "right")
    with jax.enable_x64(True):
        params = random_params(t5, dtype=jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            lm, started = t5.start(params, source, source_mask)
            return -token_log_probs(lm.apply(started, TARGET[:, :-1])[0], TARGET[:, 1:]).mean()

        gradient = loss(params)[1]
        for leaf in jax.tree.leaves(gradient):
            assert np.abs(leaf).max() > 0
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
        moved = [jax.tree.map(lambda a, d, s=step: np.asarray(a) + s * d, params, direction) for step in (1e-6, -1e-6)]
        slope = (loss(moved[0])[0] - loss(moved[1])[0]) / 2e-6
        exact = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), gradient, direction)))
        np.testing.assert_allclose(slope, exact, rtol=1e-6)


def test_bfloat16_weights_give_float32_logits_nearby(model):
    t5, params = model
    exact = logits_of(t5, params, SOURCE, TARGET)
    half = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), params)
    logits = np.asarray(logits_alone(t5, half, SOURCE, TARGET))
    assert logits.dtype == np.float32
    error = (logits - exact) / exact.std()
    assert 1e-3 < np.sqrt(np.square(error).mean()) < 0.05
    lm, started = t5.start(half, SOURCE)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((started.weights, started.cross))} == {"bfloat16"}
    if t5.config.decoder_layers == 1:
        generation = generate(lm, started, t5.decoder_prompts(3), max_new_tokens=4, greedy=True)
        assert generation.logp.dtype == jnp.float32 and np.isfinite(generation.logp).all()


def test_the_scale_of_the_outputs_is_its_own_setting():
    """Tied or not, and in `hidden`: so fused log-probabilities need nothing but the unembedding."""
    tied = VARIANTS["plain and tied"]
    unscaled = T5(dataclasses.replace(tied.config, scale_decoder_outputs=False))
    kin = T5(dataclasses.replace(tied.config, model_type="mt5"))
    params = random_params(tied)
    expected = logits_of(tied, params, SOURCE, TARGET)
    lm, started = tied.start(params, SOURCE)
    for t5, times in ((tied, 1), (unscaled, 4), (kin, 4)):  # √16
        hidden, _ = jax.jit(T5LM(t5.config, 3).hidden)(started, TARGET)
        assert t5.config.output_scale == times / 4
        np.testing.assert_allclose(hidden @ params["shared"]["embedding"].T, times * expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(lm.logits(started, hidden), T5LM(t5.config, 3).logits(started, hidden))


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "mask", "said"),
    [
        (SOURCE[0], None, r"source must be integers \[batch, time\], but is int64\[12\]"),
        (SOURCE.astype(float), None, r"source must be integers \[batch, time\], but is float64\[3, 12\]"),
        (SOURCE + VOCAB, None, r"source must lie in \[0, 23\)"),
        (SOURCE, np.ones((3, 8), bool), r"the mask of source must be bool\[3, 12\], but is bool\[3, 8\]"),
        (SOURCE, np.arange(3)[:, None] + np.zeros(12) > 0, "a source must have at least one token"),
        (SOURCE[:, :0], None, "a source must have at least one token"),
    ],
)
def test_a_source_that_does_not_fit_is_an_error(source, mask, said):
    for method in (TINY_T5.start, TINY_T5.encode):
        with pytest.raises(ValueError, match=said):
            method(random_params(TINY_T5), source, mask)


def test_rows_that_are_no_multiple_of_the_sources_are_an_error(model):
    lm, started = model[0].start(model[1], SOURCE)
    for use in (
        lambda: lm.apply(started, jnp.zeros((4, 2), jnp.int32)),
        lambda: lm.init_cache(4, 8),
        lambda: generate(lm, started, TINY_T5.decoder_prompts(4), max_new_tokens=2, greedy=True),
    ):
        with pytest.raises(ValueError, match="the number of rows must be a multiple of the 3 sources, but is 4"):
            use()


def test_without_a_source_it_is_not_a_language_model():
    assert not any(hasattr(TINY_T5, name) for name in ("max_length", "init_cache", "hidden", "logits", "apply"))
    with pytest.raises(TypeError, match=r"T5\.start\(params, source\) gives them"):
        T5LM(TINY_T5.config, 1).init(jax.random.key(0))


def test_models_are_equal_and_hash_by_their_configuration_and_number_of_sources():
    one, same, other = (T5LM(dataclasses.replace(TINY_T5.config), sources) for sources in (2, 2, 3))
    assert one == same and hash(one) == hash(same) and one != other
    assert T5() == T5(T5Config()) and hash(T5()) == hash(T5(T5Config()))
    np.testing.assert_array_equal(T5(T5Config(decoder_start_token_id=7)).decoder_prompts(2), [[7], [7]])
