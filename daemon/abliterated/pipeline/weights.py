"""A model's weights as they lie in its files, a layer at a time: mapped into memory or read, taken out under the names
transformers gives them, and let go again.

A GGUF's tensors go through transformers' own name map and processors, so that they are what its reader makes of
them. Knows names and bytes; does not know what a layer computes.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import gguf
import numpy as np
import torch

from abliterate.contract.errors import ModelError
from abliterated.pipeline.gguf_file import Tensor, read_gguf
from abliterated.pipeline.safetensors_file import Stored, read_shards
from abliterated.pipeline.source import Source

_TORCH: Final = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_BLOCK: Final = re.compile(r"blk\.(\d+)\.")

Tensors = dict[str, torch.Tensor]


class Unstreamable(Exception):
    """This model can't go layer by layer; the message says why. Never leaves the room: the whole model is loaded."""


class Weights(Protocol):
    """Where layers come from. Names outside the layers are the model's own; within them, the checkpoint's."""

    def layer(self, number: int) -> Tensors:
        """Everything of one layer."""

    def outside(self, name: str) -> Tensors:
        """What the parameter of that name, outside the layers, is made from."""

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """These rows of a matrix outside the layers."""

    def names(self) -> frozenset[str]:
        """The parameters outside the layers."""


class FolderWeights:
    """From safetensors. `renamed` gives a checkpoint's name as the model has it."""

    def __init__(self, folder: Path, layers: str, renamed: Mapping[str, str]) -> None:
        self._places = {stored.name: (shard.path, stored) for shard in read_shards(folder) for stored in shard.tensors}
        self._layers: dict[int, list[str]] = {}
        self._outside: dict[str, list[str]] = {}
        for key in self._places:
            name = renamed[key]
            if name.startswith(layers + "."):
                self._layers.setdefault(int(name[len(layers) + 1 :].partition(".")[0]), []).append(key)
            else:
                self._outside.setdefault(name, []).append(key)

    def layer(self, number: int) -> Tensors:
        return self._read(self._layers.get(number, []))

    def outside(self, name: str) -> Tensors:
        return self._read(self._outside[name])

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        keys = self._outside[name]
        if len(keys) != 1:
            raise Unstreamable(f"{name} is made of {len(keys)} tensors")
        return self._read(keys)[keys[0]][list(rows)]

    def names(self) -> frozenset[str]:
        return frozenset(self._outside)

    def _read(self, keys: Sequence[str]) -> Tensors:
        """Views of a mapping that lives as long as they do."""
        maps: dict[Path, mmap.mmap] = {}
        found = {}
        for key in keys:
            path, stored = self._places[key]
            try:
                if path not in maps:
                    with path.open("rb") as file:
                        maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                found[key] = _view(maps[path], stored)
            except (OSError, ValueError) as error:
                raise _cut_short(path, stored.name) from error
        return found


def _view(memory: mmap.mmap, stored: Stored) -> torch.Tensor:
    dtype = _TORCH.get(stored.dtype)
    if dtype is None:
        raise Unstreamable(f"{stored.name} holds {stored.dtype}")
    count = stored.size // dtype.itemsize
    if stored.start % dtype.itemsize:
        raw = bytearray(memory[stored.start : stored.start + stored.size])
        return torch.frombuffer(raw, dtype=dtype, count=count).reshape(stored.shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=stored.start).reshape(stored.shape)


class GgufWeights:
    """From a GGUF, dequantised tensor by tensor. `names`: transformers' map from GGUF's names to its own."""

    def __init__(self, source: Source, processor: Any, names: Mapping[str, str]) -> None:
        self._processor, self._names = processor, dict(names)
        self._layers: dict[int, list[tuple[Path, Tensor]]] = {}
        self._outside: dict[str, tuple[Path, Tensor]] = {}
        for part in source.parts:
            for tensor in read_gguf(part).tensors:
                block = _BLOCK.match(tensor.name)
                if block:
                    self._layers.setdefault(int(block[1]), []).append((part, tensor))
                else:
                    self._outside[self._names.get(tensor.name, tensor.name)] = (part, tensor)

    def layer(self, number: int) -> Tensors:
        found: Tensors = {}
        for part, tensor in self._layers.get(number, []):
            self._process(tensor.name, _numbers(part, tensor), found)
        return found

    def outside(self, name: str) -> Tensors:
        part, tensor = self._outside[name]
        found: Tensors = {}
        self._process(tensor.name, _numbers(part, tensor), found)
        return found

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        part, tensor = self._outside[name]
        found: Tensors = {}
        self._process(tensor.name, _numbers(part, tensor, rows), found)
        return next(iter(found.values()))

    def names(self) -> frozenset[str]:
        return frozenset(self._outside)

    def _process(self, name: str, values: np.ndarray[Any, Any], found: Tensors) -> None:
        """As transformers' reader does it: some tensors become parts of one parameter."""
        result = self._processor.process(
            weights=values, name=name, tensor_key_mapping=self._names, parsed_parameters={"tensors": found}
        )
        if result.name is not None and result.name in self._names:
            found[self._names[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights))


def _numbers(path: Path, tensor: Tensor, rows: Sequence[int] | None = None) -> np.ndarray[Any, Any]:
    """A tensor's float32 values, or some rows of it.

    Read and not mapped: a file that is cut short meanwhile is then an error and no SIGBUS.
    """
    size = tensor.row_size
    places = [(tensor.start, tensor.size)] if rows is None else [(tensor.start + row * size, size) for row in rows]
    taken = np.empty(sum(length for _, length in places), dtype=np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            at = 0
            for start, length in places:
                end = at + length
                while at < end:
                    count = os.preadv(file.fileno(), [taken.data[at:end]], start + length - (end - at))
                    if not count:
                        raise _cut_short(path, tensor.name)
                    at += count
    except OSError as error:
        raise _cut_short(path, tensor.name) from error
    taken = taken.reshape(*(tensor.shape[:-1] if rows is None else (len(rows),)), size)
    try:
        return np.array(gguf.quants.dequantize(taken, tensor.type), dtype=np.float32)
    except NotImplementedError as error:
        raise ModelError(
            f"{path.name} holds {tensor.name} in {tensor.type.name}, which can't be read for measuring",
            remedy="Take the model in another quantisation",
        ) from error


def _cut_short(path: Path, name: str) -> ModelError:
    return ModelError(
        f"{path.name} ended before {name}, or is gone: it was cut short while it was read",
        remedy="Pull or download the model again",
    )
