"""T5 against what transformers + torch computed with the same files (tests/goldens/make_t5_goldens.py)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm import models
from jaxrl_llm.decoding import beam_search, generate

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = ("t5-0", "t5-1")
EOS, PENALTIES = (1, 3, 8), (0.0, 1.0, -0.5)


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return models.load(GOLDENS / request.param), load_file(GOLDENS / request.param / "expected.safetensors")


@functools.partial(jax.jit, static_argnums=0)
def logits_of(t5, params, source, mask, target):
    lm, given = t5.start(params, source, mask)
    return lm.apply(given, target)[0]


def test_the_goldens_try_what_they_should():
    configs = [models.load(GOLDENS / name).model.config for name in NAMES]
    assert [(config.gated, config.tie_word_embeddings) for config in configs] == [(True, False), (False, True)]
    assert [config.activation for config in configs] == ["gelu_new", "relu"]
    assert configs[1].num_layers != configs[1].decoder_layers
    for name in NAMES:
        expected = load_file(GOLDENS / name / "expected.safetensors")
        mask = expected["mask"]
        assert not mask[1, -1] and not mask[2, 0] and mask[3].sum() == 1, "padded on the right, on the left, one token"
        assert expected["target"].shape[1] > configs[0].relative_attention_max_distance + 1
        assert all(len(set(row)) > 1 for row in expected["generated"].tolist()), "no row repeats one token"
        assert (expected["generated"][:, -1] == 0).any() and (expected["beams"][..., -1] == 0).any(), "some end"


def test_logits_agree(golden):
    loaded, expected = golden
    logits = logits_of(loaded.model, loaded.params, expected["source"], expected["mask"], expected["target"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    assert expected["logits"].std(axis=-1).mean() > 0.2


def test_logits_agree_for_each_row_without_the_others_and_without_padding(golden):
    loaded, expected = golden
    for row in range(4):
        copies = {name: np.repeat(expected[name][row : row + 1], 4, axis=0) for name in ("source", "mask", "target")}
        logits = logits_of(loaded.model, loaded.params, *copies.values())
        np.testing.assert_allclose(logits, np.repeat(expected["logits"][row : row + 1], 4, axis=0), rtol=0, atol=1e-4)
    source, target = expected["source"][2, expected["mask"][2]], expected["target"][2]
    logits = logits_of(loaded.model, loaded.params, source[None], None, target[None])
    np.testing.assert_allclose(logits[0], expected["logits"][2], rtol=0, atol=1e-4)


def test_attention_weights_agree(golden):
    loaded, expected = golden
    source, mask, target = (jnp.asarray(expected[name]) for name in ("source", "mask", "target"))
    maps = jax.jit(loaded.model.attention)(loaded.params, source, target, source_mask=mask)
    encoder = np.where(expected["mask"][None, :, None, :, None], expected["encoder"], 0)  # of padding ours has zeros
    np.testing.assert_allclose(maps.encoder, encoder, rtol=0, atol=1e-4)
    np.testing.assert_allclose(maps.decoder, expected["decoder"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(maps.cross, expected["cross"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def started(golden):
    """The language model that the sources make of it, its parameters, and the prompts."""
    loaded, expected = golden
    lm, given = loaded.model.start(loaded.params, expected["source"], expected["mask"])
    return lm, given, loaded.model.decoder_prompts(4)


def test_greedy_generation_is_the_same_token_for_token(started, golden):
    found = generate(*started, max_new_tokens=12, greedy=True, eos_id=EOS)
    np.testing.assert_array_equal(found.tokens, golden[1]["generated"])


@pytest.mark.parametrize("index", range(3))
def test_beams_are_the_same_token_for_token(started, golden, index):
    options = {"num_beams": 4, "max_new_tokens": 12, "eos_id": EOS, "length_penalty": PENALTIES[index]}
    found = beam_search(*started, **options)
    np.testing.assert_array_equal(found.tokens, golden[1]["beams"][index])
    np.testing.assert_allclose(found.score, golden[1]["scores"][index], rtol=1e-5, atol=1e-4)
