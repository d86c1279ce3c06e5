"""The Hugging Face format: `config.json`, `model.safetensors`, and the names of tensors."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.language_model import Params
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.models.families import FAMILIES, Family, config_of, family_of, stored_name

TensorPath = tuple[str | int, ...]
SCORE = "score.weight"  # the head of a reward model, [1, width]


# Tensors -------------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """The place of a stored tensor in the parameter tree."""

    path: TensorPath
    index: int | None  # in the leaf's first axis, of one of several tensors that are stacked
    shape: tuple[int, ...]  # as stored
    transposed: bool  # the leaf, or its part, is the tensor transposed


def named_params(model: Network) -> dict[str, Slot]:
    """Return the slot of every tensor of the model by its name without prefix."""
    _, family = family_of(model)
    slots = {}
    for entries, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_params):
        path = tuple(entry.key for entry in entries)
        name = stored_name(family, path)
        stacked = "{}" in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        # Always stored as [out, in]: an untied head, and the kernels of all families but GPT-2.
        transposed = path[-1] == "kernel" and (family.transposed or path[0] == "lm_head")
        stored = shape[::-1] if transposed else shape
        for index in range(leaf.shape[0]) if stacked else [None]:
            slots[name.format(index)] = Slot(path, index, stored, transposed)
    return slots


def params_from_tensors(
    model: Network, tensors: Iterator[tuple[str, np.ndarray]], *, dtype: Any, source: str
) -> Params:
    """Place a checkpoint's tensors, one at a time, in the parameter tree of `model`.

    Raises:
        ValueError: naming tensors that are missing, unknown, repeated or of another shape.
    """
    _, family = family_of(model)
    wanted = named_params(model)
    params: Params = {}
    placed, problems, copies, stacks = set(), [], {}, {}
    for name, full_name, tensor in _without_copies(family, wanted, tensors, copies):
        if name not in wanted:
            if not family.buffers.fullmatch(name):
                problems.append(f"unknown {full_name}")
            continue
        slot = wanted[name]
        if tensor.shape != slot.shape:
            problems.append(f"{full_name} is {list(tensor.shape)}, expected {list(slot.shape)}")
        elif not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
            problems.append(f"{full_name} is stored as {tensor.dtype}")
        elif name in placed:
            problems.append(f"{full_name} occurs twice")
        else:
            tensor = tensor.T if slot.transposed else tensor
            if slot.index is None:
                _place(params, slot.path, jax.numpy.asarray(tensor, dtype))
            else:
                stacks.setdefault(slot.path, {})[slot.index] = tensor.astype(dtype)
        placed.add(name)
    problems += [f"missing {name}" for name in wanted if name not in placed]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{source} does not fit its configuration: {', '.join(problems[:8])}{more}.")
    for path in list(stacks):
        parts = stacks.pop(path)
        _place(params, path, jax.numpy.asarray(np.stack([parts[index] for index in range(len(parts))])))
    _check_copies(params, wanted[family.embedding].path, copies, source)
    return params


def _without_copies(
    family: Family, wanted: dict[str, Any], tensors: Iterator[tuple[str, np.ndarray]], copies: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield each tensor with its name without and with prefix; copies of the embedding are put into `copies`.

    If the embedding itself is not in the file, a copy replaces it.
    """
    embedding_seen = False
    for full_name, tensor in tensors:
        name = full_name.removeprefix(family.prefix)
        if name in family.copies and name not in wanted:
            copies[name] = tensor
        else:
            embedding_seen |= name == family.embedding
            yield name, full_name, tensor
    if copies and not embedding_seen:
        name, tensor = next(iter(copies.items()))
        yield family.embedding, name, tensor


def _place(params: Params, path: TensorPath, value: jax.Array) -> None:
    *modules, leaf = path
    for module in modules:
        params = params.setdefault(module, {})
    params[leaf] = value


