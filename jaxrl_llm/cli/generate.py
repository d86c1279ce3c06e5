"""`jaxrl-llm generate`, `decode-compare` and `tree`: prompts continued by one strategy, by all, or by a search tree."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxrl_llm import decoding_options as options_of
from jaxrl_llm import files
from jaxrl_llm.cli import devices
from jaxrl_llm.cli.translate import split_lines
from jaxrl_llm.decoding_options import Sampling, Search, Strategy, TreeSearch

NOTES: dict[Strategy, str] = {  # of a completion, before its text
    "speculative": "{accepted} drafts accepted in {rounds} rounds",
    "lookup": "{accepted} drafts accepted in {rounds} rounds",
    "best-of-n": "log-probability per token {log_prob_per_token:.3f}",
    "mbr": "expected chrF {expected_chrf:.1f}",
}
LOG_PROBABILITY = "log-probability {log_prob:.2f}"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it with --chat. Several prompts come from a file or standard input, one a line."""

    prompt: tyro.conf.Positional[str | None] = None
    """The text to continue; without it, and without --prompts, lines are read from standard input."""
    prompts: Path | None = None
    """A file of prompts, one a line."""
    model: str = "tiny-gpt2"
    """A folder, a .gguf file, tiny-gpt2, smollm2-135m-instruct, gemma-3-270m, or a name on the Hugging Face hub."""
    strategy: Strategy = "sample"
    """The decoding strategy."""
    greedy: bool = False
    """The same as --strategy greedy."""
    num_samples: int = 1
    """Completions of each prompt; of beams, hypotheses that are printed."""
    chat: bool = False
    """Apply the model's chat template to the prompt."""
    batch_size: int | None = None
    """Completions that are decoded together; by default all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters."""
    mesh: str | None = None
    """Devices that share the work, such as data=-1, or data=4,model=2: rows are split over data and fsdp,
    parameters over fsdp and model. The product must be the number of all devices; -1 is as many as are left."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)
    search: Annotated[Search, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Search)

    def run(self) -> None:
        """Print each completion: a single one while it is generated, several at the end."""
        strategy = options_of.chosen(self.strategy, greedy=self.greedy)
        options_of.check(strategy, self.sampling, self.search, n=self.num_samples, named=_named())
        prompts = read_prompts(self.prompt, self.prompts)
        mesh = devices.mesh_of(self.mesh)
        import jaxrl_llm as jl

        lm = jl.load(self.model, dtype=self.dtype, mesh=mesh)
        if len(prompts) == self.num_samples == 1 and strategy in ("sample", "greedy"):
            self._print_stream(lm, prompts[0], greedy=strategy == "greedy")
            return
        how = {"strategy": strategy, "n": self.num_samples, "chat": self.chat, "batch_size": self.batch_size}
        completions = lm.generate(prompts, **how, **vars(self.sampling), **options_of.used(strategy, self.search))
        numbers = itertools.count(1)
        for _, of_prompt in itertools.groupby(completions, key=lambda completion: completion.index):
            for rank, completion in enumerate(of_prompt, 1):
                if len(prompts) > 1 or self.num_samples > 1:
                    print(self._heading(lm, strategy, completion, next(numbers), rank))
                print(whole(lm, completion, chat=self.chat))

    def _print_stream(self, lm: Any, prompt: str, *, greedy: bool) -> None:
        pieces = lm.stream(prompt, greedy=greedy, chat=self.chat, **vars(self.sampling))
        first = next(pieces)  # the prompt is not printed before it is known to be accepted
        print(prompt if continues(lm, chat=self.chat) else "", first, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    def _heading(self, lm: Any, strategy: Strategy, completion: Any, number: int, rank: int) -> str:
        if strategy in ("sample", "greedy"):
            alone = not continues(lm, chat=self.chat)
            return f"--- {number}: {completion.prompt}" if alone else f"--- {number}"
        place = f"{completion.index + 1}.{rank}" if options_of.is_beam(strategy) else number
        return f"--- {place}: {note(strategy, completion)}"


def _named() -> set[str]:
    """Return the names of the command line's options, which may have the values of their defaults."""
    return {word.partition("=")[0].strip("-").replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}


def note(strategy: Strategy, completion: Any) -> str:
    """Return what a strategy says about its completion."""
    template = NOTES.get(strategy) or LOG_PROBABILITY
    return template.format(log_prob=completion.log_prob, **completion.details)


def continues(lm: Any, *, chat: bool) -> bool:
    """Return whether new text continues the prompt: not in a chat, and not as a translation."""
    from jaxrl_llm.models import T5

    return not chat and not isinstance(lm.model, T5)


