"""Whole runs put together: model, data, optimiser, held-out loss, samples and the saved model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree
from tqdm import tqdm

from jaxrl_llm import mesh as meshes
from jaxrl_llm import models, runtime, text
from jaxrl_llm.data import records
from jaxrl_llm.files import replacing
from jaxrl_llm.language_model import LanguageModel, Params, params_dtype
from jaxrl_llm.models import lora as adapters
from jaxrl_llm.models.decoder import with_attention
from jaxrl_llm.models.heads import LoadedReward, ScalarHead, is_reward, stored_head
from jaxrl_llm.numerics import on_device
from jaxrl_llm.options import nearest
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training import loop, reward_fns
from jaxrl_llm.training.batches import KINDS, Batches, Columns, Encoder, TooFew, show_mask
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.config import FREE, Config, Data, DistillConfig, OfflineConfig, direction
from jaxrl_llm.training.packing import PackedBatches
from jaxrl_llm.training.preference import OF_REFERENCE, with_reference
from jaxrl_llm.training.rollout import Prompts, Sampler, rollout
from jaxrl_llm.training.steps import (
    Frozen,
    LossFn,
    Metrics,
    TrainState,
    View,
    compute_in,
    initial_state,
    make_step,
    optimizer_of,
    schedule_of,
)

ALPHA = 16.0  # of adapters, if none is given
LARGEST = 700.0  # nats: exp of more is out of range
SHOWN = 48  # tokens of a sample
NAMED = 5  # files that an error names
PRINTED = 20  # skipped lines or rows that are printed; all are written to the run's folder
SKIPPED = "skipped.jsonl"
KNOWN = (
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "messages",
    "text",
    "answers",
    "ranks",
    "margin",
    "scores",
    "label",
    "system",
    "tools",
)
OF_A_RUN = (
    "checkpoints",
    "run.json",
    "log.jsonl",
    "tensorboard",
    "wandb",
    "wandb_id",
)  # before its first checkpoint, in this order
AHEAD = {"data": "reference.npz", "eval_data": "reference_eval_data.npz"}  # the reference's sums, written before those


class Keys(NamedTuple):
    """The keys of a run, one for each use."""

    state: Key[Array, ""]  # every step folds its number into it
    adapters: Key[Array, ""]
    head: Key[Array, ""]  # of a reward model or a critic


@dataclasses.dataclass(frozen=True)
class Run:
    """A run made ready: its configuration, its model, and the folder that it writes to, if any."""

    config: Config
    loaded: models.Loaded
    name: str  # of the model, in `run.json`
    path: str  # the name or path that the model can be loaded from, or ""
    owned: bool  # nothing else reads the parameters: the first step may donate them
    out: Path | None
    verbose: bool
    sha256: str = ""  # of the model's weights, if there is an output folder
    head: Array | None = None  # [width], if the model is a reward model
    mesh: Mesh | None = None  # on which the parameters lie

    @property
    def lm(self) -> LanguageModel:
        """The model as it is trained."""
        lm = with_attention(self.loaded.model, self.config.attention)
        return dataclasses.replace(lm, checkpoint_blocks=True) if self.config.checkpoint_blocks else lm

    @property
    def keys(self) -> Keys:
        """All keys, from the seed."""
        return Keys(*jax.random.split(jax.random.key(self.config.seed), len(Keys._fields)))

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        config = self.loaded.config | {"vocab_size": self.lm.vocab_size}
        return tuple(text.eos_ids(self.loaded.tokenizer, config))

    @property
    def reports(self) -> bool:
        """True if it prints or writes a log."""
        return self.verbose or self.out is not None

    @property
    def shows(self) -> bool:
        """True if this process prints: the first of several, if verbose."""
        return self.verbose and jax.process_index() == 0

    def say(self, line: str) -> None:
        """Print a line, if verbose."""
        if self.shows:
            print(line)

    @contextlib.contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Return the context in which all of the run's computations are done."""
        on_mesh = contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        with meshes.one_run(resume=self.out is not None), on_mesh:
            yield

    def placed(self, params: Params) -> Params:
        """Return parameters on the mesh, if there is one."""
        return params if self.mesh is None else meshes.shard_state(params, self.mesh)

    def rows(self, collate: Callable[..., PyTree], count: int) -> PyTree:
        """Return a batch on the devices, its rows split over those of the mesh; only this process's own are collated.

        Args:
            collate: returns the rows of these numbers, of `count`.
        """
        if self.mesh is None:
            return on_device(collate())
        return meshes.place_rows(collate(own=meshes.own_rows(count, self.mesh)), count, self.mesh)

    def batch(self, batches: Batches | PackedBatches, step: int) -> PyTree:
        """Return the batch of a step on the devices."""
        return self.rows(functools.partial(batches, step), batches.batch_size)

    def encoder(self) -> Encoder:
        """Return an encoder for rows that fit the model."""
        most = min(self.config.max_length or self.lm.max_length, self.lm.max_length)
        return Encoder(
            self.loaded.tokenizer,
            max_length=most,
            cut=self.config.cut,
            train_on=self.config.train_on,
            chunk=getattr(self.config, "chunk", False),
            ends=self.eos,
        )

    def loop(
        self, state: TrainState, advance: Callable[[TrainState, int], tuple[TrainState, Metrics]], **further: Any
    ) -> TrainState:
        """Call `loop.run` with the options of the configuration."""
        config = self.config
        return loop.run(
            state,
            advance,
            steps=config.steps,
            folder=self.out,
            evaluate_every=config.save_every,
            log_every=config.log_every,
            keep=config.keep,
            keep_best=config.keep_best,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            free=self.free,
            verbose=self.shows,
            **further,
        )

    def identity(self, kind: str, **further: Any) -> dict[str, Any]:
        """Return the fields of `run.json`, as JSON.

        All but those of `free` identify the run for resuming: models and data by their contents, not their paths.
        """
        fields = {each.name: getattr(self.config, each.name) for each in dataclasses.fields(self.config)}
        in_memory = [each.name for each in dataclasses.fields(self.config) if "Data" in str(each.type)]
        in_memory = [name for name in in_memory if not isinstance(fields[name], str | Path | None)]
        fields |= {name: f"in memory, a {type(fields[name]).__name__}" for name in in_memory}
        found = {"kind": kind, "model": self.name, "model_sha256": self.sha256, **fields, **further}
        if self.config.lora_from is not None:
            tensors = (Path(self.config.lora_from) / adapters.TENSORS).read_bytes()
            found["lora_sha256"] = hashlib.sha256(tensors).hexdigest()
        return {name: _as_json(value) for name, value in found.items()}

    @property
    def free(self) -> tuple[str, ...]:
        """The fields of `run.json` with which a run can go on when they change."""
        config = self.config
        endless = config.schedule in ("constant", "inverse_sqrt") and (config.warmup >= 1 or not config.warmup)
        return (*FREE, "steps") if endless else FREE


