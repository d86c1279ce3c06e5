"""The same ranked answers given to a linear reward model in three ways, by SGD or by Adam.

Answers have random features, true scores are linear in them, and each prompt's answers are ranked once, by a draw from
Plackett and Luce, so that every pair follows Bradley and Terry. There are more features than answers: the model can fit
any ranking.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.objectives import reward_model

ARMS = ("grouped", "shuffled", "matched")
OPTIMISERS = {"SGD": optax.sgd, "Adam": optax.adam}


class Answers(NamedTuple):
    """Answers to prompts, ragged in K: their features, true scores, ranks, and which are real."""

    features: Float[Array, "prompt answer feature"]
    scores: Float[Array, "prompt answer"]
    ranks: Int[Array, "prompt answer"]
    mask: Bool[Array, "prompt answer"]


class Pairs(NamedTuple):
    """Every comparison: its prompt, the chosen and the rejected answer, and 1/(number of its prompt's comparisons)."""

    prompt: Int[Array, "pair"]
    chosen: Int[Array, "pair"]
    rejected: Int[Array, "pair"]
    share: Float[Array, "pair"]


def answers_per_prompt(config: Any) -> np.ndarray:
    """K of each prompt: as many of each from `fewest` to `most`."""
    return config.fewest + np.arange(config.prompts) % (config.most - config.fewest + 1)


def comparisons(config: Any) -> int:
    """Σ C(K, 2) over the prompts."""
    sizes = answers_per_prompt(config)
    return int((sizes * (sizes - 1) // 2).sum())


def draw_answers(key: Array, direction: Float[Array, "feature"], config: Any) -> Answers:
    """Answers with standard normal features, of length about 1, and one noisy ranking of each prompt's."""
    features_key, noise_key = jax.random.split(key)
    shape = (config.prompts, config.most)
    features = jax.random.normal(features_key, (*shape, config.features)) / jnp.sqrt(config.features)
    mask = jnp.arange(config.most) < jnp.asarray(answers_per_prompt(config))[:, None]
    scores = features @ direction
    drawn = jnp.where(mask, scores + jax.random.gumbel(noise_key, shape), -jnp.inf)
    ranks = (drawn[:, None, :] > drawn[:, :, None]).sum(axis=-1)  # how many answers are better
    return Answers(features, scores, ranks, mask)


def all_pairs(answers: Answers, count: int) -> Pairs:
    """The `count` pairs of answers to one prompt, each once, the better ranked first."""
    better = answers.ranks[:, :, None] < answers.ranks[:, None, :]
    better &= answers.mask[:, :, None] & answers.mask[:, None, :]
    prompt, chosen, rejected = jnp.nonzero(better, size=count)
    return Pairs(prompt, chosen, rejected, 1 / better.sum(axis=(1, 2))[prompt])


def measure(weights: Array, train: Answers, pairs: Pairs, held_out: Answers) -> dict[str, Array]:
    """Return the mean margin on training pairs, and the mean loss on held-out ones under the population's labels."""
    scores, new_scores = train.features @ weights, held_out.features @ weights
    lead = scores[pairs.prompt, pairs.chosen] - scores[pairs.prompt, pairs.rejected]
    upper = jnp.triu(jnp.ones((new_scores.shape[1],) * 2, bool), 1)
    counted = upper & held_out.mask[:, :, None] & held_out.mask[:, None, :]
    first, second = new_scores[:, :, None], new_scores[:, None, :]
    true_lead = held_out.scores[:, :, None] - held_out.scores[:, None, :]
    first, second = jnp.broadcast_arrays(first, second)
    right = jax.nn.sigmoid(true_lead)  # how often the population prefers the first
    right_loss, wrong_loss = reward_model.pairwise_loss(first, second), reward_model.pairwise_loss(second, first)
    expected = right * right_loss + (1 - right) * wrong_loss
    return {"margin": lead.mean(), "held_out_loss": jnp.where(counted, expected, 0).sum() / counted.sum()}


@functools.partial(jax.jit, static_argnames="config")
def draw_data(keys: Array, config: Any) -> tuple[Answers, Pairs, Answers]:
    """For each key: answers to train on, their comparisons, and as many held-out answers of the same true model."""

    def draw(key: Array) -> tuple[Answers, Pairs, Answers]:
        direction_key, train_key, held_out_key = jax.random.split(key, 3)
        direction = config.spread * jax.random.normal(direction_key, (config.features,))
        answers = draw_answers(train_key, direction, config)
        return answers, all_pairs(answers, comparisons(config)), draw_answers(held_out_key, direction, config)

    return jax.vmap(draw)(keys)


def draw_batches(key: Array, config: Any, arm: str) -> Int[Array, "seed part step element"]:
    """For each seed and epoch a new order of the prompts, or of the comparisons, cut into parts and batches."""
    elements = config.prompts if arm == "grouped" else comparisons(config)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shape = (config.seeds, config.epochs, elements)
    orders = generator.permuted(np.broadcast_to(np.arange(elements), shape), axis=-1)
    return jnp.asarray(orders.reshape(config.seeds, config.epochs * config.checkpoints, -1, config.batch))


@functools.partial(jax.jit, static_argnames=("arm", "optimiser"))
def train(
    data: tuple[Answers, Pairs, Answers],
    batches: Int[Array, "seed part step element"],
    learning_rates: Float[Array, "rate"],
    *,
    arm: str,
    optimiser: str,
) -> dict[str, Float[Array, "rate seed checkpoint"]]:
    """Train from zero for each learning rate and seed; return `measure` at the start and after each part."""
    once = functools.partial(_train_once, arm=arm, name=optimiser)
    return jax.vmap(jax.vmap(once, in_axes=(0, 0, None)), in_axes=(None, None, 0))(data, batches, learning_rates)


def _train_once(data: tuple, batches: Array, learning_rate: Array, *, arm: str, name: str) -> dict[str, Array]:
    answers, pairs, _ = data
    optimiser = OPTIMISERS[name](learning_rate)

    def loss(weights: Array, batch: Array) -> Array:
        if arm == "grouped":
            of_batch = jax.tree.map(lambda leaf: leaf[batch], answers)
            return reward_model.k_choose_2_loss(of_batch.features @ weights, of_batch.ranks, of_batch.mask).mean()
        chosen, rejected = (
            answers.features[pairs.prompt[batch], which[batch]] @ weights for which in (pairs.chosen, pairs.rejected)
        )
        weight = pairs.share[batch] if arm == "matched" else 1.0
        return (weight * reward_model.pairwise_loss(chosen, rejected)).mean()

    def step(state: tuple, batch: Array) -> tuple[tuple, None]:
        weights, optimiser_state = state
        updates, optimiser_state = optimiser.update(jax.grad(loss)(weights, batch), optimiser_state)
        return (optax.apply_updates(weights, updates), optimiser_state), None

    def part(state: tuple, steps: Array) -> tuple[tuple, dict[str, Array]]:
        state, _ = jax.lax.scan(step, state, steps)
        return state, measure(state[0], *data)

    start = jnp.zeros(answers.features.shape[-1])
    _, measured = jax.lax.scan(part, (start, optimiser.init(start)), batches)
    return jax.tree.map(lambda first, later: jnp.concatenate([first[None], later]), measure(start, *data), measured)
