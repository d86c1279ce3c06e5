"""Saved models: `models.load` reads them back bit for bit, and transformers loads them."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from jaxrl_llm import models
from jaxrl_llm.data import bpe
from jaxrl_llm.models import Llama, LlamaConfig, StableLM, StableLMConfig, huggingface
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.tabular import TabularLM

GPT2_SIZES = {"vocab_size": 19, "n_positions": 24, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA_SIZES = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0},
    "original_max_position_embeddings": 16,
}
STABLELM_SIZES = LLAMA_SIZES | {"hidden_size": 24}
STABLELM_OPTIONS = {
    "partial_rotary_factor": 1.0,
    "rope_theta": 77.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "use_qkv_bias": True,
    "qk_layernorm": True,
    "use_parallel_residual": True,
    "tie_word_embeddings": True,
}
LMS = {
    "gpt2": GPT2(GPT2Config(**GPT2_SIZES)),
    "gpt2-untied": GPT2(GPT2Config(**GPT2_SIZES, tie_word_embeddings=False, n_inner=10, activation_function="relu")),
    "gpt2-scales": GPT2(
        GPT2Config(
            **GPT2_SIZES,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            layer_norm_epsilon=1e-3,
            initializer_range=0.1,
        )
    ),
    "llama": Llama(LlamaConfig(**LLAMA_SIZES)),
    "llama-untied": Llama(LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=False, head_dim=4, rms_norm_eps=1e-3)),
    "llama-biases": Llama(LlamaConfig(**LLAMA_SIZES, attention_bias=True, mlp_bias=True, rope_theta=77.0)),
    "llama-linear": Llama(LlamaConfig(**LLAMA_SIZES, rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "llama-llama3": Llama(LlamaConfig(**LLAMA_SIZES, rope_scaling=LLAMA3)),
    "stablelm": StableLM(StableLMConfig(**STABLELM_SIZES, partial_rotary_factor=0.5)),
    "stablelm-options": StableLM(StableLMConfig(**STABLELM_SIZES, **STABLELM_OPTIONS, layer_norm_eps=1e-3)),
}


def random_params(lm, dtype=jnp.float32):
    """Every parameter random, biases and norms too: what is mixed up does not come back equal."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), lm.abstract_params)


def assert_equal_bits(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def tokenizer(tmp_path):
    bpe.save(bpe.train(["the cat sat on the mat"] * 4, 262), tmp_path / "tokenizer")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", LMS)
def test_the_same_model_and_parameters_come_back_and_transformers_reads_the_configuration(tmp_path, name):
    """Every field of ours has there the value that we gave it."""
    lm, folder = LMS[name], tmp_path / "new" / "folder"
    params = random_params(lm)
    models.save(folder, lm, params)
    loaded = models.load(folder)
    assert loaded.model == lm
    assert_equal_bits(loaded.params, params)
    assert loaded.tokenizer is None
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == name.split("-")[0]
    architectures = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "stablelm": "StableLmForCausalLM"}
    assert config.architectures == [architectures[config.model_type]]
    ours = dict(vars(lm.config)) if isinstance(lm, GPT2) else lm.config.to_dict()
    theirs = {field: getattr(config, field) for field in ours}
    if ours.get("head_dim", 0) is None:  # they write the number that it means
        assert theirs.pop("head_dim") == lm.config.description.head_dim and ours.pop("head_dim") is None
    assert theirs == ours


def stored_shapes(folder, name):
    models.save(folder, LMS[name], random_params(LMS[name]))
    return {each: tensor.shape for each, tensor in load_file(folder / "model.safetensors").items()}


