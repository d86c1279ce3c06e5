import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxrl_llm.data import number_names
from jaxrl_llm.data.number_names import EOS_ID, LIMIT, PAD_ID, UNK_ID, pair

TOKENIZER = number_names.build_tokenizer()


@given(st.integers(0, LIMIT - 1))
def test_a_token_is_a_word_and_decoding_writes_it_as_before(number):
    names = pair(number)
    for words, text in ((names.source, names.source_text), (names.target, names.target_text)):
        encoding = TOKENIZER.encode(text)
        assert encoding.tokens == [*words, "</s>"]
        assert encoding.ids[-1] == EOS_ID and PAD_ID not in encoding.ids and UNK_ID not in encoding.ids
        assert TOKENIZER.decode(encoding.ids) == text


def test_special_tokens_stand_where_t5_has_them():
    assert [TOKENIZER.id_to_token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    words = len(number_names.ENGLISH_WORDS) + len(number_names.GERMAN_WORDS)
    assert TOKENIZER.get_vocab_size() == 3 + words == 65


def test_what_is_written_otherwise_is_read_alike():
    expected = TOKENIZER.encode("three hundred thirty-five").ids
    assert TOKENIZER.encode("Three  hundred thirty five\n").ids == expected
    decomposed = unicodedata.normalize("NFD", "FÜNF-und-dreißig")
    assert TOKENIZER.encode(decomposed).tokens == ["fünf", "und", "dreißig", "</s>"]
    assert TOKENIZER.encode("two million").ids == [TOKENIZER.token_to_id("two"), UNK_ID, EOS_ID]
    assert TOKENIZER.encode("").ids == [EOS_ID]


@pytest.mark.parametrize("config", [None, '{"model_type": "t5"}'])
def test_transformers_loads_it(tmp_path, config):
    from transformers import AutoTokenizer

    number_names.save_tokenizer(TOKENIZER, tmp_path)
    if config:
        (tmp_path / "config.json").write_text(config)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [pair(n).target_text for n in (0, 21, 345_621)]
    batch = loaded(texts, padding=True)
    assert [[*TOKENIZER.encode(text).ids] for text in texts] == [
        [i for i, real in zip(*row, strict=True) if real]
        for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert [loaded.decode(row, skip_special_tokens=True) for row in batch["input_ids"]] == texts
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (PAD_ID, EOS_ID, UNK_ID)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.decode(plain.encode(texts[1]).ids) == texts[1]
