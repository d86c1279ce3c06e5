"""Four ways to continue a prompt, as search trees, and how often the best leaf of a tree is not greedy decoding's.

    python -m experiments.search_trees --preset quick
    python -m experiments.search_trees --preset full --model gemma-3-270m   # or smollm2-135m-instruct

The trees after "I have a dream" are drawn: greedy, every branch, top-k and nucleus. The full tree is grown after the
beginnings of known works too (`experiments.passages`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import ledger
from experiments.frame import experiment
from experiments.passages import PASSAGES, chosen, first_tokens
from experiments.statistics import share, student
from jaxrl_llm import models, text
from jaxrl_llm.decoding import Tree, search_tree
from jaxrl_llm.decoding import tree as trees
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP
from jaxrl_llm.objectives.logprobs import token_log_probs

# OpenAI's GPT-2 small after "I have a dream": the greedy chain's probabilities in per cent, and the best leaf's score.
GPT2_SMALL = ("gpt2", "openai-community/gpt2")
GPT2_SMALL_GREEDY = (15.20, 9.68, 30.59, 2.86, 22.93)
GPT2_SMALL_BEST = -0.69


@dataclasses.dataclass(frozen=True)
class Config:
    """One model, its four trees after one prompt, and full trees after others."""

    model: str = "tiny-gpt2"
    prompt: str = "I have a dream"
    passages: int = len(PASSAGES)
    """Works whose beginnings are prompts of full trees, beside the prompt."""
    prompt_tokens: int = 12
    """Tokens of a work that are its prompt."""
    depth: int = 5
    branching: int = 2
    top_k: int = 20
    top_p: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    """Seed of the trees that are drawn at random; no number depends on it."""


@experiment(quick=Config(passages=11), full=Config())
def run(config: Config) -> dict[str, Any]:
    """Grow the trees, and check every score against a forward pass without a cache."""
    loaded = models.load(config.model)
    prompt = jnp.asarray(text.encode(loaded.tokenizer, config.prompt), jnp.int32)
    filters = {
        "top_k": Chain((Temperature(config.temperature), TopK(config.top_k))),
        "nucleus": Chain((Temperature(config.temperature), TopP(config.top_p, config.branching))),
    }
    titles = {
        "greedy": "greedy chain",
        "full": f"the {config.branching} most probable tokens of every node",
        "top_k": f"{config.branching} distinct tokens drawn from the {config.top_k} most probable",
        "nucleus": f"{config.branching} distinct tokens drawn from the nucleus, p = {config.top_p:g}, "
        f"at least {config.branching} kept",
    }
    grown = {
        name: grow(config, loaded, prompt, select=filters.get(name, "best"), branching=1 if name == "greedy" else None)
        for name in titles
    }
    described = [
        trees.describe(
            tree, loaded.tokenizer, name=name, title=titles[name], prompt=config.prompt, prompt_tokens=prompt.tolist()
        )
        for name, tree in grown.items()
    ]
    logits = loaded.model.apply(loaded.params, prompt[None])[0][0, -1]
    drawn = {name: {node.token for node in tree.nodes() if node.level == 1} for name, tree in grown.items()}
    panels = [
        trees.describe_distribution(loaded.tokenizer, logits, left, drawn[name], title=title)
        for name, left, title in (
            ("full", logits, "next token"),
            ("top_k", filters["top_k"](logits), f"top-k, k = {config.top_k}"),
            ("nucleus", filters["nucleus"](logits), f"nucleus, p = {config.top_p:g}"),
        )
    ]
    works = first_tokens(loaded.tokenizer, chosen(config.passages), config.prompt_tokens)
    gains = [gain(tree) for tree in (grown["full"], *(grow(config, loaded, jnp.asarray(work)) for work in works))]
    data = {"model": config.model, "prompt": config.prompt, "trees": described, "bars": panels, "gains": gains}
    leaves = config.branching**config.depth
    return {
        "claim": claim(config, leaves, gains),
        "numbers": numbers(config, loaded, prompt, grown, gains),
        "data": data | {"leaves": leaves},
    }


def claim(config: Config, leaves: int, gains: list[float]) -> str:
    """Return the tested difference with its size."""
    return (
        f"After most prompts greedy decoding by {config.model} misses the best of the {leaves} leaves of the tree of "
        f"the {config.branching} most probable tokens: after {missed(gains)} of {len(gains)}. "
        f"The best leaf leads by {np.mean(gains):.2f} nats per token on average."
    )


def grow(
    config: Config, loaded: models.Loaded, prompt: jax.Array, *, select: Any = "best", branching: int | None = None
) -> Tree:
    """Return the tree after a prompt, by default the full one."""
    return search_tree(
        loaded.model,
        loaded.params,
        prompt,
        branching=branching or config.branching,
        depth=config.depth,
        select=select,
        key=jax.random.key(config.seed),
        eos_id=loaded.tokenizer.eos_token_id,
    )


def greedy_leaf(tree: Tree) -> float:
    """Return the score of the leaf at the end of the most probable tokens of a full tree."""
    leaf = None
    for node in tree.nodes():  # of siblings the most probable one comes first
        if node.parent == (leaf.id if leaf else 0):
            leaf = node
    return leaf.score


def gain(tree: Tree) -> float:
    """Return the lead of a full tree's best leaf over greedy decoding's, in nats per token."""
    return tree.best()[1] - greedy_leaf(tree)


def missed(gains: list[float]) -> int:
    """Return the number of prompts after which the best leaf is not greedy decoding's."""
    return sum(each > 0 for each in gains)


