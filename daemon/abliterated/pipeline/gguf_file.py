"""The structure of a GGUF file: its key-values as byte ranges, its tensors as places. Nothing is copied or decoded
that need not be, so that what is written back is byte for byte what was read.

Reads little-endian versions 2 and 3 and checks every length against the file. Does not know what a tensor means,
and does not decode its numbers.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from abliterate.contract.errors import ModelError

MAGIC: Final = b"GGUF"
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4

Scalar: TypeAlias = int | float | bool | str
_FORMATS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class KeyValue:
    """A key and where its bytes stand, from the key's length to the value's end. `value`: None for arrays."""

    key: str
    type: int
    start: int
    end: int
    value: Scalar | None


@dataclass(frozen=True)
class Tensor:
    """A tensor's place. `shape` counts as numpy does, rows first; `start` is from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int

    @property
    def row_size(self) -> int:
        """Bytes of one row (of the last axis)."""
        return row_bytes(self.type, self.shape[-1])


@dataclass(frozen=True)
class GgufFile:
    """A file's structure."""

    path: Path
    version: int
    size: int
    alignment: int
    key_values: tuple[KeyValue, ...]
    tensors: tuple[Tensor, ...]
    data_start: int

    @property
    def values(self) -> Mapping[str, Scalar]:
        """The scalar and string values by key."""
        return {entry.key: entry.value for entry in self.key_values if entry.value is not None}

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        found = self.values.get("general.architecture")
        if not isinstance(found, str) or not found:
            raise self.broken("names no architecture", "Give a language model's GGUF")
        return found

    def number(self, key: str) -> int:
        """A whole number the architecture must have, `ARCH.key`."""
        found = self.values.get(f"{self.architecture}.{key}")
        if type(found) is not int or found < 1:
            raise self.broken(f"has no {self.architecture}.{key}", "Give a language model's GGUF, not a projector's")
        return int(found)

    def broken(self, what: str, remedy: str = "Download or pull it again") -> ModelError:
        """The error for a file that can't be what it should be."""
        return ModelError(f"{self.path.name} {what}", remedy=remedy)


