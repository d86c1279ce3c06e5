"""Runs that are killed, interrupted, resumed or go wrong: nothing is lost, and what happened is said."""

import contextlib
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.files import replacing
from jaxrl_llm.training import loop, steps
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.steps import Loss
from tests.conftest import first_quick

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import loop, policy, reward_fns, steps
from jaxrl_llm.training.policy import METHODS
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


class Crash(BaseException):
    """Stops a run at once, as a power cut."""


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
    assert process.wait(timeout=120) != 0
    assert "can be resumed" in process.stderr.read()
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == len(log.read_text().splitlines()) < 12
    again = launch(tmp_path)
    assert again.wait(timeout=120) == 0, again.stderr.read()
    np.testing.assert_array_equal(np.load(tmp_path / "end.npy"), uninterrupted)


# In one process -------------------------------------------------------------------------------------------------------

OPTIMIZER = optax.sgd(0.1)
CONFIG = {"learning_rate": 0.1, "seed": 0, "sizes": (4, 2)}


def plain(params, batch, frozen, key):
    return Loss(jnp.square(params["w"] - 1).sum(), metrics={"done": batch})


@functools.cache
def step_of(loss):
    return steps.make_step(loss, OPTIMIZER)


def go(folder, loss=plain, *, at=None, error=None, donate=False, width=2, **options):
    """Six steps of which one may raise, before or after it has donated the state."""
    step = step_of(loss)

    def advance(state, done):
        if done + 1 == at and donate:
            step(state, np.float32(done))
        if done + 1 == at:
            raise error
        return step(state, np.float32(done))

    state = steps.initial_state({"w": jnp.zeros(width)}, OPTIMIZER, jax.random.key(0))
    return loop.run(state, advance, **({"steps": 6, "folder": folder, "evaluate_every": 2} | options))


def rows_of(folder):
    return RunLog(folder / "log.jsonl").rows()


def latest(folder):
    return Checkpoints(folder / "checkpoints").latest_step()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, np.asarray(go(folder).params["w"])


def test_the_log_has_the_means_of_every_metric_texts_and_the_speed(tmp_path):
    def loss(params, batch, frozen, key):
        return Loss(jnp.square(params["w"] - 1).sum(), metrics={"reward": batch, "completion_tokens": 10 * batch})

    go(tmp_path / "a", loss, log_every=1, tokens=lambda done: 10 * done, evaluate=lambda params: {"sample": "Once"})
    rows = rows_of(tmp_path / "a")
    assert [row["reward"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["tokens"] for row in rows] == [*range(10, 70, 10)]
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] >= 0 for row in rows)
    assert [row.get("sample") for row in rows] == [None, "Once"] * 3
    go(tmp_path / "b", loss, tokens="completion_tokens", log_every=3)
    rows = rows_of(tmp_path / "b")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["completion_tokens"] for row in rows] == [5, 20, 30, 45]  # a mean, of a step
    assert all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"log_every": 0}, "log_every and evaluate_every must be at least 1, but are 0 and 2"),
        ({"keep": 0}, "keep must be at least 1 checkpoint, but is 0"),
        ({"config": {"path": Path()}}, "must be a dict of what JSON can hold"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        go(tmp_path, **options)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, whole, capsys):
    monkeypatch.chdir(tmp_path)
    state = go(None, evaluate=lambda params: {"sample": "Once"}, verbose=False)
    np.testing.assert_array_equal(state.params["w"], whole[1])
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")
    with pytest.raises(RuntimeError, match=r"step 4 failed: KeyError: 'gold'; there is no checkpoint yet\."):
        go(None, at=4, error=KeyError("gold"))


