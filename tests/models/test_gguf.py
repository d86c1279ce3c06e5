"""GGUF: every file but one is written here with the `gguf` library, whose dequantisation is the reference."""

import itertools
import random
import re
import string

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from jaxrl_llm.models.gguf import read

VOCAB, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 300, 64, 96, 2, 4, 2, 16
SHAPES = {
    "input_layernorm": (WIDTH,),
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "post_attention_layernorm": (WIDTH,),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
OURS = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
FIELDS = {
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e4,
}
TEXT = (
    "The cat sat on the mat, and I'll say: it's 1234567 o'clock; DON'T panic!\n\n  def f(x):\n\treturn x ** 2   # the\n"
    "naïve café — 日本語 🙂 über ½ x² …   trailing  "
)


def paired(weights, head_dim=HEAD_DIM):
    """Rows as llama.cpp stores them: within each head, row i of the first half beside row i of the second."""
    heads = weights.reshape(-1, 2, head_dim // 2, *weights.shape[1:])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(weights.shape)


def checkpoint(tied=False, biases=False):
    """Random weights by their Hugging Face names."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if biases and name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name):
    table = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(LAYERS):
        table |= {f"model.layers.{layer}.{n}": f"blk.{layer}.{o}" for n, o in zip(SHAPES, OURS, strict=True)}
    stem, kind = name.rsplit(".", 1)
    return f"{table[stem]}.{kind}"


def write(path, weights=None, kind=Type.F32, fields=None, extra=(), architecture="llama"):
    """A GGUF file of `weights`; `fields` override FIELDS, None leaves one out; `extra`: (name, array, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS | (fields or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, tensor in (checkpoint() if weights is None else weights).items():
        tensor = paired(tensor) if re.search(r"[qk]_proj", name) else tensor
        stored = kind if tensor.ndim == 2 else Type.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    for name, tensor, stored in extra:
        writer.add_tensor(name, tensor, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Configuration and weights --------------------------------------------------------------------------------------------


def test_the_configuration_is_that_of_the_hugging_face_file(tmp_path):
    config = read(write(tmp_path / "m.gguf")).config
    assert config == {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
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


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"llama.rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({"llama.attention.key_length": 16, "llama.rope.dimension_count": 16}, {"head_dim": 16}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}, {"bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_the_configuration_follows_the_fields(tmp_path, fields, changed):
    plain = read(write(tmp_path / "plain.gguf")).config
    assert read(write(tmp_path / "m.gguf", fields=fields)).config == plain | changed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_every_weight_comes_back_under_its_hugging_face_name(tmp_path, tied, biases):
    weights = checkpoint(tied, biases)
    model = read(write(tmp_path / "m.gguf", weights))
    found = dict(model.tensors())
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, weights[name])
    assert model.config["tie_word_embeddings"] is tied
    assert model.config["attention_bias"] is biases


KINDS = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantised_weights_are_those_of_the_gguf_library(tmp_path, kind):
    weights = checkpoint()
    tolerance = {Type.F16: 1e-2, Type.BF16: 2e-2, Type.Q8_0: 2e-2}.get(kind, 0.5)
    for name, tensor in read(write(tmp_path / "m.gguf", weights, kind)).tensors():
        original = weights[name]
        if original.ndim == 2:  # rows are quantised one by one, so their order does not matter
            np.testing.assert_array_equal(tensor, gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind))
        assert np.abs(tensor - original).max() < tolerance


def test_types_that_the_library_only_reads_are_read(tmp_path):
    blocks, size = gguf.GGML_QUANT_SIZES[Type.Q4_K]
    raw = np.random.default_rng(1).integers(0, 60, (VOCAB, 256 // blocks * size), np.uint8)
    wide = {"llama.embedding_length": 256, "llama.attention.key_length": HEAD_DIM, "llama.block_count": 1}
    norm = np.ones(256, np.float32)
    shapes = {"attn_q": (64, 256), "attn_k": (32, 256), "attn_v": (32, 256), "attn_output": (256, 64)}
    shapes |= {"ffn_gate": (96, 256), "ffn_up": (96, 256), "ffn_down": (256, 96), "attn_norm": 256, "ffn_norm": 256}
    extra = [(f"blk.0.{name}.weight", np.ones(shape, np.float32), Type.F32) for name, shape in shapes.items()]
    extra += [("output_norm.weight", norm, Type.F32), ("token_embd.weight", raw, Type.Q4_K)]
    model = read(write(tmp_path / "m.gguf", {}, fields=wide, extra=extra))
    assert model.config["tie_word_embeddings"]
    np.testing.assert_array_equal(
        dict(model.tensors())["model.embed_tokens.weight"], gguf.quants.dequantize(raw, Type.Q4_K)
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
    path = write(tmp_path / "m.gguf", fields=bpe_fields("smollm") | {"general.tags": ["a", "bc"]})
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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "gemma"}, "must be of architecture llama, but is of 'gemma'"),
        ({"fields": {"llama.block_count": None}}, "llama.block_count must be a positive int, but is None"),
        ({"fields": {"llama.block_count": 4_000_000_000}}, "4000000000 layers, but holds 21 tensors"),
        ({"fields": {"llama.block_count": 1}}, "a llama of 1 layers has no place for blk.1"),
        ({"fields": {"llama.block_count": 3}}, "must have 9 more tensors, blk.2.attn_norm.weight among them"),
        ({"fields": {"llama.attention.head_count_kv": [2, 2]}}, r"must be a positive int, but is \[2, 2\]"),
        ({"fields": {"llama.attention.head_count_kv": 4}}, r"blk.0.attn_k.weight must be of shape \(64, 64\), but is"),
        (
            {"fields": {"llama.rope.dimension_count": 8}},
            "rope.dimension_count must be even and the heads' 16, but is 8",
        ),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "must be none or linear, but is 'yarn'"),
        ({"fields": {"tokenizer.ggml.tokens": ["t"] * 301}}, "row for each of 301 tokens, but has 300"),
        ({"extra": [("rope_freqs.weight", np.ones(8, np.float32), Type.F32)]}, "rope_freqs.weight.*not supported"),
        (
            {"extra": [("blk.0.ffn_gate_inp.weight", np.ones(8, np.float32), Type.F32)]},
            "no place for blk.0.ffn_gate_inp",
        ),
        ({"extra": [("output_norm.bias", np.ones(8, np.int32), Type.I32)]}, "of GGML type 26"),
    ],
)
def test_what_a_plain_llama_cannot_be_made_of_is_refused(tmp_path, options, match):
    refused(write(tmp_path / "m.gguf", **options), match)


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


def bpe_fields(pre, **more):
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


def reference(pre):
    """The pieces of the published tokenizers, put together from the library's own parts."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("gpt-2", "gpt2"):
        return level
    if pre in ("smollm", "starcoder", "refact", "command-r"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    digits = r"\p{N}" if pre == "qwen2" else r"\p{N}{1,3}"
    whole = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(whole), "isolated"), level])


PRE = ["gpt-2", "gpt2", "smollm", "starcoder", "refact", "command-r", "qwen2", "llama-bpe", "llama3", "llama-v3"]


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokens_are_those_of_the_published_splits(tmp_path, pre):
    built = tokenizer(tmp_path / "m.gguf", bpe_fields(pre, add_bos_token=False))
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(TOKENS)}, MERGES, ignore_merges="llama" in pre))
    backend.pre_tokenizer = reference(pre)
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


def test_the_default_split_is_llama_cpps(tmp_path):
    built = tokenizer(tmp_path / "m.gguf", bpe_fields("default"))
    pieces = built.backend_tokenizer.pre_tokenizer.pre_tokenize_str("don't pay $12345.67")
    assert [piece for piece, _ in pieces] == ["don", "'", "t", "Ġpay", "Ġ", "$", "123", "45", ".", "67"]


def test_control_and_user_defined_tokens_are_single_and_only_control_ones_are_skipped(tmp_path):
    built = tokenizer(tmp_path / "m.gguf", bpe_fields("smollm"))
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
    built = tokenizer(tmp_path / "m.gguf", bpe_fields("smollm") | {"tokenizer.chat_template": template})
    chat = [{"role": "user", "content": "the cat"}]
    assert built.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nthe cat<|im_end|>\n"
    assert tokenizer(tmp_path / "n.gguf", bpe_fields("smollm")).chat_template is None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (bpe_fields("tekken"), "pre must be one of default, gpt-2, .*llama-v3, but is 'tekken'"),
        (bpe_fields(None), "without tokenizer.ggml.pre"),
        (bpe_fields("smollm", merges=None), "without tokenizer.ggml.merges"),
        (bpe_fields("smollm", tokens=None), "without tokenizer.ggml.tokens"),
        (bpe_fields("smollm", merges=["zz qq"]), r"1 merges are not .* \('zz', 'qq'\) among them"),
        (bpe_fields("smollm", token_type=[1]), "each of its 300 tokens a type, but gives 1"),
        (bpe_fields("smollm", eos_token_id=300), "eos token must be one of 300, but its id is 300"),
        (bpe_fields("smollm", bos_token_id=None, add_bos_token=True), "add_bos_token is true, but there is no bos"),
        (bpe_fields("smollm", model="bert"), "must be gpt2 or llama, but is 'bert'"),
    ],
)
def test_an_incomplete_or_unknown_tokenizer_is_refused(tmp_path, fields, match):
    model = read(write(tmp_path / "m.gguf", fields=fields))
    with pytest.raises(ValueError, match=match) as caught:
        model.tokenizer()
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
