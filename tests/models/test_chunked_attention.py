"""Attention of long rows, a chunk of the queries at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import layers

RNG = np.random.default_rng(0)
BATCH, HEADS, KEYS, TIME, SLOTS, SIZE = 2, 4, 2, 11, 7, 5
QUERY, KEY, VALUE = (
    jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for shape in ((BATCH, HEADS, TIME, SIZE), *[(BATCH, KEYS, SLOTS, SIZE)] * 2)
)
EACH = jnp.asarray(RNG.random((BATCH, TIME, SLOTS)) < 0.6)
BIAS = jnp.asarray(RNG.normal(size=(1, HEADS, TIME, SLOTS)), jnp.float32)
CASES = {
    "a mask of each query": {"mask": EACH, "cap": 2.0},
    "a mask of keys and a bias": {"mask": EACH[:1, :1], "bias": BIAS},
}


@pytest.mark.parametrize("name", CASES)
def test_chunks_of_queries_give_the_same_values_and_gradients(name, monkeypatch):
    """3 of 11 queries at a time."""
    weight = jnp.arange(BATCH * TIME * HEADS * SIZE, dtype=jnp.float32).reshape(BATCH, TIME, -1) / 100

    def total(query, key, value):
        return (weight * layers.attention(query, (key, value), scale=0.4, **CASES[name])).sum()

    def program():
        return str(jax.make_jaxpr(lambda *given: total(*given))(QUERY, KEY, VALUE))

    def found():
        return jax.jit(jax.value_and_grad(lambda *given: total(*given), argnums=(0, 1, 2)))(QUERY, KEY, VALUE)

    whole = found()
    assert "scan" not in program()
    monkeypatch.setattr(layers, "CHUNK_SCORES", 3 * BATCH * HEADS * SLOTS)
    assert "scan" in program()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found(), whole)


def test_gradients_of_keys_and_values_are_summed_over_chunks_in_float32(monkeypatch):
    """512 queries, one a chunk, look at one key: in bfloat16 the sum of its value's gradients would stop at 256."""
    monkeypatch.setattr(layers, "CHUNK_SCORES", 1)
    query, one = jnp.ones((1, 1, 512, 4)), jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    of = functools.partial(layers.attention, query, mask=jnp.ones((1, 1, 1), bool), scale=1.0)
    found = jax.jit(jax.grad(lambda value: of((one, value)).sum()))(one)
    np.testing.assert_array_equal(found, np.full((1, 1, 1, 4), 512))


def test_memory_grows_linearly_with_the_length(monkeypatch):
    """That of a gradient: all scores at once are 16 times as many for 4 times the length."""
    monkeypatch.setattr(layers, "CHUNK_SCORES", 2**14)

    def held(length):
        heads = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        mask = jnp.ones((1, 1, length), bool)
        of = jax.grad(lambda *given: layers.attention(given[0], given[1:], mask, scale=0.25).sum(), argnums=(0, 1, 2))
        return jax.jit(of).lower(heads, heads, heads).compile().memory_analysis().temp_size_in_bytes

    assert held(2048) < 5 * held(512)
