"""Whole training runs from files to a folder with a model: what `jaxrl-llm train` does, to be called from Python."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxrl_llm import models, text
from jaxrl_llm.data.encoding import Cut, Encoder
from jaxrl_llm.data.jsonl import JsonLines
from jaxrl_llm.data.records import PARSERS
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.heads import ScalarHead, load_reward_model, save_reward_model
from jaxrl_llm.training import loop, rewards
from jaxrl_llm.training import lora as adapters
from jaxrl_llm.training.batches import COLLATE, Batches, encoder_of
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.methods import METHODS, Method
from jaxrl_llm.training.policy import online
from jaxrl_llm.training.precision import compute_in
from jaxrl_llm.training.preference import LOSSES, check_name, preference_loss
from jaxrl_llm.training.reward import reward_loss
from jaxrl_llm.training.rollout import Prompts, Sampler, rollout
from jaxrl_llm.training.sft import sft_loss
from jaxrl_llm.training.steps import LossFn, View, initial_state, make_step


@dataclasses.dataclass(frozen=True)
class Run:
    """What every run has: where from, where to, how long, how fast."""

    model: str
    data: Path
    out: Path
    eval_data: Path | None = None
    steps: int = 1000
    batch_size: int = 16
    microbatches: int = 1
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_length: int | None = None
    cut: Cut = "left"
    on_bad: Literal["raise", "skip"] = "raise"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    checkpoint_blocks: bool = False
    log_every: int = 10
    save_every: int = 100
    keep: int = 2
    seed: int = 0
    resume: bool = False
    tensorboard: bool = False


class Setup(NamedTuple):
    """A run's model, made ready."""

    loaded: models.Loaded
    lm: LanguageModel
    encoder: Encoder
    say: Callable[[str], None]


def sft(run: Run, *, say: Callable[[str], None] = print) -> Path:
    """Fine-tune on demonstrations; returns the folder of the model."""
    setup = prepare(run, say)
    return _offline(run, setup, "demonstrations", sft_loss(setup.lm), watch=("loss",))


def preference(
    run: Run, *, loss: str = "dpo", knobs: Mapping[str, float] | None = None, say: Callable[[str], None] = print
) -> Path:
    """Optimise preferences by a loss of `training.preference.NAMES`; the model itself, as it came, is the reference."""
    knobs = dict(knobs or {})
    check_name(loss, knobs)  # before anything is loaded
    setup = prepare(run, say)
    kind = "judged" if loss == "kto" else "preferences"
    watch = ("loss", "margin", "chosen_logp", "rejected_logp")
    reference = loss == "kto" or LOSSES[loss].needs_reference
    return _offline(run, setup, kind, preference_loss(setup.lm, loss, **knobs), watch=watch, reference=reference)


def reward(run: Run, *, centering: float = 0.0, say: Callable[[str], None] = print) -> Path:
    """Train a reward model on ranked answers, or on preferences."""
    setup = prepare(run, say)
    head = ScalarHead(setup.lm)
    params = head.init(jax.random.key(run.seed), setup.loaded.params)
    if run.lora_rank:
        raise ValueError("a reward model is trained whole: leave lora_rank at 0.")
    loss = reward_loss(head, centering=centering)
    batches = batches_of(run, setup, run.data, "ranked")
    state_params = _fit(run, setup, loss, params, batches, {}, None, ("loss", "accuracy"), "ranked", sample=None)
    save_reward_model(run.out, head, state_params, setup.loaded.tokenizer)
    say(f"The reward model is in {run.out}.")
    return run.out


