import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data import bpe

TEXTS = [
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate.",
    "In the beginning God created the heaven and the earth. And the earth was without form, and void.",
    "Of Man's first disobedience, and the fruit of that forbidden tree, whose mortal taste ...",
]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(TEXTS, vocab_size=300)


def test_entries(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.id_to_token(0) == bpe.END_OF_TEXT
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0].encode())


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(ids) <= len(text.encode())


@pytest.mark.parametrize("text", [" two  spaces ", "a . b ,c", "\n\n\tx\r\n", "naïve 日本語 🙂 \x00", "don't I'M"])
def test_spaces_and_signs_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_is_deterministic(tokenizer):
    assert bpe.train(TEXTS, vocab_size=300).to_str() == tokenizer.to_str()


def test_stream(tokenizer):
    texts = ["And the earth", "", "day"]
    stream = bpe.stream(tokenizer, texts)
    first, last = (tokenizer.encode(text).ids for text in (texts[0], texts[2]))
    assert stream.tolist() == [0, *first, 0, 0, *last, 0]
    assert stream.dtype == np.uint16
    assert tokenizer.decode(stream.tolist()) == "And the earthday"
    assert bpe.stream(tokenizer, []).tolist() == [0]


def test_stream_of_a_large_vocabulary(tokenizer, monkeypatch):
    large = type("Large", (), {"get_vocab_size": lambda self: 2**17, "token_to_id": lambda self, token: 2**16 + 5})()
    large.encode_batch = tokenizer.encode_batch
    assert bpe.stream(large, []).tolist() == [2**16 + 5]
    assert bpe.stream(large, ["day"]).dtype == np.int32


def test_transformers_loads_what_is_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    bpe.save(tokenizer, tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in tmp_path.iterdir()}
    text = "And God said , naïve 🙂 don 't"
    for loader in (PreTrainedTokenizerFast, AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.bos_token_id == loaded.eos_token_id == 0
        assert len(loaded) == 300
        ids = loaded.encode(text)
        assert ids == tokenizer.encode(text).ids
        assert loaded.decode(ids) == text
        assert loaded.decode([0]) == bpe.END_OF_TEXT
