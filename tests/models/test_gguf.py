"""GGUF: every file but one is written here with the `gguf` library, whose dequantisation is the reference."""

import dataclasses
import itertools
import math
import random
import re
import string

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from jaxrl_llm.models import configuration, families, huggingface, load
from jaxrl_llm.models.gguf import GGUFModel, read

VOCAB, LAYERS, HEAD_DIM = 300, 2, 16
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
TEXT = (
    "The cat sat on the mat, and I'll say: it's 1234567 o'clock; DON'T panic!\n\n  def f(x):\n\treturn x ** 2   # the\n"
    "naïve café — 日本語 🙂 über ½ x² …   trailing  "
)


# Conversion, as llama.cpp's -------------------------------------------------------------------------------------------


def checkpoint(config=LLAMA, **changes):
    """Random weights by their Hugging Face names."""
    rng, model = np.random.default_rng(0), configuration.model_from_config(config | changes, source="")
    prefix = families.FAMILIES[config["model_type"]].prefix
    slots = {("" if n.startswith("lm_head") else prefix) + n: s for n, s in huggingface.named_params(model).items()}
    return {name: rng.standard_normal(slot.shape).astype(np.float32) for name, slot in slots.items()}


def metadata(config):
    """The fields of an architecture; its name is `gemma3` for `gemma3_text`, and else the model type."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rope = config.get("rope_scaling") or {}
    known = rope.get("rope_type") in ("linear", "yarn", "longrope")
    fields = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.sliding_window": config.get("sliding_window"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "rope.freq_base": config.get("rope_theta"),
        "rope.dimension_count": int(head_dim * config.get("partial_rotary_factor", 1)),
        "rope.scaling.type": rope["rope_type"] if known else None,
        "rope.scaling.factor": rope.get("factor") if known else None,
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "rope.scaling.attn_factor": rope.get("attention_factor"),
    }
    return {f"{config['model_type'].removesuffix('_text')}.{key}": value for key, value in fields.items()}


def rope_tensors(config):
    rope = config.get("rope_scaling") or {}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{length}.weight": np.float32(rope[f"{length}_factor"]) for length in ("short", "long")}
    if rope.get("rope_type") != "llama3":
        return {}
    factor, low, high = (rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    lengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)
    smooth = np.clip((rope["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def paired(weights, head_dim=HEAD_DIM):
    """Rows as llama.cpp stores them: within each head, row i of the first half beside row i of the second."""
    heads = weights.reshape(-1, 2, head_dim // 2, *weights.shape[1:])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(weights.shape)


def write(path, weights=None, kind=Type.F32, fields=None, extra=(), config=LLAMA):
    """A file of `weights`; `fields` override those of `config`, None leaves one out; `extra` is (name, array, type)."""
    architecture = config["model_type"].removesuffix("_text")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(config) | (fields or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, tensor in (checkpoint(config) if weights is None else weights).items():
        if architecture == "llama" and re.search(r"[qk]_proj", name):
            tensor = paired(tensor)
        if "gemma" in architecture and name.endswith("norm.weight"):
            tensor = tensor + 1
        stored = kind if tensor.ndim == 2 else Type.F32
        name = names.get_name(name, (".weight", ".bias"))
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    ropes = [(name, tensor, Type.F32) for name, tensor in rope_tensors(config).items()]
    for name, tensor, stored in [*ropes, *extra]:
        writer.add_tensor(name, tensor, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Configuration and weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({}, {}),
        ({"llama.rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({"llama.attention.key_length": 16, "llama.rope.dimension_count": 16}, {"head_dim": 16}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        ({"llama.rope.scaling.factor": 2.5}, {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
        ({"llama.rope.scale_linear": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}, {"bos_token_id": 1, "eos_token_id": 2}),
        ({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 2}, {"eos_token_id": 2}),
        ({"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}, {"eos_token_id": [5, 6]}),
    ],
)
def test_the_configuration_follows_the_fields(tmp_path, fields, changed):
    assert read(write(tmp_path / "m.gguf", fields=fields)).config == LLAMA | changed


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}
GEMMA = {
    **{"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16},
    **{"sliding_window": 7, "attn_logit_softcapping": 6.0, "final_logit_softcapping": 5.0, "num_hidden_layers": 7},
}
LOCAL = {"rope_theta": 1e6, "attn_logit_softcapping": None, "rope_local_base_freq": 10000.0}
VARIANTS = {
    "llama tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "rope_theta": 5e5},
    "llama with other divisors": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    "llama with yarn": {"rope_scaling": YARN},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "rope_scaling": YARN},
    "gemma": GEMMA | {"model_type": "gemma", "head_dim": 32, "sliding_window": None, "num_hidden_layers": 2},
    "gemma2": GEMMA | {"model_type": "gemma2"},
    "gemma3": GEMMA | LOCAL | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3 without windows": {
        **GEMMA | LOCAL | {"model_type": "gemma3_text", "sliding_window": None, "layer_types": ["full_attention"] * 7}
    },
    "phi3": {"model_type": "phi3", "sliding_window": 9},
    "phi4-mini": {
        **{"model_type": "phi3", "rope_scaling": LONG | {"original_max_position_embeddings": 32}},
        **{"partial_rotary_factor": 0.5, "original_max_position_embeddings": 32, "tie_word_embeddings": True},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_of_every_architecture_holds_the_same_model_as_the_hugging_face_tensors(tmp_path, name):
    """The same description, the same parameters, and so the same function."""
    config = LLAMA | VARIANTS[name]
    weights, model = checkpoint(config), configuration.model_from_config(config, source="")
    file = write(tmp_path / "m.gguf", weights, config=config)
    found = {each: tensor[:] for each, tensor in read(file).tensors()}
    assert found.keys() == weights.keys() and all(tensor.dtype == np.float32 for tensor in found.values())
    for each, tensor in found.items():
        tolerance = 5e-7 if "gemma" in name and each.endswith("norm.weight") else 0  # 1 is added, and subtracted
        np.testing.assert_allclose(tensor, weights[each], rtol=0, atol=tolerance)
    loaded = load(file)
    params = huggingface.params_from_tensors(model, iter(weights.items()), dtype="float32", source="")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-7), loaded.params, params)
    ours, theirs = loaded.model.config.description, model.config.description
    assert dataclasses.replace(ours, layers=()) == dataclasses.replace(theirs, layers=())
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert (one.window, one.dense) == (other.window, other.dense)
        np.testing.assert_allclose(one.rotary.frequencies, other.rotary.frequencies, rtol=2e-6)
        np.testing.assert_allclose(one.rotary.amplitude, other.rotary.amplitude, rtol=1e-6)
        long = one.rotary.long or one.rotary.frequencies, other.rotary.long or other.rotary.frequencies
        np.testing.assert_allclose(*long, rtol=2e-6)
        assert not other.rotary.long or one.rotary.original == other.rotary.original


def test_gemma_files_leave_some_things_to_the_family(tmp_path):
    config = LLAMA | VARIANTS["gemma3"]
    weights = checkpoint(config)
    for pattern, windows in ((2, "1010101"), (0, "1111111"), ([True, True] + [False] * 5, "1100000")):
        fields = {"gemma3.attention.sliding_window_pattern": pattern, "gemma3.rope.freq_base_swa": 2e4}
        found = read(write(tmp_path / "m.gguf", weights, config=config, fields=fields)).config
        kinds = {"0": "full_attention", "1": "sliding_attention"}
        assert found["layer_types"] == [kinds[window] for window in windows] and found["rope_local_base_freq"] == 2e4
    largest = LLAMA | VARIANTS["gemma2"] | {"num_hidden_layers": 46, "head_dim": 32}
    assert read(write(tmp_path / "m.gguf", config=largest)).config["query_pre_attn_scalar"] == 64 / 4


KINDS = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantised_weights_are_those_of_the_gguf_library(tmp_path, kind):
    weights = checkpoint()
    tolerance = {Type.F16: 1e-2, Type.BF16: 2e-2, Type.Q8_0: 2e-2}.get(kind, 0.5)
    for name, tensor in read(write(tmp_path / "m.gguf", weights, kind)).tensors():
        original, tensor = weights[name], tensor[:]
        if original.ndim == 2:  # rows are quantised one by one, so their order does not matter
            np.testing.assert_array_equal(tensor, gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind))
        assert np.abs(tensor - original).max() < tolerance


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_rows_read_in_parts_are_those_of_the_whole(tmp_path, kind):
    for name, tensor in read(write(tmp_path / "m.gguf", kind=kind, config=LLAMA | {"attention_bias": True})).tensors():
        whole = tensor[:]
        for start, stop in ((0, 1), (5, 23), (15, 17), (31, 32), (7, len(whole))):
            np.testing.assert_array_equal(tensor[start:stop], whole[start:stop], err_msg=name)


def test_types_that_the_library_only_reads_are_read(tmp_path):
    blocks, size = gguf.GGML_QUANT_SIZES[Type.Q4_K]
    raw = np.random.default_rng(1).integers(0, 60, (VOCAB, 256 // blocks * size), np.uint8)
    config = LLAMA | {"hidden_size": 256, "tie_word_embeddings": True}
    weights = checkpoint(config)
    del weights["model.embed_tokens.weight"]
    model = read(write(tmp_path / "m.gguf", weights, config=config, extra=[("token_embd.weight", raw, Type.Q4_K)]))
    np.testing.assert_array_equal(
        dict(model.tensors())["model.embed_tokens.weight"][:], gguf.quants.dequantize(raw, Type.Q4_K)
    )


# Wrong input ----------------------------------------------------------------------------------------------------------


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        refused(path, "is not a GGUF file: it must start with b'GGUF', but starts with")
    for version in (1, 4, 3 << 24):
        path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + bytes(100))
        refused(path, f"of version 2 or 3, but its version reads {version}")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", kind=Type.Q8_0, fields={"general.tags": ["a", "bc"], "general.sizes": [1.0, 2.0]})
    whole, model = path.read_bytes(), read(path)
    start = min(tensor.start for tensor in model.stored.values())
    last = max(model.stored.values(), key=lambda tensor: tensor.start)
    end = last.start + int(np.prod(last.stored_shape))
    for cut in (*range(4, start, 7), *range(start - 33, start + 33), *range(start, end, 5003), end - 1):
        path.write_bytes(whole[:cut])
        refused(path, "is cut short or damaged")
    path.write_bytes(whole[:end])
    assert len(dict(read(path).tensors())) == len(model.stored)


def test_a_damaged_file_is_read_or_refused_but_nothing_else(tmp_path):
    path = write(tmp_path / "m.gguf", fields=bpe_fields() | {"general.tags": ["a", "bc"]})
    whole, rng = path.read_bytes(), random.Random(0)
    header = min(tensor.start for tensor in read(path).stored.values())
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.choice((rng.randrange(600), rng.randrange(header)))] = rng.choice((0, 1, 9, 127, 255))
        path.write_bytes(damaged)
        try:
            read(path).tokenizer()
        except ValueError as error:
            assert str(error).startswith(str(path))


def test_a_length_beyond_the_file_is_refused_at_once(tmp_path):
    path = write(tmp_path / "m.gguf", fields={"general.tags": ["a", "bc"]})
    whole = path.read_bytes()
    count = (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (2).to_bytes(8, "little")
    assert count in whole
    path.write_bytes(whole.replace(count, count[:8] + (2**40).to_bytes(8, "little")))
    refused(path, "a list of 1099511627776 strings")


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", extra=[("output_norm.weighX", np.full(64, 7, np.float32), Type.F32)])
    path.write_bytes(path.read_bytes().replace(b"output_norm.weighX", b"output_norm.weight"))
    refused(path, "is damaged: output_norm.weight occurs twice")
    path = write(tmp_path / "m.gguf", fields={"llama.attention.head_counX": 2})
    path.write_bytes(path.read_bytes().replace(b"llama.attention.head_counX", b"llama.attention.head_count"))
    refused(path, "is damaged: llama.attention.head_count occurs twice")


UNFIT_FIELDS = {
    "architectures llama, qwen2, .*, phi3, but is of 'falcon'": {"general.architecture": "falcon"},
    "is one of 3 parts of a model; llama-gguf-split --merge joins them": {"split.count": 3},
    "llama.block_count must be a positive int, but is None": {"llama.block_count": None},
    "4000000000 layers, but holds 21 tensors": {"llama.block_count": 4_000_000_000},
    "a llama of 1 layers has no place for blk.1": {"llama.block_count": 1},
    "must have 9 more tensors, blk.2.[a-z_]*.weight among them": {"llama.block_count": 3},
    r"must be a positive int, but is \[2, 2\]": {"llama.attention.head_count_kv": [2, 2]},
    r"blk.0.attn_k.weight must be of shape \(64, 64\), but is": {"llama.attention.head_count_kv": 4},
    "largest dimension of a tensor, 300, but is 2000000000": {"llama.attention.key_length": 2_000_000_000},
    "value_length must be that of the keys, 16, but is 8": {"llama.attention.value_length": 8},
    "rope.dimension_count must be even and the heads' 16, but is 8": {"llama.rope.dimension_count": 8},
    "must be none, linear, yarn or longrope, but is 'warp'": {"llama.rope.scaling.type": "warp"},
    r"rope_factors_short.weight must be of shape \(8,\), but is missing": {"llama.rope.scaling.type": "longrope"},
    "1.0 with yarn, but is 2.0": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 2.0},
    "row for each of 301 tokens, but has 300": {"tokenizer.ggml.tokens": ["t"] * 301},
    "must be token ids, but one is 'x'": {"tokenizer.ggml.eot_token_id": "x"},
}
UNFIT_TENSORS = {
    "type must be none where there are tensors of rotary": ("rope_freqs.weight", np.ones(8, np.float32), Type.F32),
    "rope_freqs.weight must be numbers above 0, but has 0.0": ("rope_freqs.weight", np.zeros(8, np.float32), Type.F32),
    "no place for blk.0.ffn_gate_inp": ("blk.0.ffn_gate_inp.weight", np.ones(8, np.float32), Type.F32),
    "of GGML type 26": ("output_norm.bias", np.ones(8, np.int32), Type.I32),
}


@pytest.mark.parametrize("match", [*UNFIT_FIELDS, *UNFIT_TENSORS])
def test_a_file_that_no_model_can_be_made_of_is_refused(tmp_path, match):
    fields = {"llama.rope.scaling.type": "yarn"} if "where there are" in match else UNFIT_FIELDS.get(match)
    extra = [UNFIT_TENSORS[match]] if match in UNFIT_TENSORS else ()
    refused(write(tmp_path / "m.gguf", fields=fields, extra=extra), match)


# Byte-level tokenizers ------------------------------------------------------------------------------------------------


def trained_bpe():
    """A toy byte-level vocabulary: three control tokens, all bytes, then merges learned from TEXT in long pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3 + ["123 the 1234 cat 12 '1 sat"] * 5, trainer)
    vocab = backend.get_vocab()
    merges = re.findall(r'\[\s*"([^"]+)",\s*"([^"]+)"\s*\]', backend.to_str(pretty=True))
    return [*sorted(vocab, key=vocab.get), "<think>"], merges


