"""Translating texts: batches and padding change nothing, beams are beam search's, a line is a line, and refusals."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl_llm import models, text, translation
from jaxrl_llm.analysis.attention import attention_maps
from jaxrl_llm.data import bpe
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.models import GPT2, T5, GPT2Config, Loaded
from jaxrl_llm.translation import Form, translate
from tests.conftest import TINY_T5, random_params

pytestmark = pytest.mark.slow

NAMES = [
    "seven",
    "three hundred twenty-one thousand nine hundred eighty-seven",
    "twelve",
    "ninety-nine thousand",
    "zero",
]
GERMAN = ["sieben", "drei-hundert-ein-und-zwanzig-tausend-neun-hundert-sieben-und-achtzig", "zwölf"]
GERMAN += ["neun-und-neunzig-tausend", "null"]


@pytest.fixture(scope="module")
def tiny_t5():
    return models.load("tiny-t5")


@pytest.mark.parametrize("batch_size", [2, 5, 32])
def test_sentences_keep_their_order_in_batches_of_any_size(tiny_t5, batch_size):
    assert translate(tiny_t5, NAMES, batch_size=batch_size) == GERMAN


def test_no_sentences_have_no_translations(tiny_t5):
    assert translate(tiny_t5, []) == []


def test_beams_are_those_of_beam_search(tiny_t5):
    """Tokens of the first hypothesis, with the length penalty that was asked for."""
    rows = [tiny_t5.tokenizer(name)["input_ids"] for name in NAMES[:2]]
    tasks = list(translation.conditionals(tiny_t5, rows))
    assert len(tasks) == 1 and tasks[0].prompts.shape == (2, 1)
    source = np.zeros((2, 16), np.int32)  # padded on the right here: padding of either side is one thing
    for row, tokens in zip(source, rows, strict=True):
        row[: len(tokens)] = tokens
    lm, params = tiny_t5.model.start(tiny_t5.params, jnp.asarray(source), jnp.asarray(source) > 0)
    prompts = tiny_t5.model.decoder_prompts(2)
    for penalty in (0.0, -4.0):
        beams = beam_search(
            lm, params, prompts, num_beams=3, max_new_tokens=4, length_penalty=penalty, eos_id=1
        )  # fmt: skip
        found = translation.decoded(tasks[0], num_beams=3, length_penalty=penalty, limit=4, eos=[1])
        expected = [np.asarray(beams.tokens[i, 0])[np.asarray(beams.mask[i, 0])].tolist() for i in range(2)]
        assert found == expected


def test_an_eos_that_is_an_ordinary_token_of_the_tokenizer_is_no_part_of_the_translation(tiny_t5):
    config, source = tiny_t5.config, "twenty"
    last = tiny_t5.tokenizer(translate(tiny_t5, [source])[0], add_special_tokens=False)["input_ids"][-1]
    other = dataclasses.replace(tiny_t5, config={**config, "eos_token_id": [config["eos_token_id"], last]})
    assert translate(other, [source]) == [""]
    assert attention_maps(other, source).target == ""


def test_the_form_is_what_is_asked_for_then_what_the_model_declares_then_plain(tiny_t5):
    gpt2 = models.load("tiny-gpt2")
    assert Form.of(tiny_t5) == Form("", "") and Form.of(gpt2) == Form("", "\n")
    declared = dataclasses.replace(gpt2, config={**gpt2.config, "translation": {"prefix": "a ", "suffix": " b"}})
    assert Form.of(declared) == Form("a ", " b")
    assert Form.of(declared, suffix="") == Form("a ", "") and Form.of(declared, prefix="c") == Form("c", " b")


def test_a_model_without_tokenizer_is_refused(tiny_t5):
    with pytest.raises(ValueError, match="has no tokenizer files"):
        translate(dataclasses.replace(tiny_t5, tokenizer=None), ["one"])


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


def test_an_unknown_word_is_read_as_the_unknown_token_when_asked(tiny_t5):
    tokenizer = tiny_t5.tokenizer
    tokens = translation.known_tokens(tokenizer, "twenty hello", allow_unknown=True)
    assert tokens == text.encode(tokenizer, "twenty hello") and tokenizer.unk_token_id in tokens
    found = translate(tiny_t5, ["one", "twenty hello", "two"], allow_unknown=True)
    assert (found[0], found[2]) == ("eins", "zwei") and len(found) == 3


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
    return Loaded(lm, params, tokenizer, {})


def test_a_decoder_only_model_translates_to_the_end_of_its_line():
    tokenizer = byte_tokenizer()
    for written, expected in (("mat\nhat\n", "mat"), (" mat sat", "mat sat")):
        loaded = writer(tokenizer, "the cat", written)
        for num_beams in (1, 2):
            assert translation.translate(loaded, ["the cat"], num_beams=num_beams, max_new_tokens=16) == [expected]


def test_a_sentence_that_does_not_fit_the_context_is_refused_by_its_number():
    loaded = writer(byte_tokenizer(), "the cat", "mat\n")
    length = loaded.model.max_length - 3
    said = rf"^sentence 3 has {length} tokens, and 4 new ones do not fit with it in the model's context of {length + 3}"
    with pytest.raises(ValueError, match=said):
        translation.translate(loaded, ["the", "cat", "q" * (length - 1)], max_new_tokens=4, batch_size=1)


def test_an_unknown_token_that_is_also_the_end_says_nothing():
    loaded = writer(byte_tokenizer(), "the cat<|endoftext|>", "mat")
    assert translation.translate(loaded, ["the cat<|endoftext|>"], max_new_tokens=8) == ["mat"]


# Models from folders --------------------------------------------------------------------------------------------------


def mgpt(folder):
    """mGPT's kind: GPT-2's architecture with special tokens of its own, and more embeddings than tokens."""
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe.train(["the cat sat"] * 3, SIZE), **roles)
    lm = GPT2(GPT2Config(len(tokenizer) + 6, 64, n_embd=16, n_layer=1, n_head=2))
    models.save(folder, lm, random_params(lm), tokenizer)


def mt5(folder):
    """MT5ForConditionalGeneration of random weights, with a SentencePiece model."""
    lm = T5(dataclasses.replace(TINY_T5.config, model_type="mt5", vocab_size=1300, decoder_start_token_id=0))
    models.save(folder, lm, random_params(lm))
    shutil.copy(Path(__file__).parent / "goldens" / "spiece" / "spiece.model", folder)


@pytest.mark.parametrize("write", [mgpt, mt5])
def test_models_of_a_folder_translate_greedily_by_the_most_probable_tokens(write, tmp_path):
    """Token by token without a cache, from the prompt form and the first token of the decoder."""
    write(tmp_path)
    loaded, form = models.load(tmp_path), Form("in words ", " is")
    source = jnp.asarray([text.encode(loaded.tokenizer, "in words the cat is")])
    lm, params, tokens = loaded.model, loaded.params, source
    if isinstance(lm, T5):
        assert lm.config.model_type == "mt5" and lm.config.output_scale == 1
        lm, params = lm.start(params, source, jnp.ones(source.shape, bool))
        tokens = jnp.zeros((1, 1), jnp.int32)
    first = tokens.shape[1]
    tokens = jnp.pad(tokens, ((0, 0), (0, 5)))
    apply = jax.jit(lm.apply)
    for place in range(first, first + 5):
        tokens = tokens.at[0, place].set(jnp.argmax(apply(params, tokens)[0][0, place - 1]))
    ends = text.eos_ids(loaded.tokenizer, loaded.config)
    new = list(itertools.takewhile(lambda token: token not in ends, tokens[0, first:].tolist()))
    expected = loaded.tokenizer.decode(new, skip_special_tokens=True).strip()
    if not isinstance(loaded.model, T5):
        expected = expected.split("\n")[0].strip()
    assert new and translate(loaded, ["the cat"], form=form, max_new_tokens=5) == [expected]