def whole(lm: Any, completion: Any, *, chat: bool) -> str:
    """Return the new text, after the prompt if it continues that."""
    return (completion.prompt if continues(lm, chat=chat) else "") + completion.text


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return one prompt, or the lines of a file or of standard input."""
    if prompt is not None and file is not None:
        raise ValueError("give either a prompt or --prompts, not both.")
    if prompt is not None:
        return [prompt]
    if file is None and sys.stdin.isatty():
        raise ValueError("give a prompt, a file with --prompts, or lines on standard input.")
    source = sys.stdin.read() if file is None else files.read_text(file)
    lines = [line for line in split_lines(source) if line.strip()]
    if not lines:
        raise ValueError(f"no prompt in {'standard input' if file is None else file}.")
    return lines


COMPARE_DEFAULTS = Sampling(max_new_tokens=40, top_p=0.95)


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
    mesh: str | None = None
    """Devices that share the work, as in `generate`."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: COMPARE_DEFAULTS)
    search: Annotated[Search, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Search)

    def run(self) -> None:
        """Print each strategy's best completion under its name, with the options that it does not use."""
        if self.width < 20:
            raise ValueError(f"--width must be at least 20, but is {self.width}.")
        if useless := set.intersection(
            *(options_of.unused(each, self.search, named=_named()) for each in self.strategies)
        ):
            raise ValueError(f"none of these strategies uses {', '.join(sorted(useless))}.")
        used = [
            (each, options_of.used(each, self.sampling), options_of.used(each, self.search)) for each in self.strategies
        ]
        for strategy, sampling, search in used:
            options_of.check(strategy, Sampling(**sampling), Search(**search))
        mesh = devices.mesh_of(self.mesh)
        import jaxrl_llm as jl

        lm = jl.load(self.model, dtype=self.dtype, mesh=mesh)
        for strategy, sampling, search in used:
            options = {"chat": self.chat, **sampling, **search}
            for completion in lm.generate(self.prompt, strategy=strategy, **options):
                print(f"{strategy:<16}{note(strategy, completion)}{self._left_out(strategy)}")
                for line in whole(lm, completion, chat=self.chat).splitlines() or [""]:
                    print(textwrap.fill(line, self.width, initial_indent="  ", subsequent_indent="  "))
                print()

    def _left_out(self, strategy: Strategy) -> str:
        names = options_of.unused(strategy, self.sampling)
        names -= {name for name in names if getattr(self.sampling, name) == getattr(COMPARE_DEFAULTS, name)}
        return f"   (without {', '.join(sorted(names))})" if names else ""


@dataclasses.dataclass(frozen=True)
class SearchTree:
    """Draw the search tree of a prompt: every node continued by several distinct tokens."""

    prompt: tyro.conf.Positional[str]
    """The text at the root."""
    model: str = "tiny-gpt2"
    """As in `generate`."""
    out: Path = Path("tree.png")
    """The file of the figure; its suffix decides the format (.png, .svg, .pdf). A missing folder is
    made."""
    color: Literal["score", "probability"] = "score"
    """The colour of a node: its score, or the probability of its token."""
    bars: str | None = None
    """Nodes whose distributions over the next token are drawn as bars, with the tokens that are kept and drawn: 0 is
    the prompt, others are numbered level by level, top to bottom; several as 0,1,2, or all. The file is that of --out
    with .bars before its suffix."""
    search: Annotated[TreeSearch, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TreeSearch)

    def run(self) -> None:
        """Grow the tree, draw it, print its best leaf."""
        import jaxrl_llm as jl
        from jaxrl_llm.plots import style

        style.check_suffix(self.out)
        nodes = None if self.bars is None else numbers_of(self.bars)
        tree = jl.load(self.model).search_tree(self.prompt, **vars(self.search))
        bars = None if nodes is None else tree.plot_bars(nodes)
        drawn = [style.save_as(tree.plot(color=self.color), self.out)]
        if bars is not None:
            drawn.append(style.save_as(bars, self.out.with_name(f"{self.out.stem}.bars{self.out.suffix}")))
        print(f"best of {len(tree.tree.leaves())} leaves, {tree.score:.4f} nats per token:")
        print(tree.best)
        print(f"drawn: {', '.join(map(str, drawn))}")


def numbers_of(nodes: str) -> str | list[int]:
    """Return the numbers of nodes, or "all"."""
    if nodes == "all":
        return nodes
    if not re.fullmatch(r"\d+(,\d+)*", nodes):
        raise ValueError(f"--bars must be numbers of nodes such as 0 or 0,1,2, or all, but is {nodes!r}.")
    return [int(each) for each in nodes.split(",")]
