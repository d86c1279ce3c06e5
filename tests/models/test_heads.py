"""A scalar head: read at the last real token, saved as transformers has it; and blocks that are computed anew."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.models import ScalarHead
from tests.conftest import TINY, random_params

ROWS = [[3, 1, 4, 1], [5], [9, 2, 6]]


def padded(side):
    tokens, mask = np.zeros((3, 6), np.int32), np.zeros((3, 6), bool)
    for place, row in enumerate(ROWS):
        at = slice(6 - len(row), 6) if side == "left" else slice(len(row))
        tokens[place, at], mask[place, at] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm", "tabular"])
def test_the_score_is_the_number_at_the_last_real_token_on_either_side(name):
    lm = TINY[name]
    head = ScalarHead(lm)
    params = head.init(jax.random.key(0), random_params(lm))
    scores = jax.jit(head.scores)
    tokens, mask = padded("right")  # of which a causal model sees nothing before it has read the row
    hidden = jax.jit(lm.hidden)(params["model"], tokens % lm.vocab_size)[0]
    expected = np.asarray(hidden)[np.arange(3), np.asarray(mask).sum(axis=1) - 1] @ np.asarray(params["head"])
    for side in ("left", "right"):
        tokens, mask = padded(side)
        np.testing.assert_allclose(scores(params, tokens % lm.vocab_size, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_head_starts_small_or_at_zero_on_the_parameters_it_is_given(gpt2):
    lm, params = gpt2
    begun = ScalarHead(lm).init(jax.random.key(0), params)
    assert begun["model"] is params and begun["head"].shape == (16,) and float(begun["head"].std()) < 0.6
    assert not ScalarHead(lm).init(jax.random.key(0), params, zero=True)["head"].any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
def test_a_reward_model_comes_back_and_its_folder_holds_the_model_below(name, tmp_path):
    lm = TINY[name]
    head = ScalarHead(lm)
    params = head.init(jax.random.key(0), random_params(lm))
    models.save_reward_model(tmp_path, head, params)
    loaded = models.load_reward_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert type(loaded.head.lm) is type(lm) and loaded.config["architectures"][0].endswith("ForSequenceClassification")
    below = models.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, below.params, params["model"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0"}


def test_what_is_no_reward_model_is_refused(gpt2, tmp_path):
    lm, params = gpt2
    models.save(tmp_path / "lm", lm, params)
    with pytest.raises(ValueError, match=r"is not a reward model: score.weight must be \[1, width\]"):
        models.load_reward_model(tmp_path / "lm")
    table = ScalarHead(TINY["tabular"])
    with pytest.raises(ValueError, match="has no Hugging Face form"):
        models.save_reward_model(tmp_path / "table", table, table.init(jax.random.key(0)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
@pytest.mark.slow
def test_checkpointed_blocks_change_no_value_and_keep_less_for_the_gradient(name):
    lm = TINY[name]
    saving = dataclasses.replace(lm, checkpoint_blocks=True)
    params, (tokens, mask) = random_params(lm), padded("left")

    def loss(lm, params):
        return jnp.square(lm.hidden(params, tokens, mask=mask)[0]).sum()

    plain, again = (jax.jit(jax.value_and_grad(functools.partial(loss, each)))(params) for each in (lm, saving))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), again, plain)

    def kept(lm):
        """Numbers that the forward pass leaves for the backward pass."""
        pull_back = jax.eval_shape(lambda params: jax.vjp(functools.partial(loss, lm), params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    assert kept(saving) < 0.8 * kept(lm)
