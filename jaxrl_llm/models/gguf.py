"""Llama models in GGUF files, llama.cpp's format: configuration, weights and tokenizer as Hugging Face's.

The header (layout: ggml's docs/gguf.md) is read here and not by the gguf package's reader, which takes seven times as
long on a 135M model and meets a file that is cut short with whatever error its arrays then raise. Dequantising is left
to that package.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """The location of a tensor: its shape is PyTorch's (outputs, inputs), its rows are quantised blocks."""

    shape: tuple[int, ...]
    type: int
    stored_shape: tuple[int, ...]  # in bytes
    start: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the metadata fields and the tensors of a GGUF file, by name.

    Raises:
        ValueError: if it is not a GGUF file, is truncated or damaged, or has tensors that cannot be dequantised.
    """
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it must start with b'GGUF', but starts with {magic!r}.")
        header = _Header(file, str(path), path.stat().st_size)
        (version,) = header.numbers("I")
        if version not in (2, 3):
            raise ValueError(f"{path} must be little-endian GGUF of version 2 or 3, but its version reads {version}.")
        tensor_count, field_count = header.numbers("Q", 2)
        fields = {header.string(): header.value() for _ in range(field_count)}
        return fields, header.tensors(tensor_count, fields.get("general.alignment", 32))


@dataclasses.dataclass
class _Header:
    """A GGUF header, read in order; an item that would reach past the end of the file raises before it is read."""

    file: BinaryIO
    name: str
    size: int

    def require(self, count: int, what: str) -> None:
        end = self.file.tell() + count
        if end > self.size:
            raise ValueError(f"{self.name} is cut short or damaged: {what} ends at byte {end} of {self.size}.")

    def take(self, count: int) -> bytes:
        self.require(count, f"what begins at byte {self.file.tell()}")
        return self.file.read(count)

    def numbers(self, code: str, count: int = 1) -> tuple:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def string(self) -> str:
        raw = self.take(*self.numbers("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.name} is damaged: {raw[:40]!r} should be UTF-8 text.") from None

    def value(self) -> Any:
        (kind,) = self.numbers("I")
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"{self.name} is damaged: a metadata value is of kind {kind}, which GGUF does not have.")
        kind, count = *self.numbers("I"), *self.numbers("Q")
        if kind in SCALARS:
            return list(self.numbers(SCALARS[kind], count))
        if kind != STRING:
            raise ValueError(f"{self.name} has a metadata array of kind {kind}; only numbers and strings are read.")
        self.require(8 * count, f"a list of {count} strings")
        return [self.string() for _ in range(count)]

    def tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        described = []
        for _ in range(count):
            name, (dimensions,) = self.string(), self.numbers("I")
            shape = self.numbers("Q", dimensions)[::-1]
            described.append((name, shape, *self.numbers("I"), *self.numbers("Q")))
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.name} must align its tensors to a positive number, but says {alignment!r}.")
        self.file.seek(-self.file.tell() % alignment, 1)
        return {name: self.place(name, shape, kind, offset) for name, shape, kind, offset in described}

    def place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        try:
            weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            quants.dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType(kind))
        except (KeyError, ValueError, NotImplementedError):
            raise ValueError(f"{self.name}: {name} is of GGML type {kind}, which does not turn into float32.") from None
        if not shape or shape[-1] % weights:
            raise ValueError(f"{self.name}: the rows of {name}, {shape}, must be whole blocks of {weights}.")
        stored_shape = (*shape[:-1], shape[-1] // weights * size)
        self.require(offset + math.prod(stored_shape), f"tensor {name}")
        return Tensor(shape, kind, stored_shape, self.file.tell() + offset)


# A model --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A GGUF file with a checked header; the weights stay on disk until `tensors` reads them."""

    path: Path
    config: dict[str, Any]  # as the Hugging Face config.json of this model
    fields: dict[str, Any]  # the file's own metadata
    stored: dict[str, Tensor]  # by the file's own names

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each Hugging Face name with its float32 weights, one tensor in memory at a time."""
        from gguf import GGMLQuantizationType, quants

        expected = _expected_tensors(self.config)
        for name, tensor in self.stored.items():
            raw = np.fromfile(self.path, np.uint8, math.prod(tensor.stored_shape), offset=tensor.start)
            weights = quants.dequantize(raw.reshape(tensor.stored_shape), GGMLQuantizationType(tensor.type))
            if ".attn_q." in name or ".attn_k." in name:
                weights = _rotary_halves(weights, self.config["head_dim"])
            yield expected[name][0], weights

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Return the tokenizer of the file's metadata, with its chat template; None if it has none.

        Raises:
            ValueError: if the file's tokenizer is incomplete or of an unknown kind.
        """
        from jaxrl_llm.models import tokenizers

        return tokenizers.from_gguf(self.fields, str(self.path))


def read(path: Path) -> GGUFModel:
    """Read the header of a GGUF file of architecture llama.

    Raises:
        ValueError: if it is not a GGUF file, is truncated, or has fields or tensors that our Llama does not support.
    """
    path = Path(path)
    fields, stored = read_header(path)
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
    """Return the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(name: str, fields: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in stored:
        raise ValueError(
            f"{name} scales its rotary frequencies one by one (rope_freqs.weight, as Llama 3.1 does), "
            "which is not supported."
        )
    kind = fields.get("llama.rope.scaling.type", "linear")  # as llama.cpp reads a factor without a type
    if kind not in ("none", "linear"):
        raise ValueError(f"{name}: llama.rope.scaling.type must be none or linear, but is {kind!r}.")
    old = _positive(name, fields, "llama.rope.scale_linear", 1.0, float)
    factor = _shortest(_positive(name, fields, "llama.rope.scaling.factor", old, float))
    return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return Hugging Face name and shape of every possible tensor of a llama, by GGUF name."""
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
