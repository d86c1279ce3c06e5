"""A `config.json` as a checked configuration and as a model, and back; that of a multimodal checkpoint's text model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxrl_llm.models import rotary, t5
from jaxrl_llm.models.decoder import Network, check_choice, check_value
from jaxrl_llm.models.families import FAMILIES, Family, Maybe, Only, describe, pairs
from jaxrl_llm.models.transformer import Decoder, Description

ROPE_FIELDS = (*rotary.SEPARATE, "rope_scaling", "rope_local_base_freq")  # of older forms, beside `rope_parameters`


class Config(Mapping[str, Any]):
    """The fields of a `config.json` that change the function, checked and frozen; the others have defaults.

        Config("olmo2", vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)

    Fields are items and attributes. As attributes they also go by Llama's names where the family has other ones.

    Raises:
        ValueError: for a field that is missing, unknown or does not fit.
    """

    model_type: str
    name: str  # the family's, such as Llama
    description: Description  # the model as data

    def __init__(self, model_type: str, **given: Any):
        check_choice("model_type", model_type, FAMILIES)
        family = FAMILIES[model_type]
        if unknown := [name for name in given if name not in pairs(family.spellings) and not _known(family, name)]:
            raise ValueError(f"{model_type} has no field {', '.join(unknown)}.")
        given, values = _renamed(family, given), {}
        for name, default in family.fields.items():
            nullable, required = isinstance(default, Maybe), isinstance(default, type)
            kind = default if required else default.kind if nullable else type(default)
            value = given.get(name, default.absent if nullable else None)
            if value is None and not (nullable or required):
                value = default
            if value is not None or required:
                check_value(name, value, kind.__name__)
            values[name] = "silu" if value == "swish" else value  # two names of one activation
        if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if "rope_parameters" in values:
            said = {**given, **values, "rope_parameters": given.get("rope_parameters")}
            values["rope_parameters"] = rotary.rope_parameters(said, defaults=family.fields["rope_parameters"])
        values = _frozen(values)
        by_llamas_names = {name: values[own] for name, own in family.own.items() if own in values}
        self.__dict__.update(values, **by_llamas_names, model_type=model_type, name=family.name, _values=values)
        self.__dict__["description"] = describe(self, family.traits)

    def replace(self, **changes: Any) -> Config:
        """Return the configuration with other values of these fields."""
        return Config(self.model_type, **self._values | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON."""
        return json.loads(json.dumps(dict(self), default=dict))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a configuration is frozen; `replace` returns a changed one.")

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash((self.model_type, self.description))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and (self.model_type, self._values) == (other.model_type, other._values)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"Config({self.model_type!r}, {fields})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Config, self.model_type, **self.to_dict()), ()


def _known(family: Family, name: str) -> bool:
    return name in family.fields or ("rope_parameters" in family.fields and name in ROPE_FIELDS)