def policy_gradient(
    run: Run,
    *,
    method: Method | str = "grpo",
    sampler: Sampler | None = None,
    reward_model: str | None = None,
    reward_function: str | Callable[..., Any] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train on the rewards of the model's own answers, by any of `METHODS`.

    Args:
        run: `batch_size` is the number of answers of a step; the prompts are `method.group_size` times fewer.
        sampler: how answers are drawn; by default up to 64 tokens, at temperature 1.
        reward_model: a folder, as `reward` writes it, on the policy's own tokens.
        reward_function: function(prompts, answers) -> numbers, or where it is: "file.py:name", "module:name".
    """
    method = METHODS[method] if isinstance(method, str) else method
    if run.batch_size % method.group_size:
        raise ValueError(f"batch_size, {run.batch_size}, must be a multiple of group_size, {method.group_size}.")
    if (reward_model is None) == (reward_function is None):
        raise ValueError("give one reward: a reward model or a reward function.")
    setup = prepare(run, say)
    eos = tuple(text.eos_ids(setup.loaded.tokenizer, setup.loaded.config))
    sampler = dataclasses.replace(sampler or Sampler(64), eos_ids=eos)
    earned = _reward(reward_model, reward_function, setup)
    asked = batches_of(
        dataclasses.replace(run, batch_size=run.batch_size // method.group_size),
        setup, run.data, "prompts", room=sampler.max_new_tokens,
    )  # fmt: skip
    critic = ScalarHead(setup.lm) if method.has_critic else None
    trained, frozen, view, lora = _trained(run, setup, setup.loaded.params)
    frozen["ref"] = _reference(run, setup)
    if critic is not None:
        of_policy = view
        trained = {"policy": trained, "critic": critic.init(jax.random.key(run.seed), setup.loaded.params, zero=True)}
        if of_policy is not None:
            view = lambda params, frozen: params | {"policy": of_policy(params["policy"], frozen)}  # noqa: E731
    updates = run.steps * method.epochs * method.minibatches
    optimizer = optimizer_of(run, updates)
    trainer = online(setup.lm, optimizer, critic=critic, microbatches=run.microbatches, view=view)

    def advance(state: Any, done: int) -> Any:
        return trainer.step(state, asked(done), earned, method=method, sampler=sampler, frozen=frozen)

    def final(params: Params) -> Params:
        params = params["policy"] if critic is not None else params
        return params if lora is None else lora.merge(frozen["base"], params)

    sample = _sampled(setup, asked(0), sampler)
    state = loop.run(
        initial_state(trained, optimizer, jax.random.key(run.seed)),
        advance,
        steps=run.steps,
        folder=run.out,
        evaluate=lambda params: {"sample": sample(final(params))},
        config=_identity(run) | {"method": str(method), "sampler": str(sampler)},
        watch=("reward", "kl", "entropy", "clip_fraction"),
        describe=asked.describe,
        **_pace(run),
    )
    _save(run, setup, final(state.params), lora, state.params["policy"] if critic is not None else state.params)
    return run.out


# The parts ------------------------------------------------------------------------------------------------------------


def prepare(run: Run, say: Callable[[str], None] = print) -> Setup:
    """Load the model, and refuse an output folder that holds another run.

    Raises:
        ValueError, FileNotFoundError: as `models.load`; for a model without tokenizer; or for a folder that holds a run
            that is not to be resumed.
    """
    if Checkpoints(run.out / "checkpoints").latest_step() is not None and not run.resume:
        raise ValueError(f"{run.out} holds a run already: resume it, or choose another folder.")
    loaded = models.load(run.model)
    if loaded.tokenizer is None:
        raise ValueError(f"{run.model} has no tokenizer, which text needs.")
    lm = loaded.model
    if run.checkpoint_blocks:
        lm = dataclasses.replace(lm, checkpoint_blocks=True)
    most = min(run.max_length or lm.max_length, lm.max_length)
    return Setup(loaded, lm, Encoder(loaded.tokenizer, max_length=most, cut=run.cut), say)


def batches_of(run: Run, setup: Setup, path: Path, kind: str, *, room: int = 0) -> Batches:
    """The batches of a file, and a word on what was cut, skipped and padded."""
    records = JsonLines(path, PARSERS[kind], on_bad=run.on_bad)
    encoder = setup.encoder
    cut_before = encoder.cut_prompts, encoder.cut_answers
    batches = Batches(records, encoder_of(encoder, room=room), COLLATE[kind], batch_size=run.batch_size, seed=run.seed)
    cut = encoder.cut_prompts - cut_before[0], encoder.cut_answers - cut_before[1]
    setup.say(
        f"{path}: {len(records)} records, {len(records.bad_lines)} bad lines skipped, "
        f"{cut[0]} prompts and {cut[1]} answers cut, {batches.pad_waste:.0%} of places are padding."
    )
    for bad in records.bad_lines:
        setup.say(f"{path}, line {bad.number}: {bad.reason}")
    return batches


def optimizer_of(run: Run, updates: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients; a linear warm-up, then linearly to 0."""
    warmup = min(updates - 1, round(run.warmup * updates))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(run.learning_rate / max(1, warmup), run.learning_rate, max(1, warmup)),
            optax.linear_schedule(run.learning_rate, 0.0, max(1, updates - warmup)),
        ],
        [warmup],
    )
    adam = optax.adamw(schedule, weight_decay=run.weight_decay)
    return optax.chain(optax.clip_by_global_norm(run.clip_norm), adam)


