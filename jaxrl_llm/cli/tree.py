"""`jaxrl-llm tree`: the search tree of a prompt, drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from jaxrl_llm.cli.prompts import require_tokenizer


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
        from jaxrl_llm.analysis import tree as trees
        from jaxrl_llm.decoding import search_tree
        from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP
        from jaxrl_llm.plots import style
        from jaxrl_llm.plots.tree import tree_figure

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
