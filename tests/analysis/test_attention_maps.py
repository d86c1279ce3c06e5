"""The maps of one text, with the tokens of their rows and columns."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl_llm import models
from jaxrl_llm.analysis.attention import START, attention_maps, strongest_links
from jaxrl_llm.data import number_names
from jaxrl_llm.models import GPT2, T5, GPT2Config, Loaded, T5Config
from tests.conftest import random_params

pytestmark = pytest.mark.slow

TOKENIZER = transformers.PreTrainedTokenizerFast(
    tokenizer_object=number_names.build_tokenizer(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
)
SIZE = TOKENIZER.vocab_size
CONFIG = {"eos_token_id": number_names.EOS_ID}  # the size of the vocabulary is the model's
SOURCE, TARGET = ["forty", "two", "</s>"], ["zwei", "und", "vierzig", "</s>"]


def loaded(model):
    return Loaded(model, random_params(model), TOKENIZER, CONFIG)


@pytest.fixture(scope="module")
def t5():
    size = {"d_model": 12, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
    return loaded(T5(T5Config(vocab_size=SIZE, **size)))


@pytest.mark.parametrize(
    ("kind", "queries", "keys", "layers"),
    [
        ("cross", TARGET, SOURCE, 1),
        ("encoder", SOURCE, SOURCE, 2),
        ("decoder", [START, *TARGET[:-1]], [START, *TARGET[:-1]], 1),
    ],
)
def test_rows_and_columns_have_their_tokens(t5, kind, queries, keys, layers):
    """Cross-attention's row is named after the word that it predicts, the decoder's own after the one it reads."""
    maps = attention_maps(t5, "forty-two", target="zwei-und-vierzig", kind=kind)
    assert (maps.queries, maps.keys, maps.target) == (queries, keys, "zwei-und-vierzig")
    assert maps.weights.shape == (layers, 2, len(queries), len(keys)) and maps.allowed.shape == maps.weights.shape[2:]
    np.testing.assert_allclose(maps.weights.sum(axis=-1), 1, atol=1e-5)
    assert ((maps.weights > 0) <= maps.allowed).all() and maps.allowed.all() == (kind != "decoder")
    source, target = (jnp.asarray([TOKENIZER(text)["input_ids"]]) for text in ("forty-two", "zwei-und-vierzig"))
    read = jnp.concatenate([jnp.zeros((1, 1), jnp.int32), target[:, :-1]], axis=1)
    expected = getattr(t5.model.attention(t5.params, source, read), kind)[:, 0]
    np.testing.assert_allclose(maps.weights, expected, atol=1e-6)


def test_a_generated_target_ends_itself_or_at_the_limit(t5):
    maps = attention_maps(t5, "forty-two", max_new_tokens=3)
    assert maps.kind == "cross" and 1 <= len(maps.queries) <= 3
    assert "</s>" not in maps.target


def test_the_strongest_link_of_each_query_that_has_a_choice():
    maps = attention_maps(
        loaded(GPT2(GPT2Config(vocab_size=SIZE, n_positions=8, n_embd=8, n_layer=2, n_head=2))), "six"
    )
    assert maps.queries == maps.keys == ["six", "</s>"] and maps.target is None
    (link,) = strongest_links(maps, layers=[0, 1], heads=[0, 1])
    mean = maps.weights[:, :, 1].mean(axis=(0, 1))
    assert (link.query, link.key) == (1, mean.argmax()) and link.weight == pytest.approx(mean.max())
    (second,) = strongest_links(maps, layers=[1], heads=[0])
    assert second.weight == pytest.approx(maps.weights[1, 0, 1].max())


def test_a_head_that_always_looks_at_one_key_does_not_hide_the_others(t5):
    maps = attention_maps(t5, "forty-two", target="zwei-und-vierzig")
    saturated = np.eye(3)[[0, 0, 0, 0]]
    aligned = 0.9 * np.eye(3)[[1, 1, 2, 2]] + 0.05
    maps = maps._replace(weights=np.stack([saturated, aligned, aligned])[None])
    links = strongest_links(maps, layers=[0], heads=[0, 1, 2])
    assert [link.key for link in links] == [1, 1, 2, 2]
    assert [link.weight for link in links] == pytest.approx([2 * 0.95 / 3] * 4)
    assert [link.key for link in strongest_links(maps, layers=[0], heads=[0])] == [0] * 4


def test_the_source_is_put_as_translation_puts_it(t5):
    declared = dataclasses.replace(t5, config=CONFIG | {"translation": {"prefix": "six "}})
    maps, plain = (attention_maps(t5, source) for t5, source in ((declared, "forty-two"), (t5, "six forty-two")))
    assert maps.keys == ["six", *SOURCE] and (maps.source, maps.target) == ("forty-two", plain.target)
    np.testing.assert_allclose(maps.weights, plain.weights, atol=1e-6)


def test_what_cannot_be_shown_is_refused(t5):
    with pytest.raises(ValueError, match="kind must be one of cross, encoder, decoder for this model, but is self"):
        attention_maps(t5, "six", kind="self")
    with pytest.raises(ValueError, match="must have a tokenizer"):
        attention_maps(dataclasses.replace(t5, tokenizer=None), "six")
    with pytest.raises(ValueError, match="the text, 'six hello': the model's tokenizer does not know 'hello'"):
        attention_maps(t5, "six hello")
    with pytest.raises(ValueError, match="the target, 'hello': the model's tokenizer does not know 'hello'"):
        attention_maps(t5, "six", target="hello")
    with pytest.raises(ValueError, match="the target is empty"):
        attention_maps(t5, "six", target="")


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-gpt2"])
def test_an_empty_text_is_refused(name):
    with pytest.raises(ValueError, match="the text is empty"):
        attention_maps(models.load(name), " ")