def _check_copies(params: Params, path: TensorPath, copies: dict[str, np.ndarray], source: str) -> None:
    """Raise ValueError if a copy of the embedding differs from it."""
    table = functools.reduce(lambda node, entry: node[entry], path, params)
    for name, copy in copies.items():
        if copy.shape != table.shape or not np.array_equal(np.asarray(copy).astype(table.dtype), np.asarray(table)):
            head = name in ("lm_head.weight", "embed_out.weight")
            reason = "tie_word_embeddings is set, but " if head else ""
            cure = " With tie_word_embeddings false in config.json the head is a parameter of its own." if head else ""
            raise ValueError(f"{source}: {reason}{name} is not the embedding.{cure}")


# Files ---------------------------------------------------------------------------------------------------------------


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read the `config.json` of a folder, or another JSON file."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must be a folder in Hugging Face format, but has no {name}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(config).__name__}.")
    return config


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the folder's tensors, from the headers of its files."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in _safetensors_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}.") from error
    return shapes


def tensor_names(folder: Path) -> set[str]:
    """Return the names of the folder's tensors, without a head that repeats or replaces the embedding."""
    names = set(stored_shapes(folder))
    return names if _has_own_head(folder, names) else names - {"lm_head.weight"}


def _has_own_head(folder: Path, names: set[str]) -> bool:
    """Return True if there is a head whose values differ from the embedding's."""
    family = FAMILIES["t5"]  # in the other families `config.json` decides
    embeddings = [name for name in (family.embedding, *family.copies) if name in names and name != "lm_head.weight"]
    if "lm_head.weight" not in names or not embeddings:
        return False
    tables = dict(read_tensors(folder, only=("lm_head.weight", embeddings[0])))
    return not np.array_equal(tables["lm_head.weight"], tables[embeddings[0]])


def read_tensors(folder: Path, *, only: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor (or those in `only`) of the folder's safetensors, single or sharded, one at a time."""
    for path in _safetensors_files(folder):
        yield from read_file(path, only=only)


def read_file(path: Path, *, only: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor (or those in `only`) of a file, one at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if only is not None and name not in only:
                    continue
                try:
                    tensor = file.get_tensor(name)
                except (AttributeError, TypeError):  # a dtype that numpy does not have
                    kind = file.get_slice(name).get_dtype()
                    raise ValueError(f"{path}: {name} is stored as {kind}, which is not supported.") from None
                yield name, tensor
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}.") from error


def _safetensors_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():  # takes precedence over an index, as in transformers
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name or name == ".."]:
                raise ValueError(f"{outside[0]!r} is not a file of the folder")
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error}.") from error
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder}: the index names {', '.join(absent)}, which is missing.")
        return files
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"{folder} must have model.safetensors, but has {found}; pickled weights are never loaded, convert them first."
    )


def check_params(model: Network, params: Params) -> None:
    """Raise ValueError unless the parameters are those of the model, with their shapes."""
    expected, found = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (model.abstract_params, params))
    )
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"the parameter {name} must be {_shape(expected.get(name))}, but is {_shape(found.get(name))}."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


def write_folder(
    folder: Path,
    model: Network,
    params: Params,
    *,
    dtype: Any,
    extra: dict[str, Any],
    further: Mapping[str, np.ndarray],
) -> None:
    """Write `config.json` and `model.safetensors` atomically; `further` tensors are added to the model's."""
    from safetensors.numpy import save_file

    _, family = family_of(model)
    tensors = {}
    check_params(model, params)
    for name, slot in named_params(model).items():
        leaf = functools.reduce(lambda node, entry: node[entry], slot.path, params)
        leaf = leaf if slot.index is None else leaf[slot.index]
        value = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        full_name = name if slot.path[0] == "lm_head" else family.prefix + name
        tensors[full_name] = np.ascontiguousarray(value.T if slot.transposed else value)
    tensors |= further
    dtype_name = str(next(iter(tensors.values())).dtype)
    config = config_of(model) | {"dtype": dtype_name} | extra
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
