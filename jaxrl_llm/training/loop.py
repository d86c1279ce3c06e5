"""The loop of every training run: steps, checkpoints, a log, and runs that can be stopped and resumed."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import signal
import threading
import time as clock
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxrl_llm import mesh as meshes
from jaxrl_llm import runtime
from jaxrl_llm.files import replacing
from jaxrl_llm.language_model import Params
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.config import direction, kind_of
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
    numbers: Callable[[int], Mapping[str, float]] = lambda step: {},
    config: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    watch: Sequence[str] = ("loss",),
    describe: Callable[[int], str] = lambda step: "",
    keep: int = 2,
    keep_best: str | None = None,
    tensorboard: bool = False,
    wandb: bool = False,
    verbose: bool = True,
) -> TrainState:
    """Train for `steps` steps in `folder`, or continue from the last checkpoint there, with a progress bar.

    Every `log_every` steps it writes a line of `log.jsonl`: the step, the means of the metrics since the last line,
    seconds, tokens and tokens per second, and `numbers`, such as the learning rate. Every `evaluate_every` steps and at
    the end the line also has the results of `evaluate`, which are shown on the terminal, and a checkpoint is written.
    Ctrl-C and SIGTERM finish the step, write a checkpoint and raise KeyboardInterrupt, on all of several processes if
    one is signalled; a second one stops at once. If a step raises before it donated the state, for example because its
    reward fails, the steps before it are saved.

    A resumed run ends with the same parameters as an uninterrupted one, bit for bit on one kind of machine, if
    `advance` depends on nothing but its arguments.

    Args:
        state: before the first step.
        advance: one step, `(state, number of steps done) -> (state, metrics)`; it may donate the state. `loss` is one
            of the metrics.
        folder: of checkpoints and log. None keeps the run in memory: nothing is written, and nothing can be resumed.
        tokens: number of tokens predicted in the first n steps, or the name of the metric that counts those of a step.
        numbers: further numbers of a line, after n steps.
        config: the fields that identify the run, as JSON. They are kept in `run.json`, and a run is resumed only with
            the same ones. A run can be made longer unless `steps` is one of them, as it must be for a schedule that
            ends with the run.
        free: those of the fields that are kept too, but may change.
        watch: metrics that the progress bar shows.
        describe: names the batch of a step in errors.
        keep: number of checkpoints that are kept, the newest.
        keep_best: a number of `evaluate`, as `config.direction` reads it. The parameters with its best value so far are
            kept too, in the folder `best`, and are those of the state that is returned.
        tensorboard: write the numbers as TensorBoard events too (needs the extra `tensorboard`).
        wandb: send them to Weights & Biases too (needs the extra `wandb`).
        verbose: show the progress bar (on a terminal), texts, and a summary at the end.

    Raises:
        FloatingPointError: if a metric, or a number of `evaluate`, is not finite; the last checkpoint stays.
        RuntimeError, or ValueError for a ValueError: whatever `advance` or `evaluate` raises, with the step, the batch
            and the last checkpoint.
        OSError: if a checkpoint cannot be written; the one before it stays.
        ValueError: if the folder has a checkpoint of a run with another configuration (its fields and both values are
            named), with none to compare, of another model, or of more steps; if `config` is not JSON; if `log_every`
            or `evaluate_every` is below 1; or if `evaluate` has no number `keep_best`.
    """
    log_every = evaluate_every if log_every is None else log_every
    if min(log_every, evaluate_every) < 1:
        raise ValueError(f"log_every and evaluate_every must be at least 1, but are {log_every} and {evaluate_every}.")
    checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", keep=keep)
    log = None
    if folder is not None:
        log = RunLog(folder / "log.jsonl", tensorboard=tensorboard, wandb=wandb, config=config)
    rows: list[dict[str, float | str]] = []
    if checkpoints is not None:
        state = _resumed(state, checkpoints, folder, steps, config, free)
        log.truncate(int(state.step))
        meshes.wait(f"log {folder}")
        rows = log.rows()
    best = None if keep_best is None else _Best(keep_best, folder, state, rows)
    done = int(state.step)
    runtime.return_memory()
    window = _Window(done, tokens)
    progress = tqdm(
        range(done + 1, steps + 1), initial=done, total=steps, unit="step", disable=not verbose or runtime.is_file()
    )
    with interruptions() as interrupted, contextlib.closing(log) if log else contextlib.nullcontext():
        for step in progress:
            at = _Step(step, describe, checkpoints)
            state, metrics = at.advanced(advance, state)
            found = {name: float(value) for name, value in metrics.items()}
            progress.set_postfix({name: f"{found[name]:.3g}" for name in watch if name in found})
            at.check_finite(found)
            window.add(found)
            stop, looked = meshes.anywhere(bool(interrupted)), step % evaluate_every == 0 or step == steps
            evaluated, failure = _evaluated(evaluate, state.params) if looked else ({}, None)
            if looked or stop or step % log_every == 0:
                for line in _told(evaluated) if verbose else ():
                    progress.write(f"step {step}, {line}")
                rows.append({"step": step, **window.row(step), **numbers(step), **evaluated})
                if log is not None:
                    # The row first: a run that stops between the two drops it and does these steps again.
                    log.append(**rows[-1])
                window = _Window(step, tokens)
            if checkpoints is not None and (looked or stop):
                checkpoints.save(step, state)
            if failure is not None:
                raise at.error("the evaluation after ", failure) from failure
            if best is not None and looked:
                best.offer(evaluated, state)
            if stop and step < steps:
                resumed = "nothing is saved" if folder is None else f"the run in {folder} can be resumed"
                raise KeyboardInterrupt(f"stopped after step {step} of {steps}; {resumed}.")
    if verbose:
        print(summary(rows))
    if best is None:
        return state
    params = best.params(state.params)
    if verbose:
        print(f"The best {best.name} is that of step {best.step}, {best.value:.4g}: the model is that of this step.")
    return state._replace(params=params)


def _told(evaluated: Mapping[str, float | str]) -> Iterator[str]:
    """Yield the numbers of an evaluation in one line, and each text in its own."""
    numbers = [f"{name} {value:.4g}" for name, value in evaluated.items() if not isinstance(value, str)]
    if numbers:
        yield ", ".join(numbers)
    yield from (f"{name}: {value}" for name, value in evaluated.items() if isinstance(value, str))


SUMMED = ("loss", "perplexity", "accuracy", "margin", "reward", "kl")  # last words of metrics


def summary(rows: Sequence[Mapping[str, float | str]]) -> str:
    """Return the first and the last value in a log of each metric that tells what was reached, in one line."""
    found = dict.fromkeys(name for row in rows for name in row if kind_of(name) in SUMMED)
    names = sorted(found, key=lambda name: (name.startswith("held_out"), SUMMED.index(kind_of(name))))
    ends = [(name, [row[name] for row in rows if name in row]) for name in names]
    told = [f"{name} {values[0]:.4g}" + f" → {values[-1]:.4g}" * (len(values) > 1) for name, values in ends]
    steps = rows[-1]["step"] if rows else 0
    return f"{steps} step{'s' * (steps != 1)}: {', '.join(told)}."


def _resumed(
    state: TrainState,
    checkpoints: Checkpoints,
    folder: Path,
    steps: int,
    config: Mapping[str, Any] | None,
    free: Collection[str],
) -> TrainState:
    """Return the newest checkpoint of this very run, or the state before its first step."""
    done = checkpoints.latest_step()
    if (done or 0) > steps:
        raise ValueError(
            f"{folder} already has a run of {done} steps; it cannot be shortened to {steps}. "
            f"Choose another folder, or steps of at least {done}."
        )
    if config is not None:
        claim(folder / "run.json", config, resumed=done is not None, free=free)
    return state if done is None else checkpoints.restore(state)


class _Best:
    """The parameters at the best value of a number of the evaluation, in the folder `best` of a run or in memory.

    They are written after the checkpoint of their step, so that a run that stops between the two makes up for it.
    """

    def __init__(self, metric: str, folder: Path | None, state: TrainState, rows: Sequence[Mapping[str, float | str]]):
        self.name, self._sign = direction(metric)
        self._checkpoints = None if folder is None else Checkpoints(folder / "best", keep=1)
        self.step: int | None = None
        self._known: list[str] = []  # numbers of the last evaluation
        self.value, self._params = math.nan, None
        values = {row["step"]: row[self.name] for row in rows if self.name in row}
        kept = None if self._checkpoints is None else self._checkpoints.latest_step()
        best = max(values, key=lambda step: (self._sign * values[step], -step), default=None)
        if best not in (None, kept, int(state.step)):
            raise ValueError(
                f"keep_best must stay as it was in a resumed run: the best {self.name} so far is that of step {best}, "
                f"whose parameters were not kept."
            )
        if kept in values:
            self.step, self.value = kept, values[kept]
        if int(state.step) in values:
            self._take(values[int(state.step)], state)

    def offer(self, found: Mapping[str, float | str], state: TrainState) -> None:
        """Keep the parameters of a state if the number is better than before; the first of equals stays."""
        self._known = [name for name, value in found.items() if not isinstance(value, str)]
        if self.name in self._known:  # else a mean over nothing this time
            self._take(found[self.name], state)

    def _take(self, value: float, state: TrainState) -> None:
        if self.step is not None and self._sign * (value - self.value) <= 0:
            return
        self.step, self.value = int(state.step), float(value)
        if self._checkpoints is None:
            self._params = jax.tree.map(jnp.copy, state.params)
        else:
            self._checkpoints.save(self.step, state.params)

    def params(self, like: Params) -> Params:
        """Return the best parameters; ValueError if no evaluation had the number."""
        if self.step is None:
            listed = f"one of {', '.join(self._known)}" if self._known else "a number of the evaluation, which has none"
            raise ValueError(f"keep_best must be {listed}, but is {self.name}.")
        return self._params if self._checkpoints is None else self._checkpoints.restore(like)


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
            whole = whole and meshes.wait(f"step {self.number} failed", seconds=10)  # else others go on
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


def _longer(config: Mapping[str, Any]) -> str:
    """Return what a run needs so that it can be made longer."""
    if config.get("schedule") in ("constant", "inverse_sqrt"):
        return (
            f" Its warmup, {config.get('warmup')}, is a share of the steps: a run with one in steps can be made longer."
        )
    return (
        " A run can be made longer if its learning rate does not depend on the number of steps: begin it with the "
        "schedule constant or inverse_sqrt, and with a warmup in steps."
    )


def claim(path: Path, config: Mapping[str, Any], *, resumed: bool, free: Collection[str] = ()) -> None:
    """Write the configuration of a run to `path`, atomically; that of a resumed one must be the same but for `free`.

    Of several processes the first one writes.

    Raises:
        ValueError: if `config` is not JSON, or the resumed run was begun with another one or with none.
    """
    try:
        text = json.dumps(dict(config), indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a run's configuration must be a dict of what JSON can hold, but is {config!r}.") from error
    if resumed:
        _compare(path, json.loads(text), free)
    if jax.process_index() == 0:
        _write(path, text + "\n")


def _compare(path: Path, config: dict[str, Any], free: Collection[str]) -> None:
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
        {name: json.dumps(value, sort_keys=True) for name, value in each.items() if name not in free}
        for each in (stored, config)
    )
    different = [
        f"{name} was {before.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if different:
        longer = "" if before.get("steps") == now.get("steps") else _longer(stored)
        raise ValueError(
            f"{path.parent} has a run of another configuration: {'; '.join(different)}. "
            f"Resume it with its own, or choose another folder.{longer}"
        )


def _write(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


# log.jsonl ------------------------------------------------------------------------------------------------------------


class RunLog:
    """Rows with a `step` each, as JSON lines. A resumed run drops those of the steps that it will do again.

    Of several processes the first one writes.

    Args:
        path: of the JSON lines.
        tensorboard: write the same numbers as events to the folder `tensorboard` beside it.
        wandb: send them to Weights & Biases, as a run of the project WANDB_PROJECT, by default jaxrl_llm.
        config: of the run, for Weights & Biases.

    Raises:
        ModuleNotFoundError: if a package is asked for that is not installed.
    """

    def __init__(
        self, path: Path, *, tensorboard: bool = False, wandb: bool = False, config: Mapping[str, Any] | None = None
    ):
        self.path, self._config = path, config
        self._sinks: list[Any] = []
        self._writes = jax.process_index() == 0
        # A missing package is an error now, not after the first steps.
        self._kinds = [kind for kind, asked in ((_TensorBoard, tensorboard), (_Wandb, wandb)) if asked]
        for kind in self._kinds:
            kind.module()

    def rows(self) -> list[dict[str, float]]:
        """Return all rows so far; an incomplete last line is ignored."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def truncate(self, step: int) -> None:
        """Keep the rows up to `step`."""
        if not self._writes:
            return
        _write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step))
        self.close()
        self._sinks = [kind(self.path.parent, step, self._config) for kind in self._kinds]

    def append(self, **row: float | str) -> None:
        """Add a row; ValueError for a number that JSON cannot hold."""
        if not self._writes:
            return
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(f"the log {self.path} could not be written: {error.strerror}") from error
        for sink in self._sinks:
            sink.append(row)

    def close(self) -> None:
        """Close the events."""
        while self._sinks:
            self._sinks.pop().close()


class _TensorBoard:
    """Events in the folder `tensorboard` of a run; those after `step` are dropped."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any] | None):
        self._events = self.module().SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    @staticmethod
    def module() -> Any:
        return _required("tensorboardX", "TensorBoard events need", "tensorboard")

    def append(self, row: Mapping[str, float | str]) -> None:
        for name, value in row.items():
            if isinstance(value, str):
                self._events.add_text(name, value, row["step"])
            elif name != "step":
                self._events.add_scalar(name, value, row["step"])
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class _Wandb:
    """A run of Weights & Biases, whose id is kept in the folder of ours so that both are resumed together."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any] | None):
        wandb, path = self.module(), folder / "wandb_id"
        known = path.read_text(encoding="utf-8").strip() if step and path.is_file() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxrl_llm"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            dir=str(folder),
            config=None if config is None else dict(config),
            id=known,
            resume=None if known is None else "allow",
        )
        _write(path, f"{self._run.id}\n")

    @staticmethod
    def module() -> Any:
        return _required("wandb", "Weights & Biases needs", "wandb")

    def append(self, row: Mapping[str, float | str]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _required(name: str, what: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"{what} the package {name}: pip install 'jaxrl_llm[{extra}]'") from error
