"""Next-token pretraining: its batches, its loss, and a run that is resumed bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import scoring
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.training import supervised
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.steps import TrainState, initial_state

VOCAB, TIME, BATCH = 11, 8, 4
LM = GPT2(GPT2Config(vocab_size=VOCAB, n_positions=TIME, n_embd=16, n_layer=1, n_head=2))
OPTIMIZER = optax.adam(1e-2)
REPEATING = np.tile(np.asarray([0, 3, 1, 4, 1, 5, 9, 2, 6, 7, 8], np.uint16), 20)
STEP = supervised.make_pretrain_step(LM, OPTIMIZER, batch_size=BATCH, time=TIME)
KEY = jax.random.key(5)


initial = functools.cache(lambda seed: LM.init(jax.random.key(seed)))
apply = jax.jit(lambda params, tokens: LM.apply(params, tokens)[0])


def fresh(seed=0, step=0, key=KEY):
    params = jax.tree.map(jnp.copy, initial(seed))  # a step takes the state's memory
    return TrainState(params, OPTIMIZER.init(params), jnp.asarray(step, jnp.int32), jnp.copy(key))


def assert_equal_bits(tree, expected):
    tree, expected = (each._replace(key=jax.random.key_data(each.key)) for each in (tree, expected))
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert jax.tree.map(lambda leaf: leaf.dtype, tree) == jax.tree.map(lambda leaf: leaf.dtype, expected)


def log_probs_by_hand(params, tokens):
    """log p of each token but the first, in float64 from the model's logits."""
    logits = np.asarray(apply(params, jnp.asarray(tokens[:, :-1])), np.float64)
    log_normaliser = np.log(np.exp(logits).sum(axis=-1))
    return np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0] - log_normaliser


# One step -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_lower_the_loss_on_a_repeating_text():
    """From log 11, a uniform guess, to almost nothing: what follows the 1s alone needs the token before."""
    state, losses = fresh(), []
    for _ in range(150):
        state, metrics = STEP(state, jnp.asarray(REPEATING))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(VOCAB), abs=0.1)
    assert np.mean(losses[-10:]) < 0.25
    assert int(state.step) == 150


def test_the_loss_is_the_mean_over_the_batch_of_its_key_and_step():
    """Whatever came before: the batch is drawn with the key folded with the step, from the whole of the data."""
    for step in (0, 7):
        state = fresh(step=step)
        batch = supervised.random_windows(jax.random.fold_in(KEY, step), jnp.asarray(REPEATING), BATCH, TIME + 1)
        expected = -log_probs_by_hand(state.params, np.asarray(batch)).mean()
        _, metrics = STEP(state, jnp.asarray(REPEATING))
        assert float(metrics["loss"]) == pytest.approx(expected, abs=1e-5)


def test_batches_depend_on_key_and_step_only():
    data = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, len(REPEATING)), jnp.uint16)

    def loss(key, step):
        return float(STEP(fresh(step=step, key=key), data)[1]["loss"])

    first = loss(KEY, 3)
    trained, _ = STEP(fresh(step=2), data)
    again, _ = STEP(fresh(seed=1, step=2), data)
    assert int(trained.step) == int(again.step) == 3
    assert loss(KEY, 3) == first, "another step in between leaves no trace"
    assert len({first, loss(KEY, 4), loss(jax.random.key(6), 3)}) == 3


def test_windows_are_consecutive_and_reach_both_ends():
    data = jnp.arange(100, 121)
    windows = np.asarray(supervised.random_windows(jax.random.key(0), data, 2000, 5))
    assert windows.shape == (2000, 5) and windows.dtype == np.int32
    assert (np.diff(windows, axis=1) == 1).all()
    counts = np.bincount(windows[:, 0] - 100, minlength=17)
    assert len(counts) == 17 and counts.min() > 60 and counts.max() < 180, "starts are uniform: 118 each, ± 11"


def test_data_of_exactly_one_window_and_of_less():
    np.testing.assert_array_equal(supervised.random_windows(KEY, jnp.arange(5), 2, 5), [np.arange(5)] * 2)
    with pytest.raises(ValueError, match="data must hold at least one window of 9 tokens, but holds 8"):
        STEP(fresh(), jnp.arange(8))


def test_next_token_log_probs_are_those_of_the_tokens_after():
    tokens = np.random.default_rng(1).integers(0, VOCAB, (BATCH, TIME + 1))
    params = jax.tree.map(lambda leaf: 3 * leaf, fresh().params)
    log_probs = jax.jit(lambda params: scoring.next_token_log_probs(LM, params, jnp.asarray(tokens)))(params)
    assert log_probs.shape == (BATCH, TIME)
    np.testing.assert_allclose(log_probs, log_probs_by_hand(params, tokens), rtol=0, atol=1e-5)


# Held-out text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, TIME, TIME + 1, TIME + 2, 5 * TIME + 4])
def test_stream_nats_are_the_direct_sum(length):
    """Windows of at most TIME tokens of context that share one token: each but the first is predicted once."""
    data = np.random.default_rng(length).integers(0, VOCAB, length).astype(np.uint16)
    params = jax.tree.map(lambda leaf: 3 * leaf, fresh().params)
    expected = 0.0
    for start in range(0, length - 1, TIME):
        window = data[None, start : start + TIME + 1].astype(np.int64)
        padded = np.zeros(
            (BATCH, TIME + 1), np.int64
        )  # of the one shape that is compiled; what follows changes nothing
        padded[0, : window.shape[1]] = window
        expected -= log_probs_by_hand(params, padded)[0, : window.shape[1] - 1].sum()
    total, count = scoring.stream_nats(LM, params, data, time=TIME, batch_size=2)
    assert count == length - 1
    assert total == pytest.approx(expected, rel=1e-5)


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_run_is_its_steps_and_a_resumed_one_has_the_same_bits_and_log(tmp_path):
    def fit(folder, steps):
        return supervised.pretrain(
            LM,
            OPTIMIZER,
            REPEATING,
            key=KEY,
            steps=steps,
            batch_size=BATCH,
            time=TIME,
            folder=folder,
            evaluate=lambda params: 0.5,
            evaluate_every=4,
        )

    params_key, batch_key = jax.random.split(KEY)
    expected, losses = initial_state(LM.init(params_key), OPTIMIZER, batch_key), []
    for _ in range(10):
        expected, metrics = STEP(expected, jnp.asarray(REPEATING))
        losses.append(float(metrics["loss"]))
    fit(tmp_path, 8)
    assert_equal_bits(fit(tmp_path, 10), expected)
    rows = RunLog(tmp_path / "log.jsonl").rows()
    assert [(row["step"], row["tokens"]) for row in rows] == [(step, step * BATCH * TIME) for step in (4, 8, 10)]
    assert all(row["held_out_loss"] == 0.5 for row in rows)
    means = [np.mean(losses[start:end]) for start, end in ((0, 4), (4, 8), (8, 10))]
    np.testing.assert_allclose([row["loss"] for row in rows], means, rtol=1e-6)
