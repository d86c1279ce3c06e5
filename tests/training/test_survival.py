"""Runs that are killed, interrupted, or go wrong: nothing is lost, and what happened is said."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.training import loop, steps
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.steps import Loss

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import loop, policy, rewards, steps
from jaxrl_llm.training.methods import METHODS
from jaxrl_llm.training.rollout import Prompts, Sampler

folder, kill_at, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
lm, optimizer = TabularLM(3, 2), optax.adam(0.1)
trainer = policy.online(lm, optimizer)
ref = lm.init(jax.random.key(0))
prompts = Prompts(jnp.zeros((8, 0), jnp.int32), jnp.zeros((8, 0), bool))
seen = 0

def reward(rollout):
    global seen
    seen += 1
    if seen == kill_at:  # in the middle of a step
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(pause)
    return np.asarray(rollout.sequences.tokens).sum(axis=1) * 1.0

def advance(state, done):
    return trainer.step(state, prompts, reward, method=METHODS["rloo"], sampler=Sampler(2), frozen=steps.Frozen(ref))

print("ready", flush=True)
state = loop.run(
    steps.initial_state(ref, optimizer, jax.random.key(1)), advance,
    steps=12, folder=folder, evaluate_every=3, log_every=1,
)
np.save(folder / "end.npy", state.params["logits"])
"""


def launch(folder, *, kill_at=0, pause=0.0):
    command = [sys.executable, "-c", PROGRAM, str(folder), str(kill_at), str(pause)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = launch(folder)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    return np.load(folder / "end.npy")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, uninterrupted):
    """Killed in the middle of its 8th step, then of the 5th of what is left; checkpoints are at 3, 6, 9 and 12."""
    for kill_at, reached in ((8, 6), (5, 9)):
        process = launch(tmp_path, kill_at=kill_at)
        assert process.wait(timeout=120) == -signal.SIGKILL
        assert Checkpoints(tmp_path / "checkpoints").latest_step() == reached
    process = launch(tmp_path)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    np.testing.assert_array_equal(np.load(tmp_path / "end.npy"), uninterrupted)
    assert [row["step"] for row in RunLog(tmp_path / "log.jsonl").rows()] == list(range(1, 13))


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_and_the_run_goes_on(tmp_path, uninterrupted):
    process = launch(tmp_path, pause=0.4)
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") >= 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert "can be resumed" in process.stderr.read()
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == len(log.read_text().splitlines()) < 12
    again = launch(tmp_path)
    assert again.wait(timeout=120) == 0, again.stderr.read()
    np.testing.assert_array_equal(np.load(tmp_path / "end.npy"), uninterrupted)


# In one process -------------------------------------------------------------------------------------------------------

OPTIMIZER = optax.sgd(0.1)


def state_of(width=2):
    return steps.initial_state({"w": jnp.zeros(width)}, OPTIMIZER, jax.random.key(0))


def run(folder, loss, *, num_steps=6, width=2, **options):
    step = steps.make_step(loss, OPTIMIZER)
    arguments = {"steps": num_steps, "folder": folder, "evaluate_every": 2} | options
    return loop.run(state_of(width), lambda state, done: step(state, jnp.asarray(float(done))), **arguments)


def plain(params, batch, frozen, key):
    return Loss(jnp.square(params["w"] - 1).sum())


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            lambda w, batch: jnp.where(batch == 4, jnp.nan, 1.0) * jnp.square(w - 1).sum(),
            "the loss became nan at step 5",
        ),
        (
            lambda w, batch: jnp.sqrt(jnp.where(batch == 4, 0.0, 1.0) * jnp.square(w - 1).sum()),
            "norm of the gradient",
        ),
    ],
)
def test_what_is_not_finite_stops_the_run_and_names_step_batch_and_checkpoint(tmp_path, broken, said):
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, lambda params, batch, *_: Loss(broken(params["w"], batch)), describe=lambda step: f"rows {step}")
    assert said in str(error.value) and "at step 5 (rows 4)" in str(error.value)
    assert "the last good checkpoint is that of step 4" in str(error.value)
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == 4


def failing(at, error, *, donate=False):
    """Steps of which one raises, before or after it has donated the state."""
    step = steps.make_step(plain, OPTIMIZER)

    def advance(state, done):
        if done + 1 == at and donate:
            step(state, None)
        if done + 1 == at:
            raise error
        return step(state, None)

    return advance


def go(folder, advance, **options):
    return loop.run(state_of(), advance, **({"steps": 6, "folder": folder, "evaluate_every": 4} | options))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ValueError("the reward of answer 3 is nan."), ValueError, "failed: the reward of answer 3 is nan; the last"),
        (KeyError("gold"), RuntimeError, "failed: KeyError: 'gold'; the last"),
    ],
)
def test_a_step_that_raises_loses_none_of_those_before_it(tmp_path, error, kind, said):
    with pytest.raises(kind) as raised:
        go(tmp_path, failing(4, error), describe=lambda step: f"rows {step}")
    assert str(raised.value).startswith("step 4 (rows 3) failed") and said in str(raised.value)
    assert str(raised.value).endswith("the last good checkpoint is that of step 3.")
    resumed, whole = go(tmp_path, failing(0, error)), go(tmp_path / "whole", failing(0, error))
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])


