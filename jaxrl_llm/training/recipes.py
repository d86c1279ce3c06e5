"""Whole training runs from files to a folder with a model: what `jaxrl-llm train` does, to be called from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead, load_reward_model, save_reward_model
from jaxrl_llm.training import loop, rewards
from jaxrl_llm.training.methods import METHODS, Method
from jaxrl_llm.training.policy import online
from jaxrl_llm.training.precision import compute_in
from jaxrl_llm.training.preference import find_loss, preference_loss
from jaxrl_llm.training.recipe_measures import continued, held_out, sampled
from jaxrl_llm.training.recipe_parts import Setup, Trained, batches_of, optimizer_of, prepare, save, trained_of
from jaxrl_llm.training.recipe_run import Run, digest, keys_of
from jaxrl_llm.training.reward import reward_loss
from jaxrl_llm.training.rollout import Sampler
from jaxrl_llm.training.sft import sft_loss
from jaxrl_llm.training.steps import LossFn, initial_state, make_step


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an offline run minimises, over which kind of records, and what is told of it."""

    name: str
    loss: LossFn
    records: str
    watch: tuple[str, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # with its name, what `resume` compares


def sft(run: Run, *, say: Callable[[str], None] = print) -> Path:
    """Fine-tune on demonstrations; returns the folder of the model."""
    setup = prepare(run, say)
    return _offline(run, setup, Objective("sft", sft_loss(setup.lm), "demonstrations", ("loss",)))


def preference(
    run: Run, *, loss: str = "dpo", knobs: Mapping[str, float] | None = None, say: Callable[[str], None] = print
) -> Path:
    """Optimise preferences by a loss of `training.preference.NAMES`; the model itself, as it came, is the reference."""
    knobs = dict(sorted((knobs or {}).items()))
    function = find_loss(loss, knobs)  # before anything is loaded
    kto = loss == "kto"
    if kto and run.microbatches > 1:
        raise ValueError("the loss kto compares with all answers of a batch: leave microbatches at 1.")
    setup = prepare(run, say)
    objective = Objective(
        "preference",
        preference_loss(setup.lm, loss, **knobs),
        "judged" if kto else "preferences",
        ("loss", "margin", "chosen_logp", "rejected_logp"),
        {"loss": loss, "knobs": knobs},
    )
    return _offline(run, setup, objective, reference=kto or "reference" in function.needs)


def reward(run: Run, *, centering: float = 0.0, say: Callable[[str], None] = print) -> Path:
    """Train a reward model on ranked answers, or on preferences."""
    if run.lora_rank:
        raise ValueError("a reward model is trained whole: leave lora_rank at 0.")
    setup = prepare(run, say)
    head = ScalarHead(setup.lm)
    loss = reward_loss(head, centering=centering)
    objective = Objective("reward", loss, "ranked", ("loss", "accuracy"), {"centering": centering})
    view = compute_in(run.dtype) if run.dtype == "bfloat16" else None
    trained = Trained(head.init(keys_of(run).head, setup.loaded.params), {}, view, None)
    params = _fit(run, setup, objective, trained)
    save_reward_model(run.out, head, params, setup.loaded.tokenizer)
    say(f"The reward model is in {run.out}.")
    return run.out


def policy_gradient(
    run: Run,
    *,
    method: Method | str = "grpo",
    sampler: Sampler | None = None,
    reward_model: str | None = None,
    reward_function: str | Callable[..., Any] | None = None,
    text: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train on the rewards of the model's own answers, by any of `METHODS`.

    Args:
        run: `batch_size` is the number of answers of a step; the prompts are `method.group_size` times fewer.
        sampler: how answers are drawn; by default up to 64 tokens, at temperature 1.
        reward_model: a folder, as `reward` writes it, on the policy's own tokens.
        reward_function: function(prompts, answers) -> numbers, or where it is: "file.py:name", "module:name". With a
            parameter `fields` it is given the further entries of each prompt's line, one dict an answer.
        text: pretraining text, as lines that `sft` takes, for the term γ E[log π] of `method.gamma`; `batch_size` lines
            a step.

    Raises:
        ValueError: for a method that there is not; unless there is one reward, and text if and only if γ is above 0; or
            where the answers of a step cannot be cut into groups, minibatches and microbatches.
    """
    method = _checked_method(run, method, text)
    if (reward_model is None) == (reward_function is None):
        raise ValueError("give one reward: a reward model or a reward function.")
    function = rewards.function_at(reward_function) if isinstance(reward_function, str) else reward_function
    setup = prepare(run, say)
    sampler = dataclasses.replace(sampler or Sampler(64), eos_ids=setup.eos)
    of_records = _reward(reward_model, function, setup)
    size, room = run.batch_size // method.group_size, sampler.max_new_tokens
    asked = batches_of(run, setup, run.data, "prompts", batch_size=size, room=room)
    texts = None if text is None else batches_of(run, setup, text, "demonstrations", batch_size=run.batch_size)
    critic = ScalarHead(setup.lm) if method.has_critic else None
    trained = trained_of(run, setup, reference=True, critic=critic)
    optimizer = optimizer_of(run, run.steps * method.epochs * method.minibatches)
    trainer = online(setup.lm, optimizer, critic=critic, microbatches=run.microbatches, view=trained.view)

    def advance(state: Any, done: int) -> Any:
        further = None if texts is None else jax.tree.map(jnp.asarray, texts(done))
        state, metrics = trainer.step(
            state, asked(done), of_records(asked.records(done)),
            method=method, sampler=sampler, frozen=trained.frozen, text=further,
        )  # fmt: skip
        return state, metrics | {"answer_tokens": metrics["length"] * run.batch_size}

    sample = sampled(setup, asked(0), sampler)
    source = {"reward": reward_model or _name(reward_function), "text": text and digest(text)}
    state = loop.run(
        initial_state(trained.params, optimizer, keys_of(run).state),
        advance,
        steps=run.steps,
        folder=run.out,
        tokens="answer_tokens",
        evaluate=lambda params: {"sample": sample(trained.model(params))},
        config=run.identity("policy_gradient", method=method, sampler=sampler, **source),
        watch=("reward", "kl", "entropy", "clip_fraction"),
        describe=asked.describe,
        **run.pace,
    )
    save(run, setup, trained, state.params)
    return run.out


# The parts ------------------------------------------------------------------------------------------------------------


def _offline(run: Run, setup: Setup, objective: Objective, *, reference: bool = False) -> Path:
    trained = trained_of(run, setup, reference=reference)
    save(run, setup, trained, _fit(run, setup, objective, trained, shown=True))
    return run.out


def _fit(run: Run, setup: Setup, objective: Objective, trained: Trained, *, shown: bool = False) -> Params:
    """The trained parameters; `shown`: with a sample of the model's text every so often."""
    batches = batches_of(run, setup, run.data, objective.records, batch_size=run.batch_size)
    optimizer = optimizer_of(run, run.steps)
    step = make_step(objective.loss, optimizer, microbatches=run.microbatches, view=trained.view)
    measures = {}
    if run.eval_data is not None:
        measures["held_out_loss"] = held_out(run, setup, objective.loss, objective.records, trained)
    if shown:
        sample = continued(setup, batches)
        measures["sample"] = lambda params: sample(trained.model(params))
    # Without a reference or a base nothing else reads the loaded parameters: the state takes them over.
    state = initial_state(trained.params, optimizer, keys_of(run).state, copy="ref" in trained.frozen)
    return loop.run(
        state,
        lambda state, done: step(state, jax.tree.map(jnp.asarray, batches(done)), trained.frozen),
        steps=run.steps,
        folder=run.out,
        tokens=batches.tokens,
        evaluate=lambda params: {name: measure(params) for name, measure in measures.items()},
        config=run.identity(objective.name, **objective.settings),
        watch=objective.watch,
        describe=batches.describe,
        **run.pace,
    ).params


def _checked_method(run: Run, method: Method | str, text: Path | None) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, but is {method!r}.")
        method = METHODS[method]
    if run.batch_size % method.group_size:
        raise ValueError(f"batch_size, {run.batch_size}, must be a multiple of group_size, {method.group_size}.")
    if run.batch_size % (method.minibatches * run.microbatches):
        raise ValueError(
            f"{method.minibatches} minibatches of {run.microbatches} microbatches must divide batch_size, "
            f"{run.batch_size}."
        )
    if (method.gamma > 0) != (text is not None):
        raise ValueError(f"gamma, the weight of pretraining text, is {method.gamma}, and text is {text}: give both.")
    return method


def _reward(
    model: str | None, function: Callable[..., Any] | None, setup: Setup
) -> Callable[[list[Any]], rewards.RewardFn]:
    """From the records of a step to the reward of the answers to them."""
    if model is None:
        tokenizer = setup.loaded.tokenizer
        return lambda records: rewards.of_text(function, tokenizer, fields=[record.fields for record in records])
    loaded = load_reward_model(model)
    if loaded.head.lm.vocab_size != setup.lm.vocab_size:
        raise ValueError(
            f"the reward model reads {loaded.head.lm.vocab_size} tokens, the policy writes {setup.lm.vocab_size}."
        )
    of_tokens = rewards.of_model(loaded.head, loaded.params)
    return lambda records: of_tokens


def _name(function: str | Callable[..., Any]) -> str:
    """Where a reward function is, not what it says: one that failed may be mended, and the run resumed."""
    if isinstance(function, str):
        return function
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
