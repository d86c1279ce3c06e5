"""Models in GGUF files, llama.cpp's format: configuration, weights and tokenizer as Hugging Face's.

The header (layout: ggml's docs/gguf.md) is read here and not by the gguf package's reader, which takes seven times as
long on a 135M model and meets a file that is cut short with whatever error its arrays then raise. Dequantising is left
to that package.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxrl_llm.models import configuration, families, huggingface, rotary

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
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data, str(path))
            (version,) = header.numbers("I")
            if version not in (2, 3):
                raise ValueError(
                    f"{path} must be little-endian GGUF of version 2 or 3, but its version reads {version}."
                )
            tensor_count, field_count = header.numbers("Q", 2)
            fields = header.unique((header.string(), header.value()) for _ in range(field_count))
            return fields, header.tensors(tensor_count, fields.get("general.alignment", 32))


@dataclasses.dataclass
class _Header:
    """A GGUF header, read in order; an item that would reach past the end of the file raises before it is read."""

    data: mmap.mmap
    name: str
    at: int = 4  # after the magic bytes

    def require(self, count: int, what: str) -> None:
        if self.at + count > len(self.data):
            end = f"{what} ends at byte {self.at + count} of {len(self.data)}"
            raise ValueError(f"{self.name} is cut short or damaged: {end}.")

    def take(self, count: int) -> bytes:
        start, end = self.at, self.at + count
        if end > len(self.data):
            self.require(count, f"what begins at byte {start}")
        self.at = end
        return self.data[start:end]

    def numbers(self, code: str, count: int = 1) -> tuple:
        raw = self.take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", raw)

    def string(self) -> str:
        raw = self.take(int.from_bytes(self.take(8), "little"))
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

    def unique(self, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{self.name} is damaged: {name} occurs twice.")
            found[name] = value
        return found

    def tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        described = []
        for _ in range(count):
            name, (dimensions,) = self.string(), self.numbers("I")
            shape = self.numbers("Q", dimensions)[::-1]
            described.append((name, shape, *self.numbers("I"), *self.numbers("Q")))
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.name} must align its tensors to a positive number, but says {alignment!r}.")
        self.at += -self.at % alignment
        return self.unique((name, self.place(name, *others)) for name, *others in described)

    def place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        if (block := _block(kind)) is None:
            raise ValueError(f"{self.name}: {name} is of GGML type {kind}, which does not turn into float32.")
        weights, size = block
        if not shape or shape[-1] % weights:
            raise ValueError(f"{self.name}: the rows of {name}, {shape}, must be whole blocks of {weights}.")
        stored_shape = (*shape[:-1], shape[-1] // weights * size)
        self.require(offset + math.prod(stored_shape), f"tensor {name}")
        return Tensor(shape, kind, stored_shape, self.at + offset)


@functools.cache
def _block(kind: int) -> tuple[int, int] | None:
    """Return the weights and bytes of a quantised block; None if such blocks cannot be dequantised."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        quants.dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType(kind))
    except (KeyError, ValueError, NotImplementedError):
        return None
    return weights, size


