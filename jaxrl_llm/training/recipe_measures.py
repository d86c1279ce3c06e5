"""What a recipe's run looks at every so often: the loss on what it does not train on, and a text of its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.language_model import Params
from jaxrl_llm.training import rewards
from jaxrl_llm.training.batches import COLLATE, Batches
from jaxrl_llm.training.recipe_parts import Setup, Trained, batches_of
from jaxrl_llm.training.recipe_run import Run
from jaxrl_llm.training.rollout import Prompts, Sampler, rollout
from jaxrl_llm.training.steps import LossFn

SHOWN = 48  # tokens of a text


def held_out(run: Run, setup: Setup, loss: LossFn, kind: str, trained: Trained) -> Callable[[Params], float]:
    """The loss over the whole held-out file, in parts of a microbatch's rows at most, each by its weight."""
    batches = batches_of(run, setup, run.eval_data, kind, batch_size=1)
    rows = sorted(map(batches.rows, range(batches.order.steps_per_epoch)), key=lambda row: row.length)
    parts = [
        COLLATE[kind]([rows[place] for place in places], 32)
        for places in _parts(len(rows), run.batch_size // run.microbatches)
    ]

    @jax.jit
    def of_part(params: Params, part: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
        seen = params if trained.view is None else trained.view(params, frozen)
        found = loss(seen, part, frozen, jax.random.key(0))
        return found.value, jnp.asarray(found.weight, jnp.float32)

    def mean(params: Params) -> float:
        found = np.asarray([[float(each) for each in of_part(params, part, trained.frozen)] for part in parts])
        return float((found[:, 0] * found[:, 1]).sum() / found[:, 1].sum())

    return mean


def sampled(setup: Setup, asked: Prompts, sampler: Sampler) -> Callable[[Params], str]:
    """What the model answers to the first prompt, always with the same key."""
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), asked)

    def sample(params: Params) -> str:
        drawn = rollout(setup.lm, params, one, jax.random.key(0), sampler)
        return "".join(side[0] for side in rewards.texts(drawn.sequences, setup.loaded.tokenizer))

    return sample


def continued(setup: Setup, batches: Batches) -> Callable[[Params], str]:
    """`sampled` after the prompt of the first record, in what its end leaves of the model's context."""
    count = min(SHOWN, setup.lm.max_length - 1)
    prompt = batches.rows(0).prompt[count - setup.lm.max_length :]
    asked = Prompts(np.asarray([prompt], np.int32), np.ones((1, len(prompt)), bool))
    return sampled(setup, asked, Sampler(count, eos_ids=setup.eos))


def _parts(count: int, size: int) -> list[np.ndarray]:
    """The places 0 … count − 1 in as few parts of at most `size` as can be, their sizes at most 1 apart."""
    return np.array_split(np.arange(count), -(-count // size))
