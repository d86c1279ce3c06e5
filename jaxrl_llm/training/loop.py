"""The loop of every training run: steps, checkpoints, a log, and runs that can be stopped and resumed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import threading
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from jaxrl_llm.language_model import Params
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.steps import Metrics, TrainState

Advance = Callable[[TrainState, int], tuple[TrainState, Metrics]]


def run(
    state: TrainState,
    advance: Advance,
    *,
    steps: int,
    folder: Path | None,
    evaluate: Callable[[Params], Mapping[str, float | str]] = lambda params: {},
    evaluate_every: int,
    log_every: int | None = None,
    tokens: Callable[[int], int] | str | None = None,
    config: Mapping[str, Any] | None = None,
    watch: Sequence[str] = ("loss",),
    describe: Callable[[int], str] = lambda step: "",
    keep: int = 2,
    tensorboard: bool = False,
    verbose: bool = True,
) -> TrainState:
    """Train for `steps` steps in `folder`, or continue from the last checkpoint there, with a progress bar.

    Every `log_every` steps it writes a line of `log.jsonl`: the step, the means of the metrics since the last line,
    seconds, tokens and tokens per second. Every `evaluate_every` steps and at the end the line also has the results of
    `evaluate`, texts are shown on the terminal, and a checkpoint is written. Ctrl-C and SIGTERM finish the step, write
    a checkpoint and raise KeyboardInterrupt; a second one stops at once (of several processes, signal each). If a step
    raises before it donated the state, for example because its reward fails, the steps before it are saved.

    A resumed run ends with the same parameters as an uninterrupted one, bit for bit on one kind of machine, if
    `advance` depends on nothing but its arguments.

    Args:
        state: before the first step.
        advance: one step, `(state, number of steps done) -> (state, metrics)`; it may donate the state. `loss` is one
            of the metrics.
        folder: of checkpoints and log. None keeps the run in memory: nothing is written, and nothing can be resumed.
        tokens: number of tokens predicted in the first n steps, or the name of the metric that counts those of a step.
        config: the fields that identify the run, as JSON. They are kept in `run.json`, and a run is resumed only with
            the same ones. A run can be made longer unless `steps` is one of them, as it must be for a schedule that
            ends with the run.
        watch: metrics that the progress bar shows.
        describe: names the batch of a step in errors.
        keep: number of checkpoints that are kept, the newest.
        tensorboard: write the numbers as TensorBoard events too (needs the extra `tensorboard`).
        verbose: show the progress bar and texts.

    Raises:
        FloatingPointError: if a metric, or a number of `evaluate`, is not finite; the last checkpoint stays.
        RuntimeError, or ValueError for a ValueError: whatever `advance` or `evaluate` raises, with the step, the batch
            and the last checkpoint.
        OSError: if a checkpoint cannot be written; the one before it stays.
        ValueError: if the folder has a checkpoint of a run with another configuration (its fields and both values are
            named), with none to compare, of another model, or of more steps; if `config` is not JSON; or if
            `log_every` or `evaluate_every` is below 1.
    """
    log_every = evaluate_every if log_every is None else log_every
    if min(log_every, evaluate_every) < 1:
        raise ValueError(f"log_every and evaluate_every must be at least 1, but are {log_every} and {evaluate_every}.")
    checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", keep=keep)
    log = None if folder is None else RunLog(folder / "log.jsonl", tensorboard=tensorboard)
    if checkpoints is not None:
        state = _resumed(state, checkpoints, folder, steps, config)
        log.truncate(int(state.step))
    done = int(state.step)
    window = _Window(done, tokens)
    progress = tqdm(range(done + 1, steps + 1), initial=done, total=steps, unit="step", disable=not verbose)
    with interruptions() as interrupted, contextlib.closing(log) if log else contextlib.nullcontext():
        for step in progress:
            at = _Step(step, describe, checkpoints)
            state, metrics = at.advanced(advance, state)
            found = {name: float(value) for name, value in metrics.items()}
            progress.set_postfix({name: f"{found[name]:.3g}" for name in watch if name in found})
            at.check_finite(found)
            window.add(found)
            stop, looked = bool(interrupted), step % evaluate_every == 0 or step == steps
            evaluated, failure = _evaluated(evaluate, state.params) if looked else ({}, None)
            if looked or step % log_every == 0:
                for name, value in evaluated.items():
                    if verbose:
                        progress.write(f"step {step}, {name}: {value if isinstance(value, str) else f'{value:.4g}'}")
                if log is not None:
                    # The row first: a run that stops between the two drops it and does these steps again.
                    log.append(step=step, **window.row(step), **evaluated)
                window = _Window(step, tokens)
            if checkpoints is not None and (looked or stop):
                checkpoints.save(step, state)
            if failure is not None:
                raise at.error("the evaluation after ", failure) from failure
            if stop and step < steps:
                resumed = "nothing is saved" if folder is None else f"the run in {folder} can be resumed"
                raise KeyboardInterrupt(f"stopped after step {step} of {steps}; {resumed}.")
    return state


def _resumed(
    state: TrainState, checkpoints: Checkpoints, folder: Path, steps: int, config: Mapping[str, Any] | None
) -> TrainState:
    """Return the newest checkpoint of this very run, or the state before its first step."""
    done = checkpoints.latest_step()
    if (done or 0) > steps:
        raise ValueError(
            f"{folder} already has a run of {done} steps; it cannot be shortened to {steps}. "
            f"Choose another folder, or steps of at least {done}."
        )
    if config is not None:
        claim(folder / "run.json", config, resumed=done is not None)
    return state if done is None else checkpoints.restore(state)


class _Window:
    """The steps since the last row of the log."""

    def __init__(self, step: int, tokens: Callable[[int], int] | str | None):
        self._step, self._tokens, self._rows, self._started = step, tokens, [], clock.perf_counter()

    def add(self, metrics: Mapping[str, float]) -> None:
        self._rows.append(metrics)

    def row(self, step: int) -> dict[str, float]:
        """Return the means of the metrics, the tokens predicted so far, the seconds, and the tokens per second.

        A metric that a step does not have, such as a reward that judged none of its completions, is not in the mean.
        """
        seconds = clock.perf_counter() - self._started
        columns = {
            name: [row[name] for row in self._rows if name in row]
            for name in dict.fromkeys(itertools.chain(*self._rows))
        }
        row = {name: math.fsum(column) / len(column) for name, column in columns.items()}
        row["seconds"] = round(seconds, 1)
        if self._tokens is None:
            return row
        if isinstance(self._tokens, str):
            count = math.fsum(each[self._tokens] for each in self._rows)
        else:
            row = {"tokens": self._tokens(step), **row}
            count = row["tokens"] - self._tokens(self._step)
        return row | {"tokens_per_second": round(count / max(seconds, 1e-9), 1)}


# Steps and evaluations that fail, and signals -------------------------------------------------------------------------


class _Step(NamedTuple):
    """The step of a run with this number, from 1; its batch is `describe(number - 1)`."""

    number: int
    describe: Callable[[int], str]
    checkpoints: Checkpoints | None

    def advanced(self, advance: Advance, state: TrainState) -> tuple[TrainState, Metrics]:
        """Do the step. If it raises before it donated the state, save the steps before it."""
        done = self.number - 1
        try:
            return advance(state, done)
        except Exception as error:
            whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
            if whole and self.checkpoints is not None and done > (self.checkpoints.latest_step() or 0):
                self.checkpoints.save(done, state)
            raise self.error("", error) from error

    def check_finite(self, metrics: Mapping[str, float]) -> None:
        """Raise FloatingPointError for the first metric that is not finite, loss first."""
        for name in ("loss", "grad_norm", *metrics):
            if not math.isfinite(metrics.get(name, 0.0)):
                spoken = "norm of the gradient" if name == "grad_norm" else name
                raise FloatingPointError(f"the {spoken} became {metrics[name]} at {self._where()}; {self._remains()}.")

    def error(self, before: str, error: Exception) -> Exception:
        """Return the error with the step, the batch and the last checkpoint; a ValueError remains one."""
        kind = next((kind for kind in (ValueError, FloatingPointError) if isinstance(error, kind)), RuntimeError)
        said = str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"
        return kind(f"{before}{self._where()} failed: {said.rstrip('.')}; {self._remains()}.")

    def _where(self) -> str:
        batch = self.describe(self.number - 1)
        return f"step {self.number}{f' ({batch})' if batch else ''}"

    def _remains(self) -> str:
        last = None if self.checkpoints is None else self.checkpoints.latest_step()
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is that of step {last}"


def _evaluated(
    evaluate: Callable[[Params], Mapping[str, float | str]], params: Params
) -> tuple[dict[str, float | str], Exception | None]:
    """Return the results, or the error instead, which is raised once the steps before it are saved."""
    try:
        found = dict(evaluate(params))
        for name, value in found.items():
            if not isinstance(value, str) and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
        return found, None
    except Exception as error:
        return {}, error


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """Yield a list that a first Ctrl-C or SIGTERM adds its number to; after that signals act as usual.

    Python delivers signals to the main thread alone: in other threads nothing is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# run.json -------------------------------------------------------------------------------------------------------------