# What goes wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda w, batch: (jnp.where(batch == 4, jnp.nan, 1.0) * jnp.square(w - 1).sum(), 0.0), "the loss became nan"),
        (
            lambda w, batch: (jnp.sqrt(jnp.where(batch == 4, 0.0, 1.0) * jnp.square(w - 1).sum()), 0.0),
            "norm of the gradient became",
        ),
        (lambda w, batch: (jnp.square(w - 1).sum(), jnp.where(batch == 4, jnp.inf, 0.0)), "the kl became inf"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_names_step_batch_and_checkpoint(tmp_path, broken, said):
    def loss(params, batch, *_):
        value, kl = broken(params["w"], batch)
        return Loss(value, metrics={"kl": kl})

    with pytest.raises(FloatingPointError) as error:
        go(tmp_path, loss, describe=lambda step: f"rows {step}")
    assert said in str(error.value) and "at step 5 (rows 4)" in str(error.value)
    assert "the last good checkpoint is that of step 4" in str(error.value)
    assert latest(tmp_path) == 4
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunLog(tmp_path / "log.jsonl").append(step=5, kl=float("inf"))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ValueError("the reward of answer 3 is nan."), ValueError, "failed: the reward of answer 3 is nan; the last"),
        (KeyError("gold"), RuntimeError, "failed: KeyError: 'gold'; the last"),
    ],
)
def test_a_step_that_raises_loses_none_of_those_before_it(tmp_path, whole, error, kind, said):
    with pytest.raises(kind) as raised:
        go(tmp_path, at=4, error=error, evaluate_every=4, describe=lambda step: f"rows {step}")
    assert str(raised.value).startswith("step 4 (rows 3) failed") and said in str(raised.value)
    assert str(raised.value).endswith("the last good checkpoint is that of step 3.")
    np.testing.assert_array_equal(go(tmp_path, evaluate_every=4).params["w"], whole[1])


@pytest.mark.parametrize(("at", "donate"), [(4, True), (1, False)])
def test_a_step_that_raises_with_the_state_gone_or_at_the_beginning_saves_nothing(tmp_path, at, donate):
    with pytest.raises(RuntimeError, match=rf"step {at} failed: OSError: .*; there is no checkpoint yet\."):
        go(tmp_path, at=at, error=OSError("no such host"), donate=donate, evaluate_every=4)
    assert latest(tmp_path) is None


@pytest.mark.parametrize(
    ("broken", "said"),
    [(lambda: 1 / 0, "ZeroDivisionError"), (lambda: {"held_out_loss": float("nan")}, "held_out_loss is nan")],
)
def test_an_evaluation_that_fails_loses_no_step(tmp_path, broken, said):
    with pytest.raises((RuntimeError, FloatingPointError)) as raised:
        go(tmp_path, evaluate_every=4, evaluate=lambda params: broken())
    assert "the evaluation after step 4 failed" in str(raised.value) and said in str(raised.value)
    assert latest(tmp_path) == 4
    assert [row["step"] for row in rows_of(tmp_path)] == [4]
    assert int(go(tmp_path, evaluate_every=4).step) == 6


def test_a_signal_at_any_moment_saves_before_it_stops(tmp_path, monkeypatch):
    """Even one that comes between the two looks at whether one came."""

    class Late:
        looks = 0

        def __bool__(self):
            self.looks += 1
            return self.looks > 1

    monkeypatch.setattr(loop, "interruptions", lambda: contextlib.nullcontext(Late()))
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2 of 6; .*can be resumed"):
        go(tmp_path)
    assert latest(tmp_path) == 2
    monkeypatch.setattr(loop, "interruptions", lambda: contextlib.nullcontext(Late()))
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2 of 6; nothing is saved"):
        go(None)


