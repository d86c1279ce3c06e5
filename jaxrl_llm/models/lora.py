"""LoRA: train two low-rank matrices for each weight, W + (α/r) A B, instead of the weight (Hu et al. 2021)."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxrl_llm.files import replacing
from jaxrl_llm.language_model import Params
from jaxrl_llm.models import configuration, huggingface
from jaxrl_llm.models.decoder import Network, check_value
from jaxrl_llm.models.layers import Adapted

Adapter = dict[str, dict[str, Array]]  # the tensor's name: {"a": [in, rank], "b": [rank, out]}


class Module(NamedTuple):
    """A linear layer that has an adapter."""

    name: str  # of its tensor, in Hugging Face's form
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class Lora:
    """The weights that have adapters, with the rank and the scale of each, and the dropout of training."""

    model: Network
    modules: tuple[Module, ...]
    rslora: bool = False
    dropout: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that have adapters, in Hugging Face's form."""
        return tuple(module.name for module in self.modules)

    def scale(self, module: Module) -> float:
        """Return α/r, or α/√r (Kalajdzievski 2023)."""
        return module.alpha / (math.sqrt(module.rank) if self.rslora else module.rank)

    def init(self, key: Array) -> Adapter:
        """Draw A uniformly from ±√(1/in), as PEFT does; B is zero, so that the model is unchanged at the start."""
        layers = _layers(self.model)
        adapter = {}
        for (name, rank, _), each in zip(self.modules, jax.random.split(key, len(self.modules)), strict=True):
            fan_in, fan_out = layers[name].shape
            bound = 1 / math.sqrt(fan_in)
            a = jax.random.uniform(each, (fan_in, rank), minval=-bound, maxval=bound)
            adapter[name] = {"a": a, "b": jnp.zeros((rank, fan_out))}
        return adapter

    def merge(self, params: Params, adapter: Adapter, key: Key[Array, ""] | None = None) -> Params:
        """Return the parameters with the adapters added; differentiable in both.

        With a `key` and a dropout p above 0 the adapted kernels are instead `layers.Adapted`, which compute

            x W + (α/r) dropout(x) A B,   dropout(x)_i = x_i/(1 − p) with probability 1 − p, else 0

        independently for each token, as PEFT does in training.
        """
        _check(self, adapter)
        layers = _layers(self.model)
        changed = {
            layers[module.name].path: (place, self.scale(module), adapter[module.name])
            for place, module in enumerate(self.modules)
        }

        def add(path: Any, leaf: Array) -> Any:
            place, scale, pair = changed.get(tuple(entry.key for entry in path), (0, 0, None))
            if pair is None:
                return leaf
            if key is None or not self.dropout:
                return leaf + (scale * pair["a"] @ pair["b"]).astype(leaf.dtype)
            return Adapted(leaf, pair["a"], scale * pair["b"], jax.random.fold_in(key, place), self.dropout)

        return jax.tree_util.tree_map_with_path(add, params)

    def view(self) -> Callable[..., Params]:
        """Return a view for `steps.make_step`: the adapter is trained, and merged into `frozen.base`."""
        return lambda adapter, frozen, key=None: self.merge(jax.lax.stop_gradient(frozen.base), adapter, key)


