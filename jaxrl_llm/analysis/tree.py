"""Search trees as JSON, for results files and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.decoding.tree import Tree
from jaxrl_llm.text import TextStream


def describe(
    tree: Tree, tokenizer: Any, *, name: str, title: str, prompt: str, prompt_tokens: Sequence[int]
) -> dict[str, Any]:
    """Return the tree as JSON: nodes with token text, probability and score, and the path to the best leaf.

    Node 0 is the prompt. A score is Σ log p / length over the generated tokens, in nats per token.
    """
    best = max(tree.leaves(), key=lambda node: node.score)
    path = tree.path(best)
    continuation = TextStream(tokenizer, prompt_tokens)
    root = {
        "id": 0,
        "parent": None,
        "level": 0,
        "text": prompt,
        "prob": 1.0,
        "log_prob": 0.0,
        "score": None,
        "ended": False,
    }
    nodes = [
        {
            "id": node.id,
            "parent": node.parent,
            "level": node.level,
            "text": tokenizer.decode([node.token]),
            "prob": math.exp(node.log_prob),
            "log_prob": node.log_prob,
            "score": node.score,
            "ended": node.ended,
        }
        for node in tree.nodes()
    ]
    return {
        "name": name,
        "title": title,
        "nodes": [root, *nodes],
        "best": [0, *(node.id for node in path)],
        "best_text": prompt + continuation.push([node.token for node in path]) + continuation.finish(),
        "best_score": best.score,
    }