def test_a_full_disk_is_named_with_the_checkpoint_that_remains(tmp_path, whole, monkeypatch):
    import orbax.checkpoint as ocp

    saved = ocp.CheckpointManager.save

    def full(self, step, *args, **kwargs):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return saved(self, step, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(
            OSError, match=r"checkpoint of step 4 .*No space left on device; the last good one is that of step 2"
        ):
            go(tmp_path)
    np.testing.assert_array_equal(go(tmp_path).params["w"], whole[1])


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(tmp_path):
    """Of a process that can write no file of more than 100 kB, as on a disk that is full."""
    program = """
import resource, sys
from pathlib import Path
import jax, optax
from jaxrl_llm.training import loop, steps
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
step = steps.make_step(lambda params, *_: steps.Loss((params["w"] ** 2).sum()), optax.sgd(0.1))
state = steps.initial_state({"w": jax.random.normal(jax.random.key(0), (100_000,))}, optax.sgd(0.1), jax.random.key(1))
try:
    loop.run(state, lambda state, done: step(state, None), steps=2, folder=Path(sys.argv[1]), evaluate_every=2)
except OSError as error:
    print(error, file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    folder = tmp_path / "checkpoints"
    assert done.stderr == (
        f"the checkpoint of step 2 could not be written to {folder}: File too large; and there is none yet.\n"
    )
    assert not list(tmp_path.rglob("*.partial")) and Checkpoints(folder).latest_step() is None


# What is resumed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "after", "in the evaluation before"])
def test_a_run_that_stops_beside_a_checkpoint_ends_with_the_same_bits_and_log(tmp_path, whole, monkeypatch, moment):
    saved = Checkpoints.save

    def save_and_crash(checkpoints, step, state):
        if step < 4 or moment == "after":
            saved(checkpoints, step, state)
        if step == 4:
            raise Crash

    def evaluate_and_crash(params):
        if latest(tmp_path) == 2:
            raise Crash
        return {}

    with monkeypatch.context() as patched, pytest.raises(Crash):
        if moment.startswith("in"):
            go(tmp_path, evaluate=evaluate_and_crash)
        patched.setattr(Checkpoints, "save", save_and_crash)
        go(tmp_path)
    assert latest(tmp_path) == (4 if moment == "after" else 2)
    np.testing.assert_array_equal(go(tmp_path).params["w"], whole[1])
    untimed = [[{**row, "seconds": 0} for row in rows_of(each)] for each in (tmp_path, whole[0])]
    assert untimed[0] == untimed[1] and [row["step"] for row in untimed[0]] == [2, 4, 6]


def test_a_finished_run_is_not_run_again_and_can_grow_but_not_shrink(tmp_path, whole):
    go(tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    state = go(tmp_path, evaluate=lambda params: pytest.fail("evaluated"))
    np.testing.assert_array_equal(state.params["w"], whole[1])
    assert (tmp_path / "log.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="already has a run of 6 steps; it cannot be shortened to 2"):
        go(tmp_path, steps=2)
    grown = go(tmp_path, steps=8)
    np.testing.assert_array_equal(grown.params["w"], go(tmp_path / "b", steps=8).params["w"])


def to_the_half(params):
    """Its weights are 1 − 0.8ⁿ after n steps: nearest to 0.5 after the third."""
    return {"held_out_loss": float(abs(params["w"][0] - 0.5)), "sample": "Once"}


@pytest.mark.parametrize("stop", first_quick(["before the best", "before the checkpoint", None]))
def test_the_best_parameters_are_kept_and_returned_also_of_a_resumed_run(tmp_path, monkeypatch, capsys, stop):
    options = {"evaluate": to_the_half, "keep_best": "held_out_loss", "evaluate_every": 1, "keep": 1}
    saved = Checkpoints.save

    def save_and_crash(checkpoints, step, state):
        if step == 3 and (checkpoints._folder.name == "best") == (stop == "before the best"):
            raise Crash
        saved(checkpoints, step, state)

    if stop:
        with monkeypatch.context() as patched, pytest.raises(Crash):
            patched.setattr(Checkpoints, "save", save_and_crash)
            go(tmp_path, **options)
    for folder in (tmp_path, tmp_path, None):
        state = go(folder, **options)
        assert state.params["w"][0] == pytest.approx(1 - 0.8**3) and int(state.step) == 6
        said = "The best held_out_loss is that of step 3, 0.012: the model is that of this step."
        assert said in capsys.readouterr().out
    assert latest(tmp_path) == 6 and Checkpoints(tmp_path / "best").latest_step() == 3


def test_another_best_cannot_be_asked_for_when_its_parameters_are_gone(tmp_path):
    options = {"evaluate": lambda params: to_the_half(params) | {"kl": float(params["w"][0])}, "evaluate_every": 1}
    go(tmp_path, **options, keep_best="held_out_loss")
    with pytest.raises(ValueError, match=r"keep_best must stay as it was .* best kl so far is that of step 1, whose"):
        go(tmp_path, **options, keep_best="kl")
    go(tmp_path / "without", **options)
    with pytest.raises(ValueError, match="best held_out_loss so far is that of step 3, whose parameters were not kept"):
        go(tmp_path / "without", **options, keep_best="held_out_loss")
    assert float(go(tmp_path / "without", **options, keep_best="max:kl").params["w"][0]) > 0.7, "the last one"


def test_a_number_that_an_evaluation_lacks_waits_for_the_next(tmp_path):
    steps = []

    def evaluate(params):
        steps.append(len(steps))
        return {"length": 1.0} | ({"held_out_reward": float(params["w"][0])} if len(steps) > 1 else {})

    assert float(go(None, evaluate=evaluate, keep_best="held_out_reward", verbose=False).params["w"][0]) > 0.7


def test_the_best_is_the_largest_or_the_smallest_value_by_the_metric(tmp_path):
    def best(keep_best, name):
        evaluate = lambda params: {name: float(params["w"][0])}  # noqa: E731
        return float(go(None, evaluate=evaluate, keep_best=keep_best, verbose=False).params["w"][0])

    smallest, largest = 1 - 0.8**2, 1 - 0.8**6  # evaluated after steps 2, 4 and 6
    for name, expected in (("held_out_accuracy", largest), ("held_out_perplexity", smallest), ("win_rate", largest)):
        assert best(name, name) == pytest.approx(expected)
    assert best("min:length", "length") == pytest.approx(smallest)
    with pytest.raises(ValueError, match="keep_best must be one of length, but is held_out_loss"):
        best("held_out_loss", "length")
    with pytest.raises(ValueError, match="keep_best must be a number of the evaluation, which has none, but is kl"):
        go(tmp_path, keep_best="kl", evaluate=lambda params: {"sample": "Once"})


def test_a_run_ends_with_what_it_reached(capsys):
    go(None, evaluate=lambda params: {"held_out_accuracy": 0.25, "sample": "Once"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step 2, held_out_accuracy 0.25", "step 2, sample: Once"]
    assert lines[-1] == "6 steps: loss 1.64 → 0.2751, held_out_accuracy 0.25 → 0.25."


def test_the_checkpoint_of_another_model_is_refused_and_stays(tmp_path):
    go(tmp_path)
    said = r"is of another model or optimiser: params/w is float32\[2\], not float32\[3\]"
    with pytest.raises(ValueError, match=said):
        go(tmp_path, steps=8, width=3)
    assert int(go(tmp_path, steps=8).step) == 8


def test_the_same_configuration_resumes(tmp_path):
    go(tmp_path, config=CONFIG)
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert not list(tmp_path.glob("*.partial"))
    assert int(go(tmp_path, config=CONFIG, steps=8).step) == 8, "steps that the configuration does not name may grow"


def test_fields_that_are_free_may_change_and_the_last_are_kept(tmp_path):
    free = {"free": ("data", "steps")}
    go(tmp_path, config=CONFIG | {"data": "a"}, **free)
    assert int(go(tmp_path, config=CONFIG | {"data": "b", "steps": 8}, **free, steps=8).step) == 8
    assert json.loads((tmp_path / "run.json").read_text())["data"] == "b"


def test_a_run_whose_warmup_is_a_share_of_the_steps_cannot_be_made_longer(tmp_path):
    config = CONFIG | {"schedule": "constant", "warmup": 0.1}
    go(tmp_path, config=config | {"steps": 4})
    with pytest.raises(
        ValueError, match=r"steps was 4 and is 8.* Its warmup, 0\.1, is a share of the steps: a run with"
    ):
        go(tmp_path, config=config | {"steps": 8}, steps=8)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CONFIG | {"learning_rate": 0.2}, "learning_rate was 0.1 and is 0.2"),
        (CONFIG | {"seed": 1, "sizes": [4]}, "seed was 0 and is 1; sizes was [4, 2] and is [4]"),
        (CONFIG | {"steps": 4}, "steps was absent and is 4"),
        ({name: CONFIG[name] for name in ("learning_rate", "sizes")}, "seed was 0 and is absent"),
    ],
)
def test_another_configuration_is_refused_and_nothing_changes(tmp_path, config, said):
    go(tmp_path, config=CONFIG)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as error:
        go(tmp_path, config=config, steps=8)
    assert said in str(error.value) and str(tmp_path) in str(error.value)
    assert ("A run can be made longer if its learning rate does not depend" in str(error.value)) == ("steps" in config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"begun without a run\.json"),
        ("{", r"run\.json is not JSON"),
        ("[1]", r"run\.json must hold a JSON object, but holds a list"),
    ],
)
def test_a_missing_or_damaged_configuration_is_named(tmp_path, text, said):
    go(tmp_path, config=None if text is None else CONFIG)
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        go(tmp_path, config=CONFIG, steps=8)
    assert (tmp_path / "run.json").exists() == (text is not None)
    assert int(go(tmp_path, steps=8).step) == 8


def test_a_run_that_reached_no_checkpoint_binds_nobody(tmp_path):
    with pytest.raises(RuntimeError):
        go(tmp_path, config=CONFIG, at=1, error=KeyError("gold"))
    go(tmp_path, config=CONFIG | {"seed": 1})
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


# Checkpoints and the log ----------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit_and_the_newest_are_kept(tmp_path):
    def state(step, seed):
        params = {"w": jax.random.normal(jax.random.key(seed), (3,)), "n": jnp.asarray(seed, jnp.bfloat16)}
        return steps.initial_state(params, optax.adam(0.1), jax.random.key(seed))._replace(step=jnp.asarray(step))

    checkpoints = Checkpoints(tmp_path / "deep" / "folder", keep=2)
    assert checkpoints.latest_step() is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*deep/folder"):
        checkpoints.restore(state(0, 0))
    for step in (1, 2, 3):
        checkpoints.save(step, state(step, step))
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir() if path.is_dir()) == ["2", "3"]
    found = Checkpoints(tmp_path / "deep" / "folder").restore(state(0, 0))
    data = [each._replace(key=jax.random.key_data(each.key)) for each in (found, state(3, 3))]
    jax.tree.map(np.testing.assert_array_equal, *data)
    assert jax.tree.map(lambda leaf: leaf.dtype, data[0]) == jax.tree.map(lambda leaf: leaf.dtype, data[1])


def test_the_log_drops_rows_of_steps_that_are_done_again_and_an_incomplete_line(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.truncate(0)
    assert log.rows() == []
    for step in (2, 4, 6):
        log.append(step=step, loss=1 / step)
    log.truncate(4)
    assert log.rows() == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in log.rows()] == [2, 4]
    log.truncate(4)
    log.append(step=6, loss=0.1)
    assert [row["step"] for row in log.rows()] == [2, 4, 6]


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = RunLog(tmp_path / "log.jsonl")
    log.truncate(0), log.append(step=1)
    loop.claim(tmp_path / "run.json", {"seed": 0}, resumed=False)
    assert not list(tmp_path.iterdir())


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
        patched.setattr(loop._TensorBoard, "module", staticmethod(lambda: types.SimpleNamespace(SummaryWriter=Writer)))
        go(tmp_path / "a", steps=2, tensorboard=True, evaluate=lambda params: {"sample": "Once"})
    assert written[0] == ("begun", "tensorboard", 1) and written[-1] == "closed"
    assert ("sample", "Once", 2) in written and any(row[0] == "loss" for row in written[1:-1])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxrl_llm\[tensorboard\]'"):
        go(tmp_path / "b", tensorboard=True)
    assert not (tmp_path / "b" / "log.jsonl").exists()


def test_weights_and_biases_receives_the_numbers_and_goes_on_with_a_run(tmp_path, monkeypatch):
    begun, logged = [], []

    class Run:
        id = "abc"

        def log(self, row, *, step):
            logged.append((step, row))

        def finish(self):
            logged.append("finished")

    def init(**options):
        begun.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    options = {"wandb": True, "evaluate": lambda params: {"held_out_loss": 1.0}, "config": CONFIG}
    go(tmp_path, steps=2, **options)
    go(tmp_path, steps=4, **options)
    go(tmp_path / "named", steps=2, **options)
    assert [each["id"] for each in begun] == [None, "abc", None] and begun[1]["resume"] == "allow"
    assert begun[0]["config"] == CONFIG and begun[0]["project"] == "jaxrl_llm" and begun[0]["dir"] == str(tmp_path)
    assert [row[0] for row in logged if row != "finished"] == [2, 4, 2] and logged.count("finished") == 3
    assert logged[0][1]["held_out_loss"] == 1.0 and "step" not in logged[0][1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"Weights & Biases needs the package wandb: pip install 'jaxrl_llm\[wa"
    ):
        go(tmp_path / "b", wandb=True)


def test_a_write_that_fails_leaves_the_file_before_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "run.json"
    loop.claim(path, {"seed": 0}, resumed=False)
    with pytest.raises(Crash), replacing(path) as partial:
        partial.write_text("{")
        raise Crash
    assert [each.name for each in path.parent.iterdir()] == ["run.json"] and json.loads(path.read_text()) == {"seed": 0}
    with pytest.raises(OSError, match=r"run\.json could not be written: No space left on device"), replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
