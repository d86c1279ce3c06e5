"""The command line `jaxrl-llm`. Heavy imports wait until the command is known, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from jaxrl_llm.cli.attention import Attention
from jaxrl_llm.cli.generate import Compare, Generate, SearchTree
from jaxrl_llm.cli.landscape import Landscape
from jaxrl_llm.cli.sycophancy import Sycophancy
from jaxrl_llm.cli.train import Train
from jaxrl_llm.cli.translate import Translate

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Compare, tyro.conf.subcommand("decode-compare")]
    | Annotated[SearchTree, tyro.conf.subcommand("tree")]
    | Annotated[Landscape, tyro.conf.subcommand("landscape")]
    | Annotated[Attention, tyro.conf.subcommand("attention")]
    | Annotated[Translate, tyro.conf.subcommand("translate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sycophancy, tyro.conf.subcommand("sycophancy")]
)


def main() -> None:
    """Entry point of `jaxrl-llm`."""
    try:
        command = tyro.cli(
            Command,
            prog="jaxrl-llm",
            description="Train language models, decode from them, and analyse both.",
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
        from jaxrl_llm import runtime

        runtime.set_up()
        command.run()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        raise SystemExit(0) from None
    except FileNotFoundError as error:
        print(
            f"jaxrl-llm: there is no file {error.filename}." if error.errno else f"jaxrl-llm: {error}", file=sys.stderr
        )
        raise SystemExit(2) from None
    except (ValueError, FloatingPointError, OSError, OverflowError, ModuleNotFoundError, RuntimeError) as error:
        print(f"jaxrl-llm: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:  # a run says that it can be resumed
        if str(interrupt):
            print(f"jaxrl-llm: {interrupt}", file=sys.stderr)
        raise SystemExit(130) from None
