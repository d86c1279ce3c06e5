"""Next-token pretraining: it learns, it resumes bit for bit, and what it reports is what it says."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import scoring
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.training import pretrain
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.steps import TrainState, initial_state

VOCAB, TIME, BATCH = 11, 8, 4
LM = GPT2(GPT2Config(vocab_size=VOCAB, n_positions=TIME, n_embd=16, n_layer=1, n_head=2))
OPTIMIZER = optax.adam(1e-2)
REPEATING = np.tile(np.asarray([0, 3, 1, 4, 1, 5, 9, 2, 6, 7, 8], np.uint16), 20)
STEP = pretrain.make_train_step(LM, OPTIMIZER, batch_size=BATCH, time=TIME)
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
        batch = pretrain.random_windows(jax.random.fold_in(KEY, step), jnp.asarray(REPEATING), BATCH, TIME + 1)
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
    windows = np.asarray(pretrain.random_windows(jax.random.key(0), data, 2000, 5))
    assert windows.shape == (2000, 5) and windows.dtype == np.int32
    assert (np.diff(windows, axis=1) == 1).all()
    counts = np.bincount(windows[:, 0] - 100, minlength=17)
    assert len(counts) == 17 and counts.min() > 60 and counts.max() < 180, "starts are uniform: 118 each, ± 11"


def test_data_of_exactly_one_window_and_of_less():
    np.testing.assert_array_equal(pretrain.random_windows(KEY, jnp.arange(5), 2, 5), [np.arange(5)] * 2)
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


# Runs that are interrupted --------------------------------------------------------------------------------------------


def fit(folder, *, steps, key=KEY, evaluate=lambda params: 0.5):
    return pretrain.fit(
        LM,
        OPTIMIZER,
        REPEATING,
        key=key,
        steps=steps,
        batch_size=BATCH,
        time=TIME,
        folder=folder,
        evaluate=evaluate,
        evaluate_every=4,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, fit(folder, steps=10)


class Crash(BaseException):
    """What happens to a run in the night."""


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, uninterrupted):
    calls = []

    def evaluate(params):
        calls.append(params)
        if len(calls) == 2:
            raise Crash
        return 0.5

    with pytest.raises(Crash):
        fit(tmp_path, steps=10, evaluate=evaluate)
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == 4, "it crashed at step 8, before its checkpoint"
    state = fit(tmp_path, steps=10)
    folder, expected = uninterrupted
    assert_equal_bits(state, expected)
    assert int(state.step) == 10
    ours, theirs = (RunLog(each / "log.jsonl").rows() for each in (tmp_path, folder))
    without_seconds = [[{**row, "seconds": 0, "tokens_per_second": 0} for row in rows] for rows in (ours, theirs)]
    assert without_seconds[0] == without_seconds[1] and [row["step"] for row in ours] == [4, 8, 10]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_stops_beside_a_checkpoint_has_each_row_of_its_log_once(
    tmp_path, uninterrupted, monkeypatch, moment
):
    saved = Checkpoints.save

    def save_and_crash(checkpoints, step, state):
        if step < 8 or moment == "after":
            saved(checkpoints, step, state)
        if step == 8:
            raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_crash)
        with pytest.raises(Crash):
            fit(tmp_path, steps=10)
    assert_equal_bits(fit(tmp_path, steps=10), uninterrupted[1])
    assert [row["step"] for row in RunLog(tmp_path / "log.jsonl").rows()] == [4, 8, 10]


def test_a_finished_run_is_not_run_again(uninterrupted):
    folder, expected = uninterrupted
    before = (folder / "log.jsonl").read_bytes()
    state = fit(folder, steps=10, evaluate=lambda params: pytest.fail("evaluated"))
    assert_equal_bits(state, expected)
    assert (folder / "log.jsonl").read_bytes() == before


def test_the_log_says_what_was_measured(uninterrupted):
    folder, _ = uninterrupted
    rows = RunLog(folder / "log.jsonl").rows()
    assert [row["tokens"] for row in rows] == [step * BATCH * TIME for step in (4, 8, 10)]
    assert all(row["held_out_loss"] == 0.5 for row in rows)
    params_key, batch_key = jax.random.split(KEY)
    params = LM.init(params_key)
    state, losses = initial_state(params, OPTIMIZER, batch_key), []
    for _ in range(10):
        state, metrics = STEP(state, jnp.asarray(REPEATING))
        losses.append(float(metrics["loss"]))
    means = [np.mean(losses[start:end]) for start, end in ((0, 4), (4, 8), (8, 10))]
    np.testing.assert_allclose([row["loss"] for row in rows], means, rtol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, uninterrupted):
    fit(tmp_path, steps=4)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    broken = fresh()._replace(params=jax.tree.map(lambda leaf: leaf * jnp.inf, fresh().params), step=jnp.asarray(5))
    checkpoints.save(5, broken)
    with pytest.raises(FloatingPointError, match="the loss became nan at step 6"):
        fit(tmp_path, steps=10)
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == 5


# Checkpoints and the log ----------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    state, _ = STEP(fresh(), jnp.asarray(REPEATING))
    Checkpoints(tmp_path).save(1, state)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 1
    assert_equal_bits(checkpoints.restore(fresh(seed=9)), state)


def test_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": jnp.asarray(step)})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "3"]
    assert int(checkpoints.restore({"step": jnp.asarray(0)})["step"]) == 3


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "nothing" / "here")
    assert checkpoints.latest_step() is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nothing/here"):
        checkpoints.restore(fresh())


def test_the_log_drops_rows_of_steps_that_are_done_again(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.truncate(0)
    assert log.rows() == []
    for step in (2, 4, 6):
        log.append(step=step, loss=1 / step)
    log.truncate(4)
    assert log.rows() == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_row_that_a_crash_cut_short_is_none(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.append(step=2, loss=0.5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert log.rows() == [{"step": 2, "loss": 0.5}]
    log.truncate(2)
    log.append(step=4, loss=0.25)
    assert [row["step"] for row in log.rows()] == [2, 4]
