"""The form in which the world keeps models: `config.json`, `model.safetensors`, and the names of their tensors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.language_model import Params
from jaxrl_llm.models.decoder import DecoderLM
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.llama import Llama, LlamaConfig, RopeScaling

TensorPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture is written in a folder of Hugging Face form."""

    model: type[DecoderLM]
    config: type
    architecture: str
    prefix: str  # of every tensor but the head; found in the wild with and without it
    transposed: bool  # linear kernels are stored [out, in]
    buffers: re.Pattern[str]  # tensors of older files that are no parameters
    refused: dict[str, Any]  # fields that change the function in a way that is not supported: the values that do not


FAMILIES = {
    "gpt2": Family(
        GPT2,
        GPT2Config,
        "GPT2LMHeadModel",
        prefix="transformer.",
        transposed=False,
        buffers=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
        refused={"add_cross_attention": (None, False)},
    ),
    "llama": Family(
        Llama,
        LlamaConfig,
        "LlamaForCausalLM",
        prefix="model.",
        transposed=True,
        buffers=re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rotary_emb\.inv_freq"),
        refused={"hidden_act": (None, "silu", "swish"), "partial_rotary_factor": (None, 1)},
    ),
}

REQUIRED = {  # what a config.json must say
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head"),
    "llama": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}


def family_of(model: DecoderLM) -> tuple[str, Family]:
    """The `model_type` and family of a model of ours."""
    for model_type, family in FAMILIES.items():
        if isinstance(model, family.model):
            return model_type, family
    raise ValueError(f"{type(model).__name__} has no Hugging Face form; {', '.join(FAMILIES)} have one.")


# config.json ---------------------------------------------------------------------------------------------------------


def model_from_config(config: dict[str, Any], *, source: str) -> DecoderLM:
    """The model that a `config.json` describes.

    Raises:
        ValueError: for an architecture, or a setting of one, that is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{source}: model_type must be one of {', '.join(FAMILIES)}, but is {model_type!r}.")
    family = FAMILIES[model_type]
    for field, harmless in family.refused.items():
        if config.get(field) not in harmless:
            raise ValueError(f"{source}: {field} = {config[field]!r} is not supported.")
    known = {field.name for field in dataclasses.fields(family.config)}
    values = {name: value for name, value in config.items() if name in known}
    if model_type == "llama":
        values |= _rope(config, source)
        values["num_key_value_heads"] = config.get("num_key_value_heads") or config.get("num_attention_heads")
        # Where the format's default is not that of our configuration:
        values = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048} | values
    missing = [name for name in REQUIRED[model_type] if name not in config]
    if missing:
        raise ValueError(f"{source}: the configuration lacks {', '.join(missing)}.")
    try:
        return family.model(family.config(**values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _rope(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Rotary settings of the old form (`rope_theta`, `rope_scaling`) and the new (`rope_parameters`)."""
    settings = {"rope_theta": config.get("rope_theta")}
    for form in ("rope_scaling", "rope_parameters"):
        given = config.get(form) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{source}: {form} must be an object, but is {given!r}.")
        settings |= given
    if settings.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"{source}: partial_rotary_factor = {settings['partial_rotary_factor']!r} is not supported.")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    theta = settings["rope_theta"]
    values = {"rope_theta": 10000.0 if theta is None else theta, "rope_scaling": None}
    if rope_type != "default":
        known = {field.name for field in dataclasses.fields(RopeScaling)}
        scaling = {name: value for name, value in settings.items() if name in known} | {"rope_type": rope_type}
        try:
            values["rope_scaling"] = RopeScaling(**scaling)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: rope scaling {settings}: {error}") from error
    return values


def config_of(model: DecoderLM) -> dict[str, Any]:
    """The `config.json` of a model of ours."""
    model_type, family = family_of(model)
    config = dataclasses.asdict(model.config)
    if model_type == "llama":
        scaling = config.pop("rope_scaling")
        rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        if scaling is not None:
            fields = ("rope_type", "factor") if scaling["rope_type"] == "linear" else tuple(scaling)
            rope |= {name: scaling[name] for name in fields}
        config["rope_parameters"] = rope
        config["head_dim"] = model.config.head_size
        config["hidden_act"] = "silu"
    return {"architectures": [family.architecture], "model_type": model_type, **config}


# Tensors -------------------------------------------------------------------------------------------------------------