def reward_function_at(place: str) -> Callable[..., Any]:
    """The function at "file.py:name" or "module:name".

    Raises:
        ValueError: if there is none.
    """
    where, _, name = place.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return getattr(module, name)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as error:
        raise ValueError(f'a reward function is given as "file.py:name" or "module:name"; {place}: {error}') from error


def _offline(
    run: Run, setup: Setup, kind: str, loss: LossFn, *, watch: tuple[str, ...], reference: bool = False
) -> Path:
    batches = batches_of(run, setup, run.data, kind)
    trained, frozen, view, lora = _trained(run, setup, setup.loaded.params)
    if reference:
        frozen["ref"] = _reference(run, setup)
    sample = _sampled(setup, _one_prompt(setup, batches), Sampler(48, eos_ids=_eos(setup)))
    merge = (lambda params: params) if lora is None else (lambda params: lora.merge(frozen["base"], params))
    params = _fit(
        run, setup, loss, trained, batches, frozen, view, watch, kind, sample=lambda each: sample(merge(each))
    )
    _save(run, setup, merge(params), lora, params)
    return run.out


def _fit(
    run: Run, setup: Setup, loss: LossFn, params: Params, batches: Batches, frozen: PyTree, view: View | None,
    watch: tuple[str, ...], kind: str, *, sample: Callable[[Params], str] | None,
) -> Params:  # fmt: skip
    if view is None and run.dtype == "bfloat16":
        view = compute_in(run.dtype)
    optimizer = optimizer_of(run, run.steps)
    step = make_step(loss, optimizer, microbatches=run.microbatches, view=view)
    held_out = None if run.eval_data is None else _held_out(run, setup, loss, kind, frozen, view)

    def evaluate(params: Params) -> dict[str, float | str]:
        measured = {} if held_out is None else {"held_out_loss": held_out(params)}
        return measured | ({} if sample is None else {"sample": sample(params)})

    state = loop.run(
        initial_state(params, optimizer, jax.random.key(run.seed), copy="ref" in frozen),
        lambda state, done: step(state, jax.tree.map(jnp.asarray, batches(done)), frozen),
        steps=run.steps,
        folder=run.out,
        tokens=batches.tokens,
        evaluate=evaluate,
        config=_identity(run),
        watch=watch,
        describe=batches.describe,
        **_pace(run),
    )
    return state.params


