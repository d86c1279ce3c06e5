"""Decoders against what transformers + torch computed of the same files (goldens/make_goldens.py)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm import models
from jaxrl_llm.decoding import generate

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = ("gpt2-0", "gpt2-1", "llama-0", "llama-1", "stablelm-0", "stablelm-1")
OTHERS = ("mistral-0", "qwen2-0", "qwen3-0", "gemma2-0", "gemma3_text-0", "olmo2-0", "smollm3-0", "phi3-0")
EOS, PAD = 1, 0


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    """The folder's model and what is expected of it: tokens and mask (padded on the left), logits, generated."""
    return models.load(GOLDENS / request.param), load_file(GOLDENS / request.param / "expected.safetensors")


@functools.partial(jax.jit, static_argnums=0)
def logits_of(lm, params, tokens, mask):
    return lm.apply(params, tokens, mask=mask)[0]


def apply(loaded, tokens, mask):
    return np.asarray(logits_of(loaded.model, loaded.params, jnp.asarray(tokens), jnp.asarray(mask)))


def greedy(loaded, tokens, mask):
    generation = generate(
        loaded.model,
        loaded.params,
        jnp.asarray(tokens),
        prompt_mask=jnp.asarray(mask),
        max_new_tokens=12,
        greedy=True,
        eos_id=EOS,
        pad_id=PAD,
    )
    return np.asarray(generation.tokens)


def rolled(tokens, mask):
    """The same rows, padded on the right."""
    padding = (~mask).sum(axis=1)
    rows = zip(tokens, mask, padding, strict=True)
    rolled = [(np.roll(row, -count), np.roll(valid, -count)) for row, valid, count in rows]
    return tuple(np.stack(each) for each in zip(*rolled, strict=True))


def test_the_goldens_try_what_they_should():
    expected = [load_file(GOLDENS / name / "expected.safetensors") for name in NAMES]
    ragged = [each for each in expected if not each["mask"].all()]
    assert len(ragged) == len(NAMES) and all(each["mask"][:, -1].all() for each in expected), "padded on the left"
    assert all(len(set(row)) > 1 for each in expected for row in each["generated"].tolist()), "no row repeats one token"
    configs = [models.load(GOLDENS / name).model.config for name in NAMES]
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    assert {config.rope_parameters["rope_type"] for config in configs[2:4]} == {"linear", "llama3"}
    assert {config.attention_bias for config in configs[2:4]} == {True, False}
    assert any(config.num_key_value_heads < config.num_attention_heads for config in configs[2:4])
    plain, full = configs[4:]
    options = ("use_qkv_bias", "qk_layernorm", "use_parallel_residual", "tie_word_embeddings")
    assert not any(getattr(plain, each) for each in options) and all(getattr(full, each) for each in options)
    assert plain.rope_parameters["rope_type"] == "default" != full.rope_parameters["rope_type"]
    assert plain.num_key_value_heads == plain.num_attention_heads and full.num_key_value_heads == 2
    turned = [2 * len(config.description.layers[0].rotary.frequencies) for config in (plain, full)]
    assert turned == [4, 12] and all(config.description.head_dim == 16 for config in (plain, full))
    assert {config.scale_attn_by_inverse_layer_idx for config in configs[:2]} == {True, False}


def copies(row):
    """Of one row: it has no other neighbours, and needs no program of its own."""
    return np.repeat(row[None], 3, axis=0)


def test_logits_agree_padded_on_either_side_and_for_each_row_without_the_others(golden):
    loaded, expected = golden
    tokens, mask = expected["tokens"], expected["mask"]
    logits = apply(loaded, tokens, mask)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[mask], expected["logits"][mask], rtol=0, atol=1e-4)
    tokens_right, mask_right = rolled(tokens, mask)
    right = apply(loaded, tokens_right, mask_right)
    np.testing.assert_allclose(right[mask_right], expected["logits"][mask], rtol=0, atol=1e-4)
    for row, valid, wanted in zip(tokens, mask, expected["logits"], strict=True):
        for found in apply(loaded, copies(row), copies(valid)):
            np.testing.assert_allclose(found[valid], wanted[valid], rtol=0, atol=1e-4)


def test_greedy_generation_is_the_same_token_for_token(golden):
    """Padded on either side, each row without the others and without padding, and beside another neighbour."""
    loaded, expected = golden
    tokens, mask, generated = (expected[name] for name in ("tokens", "mask", "generated"))
    np.testing.assert_array_equal(greedy(loaded, tokens, mask), generated)
    np.testing.assert_array_equal(greedy(loaded, *rolled(tokens, mask)), generated)
    for row, valid, wanted in zip(tokens, mask, generated, strict=True):
        np.testing.assert_array_equal(greedy(loaded, copies(row[valid]), copies(valid[valid])), copies(wanted))
    other = np.where(mask[0], 2 + (tokens[0] + 5) % 10, PAD)  # a neighbour that the rows have never met
    found = greedy(loaded, np.stack([other, tokens[2], tokens[1]]), mask[[0, 2, 1]])
    np.testing.assert_array_equal(found[1:], generated[[2, 1]])


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_families_agree_on_logits_and_greedy_tokens_and_come_back_from_a_folder(name, tmp_path):
    loaded, expected = models.load(GOLDENS / name), load_file(GOLDENS / name / "expected.safetensors")
    assert loaded.model.config.model_type == name.removesuffix("-0")
    tokens, mask = expected["tokens"], expected["mask"]
    assert not mask.all() and mask[:, -1].all() and all(len(set(row)) > 1 for row in expected["generated"].tolist())
    np.testing.assert_allclose(apply(loaded, tokens, mask)[mask], expected["logits"][mask], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(greedy(loaded, tokens, mask), expected["generated"])
    models.save(tmp_path, loaded.model, loaded.params, config=loaded.config)
    again = models.load(tmp_path)
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    stored, written = (load_file(folder / "model.safetensors") for folder in (GOLDENS / name, tmp_path))
    assert stored.keys() == written.keys(), "the names of the tensors are those of the family"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_bfloat16_parameters_give_float32_logits_nearby(name):
    """Measured in standard deviations of the logits: at most 0.083 at the worst place, 0.017 in root mean square.

    (A bfloat16 number is off by up to 0.004 of itself, and each of up to 3 layers rounds weights and activations.)
    """
    loaded = models.load(GOLDENS / name, dtype="bfloat16")
    expected = load_file(GOLDENS / name / "expected.safetensors")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    logits = apply(loaded, expected["tokens"], expected["mask"])
    assert logits.dtype == np.float32
    reference = expected["logits"][expected["mask"]]
    error = (logits[expected["mask"]] - reference) / reference.std()
    assert np.abs(error).max() < 0.1
    assert 1e-3 < np.sqrt(np.square(error).mean()) < 0.02  # and no smaller: the arithmetic is that of bfloat16
