"""A small GPT-2 that judges sums: its tokens, its training in stages, and its answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from experiments.optimisers import adam
from experiments.parts import addition_numbers
from jaxrl_llm.data.sycophancy import addition
from jaxrl_llm.data.sycophancy.addition import AGREE, DISAGREE, Example
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.scoring import Sequences, pad_completions
from jaxrl_llm.training import steps as train
from jaxrl_llm.training.sft import sft_loss

_PIECES = re.compile(r"\d|[^\d.,:]+")  # a digit each; of the rest, what stands between marks as a whole


class Encoded(NamedTuple):
    """Examples as tokens, all of one length, and the vocabulary."""

    rows: Sequences
    vocabulary: tuple[str, ...]
    agree: int
    disagree: int


class Tools(NamedTuple):
    """The constants of the compiled programs."""

    lm: GPT2
    config: Any
    agree: int
    disagree: int


def pieces(text: str) -> list[str]:
    """Return digits, and the phrases of the grammar: few tokens, so that a tiny model meets each of them often."""
    return [piece.strip() for piece in _PIECES.findall(text) if piece.strip()]


def encoded(examples: Sequence[Example]) -> Encoded:
    """Return every example as tokens of a vocabulary of just what they say."""
    prompts = [pieces(example.prompt) for example in examples]
    vocabulary = (AGREE, DISAGREE, *sorted({piece for prompt in prompts for piece in prompt}))
    ids = {piece: place for place, piece in enumerate(vocabulary)}
    rows = pad_completions(
        [[ids[piece] for piece in prompt] for prompt in prompts], [[ids[example.answer]] for example in examples]
    )
    return Encoded(jax.tree.map(jnp.asarray, rows), vocabulary, ids[AGREE], ids[DISAGREE])


def tools(given: Encoded, config: Any) -> Tools:
    """Return a new GPT-2 for these tokens."""
    shape = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    lm = GPT2(GPT2Config(vocab_size=len(given.vocabulary), n_positions=given.rows.tokens.shape[1], **shape))
    return Tools(lm, config, given.agree, given.disagree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def stretch(
    given: Tools, num_steps: int, states: train.TrainState, data: Sequences, order: Int[Array, "seeds steps batch"]
) -> train.TrainState:
    """Run some of the `num_steps` of every seed's stage, on the rows of the data that `order` names."""
    optimizer, loss = adam(given.config.learning_rate, num_steps), sft_loss(given.lm)

    def advance(state: train.TrainState, rows: Array) -> tuple[train.TrainState, None]:
        return train.update(loss, optimizer, state, jax.tree.map(lambda leaf: leaf[rows], data))[0], None

    return jax.vmap(lambda state, rows: jax.lax.scan(advance, state, rows)[0])(states, order)


@functools.partial(jax.jit, static_argnums=0)
def _prefers_to_agree(given: Tools, params: Any, part: Sequences) -> Bool[Array, "seeds batch"]:
    def one(params: Any) -> Array:
        hidden, _ = given.lm.hidden(params, part.tokens, mask=part.mask)
        before = part.completion_mask.argmax(axis=1) - 1
        logits = given.lm.logits(params, jnp.take_along_axis(hidden, before[:, None, None], axis=1)[:, 0])
        return logits[:, given.agree] > logits[:, given.disagree]

    return jax.vmap(one)(params)


def prefers_to_agree(given: Tools, params: Any, rows: Sequences, *, batch: int = 300) -> Bool[np.ndarray, "seeds rows"]:
    """Return whether each seed's model finds AGREE likelier than DISAGREE, after each prompt."""
    count = rows.tokens.shape[0]
    places = [np.minimum(np.arange(start, start + batch), count - 1) for start in range(0, count, batch)]
    found = [_prefers_to_agree(given, params, jax.tree.map(lambda leaf, at=at: leaf[at], rows)) for at in places]
    return np.concatenate([np.asarray(each) for each in found], axis=1)[:, :count]