def begin(lm: Any, config: Config, out: str | os.PathLike[str] | None = None, *, verbose: bool = True) -> Run:
    """Load the model if it is a name or a path, and check that the output folder is free or to be resumed.

    Raises:
        TypeError: if `lm` is not a model, its name or its path.
        ValueError, FileNotFoundError: as `models.load`; for an encoder-decoder model or one without a tokenizer; for an
            output folder that is the model's, has a run that is not to be resumed, or files that are not of a run; for
            a mesh that does not fit the devices or the batch, or none in several processes; for a form of attention
            that the model or the device cannot have.
    """
    mesh = _mesh_of(config, lm)
    out = None if out is None else Path(out)
    owned = isinstance(lm, str | os.PathLike)
    name = os.fspath(lm) if owned else getattr(lm, "name", "a model in memory")
    path = name if owned else getattr(lm, "path", "")
    head = None
    if isinstance(lm, LoadedReward):
        head, lm = lm.params["head"], models.Loaded(lm.head.lm, lm.params["model"], lm.tokenizer, lm.config)
    begun = _check_folder([name, *_folders_of(config)], config, out)
    meshes.wait(f"begin {out}")  # before one of several processes writes there
    loaded = _loaded(lm, mesh, dtype=config.param_dtype)
    head = stored_head(loaded, lm) if owned else head
    head = head if head is None or mesh is None else meshes.shard_state(head, mesh)
    if isinstance(loaded.model, models.T5):
        raise ValueError(f"the model must be decoder-only, but {name} is a T5: training.supervised trains it.")
    if loaded.tokenizer is None:
        raise ValueError(f"the model must have a tokenizer, but {name} has none.")
    form = getattr(loaded.model, "attention_form", "exact")
    with_attention(loaded.model, config.attention)  # refused here, not after the data are read
    sha256 = "" if out is None else digest(loaded.params if head is None else (loaded.params, head))
    given, wanted = params_dtype(loaded.params), jnp.dtype(config.param_dtype)
    if jnp.finfo(given).bits < 32 or jnp.finfo(wanted).bits < 32:  # float64 stays
        model = loaded.model if jnp.finfo(wanted).bits < 32 else with_attention(loaded.model, "exact")
        loaded = dataclasses.replace(loaded, model=model, params=_in(wanted, loaded.params))
        owned = owned or given != wanted
    run = Run(config, loaded, name, path, owned, out, verbose, sha256, head, mesh)
    if mesh is None and (sentence := meshes.idle()):
        run.say(sentence)
    if jax.process_count() > 1 and out is not None:
        run.say(f"{jax.process_count()} processes share the run: if one ends, all end, and the run can be resumed.")
    if jnp.finfo(given).bits < jnp.finfo(wanted).bits:
        run.say(f"the weights are widened from {given} to {wanted} for training.")
    if config.attention == "exact" != form:
        run.say(f"attention in training is exact, as its option says; the model's own is {form}.")
    if config.resume and not begun:
        run.say(f"{out} has no checkpoint to resume from: the run starts from the beginning.")
    return run


