"""transformers and PEFT read what is saved here: reward models, and adapters."""

import jax
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.models import ScalarHead
from jaxrl_llm.training import lora
from tests.conftest import TINY, random_params

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(1, 23, (3, 9))


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
def test_transformers_gives_a_reward_models_scores(name, tmp_path):
    """Also where rows end before their last place: padding is a token of its own."""
    import torch
    import transformers

    lm = TINY[name]
    head = ScalarHead(lm)
    params = head.init(jax.random.key(0), random_params(lm))
    models.save_reward_model(tmp_path, head, params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    theirs.config.pad_token_id = 0
    tokens = TOKENS.copy()
    tokens[1, 6:] = 0
    mask = tokens > 0
    with torch.no_grad():
        found = theirs(torch.as_tensor(tokens), attention_mask=torch.as_tensor(mask)).logits[:, 0]
    np.testing.assert_allclose(head.scores(params, tokens, mask), found.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
def test_peft_loads_an_adapter_onto_the_same_model(name, tmp_path):
    import peft
    import torch
    import transformers

    lm, params = TINY[name], random_params(TINY[name])
    given = lora.lora(lm, rank=3, alpha=5)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, given.init(jax.random.key(1)))
    models.save(tmp_path / "model", lm, params)
    lora.save(tmp_path / "adapter", given, adapter, base=str(tmp_path / "model"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = theirs(torch.as_tensor(TOKENS)).logits.numpy()
    ours = lm.apply(given.merge(params, adapter), TOKENS)[0]
    np.testing.assert_allclose(ours, found, atol=1e-4)
    assert np.abs(ours - lm.apply(params, TOKENS)[0]).max() > 0.01, "the adapter changes something"