# A model --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A GGUF file with a checked header; the weights stay on disk until `tensors` reads them."""

    path: Path
    config: dict[str, Any]  # as the Hugging Face config.json of this model
    fields: dict[str, Any]  # the file's own metadata
    stored: dict[str, Tensor]  # by the file's own names
    names: dict[str, str]  # the Hugging Face names
    norm_offset: float  # added to the stored scales of norms

    def tensors(self) -> Iterator[tuple[str, Weights]]:
        """Yield each Hugging Face name with its weights, which are read as they are indexed."""
        permuted = ARCHITECTURES[self.fields["general.architecture"]].permuted
        for name, tensor in self.stored.items():
            head_dim = self.config["head_dim"] if permuted and (".attn_q." in name or ".attn_k." in name) else None
            offset = self.norm_offset if name.endswith("norm.weight") else 0.0
            yield self.names[name], Weights(self.path, tensor, head_dim, offset)

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Return the tokenizer of the file's metadata, with its chat template; None if it has none.

        Raises:
            ValueError: if the file's tokenizer is incomplete or of an unknown kind.
        """
        from jaxrl_llm.models import tokenizers

        return tokenizers.from_gguf(self.fields, str(self.path))


def read(path: Path) -> GGUFModel:
    """Read the header of a GGUF file of one of `ARCHITECTURES`.

    Raises:
        ValueError: if it is not a GGUF file, is truncated, is a part of a split one, or has fields or tensors that a
            model of its architecture does not support.
    """
    path = Path(path)
    fields, stored = read_header(path)
    if (parts := fields.get("split.count", 0)) not in (0, 1):
        raise ValueError(f"{path} is one of {parts} parts of a model; llama-gguf-split --merge joins them.")
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path} must be of one of the architectures {known}, but is of {architecture!r}.")
    header = _Metadata(path, architecture, fields, stored)
    config = _config(header)
    # The tensors of all layers have the same shapes, so that a small file cannot demand a large model.
    model = configuration.model_from_config(config | {"num_hidden_layers": 1, "layer_types": None}, source=str(path))
    stored = {name: tensor for name, tensor in stored.items() if name not in ROPE_TENSORS}
    names = _check_tensors(header, stored, huggingface.named_params(model), config["num_hidden_layers"])
    return GGUFModel(path, config, fields, stored, names, model.config.description.norm.offset)


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """The fields of an architecture, checked as they are read."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    stored: Mapping[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{key}", default)

    def positive(self, key: str, default: Any, kind: type) -> Any:
        value = self.get(key, default)
        if type(value) is not kind or not value > 0:
            self.refuse(key, f"a positive {kind.__name__}", value)
        return value

    def count(self, key: str, default: int | None = None) -> int:
        return self.positive(key, default, int)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a number that is at most a dimension of a tensor."""
        value = self.count(key, default)
        if value > (largest := max((max(tensor.shape) for tensor in self.stored.values()), default=0)):
            self.refuse(key, f"at most the largest dimension of a tensor, {largest}", value)
        return value

    @property
    def layers(self) -> int:
        if (value := self.count("block_count")) > len(self.stored):
            raise ValueError(f"{self.path} says it has {value} layers, but holds {len(self.stored)} tensors.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return _shortest(self.positive(key, default, float))

    def numbers(self, keys: Mapping[str, str]) -> dict[str, float]:
        """Return those that are there, by Hugging Face's name."""
        return {name: self.number(key) for name, key in keys.items() if self.get(key) is not None}

    def refuse(self, key: str, expected: str, value: Any) -> None:
        raise ValueError(f"{self.path}: {self.architecture}.{key} must be {expected}, but is {value!r}.")

    def divisors(self, name: str, count: int) -> list[float]:
        """Return a vector of numbers above 0."""
        if name not in self.stored or self.stored[name].shape != (count,):
            found = f"of shape {self.stored[name].shape}" if name in self.stored else "missing"
            raise ValueError(f"{self.path}: {name} must be of shape {(count,)}, but is {found}.")
        values = [_shortest(each) for each in Weights(self.path, self.stored[name])[:]]
        if bad := [each for each in values if not 0 < each < math.inf]:
            raise ValueError(f"{self.path}: {name} must be numbers above 0, but has {bad[0]}.")
        return values


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a tensor as the Hugging Face tensor has them, of which an index reads and dequantises rows."""

    path: Path
    tensor: Tensor
    head_dim: int | None = None  # if rows are in the order of llama.cpp's rotary pairs, head by head
    offset: float = 0.0  # is subtracted
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        length, size, group = self.shape[0], math.prod(self.tensor.stored_shape), self.head_dim or 1
        start, stop, _ = rows.indices(length)
        first, last = start // group * group, -(-stop // group) * group
        if len(self.shape) == 1:  # a vector is one row of blocks
            first, last = 0, length
        at, end = (self.tensor.start + size * row // length for row in (first, last))
        raw = np.fromfile(self.path, np.uint8, end - at, offset=at).reshape(-1, self.tensor.stored_shape[-1])
        weights = quants.dequantize(raw, GGMLQuantizationType(self.tensor.type)).reshape(-1, *self.shape[1:])
        weights = _rotary_halves(weights, self.head_dim) if self.head_dim else weights
        weights = weights - np.float32(self.offset) if self.offset else weights
        return weights[start - first : stop - first]


def _shortest(value: float) -> float:
    """Return the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# From llama.cpp's fields to Hugging Face's ----------------------------------------------------------------------------


