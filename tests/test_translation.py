"""Translation: unknown words are refused, and a decoder-only model's translation is one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl_llm import models, translation
from jaxrl_llm.data import bpe
from jaxrl_llm.models import GPT2, GPT2Config, Loaded


@pytest.fixture(scope="module")
def tiny_t5():
    return models.load("tiny-t5")


@pytest.mark.parametrize(
    ("sentence", "unknown"),
    [
        ("twenty hello", "'hello'"),
        ("one million", "'million'"),
        ("one hundred and five", "'and'"),
        ("twenty-one.", "'one.'"),
        ("Hello hello, hello", "'Hello', 'hello,', 'hello'"),
        ("hello world", "'hello', 'world'"),
    ],
)
def test_a_sentence_with_an_unknown_word_is_refused_by_its_number(tiny_t5, sentence, unknown):
    with pytest.raises(ValueError) as error:
        translation.translate(tiny_t5, ["one", sentence, "two"])
    assert str(error.value) == f"sentence 2, {sentence!r}: the model's tokenizer does not know {unknown}."


def test_an_empty_sentence_is_refused_by_its_number(tiny_t5):
    with pytest.raises(ValueError, match="sentence 3 is empty"):
        translation.translate(tiny_t5, ["one", "two", " "])


def test_an_unknown_word_of_the_prefix_is_named(tiny_t5):
    with pytest.raises(ValueError, match="sentence 1, 'two': the model's tokenizer does not know 'translate:'"):
        translation.translate(tiny_t5, ["two"], form=translation.Form(prefix="translate: "))


def test_a_tokenizer_in_python_does_not_name_the_word(tiny_t5):
    class Slow:
        is_fast, unk_token_id, bos_token_id, eos_token_id = False, 2, None, 1

        def __call__(self, text):
            return {"input_ids": [2, 1]}

    with pytest.raises(ValueError, match="the text, 'x': the model's tokenizer does not know a word of it"):
        translation.known_tokens(Slow(), "x")


# Decoder-only models --------------------------------------------------------------------------------------------------

SIZE, CONTEXT = 270, 32


def byte_tokenizer():
    """GPT-2's kind: all that is special is one token, the unknown one too."""
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe.train(["the cat sat"] * 3, SIZE), **roles)


def writer(tokenizer, sentence, written):
    """A GPT-2 that goes on after `sentence` with `written` and the end: each token depends on its place alone."""
    read, new = (tokenizer(each)["input_ids"] for each in (f"{sentence}\n", written))
    lm = GPT2(GPT2Config(SIZE, CONTEXT, n_embd=CONTEXT, n_layer=1, n_head=1, tie_word_embeddings=False))
    head = np.zeros((CONTEXT, SIZE), np.float32)
    for place, token in enumerate([*new, tokenizer.eos_token_id], len(read) - 1):
        head[place, token] = 1
    ones = {"wpe": np.eye(CONTEXT), "lm_head": head}

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        value = next((value for key, value in ones.items() if key in name), float("scale" in name))
        return jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape.shape)

    params = jax.tree_util.tree_map_with_path(leaf, lm.abstract_params)
    return Loaded(lm, params, tokenizer, {"vocab_size": SIZE})


def test_a_decoder_only_model_translates_to_the_end_of_its_line():
    tokenizer = byte_tokenizer()
    for written, expected in (("mat\nhat\n", "mat"), (" mat sat", "mat sat")):
        loaded = writer(tokenizer, "the cat", written)
        for num_beams in (1, 2):
            assert translation.translate(loaded, ["the cat"], num_beams=num_beams, max_new_tokens=16) == [expected]


def test_an_unknown_token_that_is_also_the_end_says_nothing():
    loaded = writer(byte_tokenizer(), "the cat<|endoftext|>", "mat")
    assert translation.translate(loaded, ["the cat<|endoftext|>"], max_new_tokens=8) == ["mat"]
