"""Llama models in GGUF files, llama.cpp's format: configuration, weights and tokenizer as Hugging Face's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl_llm.models import gguf_container
from jaxrl_llm.models.gguf_container import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A GGUF file whose header is read and checked; the weights stay on disk until `tensors` walks over them."""

    path: Path
    config: dict[str, Any]  # what the Hugging Face config.json of this model says
    fields: dict[str, Any]  # the file's own metadata
    stored: dict[str, Tensor]  # by the file's own names

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each Hugging Face name with its float32 weights, one tensor in memory at a time."""
        from gguf import GGMLQuantizationType, quants

        expected = _expected_tensors(self.config)
        for name, tensor in self.stored.items():
            raw = np.fromfile(self.path, np.uint8, math.prod(tensor.stored_shape), offset=tensor.start)
            weights = quants.dequantize(raw.reshape(tensor.stored_shape), GGMLQuantizationType(tensor.type))
            if ".attn_q." in name or ".attn_k." in name:
                weights = _rotary_halves(weights, self.config["head_dim"])
            yield expected[name][0], weights

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer of the file's own fields, with its chat template; None if it has none.

        Raises:
            ValueError: the file's tokenizer is incomplete, or of a kind that is not known here.
        """
        from jaxrl_llm.models import gguf_tokenizer

        return gguf_tokenizer.build(self.fields, str(self.path))


def read(path: Path) -> GGUFModel:
    """The model in a GGUF file of architecture llama.

    Raises:
        ValueError: it is not a GGUF file, is cut short, or holds what a plain llama in float32 cannot be made of.
    """
    path = Path(path)
    fields, stored = gguf_container.read_header(path)
    if (architecture := fields.get("general.architecture")) != "llama":
        raise ValueError(f"{path} must be of architecture llama, but is of {architecture!r}.")
    config = _config(str(path), fields, stored)
    _check_tensors(str(path), config, {name: tensor.shape for name, tensor in stored.items()})
    return GGUFModel(path, config, fields, stored)


# From llama.cpp's names to Hugging Face's ----------------------------------------------------------------------------


def _config(name: str, fields: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Any]:
    def size(key: str, default: int | None = None) -> int:
        return _positive(name, fields, f"llama.{key}", default, int)

    def number(key: str, default: float | None = None) -> float:
        return _shortest(_positive(name, fields, f"llama.{key}", default, float))

    width, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := size(key, head_dim)) != head_dim or found % 2:
            raise ValueError(f"{name}: llama.{key} must be even and the heads' {head_dim}, but is {found}.")
    return {
        "model_type": "llama",
        "vocab_size": _vocab_size(name, fields, stored),
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(name, fields, stored),
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }


def _vocab_size(name: str, fields: dict[str, Any], stored: dict[str, Tensor]) -> int:
    tokens = len(fields.get("tokenizer.ggml.tokens", ()))
    rows = stored["token_embd.weight"].shape[0] if "token_embd.weight" in stored else 0
    if not rows or rows < tokens:
        raise ValueError(f"{name}: token_embd.weight must have a row for each of {tokens} tokens, but has {rows}.")
    return rows


def _positive(name: str, fields: dict[str, Any], key: str, default: Any, kind: type) -> Any:
    value = fields.get(key, default)
    if type(value) is not kind or not value > 0:
        raise ValueError(f"{name}: {key} must be a positive {kind.__name__}, but is {value!r}.")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(name: str, fields: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in stored:
        raise ValueError(
            f"{name} scales its rotary frequencies one by one (rope_freqs.weight, as Llama 3.1 does), "
            "which is not supported."
        )
    kind = fields.get("llama.rope.scaling.type", "linear")  # where a factor stands alone, llama.cpp reads it so
    if kind not in ("none", "linear"):
        raise ValueError(f"{name}: llama.rope.scaling.type must be none or linear, but is {kind!r}.")
    old = _positive(name, fields, "llama.rope.scale_linear", 1.0, float)
    factor = _shortest(_positive(name, fields, "llama.rope.scaling.factor", old, float))
    return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of every tensor a llama may have: GGUF's name -> Hugging Face's name, shape."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    query, key = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    block = {
        "attn_norm": ("input_layernorm", (width,)),
        "attn_q": ("self_attn.q_proj", (query, width)),
        "attn_k": ("self_attn.k_proj", (key, width)),
        "attn_v": ("self_attn.v_proj", (key, width)),
        "attn_output": ("self_attn.o_proj", (width, query)),
        "ffn_norm": ("post_attention_layernorm", (width,)),
        "ffn_gate": ("mlp.gate_proj", (inner, width)),
        "ffn_up": ("mlp.up_proj", (inner, width)),
        "ffn_down": ("mlp.down_proj", (width, inner)),
    }
    table = (config["vocab_size"], width)
    expected = {"token_embd.weight": ("model.embed_tokens.weight", table), "output.weight": ("lm_head.weight", table)}
    expected["output_norm.weight"] = ("model.norm.weight", (width,))
    for layer in range(config["num_hidden_layers"]):
        for ours, (theirs, shape) in block.items():
            expected[f"blk.{layer}.{ours}.weight"] = (f"model.layers.{layer}.{theirs}.weight", shape)
            if len(shape) == 2:
                expected[f"blk.{layer}.{ours}.bias"] = (f"model.layers.{layer}.{theirs}.bias", shape[:1])
    return expected


def _check_tensors(name: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    if config["num_hidden_layers"] > len(shapes):
        raise ValueError(f"{name} says it has {config['num_hidden_layers']} layers, but holds {len(shapes)} tensors.")
    expected = _expected_tensors(config)
    for tensor, shape in shapes.items():
        if tensor not in expected:
            raise ValueError(f"{name}: a llama of {config['num_hidden_layers']} layers has no place for {tensor}.")
        if shape != expected[tensor][1]:
            raise ValueError(f"{name}: {tensor} must be of shape {expected[tensor][1]}, but is of shape {shape}.")
    optional = {"output.weight", *(tensor for tensor in expected if tensor.endswith(".bias"))}
    if missing := [tensor for tensor in expected if tensor not in shapes and tensor not in optional]:
        raise ValueError(f"{name} must have {len(missing)} more tensors, {missing[0]} among them.")


def _rotary_halves(weights: np.ndarray, head_dim: int) -> np.ndarray:
    """Each head's rows (0, 1), (2, 3), ..., llama.cpp's rotary pairs, as Hugging Face's: row i with row i + half."""
    pairs = weights.reshape(-1, head_dim // 2, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
