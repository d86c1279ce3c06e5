"""The policies of the sentiment experiment: every method is one compiled stretch of updates, for all its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from experiments.exact_alignment import standardised_kl
from experiments.sentiment.models import epochs, word_scores
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import preference
from jaxrl_llm.scoring import Sequences, log_probs, measures
from jaxrl_llm.training import policy, steps
from jaxrl_llm.training.policy import METHODS, Method
from jaxrl_llm.training.preference import PairBatch, Sums, UnpairedBatch, loss_of_sums, pair_sums, preference_loss
from jaxrl_llm.training.rollout import Prompts, Sampler, rollout

ONLINE = ("ppo", "grpo", "rloo")
OFFLINE = ("dpo", "ipo", "kto", "simpo")
PATIENCE, LONGEST = 3, 3
"""Training on a preference loss stops after PATIENCE stretches without a lower loss on held-out pairs, or after LONGEST
times the updates at which methods are compared."""


class World(NamedTuple):
    """Shared by all policies: the reference, the scorers, and the prompts."""

    reference: Params
    proxy: Params  # of a reward model
    gold: Array  # weights of words
    shifts: Array  # of proxy and gold: their means on reviews by the reference
    prompts: Prompts  # to train on
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

    def proxy(self, world: World, rows: Sequences) -> Float[Array, "batch"]:
        """Return the reward that is optimised: log-odds, 0 on average for the reference."""
        return self.head.scores(world.proxy, rows.tokens, mask=rows.mask) - world.shifts[0]

    def gold(self, world: World, rows: Sequences) -> Float[Array, "batch"]:
        """Return the independent judge's reward: log-odds, 0 on average for the reference."""
        return word_scores(self.lm.vocab_size, world.gold, rows.tokens, rows.mask) - world.shifts[1]


class Pairs(NamedTuple):
    """Answers of the reference, labelled by the proxy: to train on, and held out, with the probability of the label."""

    train: PairBatch
    held_out: PairBatch
    probability: Float[Array, "held_out"]  # that the chosen one is preferred


class Settings(NamedTuple):
    """The traced hyperparameters of a run."""

    beta: Array
    rate: Array
    gamma: Array


def evaluated(tools: Tools, world: World, params: Params, probes: Prompts, key: Array) -> dict[str, Array]:
    """Return rewards and KL from the reference, in nats, of a policy's answers to prompts of held-out films."""
    rows = rollout(tools.lm, params, probes, key, tools.sampler).sequences
    found = measures(tools.lm, params, world.reference, rows)
    return {
        "proxy": tools.proxy(world, rows).mean(),
        "gold": tools.gold(world, rows).mean(),
        "kl": found.kl.sum(axis=1).mean(),
    }


def text_loss(tools: Tools, world: World, params: Params) -> Array:
    """Return the loss on reviews of held-out films, in nats per token."""
    return -log_probs(tools.lm, params, world.held_out).sum() / world.held_out.completion_mask.sum()


