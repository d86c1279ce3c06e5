"""The container of GGUF: metadata, and where each tensor lies (layout: ggml's docs/gguf.md).

The header is read here and not by the gguf package's reader, which takes seven times as long on a 135M model and meets
a file that is cut short with whatever error its arrays then raise. Dequantising is left to that package.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """Where a tensor lies: its shape is PyTorch's (outputs, inputs), its rows are stored in quantised blocks."""

    shape: tuple[int, ...]
    type: int
    stored_shape: tuple[int, ...]  # of bytes
    start: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata fields and the tensors of a GGUF file, by name.

    Raises:
        ValueError: it is not a GGUF file, is cut short or damaged, or has tensors that do not turn into float32.
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
    """A GGUF header, taken in order; whatever would reach past the end of the file raises before it is read."""

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
