"""Translating texts: batches and padding change nothing, beams are beam search's, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models, translation
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.translation import Form, translate

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


def test_the_form_is_what_is_asked_for_then_what_the_model_declares_then_plain(tiny_t5):
    gpt2 = models.load("tiny-gpt2")
    assert Form.of(tiny_t5) == Form("", "") and Form.of(gpt2) == Form("", "\n")
    declared = dataclasses.replace(gpt2, config={**gpt2.config, "translation": {"prefix": "a ", "suffix": " b"}})
    assert Form.of(declared) == Form("a ", " b")
    assert Form.of(declared, suffix="") == Form("a ", "") and Form.of(declared, prefix="c") == Form("c", " b")


@pytest.mark.parametrize(
    ("sentences", "said"),
    [(["one", " "], "a sentence to translate is empty"), (["one", "hello"], "knows no word of 'hello'")],
)
def test_what_cannot_be_translated_is_refused(tiny_t5, sentences, said):
    with pytest.raises(ValueError, match=said):
        translate(tiny_t5, sentences)


def test_a_model_without_tokenizer_is_refused(tiny_t5):
    with pytest.raises(ValueError, match="has no tokenizer files"):
        translate(dataclasses.replace(tiny_t5, tokenizer=None), ["one"])
