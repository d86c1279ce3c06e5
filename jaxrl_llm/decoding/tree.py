"""The search tree: every node continued by several tokens, all nodes of a level in one batched call.

`describe` gives a tree as plain data, for results files and figures.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.core import Request
from jaxrl_llm.decoding.transforms import Transform, update_alive
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.numerics import is_concrete, wide
from jaxrl_llm.text import TextStream, token_texts

MAX_LEAVES = 4096


class Node(NamedTuple):
    """A node of a tree: a token after its parent's. The prompt, the root, is not one of the nodes."""

    id: int
    parent: int  # 0: the root
    level: int  # tokens from the root to here
    token: int
    log_prob: float  # of the token given its parent, in nats
    total_log_prob: float  # Σ log p from the root to here
    ended: bool  # the token is EOS
    length: int  # tokens that its score is divided by

    @property
    def score(self) -> float:
        """Σ log p / length: the log-probability of the generated tokens in nats per token."""
        return self.total_log_prob / self.length


@core.result
class Tree:
    """Level by level, slot r·branching + j is the j-th child of slot r of the level above.

    Of level l (from 0) the first branching**(l + 1) slots can hold nodes; `exists` says which do. Siblings are ordered
    by falling log-probability.
    """

    tokens: Int[Array, "depth slot"]
    log_probs: Float[Array, "depth slot"]  # of each token given its parent, of the model itself, in nats
    totals: Float[Array, "depth slot"]  # Σ log p from the root
    exists: Bool[Array, "depth slot"]
    ended: Bool[Array, "depth slot"]
    branching: int = dataclasses.field(metadata={"static": True})
    prompt_length: int = dataclasses.field(default=0, metadata={"static": True})  # tokens that scores count too

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before children, numbered from 1."""
        arrays = [np.asarray(each) for each in (self.tokens, self.log_probs, self.totals, self.exists, self.ended)]
        tokens, log_probs, totals, exists, ended = arrays
        ids, above = 0, {0: 0}
        for level in range(tokens.shape[0]):
            here = {}
            for slot in np.flatnonzero(exists[level]):
                ids += 1
                here[int(slot)] = ids
                yield Node(
                    ids,
                    above[int(slot) // self.branching],
                    level + 1,
                    int(tokens[level, slot]),
                    float(log_probs[level, slot]),
                    float(totals[level, slot]),
                    bool(ended[level, slot]),
                    level + 1 + self.prompt_length,
                )
            above = here

    def leaves(self) -> list[Node]:
        """The nodes without children: those of the last level, and those that ended before."""
        nodes = list(self.nodes())
        parents = {node.parent for node in nodes}
        return [node for node in nodes if node.id not in parents]

    def path(self, leaf: Node) -> list[Node]:
        """The nodes from the root's child down to `leaf`."""
        nodes = {node.id: node for node in self.nodes()}
        path = [leaf]
        while path[-1].parent:
            path.append(nodes[path[-1].parent])
        return path[::-1]

    def best(self) -> tuple[Int[np.ndarray, "length"], float]:
        """Tokens and score (nats per token) of the leaf with the highest score."""
        leaf = max(self.leaves(), key=lambda node: node.score)
        return np.asarray([node.token for node in self.path(leaf)], np.int32), leaf.score


def search_tree(
    lm: LanguageModel,
    params: Params,
    prompt: Int[Array, "prompt"] | Sequence[int],
    *,
    branching: int,
    depth: int,
    select: Transform | Sequence[Transform] | str = "best",
    key: Key[Array, ""] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    score_length: Literal["generated", "all"] = "generated",
) -> Tree:
    """Continue a prompt by a tree of `depth` levels, with `branching` distinct tokens after each node.

    Args:
        prompt: one sequence, without padding.
        branching: 1 gives a chain, the greedy one with `select="best"`.
        select: `"best"` takes the most probable tokens after a node. A transform, or a sequence of them, draws them
            without replacement from the distribution that it leaves (Gumbel-top-k); if it leaves fewer than
            `branching` tokens, the node has fewer children.
        key: needed with a transform.
        eos_id: the token, or any of the tokens, that has no children.
        score_length: the score of a node is Σ log p of the generated tokens divided by their number, or by the number
            of all tokens with those of the prompt. The ranks of leaves of one length are the same.

    Raises:
        ValueError: for an empty prompt (where the model has no root state), one that leaves no room, a `branching` or
            `depth` below 1, or a tree of more than 4096 leaves.
        FloatingPointError: if the model's logits are NaN, or no token is possible.
    """
    prompts = core.one_prompt(prompt)
    if branching < 1 or depth < 1 or branching > lm.vocab_size:
        raise ValueError(
            f"branching must be in [1, {lm.vocab_size}] and depth at least 1, but are {branching} and {depth}."
        )
    if branching**depth > MAX_LEAVES:
        raise ValueError(f"{branching}**{depth} leaves are more than the {MAX_LEAVES} that a tree may have.")
    best = isinstance(select, str)
    if best and select != "best":
        raise ValueError(f'select must be "best" or a transform, but is {select!r}.')
    if score_length not in ("generated", "all"):
        raise ValueError(f"score_length must be generated or all, but is {score_length!r}.")
    request = core.request(
        lm, prompts, max_new_tokens=depth, transform=None if best else select, greedy=best, key=key, eos_id=eos_id,
        align=True,
    )  # fmt: skip
    tree = _grow(lm, params, request, branching=branching, depth=depth)
    if is_concrete(tree.log_probs) and not np.isfinite(np.asarray(tree.log_probs)[tree.exists]).all():
        raise FloatingPointError("no token could be chosen: the model's logits are NaN, +inf, or all −inf.")
    if is_concrete(tree.exists) and depth > 1:
        exists, width = np.asarray(tree.exists), branching ** (depth - 1)
        childless = ~exists[1:].reshape(depth - 1, width, branching).any(axis=2)
        if (exists[:-1, :width] & ~np.asarray(tree.ended)[:-1, :width] & childless).any():
            raise FloatingPointError("no token could be chosen after a node: the transforms together leave none.")
    return dataclasses.replace(tree, prompt_length=prompts.shape[1] if score_length == "all" else 0)


