"""T5s as they are found in the wild: the goldens, rewritten; saving; and the tokenizers beside them."""

import dataclasses
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl_llm import models
from jaxrl_llm.models import loading, tokenizers
from jaxrl_llm.models.t5 import T5
from tests.conftest import TINY_T5, random_params
from tests.models.wild import ABSENT, GOLDENS, variant

# Configurations -------------------------------------------------------------------------------------------------------


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
    name: T5(dataclasses.replace(TINY_T5.config, **changes))
    for name, changes in {
        "untied": {},
        "tied": {"tie_word_embeddings": True, "feed_forward_proj": "silu"},
        "scaled and untied": {"scale_decoder_outputs": True},
        "tied, not scaled": {"tie_word_embeddings": True, "scale_decoder_outputs": False},
        "mt5": {"model_type": "mt5"},
        "tied mt5": {"model_type": "mt5", "tie_word_embeddings": True},
        "umt5": {"model_type": "umt5"},
        "tied umt5": {"model_type": "umt5", "tie_word_embeddings": True},
    }.items()
}


@pytest.mark.parametrize("name", SAVED)
def test_the_same_model_and_parameters_come_back_also_after_transformers_5_has_saved_it_again(tmp_path, name):
    """It says that every head is tied, and reads one with other values than the embedding's as a head of its own."""
    t5, params = SAVED[name], random_params(SAVED[name])
    models.save(tmp_path, t5, params, config={"eos_token_id": 1, "dense_act_fn": "tanh"})
    written = {"num_decoder_layers": t5.config.decoder_layers, "scale_decoder_outputs": t5.config.output_scale != 1}
    for says in ({}, {"tie_word_embeddings": True}):
        saved = json.loads((tmp_path / "config.json").read_text()) | says
        (tmp_path / "config.json").write_text(json.dumps(saved))
        loaded = models.load(tmp_path)
        assert loaded.model.config == dataclasses.replace(t5.config, **written)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.config["eos_token_id"] == 1 and "dense_act_fn" not in loaded.config
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    family = t5.config.model_type
    assert (config.model_type, config.architectures) == (family, [f"{family.upper()}ForConditionalGeneration"])
    ours = vars(loaded.model.config) | {"tie_word_embeddings": True}  # which is all that transformers 5 says there
    assert {field: getattr(config, field) for field in ours} == ours


@pytest.mark.parametrize("model_type", ["mt5", "umt5"])
def test_kin_of_t5_have_defaults_of_their_own(tmp_path, model_type):
    """A umT5 that is silent about its head is scaled, as in transformers; a mT5 never is."""
    t5 = SAVED[model_type]
    models.save(tmp_path, t5, random_params(t5))
    saved = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": 3}
    silent = ("feed_forward_proj", "decoder_start_token_id", "scale_decoder_outputs", "tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps({name: saved[name] for name in saved if name not in silent}))
    config = models.load(tmp_path).model.config
    assert (config.feed_forward_proj, config.decoder_start_token_id) == ("gated-gelu", 0)
    assert (config.tie_word_embeddings, config.output_scale == 1) == (False, model_type == "mt5")


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


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ('{"extra_ids": 3}', 63),
        ('{"extra_ids": null}', 160),
        ('{"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>", "<sep>"]}', 62),
    ],
)
def test_the_number_of_sentinels_is_the_configured_one_or_a_hundred(spiece, settings, tokens):
    (spiece / "tokenizer_config.json").write_text(settings)
    tokenizer = tokenizers.from_spiece(spiece)
    assert len(tokenizer) == tokens and tokenizer.convert_tokens_to_ids("<extra_id_0>") == tokens - 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[3]", "must hold a JSON object, but holds a list"),
        *(
            (f'{{"extra_ids": {written}}}', f"extra_ids must be a whole number from 0 on, but is {read}")
            for written, read in (('"3"', "'3'"), ("-1", "-1"), ("true", "True"))
        ),
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


def flag(number, value):
    """A field of a number above 15."""
    return bytes([number << 3 & 127 | 128, number >> 4, value])


def written(folder, *parts):
    (folder / "spiece.model").write_bytes(b"".join(parts))
    return folder


WHOLE = piece("<unk>", 0, 2) + piece("▁a", -1.5, 1) + piece("b", -2, 1)
UNIGRAM = bytes([3 << 3, 1])