def claim(path: Path, config: Mapping[str, Any], *, resumed: bool) -> None:
    """Write the configuration of a new run to `path`, atomically, or compare it with that of a resumed one.

    Of several processes the first one writes.

    Raises:
        ValueError: if `config` is not JSON, or the resumed run was begun with another one or with none.
    """
    try:
        text = json.dumps(dict(config), indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a run's configuration must be a dict of what JSON can hold, but is {config!r}.") from error
    if resumed:
        _compare(path, json.loads(text))
    elif jax.process_index() == 0:
        _write(path, text + "\n")


def _compare(path: Path, config: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has a run that was begun without a {path.name}, so that its configuration is unknown: "
            "remove the folder to train anew, or write the configuration there."
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(stored).__name__}.")
    before, now = (
        {name: json.dumps(value, sort_keys=True) for name, value in each.items()} for each in (stored, config)
    )
    different = [
        f"{name} was {before.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{path.parent} has a run of another configuration: {'; '.join(different)}. "
            "Resume it with its own, or choose another folder."
        )


def _write(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# log.jsonl ------------------------------------------------------------------------------------------------------------


class RunLog:
    """Rows with a `step` each, as JSON lines. A resumed run drops those of the steps that it will do again.

    Of several processes the first one writes.

    Args:
        path: of the JSON lines.
        tensorboard: write the same numbers as events to the folder `tensorboard` beside it.

    Raises:
        ModuleNotFoundError: if events are asked for and tensorboardX is not installed.
    """

    def __init__(self, path: Path, *, tensorboard: bool = False):
        self.path, self._tensorboard = path, tensorboard
        self._events, self._writes = None, jax.process_index() == 0
        if tensorboard:
            _event_writer()  # a missing package is an error now, not after the first steps

    def rows(self) -> list[dict[str, float]]:
        """Return all rows so far; an incomplete last line is ignored."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def truncate(self, step: int) -> None:
        """Keep the rows up to `step`."""
        if not self._writes:
            return
        _write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step))
        if self._tensorboard:
            self._events = _event_writer()(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def append(self, **row: float | str) -> None:
        """Add a row; ValueError for a number that JSON cannot hold."""
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, str):
                    self._events.add_text(name, value, row["step"])
                elif name != "step":
                    self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def close(self) -> None:
        """Close the events."""
        if self._events is not None:
            self._events.close()


def _event_writer() -> type:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorBoard events need the package tensorboardX: pip install 'jaxrl_llm[tensorboard]'"
        ) from error
    return SummaryWriter