def judged_pairs(tools: Tools, world: World, key: Array) -> Pairs:
    """Draw two answers of the reference to each prompt, and choose by chance, by the proxy's Bradley-Terry model."""
    config = tools.config
    parts = jax.random.split(key, -(-(config.pairs + config.held_out_pairs) // config.pairs_at_once))
    pairs, probability = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.lax.map(lambda key: _some_pairs(tools, world, key), parts)
    )
    train = jax.tree.map(lambda leaf: leaf[: config.pairs], pairs)
    held_out = jax.tree.map(lambda leaf: leaf[config.pairs :], pairs)
    return Pairs(train, held_out, probability[config.pairs :])


def _some_pairs(tools: Tools, world: World, key: Array) -> tuple[PairBatch, Array]:
    count = tools.config.pairs_at_once
    prompt_key, draw_key, judge_key = jax.random.split(key, 3)
    rows = jax.random.randint(prompt_key, (count,), 0, world.prompts.tokens.shape[0])
    asked = jax.tree.map(lambda leaf: leaf[rows], world.prompts)
    drawn = rollout(tools.lm, world.reference, asked, draw_key, tools.sampler, group_size=2).sequences
    scores = tools.proxy(world, drawn).reshape(-1, 2)
    prefers_first = jax.nn.sigmoid(scores[:, 0] - scores[:, 1])
    first_wins = jax.random.uniform(judge_key, (count,)) < prefers_first
    sides = jax.tree.map(lambda leaf: leaf.reshape(count, 2, -1), drawn)

    def of(best: Array) -> Sequences:
        return jax.tree.map(lambda leaf: jnp.where(best[:, None], leaf[:, 0], leaf[:, 1]), sides)

    pairs = PairBatch(of(first_wins), of(~first_wins))
    logp = [log_probs(tools.lm, world.reference, side).sum(axis=1) for side in (pairs.chosen, pairs.rejected)]
    pairs = pairs._replace(logp_ref_chosen=logp[0], logp_ref_rejected=logp[1])
    return pairs, jnp.where(first_wins, prefers_first, 1 - prefers_first)


def options_of(tools: Tools, name: str, beta: Array) -> dict[str, Any]:
    """Return the hyperparameters of a preference loss."""
    return {"beta": beta} | ({"gamma": tools.config.simpo_margin} if name == "simpo" else {})


def held_out_loss(tools: Tools, world: World, name: str, pairs: Pairs, beta: Array, params: Params) -> Array:
    """Return the loss on held-out pairs, averaged over both labels with the proxy's probabilities."""
    settings, p = options_of(tools, name, beta), pairs.probability
    if name == "kto":
        batch = judged(tools, world, pairs.held_out)
        sides = batch.completions, batch.mismatched
        logp, mismatched = (log_probs(tools.lm, params, each).sum(axis=1) for each in sides)
        point = preference.kto_reference_point(mismatched, batch.logp_ref_mismatched)
        good, bad = (
            preference.kto_loss(logp, batch.logp_ref, jnp.full(logp.shape, side), point, **settings)
            for side in (True, False)
        )
        return (jnp.concatenate([p, 1 - p]) * good + jnp.concatenate([1 - p, p]) * bad).mean()
    sums = pair_sums(tools.lm, params, pairs.held_out)
    ref = sums._replace(chosen=pairs.held_out.logp_ref_chosen, rejected=pairs.held_out.logp_ref_rejected)
    loss = preference.PAIR_LOSSES[name]
    drawn, opposite = (loss_of_sums(loss, turn(sums), turn(ref), **settings) for turn in (lambda each: each, _swapped))
    return (p * drawn + (1 - p) * opposite).mean()


def _swapped(sums: Sums) -> Sums:
    return Sums(sums.rejected, sums.chosen, sums.length_rejected, sums.length_chosen)


def judged(tools: Tools, world: World, pairs: PairBatch) -> UnpairedBatch:
    """Return every answer on its own; the mismatched ones are the answers to the next prompt of the batch.

    All prompts have one length, so that an answer is moved by moving its tokens.
    """
    answers = jax.tree.map(lambda *sides: jnp.concatenate(sides), pairs.chosen, pairs.rejected)
    asked = world.prompts.tokens.shape[1]
    mismatched = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0).at[:, :asked].set(leaf[:, :asked]), answers)
    count = pairs.chosen.tokens.shape[0]
    logp_ref = jnp.concatenate([pairs.logp_ref_chosen, pairs.logp_ref_rejected])
    mismatched_ref = log_probs(tools.lm, world.reference, mismatched).sum(axis=1)
    return UnpairedBatch(answers, jnp.arange(2 * count) < count, mismatched, logp_ref, mismatched_ref)


def optimizer(rate: Array | float, warm_up: int = 5) -> optax.GradientTransformation:
    """Return Adam with clipped gradients and a constant rate after a short warm-up."""
    ramp = optax.linear_schedule(1 / warm_up, 1, warm_up)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(ramp),
                       optax.scale(-rate))  # fmt: skip


def method_of(tools: Tools, name: str, settings: Settings) -> Method:
    """Return a policy-gradient method with these hyperparameters; each epoch over a batch counts as an update."""
    method = dataclasses.replace(METHODS[name], beta=settings.beta, gamma=settings.gamma, kl="reward")
    return dataclasses.replace(method, epochs=min(method.epochs, tools.config.epochs))


class Program(NamedTuple):
    """A method's training, compiled once for all strengths, rates and seeds."""

    start: Callable[..., tuple[steps.TrainState, Array]]  # (world, key) -> the state, and rows for each stretch
    stretch: Callable[..., tuple[steps.TrainState, PyTree]]  # (world, pairs, state, rows, settings)
    policy: Callable[[steps.TrainState], Params]
    loss: Callable[..., Array] | None  # (world, pairs, beta, params) on held-out pairs


