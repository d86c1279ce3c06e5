"""`jaxrl-llm chat`: a conversation in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro

from jaxrl_llm.decoding_options import Sampling

COMMANDS = """\
/undo           forget the last message and its reply
/clear          forget all messages
/system TEXT    clear, with this system message; without TEXT, none
/help           this list
/quit           leave, as Ctrl-D does"""
DEFAULTS = Sampling(max_new_tokens=512)


@dataclasses.dataclass(frozen=True)
class Talk:
    """Talk with a model that has a chat template. Ctrl-C ends a reply; /help lists the commands."""

    model: str = "smollm2-135m-instruct"
    """As in `generate`."""
    system: str | None = None
    """The system's message."""
    greedy: bool = False
    """Take the most probable tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: DEFAULTS)

    def run(self) -> None:
        """Answer messages from standard input, one a line, until it ends."""
        import jaxrl_llm as jl

        lm = jl.load(self.model, dtype=self.dtype)
        chat = jl.Chat(lm, system=self.system, greedy=self.greedy, **vars(self.sampling))
        if sys.stdin.isatty():
            print(f"{lm!r}\n/help lists the commands.", file=sys.stderr)
        for line in _lines():
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            try:
                if command.startswith("/"):
                    _obey(chat, command, rest.strip())
                elif line.strip():
                    self._answer(chat, line)
            except ValueError as error:  # the conversation goes on
                print(f"jaxrl-llm: {error}", file=sys.stderr)

    def _answer(self, chat: Any, message: str) -> None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                for piece in chat.stream(message):
                    print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print("\nstopped: this message and its reply are forgotten.", file=sys.stderr)
            return
        told = [str(warning.message) for warning in caught]
        if chat.completion.finish_reason == "length" and not any("was cut after" in each for each in told):
            told.append(f"cut after {len(chat.completion.tokens)} tokens")
        for sentence in told:
            print(f"[{sentence}]", file=sys.stderr)


def _obey(chat: Any, command: str, text: str) -> None:
    """Run a command of `COMMANDS`."""
    known = {line.split()[0] for line in COMMANDS.splitlines()}
    if command not in known:
        raise ValueError(f"a command must be one of {', '.join(sorted(known))}, but is {command}.")
    if text and command != "/system":
        raise ValueError(f"{command} takes no text, but is given {text!r}.")
    if command == "/help":
        print(COMMANDS)
    elif command == "/undo":
        chat.undo()
    else:
        chat.system = chat.system if command == "/clear" else text or None
        chat.clear()


def _lines() -> Iterator[str]:
    """Yield lines of standard input; of a terminal with a prompt, and with the earlier ones by the arrow keys."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its history

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