@functools.partial(jax.jit, static_argnames=("lm", "branching", "depth"))
def _grow(lm: LanguageModel, params: Params, request: Request, *, branching: int, depth: int) -> Tree:
    """A scan over levels. Every level has the width of the last one that is fed, so that one step serves all."""
    width = branching ** (depth - 1)
    parent_rows = jnp.arange(width) // branching
    prompt = core.prefill(lm, params, request, num_slots=request.prompts.shape[1] + depth)
    root = jnp.zeros(width, jnp.int32)
    steered = jax.tree.map(lambda leaf: leaf[root], request.initial_state())  # the state of the transform
    transform = request.transform.take(root)
    state = (prompt.last[root], prompt.cache.take(root), steered, jnp.arange(width) == 0, jnp.zeros(width))

    def step(state: tuple[Array, Cache, PyTree, Array, Array], level: Array) -> tuple[tuple, Tree]:
        hidden, cache, steered, open_, totals = state
        logits = wide(lm.logits(params, hidden))
        tokens, possible = _select(request, transform.apply(steered, logits), level, branching)
        normaliser = jax.nn.logsumexp(logits, axis=1, keepdims=True)
        log_probs = jnp.take_along_axis(logits, tokens, axis=1) - normaliser
        exists = (possible | ~jnp.isfinite(normaliser)) & open_[:, None]  # NaN logits show as a node that is NaN
        ended = exists & request.ends(tokens)
        nodes = (tokens, jnp.where(exists, log_probs, -jnp.inf), totals[:, None] + log_probs, exists, ended)
        nodes = tuple(leaf.reshape(-1) for leaf in nodes)
        token, _, total, exists, ended = (leaf[:width] for leaf in nodes)  # of the last level nothing is fed
        hidden, cache = lm.hidden(params, token[:, None], cache.take(parent_rows))
        steered = jax.tree.map(lambda leaf: leaf[parent_rows], steered)
        steered = update_alive(transform, steered, token, logits[parent_rows], exists)
        return (hidden[:, 0], cache, steered, exists & ~ended, total), Tree(*nodes, branching=branching)

    return everywhere(jax.lax.scan(step, state, jnp.arange(depth))[1])


def _select(
    request: Request, logits: Float[Array, "row vocab"], level: Int[Array, ""], branching: int
) -> tuple[Int[Array, "row branching"], Bool[Array, "row branching"]]:
    """Distinct tokens for each row, by falling probability, and which of them are possible."""
    if request.keys is None:
        values, tokens = jax.lax.top_k(logits, branching)
        return tokens, values > -jnp.inf
    level_key = jax.random.fold_in(request.keys[0], level)
    keys = jax.vmap(lambda row: jax.random.fold_in(level_key, row))(jnp.arange(logits.shape[0]))
    tokens = core.sample_distinct(keys, logits, branching)
    values = jnp.take_along_axis(logits, tokens, axis=1)
    order = jnp.argsort(-values, axis=1)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(values, order, axis=1) > -jnp.inf


