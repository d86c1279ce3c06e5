"""Model families of `config.json`: fields, defaults and tensor names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jaxrl_llm.models.decoder import Network
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.llama import Llama, LlamaConfig, StableLM, StableLMConfig
from jaxrl_llm.models.rotary import rope_from_config, rope_parameters
from jaxrl_llm.models.t5 import T5, T5Config


@dataclasses.dataclass(frozen=True)
class Family:
    """The Hugging Face format of one architecture."""

    model: type[Network]
    config: type
    architecture: str
    prefix: str  # of every tensor but the head; some files lack it
    transposed: bool  # linear kernels are stored [out, in]
    buffers: re.Pattern[str]  # tensors of older files that are not parameters
    refused: dict[str, Any]  # fields that are not supported, with the values under which they have no effect
    copies: tuple[str, ...]  # tensors, without prefix, that may repeat the embedding
    embedding: str


ROTARY_BUFFERS = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rotary_emb\.inv_freq")
SILU = (None, "silu", "swish")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

FAMILIES = {
    "gpt2": Family(
        GPT2,
        GPT2Config,
        "GPT2LMHeadModel",
        prefix="transformer.",
        transposed=False,
        buffers=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
        refused={"add_cross_attention": (None, False)},
        copies=("lm_head.weight",),
        embedding="wte.weight",
    ),
    "llama": Family(
        Llama,
        LlamaConfig,
        "LlamaForCausalLM",
        prefix="model.",
        transposed=True,
        buffers=ROTARY_BUFFERS,
        refused={"hidden_act": SILU},
        copies=("lm_head.weight",),
        embedding="embed_tokens.weight",
    ),
    "stablelm": Family(
        StableLM,
        StableLMConfig,
        "StableLmForCausalLM",
        prefix="model.",
        transposed=True,
        buffers=ROTARY_BUFFERS,
        refused={"hidden_act": SILU},
        copies=("lm_head.weight",),
        embedding="embed_tokens.weight",
    ),
    "t5": Family(
        T5,
        T5Config,
        "T5ForConditionalGeneration",
        prefix="",
        transposed=True,
        buffers=re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
        refused={"is_encoder_decoder": (None, True), "is_decoder": (None, False)},
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        embedding="shared.weight",
    ),
}

REQUIRED = {  # fields that a config.json must have
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head"),
    "llama": SIZES,
    "stablelm": SIZES,
    "t5": ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
}


def family_of(model: Network) -> tuple[str, Family]:
    """Return `model_type` and family of a model."""
    for model_type, family in FAMILIES.items():
        if isinstance(model, family.model):
            return model_type, family
    raise ValueError(f"{type(model).__name__} has no Hugging Face form; {', '.join(FAMILIES)} have one.")


def model_from_config(config: dict[str, Any], *, source: str, tensor_names: Callable[[], set[str]] = set) -> Network:
    """Return the model that a `config.json` describes.

    Args:
        tensor_names: returns the names of the folder's tensors, for what the configuration leaves open;
            `lm_head.weight` is among them only if it differs from the embedding.

    Raises:
        ValueError: for an architecture or a setting that is not supported.
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
    if model_type in ("llama", "stablelm"):
        values |= _rotary(model_type, config, source)
    if model_type == "t5":
        values |= _t5(config, source, tensor_names)
    missing = [name for name in REQUIRED[model_type] if name not in config]
    if missing:
        raise ValueError(f"{source}: the configuration lacks {', '.join(missing)}.")
    try:
        return family.model(family.config(**values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _rotary(model_type: str, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Return rotary settings of either form, and heads; for Llama also the format's defaults that differ from ours."""
    values = rope_from_config(config, source, rotated=0.25 if model_type == "stablelm" else 1)
    given = config.get("num_key_value_heads")
    values["num_key_value_heads"] = config.get("num_attention_heads") if given is None else given
    if model_type == "stablelm":
        return values
    if (factor := values.pop("partial_rotary_factor")) != 1:
        raise ValueError(f"{source}: partial_rotary_factor = {factor!r} is not supported.")
    formats = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    return {name: value for name, value in formats.items() if name not in config} | values


def _t5(config: dict[str, Any], source: str, tensor_names: Callable[[], set[str]]) -> dict[str, Any]:
    """Return T5's fields that have more than one spelling.

    Before transformers 5, `tie_word_embeddings` decided over the head and its scale. Since then it is always true,
    `scale_decoder_outputs` decides over the scale, and the head is tied unless the files have a head that differs from
    the embedding.
    """
    tied, scaled = config.get("tie_word_embeddings"), config.get("scale_decoder_outputs")
    tied = True if tied is None else tied
    values = {"scale_decoder_outputs": tied if scaled is None else scaled, "tie_word_embeddings": tied}
    if tied is True and isinstance(scaled, bool) and "lm_head.weight" in tensor_names():
        values["tie_word_embeddings"] = False
    if config.get("decoder_start_token_id") is None:
        values["decoder_start_token_id"] = config.get("pad_token_id") or 0
    projection, named = config.get("feed_forward_proj", "relu"), config.get("dense_act_fn")
    meant = "gelu_new" if projection == "gated-gelu" else str(projection).removeprefix("gated-")
    if named not in (None, meant):
        raise ValueError(f"{source}: feed_forward_proj is {projection!r}, but dense_act_fn is {named!r}.")
    return values


def config_of(model: Network) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    model_type, family = family_of(model)
    config = dataclasses.asdict(model.config)
    if model_type in ("llama", "stablelm"):
        del config["rope_scaling"]
        config["rope_parameters"] = rope_parameters(model.config.rope_theta, model.config.rope_scaling)
        config["hidden_act"] = "silu"
    if model_type == "llama":
        config["head_dim"] = model.config.head_size
    if model_type == "stablelm":
        config["rope_parameters"]["partial_rotary_factor"] = model.config.partial_rotary_factor
    if model_type == "t5":
        config["num_decoder_layers"] = model.config.decoder_layers
        config["scale_decoder_outputs"] = model.config.output_scale != 1
        config["is_encoder_decoder"] = True
    return {"architectures": [family.architecture], "model_type": model_type, **config}
