"""A tiny GPT-2 of random weights whose tokenizer knows the letters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl_llm.analysis.sycophancy.questions import split
from jaxrl_llm.data import bpe
from jaxrl_llm.models import Loaded
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config

TEMPLATE = (
    "{% for message in messages %}<{{ message['content'] }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
)
CONTEXT = 200


def tokenizer(texts=("I agree or disagree with the claim",) * 3, *, template=None):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe.train(list(texts), 300),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template=template,
    )


def make_model():
    lm = GPT2(GPT2Config(vocab_size=300, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), lm.abstract_params)
    return Loaded(lm, params, tokenizer(), {"vocab_size": 300})


def biographies_and_queries(items):
    """Of items all of which split."""
    _, starts, _ = split(items)
    return [(item.question[: starts[place]], item.parts.before[starts[place] :]) for place, item in enumerate(items)]


def logits_of(loaded, rows):
    """Of rows of tokens, each by itself but padded on the right to the context: one program for all of a number."""
    padded = np.asarray([[*row, *[0] * CONTEXT][:CONTEXT] for row in rows])
    return np.asarray(_apply(loaded.model, loaded.params, padded))


@functools.partial(jax.jit, static_argnums=0)
def _apply(lm, params, tokens):
    return lm.apply(params, tokens)[0]


@pytest.fixture(scope="session")
def loaded():
    """Loaded, as from a folder."""
    return make_model()
