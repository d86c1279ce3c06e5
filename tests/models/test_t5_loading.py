"""T5s as they are found in the wild: the goldens, rewritten; saving; and the tokenizers beside them."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from jaxrl_llm import models
from jaxrl_llm.models import tokenizers
from jaxrl_llm.models.t5 import T5, T5Config
from tests.conftest import TINY_T5, random_params
from tests.models.wild import ABSENT, GOLDENS, variant

# Configurations -------------------------------------------------------------------------------------------------------


def test_a_tied_head_without_scale_is_what_it_says(tmp_path):
    loaded = models.load(variant(tmp_path, "t5-1", config={"scale_decoder_outputs": False}))
    assert loaded.model.config.tie_word_embeddings and loaded.model.config.output_scale == 1


@pytest.mark.parametrize("name", ["scaled and untied", "untied", "tied", "tied, not scaled"])
def test_a_model_that_transformers_5_has_saved_again_is_the_same(tmp_path, name):
    """It says that every head is tied, and reads one with other values than the embedding's as a head of its own."""
    t5 = SAVED[name]
    params = random_params(t5)
    models.save(tmp_path, t5, params)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"tie_word_embeddings": True}))
    loaded = models.load(tmp_path)
    kept = (loaded.model.config.tie_word_embeddings, loaded.model.config.output_scale)
    assert kept == (t5.config.tie_word_embeddings, t5.config.output_scale)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("embedding", ["shared.weight", "lm_head.weight"])
def test_a_head_that_repeats_the_embedding_or_stands_for_it_is_tied(tmp_path, scaled, embedding):
    def repeated(stored):
        rest = {each: tensor for each, tensor in stored.items() if each != "shared.weight"}
        tables = {each: stored["shared.weight"].copy() for each in ("lm_head.weight", embedding)}
        return rest | tables

    loaded = models.load(variant(tmp_path, "t5-1", tensors=repeated, config={"scale_decoder_outputs": scaled}))
    assert loaded.model.config.tie_word_embeddings and (loaded.model.config.output_scale != 1) == scaled


def test_fields_that_are_absent_have_the_defaults_of_the_format(tmp_path):
    fields = ("num_decoder_layers", "layer_norm_epsilon", "decoder_start_token_id", "feed_forward_proj", "dense_act_fn")
    fields += ("relative_attention_num_buckets", "relative_attention_max_distance")
    changed = dict.fromkeys(fields, ABSENT) | {"num_layers": 2, "pad_token_id": 4}

    def resized(stored):
        encoder = {name: each for name, each in stored.items() if name.startswith("encoder.block.0.")}
        more = {name.replace("block.0.", "block.1."): each for name, each in encoder.items() if "relative" not in name}
        table = "layer.0.SelfAttention.relative_attention_bias.weight"
        tables = {f"{side}.block.0.{table}": np.ones((32, 2), np.float32) for side in ("encoder", "decoder")}
        return stored | more | tables

    config = models.load(variant(tmp_path, "t5-1", config=changed, tensors=resized)).model.config
    assert (config.decoder_layers, config.layer_norm_epsilon, config.feed_forward_proj) == (2, 1e-6, "relu")
    assert (config.relative_attention_num_buckets, config.relative_attention_max_distance) == (32, 128)
    assert config.decoder_start_token_id == 4, "the padding token"


# Saving ---------------------------------------------------------------------------------------------------------------