def offline(tools: Tools, name: str) -> Program:
    """Return the training by a preference loss on judged pairs."""
    config = tools.config

    def start(world: World, key: Array) -> tuple[steps.TrainState, Array]:
        order = epochs(key, config.pairs, LONGEST * config.updates, config.batch // 2)
        state = steps.initial_state(world.reference, optimizer(0.0), key)
        return state, order.reshape(LONGEST * config.snapshots, -1, config.batch // 2)

    def stretch(
        world: World, pairs: Pairs, state: steps.TrainState, order: Array, settings: Settings
    ) -> tuple[steps.TrainState, PyTree]:
        loss = preference_loss(tools.lm, name, **options_of(tools, name, settings.beta))

        def advance(state: steps.TrainState, rows: Array) -> tuple[steps.TrainState, PyTree]:
            batch = jax.tree.map(lambda leaf: leaf[rows], pairs.train)
            batch = judged(tools, world, batch) if name == "kto" else batch
            return steps.update(loss, optimizer(settings.rate), state, batch)

        return jax.lax.scan(advance, state, order)

    def loss(world: World, pairs: Pairs, beta: Array, params: Params) -> Array:
        return held_out_loss(tools, world, name, pairs, beta, params)

    return Program(start, jax.jit(stretch), lambda state: state.params, jax.jit(loss))


def online(tools: Tools, name: str, *, with_text: bool = False) -> Program:
    """Return the training by a policy-gradient method on the proxy's reward, optionally with the term γ E[log π]."""
    config = tools.config
    plain = method_of(tools, name, Settings(0.0, 0.0, 0.0))
    critic = tools.head if plain.has_critic else None
    asked, a_batch = config.batch // plain.group_size, plain.epochs * plain.minibatches

    def start(world: World, key: Array) -> tuple[steps.TrainState, Array]:
        params = world.reference
        if critic is not None:
            params = {"policy": params, "critic": critic.init(key, world.reference, zero=True)}
        order = np.arange(config.updates // a_batch).reshape(config.snapshots, -1)
        return steps.initial_state(params, optimizer(0.0), key), jnp.asarray(order)

    def stretch(
        world: World, pairs: None, state: steps.TrainState, order: Array, settings: Settings
    ) -> tuple[steps.TrainState, PyTree]:
        trainer = policy.online(tools.lm, optimizer(settings.rate), critic=critic)
        if name == "grpo":
            trainer = standardised_kl(trainer, tools.lm)

        def some(rows: PyTree, key: Array, count: int) -> PyTree:
            picked = jax.random.randint(key, (count,), 0, jax.tree.leaves(rows)[0].shape[0])
            return jax.tree.map(lambda leaf: leaf[picked], rows)

        def advance(state: steps.TrainState, _: Array) -> tuple[steps.TrainState, PyTree]:
            return trainer.step(
                state,
                some(world.prompts, jax.random.fold_in(state.step_key, 7), asked),
                lambda drawn: tools.proxy(world, drawn.sequences),
                method=method_of(tools, name, settings),
                sampler=tools.sampler,
                frozen=steps.Frozen(ref=world.reference),
                text=some(world.text, jax.random.fold_in(state.step_key, 8), config.batch // 2) if with_text else None,
            )

        return jax.lax.scan(advance, state, order)

    def of(state: steps.TrainState) -> Params:
        return state.params if critic is None else state.params["policy"]

    return Program(start, jax.jit(stretch), of, None)


def program_of(tools: Tools, name: str, *, with_text: bool = False) -> Program:
    """Return the training of a method by its name."""
    return offline(tools, name) if name in OFFLINE else online(tools, name, with_text=with_text)


def trained(
    program: Program,
    world: World,
    pairs: Pairs | None,
    settings: Settings,
    key: Array,
    evaluate: Callable[[Params], dict[str, Array]],
    *,
    stretches: int,
    path: bool,
) -> dict[str, Any]:
    """Train in stretches, and keep the parameters of the least held-out loss; of an online method, the last.

    Args:
        stretches: as many as all methods get.
        path: evaluate after each of those; and go on while the held-out loss has not stopped falling.

    Returns:
        first: the metrics of the first update.
        held_out: the loss on held-out pairs before the first and after every stretch; nothing for an online method.
        kept: after how many stretches the parameters were kept.
        path: the evaluation after every stretch, if asked for.
        end: the evaluation of the kept parameters. params: these.
    """
    state, order = program.start(world, key)
    best, kept, losses, told, first = program.policy(state), 0, [], [], None
    if program.loss is not None:
        losses = [float(program.loss(world, pairs, settings.beta, best))]
    for number, rows in enumerate(order, start=1):
        if number > stretches and (not path or number > kept + PATIENCE):
            break
        state, metrics = program.stretch(world, pairs, state, rows, settings)
        params = program.policy(state)
        first = {part: values[0] for part, values in metrics.items()} if first is None else first
        if program.loss is not None:
            losses.append(float(program.loss(world, pairs, settings.beta, params)))
        if program.loss is None or losses[-1] < min(losses[:-1]):
            best, kept = params, number
        told += [jax.device_get(evaluate(params))] if path and number <= stretches else []
    found = {
        "first": {part: first[part] for part in ("loss", "kl") if part in first},
        "held_out": np.asarray(losses, np.float32),
        "kept": np.asarray(kept),
        "end": told[kept - 1] if 0 < kept <= len(told) else evaluate(best),
        "params": best,
    }
    return found | ({"path": jax.tree.map(lambda *leaves: np.stack(leaves), *told)} if path else {})


def best_of_n(tools: Tools, world: World, probes: Prompts, key: Array) -> dict[str, Array]:
    """Return proxy and gold reward of many answers of the reference to each probe, [probes, answers]."""
    rows = rollout(tools.lm, world.reference, probes, key, tools.sampler, group_size=tools.config.best_of).sequences
    shape = (-1, tools.config.best_of)
    return {"proxy": tools.proxy(world, rows).reshape(shape), "gold": tools.gold(world, rows).reshape(shape)}
