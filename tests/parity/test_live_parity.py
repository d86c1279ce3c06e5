"""Every decoder family against transformers + torch, live, over random configurations; run by `make parity`."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.decoding import generate
from jaxrl_llm.models import families

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def reference():
    """torch is imported here, so that collecting the tests does not need it."""
    from tests.parity import reference

    return reference


FAMILIES = [name for name in families.FAMILIES if families.FAMILIES[name].model is not models.T5]
SEEDS = {"gpt2": 10, "llama": 10, "stablelm": 10}  # the others: 5


@pytest.mark.parametrize(("family", "seed"), [(name, seed) for name in FAMILIES for seed in range(SEEDS.get(name, 5))])
def test_logits_and_greedy_generation_agree(reference, family, seed, tmp_path):
    rng = np.random.default_rng([seed, 7])
    config = reference.random_config(rng, family)
    model = reference.random_model(config, seed)
    reference.save(model, tmp_path)
    expected = reference.compute(model, *reference.random_prompts(rng, config.vocab_size))
    loaded = models.load(tmp_path)
    tokens, mask = jnp.asarray(expected["tokens"]), jnp.asarray(expected["mask"])
    logits, _ = loaded.model.apply(loaded.params, tokens, mask=mask)
    np.testing.assert_allclose(np.asarray(logits)[expected["mask"]], expected["logits"][expected["mask"]], atol=1e-4)
    generation = generate(
        loaded.model,
        loaded.params,
        tokens,
        prompt_mask=mask,
        max_new_tokens=reference.NEW_TOKENS,
        greedy=True,
        eos_id=reference.EOS,
        pad_id=reference.PAD,
    )
    np.testing.assert_array_equal(generation.tokens, expected["generated"])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_save(reference, family, tmp_path):
    import torch
    import transformers

    rng = np.random.default_rng(3)
    model = reference.random_model(reference.random_config(rng, family), 3)
    reference.save(model, tmp_path / "theirs")
    loaded = models.load(tmp_path / "theirs")
    models.save(tmp_path / "ours", loaded.model, loaded.params, config=loaded.config)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(tokens).logits, model(tokens).logits)
