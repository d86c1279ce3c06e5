"""Expert iteration: draw several answers, keep the best, and fine-tune on it; best-of-n that is learnt."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.language_model import LanguageModel
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training import steps
from jaxrl_llm.training.rewards import RewardFn, rewards_of
from jaxrl_llm.training.rollout import Prompts, Rollout, Sampler, rollout
from jaxrl_llm.training.sft import sft_loss
from jaxrl_llm.training.steps import Metrics, TrainState


def best_answers(drawn: Rollout, rewards: Float[Array, "batch"], *, group_size: int) -> Sequences:
    """The answer of the largest reward in each group; the first of them in a tie."""
    groups = rewards.reshape(-1, group_size)
    best = jnp.arange(groups.shape[0]) * group_size + groups.argmax(axis=1)
    return jax.tree.map(lambda leaf: leaf[best], drawn.sequences)


def expert_iteration(
    lm: LanguageModel, optimizer: optax.GradientTransformation, *, group_size: int
) -> Callable[[TrainState, Prompts, RewardFn, Sampler], tuple[TrainState, Metrics]]:
    """A step `(state, prompts, reward, sampler) -> (state, metrics)`: best of `group_size`, then a step of fine-tuning.

    There is no reference: nothing but the number of steps holds the policy near its start.

    Raises:
        ValueError: unless there is a choice, group_size 2 or more; and as `rewards_of`.

    Source: Anthony et al. 2017; Dong et al. 2023 (RAFT).
    """
    if group_size < 2:
        raise ValueError(f"group_size must be 2 or more answers to choose from, but is {group_size}.")
    draw = jax.jit(functools.partial(rollout, lm, group_size=group_size))
    train_step = steps.make_step(sft_loss(lm), optimizer)

    def step(state: TrainState, prompts: Prompts, reward: RewardFn, sampler: Sampler) -> tuple[TrainState, Metrics]:
        drawn = draw(state.params, prompts, state.step_key, sampler)
        rewards = rewards_of(reward, drawn)
        state, metrics = train_step(state, best_answers(drawn, rewards, group_size=group_size))
        best = rewards.reshape(-1, group_size).max(axis=1)
        return state, metrics | {"reward": rewards.mean(), "best_reward": best.mean()}

    return step