def test_the_parts_of_the_file_are_read(tmp_path):
    trainer, rules = field(2, 2, UNIGRAM + flag(40, 0)), field(3, 2, field(2, 2, b"table"))
    expected = tokenizers.Spiece([("<unk>", 0.0), ("▁a", -1.5), ("b", -2.0)], [2, 1, 1], 0, b"table")
    found = tokenizers.read_spiece(written(tmp_path, WHOLE, trainer, rules, field(9, 2, b"x")) / "spiece.model")
    assert found == expected and (found.prefix, found.collapse, found.byte_fallback) == (True, True, False)
    trainer, rules = field(2, 2, flag(35, 1)), field(3, 2, field(3, 0, 0) + field(4, 0, 0))
    found = tokenizers.read_spiece(written(tmp_path, WHOLE, trainer, rules) / "spiece.model")
    assert (found.prefix, found.collapse, found.byte_fallback) == (False, False, True)


def test_a_tokenizer_model_of_merges_alone_is_read(tmp_path):
    """As Llama 2's: the same tokens as the GGUF form of the same pieces."""
    words = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "é"]
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *((f"<0x{byte:02X}>", 0, 6) for byte in range(256))]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    content = b"".join(piece(*each) for each in pieces) + field(2, 2, bytes([3 << 3, 2]))
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    tokenizer = loading.load_tokenizer(tmp_path)
    ids = {text: index for index, (text, _, _) in enumerate(pieces)}
    assert tokenizer("ab a é\n").input_ids == [1, ids["▁ab"], ids["▁a"], ids["▁"], ids["é"], ids["<0x0A>"]]
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (2, "x")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # Llama 3's form, tiktoken's
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged, or no SentencePiece model"):
        loading.load_tokenizer(tmp_path)


def test_what_stands_beside_a_tokenizer_model_counts(tmp_path):
    """Tokens that a fine-tuned model adds, and which of them ends a text; a tokenizer saved by the slow class has them
    in two files.
    """
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *((word, -1.0, 1) for word in ("▁", "a", "▁a"))]
    content = b"".join(piece(*each) for each in pieces) + field(2, 2, bytes([3 << 3, 2]))
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 7, "<|begin|>": 6}')
    (tmp_path / "chat_template.jinja").write_text("the template")
    thought = {"8": {"content": "think", "special": False}, "2": {"content": "</s>", "special": True}}
    begin = {"6": {"content": "<|begin|>", "special": True, "rstrip": True}}
    config = {"eos_token": {"content": "<|end|>"}, "add_bos_token": False, "added_tokens_decoder": thought | begin}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = loading.load_tokenizer(tmp_path)
    assert tokenizer("<|begin|>  a<|end|>think").input_ids == [6, 5, 7, 8]
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template) == ("<|end|>", "<s>", "the template")
    assert tokenizer.decode([6, 5, 7, 8], skip_special_tokens=True) == "athink"
    (tmp_path / "chat_template.jinja").unlink()
    config["chat_template"] = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert loading.load_tokenizer(tmp_path).chat_template == {"default": "x", "tool_use": "y"}
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 9}')
    with pytest.raises(ValueError, match=r"must give the added token 'think' the id 7, but it has 8"):
        loading.load_tokenizer(tmp_path)
    config |= {"added_tokens_decoder": {"six": "<|end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must map ids to added tokens, but .*six"):
        loading.load_tokenizer(tmp_path)


def test_a_tokenizer_model_of_merges_collapses_spaces_if_it_says_so(tmp_path):
    pieces = [("<unk>", 0, 2), *((word, -1.0, 1) for word in ("▁", "a", "▁a"))]
    content = b"".join(piece(*each) for each in pieces) + field(2, 2, bytes([3 << 3, 2]))
    found = {}
    for collapse in (0, 1):
        (tmp_path / "tokenizer.model").write_bytes(content + field(3, 2, field(4, 0, collapse)))
        found[collapse] = loading.load_tokenizer(tmp_path)("  a  a ").input_ids
    assert found == {0: [1, 1, 3, 1, 3, 1], 1: [3, 3]}


def test_tokens_added_to_a_spiece_model_count(tmp_path):
    folder = written(tmp_path, WHOLE, field(2, 2, UNIGRAM + flag(40, 0)))
    tokens = {"3": {"content": "<extra_id_0>", "special": True}, "4": {"content": "{", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 1, "added_tokens_decoder": tokens}))
    tokenizer = loading.load_tokenizer(folder)
    assert tokenizer("a{<extra_id_0>").input_ids == [1, 4, 3]
    assert tokenizer.decode([1, 4, 3], skip_special_tokens=True) == "a{"


