"""What the recipes are put together from: a run's model, its data, its optimiser, and what it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxrl_llm import models, text
from jaxrl_llm.data.encoding import Encoder
from jaxrl_llm.data.jsonl import JsonLines
from jaxrl_llm.data.records import PARSERS
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training import lora as adapters
from jaxrl_llm.training.batches import COLLATE, Batches, encoder_of
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.precision import compute_in
from jaxrl_llm.training.recipe_run import Run, keys_of
from jaxrl_llm.training.steps import View


class Setup(NamedTuple):
    """A run's model, made ready."""

    loaded: models.Loaded
    lm: LanguageModel
    encoder: Encoder
    say: Callable[[str], None]

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return tuple(text.eos_ids(self.loaded.tokenizer, self.loaded.config))


def prepare(run: Run, say: Callable[[str], None] = print) -> Setup:
    """Load the model, and refuse an output folder that holds another run.

    Raises:
        ValueError, FileNotFoundError: as `models.load`; for a model that is no decoder or has no tokenizer; for an
            output folder that is the model's, or holds a run that is not to be resumed; or for one of several
            processes: a recipe reads and writes its files as one.
    """
    if jax.process_count() > 1:
        raise ValueError("a recipe runs in one process: with several, put the steps together as docs/training.md says.")
    if run.out.resolve() == Path(run.model).resolve():
        raise ValueError(f"{run.out} holds the model to start from, which the new one would overwrite.")
    folder = run.out / "checkpoints"
    begun = folder.is_dir() and Checkpoints(folder).latest_step() is not None
    if begun and not run.resume:
        raise ValueError(f"{run.out} holds a run already: resume it, or choose another folder.")
    loaded = models.load(run.model)
    if isinstance(loaded.model, models.T5):
        raise ValueError(f"{run.model} is a T5, which writes from a source: training.seq2seq trains it.")
    if loaded.tokenizer is None:
        raise ValueError(f"{run.model} has no tokenizer, which text needs.")
    if run.resume and not begun:
        say(f"{run.out} holds no checkpoint to resume from: the run begins anew.")
    lm = loaded.model
    if run.checkpoint_blocks:
        lm = dataclasses.replace(lm, checkpoint_blocks=True)
    most = min(run.max_length or lm.max_length, lm.max_length)
    return Setup(loaded, lm, Encoder(loaded.tokenizer, max_length=most, cut=run.cut), say)


def batches_of(run: Run, setup: Setup, path: Path, kind: str, *, batch_size: int, room: int = 0) -> Batches:
    """The batches of a file, and a word on what was cut, skipped, padded and left over.

    Raises:
        ValueError: naming the file, as `JsonLines` and `Batches` do.
    """
    records = JsonLines(path, PARSERS[kind], on_bad=run.on_bad)
    encoder = setup.encoder
    cut_before = encoder.cut_prompts, encoder.cut_answers
    try:
        encode = encoder_of(encoder, room=room)
        batches = Batches(
            records, encode, COLLATE[kind], batch_size=batch_size, seed=run.seed, vocab_size=setup.lm.vocab_size
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    cut = encoder.cut_prompts - cut_before[0], encoder.cut_answers - cut_before[1]
    left = batches.order.left_over
    setup.say(
        f"{path}: {len(records)} records, {len(records.bad_lines)} bad lines skipped, "
        f"{cut[0]} prompts and {cut[1]} answers cut"
        + (f", {batches.pad_waste:.0%} of places are padding" if batch_size > 1 else "")
        + (f", {left} records, which chance chooses, are left out of each epoch" if left else "")
        + "."
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


class Trained(NamedTuple):
    """What a run trains, what is frozen beside it, and how the two make the model."""

    params: Params
    frozen: dict[str, Any]
    view: View | None
    lora: adapters.Lora | None
    critic: ScalarHead | None = None

    def policy(self, params: Params) -> Params:
        """Of what is trained, all but the critic."""
        return params if self.critic is None else params["policy"]

    def model(self, params: Params) -> Params:
        """The model's parameters, the adapters merged."""
        policy = self.policy(params)
        return policy if self.lora is None else self.lora.merge(self.frozen["base"], policy)


def trained_of(run: Run, setup: Setup, *, reference: bool = False, critic: ScalarHead | None = None) -> Trained:
    """All weights or adapters, and a critic's; frozen["ref"] is the model as it came.

    It is in the type that the policy computes in: at the first step the two are one.
    """
    params, frozen, lora = setup.loaded.params, {}, None
    narrow = compute_in(run.dtype) if run.dtype == "bfloat16" else None
    view, trained = narrow, params
    if run.lora_rank:
        lora = adapters.lora(setup.loaded.model, rank=run.lora_rank, alpha=run.lora_alpha)
        merged = lora.view()
        view = merged if narrow is None else lambda trained, frozen: narrow(merged(trained, frozen), frozen)
        trained, frozen = lora.init(keys_of(run).adapters), {"base": params}
    if reference:
        frozen["ref"] = params if narrow is None else narrow(params, None)
    if critic is not None:
        of_policy = view
        trained = {"policy": trained, "critic": critic.init(keys_of(run).head, params, zero=True)}
        if of_policy is not None:
            view = lambda params, frozen: params | {"policy": of_policy(params["policy"], frozen)}  # noqa: E731
    return Trained(trained, frozen, view, lora, critic)


def save(run: Run, setup: Setup, trained: Trained, params: Params) -> None:
    """Write the model, and the adapters beside it."""
    loaded = setup.loaded
    models.save(run.out, loaded.model, trained.model(params), loaded.tokenizer, config=loaded.config)
    if trained.lora is not None:
        adapters.save(run.out / "adapter", trained.lora, trained.policy(params), base=run.model)
    setup.say(f"The model is in {run.out}.")