SAVED = {
    "untied": TINY_T5,
    "tied": T5(T5Config(**vars(TINY_T5.config) | {"tie_word_embeddings": True, "feed_forward_proj": "silu"})),
    "scaled and untied": T5(T5Config(**vars(TINY_T5.config) | {"scale_decoder_outputs": True})),
    "tied, not scaled": T5(
        T5Config(**vars(TINY_T5.config) | {"tie_word_embeddings": True, "scale_decoder_outputs": False})
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_the_same_model_and_parameters_come_back(tmp_path, name):
    t5 = SAVED[name]
    params = random_params(t5)
    models.save(tmp_path, t5, params, config={"eos_token_id": 1, "dense_act_fn": "tanh"})
    loaded = models.load(tmp_path)
    written = {"num_decoder_layers": t5.config.decoder_layers, "scale_decoder_outputs": t5.config.output_scale != 1}
    assert loaded.model.config == T5Config(**vars(t5.config) | written)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.config["eos_token_id"] == 1 and "dense_act_fn" not in loaded.config
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.architectures) == ("t5", ["T5ForConditionalGeneration"])
    ours = vars(loaded.model.config) | {"tie_word_embeddings": True}  # which is all that transformers 5 says there
    assert {field: getattr(config, field) for field in ours} == ours


def test_tensors_have_the_names_and_shapes_of_published_checkpoints(tmp_path):
    models.save(tmp_path, TINY_T5, random_params(TINY_T5))
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert len(shapes) == 2 + 2 * 9 + 1 + 2 * 14 + 1 + 2
    assert shapes["shared.weight"] == shapes["lm_head.weight"] == (23, 16)
    assert shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == (8, 2)
    assert shapes["decoder.block.1.layer.1.EncDecAttention.o.weight"] == (16, 12)  # [out, in]
    assert shapes["decoder.block.1.layer.2.DenseReluDense.wi_1.weight"] == (24, 16)
    assert shapes["encoder.block.1.layer.1.layer_norm.weight"] == (16,)
    models.save(tmp_path, SAVED["tied"], random_params(SAVED["tied"]))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_model_that_is_given_its_source_is_not_saved(tmp_path):
    lm, given = TINY_T5.start(random_params(TINY_T5), jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="T5LM has no Hugging Face form"):
        models.save(tmp_path, lm, given)


# Tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spiece(tmp_path):
    """A folder of a model with a `spiece.model` and nothing else to tokenize."""
    variant(tmp_path, "t5-1")
    shutil.copy(GOLDENS / "spiece" / "spiece.model", tmp_path)
    return tmp_path


EXPECTED = json.loads((GOLDENS / "spiece" / "expected.json").read_text(encoding="utf-8"))


def test_spiece_model_reads_as_sentencepiece_does(spiece):
    tokenizer = models.load(spiece).tokenizer
    for case in EXPECTED:
        assert tokenizer(case["text"]).input_ids == case["ids"], case["text"]
        if tokenizer.unk_token_id not in case["ids"]:
            assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded"]
    assert any(tokenizer.unk_token_id in case["ids"] for case in EXPECTED)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 160 and tokenizer("<extra_id_0> <extra_id_99>").input_ids == [159, 60, 1]


@pytest.mark.parametrize(("configured", "tokens"), [("3", 63), ("null", 160)])
def test_the_number_of_sentinels_is_the_configured_one_or_a_hundred(spiece, configured, tokens):
    (spiece / "tokenizer_config.json").write_text(f'{{"extra_ids": {configured}}}')
    tokenizer = models.load(spiece).tokenizer
    assert len(tokenizer) == tokens and tokenizer.convert_tokens_to_ids("<extra_id_0>") == tokens - 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[3]", "must hold a JSON object, but holds a list"),
        ('{"extra_ids": "3"}', "extra_ids must be a whole number from 0 on, but is '3'"),
        ('{"extra_ids": -1}', "extra_ids must be a whole number from 0 on, but is -1"),
        ('{"extra_ids": true}', "extra_ids must be a whole number from 0 on, but is True"),
    ],
)
def test_a_wrong_tokenizer_config_is_named(spiece, text, said):
    (spiece / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        tokenizers.from_spiece(spiece)
    assert said in str(error.value) and str(spiece / "tokenizer_config.json") in str(error.value)


def test_it_is_saved_as_tokenizer_json_and_goes_before_spiece_model(spiece, tmp_path):
    loaded = models.load(spiece)
    models.save(tmp_path / "saved", loaded.model, loaded.params, loaded.tokenizer)
    shutil.copy(spiece / "spiece.model", tmp_path / "saved" / "spiece.model")
    (tmp_path / "saved" / "spiece.model").write_bytes(b"never read")
    again = models.load(tmp_path / "saved")
    for case in EXPECTED:
        assert again.tokenizer(case["text"]).input_ids == case["ids"]
    assert (again.config["pad_token_id"], again.config["eos_token_id"]) == (0, 1)


def field(number, wire, value):
    """A field of a protocol buffer's message, of fewer than 128 bytes."""
    body = bytes([value]) if wire == 0 else bytes([len(value)]) + value if wire == 2 else value
    return bytes([number << 3 | wire]) + body


def piece(text, score, kind):
    return field(1, 2, field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, kind))


WHOLE = piece("<unk>", 0, 2) + piece("▁a", -1.5, 1) + piece("b", -2, 1)
TRAINER_OF_2 = bytes([3 << 3, 1, 40 << 3 & 127 | 128, 40 >> 4, 2])  # unigram; the unknown piece is number 2
TRAINER = bytes([2 << 3 | 2, 5, 3 << 3, 1]) + bytes([40 << 3 & 127 | 128, 40 >> 4, 0])


def test_the_parts_of_the_file_are_read(tmp_path):
    (tmp_path / "spiece.model").write_bytes(WHOLE + TRAINER + field(3, 2, field(2, 2, b"table")) + field(9, 2, b"x"))
    pieces, kinds, unknown, charsmap = tokenizers.read_spiece(tmp_path / "spiece.model")
    assert pieces == [("<unk>", 0.0), ("▁a", -1.5), ("b", -2.0)]
    assert (kinds, unknown, charsmap) == ([2, 1, 1], 0, b"table")


@pytest.mark.parametrize(
    "content", [b"", b"no model at all", WHOLE[:-3], WHOLE + b"\xff", piece("a", 0, 1)[:4], b"\x0a\x02\x0a\x7f"]
)
def test_a_damaged_file_is_an_error(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"spiece\.model is damaged, or no SentencePiece model"):
        tokenizers.from_spiece(tmp_path)


def test_another_kind_of_model_is_an_error(tmp_path):
    (tmp_path / "spiece.model").write_bytes(WHOLE + field(2, 2, field(3, 0, 2)))
    with pytest.raises(ValueError, match=r"must hold a unigram model \(kind 1\), but its kind is 2"):
        tokenizers.from_spiece(tmp_path)


UNUSED = [("<pad>", 0, 3), ("</s>", 0, 3), ("<unk>", 0, 2), ("▁ab", -1, 5), ("▁a", -2, 1), ("b", -3, 1), ("c", -1, 5)]


def test_no_text_is_cut_into_a_piece_that_is_not_used(tmp_path):
    """As sentencepiece 0.2.3 cuts it. Such a piece still has its text; "c", which no other piece has, is unknown."""
    (tmp_path / "spiece.model").write_bytes(b"".join(piece(*each) for each in UNUSED) + field(2, 2, TRAINER_OF_2))
    tokenizer = tokenizers.from_spiece(tmp_path)
    assert [tokenizer(text).input_ids for text in ("ab", "ab a", "abc")] == [[4, 5, 1], [4, 5, 4, 1], [4, 5, 2, 1]]
    assert tokenizer.decode([4, 3, 6]) == "a abc" and tokenizer.decode([3]) == "ab"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("abc").input_ids == [4, 5, 2, 1] and again.decode([4, 3, 6]) == "a abc"