def test_a_step_that_raises_with_the_state_gone_or_at_the_beginning_saves_nothing(tmp_path):
    for at, donate in ((4, True), (1, False)):
        with pytest.raises(RuntimeError, match=rf"step {at} failed: OSError: .*; there is no checkpoint yet\."):
            go(tmp_path, failing(at, OSError("no such host"), donate=donate))
        assert Checkpoints(tmp_path / "checkpoints").latest_step() is None


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: {"held_out_loss": float("nan")}])
def test_an_evaluation_that_fails_loses_no_step(tmp_path, broken):
    with pytest.raises((RuntimeError, FloatingPointError)) as raised:
        go(tmp_path, failing(0, None), evaluate=lambda params: broken())
    said = ("the evaluation after step 4 failed", "ZeroDivisionError" if "Zero" in str(raised.value) else "is nan")
    assert all(part in str(raised.value) for part in said)
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == 4
    assert [row["step"] for row in RunLog(tmp_path / "log.jsonl").rows()] == [4]
    assert int(go(tmp_path, failing(0, None)).step) == 6


def test_a_metric_that_is_not_finite_stops_the_run_and_the_log_stays_json(tmp_path):
    def loss(params, batch, frozen, key):
        return Loss(jnp.square(params["w"] - 1).sum(), metrics={"kl": jnp.where(batch == 4, jnp.inf, 0.0)})

    with pytest.raises(FloatingPointError, match="the kl became inf at step 5; the last good checkpoint is that of st"):
        run(tmp_path, loss, log_every=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunLog(tmp_path / "log.jsonl").append(step=5, kl=float("inf"))


def test_a_signal_at_any_moment_saves_before_it_stops(tmp_path, monkeypatch):
    """Even one that comes between the two looks at whether one came."""

    class Late:
        looks = 0

        def __bool__(self):
            self.looks += 1
            return self.looks > 1

    monkeypatch.setattr(loop, "interruptions", lambda: contextlib.nullcontext(Late()))
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2 of 6; .*can be resumed"):
        go(tmp_path, failing(0, None))
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == 2


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = RunLog(tmp_path / "log.jsonl")
    log.truncate(0), log.append(step=1)
    loop.claim(tmp_path / "run.json", {"seed": 0}, resumed=False)
    assert not list(tmp_path.iterdir())


def test_the_tokens_of_a_step_may_be_a_metric(tmp_path):
    def loss(params, batch, frozen, key):
        return Loss(jnp.square(params["w"] - 1).sum(), metrics={"completion_tokens": 10 * batch})

    run(tmp_path, loss, tokens="completion_tokens")
    rows = RunLog(tmp_path / "log.jsonl").rows()
    assert [row["completion_tokens"] for row in rows] == [5, 25, 45]  # a mean, of a step
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_the_checkpoint_of_another_model_is_refused_and_stays(tmp_path):
    run(tmp_path, plain)
    with pytest.raises(
        ValueError, match=r"is of another model or optimiser: params/w is float32\[2\], not float32\[3\]"
    ):
        run(tmp_path, plain, num_steps=8, width=3)
    assert int(run(tmp_path, plain, num_steps=8).step) == 8


def test_a_full_disk_is_named_with_the_checkpoint_that_remains(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", plain)

    def full(self, step, *args, **kwargs):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return saved(self, step, *args, **kwargs)

    import orbax.checkpoint as ocp

    saved = ocp.CheckpointManager.save
    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(
            OSError, match=r"checkpoint of step 4 .*No space left on device; the last good one is that of step 2"
        ):
            run(tmp_path / "run", plain)
    resumed = run(tmp_path / "run", plain)
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])


def test_the_log_has_every_metric_and_the_speed(tmp_path):
    def loss(params, batch, frozen, key):
        return Loss(jnp.square(params["w"] - 1).sum(), metrics={"reward": batch})

    run(tmp_path, loss, log_every=1, tokens=lambda done: 10 * done, evaluate=lambda params: {"sample": "Once"})
    rows = RunLog(tmp_path / "log.jsonl").rows()
    assert [row["reward"] for row in rows] == [0, 1, 2, 3, 4, 5] and [row["tokens"] for row in rows] == [
        *range(10, 70, 10)
    ]
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] >= 0 for row in rows)
    assert [row.get("sample") for row in rows] == [None, "Once"] * 3
    run(tmp_path / "uneven", plain, log_every=3)
    assert [row["step"] for row in RunLog(tmp_path / "uneven" / "log.jsonl").rows()] == [2, 3, 4, 6]
    with pytest.raises(ValueError, match="log_every and evaluate_every must be at least 1, but are 0 and 2"):
        run(tmp_path / "other", plain, log_every=0)
    with pytest.raises(ValueError, match="keep must be at least 1 checkpoint, but is 0"):
        run(tmp_path / "other", plain, keep=0)


def test_tensorboards_events_hold_the_numbers_or_the_package_is_named(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(("begun", Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def add_text(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_event_writer", lambda: Writer)
        run(tmp_path / "a", plain, num_steps=2, tensorboard=True, evaluate=lambda params: {"sample": "Once"})
    assert written[0] == ("begun", "tensorboard", 1) and written[-1] == "closed"
    assert ("sample", "Once", 2) in written and any(row[0] == "loss" for row in written[1:-1])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxrl_llm\[tensorboard\]'"):
        run(tmp_path / "b", plain, tensorboard=True)
    assert not (tmp_path / "b" / "log.jsonl").exists()
