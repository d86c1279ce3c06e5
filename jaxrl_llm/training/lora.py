"""LoRA: train two low-rank matrices for each weight, W + (α/r) A B, instead of the weight (Hu et al. 2021)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxrl_llm.language_model import Params
from jaxrl_llm.models import families, huggingface
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.training.steps import View

Adapter = dict[str, dict[str, Array]]  # the tensor's name: {"a": [in, rank], "b": [rank, out]}


class Lora(NamedTuple):
    """The weights that have adapters, and their scale."""

    model: Network
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that have adapters, in Hugging Face's form."""
        return tuple(name for name in _kernels(self.model) if name.split(".")[-2] in self.targets)

    def init(self, key: Array) -> Adapter:
        """Draw A uniformly from ±√(1/in), as PEFT does; B is zero, so that the model is unchanged at the start."""
        shapes = _kernels(self.model)
        adapter = {}
        for name, each in zip(self.names, jax.random.split(key, len(self.names)), strict=True):
            fan_in, fan_out = shapes[name]
            bound = 1 / math.sqrt(fan_in)
            a = jax.random.uniform(each, (fan_in, self.rank), minval=-bound, maxval=bound)
            adapter[name] = {"a": a, "b": jnp.zeros((self.rank, fan_out))}
        return adapter

    def merge(self, params: Params, adapter: Adapter) -> Params:
        """Return the parameters with the adapters added; differentiable in both."""
        _check(self, adapter)
        paths = {name: slot.path for name, slot in huggingface.named_params(self.model).items()}
        changed = {paths[name]: pair for name, pair in adapter.items()}

        def add(path: Any, leaf: Array) -> Array:
            pair = changed.get(tuple(entry.key for entry in path))
            return leaf if pair is None else leaf + (self.scale * pair["a"] @ pair["b"]).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(add, params)

    def view(self) -> View:
        """Return a view for `make_step`: the adapter is trained, and merged into `frozen.base`."""
        return lambda adapter, frozen: self.merge(jax.lax.stop_gradient(frozen.base), adapter)


def lora(model: Network, *, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] | None = None) -> Lora:
    """Return adapters for a model's linear layers of given names.

    Args:
        rank: r, columns of A.
        alpha: α; the product A B is scaled by α/r.
        targets: names of modules, such as c_attn, c_proj, q_proj; by default those of attention queries and values.

    Raises:
        ValueError: for a rank below 1, or a name that no linear layer has, listing the names.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, but is {rank}.")
    targets = tuple(families.family_of(model)[1].targets if targets is None else targets)
    known = {name.split(".")[-2] for name in _kernels(model)}
    unknown = sorted(set(targets) - known)
    if unknown or not targets:
        raise ValueError(f"targets must be among {', '.join(sorted(known))}, but are {', '.join(unknown) or 'none'}.")
    return Lora(model, rank, float(alpha), targets)


def save(folder: str | os.PathLike[str], given: Lora, adapter: Adapter, *, base: str = "") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads onto the same model.

    Args:
        base: the model's name or path, which PEFT records.
    """
    from safetensors.numpy import save_file

    _check(given, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _, family = families.family_of(given.model)
    tensors = {}
    for name, pair in adapter.items():
        module = f"base_model.model.{family.prefix}{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(np.asarray(pair["a"]).T)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(np.asarray(pair["b"]).T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": given.rank,
        "lora_alpha": given.alpha,
        "target_modules": list(given.targets),
        "fan_in_fan_out": not family.transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors.partial", metadata={"format": "pt"})
    os.replace(folder / "adapter_model.safetensors.partial", folder / "adapter_model.safetensors")
    partial = folder / "adapter_config.json.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "adapter_config.json")


def load(folder: str | os.PathLike[str], model: Network) -> tuple[Lora, Adapter]:
    """Load an adapter that `save`, or PEFT, has written for this model.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is of another kind or of another model, naming what does not fit.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no adapter_config.json.")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        variants = [name for name in ("use_dora", "use_rslora") if config.get(name)]
        raise ValueError(
            f"{folder} is not a plain LoRA adapter: peft_type is {config.get('peft_type')}"
            f"{''.join(f', {name} is set' for name in variants)}."
        )
    varied = [name for name in ("rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)]
    if varied or config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder} must have one rank and one alpha for all layers, but sets {', '.join(varied) or 'bias'}."
        )
    given = lora(model, rank=config["r"], alpha=config["lora_alpha"], targets=config["target_modules"])
    _, family = families.family_of(model)
    found: Adapter = {}
    for full_name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, side = full_name.removesuffix(".weight").rpartition(".lora_")
        name = module.removeprefix("base_model.model.").removeprefix(family.prefix) + ".weight"
        found.setdefault(name, {})[side.lower()] = jnp.asarray(tensor.T)
    _check(given, found)
    return given, found


def _kernels(model: Network) -> dict[str, tuple[int, int]]:
    """Return the tensors of the linear layers with their shapes [in, out]."""
    named = huggingface.named_params(model).items()
    return {
        name: slot.shape[::-1] if slot.transposed else slot.shape
        for name, slot in named
        if slot.path[-1] == "kernel" and slot.path[0] != "lm_head" and slot.index is None
    }


def _check(given: Lora, adapter: PyTree) -> None:
    """Raise unless the adapter is one of this model, of this rank."""
    shapes = _kernels(given.model)
    problems = [f"missing {name}" for name in given.names if name not in adapter]
    for name, pair in adapter.items():
        if name not in given.names:
            problems.append(f"unknown {name}")
            continue
        fan_in, fan_out = shapes[name]
        expected = {"a": (fan_in, given.rank), "b": (given.rank, fan_out)}
        found = {side: tuple(pair[side].shape) for side in pair}
        if found != expected:
            problems.append(f"{name} is {found}, not {expected}")
    if problems:
        raise ValueError(f"the adapter is of another model or rank: {'; '.join(problems[:4])}.")
