"""`jaxrl-llm decode-compare`: the same prompt by every strategy, side by side."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Annotated, Literal

import tyro

from jaxrl_llm.cli.generate import answer_text
from jaxrl_llm.cli.options import KNOWN, Sampling, Search, Strategy, options, unheeded
from jaxrl_llm.cli.prompts import load_batch

TOP_P = 0.95  # for the strategies that draw


@dataclasses.dataclass(frozen=True)
class Compare:
    """Decode one prompt by many strategies, and show them side by side."""

    prompt: tyro.conf.Positional[str]
    """The text to continue."""
    model: str = "tiny-gpt2"
    """As in `generate`."""
    strategies: tuple[Strategy, ...] = (
        "greedy", "beam", "diverse-beam", "contrastive", "sample", "stochastic-beam", "lookup", "best-of-n", "mbr",
    )  # fmt: skip
    """Which; `speculative` needs --draft-model."""
    max_new_tokens: int = 40
    """The most tokens to add."""
    width: int = 76
    """Characters in a line."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: Sampling(top_p=TOP_P)
    )
    search: Annotated[Search, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Search)

    def run(self) -> None:
        """Print each strategy's best answer under its name."""
        from jaxrl_llm.cli.strategies import Task, answers

        if self.width < 20:
            raise ValueError(f"--width must be at least 20, but is {self.width}.")
        if "speculative" in self.strategies and self.search.draft_model is None:
            raise ValueError("the strategy speculative needs --draft-model.")
        batch = load_batch(self.model, [self.prompt], dtype=self.dtype, chat=self.chat)
        for strategy in self.strategies:
            answer = answers(strategy, Task(batch, heeded(strategy, self.sampling), self.search, self.max_new_tokens))[
                0
            ][0]
            by_default = {"top_p"} if self.sampling.top_p == TOP_P else set()
            left_out = options(unheeded(strategy, self.sampling) - by_default)
            print(f"{strategy:<16}{answer.note}" + (f"   (without {left_out})" if left_out else ""))
            lines = answer_text(batch, 0, self.prompt, answer.tokens, chat=self.chat).splitlines() or [""]
            for line in lines:
                print(textwrap.fill(line, self.width, initial_indent="  ", subsequent_indent="  "))
            print()


def heeded(strategy: str, sampling: Sampling) -> Sampling:
    """The options that this strategy knows; the others as they are by default."""
    if strategy not in KNOWN:
        return sampling
    known = {name: getattr(sampling, name) for name in KNOWN[strategy]}
    return Sampling(seed=sampling.seed, **known)
