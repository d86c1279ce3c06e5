"""A scalar head: read at the last real token, saved as transformers has it; and blocks that are computed anew."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tokenizers import normalizers

from jaxrl_llm import models, text
from jaxrl_llm.data import bpe
from jaxrl_llm.models import ScalarHead
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import LoadedReward
from tests.conftest import TINY, random_params

ROWS = [[3, 1, 4, 1], [5], [9, 2, 6]]


def padded(side):
    tokens, mask = np.zeros((3, 6), np.int32), np.zeros((3, 6), bool)
    for place, row in enumerate(ROWS):
        at = slice(6 - len(row), 6) if side == "left" else slice(len(row))
        tokens[place, at], mask[place, at] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm", "tabular"])
def test_the_score_is_the_number_at_the_last_real_token_on_either_side(name):
    lm = TINY[name]
    head = ScalarHead(lm)
    params = head.init(jax.random.key(0), random_params(lm))
    scores = jax.jit(head.scores)
    tokens, mask = padded("right")  # of which a causal model sees nothing before it has read the row
    hidden = jax.jit(lm.hidden)(params["model"], tokens % lm.vocab_size)[0]
    expected = np.asarray(hidden)[np.arange(3), np.asarray(mask).sum(axis=1) - 1] @ np.asarray(params["head"])
    for side in ("left", "right"):
        tokens, mask = padded(side)
        np.testing.assert_allclose(scores(params, tokens % lm.vocab_size, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_head_starts_small_or_at_zero_on_the_parameters_it_is_given(gpt2):
    lm, params = gpt2
    begun = ScalarHead(lm).init(jax.random.key(0), params)
    assert begun["model"] is params and begun["head"].shape == (16,) and float(begun["head"].std()) < 0.6
    assert not ScalarHead(lm).init(jax.random.key(0), params, zero=True)["head"].any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
def test_a_reward_model_comes_back_and_its_folder_holds_the_model_below(name, tmp_path):
    lm = TINY[name]
    head = ScalarHead(lm)
    params = head.init(jax.random.key(0), random_params(lm))
    models.save_reward_model(tmp_path, head, params)
    loaded = models.load_reward_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert type(loaded.head.lm) is type(lm) and loaded.config["architectures"][0].endswith("ForSequenceClassification")
    below = models.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, below.params, params["model"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0"}


def test_what_is_no_reward_model_is_refused(gpt2, tmp_path):
    lm, params = gpt2
    models.save(tmp_path / "lm", lm, params)
    with pytest.raises(ValueError, match=r"is not a reward model: score.weight must be \[1, width\]"):
        models.load_reward_model(tmp_path / "lm")
    table = ScalarHead(TINY["tabular"])
    with pytest.raises(ValueError, match="has no Hugging Face form"):
        models.save_reward_model(tmp_path / "table", table, table.init(jax.random.key(0)))


# Where texts are read ------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PADS = {"none": None, "eos": "<|im_end|>", "unk": "<unk>", "own": "<pad>", "reserved": None}
SAVED = {"none": "<|pad|>", "eos": "<|pad|>", "unk": "<unk>", "own": "<pad>", "reserved": "<|reserved_7|>"}


def tokenizer_with(pad, folder):
    """A byte-level tokenizer with a chat template whose turns end in EOS and a newline."""
    trained = bpe.train(["the cat sat on the mat"] * 4, 262)
    further = {"unk": ["<unk>"], "own": ["<pad>"], "reserved": ["<|reserved_7|>"]}.get(pad, [])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token="<|im_end|>",
        pad_token=PADS[pad],
        unk_token="<unk>" if pad == "unk" else None,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", *further],
    )
    found.chat_template = CHATML
    found.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def conversation(prompt, completion):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward model whose tokenizer has no padding token."""
    tokenizer = tokenizer_with("none", tmp_path_factory.mktemp("tokenizer"))
    lm = GPT2(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2))
    head = ScalarHead(lm)
    return LoadedReward(head, head.init(jax.random.key(0), random_params(lm)), tokenizer, {})