TOKENS, MERGES = trained_bpe()


def bpe_fields(pre="smollm", **more):
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 4) + [4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def tokenizer(path, fields):
    return read(write(path, fields=fields)).tokenizer()


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEMO = (  # of the published tokenizer.json
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
PRE = {
    **dict.fromkeys(("gpt-2", "gpt2"), ()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (DIGITS,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (WORDS.replace("{1,3}", ""),)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (WORDS,)),
    "tekken": (NEMO,),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS),
}


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokens_are_those_of_the_published_splits(tmp_path, pre):
    built = tokenizer(tmp_path / "m.gguf", bpe_fields(pre, add_bos_token=False))
    whole = pre.startswith("llama") or pre == "tekken"
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(TOKENS)}, MERGES, ignore_merges=whole))
    parts = [pre_tokenizers.Split(Regex(part), "isolated") if isinstance(part, str) else part for part in PRE[pre]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=PRE[pre] in ((), (DIGITS,)))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, level])
    for text in (TEXT, "", " ", "\n", "12345", " 007", "x\r\n\r\n y", "I'LL we'Ve", "a  b   c\t\td"):
        ids = built(text).input_ids
        assert ids == backend.encode(text).ids
        assert built.decode(ids) == text


def test_qwen2_agrees_with_the_class_of_transformers(tmp_path):
    from transformers import Qwen2Tokenizer

    built = tokenizer(tmp_path / "m.gguf", bpe_fields("qwen2"))
    theirs = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(TOKENS)}, merges=MERGES)
    for text in (TEXT, "cafe\u0301", "I'm 42"):
        assert built(text).input_ids == theirs(text).input_ids