def rescored(loaded: models.Loaded, prompt: jax.Array, grown: list[Tree]) -> float:
    """Return the largest difference between a leaf's Σ log p in a tree and in one forward pass over its sequence."""
    leaves = [(tree.path(leaf), leaf.total_log_prob) for tree in grown for leaf in tree.leaves()]
    tokens = np.zeros((len(leaves), len(prompt) + max(len(path) for path, _ in leaves)), np.int32)
    tokens[:, : len(prompt)] = prompt
    for row, (path, _) in zip(tokens, leaves, strict=True):
        row[len(prompt) : len(prompt) + len(path)] = [node.token for node in path]
    logits, _ = loaded.model.apply(loaded.params, tokens[:, :-1])
    found = np.asarray(token_log_probs(logits, tokens[:, 1:]))[:, len(prompt) - 1 :]
    return max(abs(row[: len(path)].sum() - total) for row, (path, total) in zip(found, leaves, strict=True))


def numbers(
    config: Config, loaded: models.Loaded, prompt: jax.Array, grown: dict[str, Tree], gains: list[float]
) -> list[dict[str, Any]]:
    """Return the identities and tests of the claim, and the measurements."""
    greedy, full = grown["greedy"], grown["full"]
    siblings = [[(node.parent, node.token) for node in tree.nodes()] for tree in grown.values()]
    repeated = sum(len(pairs) - len(set(pairs)) for pairs in siblings)
    sign = scipy.stats.binomtest(missed(gains), len(gains), 0.5, alternative="greater")
    prompts = f"{len(gains)} prompts"
    entries = [
        ledger.identity(
            "largest error of a leaf's Σ log p",
            float(rescored(loaded, prompt, list(grown.values()))),
            tolerance=1e-3,
            unit="nats",
            source="a forward pass without a cache, in float32",
        ),
        ledger.identity(
            "greedy chain − the full tree's path of most probable tokens",
            greedy.best()[1] - greedy_leaf(full),
            tolerance=1e-4,
            unit="nats per token",
            source="search_tree, branching 1",
        ),
        ledger.identity(
            "repeated siblings",
            repeated,
            tolerance=0,
            unit=f"of {sum(map(len, siblings))} nodes",
            source="sampling without replacement",
        ),
        ledger.test(
            "p-value: greedy decoding misses the best leaf after most prompts",
            float(sign.pvalue),
            at_most=0.05,
            wrong=0.5,
            unit="",
            source=f"one-sided binomial test of a share above 1/2, {prompts}",
        ),
        ledger.measurement(
            "prompts after which greedy decoding misses the best leaf",
            *share(missed(gains), len(gains)),
            unit="share",
            source=f"{prompts}; interval of Clopper and Pearson",
        ),
        ledger.measurement(
            "best leaf − greedy decoding",
            *student(gains),
            unit="nats per token",
            source=f"mean over {prompts}; interval of Student's t",
        ),
        ledger.measurement(
            f"best leaf − greedy decoding after “{config.prompt}”",
            gains[0],
            unit="nats per token",
            source=f"{greedy.best()[1]:.3f} by greedy decoding",
        ),
    ]
    if config.model in GPT2_SMALL and config.prompt == "I have a dream" and config.depth == 5:
        entries += known_numbers(greedy, full, len(prompt))
    return entries


def known_numbers(greedy: Tree, full: Tree, prompt_length: int) -> list[dict[str, Any]]:
    """Test the published probabilities of OpenAI's GPT-2 small after this prompt.

    The published score of a leaf is Σ log p of the generated tokens over the number of all tokens, with the prompt's.
    """
    source = "M. Labonne, Decoding Strategies in Large Language Models (2023)"
    chain = [
        ledger.test(
            f"greedy token {node.level}",
            100 * float(np.exp(node.log_prob)),
            expected=expected,
            tolerance=0.01,
            wrong=0.0,
            unit="per cent",
            source=source,
        )
        for node, expected in zip(greedy.nodes(), GPT2_SMALL_GREEDY, strict=True)
    ]
    score = {"expected": GPT2_SMALL_BEST, "tolerance": 0.005, "wrong": -1.0, "unit": "nats per token"}
    best = dataclasses.replace(full, prompt_length=prompt_length).best()[1]
    return [*chain, ledger.test("best leaf, over prompt and generated tokens", best, source=source, **score)]