@pytest.mark.parametrize("pad", PADS)
def test_the_padding_token_of_a_saved_reward_model_ends_no_text(pad, reward, tmp_path):
    """By the rule of transformers, the last token that is not padding, each text is read at its end."""
    tokenizer = tokenizer_with(pad, tmp_path / "tokenizer")
    lm = dataclasses.replace(reward.head.lm, config=dataclasses.replace(reward.head.lm.config, vocab_size=300))
    params = {"model": lm.init(jax.random.key(0)), "head": reward.params["head"]}
    models.save_reward_model(tmp_path / "saved", ScalarHead(lm), params, tokenizer)
    loaded = models.load_reward_model(tmp_path / "saved")
    assert loaded.head.lm == lm, "its vocabulary has room"
    assert loaded.tokenizer.pad_token == SAVED[pad] and tokenizer.pad_token == PADS[pad]
    assert loaded.config["pad_token_id"] == loaded.tokenizer.pad_token_id
    chats = [conversation("the cat", "sat"), conversation("a", "on the mat\n")]
    whole = [text.whole(tokenizer, (), chat) for chat in chats]
    assert tokenizer.decode(whole[1]).endswith("on the mat\n<|im_end|>\n")
    strings = [text.whole(tokenizer, "the cat", each) for each in (" sat", " on the mat")]
    assert strings[0][-1] == tokenizer.eos_token_id
    assert loaded.tokenizer.apply_chat_template(chats)["input_ids"] == whole
    assert loaded.tokenizer(["the cat sat<|im_end|>", "the cat on the mat<|im_end|>"])["input_ids"] == strings
    assert loaded.tokenizer.padding_side == "right"
    for rows in (whole, strings):
        for pad_rows in (text.left_pad, text.right_pad):
            tokens, mask = pad_rows(rows, pad_id=loaded.config["pad_token_id"])
            read = [int(np.flatnonzero(row != loaded.config["pad_token_id"])[-1]) for row in tokens]
            assert read == [int(np.flatnonzero(row)[-1]) for row in mask]


def test_a_new_padding_token_gets_a_row_of_zeros_and_changes_no_score(reward, tmp_path):
    models.save_reward_model(tmp_path, reward.head, reward.params, reward.tokenizer, config={"task": "x"})
    loaded = models.load_reward_model(tmp_path)
    table, old = (np.asarray(each.params["model"]["wte"]["embedding"]) for each in (loaded, reward))
    np.testing.assert_array_equal(table, np.concatenate([old, np.zeros((1, 16))]))
    assert loaded.config["pad_token_id"] == len(old) and loaded.config["task"] == "x"
    chats = [conversation("the cat", "sat"), conversation("a", "mat")]
    np.testing.assert_allclose(loaded.score(chats), reward.score(chats), rtol=1e-5)
    assert loaded.has_tokens_of(reward.tokenizer) and reward.has_tokens_of(loaded.tokenizer)


def test_texts_and_conversations_are_scored_at_their_last_token(reward):
    rows = [[*reward.tokenizer("the cat sat")["input_ids"], reward.tokenizer.eos_token_id]]
    rows += [
        reward.tokenizer(reward.tokenizer.apply_chat_template(conversation("the", "mat"), tokenize=False)).input_ids
    ]
    tokens, mask = text.right_pad(rows)
    values = jax.jit(reward.head.values)(reward.params, jnp.asarray(tokens), jnp.asarray(mask))
    expected = [float(values[place, len(row) - 1]) for place, row in enumerate(rows)]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(reward.score(["the cat", conversation("the", "")[:1]], [" sat", "mat"]), expected)
    close(reward.score(["the cat sat", conversation("the", "mat")]), expected)
    close(reward.score("the cat sat"), expected[0])
    close(reward.score(conversation("the", "mat")), expected[1])
    close(reward.score_tokens(rows[::-1], batch_size=1), expected[::-1])
    assert reward.score([]) == [] and reward.max_length == 64
    with pytest.raises(ValueError, match="a text of 65 tokens is longer than the context, 64"):
        reward.score("cat" * 64 + "<|im_end|>")
    for given in ((None, None), ("a", 3), ({"prompt": "a", "chosen": "b"},)):
        with pytest.raises(TypeError, match="must be a string, a conversation or several, but is"):
            reward.score(*given)
    with pytest.raises(ValueError, match="must have a tokenizer to score texts"):
        dataclasses.replace(reward, tokenizer=None).score("a")


def test_tokenizers_are_compared_by_their_tokens(reward, tmp_path):
    assert all(reward.has_tokens_of(tokenizer_with(pad, tmp_path / pad)) for pad in ("none", "eos"))
    assert not reward.has_tokens_of(models.load("tiny-gpt2").tokenizer) and not reward.has_tokens_of(None)
    other = tokenizer_with("none", tmp_path / "other")
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not reward.has_tokens_of(other)


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
@pytest.mark.slow
def test_checkpointed_blocks_change_no_value_and_keep_less_for_the_gradient(name):
    lm = TINY[name]
    saving = dataclasses.replace(lm, checkpoint_blocks=True)
    params, (tokens, mask) = random_params(lm), padded("left")

    def loss(lm, params):
        return jnp.square(lm.hidden(params, tokens, mask=mask)[0]).sum()

    plain, again = (jax.jit(jax.value_and_grad(functools.partial(loss, each)))(params) for each in (lm, saving))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), again, plain)

    def kept(lm):
        """Numbers that the forward pass leaves for the backward pass."""
        pull_back = jax.eval_shape(lambda params: jax.vjp(functools.partial(loss, lm), params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    assert kept(saving) < 0.8 * kept(lm)