def _mesh_of(config: Config, lm: Any) -> Mesh | None:
    """Return the mesh of a configuration, or that on which a model in memory lies.

    Raises:
        ValueError: unless it fits the devices, and they divide the rows of which a gradient is taken.
    """
    if config.mesh is None:
        mesh = meshes.lies_on(getattr(lm, "params", None))
        if mesh is None and jax.process_count() > 1:
            raise ValueError(f"mesh must be given to {jax.process_count()} processes, such as data=-1, but is None.")
        return mesh
    mesh = meshes.mesh_of(config.mesh)
    shards = meshes.row_shards(mesh)
    parts = {name: getattr(config, name, 1) for name in ("microbatches", "minibatches")}
    several = "".join(f" × {name}, {count}" for name, count in parts.items() if count > 1)
    if config.batch_size % (shards * math.prod(parts.values())):
        raise ValueError(
            f"batch_size must be a multiple of the {shards} devices of data × fsdp{several}, "
            f"but is {config.batch_size}."
        )
    return mesh


def _loaded(lm: Any, mesh: Mesh | None, *, dtype: Any = None) -> models.Loaded:
    """Return a model, loaded if it is a name or a path, with its parameters on the mesh."""
    if isinstance(lm, str | os.PathLike):
        return models.load(lm, dtype=dtype, sharding=None if mesh is None else meshes.sharding_on(mesh))
    loaded = _as_loaded(lm)
    return loaded if mesh is None else dataclasses.replace(loaded, params=meshes.shard_state(loaded.params, mesh))


def _folders_of(config: Config) -> list[Any]:
    """Return what a configuration reads from: the options that are paths, and rewards, which can be folders."""
    named = [each.name for each in dataclasses.fields(config) if "Path" in str(each.type)]
    values = [getattr(config, name) for name in named] + list(getattr(config, "rewards", ()))
    return [value for value in values if isinstance(value, str | Path)]


