"""T5 against what transformers + torch computed with the same files (tests/goldens/make_t5_goldens.py)."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm import models
from jaxrl_llm.decoding import beam_search, generate
from jaxrl_llm.decoding.beam import search
from jaxrl_llm.decoding.generate import decode
from jaxrl_llm.models.t5 import _given
from tests.conftest import first_quick
from tests.models.wild import GOLDENS, variant

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
        assert expected["logits"].std(axis=-1).mean() > 0.2


def test_logits_and_attention_weights_agree(golden):
    """All rows together agree, and each without the others and without padding."""
    loaded, expected = golden
    source, mask, target = (expected[name] for name in ("source", "mask", "target"))
    logits = logits_of(loaded.model, loaded.params, source, mask, target)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    maps = jax.jit(loaded.model.attention)(loaded.params, source, target, source_mask=mask)
    encoder = np.where(mask[None, :, None, :, None], expected["encoder"], 0)  # of padding ours has zeros
    for found, name in zip(maps, (encoder, expected["decoder"], expected["cross"]), strict=True):
        np.testing.assert_allclose(found, name, rtol=0, atol=1e-4)
    for row in range(4):
        copies = (np.repeat(each[row : row + 1], 4, axis=0) for each in (source, mask, target))
        logits = logits_of(loaded.model, loaded.params, *copies)
        np.testing.assert_allclose(logits, np.repeat(expected["logits"][row : row + 1], 4, axis=0), rtol=0, atol=1e-4)
    logits = logits_of(loaded.model, loaded.params, source[2, mask[2]][None], None, target[2:3])
    np.testing.assert_allclose(logits[0], expected["logits"][2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("golden", first_quick(NAMES), indirect=True)
def test_greedy_generation_and_beams_are_the_same_token_for_token(golden):
    """And another source of the same shape compiles nothing new."""
    loaded, expected = golden

    def decoded(source, mask):
        given = *loaded.model.start(loaded.params, source, mask), loaded.model.decoder_prompts(4)
        options = {"max_new_tokens": 12, "eos_id": EOS}
        beams = [beam_search(*given, num_beams=4, length_penalty=penalty, **options) for penalty in PENALTIES]
        return (
            generate(*given, greedy=True, **options),
            beams,
            [each._cache_size() for each in (decode, search, _given)],
        )

    greedy, beams, programs = decoded(expected["source"], expected["mask"])
    np.testing.assert_array_equal(greedy.tokens, expected["generated"])
    for found, tokens, scores in zip(beams, expected["beams"], expected["scores"], strict=True):
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_allclose(found.score, scores, rtol=1e-5, atol=1e-4)
    assert decoded(expected["source"][::-1], expected["mask"][::-1])[2] == programs


@pytest.mark.parametrize("model_type", ["mt5", "umt5"])
def test_kin_with_the_weights_of_a_t5_agrees(tmp_path, model_type):
    """mT5 is a T5 1.1, and umT5 one if its layers have equal tables."""

    def tables(stored):
        table = ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names = [f"{side}{table.replace('0', layer, 1)}" for side in ("encoder", "decoder") for layer in "01"]
        return stored | ({name: stored[name[:7] + table].copy() for name in names} if model_type == "umt5" else {})

    loaded = models.load(variant(tmp_path, "t5-0", config={"model_type": model_type}, tensors=tables))
    expected = load_file(GOLDENS / "t5-0" / "expected.safetensors")
    logits = logits_of(loaded.model, loaded.params, *(expected[name] for name in ("source", "mask", "target")))
    assert loaded.model.config.model_type == model_type
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