def row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    """Bytes of `columns` numbers of that type."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(columns // block * size)


def read_gguf(path: Path) -> GgufFile:
    """The structure of `path`. ModelError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _Cursor(b"", path).error("is too short to be a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                return _read(memory, path, size)
    except OSError as error:
        raise ModelError(f"can't read {path.name}: {error.strerror}", remedy="Check the path and its rights") from error


def split_parts(path: Path, structure: GgufFile) -> tuple[Path, ...]:
    """The files of the model that `path` is the first part of; itself alone where it is whole."""
    count = structure.values.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return (path,)
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise structure.broken(f"is one of {count} parts, but is not named …-00001-of-{count:05d}.gguf", "Rename it")
    if int(name[2]) != 1:
        raise structure.broken("is not the first part of its model", f"Give {name[1]}-00001-of-{name[3]}.gguf")
    parts = tuple(path.with_name(f"{name[1]}-{part:05d}-of-{name[3]}.gguf") for part in range(1, count + 1))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(f"{path.name} is split, and {missing[0]} is missing", remedy="Put all parts into one folder")
    return parts


class _Cursor:
    """Reads forward in the file's bytes; every step is checked."""

    def __init__(self, memory: Any, path: Path) -> None:
        self.memory, self.path, self.at = memory, path, 0

    def error(self, what: str, remedy: str = "Download or pull it again") -> ModelError:
        return ModelError(f"{self.path.name} {what}", remedy=remedy)

    def take(self, form: str) -> Any:
        try:
            (value,) = struct.unpack_from(form, self.memory, self.at)
        except struct.error as error:
            raise self.error("is truncated: it ends within its header") from error
        self.at += struct.calcsize(form)
        return value

    def skip(self, count: int) -> None:
        if count > len(self.memory) - self.at:
            raise self.error("is truncated: it ends within its header")
        self.at += count

    def text(self) -> str:
        length = self.take("<Q")
        start = self.at
        self.skip(length)
        return bytes(self.memory[start : self.at]).decode("utf-8", "replace")

    def value(self, kind: int) -> Scalar | None:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            self.array()
            return None
        if kind not in _FORMATS:
            raise self.error(f"has a key of unknown type {kind}", "A newer abliterated may know it")
        found: Scalar = self.take(_FORMATS[kind])
        return found

    def array(self) -> None:
        kind, count = self.take("<I"), self.take("<Q")
        if kind in _FORMATS:
            self.skip(count * struct.calcsize(_FORMATS[kind]))
        elif kind == _STRING:
            # The tokens of a vocabulary: some hundred thousand steps, so as few operations as possible in each.
            memory, at, end, read = self.memory, self.at, len(self.memory), struct.Struct("<Q").unpack_from
            for _ in range(count):
                if at + 8 > end:
                    raise self.error("is truncated: it ends within its header")
                at += 8 + read(memory, at)[0]
            self.at = at
            self.skip(0)
        elif kind == _ARRAY:
            for _ in range(count):
                self.array()
        else:
            raise self.error(f"has an array of unknown type {kind}", "A newer abliterated may know it")


def _read(memory: Any, path: Path, size: int) -> GgufFile:
    cursor = _Cursor(memory, path)
    if memory[:4] != MAGIC:
        raise cursor.error("is not a GGUF file", "Give a .gguf file, or a folder with safetensors")
    cursor.at = 4
    version = cursor.take("<I")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        what = "is big-endian" if swapped else f"is GGUF version {version}"
        raise cursor.error(f"{what}, which is not supported", "Convert it with a current llama.cpp")
    tensor_count, key_count = cursor.take("<Q"), cursor.take("<Q")
    if tensor_count * 24 + key_count * 13 > size:
        raise cursor.error("is truncated: it names more tensors and keys than it has bytes for")
    key_values = []
    for _ in range(key_count):
        start = cursor.at
        key, kind = cursor.text(), cursor.take("<I")
        key_values.append(KeyValue(key, kind, start, cursor.at, cursor.value(kind)))
        key_values[-1] = KeyValue(key, kind, start, cursor.at, key_values[-1].value)
    alignment = next((entry.value for entry in key_values if entry.key == "general.alignment"), DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"has an alignment of {alignment}")
    heads = [_head(cursor) for _ in range(tensor_count)]
    data_start = padded(cursor.at, alignment)
    tensors = tuple(_place(cursor, head, data_start, size, alignment) for head in heads)
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise cursor.error("has two tensors of one name")
    return GgufFile(path, version, size, alignment, tuple(key_values), tensors, data_start)


def _head(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.text(), cursor.take("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"has a tensor of {dimensions} dimensions, {name!r}")
    shape = tuple(reversed([cursor.take("<Q") for _ in range(dimensions)]))
    return name, shape, cursor.take("<I"), cursor.take("<Q")


def _place(
    cursor: _Cursor, head: tuple[str, tuple[int, ...], int, int], data_start: int, size: int, alignment: int
) -> Tensor:
    name, shape, number, offset = head
    try:
        kind = GGMLQuantizationType(number)
        block, type_size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise cursor.error(
            f"holds {name!r} in the unknown type {number}", "Requantise it with a current llama.cpp"
        ) from error
    elements = math.prod(shape)
    if not elements:
        raise cursor.error(f"holds an empty tensor, {name!r}")
    if shape[-1] % block:
        raise cursor.error(f"holds {name!r} with rows of {shape[-1]}, no multiple of {kind.name}'s {block}")
    start, length = data_start + offset, elements // block * type_size
    if offset % alignment:
        raise cursor.error(f"holds {name!r} out of alignment")
    if start + length > size:
        raise cursor.error(f"is truncated: {name!r} would end {start + length - size} bytes behind the file's end")
    return Tensor(name, shape, kind, start, length)


def padded(position: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-position // alignment) * alignment
