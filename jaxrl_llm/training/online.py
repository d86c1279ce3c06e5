"""Online runs put together: rewards, rollouts, held-out prompts, and the trained model."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrl_llm import mesh as meshes
from jaxrl_llm import models, text
from jaxrl_llm.data import records
from jaxrl_llm.decoding.constraints import stop_strings
from jaxrl_llm.decoding.transforms import Chain, MinP, TopK, TopP
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.decoder import with_attention
from jaxrl_llm.models.heads import LoadedReward, ScalarHead, load_reward_model
from jaxrl_llm.scoring import measures
from jaxrl_llm.training import reward_fns
from jaxrl_llm.training.config import Data, GRPOConfig, direction
from jaxrl_llm.training.policy import DESCRIBED, Method, check_ends, method_of, online
from jaxrl_llm.training.recipes import (
    Run,
    Trained,
    batches_of,
    digest,
    finish,
    optimizer_for,
    place_of,
    progress,
    sampler_of,
    trained_of,
    with_steps,
)
from jaxrl_llm.training.rollout import Prompts, Rollout, Sampler, replaced_groups, rollout
from jaxrl_llm.training.steps import Frozen, Metrics, TrainState, initial_state

FURTHER = 2**20  # batches between those of a step's draws


def optimise_rewards(run: Run, prompts: Data, kind: str, *, method: Method | None = None) -> models.Loaded:
    """Train on rewards of the model's own completions, by the method of the configuration or the given one.

    Raises:
        ValueError: for a reward that cannot judge the prompts' completions: see `judges_of`; or as `check_ends`.
    """
    config: GRPOConfig = run.config
    method = method_of(config) if method is None else method
    judges, sampler = judges_of(run), _sampler(run)
    check_ends(method, sampler)
    size = config.batch_size // method.group_size
    asked, found = batches_of(run, prompts, "prompt-only", batch_size=size, room=sampler.max_new_tokens, name="prompts")
    judges.check(found, longest=asked.longest)
    run = with_steps(run, asked)
    config = run.config
    texts = None
    if config.text is not None:
        texts = batches_of(run, config.text, "prompt-completion", batch_size=config.batch_size, name="text")
    critic = ScalarHead(with_attention(run.lm, "exact")) if method.has_critic else None
    trained = trained_of(run, reference=True, critic=critic)
    updates = method.epochs * method.minibatches
    rate, optimizer = optimizer_for(config, updates=updates)
    trainer = online(run.lm, optimizer, critic=critic, microbatches=config.microbatches, view=trained.view)
    held_out = None if config.eval_data is None else held_out_rewards(run, judges, sampler, trained)

    def advance(state: TrainState, done: int) -> tuple[TrainState, Metrics]:
        judged: list[reward_fns.Judged] = []
        tokens = 0

        def draw(again: int) -> tuple[Rollout, Array]:
            nonlocal tokens
            batch, sizes = done + again * FURTHER, {"group_size": method.group_size, "critic": method.has_critic}
            drawn = trainer.draw(state, run.batch(asked, batch), sampler, trained.frozen, again, **sizes)
            whole = drawn if jax.process_count() == 1 else meshes.on_host(drawn)
            judged.append(judges(asked.records(batch), whole))
            tokens += int(whole.sequences.completion_mask.sum())
            return (whole if config.redraws else drawn), judged[-1].total

        drawn, earned, further = replaced_groups(draw, group_size=method.group_size, most=config.redraws)
        drawn, earned = run.rows(lambda own=None: (drawn, np.asarray(earned)), config.batch_size)
        state, metrics = trainer.learn(
            state,
            drawn,
            earned,
            method=method,
            sampler=sampler,
            frozen=trained.frozen,
            text=None if texts is None else run.batch(texts[0], done),
        )
        metrics |= described(judged) | {"completion_tokens": tokens} | ({"redraws": further} if config.redraws else {})
        if metrics["judged"] == 0:  # what describes the judged completions is a mean over nothing
            metrics = {name: value for name, value in metrics.items() if name not in DESCRIBED}
        return state, metrics

    sample = sampler_of(run, asked(0), sampler)

    def evaluate(params: Params) -> dict[str, float | str]:
        if held_out is not None:
            return held_out(params)
        return {"sample": sample(trained.model(params))} if run.reports else {}

    identity = {"reward": judges.places, "text": texts and texts[1].digest(), "method": method, "eos_ids": run.eos}
    state = run.loop(
        initial_state(trained.params, optimizer, run.keys.state),
        advance,
        tokens="completion_tokens",
        numbers=progress(rate, asked, updates=updates),
        evaluate=evaluate,
        config=run.identity(kind, data_sha256=found.digest(), **identity),
        watch=("reward", "kl", "entropy", "clip_fraction"),
        describe=asked.describe,
    )
    return finish(run, trained, state.params)


def _sampler(run: Run) -> Sampler:
    config: GRPOConfig = run.config
    asked = {TopK: config.top_k, TopP: None if config.top_p == 1 else config.top_p, MinP: config.min_p}
    filters = tuple(kind(value) for kind, value in asked.items() if value is not None)
    stop = None
    if config.stop:
        stop = stop_strings(text.token_bytes(run.loaded.tokenizer, run.lm.vocab_size), config.stop)
    return Sampler(config.max_new_tokens, config.temperature, Chain(filters) if filters else None, run.eos, stop)


class Judge(NamedTuple):
    """A reward of a run."""

    place: str  # in `run.json`
    of: Callable[[list[records.Prompt]], reward_fns.RewardFn]  # of the records of a batch
    check: Callable[[Sequence[records.Prompt], int], None]  # (prompts, tokens of the longest); ValueError if it cannot
    apart: bool  # a function of texts, which each process calls for its own; else a model, on all devices


class Judges(NamedTuple):
    """The rewards of a run, by name."""

    each: dict[str, Judge]
    weights: tuple[float, ...]

    @property
    def places(self) -> list[str]:
        """All places, for `run.json`."""
        return [each.place for each in self.each.values()]

    def __call__(self, asked: list[records.Prompt], drawn: Rollout) -> reward_fns.Judged:
        """Return the rewards of completions of these records."""
        each: dict[str, Any] = {}
        for name, judge in self.each.items():
            of = reward_fns.of_own if judge.apart else reward_fns.of_all
            each[name] = of(judge.of, asked, drawn, name=reward_fns.spoken(name, self.each))
        return reward_fns.summed(each, self.weights)

    def check(self, asked: Sequence[records.Prompt], *, longest: int) -> None:
        """Raise ValueError for prompts that a reward cannot judge."""
        for each in self.each.values():
            each.check(asked, longest)


def judges_of(run: Run) -> Judges:
    """Return the rewards of the configuration, each by the name of its function, a model as reward_model.

    Raises:
        TypeError: for one that is neither a function nor a reward model.
        ValueError: for a function that is not there. The check of `Judges` raises it for entries that the prompts do
            not have, and for a reward model whose context or chat template does not serve them.
    """
    config: GRPOConfig = run.config
    named: dict[str, Judge] = {}
    for given in config.rewards:
        name, judge = _judge(run, given)
        number, called = 1, name
        while called in named:
            number += 1
            called = f"{name}_{number}"
        named[called] = judge
    return Judges(named, config.reward_weights)


def _judge(run: Run, given: Any) -> tuple[str, Judge]:
    if isinstance(given, os.PathLike) or (isinstance(given, str) and Path(given).expanduser().is_dir()):
        rule = None if run.mesh is None else meshes.sharding_on(run.mesh)
        return "reward_model", _model_judge(
            run, load_reward_model(Path(given).expanduser(), sharding=rule), f" {given}"
        )
    if isinstance(given, LoadedReward):
        return "reward_model", _model_judge(run, given)
    function = reward_fns.function_at(given) if isinstance(given, str) else given
    if not callable(function):
        raise TypeError(f"reward must be a function or a reward model, but is a {type(function).__name__}.")
    tokenizer = run.loaded.tokenizer
    return _plain_name(function), Judge(
        place_of(given),
        lambda asked: reward_fns.of_text(function, tokenizer, records=asked, ends=run.eos),
        lambda asked, longest: reward_fns.check_entries(function, asked),
        apart=True,
    )


def _model_judge(run: Run, found: LoadedReward, name: str = "") -> Judge:
    """Return the judge of a reward model, which reads the policy's tokens if it has its tokenizer, else its texts.

    Conversations are always read as texts, for the last token that the chat template writes is the one that is scored.

    Raises:
        ValueError: if it has no tokenizer and another vocabulary.
    """
    found = dataclasses.replace(found, params=run.placed(found.params))
    ours, theirs, size, context = run.loaded.tokenizer, found.tokenizer, found.head.lm.vocab_size, found.max_length
    if theirs is None and size != run.lm.vocab_size:
        raise ValueError(
            f"a reward model without a tokenizer must have the policy's vocabulary of {run.lm.vocab_size} tokens, "
            f"but has {size}."
        )
    alike = theirs is None or (found.has_tokens_of(ours) and size >= run.lm.vocab_size)

    def check(asked: Sequence[records.Prompt], longest: int) -> None:
        longest = longest if alike else 0
        try:
            if not alike or getattr(theirs, "chat_template", None):
                for each in (each for each in asked if not alike or not isinstance(each.prompt, str)):
                    chat = not isinstance(each.prompt, str) and (text.read_by(theirs, each.template) or True)
                    longest = max(longest, len(text.encode(theirs, each.prompt, chat=chat)))
        except ValueError as error:
            raise ValueError(f"the reward model{name} cannot read the prompts: {error}") from error
        if longest + run.config.max_new_tokens > context:
            raise ValueError(
                f"the context of the reward model{name} must hold its longest prompt, {longest} tokens, and "
                f"max_new_tokens, {run.config.max_new_tokens}, but is {context}."
            )

    return Judge(
        f"sha256 {digest(found.params)}",
        lambda asked: reward_fns.of_loaded(found, ours, records=asked, same_tokens=alike, ends=run.eos),
        check,
        apart=False,
    )


def _plain_name(function: Callable[..., Any]) -> str:
    function = getattr(function, "func", function)  # of a partial
    return getattr(function, "__name__", type(function).__name__)


def described(judged: Sequence[reward_fns.Judged]) -> dict[str, float]:
    """Return the share of completions that were judged, and of several rewards the mean of each, by its name."""
    total = np.concatenate([each.total for each in judged])
    columns = {name: np.concatenate([each.each[name] for each in judged]) for name in judged[0].each}
    means = {f"reward/{name}": _mean_of_judged(each) for name, each in columns.items()} if len(columns) > 1 else {}
    return {"judged": float(1 - np.isnan(total).mean())} | {
        name: mean for name, mean in means.items() if mean is not None
    }


def _mean_of_judged(values: np.ndarray) -> float | None:
    judged = values[~np.isnan(values)]
    return float(judged.mean(dtype=np.float64)) if judged.size else None


def held_out_rewards(
    run: Run, judges: Judges, sampler: Sampler, trained: Trained
) -> Callable[[Params], dict[str, float | str]]:
    """Return the measures of one completion of each held-out prompt as a function of the parameters.

    They are `held_out_reward`, of several rewards each by its name, `held_out_kl`, the KL(policy‖reference) of a
    completion in nats, `held_out_length` in tokens, `held_out_ended`, and the completions of the first two prompts. The
    key is always the same, so that differences are those of the parameters.

    Raises:
        ValueError: if `keep_best` is not one of the numbers, or as the check of `Judges`.
    """
    config: GRPOConfig = run.config
    asked, found = batches_of(
        run, config.eval_data, "prompt-only", batch_size=1, room=sampler.max_new_tokens, name="eval_data"
    )
    judges.check(found, longest=asked.longest)
    if config.keep_best is not None:  # a wrong name is an error now, not after the first steps
        several = [f"reward/{name}" for name in judges.each] if len(judges.each) > 1 else []
        names = [f"held_out_{name}" for name in ("reward", *several, "kl", "length", "ended")]
        if (name := direction(config.keep_best)[0]) not in names:
            raise ValueError(f"keep_best must be one of {', '.join(names)}, but is {name}.")
    order = sorted(range(len(found)), key=lambda place: asked.rows(place).length)
    count = -(-len(found) // config.batch_size)  # as few parts as possible, of one size: of one program
    size = -(-len(found) // count)
    parts = [order[start : start + size] for start in range(0, len(found), size)]
    shards = 1 if run.mesh is None else meshes.row_shards(run.mesh)
    size = -(-size // shards) * shards

    @jax.jit
    def drawn_of(params: Params, part: Prompts, number: Array, sampler: Sampler, frozen: Frozen) -> Any:
        seen = trained.policy(params if trained.view is None else trained.view(params, frozen))
        drawn = rollout(run.lm, seen, part, jax.random.fold_in(jax.random.key(0), number), sampler)
        kl = measures(run.lm, seen, frozen.ref, drawn.sequences, temperature=sampler.temperature).kl
        return drawn, jnp.where(drawn.sequences.completion_mask, kl, 0).sum(axis=1)

    def of(params: Params) -> dict[str, float | str]:
        judged, rows, samples = [], [], {}
        for number, places in enumerate(parts):
            filled = [*places, *places[-1:] * (size - len(places))]
            part = run.rows(functools.partial(asked.collate, filled), size)
            filled_out = meshes.on_host(drawn_of(params, part, number, sampler, trained.frozen))
            drawn, kl = jax.tree.map(lambda leaf, places=places: leaf[: len(places)], filled_out)
            judged.append(judges([found[place] for place in places], drawn))
            rows.append(np.stack([kl, drawn.sequences.completion_mask.sum(axis=1), drawn.ended]))
            sides = reward_fns.texts(drawn.sequences, run.loaded.tokenizer, run.eos)
            whole = ["".join(each) for each in zip(*sides, strict=True)]
            samples |= {place: written for place, written in zip(places, whole, strict=True) if place < 2}
        reward = _mean_of_judged(np.concatenate([each.total for each in judged]))
        names = {name: mean for name, mean in described(judged).items() if name.startswith("reward/")}
        names |= dict(zip(("kl", "length", "ended"), np.concatenate(rows, axis=1).mean(axis=1).tolist(), strict=True))
        shown = {"sample" if place == 0 else f"sample_{place + 1}": samples[place] for place in sorted(samples)}
        return {
            f"held_out_{name}": value for name, value in ({"reward": reward} | names).items() if value is not None
        } | shown

    return of
