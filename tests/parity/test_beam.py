"""Beam search against transformers + torch, live, over random configurations; run by `make parity`.

Its diverse beam search left transformers with version 5, for code that it fetches; `tests/decoding/test_beam.py` holds
ours against plain Python.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.decoding.beam import beam_search

pytestmark = pytest.mark.parity
PENALTIES = (-0.7, 0.0, 2.0)


@pytest.fixture(scope="module")
def theirs():
    """torch is imported here, so that collecting the tests does not need it."""
    from tests.goldens import make_beam_goldens
    from tests.parity import reference

    return reference, make_beam_goldens


@pytest.mark.parametrize("family", ["gpt2", "llama", "stablelm"])
@pytest.mark.parametrize("seed", range(4))
def test_beams_agree_token_for_token(theirs, family, seed, tmp_path):
    reference, goldens = theirs
    rng = np.random.default_rng([seed, 11])
    config = reference.random_config(rng, family)
    model = reference.random_model(config, seed)
    reference.save(model, tmp_path)
    loaded = models.load(tmp_path)
    tokens, mask = reference.random_prompts(rng, config.vocab_size)
    for n in (0, seed % 3 + 1):
        for penalty in PENALTIES:
            expected, scores = goldens.beams(model, tokens, mask, penalty=penalty, n=n)
            found = beam_search(
                loaded.model,
                loaded.params,
                jnp.asarray(tokens),
                prompt_mask=jnp.asarray(mask),
                num_beams=goldens.BEAMS,
                max_new_tokens=goldens.NEW_TOKENS,
                length_penalty=penalty,
                no_repeat_ngram=n,
                eos_id=goldens.EOS,
                pad_id=goldens.PAD,
            )
            np.testing.assert_array_equal(found.tokens, expected)
            np.testing.assert_allclose(found.score, scores, rtol=1e-5, atol=1e-4)
