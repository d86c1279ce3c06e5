"""The command line: `jaxrl-llm generate` and `jaxrl-llm tree`. Heavy imports wait until the command is known."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens with this mass."""
    seed: int = 0
    """Of the random numbers; the same seed gives the same text."""

    def transform(self) -> Any:
        """The logits transforms that were asked for."""
        from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP

        parts = [Temperature(self.temperature)] if self.temperature != 1.0 else []
        parts += [TopK(self.top_k)] if self.top_k is not None else []
        parts += [TopP(self.top_p)] if self.top_p is not None else []
        return Chain(tuple(parts)) if parts else None


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it with --chat. Several prompts come from a file or standard input, one a line."""

    prompt: tyro.conf.Positional[str | None] = None
    """The text to continue; without it, and without --prompts, lines are read from standard input."""
    prompts: Path | None = None
    """A file of prompts, one a line."""
    model: str = "tiny-gpt2"
    """A folder, a .gguf file, tiny-gpt2, smollm2-135m-instruct, or a name on the Hugging Face hub."""
    max_new_tokens: int = 64
    """The most tokens to add."""
    num_samples: int = 1
    """Continuations of each prompt."""
    greedy: bool = False
    """Take the most probable token instead of drawing one."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()

    def run(self) -> None:
        """Print each continuation: a single one as it comes, several when they are there."""
        import jax

        from jaxrl_llm import models, text
        from jaxrl_llm.decoding import stream

        if self.greedy and self.sampling != Sampling(seed=self.sampling.seed):
            raise ValueError(
                "--greedy takes the most probable token: give no --temperature, --top-k or --top-p with it."
            )
        if self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1, but is {self.num_samples}.")
        prompts = [prompt for prompt in self.read_prompts() for _ in range(self.num_samples)]
        loaded = models.load(self.model, dtype=self.dtype)
        tokenizer = require_tokenizer(loaded, self.model)
        rows = [text.encode(tokenizer, prompt, chat=self.chat) for prompt in prompts]
        tokens, mask = text.left_pad(rows)
        pieces = stream(
            loaded.model,
            loaded.params,
            tokens,
            prompt_mask=mask,
            max_new_tokens=self.max_new_tokens,
            transform=None if self.greedy else self.sampling.transform(),
            greedy=self.greedy,
            key=jax.random.key(self.sampling.seed),
            eos_id=text.eos_ids(tokenizer, loaded.config),
        )
        streams = [text.TextStream(tokenizer, () if self.chat else row) for row in rows]
        heads = ["" if self.chat else prompt for prompt in prompts]
        if len(rows) == 1:
            for piece in pieces:
                print(heads.pop() if heads else "", end="")  # not before it is known that the prompt is accepted
                print(streams[0].push(piece.tokens[0][piece.mask[0]].tolist()), end="", flush=True)
            print(streams[0].finish())
            return
        texts = list(heads)
        for piece in pieces:
            for i, row in enumerate(streams):
                texts[i] += row.push(piece.tokens[i][piece.mask[i]].tolist())
        for i, row in enumerate(streams):
            print(f"--- {i + 1}: {prompts[i]}" if self.chat else f"--- {i + 1}", texts[i] + row.finish(), sep="\n")

    def read_prompts(self) -> list[str]:
        """The prompts, wherever they come from."""
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("give either a prompt or --prompts, not both.")
        if self.prompt is not None:
            return [self.prompt]
        if self.prompts is None and sys.stdin.isatty():
            raise ValueError("give a prompt, a file with --prompts, or lines on standard input.")
        source = sys.stdin.read() if self.prompts is None else self.prompts.read_text(encoding="utf-8")
        lines = [line for line in source.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"no prompt in {'standard input' if self.prompts is None else self.prompts}.")
        return lines


@dataclasses.dataclass(frozen=True)
class SearchTree:
    """Draw the search tree of a prompt: every node continued by several distinct tokens."""

    prompt: tyro.conf.Positional[str]
    """The text at the root."""
    model: str = "tiny-gpt2"
    """As in `generate`."""
    depth: int = 5
    """Levels: tokens from the root to a leaf."""
    branching: int = 2
    """Children of a node."""
    select: Literal["best", "top-k", "nucleus"] = "best"
    """The most probable children, or children drawn without replacement from the top k or the nucleus."""
    top_k: int = 20
    """For --select top-k."""
    top_p: float = 0.5
    """For --select nucleus."""
    temperature: float = 1.0
    """For the drawn children."""
    seed: int = 0
    """Of the random numbers."""
    out: Path = Path("tree.png")
    """Where to draw it; the suffix decides the format (.png, .svg, .pdf)."""

    def run(self) -> None:
        """Grow the tree, draw it, print its best leaf."""
        import jax
        import jax.numpy as jnp

        from jaxrl_llm import models, text
        from jaxrl_llm.analysis import trees
        from jaxrl_llm.decoding import search_tree
        from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP
        from jaxrl_llm.plots import style
        from jaxrl_llm.plots.trees import tree_figure

        loaded = models.load(self.model)
        tokenizer = require_tokenizer(loaded, self.model)
        if self.select == "best" and self.temperature != 1.0:
            raise ValueError("--temperature is for children that are drawn: give --select top-k or nucleus.")
        kept = {"best": lambda: None, "top-k": lambda: TopK(self.top_k), "nucleus": lambda: TopP(self.top_p)}[
            self.select
        ]()
        prompt = text.encode(tokenizer, self.prompt)
        tree = search_tree(
            loaded.model,
            loaded.params,
            jnp.asarray(prompt),
            branching=self.branching,
            depth=self.depth,
            select="best" if kept is None else Chain((Temperature(self.temperature), kept)),
            key=jax.random.key(self.seed),
            eos_id=text.eos_ids(tokenizer, loaded.config),
        )
        titles = {
            "best": "most probable",
            "top-k": f"top-k, k = {self.top_k}",
            "nucleus": f"nucleus, p = {self.top_p:g}",
        }
        described = trees.describe(
            tree,
            tokenizer,
            name=self.select,
            title=f"{titles[self.select]}, branching {self.branching}",
            prompt=self.prompt,
            prompt_tokens=prompt,
        )
        style.save_as(tree_figure(described, model=self.model), self.out)
        print(f"best of {len(tree.leaves())} leaves, {described['best_score']:.4f} nats per token:")
        print(described["best_text"])
        print(f"drawn: {self.out}")


def require_tokenizer(loaded: Any, name: str) -> Any:
    """The tokenizer of a loaded model, or a clear error."""
    if loaded.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer files, so that text cannot be turned into tokens.")
    return loaded.tokenizer


Command = Annotated[Generate, tyro.conf.subcommand("generate")] | Annotated[SearchTree, tyro.conf.subcommand("tree")]


def main() -> None:
    """Entry point of `jaxrl-llm`."""
    command = tyro.cli(Command, prog="jaxrl-llm", description="Decode from language models and look at how.")
    from jaxrl_llm import runtime

    runtime.set_up()
    try:
        command.run()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        raise SystemExit(0) from None
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"jaxrl-llm: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
