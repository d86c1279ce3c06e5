"""The layers that the models share, where the models' own tests do not see them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from tests.conftest import random_params

WIDTH, VOCAB = 64, 512
LM = GPT2(GPT2Config(vocab_size=VOCAB, n_positions=8, n_embd=WIDTH, n_layer=1, n_head=1))
PARAMS = random_params(LM, dtype=jnp.bfloat16)
HIDDEN = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, WIDTH)), jnp.bfloat16)
LAYERS = {"Linear": lambda module: module.h[0].mlp.c_fc, "Embedding": lambda module: module.wte.attend}


@functools.partial(jax.jit, static_argnums=0)
def apply(name, params, x):
    return LAYERS[name](LM.merge(params))(x)


@pytest.mark.parametrize("name", LAYERS)
def test_one_bfloat16_row_is_the_same_as_among_others(name):
    rows = apply(name, PARAMS, HIDDEN)
    for place in range(3):
        np.testing.assert_array_equal(apply(name, PARAMS, HIDDEN[:, place : place + 1]), rows[:, place : place + 1])
    each = jax.vmap(lambda x: apply(name, PARAMS, x))(HIDDEN[0, :, None])
    np.testing.assert_array_equal(each, rows[0, :, None])


@pytest.mark.parametrize("name", LAYERS)
def test_one_bfloat16_row_needs_no_float32_copy_of_the_matrix(name):
    program = apply.lower(name, PARAMS, HIDDEN[:, :1]).compile()
    assert program.memory_analysis().temp_size_in_bytes < WIDTH * 4 * WIDTH