FURTHER = {
    "default": "don|'|t|Ġpay|Ġ|$|123|45|.|67|Ġ|//|ĊĊ",  # llama.cpp's own
    "gpt-4o": "don't|Ġpay|Ġ$|123|45|.|67|Ġ//ĊĊ",
}


@pytest.mark.parametrize("pre", FURTHER)
def test_further_splits(tmp_path, pre):
    built = tokenizer(tmp_path / "m.gguf", bpe_fields(pre))
    pieces = built.backend_tokenizer.pre_tokenizer.pre_tokenize_str("don't pay $12345.67 //\n\n")
    assert "|".join(piece for piece, _ in pieces) == FURTHER[pre]


def test_control_and_user_defined_tokens_are_single_and_only_control_ones_are_skipped(tmp_path):
    built = tokenizer(tmp_path / "m.gguf", bpe_fields())
    assert len(built) == VOCAB
    for index, token in [*enumerate(TOKENS[:3]), (VOCAB - 1, "<think>")]:
        assert built(f"cat{token}the").input_ids.count(index) == 1
        assert built.convert_ids_to_tokens(index) == token
    ids = built("<|im_start|>the <think>cat<|im_end|>").input_ids
    assert built.decode(ids, skip_special_tokens=True) == "the <think>cat"
    names = (built.bos_token, built.eos_token, built.pad_token, built.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (built.bos_token_id, built.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("pre", "more", "ends"),
    [
        ("smollm", {}, ([], [])),
        ("llama-bpe", {}, ([1], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
    ],
)
def test_beginning_and_end_tokens_are_added_as_the_file_says(tmp_path, pre, more, ends):
    built = tokenizer(tmp_path / "m.gguf", bpe_fields(pre, **more))
    bare = built("the cat", add_special_tokens=False).input_ids
    assert built("the cat").input_ids == ends[0] + bare + ends[1]


def test_llama3_takes_a_whole_token_before_any_merge(tmp_path):
    tokens = [*TOKENS[:-1], "zqzq"]
    plain, whole = (
        tokenizer(tmp_path / "m.gguf", bpe_fields(pre, tokens=tokens, token_type=[1] * VOCAB, add_bos_token=False))
        for pre in ("qwen2", "llama-bpe")
    )
    assert len(plain("zqzq").input_ids) == 4
    assert whole("zqzq").input_ids == [VOCAB - 1]


def test_the_chat_template_is_the_files(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    built = tokenizer(tmp_path / "m.gguf", bpe_fields() | {"tokenizer.chat_template": template})
    chat = [{"role": "user", "content": "the cat"}]
    assert built.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nthe cat<|im_end|>\n"
    assert tokenizer(tmp_path / "n.gguf", bpe_fields()).chat_template is None


UNFIT_TOKENIZERS = {
    "pre must be one of default, gpt-2, .*llama-v3, .*, but is 'viking'": {"pre": "viking"},
    "without tokenizer.ggml.pre": {"pre": None},
    "without tokenizer.ggml.merges": {"merges": None},
    "without tokenizer.ggml.tokens": {"tokens": None},
    "tokens must be a list of str": {"tokens": [1]},
    r"1 merges are not .* \('zz', 'qq'\) among them": {"merges": ["zz qq"]},
    "each of its 300 tokens a type, but gives 1": {"token_type": [1]},
    "eos token must be one of 300, but its id is 300": {"eos_token_id": 300},
    "add_bos_token is true, but there is no bos": {"bos_token_id": None, "add_bos_token": True},
    "must be gpt2 or llama, but is 'bert'": {"model": "bert"},
}


@pytest.mark.parametrize("match", UNFIT_TOKENIZERS)
def test_an_incomplete_or_unknown_tokenizer_is_refused_before_weights_are_read(tmp_path, monkeypatch, match):
    monkeypatch.setattr(GGUFModel, "tensors", None)
    with pytest.raises(ValueError, match=match) as caught:
        load(write(tmp_path / "m.gguf", fields=bpe_fields(**UNFIT_TOKENIZERS[match])))
    assert str(tmp_path / "m.gguf") in str(caught.value)


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    assert read(write(tmp_path / "m.gguf")).tokenizer() is None


# SentencePiece tokenizers ---------------------------------------------------------------------------------------------


LONGER = ["▁t", "he", "▁the", "▁▁", "at", "▁▁▁▁", "cat", "▁cat", "ca", "aa", "aaa", "aaaa", "th", "in"]  # best first
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *LONGER, "▁", *string.ascii_lowercase]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) - 259)]