def _in(dtype: Any, params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _check_folder(read: list[str | Path], config: Config, out: Path | None) -> bool:
    """Return True if the folder has a run to be resumed; refuse one that a model is read from, or of other files."""
    if out is None:
        wanted = [name for name in ("resume", "tensorboard", "wandb") if getattr(config, name)]
        if wanted:
            raise ValueError(f"{wanted[0]} needs an output folder: out must be a path, but is None.")
        return False
    if out.resolve() in [Path(each).expanduser().resolve() for each in read]:
        raise ValueError(f"out must be another folder than that of the model, {out}, which it would overwrite.")
    folder = out / "checkpoints"
    begun = folder.is_dir() and Checkpoints(folder).latest_step() is not None
    if begun and not config.resume:
        raise ValueError(f"{out} already has a run: resume it, or choose another folder.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, but {out} is a file.")
    if out.is_dir() and not begun:  # a run that ended before its first checkpoint begins anew
        names = sorted(each.name for each in out.iterdir() if not each.name.startswith("."))
        own = (*AHEAD.values(), *(OF_A_RUN if "run.json" in names else OF_A_RUN[:1]), SKIPPED)
        others = [name for name in names if name not in own]
        if others:
            shown = ", ".join(others[:NAMED]) + (", ..." if len(others) > NAMED else "")
            raise ValueError(f"out must be a new or empty folder, but {out} has {shown}: choose another one.")
    return begun


def _as_loaded(lm: Any) -> models.Loaded:
    parts = [field.name for field in dataclasses.fields(models.Loaded)]
    if not all(hasattr(lm, part) for part in parts):
        raise TypeError(f"lm must be a model, its name or its path, but is a {type(lm).__name__}.")
    return models.Loaded(*(getattr(lm, part) for part in parts))


def digest(params: Params) -> str:
    """Return the SHA-256 of weights, with their names and types."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".encode())
        found.update(np.ascontiguousarray(meshes.on_host(leaf)).view(np.uint8).data)
    return found.hexdigest()


def _as_json(value: Any) -> Any:
    """Return a value of a configuration as JSON can hold it: functions by their places, objects by their fields."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _as_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | LoadedReward):
        return {each.name: _as_json(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    return place_of(value) if callable(value) else type(value).__name__


# Data -----------------------------------------------------------------------------------------------------------------


def batches_of(
    run: Run,
    data: Data,
    kind: str,
    *,
    batch_size: int,
    room: int = 0,
    name: str = "data",
    fields: Columns = False,
    packing: bool = False,
) -> tuple[Batches | PackedBatches, records.Records]:
    """Return a data loader with its records, and print what was skipped, truncated, padded and left out.

    Raises:
        TypeError, ValueError: naming the data, as `records.read` and `Batches`.
    """
    encoder, config = run.encoder(), run.config
    found = records.read(data, encoder.checked(KINDS[kind].parse), on_bad=config.on_bad, name=name, check=False)
    try:
        batches = Batches(
            found,
            KINDS[kind],
            encoder,
            batch_size=1 if packing else batch_size,
            seed=config.seed,
            room=room,
            vocab_size=run.lm.vocab_size,
            fields=fields,
            cache=config.cache,
            say=run.say,
        )
    except TooFew as error:
        each = config.batch_size // batch_size  # completions of a prompt
        have = f"{error.count} record{'s' * (error.count > 1)}{f' of {each} completions' if each > 1 else ''}"
        raise ValueError(
            f"{found.source} has {have}: batch_size must be at most {error.count * each}, but is {config.batch_size}."
        ) from error
    loader, packed = batches, ""
    if packing:
        size = {"length": config.max_length, "batch_size": batch_size, "seed": config.seed}
        try:
            loader = PackedBatches(batches, **size)
        except ValueError as error:
            raise ValueError(f"{found.source}: {error}") from error
        packed = f", packed into {len(loader.order.all) * loader.order.rows} rows of {loader.length} tokens"
    left, made = loader.order.left_over, batches.data
    run.say(
        f"{found.source}: {len(batches)} records, {len(found.bad_lines)} bad {found.unit}s skipped, "
        + (f"{len(made.too_long)} too long {found.unit}s skipped, " if config.cut == "skip" else "")
        + f"{made.cut_prompts} prompts and {made.cut_completions} completions truncated"
        + packed
        + (f", {loader.pad_waste:.0%} padding" if batch_size > 1 or packing else "")
        + (f", {left} record{'s' * (left > 1)}, chosen at random, left out of each epoch" if left else "")
        + "."
    )
    for column in sorted(fields) if isinstance(fields, frozenset) else ():
        there, wrong = made.others.get(column, 0), batches.without_number(column)
        if 0 < there < len(batches):
            raise ValueError(f"{found.source}: {column} must be in every {found.unit} or in none, but is in {there}.")
        if there and wrong:
            raise ValueError(
                f"{found.source}: {column} must be a finite number, but is not in {batches.named(wrong[:NAMED])}"
                f"{', ...' if len(wrong) > NAMED else ''}."
            )
    for column in sorted(batches.left_out):
        run.say(f"{found.source}: {column} is not a number in every {found.unit}, so the loss does not receive it.")
    for entry, count in batches.unread.items():
        near = None if entry in KNOWN else nearest(entry, KNOWN)
        hint = f" Did you mean {near}?" if near else ""
        run.say(f"{found.source}: {entry} is in {count} {found.unit}{'s' * (count > 1)}, but nothing reads it.{hint}")
    _report_skipped(run, found, [*found.bad_lines, *made.too_long])
    if config.show_mask and name in ("data", "prompts"):
        run.say(show_mask(run.loaded.tokenizer, batches.rows(0)))
    return loader, found


def _report_skipped(run: Run, found: records.Records, skipped: list[records.BadLine]) -> None:
    """Print the lines or rows that were skipped, and write all of them to the run's folder."""
    for bad in skipped[:PRINTED]:
        run.say(f"{found.source}, {found.unit} {bad.number}: {bad.reason}")
    if run.out is None or not skipped or jax.process_index() > 0:
        if len(skipped) > PRINTED:
            run.say(f"{found.source}: and {len(skipped) - PRINTED} more.")
        return
    run.out.mkdir(parents=True, exist_ok=True)
    path = run.out / SKIPPED
    lines = [{"data": found.source, found.unit: bad.number, "reason": bad.reason} for bad in skipped]
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    others = [line for line in before if json.loads(line).get("data") != found.source]
    path.write_text("".join(f"{line}\n" for line in [*others, *map(json.dumps, lines)]), encoding="utf-8")
    run.say(f"{found.source}: all {len(skipped)} that were skipped are in {path}.")


# Parameters -----------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """Trained parameters, frozen parameters, and the view that combines them for the loss."""

    params: Params
    frozen: Frozen
    view: View | None = None
    lora: adapters.Lora | None = None
    critic: ScalarHead | None = None

    def policy(self, params: Params) -> Params:
        """Return the trained parameters without the critic's."""
        return params if self.critic is None else params["policy"]

    def model(self, params: Params) -> Params:
        """Return the model's parameters, with the adapters merged."""
        return self.merged(self.policy(params))

    def merged(self, trained: Params) -> Params:
        """Return the parameters of a model of which these are trained: all, or adapters."""
        return trained if self.lora is None else self.lora.merge(self.frozen.base, trained)


def trained_of(
    run: Run,
    *,
    reference: bool | Params = False,
    critic: ScalarHead | None = None,
    head: ScalarHead | None = None,
) -> Trained:
    """Return all weights or adapters to be trained, and a critic's, or with `head` those of a reward model.

    A critic computes in float32. A reward model starts from its head, if the model or the adapter that training goes on
    from has one, else from a random one.

    Args:
        reference: the parameters of the reference; True is the model that training starts from, in the type that the
            policy computes in, so that at first they are equal.

    Raises:
        ValueError: if a reward model is to be trained as a language model.
    """
    config, params = run.config, run.loaded.params
    if head is None and run.head is not None:
        raise ValueError(f"the model must be a language model, but {run.name} is a reward model.")
    narrow = compute_in(config.dtype) if config.dtype == "bfloat16" else None
    trained, base, view = params, None, None
    lora, adapter = _adapters(run)
    if lora is not None:
        trained, base, view = adapter, params, lora.view()
    whole = view
    if head is not None:
        stored = None if config.lora_from is None else adapters.head_of(Path(config.lora_from))
        start = run.head if stored is None else jnp.asarray(stored[0])
        own = {"model": trained} | ({} if start is None else {"head": start})
        trained, view = head.init(run.keys.head, params) | own, _within("model", view)
    view = _then(view, narrow)
    ref = None if isinstance(reference, bool) else reference
    if reference is True:
        ref = params if config.lora_from is None else lora.merge(params, adapter)
        ref = ref if narrow is None else narrow(ref, None)
    if critic is not None:
        values = critic.init(run.keys.head, params, zero=True)
        if lora is not None:
            values["model"] = lora.init(jax.random.fold_in(run.keys.adapters, 1))
        trained = {"policy": trained, "critic": values}
        view = _then(_within("policy", view), _within("critic", _within("model", whole)))
    return Trained(run.placed(trained), run.placed(Frozen(ref, base)), view, lora, critic)


def _adapters(run: Run) -> tuple[adapters.Lora | None, adapters.Adapter | None]:
    """Return the layers that have adapters, with adapters to start from; None if all weights are trained.

    Raises:
        ValueError, FileNotFoundError: as `lora.lora` and `lora.load`, or if the adapter to start from is merged
            already.
    """
    config, model = run.config, run.loaded.model
    dropout = getattr(config, "lora_dropout", 0.0)
    if config.lora_from is not None:
        folder = Path(config.lora_from).expanduser().resolve()  # a run's folder holds the merged model and adapter/
        if run.path and Path(run.path).expanduser().resolve() in (folder, folder.parent):
            raise ValueError(
                f"lora_from must be an adapter of the model, but {run.path} is the model, with the adapter merged: "
                f"give its base model, {adapters.base_of(Path(config.lora_from))}."
            )
        lora, adapter = adapters.load(config.lora_from, model)
        return dataclasses.replace(lora, dropout=dropout), adapter
    if not config.lora_rank:
        return None, None
    lora = adapters.lora(
        model,
        rank=config.lora_rank,
        alpha=ALPHA if config.lora_alpha is None else config.lora_alpha,
        targets=config.lora_targets,
        rslora=config.lora_rslora,
        dropout=dropout,
    )
    return lora, lora.init(run.keys.adapters)


def _within(name: str, view: View | None) -> View | None:
    """Return the view that applies another one to one entry of the parameters."""
    if view is None:
        return None
    return lambda params, frozen, key=None: params | {name: view(params[name], frozen, key)}


def _then(first: View | None, second: View | None) -> View | None:
    """Return the view that applies two, one after the other."""
    if first is None or second is None:
        return second if first is None else first
    return lambda params, frozen, key=None: second(first(params, frozen, key), frozen, key)


def finish(run: Run, trained: Trained, params: Params) -> models.Loaded:
    """Return the trained model; with an output folder, save it and the adapters."""
    loaded = dataclasses.replace(run.loaded, params=trained.model(params))
    if run.out is not None:
        models.save(run.out, loaded.model, loaded.params, loaded.tokenizer, config=loaded.config)
        save_adapters(run, trained, trained.policy(params))
        run.say(f"The model is in {run.out}.")
    return loaded


def save_adapters(run: Run, trained: Trained, adapter: adapters.Adapter, *, head: Array | None = None) -> None:
    """Save trained adapters, if there are any, in the run's folder `adapter`; with the head of a reward model."""
    if trained.lora is not None and jax.process_index() == 0:
        base = os.path.abspath(run.path) if run.path and Path(run.path).expanduser().exists() else run.path
        adapters.save(run.out / "adapter", trained.lora, adapter, base=base, head=head)


# Offline runs ---------------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """An offline objective: its loss, its data format, its metrics, and further fields that identify the run."""

    name: str
    loss: LossFn
    kind: str
    watch: tuple[str, ...]
    identity: Mapping[str, Any] = {}
    fields: Columns = False  # the loss takes numbers beside the text of each row: all, or those of some names
    ahead: Reference | None = None  # its log-probabilities are computed before the first step


@dataclasses.dataclass
class Reference:
    """A model that stays as it is, beside the trained one: a reference or a teacher."""

    lm: LanguageModel
    params: Params | None  # None once they are not needed any more
    sha256: str


def reference_of(run: Run, given: Any, *, name: str = "reference") -> Reference:
    """Return another model, which must read the same tokens as the trained one; None is the trained model as it began.

    Raises:
        TypeError, ValueError: if it is not a language model, or has another vocabulary, tokenizer, or too short a
            context.
    """
    narrow = compute_in(run.config.dtype) if run.config.dtype == "bfloat16" else lambda params, frozen: params
    if given is None:
        lora, adapter = (None, None) if run.config.lora_from is None else _adapters(run)
        params = run.loaded.params if lora is None else lora.merge(run.loaded.params, adapter)
        return Reference(run.lm, narrow(params, None), run.sha256)
    if isinstance(given, str | os.PathLike) or hasattr(given, "params"):
        found = _loaded(given, run.mesh)
    else:
        raise TypeError(f"{name} must be a model, its name or its path, but is a {type(given).__name__}.")
    if is_reward(found.config):
        raise ValueError(f"the {name} must be a language model, but {given} is a reward model.")
    if found.model.vocab_size != run.lm.vocab_size:
        raise ValueError(
            f"the {name} must have the model's vocabulary of {run.lm.vocab_size} tokens, but has "
            f"{found.model.vocab_size}."
        )
    if found.tokenizer is None or found.tokenizer.get_vocab() != run.loaded.tokenizer.get_vocab():
        raise ValueError(f"the {name} must have the tokenizer of the model, but has {_other(found.tokenizer)}.")
    most = min(run.config.max_length or run.lm.max_length, run.lm.max_length)
    if found.model.max_length < most:
        raise ValueError(
            f"the {name} must have a context of at least max_length, {most} tokens, but has {found.model.max_length}."
        )
    sha256 = "" if run.out is None else digest(found.params)
    model = with_attention(found.model, run.config.attention)
    return Reference(model, narrow(_in(jnp.float32, found.params), None), sha256)


def _other(tokenizer: Any) -> str:
    return "none" if tokenizer is None else f"another one, of {len(tokenizer.get_vocab())} tokens"


def add_reference(run: Run, batches: Batches, digest: str, reference: Reference, *, name: str = "data") -> None:
    """Let batches of pairs have the reference's log-probabilities: those in the run's folder, else computed now."""
    path = None if run.out is None else run.out / AHEAD[name]
    encoded = {each: getattr(run.config, each) for each in ("max_length", "cut", "train_on", "dtype", "on_bad")}
    identity = json.dumps({"data": digest, "reference": reference.sha256, **encoded})
    if path is not None and path.is_file():
        with np.load(path) as kept:
            if str(kept["identity"]) == identity:
                batches.added = {each: kept[each] for each in kept.files if each != "identity"}
                return
    order = sorted(range(len(batches)), key=lambda place: batches.rows(place).length)
    size = max(1, run.config.batch_size // run.config.microbatches)
    found: dict[str, np.ndarray] = {}
    hidden = not run.shows or runtime.is_file()
    for start in tqdm(range(0, len(order), size), desc="reference", unit="batch", disable=hidden):
        places = order[start : start + size]
        filled = places + places[-1:] * (size - len(places))  # batches of one size
        batch = run.rows(functools.partial(batches.collate, filled), size)
        batch = with_reference(reference.lm, reference.params, batch)
        for column in OF_REFERENCE:
            values = meshes.on_host(getattr(batch, column))
            found.setdefault(column, np.zeros(len(order), values.dtype))[places] = values[: len(places)]
    if path is not None and jax.process_index() == 0:
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, identity=identity, **found)
    batches.added = found


def fit(run: Run, data: Data, objective: Objective, trained: Trained, *, samples: bool = True) -> Params:
    """Minimise an objective over data; returns the trained parameters.

    Args:
        samples: report a sample of the model's text with each checkpoint.
    """
    options = {"fields": objective.fields, "packing": run.config.packing}
    batches, found = batches_of(run, data, objective.kind, batch_size=run.config.batch_size, **options)
    if objective.ahead is not None:
        add_reference(run, batches, found.digest(), objective.ahead)
    run = with_steps(run, batches)
    config: OfflineConfig = run.config
    rate, optimizer = optimizer_for(config)
    step = make_step(objective.loss, optimizer, microbatches=config.microbatches, view=trained.view)
    measured = _evaluation(run, objective, trained, batches if samples else None, batches.taken)
    if objective.ahead is not None:
        objective.ahead.params = None
    copy = trained.frozen.ref is not None or not run.owned
    absent = getattr(objective.loss, "absent", lambda batch: ())  # metrics that are means over nothing

    def advance(state: TrainState, done: int) -> tuple[TrainState, Metrics]:
        batch = run.batch(batches, done)
        state, metrics = step(state, batch, trained.frozen)
        missing = absent(batch)
        return state, {name: value for name, value in metrics.items() if name not in missing}

    state = run.loop(
        initial_state(trained.params, optimizer, run.keys.state, copy=copy, loss=objective.loss),
        advance,
        tokens=batches.tokens,
        numbers=progress(rate, batches),
        evaluate=measured,
        config=run.identity(objective.name, data_sha256=found.digest(), **objective.identity),
        watch=objective.watch,
        describe=batches.describe,
    )
    return state.params


def _evaluation(
    run: Run, objective: Objective, trained: Trained, batches: Batches | None, taken: Collection[str]
) -> Callable[[Params], dict[str, float | str]]:
    """Return the held-out numbers, and a sample from the batches' first prompt, as a function of the parameters."""
    measures: list[Callable[[Params], Mapping[str, float | str]]] = []
    if run.config.eval_data is not None:
        measures.append(held_out(run, objective, trained, taken=taken))
    if batches is not None and run.reports:
        sample = sampler_of(run, *_start_of(run, batches))
        measures.append(lambda params: {"sample": sample(trained.model(params))})
    return lambda params: dict(item for measure in measures for item in measure(params).items())


def fit_on_policy(run: Run, data: Data, objective: Objective, trained: Trained) -> Params:
    """Minimise an objective over completions that the model samples itself in a share of the steps; see `fit`.

    The steps of that share are drawn from the seed. With `on_policy` 1, `data` need no completions. No gradient flows
    through the sampling.
    """
    config: DistillConfig = run.config
    data = data if isinstance(data, str | os.PathLike) else list(data)
    sampler = Sampler(config.max_new_tokens, config.temperature, eos_ids=run.eos)
    given = asked = None
    if config.on_policy < 1:
        given, found = batches_of(run, data, objective.kind, batch_size=config.batch_size)
    if config.on_policy > 0:
        kind = "prompt-only" if given is None else "prompt-of-completion"
        asked, found = batches_of(run, data, kind, batch_size=config.batch_size, room=config.max_new_tokens)
    first = asked if given is None else given
    run = with_steps(run, first)
    rate, optimizer = optimizer_for(run.config)
    step = make_step(objective.loss, optimizer, microbatches=config.microbatches, view=trained.view)

    @jax.jit
    def drawn(state: TrainState, prompts: Prompts, frozen: Frozen) -> Sequences:
        policy = state.params if trained.view is None else trained.view(state.params, frozen)
        return rollout(run.lm, policy, prompts, jax.random.fold_in(state.step_key, 0), sampler).sequences

    def is_own(done: int) -> bool:
        return np.random.default_rng([config.seed, done, 1]).random() < config.on_policy

    def advance(state: TrainState, done: int) -> tuple[TrainState, Metrics]:
        own = is_own(done)
        batch = drawn(state, run.batch(asked, done), trained.frozen) if own else run.batch(given, done)
        state, metrics = step(state, batch, trained.frozen)
        return state, metrics | {"on_policy": own, "completion_tokens": metrics["length"] * config.batch_size}

    state = run.loop(
        initial_state(trained.params, optimizer, run.keys.state, copy=not run.owned, loss=objective.loss),
        advance,
        tokens="completion_tokens",
        numbers=progress(rate, first),
        evaluate=_evaluation(run, objective, trained, first, first.taken),
        config=run.identity(objective.name, data_sha256=found.digest(), **objective.identity),
        watch=objective.watch,
        describe=lambda done: (asked if is_own(done) else given).describe(done),
    )
    return state.params


def with_steps(run: Run, batches: Batches) -> Run:
    """Return the run with the steps of its epochs, if epochs are asked for."""
    epochs, size = run.config.num_epochs, batches.order.steps_per_epoch
    if epochs is None:
        return run
    steps = math.ceil(epochs * size - 1e-6)
    run.say(f"{epochs:g} epoch{'s' * (epochs != 1)} of {size} batches: {steps} steps.")
    return dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps, num_epochs=None))


def progress(rate: Callable[[int], Any], batches: Batches, *, updates: int = 1) -> Callable[[int], dict[str, float]]:
    """Return the epochs after n steps and the learning rate of the last of their updates, as a function of n."""
    size = batches.order.steps_per_epoch
    return lambda step: {"epoch": round(step / size, 4), "learning_rate": float(rate(step * updates - 1))}


def held_out(
    run: Run, objective: Objective, trained: Trained, *, taken: Collection[str] | None = None, name: str = "eval_data"
) -> Callable[[Params], dict[str, float]]:
    """Return the loss and its metrics over all held-out data as a function of the parameters, `held_out_` before names.

    It is computed in parts of a microbatch's rows; each number is the mean over all rows, tokens or pairs, whatever
    the parts (of a loss that compares the rows of a batch, the mean over parts). "sft" also has `held_out_perplexity`,
    exp(loss), unless that is out of range.

    Args:
        taken: the columns that the training loss receives, which held-out data must have too, and no others.
        name: of the data, in what is printed.

    The function's attribute `rows` is the number of rows.

    Raises:
        ValueError: for a single row, if the loss compares rows; for other columns; or if `keep_best` is not one of the
            numbers.
    """
    config, least = run.config, 2 if getattr(objective.loss, "needs_whole_batch", False) else 1
    batches, found = batches_of(run, config.eval_data, objective.kind, batch_size=1, name=name, fields=objective.fields)
    if taken is not None and batches.taken != set(taken):
        wanted, given = (", ".join(sorted(each)) or "none" for each in (taken, batches.taken))
        raise ValueError(
            f"{found.source} must have the numbers that the loss takes of the data, {wanted}, but has {given}."
        )
    if objective.ahead is not None:
        add_reference(run, batches, found.digest(), objective.ahead, name="eval_data")
    count, size = len(batches), config.batch_size // config.microbatches
    if count < least:
        raise ValueError(f"eval_data must have at least 2 records for a loss that compares rows, but has {count}.")
    order = np.argsort(batches.lengths, kind="stable")
    shards = 1 if run.mesh is None or least > 1 else meshes.row_shards(run.mesh)
    split = _parts(order[: count - count % shards], size, least=least, shards=shards)
    split += _parts(order[count - count % shards :], max(1, size // shards))  # whole on each device
    parts = [run.rows(functools.partial(batches.collate, places), len(places)) for places in split]

    @jax.jit
    def of_part(params: Params, part: Any, frozen: Frozen) -> dict[str, tuple[Array, Array]]:
        seen = params if trained.view is None else trained.view(params, frozen)
        return objective.loss(seen, part, frozen, jax.random.key(0)).totals()

    def measured(params: Params) -> dict[str, float]:
        totals = [of_part(params, part, trained.frozen) for part in parts]
        sums = jax.tree.map(lambda *each: np.sum([np.asarray(value, np.float64) for value in each]), *totals)
        # Compiled functions return dicts in the order of their names: the loss first again.
        sums = {"loss": sums.pop("loss")} | sums
        found = {f"held_out_{name}": float(total / weight) for name, (total, weight) in sums.items() if weight}
        if objective.name == "sft" and found["held_out_loss"] < LARGEST:
            found["held_out_perplexity"] = math.exp(found["held_out_loss"])
        return found

    measured.rows = count

    if config.keep_best is not None:  # a wrong name is an error now, not after the first steps
        names = [f"held_out_{name}" for name in jax.eval_shape(of_part, trained.params, parts[0], trained.frozen)]
        names.sort(key=lambda name: name != "held_out_loss")
        names += ["held_out_perplexity"] * (objective.name == "sft")
        if (name := direction(config.keep_best)[0]) not in names:
            raise ValueError(f"keep_best must be one of {', '.join(names)}, but is {name}.")
    return measured


def _parts(order: np.ndarray, size: int, *, least: int = 1, shards: int = 1) -> list[np.ndarray]:
    """Split rows into as few parts as possible, of multiples of `shards` rows as like in size as these allow.

    A part has at most `size` rows, or `shards`; one more where one would have fewer than `least`.
    """
    size = max(1, size // shards) * shards
    count = min(-(-len(order) // size), len(order) // least)
    return [part.reshape(-1) for part in np.array_split(order.reshape(-1, shards), count)] if count else []


def sampler_of(run: Run, asked: Prompts, sampler: Sampler) -> Callable[[Params], str]:
    """Return a sample of the first prompt's completion as a function of the parameters, always with the same key."""
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), asked)
    lm = with_attention(run.lm, "exact")  # the parameters are in the type of the weights

    def sample(params: Params) -> str:
        drawn = rollout(lm, params, one, jax.random.key(0), sampler)
        written = reward_fns.texts(meshes.on_host(drawn.sequences), run.loaded.tokenizer, run.eos)
        return "".join(side[0] for side in written)

    return sample


def _start_of(run: Run, batches: Batches) -> tuple[Prompts, Sampler]:
    """Return the end of the first record's prompt, short enough for a sample in the model's context."""
    count = min(SHOWN, run.lm.max_length - 1)
    prompt = batches.rows(0).prompt[count - run.lm.max_length :]
    return Prompts(np.asarray([prompt], np.int32), np.ones((1, len(prompt)), bool)), Sampler(count, eos_ids=run.eos)


def optimizer_for(config: Config, *, updates: int = 1) -> tuple[Callable[[int], Any], optax.GradientTransformation]:
    """Return the learning rate of each update, of which a step may have several, and the optimiser."""
    warmup = config.warmup * updates if config.warmup >= 1 else config.warmup
    rate = schedule_of(config.schedule, config.learning_rate, steps=config.steps * updates, warmup=warmup)
    given = {"weight_decay": config.weight_decay, "clip_norm": config.clip_norm, **config.optimizer_kwargs}
    return rate, optimizer_of(config.optimizer, rate, **given)


def place_of(function: str | Callable[..., Any]) -> str:
    """Return the name of a function in `run.json`: its place, not its source, so that it can be fixed and resumed."""
    if isinstance(function, str):
        return function
    function = getattr(function, "func", function)  # of a partial
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