def tensor_name(path: TensorPath) -> str:
    """The checkpoint's name of a parameter, without prefix: ("h", 0, "ln_1", "scale") is h.0.ln_1.weight."""
    *modules, leaf = map(str, path)
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def named_params(model: DecoderLM) -> dict[str, tuple[TensorPath, jax.ShapeDtypeStruct]]:
    """Tensor name to path and abstract value, of every parameter of the model."""
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params)
    paths = [(tuple(entry.key for entry in path), leaf) for path, leaf in leaves]
    return {tensor_name(path): (path, leaf) for path, leaf in paths}


def is_transposed(family: Family, path: TensorPath) -> bool:
    """Whether the checkpoint stores this parameter as [out, in]; the untied head always is."""
    return path[-1] == "kernel" and (family.transposed or path[0] == "lm_head")


def params_from_tensors(
    model: DecoderLM, tensors: Iterator[tuple[str, np.ndarray]], *, dtype: Any, source: str
) -> Params:
    """Place a checkpoint's tensors, one at a time, in the parameter tree of `model`.

    Raises:
        ValueError: naming the tensors that are missing, unknown, repeated or of another shape.
    """
    _, family = family_of(model)
    wanted = named_params(model)
    params: Params = {}
    placed, problems = set(), []
    tied_head = None
    for full_name, tensor in tensors:
        name = full_name.removeprefix(family.prefix)
        if name == "lm_head.weight" and name not in wanted:
            tied_head = tensor
            continue
        if name not in wanted:
            if not family.buffers.fullmatch(name):
                problems.append(f"unknown {full_name}")
            continue
        path, abstract = wanted[name]
        shape = abstract.shape[::-1] if is_transposed(family, path) else abstract.shape
        if tensor.shape != shape:
            problems.append(f"{full_name} is {list(tensor.shape)}, expected {list(shape)}")
        elif not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
            problems.append(f"{full_name} is stored as {tensor.dtype}")
        elif name in placed:
            problems.append(f"{full_name} stands there twice")
        else:
            _place(params, path, jax.numpy.asarray(tensor.T if is_transposed(family, path) else tensor, dtype))
        placed.add(name)
    problems += [f"missing {name}" for name in wanted if name not in placed]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{source} does not fit its configuration: {', '.join(problems[:8])}{more}.")
    _check_tied_head(params, tied_head, source)
    return params


def _place(params: Params, path: TensorPath, value: jax.Array) -> None:
    *modules, leaf = path
    for module in modules:
        params = params.setdefault(module, {})
    params[leaf] = value


def _check_tied_head(params: Params, head: np.ndarray | None, source: str) -> None:
    """A file may repeat a tied head, but not contradict it."""
    if head is None:
        return
    table = next(params[name]["embedding"] for name in ("wte", "embed_tokens") if name in params)
    if head.shape != table.shape or not np.array_equal(np.asarray(head).astype(table.dtype), np.asarray(table)):
        raise ValueError(f"{source}: tie_word_embeddings is set, but lm_head.weight is not the embedding.")


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: a folder of Hugging Face form was expected.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(config).__name__}.")
    return config


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the folder's safetensors, single or sharded, one at a time."""
    from safetensors import SafetensorError, safe_open

    for path in _safetensors_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    try:
                        tensor = file.get_tensor(name)
                    except (AttributeError, TypeError):  # a type that numpy does not have
                        kind = file.get_slice(name).get_dtype()
                        raise ValueError(f"{path}: {name} is stored as {kind}, which is not supported.") from None
                    yield name, tensor
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}.") from error


def _safetensors_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():  # goes before an index that may lie beside it, as in transformers
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors: {error!r}.") from error
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder}: the index names {', '.join(absent)}, which is not there.")
        return files
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"{folder} holds no model.safetensors (found {found}); pickled weights are never loaded, convert them first."
    )


def write_folder(folder: Path, model: DecoderLM, params: Params, *, dtype: Any, extra: dict[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`, each whole or not at all."""
    from safetensors.numpy import save_file

    _, family = family_of(model)
    tensors = {}
    for name, (path, _) in named_params(model).items():
        leaf = params
        for entry in path:
            leaf = leaf[entry]
        value = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        full_name = name if path[0] == "lm_head" else family.prefix + name
        tensors[full_name] = np.ascontiguousarray(value.T if is_transposed(family, path) else value)
    dtype_name = str(next(iter(tensors.values())).dtype)
    config = config_of(model) | {"dtype": dtype_name} | extra
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "config.json")
