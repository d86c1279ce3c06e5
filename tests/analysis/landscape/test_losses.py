import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.analysis import landscape
from jaxrl_llm.objectives import preference
from jaxrl_llm.scoring import Sequences
from tests.conftest import TINY, log_softmax, random_params

pytestmark = pytest.mark.slow


def rows(lm, *, seed, left):
    """Two rows of 4 and 6 real tokens in 7 columns, their last two the answer."""
    tokens = np.random.default_rng(seed).integers(0, lm.vocab_size, size=(2, 7))
    mask, answer = np.zeros((2, 7), bool), np.zeros((2, 7), bool)
    real = np.random.default_rng(seed + 100).integers(0, lm.vocab_size, size=(2, 6))
    for row, length in enumerate((4, 6)):
        place = slice(7 - length, 7) if left else slice(0, length)
        tokens[row, place] = real[row, :length]
        mask[row, place] = True
        answer[row, place.stop - 2 : place.stop] = True
    return Sequences(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(answer))


def token_log_probs_of(lm, params, tokens):
    logits = log_softmax(jax.jit(lm.apply)(params, jnp.asarray(tokens)[None])[0][0])
    return logits[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("left", [False, True])
def test_next_token_loss_is_the_mean_over_real_tokens(neural, left):
    lm, params = neural
    answers = rows(lm, seed=0, left=left)
    found = jax.jit(landscape.next_token_loss(lm, answers.tokens, answers.mask))(params)
    each = [token_log_probs_of(lm, params, np.asarray(t)[np.asarray(m)]) for t, m in zip(*answers[:2], strict=True)]
    np.testing.assert_allclose(found, -np.concatenate(each).mean(), rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_preference_loss_is_the_objective_of_summed_log_probs(neural, left):
    lm, params = neural
    reference, chosen, rejected = random_params(lm, 5), rows(lm, seed=1, left=left), rows(lm, seed=2, left=left)
    loss = landscape.preference_loss(lm, reference, chosen, rejected, beta=0.3)
    sums = [
        jnp.asarray(
            [token_log_probs_of(lm, p, np.asarray(t)[np.asarray(m)])[-2:].sum() for t, m in zip(*a[:2], strict=True)]
        )
        for p in (params, reference)
        for a in (chosen, rejected)
    ]
    np.testing.assert_allclose(jax.jit(loss)(params), preference.dpo_loss(*sums, beta=0.3).mean(), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(loss)(reference), np.log(2), rtol=1e-6)
    other = landscape.preference_loss(lm, reference, chosen, rejected, loss=preference.ipo_loss, beta=0.3)
    np.testing.assert_allclose(jax.jit(other)(params), preference.ipo_loss(*sums, beta=0.3).mean(), rtol=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_reward_model_loss_reads_the_last_real_token(neural, left):
    lm, params = neural
    chosen, rejected = rows(lm, seed=1, left=left), rows(lm, seed=2, left=left)
    head = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    found = jax.jit(landscape.reward_model_loss(lm, chosen, rejected, margin=0.5))({"model": params, "head": head})
    scores = [
        [float(jax.jit(lm.hidden)(params, t[m][None])[0][0, -1] @ head) for t, m in zip(*a[:2], strict=True)]
        for a in (chosen, rejected)
    ]
    margin = np.asarray(scores[0]) - np.asarray(scores[1]) - 0.5
    np.testing.assert_allclose(found, np.logaddexp(0, -margin).mean(), rtol=1e-4)


def test_any_of_them_has_a_surface():
    lm = TINY["gpt2"]
    model, chosen, rejected = random_params(lm), rows(lm, seed=1, left=True), rows(lm, seed=2, left=True)
    params = {"model": model, "head": jnp.ones(16)}
    loss = landscape.reward_model_loss(lm, chosen, rejected)
    directions = landscape.random_directions(params, jax.random.key(0))
    found = landscape.loss_surface(loss, params, directions, [-0.5, 0, 0.5], [0], progress=False)
    assert found[1, 0] == jax.jit(loss)(params) and np.ptp(found) > 0


def test_wrong_inputs_are_named():
    lm = TINY["gpt2"]
    good = rows(lm, seed=0, left=False)
    params = random_params(lm)
    with pytest.raises(ValueError, match="nothing to predict"):
        landscape.next_token_loss(lm, jnp.asarray([[3], [4]]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 23\)"):
        landscape.next_token_loss(lm, jnp.asarray([[3, 99]]))
    short = jax.tree.map(lambda leaf: leaf[:1], good)
    with pytest.raises(ValueError, match="must be pairs, but there are 2 and 1"):
        landscape.preference_loss(lm, params, good, short)
    for marked, message in (
        (jnp.zeros_like(good.completion_mask), "row 0 of rejected has no completion"),
        (good.mask, "row 0 of rejected has a completion without 1 token before it"),
    ):
        with pytest.raises(ValueError, match=message):
            landscape.preference_loss(lm, params, good, good._replace(completion_mask=marked))
    with pytest.raises(ValueError, match=r"chosen.completion_mask must mark real tokens"):
        landscape.reward_model_loss(lm, good._replace(completion_mask=~good.mask), good)
