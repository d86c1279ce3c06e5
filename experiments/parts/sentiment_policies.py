"""The policies of the sentiment experiment: every method is one compiled run, for every strength and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from experiments.parts.sentiment_models import Scorer, adam
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training import policy, steps
from jaxrl_llm.training.methods import METHODS
from jaxrl_llm.training.preference import JudgedBatch, PairBatch, preference_loss
from jaxrl_llm.training.rollout import Prompts, Sampler, rollout
from jaxrl_llm.training.sequences import Sequences, log_probs, measures

ONLINE = ("ppo", "grpo", "rloo")
OFFLINE = ("dpo", "ipo", "kto", "simpo")


class World(NamedTuple):
    """What all policies share: where they start, who judges, and on what."""

    reference: Params
    proxy: Scorer
    gold: Scorer
    prompts: Prompts  # to train on
    probes: Prompts  # of held-out films, to evaluate on
    text: Sequences  # reviews to train on, for the term γ E[log π]
    held_out: Sequences  # reviews of held-out films


class Tools(NamedTuple):
    """The models, without their parameters, and the sizes; all that programs are compiled for."""

    lm: Any
    head: ScalarHead
    config: Any

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.config.new_tokens, eos_ids=(0,))

    def reward(self, scorer: Scorer, rows: Sequences) -> Float[Array, "batch"]:
        """The scorer's log-odds that a review is good, 0 on average for the reference."""
        return self.head.scores(scorer.params, rows.tokens, mask=rows.mask) - scorer.shift


def evaluated(tools: Tools, world: World, params: Params, key: Array) -> dict[str, Array]:
    """What a policy writes after prompts it has not seen: rewards, and divergence from the reference in nats."""
    drawn = rollout(tools.lm, params, world.probes, key, tools.sampler)
    rows = drawn.sequences
    found = measures(tools.lm, params, world.reference, rows)
    text_logp = log_probs(tools.lm, params, world.held_out)
    return {
        "proxy": tools.reward(world.proxy, rows).mean(),
        "gold": tools.reward(world.gold, rows).mean(),
        "kl": found.kl.sum(axis=1).mean(),
        "entropy": found.entropy.sum() / rows.answer.sum(),
        "length": rows.answer.sum(axis=1).mean(),
        "text_loss": -text_logp.sum() / world.held_out.answer.sum(),
    }


def evaluation_key(key: Array) -> Array:
    """Of a seed's key, the one that it is evaluated with: the reference too, so that gains are paired."""
    return jax.random.split(key, 3)[2]


def judged_pairs(tools: Tools, world: World, key: Array) -> PairBatch:
    """Two answers of the reference to each prompt; the better is chosen by chance, by the proxy's Bradley-Terry law.

    Some prompts at a time, so that many fit.
    """
    parts = tools.config.pairs // tools.config.pairs_at_once
    found = jax.lax.map(lambda key: _some_pairs(tools, world, key), jax.random.split(key, parts))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


def _some_pairs(tools: Tools, world: World, key: Array) -> PairBatch:
    count = tools.config.pairs_at_once
    prompt_key, draw_key, judge_key = jax.random.split(key, 3)
    rows = jax.random.randint(prompt_key, (count,), 0, world.prompts.tokens.shape[0])
    asked = jax.tree.map(lambda leaf: leaf[rows], world.prompts)
    drawn = rollout(tools.lm, world.reference, asked, draw_key, tools.sampler, group_size=2).sequences
    scores = tools.reward(world.proxy, drawn).reshape(-1, 2)
    first_wins = jax.random.uniform(judge_key, (count,)) < jax.nn.sigmoid(scores[:, 0] - scores[:, 1])
    sides = jax.tree.map(lambda leaf: leaf.reshape(count, 2, -1), drawn)

    def of(best: Array) -> Sequences:
        return jax.tree.map(lambda leaf: jnp.where(best[:, None], leaf[:, 0], leaf[:, 1]), sides)

    pairs = PairBatch(of(first_wins), of(~first_wins))
    logp = [log_probs(tools.lm, world.reference, side).sum(axis=1) for side in (pairs.chosen, pairs.rejected)]
    return pairs._replace(logp_ref_chosen=logp[0], logp_ref_rejected=logp[1])