def _held_out(
    run: Run, setup: Setup, loss: LossFn, kind: str, frozen: PyTree, view: View | None
) -> Callable[[Params], float]:
    """The loss over the held-out file's first batches, each by its weight."""
    batches = batches_of(run, setup, run.eval_data, kind)
    parts = [jax.tree.map(jnp.asarray, batches(step)) for step in range(min(16, batches.order.steps_per_epoch))]

    @jax.jit
    def of_part(params: Params, part: PyTree) -> tuple[jax.Array, jax.Array]:
        found = loss(params if view is None else view(params, frozen), part, frozen, jax.random.key(0))
        return found.value, jnp.asarray(found.weight, jnp.float32)

    def mean(params: Params) -> float:
        found = np.asarray([[float(each) for each in of_part(params, part)] for part in parts])
        return float((found[:, 0] * found[:, 1]).sum() / found[:, 1].sum())

    return mean


def _trained(
    run: Run, setup: Setup, params: Params
) -> tuple[Params, dict[str, Any], View | None, adapters.Lora | None]:
    """What is trained, what is frozen beside it, how the two make the model, and the adapters' description."""
    narrow = compute_in(run.dtype) if run.dtype == "bfloat16" else None
    if not run.lora_rank:
        return params, {}, narrow, None
    lora = adapters.lora(setup.loaded.model, rank=run.lora_rank, alpha=run.lora_alpha)
    merged = lora.view()
    view = merged if narrow is None else lambda trained, frozen: narrow(merged(trained, frozen), frozen)
    return lora.init(jax.random.key(run.seed)), {"base": params}, view, lora


def _reference(run: Run, setup: Setup) -> Params:
    """The model as it came, in the type that the policy computes in: at the first step the two are one."""
    params = setup.loaded.params
    return params if run.dtype == "float32" else compute_in(run.dtype)(params, None)


def _reward(model: str | None, function: str | Callable[..., Any] | None, setup: Setup) -> rewards.RewardFn:
    if model is not None:
        loaded = load_reward_model(model)
        if loaded.head.lm.vocab_size != setup.lm.vocab_size:
            raise ValueError(
                f"the reward model reads {loaded.head.lm.vocab_size} tokens, the policy writes {setup.lm.vocab_size}."
            )
        return rewards.of_model(loaded.head, loaded.params)
    found = reward_function_at(function) if isinstance(function, str) else function
    return rewards.of_text(found, setup.loaded.tokenizer)


def _sampled(setup: Setup, asked: Prompts, sampler: Sampler) -> Callable[[Params], str]:
    """What the model answers to the first prompt, always with the same key."""
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), asked)

    def sample(params: Params) -> str:
        drawn = rollout(setup.lm, params, one, jax.random.key(0), sampler)
        return "".join(side[0] for side in rewards.texts(drawn.sequences, setup.loaded.tokenizer))

    return sample


def _one_prompt(setup: Setup, batches: Batches) -> Prompts:
    prompt = batches.rows(0).prompt[-max(1, setup.lm.max_length - 48) :]
    return Prompts(np.asarray([prompt], np.int32), np.ones((1, len(prompt)), bool))


def _eos(setup: Setup) -> tuple[int, ...]:
    return tuple(text.eos_ids(setup.loaded.tokenizer, setup.loaded.config))


def _identity(run: Run) -> dict[str, Any]:
    """What decides what a run does; how often it is looked at does not."""
    left_out = ("out", "resume", "log_every", "save_every", "keep", "tensorboard", "eval_data")
    return {name: str(value) for name, value in dataclasses.asdict(run).items() if name not in left_out}


def _pace(run: Run) -> dict[str, Any]:
    every = max(1, min(run.save_every, run.steps))
    log_every = min(run.log_every, every)
    while every % log_every:
        log_every -= 1
    return {"evaluate_every": every, "log_every": log_every, "keep": run.keep, "tensorboard": run.tensorboard}


def _save(run: Run, setup: Setup, params: Params, lora: adapters.Lora | None, trained: Params) -> None:
    models.save(run.out, setup.loaded.model, params, setup.loaded.tokenizer, config=setup.loaded.config)
    if lora is not None:
        adapters.save(run.out / "adapter", lora, trained, base=run.model)
    setup.say(f"The model is in {run.out}.")
