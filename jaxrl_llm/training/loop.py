"""One loop for every training run: steps, checkpoints, a log, and a run that can be stopped and resumed."""

from __future__ import annotations

import contextlib
import math
import time as clock
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrl_llm.language_model import Params
from jaxrl_llm.training import guards, run_config
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.run_log import RunLog
from jaxrl_llm.training.steps import Metrics, TrainState


def run(
    state: TrainState,
    advance: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    *,
    steps: int,
    folder: Path,
    evaluate: Callable[[Params], Mapping[str, float | str]] = lambda params: {},
    evaluate_every: int,
    log_every: int | None = None,
    tokens: Callable[[int], int] | str | None = None,
    config: Mapping[str, Any] | None = None,
    watch: Sequence[str] = ("loss",),
    describe: Callable[[int], str] = lambda step: "",
    keep: int = 2,
    tensorboard: bool = False,
) -> TrainState:
    """Train for `steps` steps in `folder`, or go on from the last checkpoint there, with a progress bar.

    Every `log_every` steps it writes a line of `log.jsonl`: step, the metrics' means since the last line, seconds,
    tokens and tokens per second. Every `evaluate_every` steps and at the end there is a line that has what `evaluate`
    gives as well, texts are shown on the terminal, and a checkpoint is written. Ctrl-C and SIGTERM finish the step,
    write a checkpoint and raise KeyboardInterrupt; a second one stops at once (of several processes each must be told).
    A step that raises before it donated the state, such as one whose reward fails, loses nothing: those before it are
    saved.

    A resumed run ends with the same parameters as an uninterrupted one, bit for bit on one kind of machine, if
    `advance` depends on nothing but its arguments.

    Args:
        state: before the first step.
        advance: `(state, steps done) -> (state, metrics)`, one step; it may donate the state. `loss` is a metric.
        tokens: how many were predicted in so many steps; or the name of the metric that counts those of one step.
        config: whatever decides what the run does, as JSON has it: kept in `run.json`, and a run is resumed only with
            the same one. Of `steps` it says nothing by itself: with them in `config` (as a schedule that ends with them
            needs) a run cannot be made longer, without them it can.
        watch: the metrics that the progress bar shows.
        describe: what the batch of a step is, for the error that names it.
        keep: how many of the newest checkpoints stay.
        tensorboard: write the numbers as TensorBoard's events too (needs the extra `tensorboard`).

    Raises:
        FloatingPointError: if a metric, or a number of `evaluate`, is not finite; the last checkpoint stays.
        RuntimeError, or ValueError where it was one: whatever `advance` or `evaluate` raises, naming the step, the
            batch and the checkpoint that the run goes on from.
        OSError: if a checkpoint cannot be written; the one before stays.
        ValueError: if the folder holds the checkpoint of a run with another configuration (its fields and both values
            are named), with none to compare, of another model, or of more steps; if `config` is not JSON; or if
            `log_every` or `evaluate_every` is below 1.
    """
    log_every = evaluate_every if log_every is None else log_every
    if min(log_every, evaluate_every) < 1:
        raise ValueError(f"log_every and evaluate_every must be at least 1, but are {log_every} and {evaluate_every}.")
    checkpoints = Checkpoints(folder / "checkpoints", keep=keep)
    state = _resumed(state, checkpoints, folder, steps, config)
    done = int(state.step)
    log = RunLog(folder / "log.jsonl", tensorboard=folder / "tensorboard" if tensorboard else None)
    log.truncate(done)
    window = _Window(done, tokens)
    progress = tqdm(range(done + 1, steps + 1), initial=done, total=steps, unit="step")
    with guards.interruptions() as interrupted, contextlib.closing(log):
        for step in progress:
            at = guards.Step(step, describe, checkpoints)
            state, metrics = at.advanced(advance, state)
            found = {name: float(value) for name, value in metrics.items()}
            progress.set_postfix({name: f"{found[name]:.3g}" for name in watch if name in found})
            at.check_finite(found)
            window.add(found)
            stop, looked = bool(interrupted), step % evaluate_every == 0 or step == steps
            evaluated, failure = guards.evaluated(evaluate, state.params) if looked else ({}, None)
            if looked or step % log_every == 0:
                _show(progress, step, evaluated)
                # The row first: a run that stops between the two drops it and does these steps again.
                log.append(step=step, **window.row(step), **evaluated)
                window = _Window(step, tokens)
            if looked or stop:
                checkpoints.save(step, state)
            if failure is not None:
                raise at.error("the evaluation after ", failure) from failure
            if stop and step < steps:
                raise KeyboardInterrupt(f"stopped after step {step} of {steps}; the run in {folder} can be resumed.")
    return state


def _resumed(
    state: TrainState, checkpoints: Checkpoints, folder: Path, steps: int, config: Mapping[str, Any] | None
) -> TrainState:
    """The newest checkpoint of this very run, or the state before its first step."""
    started_before = checkpoints.latest_step()
    if (started_before or 0) > steps:
        raise ValueError(f"{folder} holds a run of {started_before} steps already: steps must not be {steps}.")
    if config is not None:
        run_config.claim(folder / "run.json", config, resumed=started_before is not None)
    return state if started_before is None else checkpoints.restore(state)


class _Window:
    """The steps since the last row of the log."""

    def __init__(self, step: int, tokens: Callable[[int], int] | str | None):
        self._step, self._tokens, self._rows, self._started = step, tokens, [], clock.perf_counter()

    def add(self, metrics: Mapping[str, float]) -> None:
        self._rows.append(metrics)

    def row(self, step: int) -> dict[str, float]:
        """The metrics' means, the tokens predicted so far, how long it took, and the tokens per second."""
        seconds = clock.perf_counter() - self._started
        row = {name: math.fsum(row[name] for row in self._rows) / len(self._rows) for name in self._rows[-1]}
        row["seconds"] = round(seconds, 1)
        if self._tokens is None:
            return row
        if isinstance(self._tokens, str):
            count = math.fsum(each[self._tokens] for each in self._rows)
        else:
            row = {"tokens": self._tokens(step), **row}
            count = row["tokens"] - self._tokens(self._step)
        return row | {"tokens_per_second": round(count / max(seconds, 1e-9), 1)}


def _show(progress: tqdm, step: int, evaluated: Mapping[str, float | str]) -> None:
    for name, value in evaluated.items():
        if isinstance(value, str):
            progress.write(f"step {step}, {name}: {value}")
