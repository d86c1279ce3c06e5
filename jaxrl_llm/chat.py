"""Conversations with a model: what was said is kept, and of each turn only what is new is read."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrl_llm import decoding, text
from jaxrl_llm import decoding_options as options_of
from jaxrl_llm.decoding.transforms import Transform
from jaxrl_llm.decoding_options import Sampling, Search
from jaxrl_llm.interface import LM, Completion, load
from jaxrl_llm.options import check_characters, takes


class Chat:
    """A conversation with a model, turn by turn.

        chat = jl.Chat("smollm2-135m-instruct", system="Answer in one word.")
        chat.send("What is the capital of France?")

    `messages` is the conversation so far, a list of {"role": ..., "content": ...}; `completion` the last reply with its
    tokens and log-probabilities. The cache of the model is kept: a turn reads the new message alone, as long as the
    conversation begins with the tokens that were read. A reply never takes more tokens than the context has left, and a
    warning says when it was cut for that; with `context="slide"` it goes on, and what came before is forgotten.
    """

    @takes(Sampling)
    def __init__(
        self,
        lm: LM | str | os.PathLike[str],
        *,
        system: str | None = None,
        greedy: bool = False,
        transforms: Sequence[Transform] = (),
        **options: Any,
    ):
        """Begin a conversation.

        Args:
            lm: a model with a chat template, its name or its path.
            system: the system's message, if the template takes one.
            greedy, transforms: as in `LM.stream`.

        Options: listed here.

        Raises:
            TypeError: if `lm` is not a model, its name or its path, or for an unknown option.
            ValueError: for an option that is out of range, or a model without a chat template.
        """
        self.lm = load(lm) if isinstance(lm, str | os.PathLike) else lm
        if not isinstance(self.lm, LM):
            raise TypeError(f"lm must be a model, its name or its path, but is a {type(lm).__name__}.")
        self._how = {"greedy": greedy, "transforms": transforms}
        self.sampling = Sampling(**options)
        options_of.check("greedy" if greedy else "sample", self.sampling, Search())
        if self.sampling.cut is not None or self.sampling.guidance_prompt is not None:
            raise ValueError("a chat does not use cut and guidance_prompt: undo makes room in its context.")
        if self.sampling.heal:
            raise ValueError("a chat does not use heal: its prompts end where a reply begins.")
        self.system = system
        self.clear()
        text.encode(self.lm.tokenizer, [*self.messages, {"role": "user", "content": ""}], chat=True)  # or an error now

    def clear(self) -> None:
        """Forget all but the system's message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.completion: Completion | None = None
        self._memory = decoding.Memory()

    def undo(self) -> None:
        """Forget the last message of the user with its reply.

        Raises:
            ValueError: if there is none.
        """
        if len(self.messages) < 2:
            raise ValueError("undo needs a message and its reply, but the conversation has none.")
        del self.messages[-2:]

    def send(self, message: str) -> str:
        """Return the reply to a user's message.

        Raises:
            ValueError: as `stream`.
        """
        return "".join(self.stream(message))

    def stream(self, message: str) -> Iterator[str]:
        """Return an iterator over the reply in pieces. The turn counts once the reply has ended.

        Raises:
            TypeError: if the message is not a string.
            ValueError: if the conversation fills the context, or as `LM.stream`.
        """
        if not isinstance(message, str):
            raise TypeError(f"message must be a string, but is a {type(message).__name__}.")
        check_characters(message, "the message")
        asked = [*self.messages, {"role": "user", "content": message}]
        sampling = self.sampling
        if sampling.context == "slide":
            return self._turn(asked, self.lm.stream([asked], chat=True, **self._how, **vars(sampling)))
        used, most = len(text.encode(self.lm.tokenizer, asked, chat=True)), self.lm.model.max_length
        if used >= most:
            raise ValueError(
                f"a conversation must leave room for a reply in the context of {most} tokens, but has {used}: "
                "undo turns, or clear it."
            )
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, most - used))
        reply = self.lm.stream([asked], chat=True, memory=self._memory, **self._how, **vars(sampling))
        return self._turn(asked, reply, full=sampling.max_new_tokens < self.sampling.max_new_tokens)

    def _turn(self, asked: list[dict[str, str]], reply: Any, *, full: bool = False) -> Iterator[str]:
        yield from reply
        self.completion = reply.completion
        if full and self.completion.finish_reason == "length":
            warnings.warn(
                f"the reply was cut after {len(self.completion.tokens)} tokens, with which the context of "
                f"{self.lm.model.max_length} is full: undo turns, clear the conversation, or let the context slide.",
                stacklevel=2,
            )
        self.messages = [*asked, {"role": "assistant", "content": self.completion.text}]

    def __repr__(self) -> str:
        turns = sum(each["role"] == "user" for each in self.messages)
        return f"Chat({self.lm.name}: {turns} turn{'s' * (turns != 1)})"