def test_tensors_have_the_names_and_shapes_of_published_checkpoints(tmp_path):
    shapes = stored_shapes(tmp_path, "gpt2-untied")
    assert len(shapes) == 2 + 2 * 12 + 2 + 1
    assert shapes["transformer.h.1.attn.c_attn.weight"] == (12, 36)  # [in, out], GPT-2's Conv1D
    assert shapes["transformer.wpe.weight"] == (24, 12)
    assert shapes["lm_head.weight"] == (19, 12)
    shapes = stored_shapes(tmp_path, "llama-untied")
    assert len(shapes) == 1 + 2 * 9 + 1 + 1
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (8, 12)  # [out, in]
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (12, 20)
    assert shapes["lm_head.weight"] == (19, 12)
    assert "lm_head.weight" not in stored_shapes(tmp_path, "llama"), "a tied head is not written"
    shapes = stored_shapes(tmp_path, "stablelm")
    assert len(shapes) == 1 + 2 * 11 + 2 + 1
    assert shapes["model.layers.1.post_attention_layernorm.bias"] == shapes["model.norm.bias"] == (24,)
    shapes = stored_shapes(tmp_path, "stablelm-options")
    assert len(shapes) == 1 + 2 * (2 + 7 + 3 + 6 + 2) + 2
    assert shapes["model.layers.1.self_attn.q_layernorm.norms.5.weight"] == (4,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2-untied", "llama-biases"])
def test_the_stored_type_can_be_chosen(tmp_path, name, dtype):
    params = random_params(LMS[name])
    models.save(tmp_path, LMS[name], params, dtype=dtype)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)
    assert_equal_bits(models.load(tmp_path, dtype=dtype).params, rounded)
    assert_equal_bits(models.load(tmp_path).params, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))


def test_without_a_choice_the_stored_type_is_that_of_the_parameters(tmp_path):
    params = random_params(LMS["gpt2"], jnp.bfloat16)
    models.save(tmp_path, LMS["gpt2"], params)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "model.safetensors").values()} == {"bfloat16"}
    assert_equal_bits(models.load(tmp_path, dtype="bfloat16").params, params)


def test_types_may_be_mixed_and_every_tensor_is_aligned(tmp_path):
    further = {"score.weight": np.ones((1, 12)), "half": np.ones(3, np.float16), "count": np.ones((), np.int64)}
    params = random_params(LMS["gpt2"])
    params["ln_f"]["bias"] = params["ln_f"]["bias"].astype(jnp.bfloat16)
    models.save(tmp_path, LMS["gpt2"], params, further=further)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in further.items():
        assert stored[name].dtype == tensor.dtype
        np.testing.assert_array_equal(stored[name], tensor)
    assert stored["transformer.ln_f.bias"].dtype == jnp.bfloat16
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert size % 8 == 0
    entries = {name: entry for name, entry in json.loads(raw[8 : 8 + size]).items() if name != "__metadata__"}
    assert all(e["data_offsets"][0] % stored[name].itemsize == 0 for name, e in entries.items())


def test_a_large_model_is_written_in_several_files_and_an_earlier_one_goes(tmp_path, monkeypatch):
    lm = LMS["gpt2"]
    params = lm.init(jax.random.key(0))
    models.save(tmp_path, lm, params)
    whole = huggingface.LARGEST
    monkeypatch.setattr(huggingface, "LARGEST", 4000)
    models.save(tmp_path, lm, params)
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{place}-of-00007.safetensors" for place in range(1, 8)]
    assert index["metadata"]["total_size"] == 4 * lm.num_params()
    for file in files:
        tensors = load_file(tmp_path / file)
        assert tensors.keys() == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(each.nbytes for each in tensors.values()) <= 4000
    assert not (tmp_path / huggingface.SINGLE).exists(), "it would be read in their place"
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).params, params)
    monkeypatch.setattr(huggingface, "LARGEST", whole)
    models.save(tmp_path, lm, params)
    assert sorted(path.name for path in tmp_path.glob("model*")) == [huggingface.SINGLE]


def test_a_type_that_safetensors_does_not_have_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"the dtype of odd must be one of .*bfloat16, bool, but is complex64\."):
        models.save(tmp_path, LMS["gpt2"], random_params(LMS["gpt2"]), further={"odd": np.ones(3, np.complex64)})
    assert not list(tmp_path.iterdir())


def test_float64_parameters_come_back_in_full(tmp_path):
    with jax.enable_x64(True):
        params = random_params(LMS["gpt2"], jnp.float64)
        models.save(tmp_path, LMS["gpt2"], params)
        assert_equal_bits(models.load(tmp_path, dtype="float64").params, params)