def _config(header: _Metadata) -> dict[str, Any]:
    row = ARCHITECTURES[header.architecture]
    width, heads = header.size("embedding_length"), header.size("attention.head_count")
    head_dim = header.size("attention.key_length", width // heads)
    if (found := header.size("attention.value_length", head_dim)) != head_dim:
        header.refuse("attention.value_length", f"that of the keys, {head_dim}", found)
    turning, theta = header.size("rope.dimension_count", head_dim), header.number("rope.freq_base", 10000.0)
    if turning % 2 or turning > head_dim or (turning < head_dim and not row.partial):
        header.refuse("rope.dimension_count", f"even and {'at most ' * row.partial}the heads' {head_dim}", turning)
    config = {
        "model_type": row.model_type,
        "vocab_size": _vocab_size(header),
        "hidden_size": width,
        "intermediate_size": header.size("feed_forward_length"),
        "num_hidden_layers": header.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": header.count("context_length"),
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, theta, turning),
        "tie_word_embeddings": "output.weight" not in header.stored,
        "bos_token_id": header.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(header),
    }
    config |= row.fields(header, config)
    if "head_dim" not in families.FAMILIES[row.model_type].fields:
        del config["head_dim"]
    return config | ({"partial_rotary_factor": turning / head_dim} if turning < head_dim else {})


def _vocab_size(header: _Metadata) -> int:
    tokens = header.fields.get("tokenizer.ggml.tokens", [])
    tokens = len(tokens) if isinstance(tokens, list) else 0
    rows = header.stored["token_embd.weight"].shape[0] if "token_embd.weight" in header.stored else 0
    if not rows or rows < tokens:
        raise ValueError(
            f"{header.path}: token_embd.weight must have a row for each of {tokens} tokens, but has {rows}."
        )
    return rows


def _ends(header: _Metadata) -> int | list[int] | None:
    """Return the tokens that end a text, a turn or a message: one, or a list of several."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ends = [header.fields[key] for key in keys if key in header.fields]
    if bad := [end for end in ends if type(end) is not int]:
        raise ValueError(f"{header.path}: {', '.join(keys)} must be token ids, but one is {bad[0]!r}.")
    ends = list(dict.fromkeys(ends))
    return ends if len(ends) > 1 else ends[0] if ends else None


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def _rope_scaling(header: _Metadata, theta: float, turning: int) -> dict[str, Any] | None:
    context = header.count("context_length")
    original = header.count("rope.scaling.original_context_length", context)
    kind = header.get("rope.scaling.type", "linear")  # as llama.cpp reads a factor without a type
    if kind not in ("none", "linear", "yarn", "longrope"):
        header.refuse("rope.scaling.type", "none, linear, yarn or longrope", kind)
    factor = header.number("rope.scaling.factor", header.positive("rope.scale_linear", 1.0, float))
    if kind == "longrope" or not header.stored.keys().isdisjoint(ROPE_TENSORS):
        if kind == "yarn" or (kind == "linear" and factor != 1):
            header.refuse("rope.scaling.type", "none where there are tensors of rotary factors", kind)
        if "rope_freqs.weight" in header.stored:
            return _divided(header.divisors("rope_freqs.weight", turning // 2), theta, context)
        short, long = (header.divisors(name, turning // 2) for name in ROPE_TENSORS[1:])
        settings = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        settings["original_max_position_embeddings"] = original
        return settings | header.numbers({"attention_factor": "rope.scaling.attn_factor"})
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    for key, harmless in YARN_CONSTANTS.items():
        if header.get(key, harmless) != harmless:
            header.refuse(key, f"{harmless} with yarn", header.get(key))
    settings = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return settings | header.numbers({name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")})


YARN_CONSTANTS = {  # the values under which these fields have no effect
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": None,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def _divided(divisors: list[float], theta: float, context: int) -> dict[str, Any]:
    """Return the settings for given divisors of the rotary frequencies.

    They are Llama 3's, whose scaling is recovered, or others, which only LongRoPE's settings can express.
    """
    llama3 = {"rope_type": "llama3", "factor": max(divisors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    plain, scaled = (
        np.asarray(rotary.rotary({"rope_theta": theta} | settings, 2 * len(divisors), max_length=context).frequencies)
        for settings in ({}, llama3)
    )
    if np.allclose(plain / scaled, divisors, rtol=1e-4, atol=0):
        return llama3
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "original_max_position_embeddings": context,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _llama(header: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in header.stored, "mlp_bias": "blk.0.ffn_up.bias" in header.stored}


def _gemma2(header: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    fields = {name: header.number(name, default) for name, default in caps.items()}
    return fields | _scores(config, 46) | _windows(header, 4096)


def _gemma3(header: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    optional = {"final_logit_softcapping": "final_logit_softcapping", "rope_local_base_freq": "rope.freq_base_swa"}
    return _scores(config, 62) | _windows(header, 0) | header.numbers(optional)


def _scores(config: dict[str, Any], layers: int) -> dict[str, int]:
    """Return the scale of scores, which is not in the file: in the largest model, of so many layers, it is unusual."""
    largest = config["num_hidden_layers"] == layers
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return {"query_pre_attn_scalar": scalar}


def _windows(header: _Metadata, default: int) -> dict[str, Any]:
    """Return the window, and the layers that have it unless they are the family's default."""
    window, pattern = (header.get(f"attention.sliding_window{end}") for end in ("", "_pattern"))
    window = default if window is None else window
    if type(window) is not int or window < 0:
        header.refuse("attention.sliding_window", "0 or above", window)
    pattern = pattern if window else 1
    if pattern is None:
        return {"sliding_window": window}
    if type(pattern) is int and pattern >= 0:
        pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(header.layers)]
    if not isinstance(pattern, list):
        header.refuse("attention.sliding_window_pattern", "a list, or 0 or above", pattern)
    types = ["sliding_attention" if each else "full_attention" for each in pattern]
    return {"sliding_window": window or None, "layer_types": types}