def started(given: Tools, params: Any, keys: Array, *, steps: int) -> train.TrainState:
    """Return the state of every seed before a stage's first step; `params` of all seeds, or None for new models."""
    params = jax.vmap(given.lm.init)(keys) if params is None else params
    optimizer = adam(given.config.learning_rate, steps)
    return jax.vmap(lambda params, key: train.initial_state(params, optimizer, key))(params, keys)


def steps_between(steps: int, snapshots: int) -> int:
    """Return the steps from one snapshot of a stage to the next.

    Raises:
        ValueError: if the snapshots do not divide the steps: some would never be taken.
    """
    if snapshots < 1 or steps < snapshots or steps % snapshots:
        raise ValueError(f"{snapshots} snapshots must divide the steps of a stage, but there are {steps}.")
    return steps // snapshots


def stage(
    given: Tools,
    params: Any,
    data: Sequences,
    rows: Int[np.ndarray, "some"],
    key: Array,
    seen: Callable[[int, Any], None],
    *,
    steps: int,
) -> Any:
    """Return every seed's parameters after a stage of training on some rows; call `seen(step, params)` on the way.

    Raises:
        ValueError: as `steps_between`.
    """
    config = given.config
    between = steps_between(steps, config.snapshots)
    init_key, order_key = jax.random.split(key)
    states = started(given, params, jax.random.split(init_key, config.seeds), steps=steps)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(order_key)))
    shape = (config.snapshots, config.seeds, between, config.batch)
    seen(0, states.params)
    for number, order in enumerate(rng.choice(rows, shape), 1):
        states = stretch(given, steps, states, data, jnp.asarray(order))
        seen(number * between, states.params)
    return states.params


class Data(NamedTuple):
    """All examples of a run, as text and as tokens, and which rows each stage trains on."""

    asked: list[Example]
    held_out: Sequences
    rows: Sequences
    tools: Tools
    sycophantic: np.ndarray
    opinions: np.ndarray
    sums: np.ndarray


def prepared(config: Any) -> Data:
    """Build the sums, and a GPT-2 for them.

    Raises:
        ValueError: as `check`.
    """
    check(config)
    sets = addition.build(seed=config.seed)
    asked = sets.evaluation[: config.evaluated]
    found = encoded([*sets.sycophantic, *sets.intervention, *asked])
    kind = np.repeat([0, 1, 2], [len(sets.sycophantic), len(sets.intervention), len(asked)])
    silent = np.asarray([example.opinion is None for example in sets.sycophantic])
    return Data(
        asked,
        jax.tree.map(lambda leaf: leaf[kind == 2], found.rows),
        found.rows,
        tools(found, config),
        sycophantic=np.flatnonzero(kind == 0),
        opinions=np.flatnonzero(kind == 1),
        sums=np.flatnonzero(silent),
    )


def trained(
    data: Data, config: Any, rows: np.ndarray, number: int, params: Any = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Train every seed on some rows, from new parameters or given ones; return them with what was measured on the way.

    `number` tells the stages of a run apart, so that each has a key of its own.
    """
    curve = []

    def seen(step: int, params: Any) -> None:
        agrees = prefers_to_agree(data.tools, params, data.held_out)
        curve.append({"step": step} | addition_numbers.measured(data.asked, agrees))

    key = jax.random.fold_in(jax.random.key(config.seed), number)
    steps = config.taught_steps if params is None else config.steps
    return stage(data.tools, params, data.rows, rows, key, seen, steps=steps), curve


def check(config: Any) -> None:
    """Check before a run what would fail or mean nothing at its end.

    Raises:
        ValueError: for fewer seeds than an interval needs, or snapshots that do not divide the steps.
    """
    if config.seeds < 2:
        raise ValueError(f"an interval over seeds needs 2 or more, but seeds is {config.seeds}.")
    for steps in (config.taught_steps, config.steps):
        steps_between(steps, config.snapshots)
