"""The attention weights of GPT-2, Llama and StableLM, on request."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import GPT2
from tests.conftest import TINY, VOCAB, random_params

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 8))
MASKS = {
    "left": np.arange(8) >= np.asarray([[0], [3], [7]]),
    "right": np.arange(8) < np.asarray([[8], [5], [1]]),
    "between": np.asarray([[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0]], bool),
}


@pytest.fixture(scope="module", params=["gpt2", "llama", "stablelm"])
def neural(request):
    """The decoder-only transformers: the model and its parameters."""
    return TINY[request.param], random_params(TINY[request.param])


@functools.partial(jax.jit, static_argnums=0)
def weights_of(lm, params, tokens, mask=None):
    return lm.attention(params, tokens, mask=mask)


@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none", *MASKS])
def test_rows_sum_to_one_over_the_valid_past_and_are_zero_elsewhere(neural, mask):
    lm, params = neural
    weights = np.asarray(weights_of(lm, params, TOKENS, mask))
    heads = lm.config.n_head if isinstance(lm, GPT2) else lm.config.num_attention_heads
    assert weights.shape == (1, 3, heads, 8, 8) and weights.dtype == np.float32
    valid = np.ones(TOKENS.shape, bool) if mask is None else mask
    may = valid[:, :, None] & valid[:, None] & np.tril(np.ones((8, 8), bool))
    may = np.broadcast_to(may[None, :, None], weights.shape)
    assert (weights[~may] == 0).all() and (weights[may] > 0).all()
    sums = np.broadcast_to(valid[None, :, None], weights.shape[:-1])
    np.testing.assert_allclose(weights.sum(axis=-1), sums, rtol=0, atol=1e-6)


def test_padding_changes_no_weight(neural):
    lm, params = neural
    whole = np.asarray(weights_of(lm, params, TOKENS))[..., :5, :5]  # no token sees what stands behind it
    padded = np.random.default_rng(1).integers(0, VOCAB, (3, 8))
    slots = [1, 2, 4, 5, 7]
    padded[:, slots] = TOKENS[:, :5]
    mask = np.broadcast_to(np.isin(np.arange(8), slots), (3, 8))
    weights = np.asarray(weights_of(lm, params, padded, mask))
    np.testing.assert_allclose(weights[..., slots, :][..., slots], whole, rtol=0, atol=1e-6)


def test_gpt2s_weights_are_those_of_their_definition(gpt2):
    lm, params = gpt2
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["h"][0]
    x = np.asarray(params["wte"]["embedding"])[TOKENS[0]] + np.asarray(params["wpe"]["embedding"])[:8]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * layer["ln_1"]["scale"] + layer["ln_1"]["bias"]
    query, key, _ = np.split(x @ layer["attn"]["c_attn"]["kernel"] + layer["attn"]["c_attn"]["bias"], 3, axis=-1)
    found = weights_of(lm, params, TOKENS)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        scores = query[:, part] @ key[:, part].T / np.sqrt(8)
        scores = np.where(np.tril(np.ones((8, 8))), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        np.testing.assert_allclose(found[0, 0, head], weights / weights.sum(-1, keepdims=True), rtol=0, atol=1e-5)


def test_normal_calls_have_no_output_more():
    """Weights that are not requested leave no trace in the program's results."""
    lm, params = TINY["gpt2"], random_params(TINY["gpt2"])
    cache = lm.init_cache(3, 8)
    hidden, after = jax.eval_shape(lm.hidden, params, jnp.asarray(TOKENS), cache)
    assert hidden.shape == (3, 8, 16)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(after)) == jax.tree.map(jnp.shape, jax.tree.leaves(cache))
