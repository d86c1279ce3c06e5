"""The command line `jaxrl-llm`. Heavy imports wait until the command is known, so that `--help` answers at once."""

from __future__ import annotations

import _thread
import concurrent.futures
import contextlib
import dataclasses
import io
import os
import sys
import threading
import traceback
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import tyro

from jaxrl_llm import __version__
from jaxrl_llm.cli import devices
from jaxrl_llm.cli.attention import Attention
from jaxrl_llm.cli.chat import Talk
from jaxrl_llm.cli.evaluate import Evaluate, Plot
from jaxrl_llm.cli.generate import Compare, Generate, SearchTree
from jaxrl_llm.cli.info import Info
from jaxrl_llm.cli.landscape import Landscape
from jaxrl_llm.cli.score import Score
from jaxrl_llm.cli.sycophancy import Sycophancy
from jaxrl_llm.cli.train import Train
from jaxrl_llm.cli.translate import Translate
from jaxrl_llm.options import field_docs, nearest

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Talk, tyro.conf.subcommand("chat")]
    | Annotated[Compare, tyro.conf.subcommand("decode-compare")]
    | Annotated[SearchTree, tyro.conf.subcommand("tree")]
    | Annotated[Landscape, tyro.conf.subcommand("landscape")]
    | Annotated[Attention, tyro.conf.subcommand("attention")]
    | Annotated[Translate, tyro.conf.subcommand("translate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Sycophancy, tyro.conf.subcommand("sycophancy")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)

# Commands that act on Ctrl-C themselves, or call a reward function of the user's, which may set a signal handler.
ON_THEIR_OWN = (Talk, Landscape, Train, Evaluate)

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _none(given: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Parse None as tyro does, but show it without braces: --top-k None|INT."""
    if given.type is not type(None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="None",
        instance_from_str=lambda words: None,
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: ["None"],
        choices=("None",),
    )


def _describe(kind: Any) -> None:
    """Give the fields of the dataclasses in a type their docstrings as help: tyro would keep the line breaks."""
    for inner in typing.get_args(kind):
        _describe(inner)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        docs = field_docs(kind)
        for field in dataclasses.fields(kind):
            field.metadata = types.MappingProxyType({"help": docs.get(field.name), **field.metadata})
        for hint in typing.get_type_hints(kind, include_extras=True).values():
            _describe(hint)


def main() -> None:
    """Entry point of `jaxrl-llm`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what its encoding lacks is written as \u2212
    if sys.argv[1:] == ["--version"]:
        print(f"jaxrl-llm {__version__}")
        return
    warnings.formatwarning = lambda message, *_, **__: f"jaxrl-llm: {message}\n"  # without lines of the source
    _describe(Command)
    try:
        command, unknown = tyro.cli(
            Command,
            prog="jaxrl-llm",
            description="Train language models, decode from them, and analyse both. --version prints the version.",
            config=(
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.PositionalMetavarFromFieldName,
            ),
            registry=REGISTRY,
            return_unknown_args=True,
        )
        _refuse(unknown, command)
        from jaxrl_llm import runtime

        runtime.set_up()
        if isinstance(command, Train):
            runtime.keep_memory()
        sys.unraisablehook = _interrupt_again
        if isinstance(command, ON_THEIR_OWN):
            command.run()
        else:  # in another thread: a signal waits for what is compiled and run in this one, as for minutes
            concurrent.futures.ThreadPoolExecutor(1).submit(command.run).result()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        raise SystemExit(0) from None
    except FileNotFoundError as error:
        _say(f"there is no file {error.filename}." if error.errno else error)
        devices.leave(2)
    except (ValueError, FloatingPointError, OSError, OverflowError, ModuleNotFoundError, RuntimeError) as error:
        _say(devices.reason(error))
        devices.leave(2)
    except Exception:  # an error of the program's own
        traceback.print_exc()
        devices.leave(1)
    except KeyboardInterrupt as interrupt:  # a run says that it can be resumed
        if str(interrupt):
            _say(interrupt)
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # at once: Python's own way out would free what XLA's threads still compile, and crash


def _say(what: object) -> None:
    """Print a sentence on standard error, with its end of line at once: jax's threads may write meanwhile."""
    sys.stderr.write(f"jaxrl-llm: {what}\n")


def _interrupt_again(ignored: Any) -> None:
    """Repeat an interruption that Python ignores, as it does in a destructor or in a callback of its collector."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(ignored)


def _refuse(unknown: Sequence[str], command: Any) -> None:
    """Raise ValueError for a list without a value, and for the first option or word that the command does not know."""
    options = dict(_options(command))
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if option in sys.argv and isinstance(value, (tuple, list, dict)) and not value:
            raise ValueError(f"{option} must have at least one value, but has none.")
    if not unknown:
        return
    word = next((each for each in unknown if each.startswith("--")), unknown[0])
    option = word.split("=")[0]
    near = nearest(option.removeprefix("--").replace("-", "_"), options) if option.startswith("--") else None
    hint = f": did you mean --{near.strip('_').replace('_', '-')}?" if near else "."
    if not word.startswith("-"):
        hint = ": put a text of several words in quotes." if {"prompt", "text"} & {*options} else "."
        raise ValueError(f"the command takes no further argument, but is given {word!r}{hint}")
    raise ValueError(f"there is no option {option}{hint}")


def _options(command: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a command's options."""
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value)
        else:
            yield field.name, value