def lora(
    model: Network,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | str | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Lora:
    """Return adapters for linear layers of a model.

    Args:
        rank: r, columns of A.
        alpha: α; the product A B is scaled by α/r.
        targets: one or several of: the name of a layer or its end, such as c_attn, mlp.c_proj or
            model.layers.0.self_attn.q_proj; a regular expression of whole names; "all-linear" for every linear layer
            but the head (and in a model with experts its MLPs). By default those of attention queries and values.
        rslora: scale by α/√r instead.
        dropout: share of an adapter's inputs that training drops, from 0 to below 1.

    Raises:
        ValueError: for a rank below 1, a dropout out of range, or a target that no linear layer has, listing the names.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, but is {rank}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), but is {dropout}.")
    targets = configuration.family_of(model)[1].targets if targets is None else targets
    modules = tuple(Module(name, rank, float(alpha)) for name in _targeted(model, targets))
    return Lora(model, modules, rslora, dropout)


def _targeted(model: Network, targets: Sequence[str] | str) -> list[str]:
    """Return the names of the tensors that the targets select."""
    layers = _layers(model)

    def selected(target: str) -> set[str]:
        if target == "all-linear":
            return set(layers)
        ends = {name for name, layer in layers.items() if f".{layer.module}".endswith(f".{target}")}
        pattern = None if ends else _compiled("targets", target)
        return ends or {name for name, layer in layers.items() if pattern.fullmatch(layer.module)}

    found = {target: selected(target) for target in ([targets] if isinstance(targets, str) else targets)}
    unknown = [target for target, names in found.items() if not names]
    if unknown or not found:
        known = ", ".join(sorted({layer.last for layer in layers.values()}))
        example = next(iter(layers.values())).module
        raise ValueError(
            f"targets must be among {known}, or match names such as {example}, but are {', '.join(unknown) or 'none'}."
        )
    chosen = set().union(*found.values())
    return [name for name in layers if name in chosen]


# Files ----------------------------------------------------------------------------------------------------------------

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
HEAD = f"base_model.model.{huggingface.SCORE}"  # of a reward model, [1, width]
HEADS = ("score", "classifier")  # the modules that PEFT saves of a sequence classifier, if there are any
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")  # the base weights stay as they are
KNOWN = {  # of PEFT's fields, those that are read, and those that say nothing beyond the tensors
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}


def save(
    folder: str | os.PathLike[str], given: Lora, adapter: Adapter, *, base: str = "", head: Array | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads onto the same model.

    Args:
        base: the model's name or path, which PEFT records and `models.load` reads.
        head: [width], of a reward model: the adapter is then one of a sequence classifier with one label, and the head
            is among its `modules_to_save`.
    """
    from safetensors.numpy import save_file

    _check(given, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = _layers(given.model)
    modules = {layers[module.name].module: module for module in given.modules}
    tensors = {
        f"base_model.model.{name}.lora_{side.upper()}.weight": np.ascontiguousarray(np.asarray(leaf).T)
        for name, module in modules.items()
        for side, leaf in adapter[module.name].items()
    }
    task = "SEQ_2_SEQ_LM" if "is_encoder_decoder" in configuration.config_of(given.model) else "CAUSAL_LM"
    if head is not None:
        task, tensors[HEAD] = "SEQ_CLS", np.asarray(head, np.float32)[None]
    rank = _commonest(module.rank for module in given.modules)
    alpha = _commonest(module.alpha for module in given.modules)
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: module.rank for name, module in modules.items() if module.rank != rank},
        "alpha_pattern": {name: module.alpha for name, module in modules.items() if module.alpha != alpha},
        "use_rslora": given.rslora,
        "target_modules": _target_modules(given),
        "fan_in_fan_out": not configuration.family_of(given.model)[1].transposed,
        "lora_dropout": given.dropout,
        "modules_to_save": None if head is None else ["score"],
        "bias": "none",
        "inference_mode": True,
    }
    with replacing(folder / TENSORS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _commonest(values: Iterable[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


def _target_modules(given: Lora) -> list[str]:
    """Return the last components of the names if no other layer has them, else whole names."""
    layers = _layers(given.model)
    last = dict.fromkeys(layers[name].last for name in given.names)
    others = {layer.last for name, layer in layers.items() if name not in given.names}
    return [layers[name].module for name in given.names] if others & set(last) else list(last)


def load(folder: str | os.PathLike[str], model: Network) -> tuple[Lora, Adapter]:
    """Load a LoRA adapter that `save`, or PEFT, has written for this model.

    The layers are those of which the file holds A and B; each may have its own rank and α.

    Raises:
        FileNotFoundError: if the folder has no adapter.
        ValueError: if it is of another kind or of another model, or damaged, naming what does not fit.
    """
    folder = Path(folder)
    config = huggingface.read_config(folder, CONFIG)
    _check_plain(config, folder / CONFIG)
    ranks = _by_pattern(config, "r", "rank_pattern", "int", folder / CONFIG)
    alphas = _by_pattern(config, "lora_alpha", "alpha_pattern", "float", folder / CONFIG)
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must have {TENSORS}, but has {', '.join(sorted(os.listdir(folder)))}.")
    _, family = configuration.family_of(model)
    layers = _layers(model)
    found: dict[str, dict[str, np.ndarray]] = {}
    modules, unknown = {}, []
    for key, tensor in huggingface.read_file(path):
        if key == HEAD and is_reward(config):
            continue
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        name = f"{family.bare_name(parts[1])}.weight" if parts else key
        if not parts or name not in layers or not jnp.issubdtype(tensor.dtype, jnp.floating):
            unknown.append(f"{key} of {tensor.dtype}")
            continue
        rank, alpha = (
            next(value for pattern, value in rows if pattern.fullmatch(parts[1])) for rows in (ranks, alphas)
        )
        modules[name] = Module(name, rank, float(alpha))
        pair = found.setdefault(name, {})
        if parts[2].lower() in pair:
            raise ValueError(f"{path} holds {key} twice, with and without {family.prefix!r}.")
        pair[parts[2].lower()] = tensor[:].T.astype(np.float32)
    if unknown or not found:
        raise ValueError(
            f"{path} must hold lora_A and lora_B of linear layers such as {next(iter(layers.values())).module} (not of "
            f"heads, embeddings or experts), but holds {_few(unknown) or 'nothing'}."
        )
    given = Lora(model, tuple(modules[name] for name in layers if name in modules), bool(config.get("use_rslora")))
    _check(given, found, source=f"{folder}: the adapter")
    return given, jax.tree.map(jnp.asarray, {name: found[name] for name in given.names})


def is_adapter(folder: Path) -> bool:
    """Return True for a folder that has an adapter and no model."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in names)


def is_reward(config: Mapping[str, Any]) -> bool:
    """Return True if an `adapter_config.json` is that of a sequence classifier."""
    return config.get("task_type") == "SEQ_CLS"


def base_of(folder: Path) -> str:
    """Return the name or path of the base model that an adapter records.

    Raises:
        FileNotFoundError: if the folder has no adapter.
        ValueError: if it records none.
    """
    base = huggingface.read_config(folder, CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder} must name the base model of its adapter, base_model_name_or_path in {CONFIG}, but has {base!r}: "
            "load the base model, and the adapter onto it by jaxrl_llm.models.lora.load."
        )
    return base


def head_of(folder: Path) -> np.ndarray | None:
    """Return the head [1, width] of a reward model that an adapter holds, or None."""
    found = dict(huggingface.read_file(folder / TENSORS)).get(HEAD)
    return None if found is None else found[:]


def _check_plain(config: Mapping[str, Any], source: Path) -> None:
    """Raise unless the configuration is one of plain LoRA; a field that is not known must be off."""
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type is {config.get('peft_type')!r}")
    if (start := config.get("init_lora_weights")) not in INITIALISATIONS:
        reasons.append(f"init_lora_weights is {reprlib.repr(start)}, which changes the base weights")
    known = KNOWN
    if is_reward(config) and set(config.get("modules_to_save") or ()) <= set(HEADS):
        known = KNOWN | {"modules_to_save"}
    for name, value in config.items():
        if name not in known and value and (name, value) != ("bias", "none"):
            reasons.append(f"{name} is {reprlib.repr(value)}")
    if reasons:
        raise ValueError(f"{source} is not that of a plain LoRA adapter: {_few(reasons)}.")
    check_value(f"{source}: use_rslora", config.get("use_rslora") or False, "bool")


def _by_pattern(
    config: Mapping[str, Any], field: str, patterns: str, kind: str, source: Path
) -> list[tuple[re.Pattern[str], Any]]:
    """Return patterns of modules' names with the values of a field, the first that matches counts, as in PEFT."""
    given = config.get(patterns) or {}
    check_value(f"{source}: {patterns}", given, "dict")
    rows = [(f"{source}: {patterns}", *row) for row in given.items()]
    rows.append((f"{source}: {field}", ".*", config.get(field)))
    for name, _, value in rows:
        check_value(name, value, kind)
    return [(_compiled(name, pattern, r"(.*\.)?({})"), value) for name, pattern, value in rows]


def _compiled(field: str, pattern: str, form: str = "{}") -> re.Pattern[str]:
    try:
        return re.compile(form.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field} must be a regular expression, but is {pattern!r}: {error}.") from error


# Layers ---------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A linear layer that may have an adapter."""

    module: str  # the whole name, as in PEFT
    path: huggingface.TensorPath
    shape: tuple[int, int]  # [in, out]

    @property
    def last(self) -> str:
        """The last component of the name."""
        return self.module.rpartition(".")[2]


def _layers(model: Network) -> dict[str, Layer]:
    """Return the linear layers by the name of their tensor: all but the head, and the MLPs of a model with experts.

    PEFT takes the name of such an MLP's layer for that of the experts, also where the layer has none.
    """
    _, family = configuration.family_of(model)
    slots = huggingface.named_params(model)
    apart = {"lm_head", "mlp"} if any("experts" in slot.path for slot in slots.values()) else {"lm_head"}
    return {
        name: Layer(
            family.prefix + name.removesuffix(".weight"),
            slot.path,
            slot.shape[::-1] if slot.transposed else slot.shape,
        )
        for name, slot in slots.items()
        if slot.path[-1] == "kernel" and not apart & set(slot.path)
    }


def _check(given: Lora, adapter: PyTree, source: str = "the adapter") -> None:
    """Raise unless the adapter is one of these layers and ranks."""
    layers = _layers(given.model)
    problems = [f"unknown {name}" for name in adapter if name not in given.names]
    for name, rank, _ in given.modules:
        if name not in adapter:
            problems.append(f"missing {name}")
            continue
        fan_in, fan_out = layers[name].shape
        expected = {"a": (fan_in, rank), "b": (rank, fan_out)}
        found = {side: tuple(leaf.shape) for side, leaf in adapter[name].items()}
        if found != expected:
            problems.append(f"{name} is {found}, not {expected}")
    if problems:
        raise ValueError(f"{source} is of another model or rank: {_few(problems)}.")


def _few(items: Sequence[str]) -> str:
    return "; ".join(items[:4]) + (f"; and {len(items) - 4} more" if len(items) > 4 else "")