def _renamed(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the family has, under its own names."""
    spellings = pairs(family.spellings)
    spelt = {spellings[name]: value for name, value in config.items() if name in spellings and value is not None}
    return {name: value for name, value in (config | spelt).items() if _known(family, name)}


def _frozen(value: Any) -> Any:
    """Return a copy that cannot be changed."""
    if isinstance(value, Mapping):
        return MappingProxyType({name: _frozen(each) for name, each in value.items()})
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


Llama = StableLM = Decoder


def LlamaConfig(**fields: Any) -> Config:
    """Return a Llama configuration; the defaults are those of SmolLM2-135M."""
    smollm2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    smollm2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    smollm2 |= {"rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True}
    return Config("llama", **smollm2 | fields)


def StableLMConfig(**fields: Any) -> Config:
    """Return a StableLM configuration; the defaults are those of StableLM-Zephyr-3B."""
    zephyr = {"vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32}
    zephyr |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
    return Config("stablelm", **zephyr | fields)


# Models ---------------------------------------------------------------------------------------------------------------


def family_named(config: Mapping[str, Any], *, source: str) -> tuple[str, Family]:
    """Return `model_type` and family of a `config.json`."""
    check_choice(f"{source}: model_type", config.get("model_type"), FAMILIES)
    return config["model_type"], FAMILIES[config["model_type"]]


def family_of(model: Network) -> tuple[str, Family]:
    """Return `model_type` and family of a model."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES or not isinstance(model, FAMILIES[model_type].model):
        raise ValueError(f"{type(model).__name__} has no Hugging Face form; {', '.join(FAMILIES)} have one.")
    return model_type, FAMILIES[model_type]


def model_from_config(config: dict[str, Any], *, source: str, tensor_names: Callable[[], set[str]] = set) -> Network:
    """Return the model that a `config.json` describes.

    Args:
        tensor_names: returns the names of the folder's tensors, for what the configuration leaves open;
            `lm_head.weight` is among them only if it differs from the embedding.

    Raises:
        ValueError: for an architecture or a setting that is not supported.
    """
    model_type, family = family_named(config, source=source)
    for field, kind in family.kinds.items():
        if isinstance(kind, Only) and config.get(field) not in (None, kind.harmless):
            raise ValueError(f"{source}: {field} = {config[field]!r} is not supported.")
    values = _renamed(family, config)
    if missing := [name for name, kind in family.fields.items() if kind is int and values.get(name) is None]:
        raise ValueError(f"{source}: the configuration lacks {', '.join(missing)}.")
    try:
        if family.config is None:
            return Decoder(Config(model_type, **values))
        said = {name: default for name, default in family.fields.items() if default is not int} | config
        values = {field.name: said[field.name] for field in dataclasses.fields(family.config) if field.name in said}
        if family.model is t5.T5:
            values |= t5.spelt_fields(said, tensor_names)
        return family.model(family.config(**values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def config_of(model: Network) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    model_type, family = family_of(model)
    config = dataclasses.asdict(model.config) if dataclasses.is_dataclass(model.config) else model.config.to_dict()
    config |= t5.written_fields(model.config) if family.model is t5.T5 else {}
    absent = {name: default.absent for name, default in family.fields.items() if isinstance(default, Maybe)}
    # transformers reads some fields that are null, such as `head_dim`, otherwise than those that are absent.
    config = {name: value for name, value in config.items() if value is not None or absent.get(name) is not None}
    return {"architectures": [family.architecture], "model_type": model_type, **config}


def without_head(model: Network) -> Network:
    """Return the model without a head of its own, as a reward model is stored: its unembedding is the embedding."""
    if isinstance(model, Decoder) and not model.config.tie_word_embeddings:
        return dataclasses.replace(model, config=model.config.replace(tie_word_embeddings=True))
    return model


DEPTHS = ("num_hidden_layers", "num_decoder_layers")
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_experts")
WIDTHS += ("num_attention_heads", "num_key_value_heads", "num_kv_heads")


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Raise ValueError if a size that `config.json` claims is larger than the files can hold.

    A model of that size is not built, even as shapes alone.
    """
    _, family = family_named(config, source=source)
    largest = max([1 << 16, *map(math.prod, shapes.values())])
    deep = max(64, len(shapes)), f"the files hold {len(shapes)} tensors"
    wide = largest, f"no tensor has more than {largest} numbers"
    limits = dict.fromkeys(DEPTHS, deep) | dict.fromkeys(WIDTHS, wide)
    limits = {family.own.get(name, name): limit for name, limit in limits.items()}
    for name, value in config.items():
        most, reason = limits.get(pairs(family.spellings).get(name, name), (math.inf, ""))
        if isinstance(value, int) and value > most:
            raise ValueError(f"{source}: {name} is {value}, but {reason}.")


# The language model of a multimodal checkpoint ------------------------------------------------------------------------

LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
TEXT_SIZES = {  # that a `text_config` may leave out: transformers' defaults
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8}
    | {"intermediate_size": 9216},
    "llama": LLAMA_7B | {"intermediate_size": 11008},
    "mistral": LLAMA_7B | {"intermediate_size": 14336},
}
OTHERS = re.compile(r"(model\.)?(vision_|visual|multi_modal_projector|image_newline|audio_|embed_vision|embed_audio)")


def text_config(config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the configuration of the language model of a multimodal checkpoint; that of a plain one is itself."""
    inner = config.get("text_config")
    if inner is None or config.get("model_type") in FAMILIES:
        return config
    if not isinstance(inner, dict):
        raise ValueError(f"{source}: text_config must be an object, but is {inner!r}.")
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # these decide
    found = {name: config[name] for name in outer if config.get(name) is not None}
    return TEXT_SIZES.get(inner.get("model_type"), {}) | inner | found | {"multimodal": config.get("model_type")}


def text_tensors(
    config: Mapping[str, Any], tensors: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of the language model of a multimodal checkpoint, under the names of a plain one."""
    for name, tensor in tensors:
        if "multimodal" not in config:
            yield name, tensor
        elif not OTHERS.match(name):
            name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
            yield name.replace("model.lm_head.", "lm_head."), tensor