def _phi3(header: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    original = header.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    window = header.get("attention.sliding_window") or None  # 0 in Phi 4
    return {"original_max_position_embeddings": original, "sliding_window": window}


class Architecture(NamedTuple):
    """The GGUF form of one family."""

    model_type: str
    names: Mapping[str, str] = {}  # the modules that are not named as in MODULES
    fields: Callable[[_Metadata, dict[str, Any]], dict[str, Any]] = lambda header, config: {}  # beside the common ones
    permuted: bool = False  # rows of q and k are in the order of llama.cpp's rotary pairs
    partial: bool = False  # rotary positions may be on a part of each head


GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES = {
    "llama": Architecture("llama", fields=_llama, permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", GEMMA_NORMS, _gemma2),
    "gemma3": Architecture("gemma3_text", GEMMA_NORMS, _gemma3),
    "phi3": Architecture("phi3", {"ffn_up": "mlp.gate_up_proj"}, _phi3, partial=True),
}

# From llama.cpp's tensors to Hugging Face's ---------------------------------------------------------------------------

MODULES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _check_tensors(
    header: _Metadata, stored: Mapping[str, Tensor], slots: Mapping[str, huggingface.Slot], layers: int
) -> dict[str, str]:
    """Return the Hugging Face name of each stored tensor, given the slots of a model of one layer."""
    row = ARCHITECTURES[header.architecture]
    ours = {theirs: name for name, theirs in (MODULES | row.names).items()}
    expected = {}
    for name, slot in slots.items():
        module, kind = name.removeprefix("layers.0.").rsplit(".", 1)
        prefix = "" if module == "lm_head" else families.FAMILIES[row.model_type].prefix
        for layer in range(layers) if name.startswith("layers.0.") else [None]:
            block, place = ("", "") if layer is None else (f"blk.{layer}.", f"layers.{layer}.")
            expected[f"{block}{ours[module]}.{kind}"] = f"{prefix}{place}{module}.{kind}", slot.shape
    for name, tensor in stored.items():
        if name not in expected:
            raise ValueError(f"{header.path}: a {header.architecture} of {layers} layers has no place for {name}.")
        if tensor.shape != expected[name][1]:
            shapes = f"of shape {expected[name][1]}, but is of shape {tensor.shape}"
            raise ValueError(f"{header.path}: {name} must be {shapes}.")
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(f"{header.path} must have {len(missing)} more tensors, {missing[0]} among them.")
    return {name: expected[name][0] for name in stored}


def _rotary_halves(weights: np.ndarray, head_dim: int) -> np.ndarray:
    """Return each head's rows (0, 1), (2, 3), ..., llama.cpp's rotary pairs, as Hugging Face's (i, i + half)."""
    pairs = weights.reshape(-1, head_dim // 2, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