DAMAGED = (b"", b"no model at all", WHOLE[:-3], WHOLE + b"\xff", piece("a", 0, 1)[:4], b"\x0a\x02\x0a\x7f")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((content, r"spiece\.model is damaged, or no SentencePiece model") for content in DAMAGED),
        (WHOLE + field(2, 2, field(3, 0, 2)), r"must hold a unigram model \(kind 1\), but its kind is 2"),
        (WHOLE + field(2, 2, flag(24, 1)), "must put ▁ before words, but puts it behind them"),
    ],
)
def test_a_damaged_file_or_another_kind_of_model_is_an_error(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        tokenizers.from_spiece(written(tmp_path, content))


UNUSED = [("<pad>", 0, 3), ("</s>", 0, 3), ("<unk>", 0, 2), ("▁ab", -1, 5), ("▁a", -2, 1), ("b", -3, 1), ("c", -1, 5)]


def test_no_text_is_cut_into_a_piece_that_is_not_used(tmp_path):
    """As sentencepiece 0.2.3 cuts it. Such a piece still has its text; "c", which no other piece has, is unknown."""
    trainer = field(2, 2, UNIGRAM + flag(40, 2))  # the unknown piece is number 2
    tokenizer = tokenizers.from_spiece(written(tmp_path, *(piece(*each) for each in UNUSED), trainer))
    assert [tokenizer(text).input_ids for text in ("ab", "ab a", "abc")] == [[4, 5, 1], [4, 5, 4, 1], [4, 5, 2, 1]]
    assert tokenizer.decode([4, 3, 6]) == "a abc" and tokenizer.decode([3]) == "ab"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("abc").input_ids == [4, 5, 2, 1] and again.decode([4, 3, 6]) == "a abc"


BYTES = [*UNUSED[:3], *((f"<0x{byte:02X}>", 0, 6) for byte in range(256))]
MT5 = [*BYTES, ("▁", -2, 1), *((letter, -3, 1) for letter in "<0x41>"), ("▁<extra_id_0>", 0, 4)]


@pytest.mark.parametrize("model_type", ["mt5", "umt5"])
def test_unknown_characters_become_their_bytes_and_sentinels_among_the_pieces_are_the_only_ones(tmp_path, model_type):
    """As sentencepiece does; a text that looks like the piece of a byte is not one."""
    trainer = field(2, 2, UNIGRAM + flag(35, 1) + flag(40, 2))
    t5 = SAVED[model_type]
    models.save(
        tmp_path,
        t5,
        random_params(t5),
        tokenizers.from_spiece(written(tmp_path, *(piece(*each) for each in MT5), trainer)),
    )
    for tokenizer in (tokenizers.from_spiece(tmp_path), models.load(tmp_path).tokenizer):
        assert len(tokenizer) == len(MT5) == tokenizer.convert_tokens_to_ids("▁<extra_id_0>") + 1
        assert tokenizer("é <0x41> <extra_id_0>").input_ids == [259, 3 + 0xC3, 3 + 0xA9, 259, *range(260, 266), 266, 1]
        assert tokenizer.decode([259, 3 + 0xC3, 3 + 0xA9, 260]) == "é<"


@pytest.mark.parametrize(
    ("prefix", "collapse", "text", "pieces"),
    [
        (True, False, " a  b", "▁ ▁ a ▁ ▁ b"),
        (False, True, " a  b ", "a ▁ b"),
        (False, False, " a  b ", "▁ a ▁ ▁ b ▁"),
    ],
)
def test_spaces_are_kept_where_the_file_says_so(tmp_path, prefix, collapse, text, pieces):
    rules = field(3, 2, field(3, 0, prefix) + field(4, 0, collapse))
    trainer = field(2, 2, UNIGRAM + flag(40, 2))
    known = [*UNUSED[:3], ("▁", -1, 1), ("a", -1, 1), ("b", -1, 1)]
    tokenizer = tokenizers.from_spiece(written(tmp_path, *(piece(*each) for each in known), trainer, rules))
    found = tokenizer(text).input_ids[:-1]
    assert tokenizer.convert_ids_to_tokens(found) == pieces.split()
    assert tokenizer.decode(found) == ("a b" if collapse else text)