def node_logits(
    lm: LanguageModel,
    params: Params,
    prompt: Int[Array, "prompt"] | Sequence[int],
    tree: Tree,
    nodes: Sequence[int],
    *,
    select: Transform | Sequence[Transform] | str = "best",
) -> tuple[Float[Array, "node vocab"], Float[Array, "node vocab"]]:
    """Return the model's logits after nodes of a tree, and those from which their children were drawn.

    Args:
        prompt: that of the tree, as is `select`.
        nodes: numbers of nodes; 0 is the prompt.

    Raises:
        ValueError: for a node that is not in the tree or has no children.
    """
    by_id = {node.id: node for node in tree.nodes()}
    parents = {node.parent for node in by_id.values()}
    for node in nodes:
        if node != 0 and node not in by_id:
            raise ValueError(f"a node must be in [0, {len(by_id)}], but is {node!r}.")
        if node not in parents:
            raise ValueError(f"a node must have children, but {node} is a leaf.")
    depth = tree.tokens.shape[0]
    paths = [[each.token for each in tree.path(by_id[node])] if node else [] for node in nodes]
    tokens = np.zeros((len(nodes), depth), np.int32)
    for row, path in zip(tokens, paths, strict=True):
        row[: len(path)] = path
    best = isinstance(select, str)
    request = core.request(
        lm, core.one_prompt(prompt), max_new_tokens=depth, transform=None if best else select, greedy=True, align=True
    )
    return _replay(lm, params, request, jnp.asarray(tokens), jnp.asarray([len(path) for path in paths], jnp.int32))


@functools.partial(jax.jit, static_argnames="lm")
def _replay(
    lm: LanguageModel,
    params: Params,
    request: Request,
    tokens: Int[Array, "node depth"],
    levels: Int[Array, "node"],
) -> tuple[Float[Array, "node vocab"], Float[Array, "node vocab"]]:
    """Feed the path of each node, and keep the logits where it ends."""
    depth = tokens.shape[1]
    prompt = core.prefill(lm, params, request, num_slots=request.prompts.shape[1] + depth)
    root = jnp.zeros(tokens.shape[0], jnp.int32)
    steered = jax.tree.map(lambda leaf: leaf[root], request.initial_state())
    transform = request.transform.take(root)
    found = jnp.zeros((2, tokens.shape[0], lm.vocab_size))

    def step(state: tuple[Array, Cache, PyTree, Array], time: Array) -> tuple[tuple, None]:
        hidden, cache, steered, found = state
        logits = wide(lm.logits(params, hidden))
        both = jnp.stack([logits, transform.apply(steered, logits)])
        found = jnp.where((levels == time)[:, None], both, found)
        token = tokens[:, time]
        hidden, cache = lm.hidden(params, token[:, None], cache)
        steered = update_alive(transform, steered, token, logits, levels > time)
        return (hidden[:, 0], cache, steered, found), None

    state = (prompt.last[root], prompt.cache.take(root), steered, found)
    own, left = everywhere(jax.lax.scan(step, state, jnp.arange(depth))[0][3])
    return own, left


def describe_distribution(
    tokenizer: Any,
    logits: Float[Array, "vocab"],
    left: Float[Array, "vocab"],
    drawn: Collection[int],
    *,
    title: str,
    count: int = 25,
) -> dict[str, Any]:
    """Return a distribution over the next token as JSON: the most probable tokens, and further ones that were drawn.

    Args:
        logits: the model's own, which give the probabilities.
        left: the logits after filters; a token of −inf is not kept.
        drawn: the tokens to be marked.
        count: the number of most probable tokens.
    """
    probabilities = np.asarray(jax.nn.softmax(logits))
    kept = np.asarray(left > -jnp.inf)
    order = np.argsort(-probabilities, kind="stable")
    shown = [*order[:count], *(token for token in order[count:] if token in drawn)]
    tokens = [
        {"text": label, "prob": float(probabilities[token]), "kept": bool(kept[token]), "drawn": int(token) in drawn}
        for token, label in zip(map(int, shown), token_texts(tokenizer, shown), strict=True)
    ]
    return {"title": title, "kept_mass": float(probabilities[kept].sum()), "tokens": tokens}


def describe(
    tree: Tree, tokenizer: Any, *, name: str, title: str, prompt: str, prompt_tokens: Sequence[int]
) -> dict[str, Any]:
    """Return the tree as JSON: nodes with token text, probability and score, and the path to the best leaf.

    Node 0 is the prompt, token texts are those of `token_texts`. Scores are those of the nodes, in nats per token;
    `prompt_counts` is there, and true, if they count the tokens of the prompt too.
    """
    best = max(tree.leaves(), key=lambda node: node.score)
    path = tree.path(best)
    written = [node.token for node in path if not node.ended]  # the text leaves EOS out
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
    grown = list(tree.nodes())
    texts = token_texts(tokenizer, [node.token for node in grown])
    nodes = [
        {
            "id": node.id,
            "parent": node.parent,
            "level": node.level,
            "text": text,
            "prob": math.exp(node.log_prob),
            "log_prob": node.log_prob,
            "score": node.score,
            "ended": node.ended,
        }
        for node, text in zip(grown, texts, strict=True)
    ]
    return {
        "name": name,
        "title": title,
        "nodes": [root, *nodes],
        "best": [0, *(node.id for node in path)],
        "best_text": prompt + continuation.push(written) + continuation.finish(),
        "best_score": best.score,
    } | ({"prompt_counts": True} if tree.prompt_length else {})
