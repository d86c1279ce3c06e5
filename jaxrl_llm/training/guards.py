"""What a run meets on its way: errors that name where, numbers that are not finite, and Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NamedTuple

import jax

from jaxrl_llm.language_model import Params
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.steps import Metrics, TrainState


class Step(NamedTuple):
    """The step of a run with this number, from 1, whose batch is `describe(number - 1)`."""

    number: int
    describe: Callable[[int], str]
    checkpoints: Checkpoints

    def advanced(
        self, advance: Callable[[TrainState, int], tuple[TrainState, Metrics]], state: TrainState
    ) -> tuple[TrainState, Metrics]:
        """The step done. If it raises before it donated the state, the steps before it are saved."""
        done = self.number - 1
        try:
            return advance(state, done)
        except Exception as error:
            whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
            if whole and done > (self.checkpoints.latest_step() or 0):
                self.checkpoints.save(done, state)
            raise self.error("", error) from error

    def check_finite(self, metrics: Mapping[str, float]) -> None:
        """Raise FloatingPointError unless all are, the loss looked at first."""
        for name in ("loss", "grad_norm", *metrics):
            if not math.isfinite(metrics.get(name, 0.0)):
                spoken = "norm of the gradient" if name == "grad_norm" else name
                raise FloatingPointError(f"the {spoken} became {metrics[name]} at {self._where()}; {self._remains()}.")

    def error(self, before: str, error: Exception) -> Exception:
        """The error with the step, the batch and the checkpoint: a ValueError remains one."""
        kind = next((kind for kind in (ValueError, FloatingPointError) if isinstance(error, kind)), RuntimeError)
        said = str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"
        return kind(f"{before}{self._where()} failed: {said.rstrip('.')}; {self._remains()}.")

    def _where(self) -> str:
        batch = self.describe(self.number - 1)
        return f"step {self.number}{f' ({batch})' if batch else ''}"

    def _remains(self) -> str:
        last = self.checkpoints.latest_step()
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is that of step {last}"


def evaluated(
    evaluate: Callable[[Params], Mapping[str, float | str]], params: Params
) -> tuple[dict[str, float | str], Exception | None]:
    """What is measured, or the error instead: it is raised when the steps that are done are saved."""
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
    """A list that a first Ctrl-C or SIGTERM puts its number into; after it they act as before.

    Python hands signals to the main thread alone: elsewhere nothing is caught.
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
