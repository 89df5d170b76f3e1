"""The header of a GGUF file: key-values and tensor directory, read without loading a tensor.

Knows the container format (version 2 and 3) and how long the file must be for its tensors; arrays may be skipped, so
that a vocabulary of 150,000 pieces costs no memory. Does not know: which architectures run, what llama.cpp thinks of
the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from abliterate.contract.errors import ModelError

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 1 << 26
_MOST = 1 << 32
_DAMAGED = "The file is damaged: download, copy or convert it again"

# ggml's types: number → (name, elements a block, bytes a block)
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS",
    20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    name: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Arrays longer than the reader was asked to keep are None in `values`."""

    values: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def file_type(self) -> str:
        return FILE_TYPES.get(self.values.get("general.file_type", -1), "unknown")

    @property
    def chat_template(self) -> str:
        return str(self.values.get("tokenizer.chat_template") or "")

    @property
    def is_projector(self) -> bool:
        return self.values.get("general.type") in ("mmproj", "projector") or self.architecture == "clip"

    def number(self, key: str) -> int:
        """`<architecture>.<key>`, 0 where there is none."""
        value = self.values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) else 0


class _Reader:
    def __init__(self, file: BinaryIO, size: int, keep: int) -> None:
        self.file = file
        self.size = size
        self.keep = keep

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise ModelError("the GGUF ends inside its header", remedy="Copy the file again, whole")
        return data

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        if length > _LONGEST_STRING:
            raise ModelError(f"the GGUF holds a string of {length} bytes", remedy=_DAMAGED)
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ModelError(
                f"the GGUF holds a value of the unknown type {kind}",
                remedy="The file is too new or damaged: convert it again",
            )
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any] | None:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if count > self.size:
            raise ModelError(f"the GGUF announces an array of {count} values", remedy=_DAMAGED)
        if count <= self.keep or kind == _ARRAY:
            return [self.value(kind) for _ in range(count)]
        if kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("<Q"))
        elif kind in _SCALARS:
            self.file.seek(count * struct.calcsize(_SCALARS[kind]), 1)
        else:
            raise ModelError(f"the GGUF holds an array of the unknown type {kind}", remedy=_DAMAGED)
        return None

    def tensor(self) -> tuple[Tensor, int]:
        """A tensor's entry and where it ends, counted from the start of the data."""
        name = self.string()
        dimensions = self.scalar("<I")
        if dimensions > 8:
            raise ModelError(f"tensor {name!r} has {dimensions} dimensions", remedy=_DAMAGED)
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))
        kind, offset = self.scalar("<I"), self.scalar("<Q")
        label, elements, width = TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        return Tensor(name, label, shape), offset + math.prod(shape) // elements * width


def read_header(path: Path, *, keep: int = 64) -> Header:
    """Read the header, and check that the file is as long as its tensors need; raises ModelError.

    Arrays above `keep` values become None.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(_Reader(file, size, keep), size)
    except OSError as error:
        raise ModelError(
            f"can't read {path.name}: {error.strerror}", remedy="Check that it is there and may be read"
        ) from error
    except (struct.error, OverflowError, MemoryError, RecursionError) as error:
        raise ModelError(f"can't read the header of {path.name}: {error}", remedy=_DAMAGED) from error


def _read(reader: _Reader, size: int) -> Header:
    if size < 4 or reader.take(4) != MAGIC:
        raise ModelError("this is no GGUF file (wrong magic)", remedy="Give a .gguf file")
    version = reader.scalar("<I")
    if version not in (2, 3):
        raise ModelError(
            f"GGUF version {version} can't be read", remedy="Convert the model again with a current llama.cpp"
        )
    tensor_count, value_count = reader.scalar("<Q"), reader.scalar("<Q")
    if tensor_count > size or value_count > size:
        raise ModelError("the GGUF announces more tensors or values than the file could hold", remedy=_DAMAGED)
    values: dict[str, Any] = {}
    for _ in range(value_count):
        key = reader.string()
        values[key] = reader.value(reader.scalar("<I"))
    entries = [reader.tensor() for _ in range(tensor_count)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ModelError(f"the GGUF's alignment is {alignment!r}", remedy=_DAMAGED)
    start = -(-reader.file.tell() // alignment) * alignment
    needed = start + max((end for _, end in entries), default=0)
    if needed > size:
        raise ModelError(
            f"the GGUF is truncated: {size} bytes of at least {needed}", remedy="Copy or download the file again, whole"
        )
    return Header(values, tuple(tensor for tensor, _ in entries))
