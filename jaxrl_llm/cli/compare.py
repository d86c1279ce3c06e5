"""`jaxrl-llm decode-compare`: the same prompt by every strategy, side by side."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Annotated, Literal

import tyro

from jaxrl_llm import sampling as options_of
from jaxrl_llm.cli.generate import note, whole
from jaxrl_llm.sampling import Sampling, Search, Strategy

DEFAULTS = Sampling(max_new_tokens=40, top_p=0.95)


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
    """The strategies; `speculative` needs --draft-model."""
    width: int = 76
    """Characters in a line."""
    chat: bool = False
    """Apply the model's chat template to the prompt."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: DEFAULTS)
    search: Annotated[Search, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Search)

    def run(self) -> None:
        """Print each strategy's best completion under its name, with the options that it does not use."""
        if self.width < 20:
            raise ValueError(f"--width must be at least 20, but is {self.width}.")
        if useless := set.intersection(*(options_of.unused(each, self.search) for each in self.strategies)):
            raise ValueError(f"none of these strategies uses {', '.join(sorted(useless))}.")
        used = [
            (each, options_of.restricted(each, self.sampling), options_of.restricted(each, self.search))
            for each in self.strategies
        ]
        for each in used:
            options_of.check(*each)
        import jaxrl_llm as jl

        lm = jl.load(self.model, dtype=self.dtype)
        for strategy, sampling, search in used:
            options = {"chat": self.chat, **vars(sampling), **vars(search)}
            for completion in lm.generate(self.prompt, strategy=strategy, **options):
                print(f"{strategy:<16}{note(strategy, completion)}{self._left_out(strategy)}")
                for line in whole(completion, chat=self.chat).splitlines() or [""]:
                    print(textwrap.fill(line, self.width, initial_indent="  ", subsequent_indent="  "))
                print()

    def _left_out(self, strategy: Strategy) -> str:
        names = options_of.unused(strategy, self.sampling)
        names -= {name for name in names if getattr(self.sampling, name) == getattr(DEFAULTS, name)}
        return f"   (without {', '.join(sorted(names))})" if names else ""