def piece_fields(**more):
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def best_pairs_first(text):
    """SentencePiece's BPE: join the neighbours that make the best piece, the leftmost of equals; then bytes."""
    score = dict(zip(PIECES[259:], SCORES[259:], strict=True))
    parts = list(text.replace(" ", "▁"))
    while joins := [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]:
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = [[part] if part in score else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [PIECES.index(piece) for pieces in spelled for piece in pieces]


def test_sentencepiece_tokens_are_those_of_greedy_joining(tmp_path):
    built = tokenizer(tmp_path / "m.gguf", piece_fields())
    rng = random.Random(0)
    texts = ["".join(rng.choices("aaacthe in gé日🙂\n", k=rng.randrange(1, 30))) for _ in range(300)]
    for text in [*texts, "the cat", "  the    cat", "Ä"]:
        assert built(text).input_ids == [1, *best_pairs_first(" " + text)]
        assert built.decode(built(text).input_ids, skip_special_tokens=True) == text
    assert built("a</s>a").input_ids == [1, *best_pairs_first(" a"), 2, *best_pairs_first(" a")]


def test_sentencepiece_fields_change_prefix_and_ends(tmp_path):
    built = tokenizer(
        tmp_path / "m.gguf", piece_fields(add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    )
    assert built("the cat").input_ids == [*best_pairs_first("the cat"), 2]
    assert built.decode(built(" the").input_ids, skip_special_tokens=True) == " the"


def test_one_score_for_all_means_the_order_of_ids(tmp_path):
    usual, flat = (
        tokenizer(tmp_path / "m.gguf", fields)
        for fields in (piece_fields(), piece_fields(scores=[-1000.0] * len(PIECES)))
    )
    for text in ("the cat  ate   the thing", "aaaaaaa in a cathat"):
        assert usual(text).input_ids == flat(text).input_ids


def test_sentencepiece_without_scores_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without tokenizer\.ggml\.scores"):
        tokenizer(tmp_path / "m.gguf", piece_fields(scores=None))
    with pytest.raises(ValueError, match="a score, but gives 2"):
        tokenizer(tmp_path / "m.gguf", piece_fields(scores=[0.0, 0.0]))
