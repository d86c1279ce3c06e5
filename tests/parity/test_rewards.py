"""transformers gives a saved reward model's scores: of strings and conversations, in any batch, with any padding."""

import copy

import jax
import numpy as np
import pytest
import transformers

from jaxrl_llm import models, train
from jaxrl_llm.models import Config, Decoder, ScalarHead
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from tests.conftest import random_params
from tests.models.test_heads import PADS, conversation, tokenizer_with

pytestmark = pytest.mark.parity

SIZES = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 96},
}


def lm_of(family, vocab_size):
    if family == "gpt2":
        return GPT2(GPT2Config(vocab_size=vocab_size, n_positions=96, n_embd=16, n_layer=2, n_head=2))
    further = {"head_dim": 8, "sliding_window": 8} if family == "gemma3_text" else {}
    return Decoder(Config(family, vocab_size=vocab_size, **SIZES, **further))


PROMPTS = ["the cat", "on the mat sat", "a", "the"]
COMPLETIONS = [" sat", " the cat on the mat", "b", "\n"]


def scored(model, batch):
    import torch

    if model.config.model_type == "gpt2":  # whose positions are absolute
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**batch).logits[:, 0].numpy()


def assert_transformers_agrees(folder, reward):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    strings = [p + c + tokenizer.eos_token for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    conversations = list(map(conversation, PROMPTS, COMPLETIONS))
    chat = {"return_tensors": "pt", "return_dict": True}
    for texts, ours in [(strings, reward.score(PROMPTS, COMPLETIONS)), (conversations, reward.score(conversations))]:
        assert np.ptp(ours) > 0.05
        for side in ("right", "left"):
            tokenizer.padding_side = side
            if texts is strings:
                batch = tokenizer(texts, padding=True, return_tensors="pt")
            else:
                batch = tokenizer.apply_chat_template(texts, padding=True, **chat)
            np.testing.assert_allclose(scored(theirs, batch), ours, atol=1e-4)
        if texts is strings:
            alone = tokenizer(texts[1], return_tensors="pt")
        else:
            alone = tokenizer.apply_chat_template(texts[1], **chat)
        np.testing.assert_allclose(scored(theirs, alone), ours[1:2], atol=1e-4)
    again = models.load_reward_model(folder)
    np.testing.assert_allclose(again.score(conversations), ours, atol=1e-5)


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma3_text"])
def test_transformers_gives_the_scores_with_any_padding_token(family, pad, tmp_path):
    tokenizer = tokenizer_with(pad, tmp_path / "tokenizer")
    lm = lm_of(family, len(tokenizer))
    head = ScalarHead(lm)
    reward = train.RewardModel(head, head.init(jax.random.key(0), random_params(lm)), tokenizer, {})
    before = copy.deepcopy(tokenizer.init_kwargs)
    reward.save(tmp_path / "reward")
    assert tokenizer.init_kwargs == before, "what is saved is a copy"
    assert_transformers_agrees(tmp_path / "reward", reward)


@pytest.mark.parametrize("pad", ["none", "eos"])
def test_transformers_reads_where_the_model_was_trained_to_be_read(pad, tmp_path):
    """Conversations and strings; the token that is read says which completion is better."""
    tokenizer = tokenizer_with(pad, tmp_path / "tokenizer")
    lm = lm_of("gpt2", len(tokenizer))
    loaded = models.Loaded(lm, lm.init(jax.random.key(0)), tokenizer, {})
    texts = [{"prompt": each, "chosen": " the cat", "rejected": " a mat"} for each in PROMPTS]
    chats = [{"prompt": conversation(each, "")[:1], "chosen": "the cat", "rejected": "a mat"} for each in PROMPTS]
    options = {"steps": 20, "batch_size": 8, "learning_rate": 1e-2, "verbose": False}
    reward = train.reward(loaded, texts + chats, out=tmp_path / "reward", **options)
    assert_transformers_agrees(tmp_path / "reward", reward)
    better, worse = (reward.score(list(map(conversation, PROMPTS, [each] * 4))) for each in ("the cat", "a mat"))
    assert np.all(np.subtract(better, worse) > 1)