def offline(tools: Tools, world: World, name: str, pairs: PairBatch, beta: Array, key: Array) -> PyTree:
    """One run of a preference loss on judged pairs: what is evaluated on the way, and the metrics of each step."""
    config = tools.config
    optimizer = adam(config.offline_learning_rate, config.offline_steps)
    knobs = {"gamma": config.simpo_margin} if name == "simpo" else {}
    loss = preference_loss(tools.lm, name, beta=beta, **knobs)
    order_key, state_key, _ = jax.random.split(key, 3)
    size = config.offline_batch
    total = config.offline_steps * size
    epochs = -(-total // config.pairs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, config.pairs))(jax.random.split(order_key, epochs))
    order = orders.reshape(-1)[:total].reshape(config.snapshots, -1, size)

    def advance(state: steps.TrainState, rows: Array) -> tuple[steps.TrainState, PyTree]:
        batch = jax.tree.map(lambda leaf: leaf[rows], pairs)
        batch = judged(tools, world, batch) if name == "kto" else batch
        return steps.update(loss, optimizer, state, batch)

    return _snapshots(
        tools, world, steps.initial_state(world.reference, optimizer, state_key), advance, order, evaluation_key(key)
    )


def judged(tools: Tools, world: World, pairs: PairBatch) -> JudgedBatch:
    """Every answer for itself; the mismatched ones are the answers to the next prompt of the batch.

    All prompts have one length, so that an answer is moved by moving its tokens.
    """
    answers = jax.tree.map(lambda *sides: jnp.concatenate(sides), pairs.chosen, pairs.rejected)
    asked = world.prompts.tokens.shape[1]
    mismatched = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0).at[:, :asked].set(leaf[:, :asked]), answers)
    count = pairs.chosen.tokens.shape[0]
    logp_ref = jnp.concatenate([pairs.logp_ref_chosen, pairs.logp_ref_rejected])
    mismatched_ref = log_probs(tools.lm, world.reference, mismatched).sum(axis=1)
    return JudgedBatch(answers, jnp.arange(2 * count) < count, mismatched, logp_ref, mismatched_ref)


def online(tools: Tools, world: World, name: str, beta: Array, gamma: Array, key: Array, *, with_text: bool) -> PyTree:
    """One run of a policy-gradient method on the proxy's reward: as `offline`."""
    config = tools.config
    method = dataclasses.replace(METHODS[name], beta=beta, gamma=gamma)
    method = dataclasses.replace(method, epochs=min(method.epochs, config.epochs))
    critic = tools.head if method.has_critic else None
    optimizer = adam(config.online_learning_rate, config.online_steps * method.epochs * method.minibatches)
    trainer = policy.online(tools.lm, optimizer, critic=critic)
    frozen = {"ref": world.reference}
    state_key, critic_key, _ = jax.random.split(key, 3)
    params = world.reference
    if critic is not None:
        params = {"policy": params, "critic": critic.init(critic_key, world.reference, zero=True)}
    asked = config.online_batch // method.group_size

    def advance(state: steps.TrainState, number: Array) -> tuple[steps.TrainState, PyTree]:
        rows = jax.random.randint(jax.random.fold_in(state.step_key, 7), (asked,), 0, world.prompts.tokens.shape[0])
        text = None
        if with_text:
            picked = jax.random.randint(
                jax.random.fold_in(state.step_key, 8), (config.text_batch,), 0, world.text.tokens.shape[0]
            )
            text = jax.tree.map(lambda leaf: leaf[picked], world.text)
        return trainer.step(
            state,
            jax.tree.map(lambda leaf: leaf[rows], world.prompts),
            lambda drawn: tools.reward(world.proxy, drawn.sequences),
            method=method,
            sampler=tools.sampler,
            frozen=frozen,
            text=text,
        )

    start = steps.initial_state(params, optimizer, state_key)
    order = jnp.arange(config.online_steps).reshape(config.snapshots, -1)
    return _snapshots(tools, world, start, advance, order, evaluation_key(key), critic=critic is not None)


def _snapshots(
    tools: Tools,
    world: World,
    state: steps.TrainState,
    advance: Callable[..., PyTree],
    order: Array,
    key: Array,
    *,
    critic: bool = False,
) -> PyTree:
    """Train in as many stretches as `order` has rows, and evaluate after each."""

    def stretch(state: steps.TrainState, rows: Array) -> PyTree:
        state, metrics = jax.lax.scan(advance, state, rows)
        params = state.params["policy"] if critic else state.params
        return state, (evaluated(tools, world, params, key), metrics)

    state, (snapshots, metrics) = jax.lax.scan(stretch, state, order)
    params = state.params["policy"] if critic else state.params
    metrics = jax.tree.map(lambda leaf: leaf.reshape(-1), metrics)
    return {"snapshots": snapshots, "steps": metrics, "params": params}


def runner(tools: Tools, name: str, *, with_text: bool = False) -> Callable[..., PyTree]:
    """One jitted run of a method, of `(world, pairs, beta, gamma, key)`: compiled once for all strengths and seeds.

    The runs come one after the other: `vmap` over them makes batched products of matrices, which are slow on a CPU.
    """

    def run(world: World, pairs: PyTree, beta: Array, gamma: Array, key: Array) -> PyTree:
        if name in OFFLINE:
            return offline(tools, world, name, pairs, beta, key)
        return online(tools, world, name, beta, gamma, key, with_text=with_text)

    return jax.jit(run)


def best_of_n(tools: Tools, world: World, key: Array) -> dict[str, Array]:
    """Proxy and gold reward of many answers of the reference to each probe, [probes, answers]."""
    rows = rollout(tools.lm, world.reference, world.probes, key, tools.sampler, group_size=tools.config.best_of)
    shape = (-1, tools.config.best_of)
    scorers = {"proxy": world.proxy, "gold": world.gold}
    return {name: tools.reward(scorer, rows.sequences).reshape(shape) for name, scorer in scorers.items()}
