"""`jaxrl-llm tree`: the search tree of a prompt, drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxrl_llm.sampling import TreeSearch


@dataclasses.dataclass(frozen=True)
class SearchTree:
    """Draw the search tree of a prompt: every node continued by several distinct tokens."""

    prompt: tyro.conf.Positional[str]
    """The text at the root."""
    model: str = "tiny-gpt2"
    """As in `generate`."""
    out: Path = Path("tree.png")
    """The file of the figure; its suffix decides the format (.png, .svg, .pdf)."""
    search: Annotated[TreeSearch, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TreeSearch)

    def run(self) -> None:
        """Grow the tree, draw it, print its best leaf."""
        import jaxrl_llm as jl
        from jaxrl_llm.plots import style

        style.check_suffix(self.out)
        tree = jl.load(self.model).search_tree(self.prompt, **vars(self.search))
        style.save_as(tree.plot(), self.out)
        print(f"best of {len(tree.tree.leaves())} leaves, {tree.score:.4f} nats per token:")
        print(tree.best)
        print(f"drawn: {self.out}")