def test_the_tokenizer_comes_back_with_its_special_tokens_and_template(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    models.save(tmp_path / "model", LMS["gpt2"], random_params(LMS["gpt2"]), tokenizer)
    loaded = models.load(tmp_path / "model")
    text = "the cat sat on 🙂\n\tthe mat"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    chat = [{"role": "user", "content": "hello"}]
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == "<hello>"
    assert (loaded.config["bos_token_id"], loaded.config["eos_token_id"]) == (0, 0)


def test_further_fields_are_kept_and_contradict_nothing(tmp_path, tokenizer):
    """The `config` of a loaded model can be given to `save` of another model."""
    config = {"eos_token_id": [1, 2], "summary_type": "mean", "n_embd": 999, "model_type": "llama", "dtype": "int8"}
    config |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"}
    models.save(tmp_path / "model", LMS["gpt2"], random_params(LMS["gpt2"]), tokenizer, config=config)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    ends = sorted({tokenizer.eos_token_id, 1, 2})  # the tokenizer's EOS is that of the texts it encodes
    assert (written["eos_token_id"], written["summary_type"]) == (ends, "mean")
    assert (written["n_embd"], written["model_type"], written["dtype"]) == (12, "gpt2", "float32")
    assert "rope_scaling" not in written and "torch_dtype" not in written


def test_a_configuration_of_the_old_form_is_written_in_the_new(tmp_path):
    lm = LMS["llama-linear"]
    models.save(tmp_path / "first", lm, random_params(lm))
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 100000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    first = models.load(tmp_path / "first")
    models.save(tmp_path / "second", first.model, first.params, config=first.config)
    second = models.load(tmp_path / "second")
    assert second.model == first.model and second.model.config.rope_parameters == lm.config.rope_parameters
    assert_equal_bits(second.params, first.params)
    assert "rope_scaling" not in second.config


def test_what_belongs_to_the_tokenizer_that_was_there_is_gone(tmp_path):
    lm, loaded = LMS["gpt2"], models.load("tiny-gpt2")
    params = random_params(lm)
    models.save(tmp_path, lm, params, loaded.tokenizer, config={"generation_config": {"eos_token_id": 7}})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "added_tokens.json").write_text('{"<|new|>": 4096}')
    models.save(tmp_path, lm, params, loaded.tokenizer)
    found = models.load(tmp_path)
    assert found.tokenizer.chat_template is None and len(found.tokenizer) == len(loaded.tokenizer)
    assert found.config["generation_config"]["eos_token_id"] == 0
    models.save(tmp_path, lm, params)
    assert "generation_config" not in models.load(tmp_path).config


def test_a_folder_of_an_adapter_is_not_one_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, which transformers would add to the model"):
        models.save(tmp_path, LMS["gpt2"], random_params(LMS["gpt2"]))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_folder_of_a_model_with_an_adapter_says_which_of_them_is_loaded(tmp_path):
    models.save(tmp_path, LMS["gpt2"], random_params(LMS["gpt2"]))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="holds a model and an adapter: the model is loaded without the adapter"):
        models.load(tmp_path)


def test_a_model_without_a_published_form_is_an_error(tmp_path):
    lm = TabularLM(vocab_size=2, horizon=2)
    with pytest.raises(ValueError, match=r"TabularLM has no Hugging Face form; gpt2, llama, .* umt5 have one"):
        models.save(tmp_path, lm, lm.init(jax.random.key(0)))
    assert not list(tmp_path.iterdir())


def half_written(part):
    yield np.ones(5, np.float32)
    raise OSError("No space left on device")


def never_replaced(*_):
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    "broken",
    [(huggingface.Part, "rows", half_written), (os, "replace", never_replaced)],
    ids=["weights", "rename"],
)
def test_an_interrupted_save_leaves_nothing_half_written_and_the_model_that_was_there(tmp_path, monkeypatch, broken):
    new, old, params = tmp_path / "new", tmp_path / "old", random_params(LMS["gpt2"])
    models.save(old, LMS["gpt2"], params)
    with monkeypatch.context() as patched:
        patched.setattr(*broken)
        for folder in (new, old):
            with pytest.raises(OSError, match="No space left"):
                models.save(folder, LMS["gpt2"], jax.tree.map(jnp.zeros_like, params))
    assert not list(new.iterdir())
    with pytest.raises(FileNotFoundError, match=r"must be a folder in Hugging Face format, but has no config\.json"):
        models.load(new)
    assert_equal_bits(models.load(old).params, params)
    models.save(old, LMS["gpt2"], jax.tree.map(jnp.ones_like, params))  # and the next one goes through
    assert_equal_bits(models.load(old).params, jax.tree.map(jnp.ones_like, params))
    assert {path.name for path in old.iterdir()} == {"model.safetensors", "config.json"}
