"""The structure of a safetensors file and of a folder of them: which tensor lies where. Nothing is decoded.

Checks every length against the file. Does not know what a tensor means.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from gguf import GGMLQuantizationType as Type

from abliterate.contract.errors import ModelError
from abliterated.pipeline.gguf_file import Tensor

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
CONFIG: Final = "config.json"
LONGEST_HEADER: Final = 100 << 20  # the format's own limit

FLOATS: Final = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}
_SIZES: Final = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
                 "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
                 "F64": 64, "I64": 64, "U64": 64, "C64": 64}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor's place in a shard; `dtype` as the format spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def tensor(self) -> Tensor:
        """The same as the editor knows it. ModelError where its numbers aren't plain floats."""
        kind = FLOATS.get(self.dtype)
        if kind is None:
            raise ModelError(
                f"{self.name} holds {self.dtype}, and can't be edited in it",
                remedy="Take the model's BF16 or F16 weights, or its GGUF",
            )
        return Tensor(self.name, self.shape, kind, self.start, self.size)


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order of their bytes."""

    path: Path
    size: int
    tensors: tuple[Stored, ...]


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`. ModelError where there is none."""
    if not (folder / CONFIG).exists():
        raise ModelError(
            f"{folder.name} has no {CONFIG}", remedy=f"Give a .gguf file or a folder with {CONFIG} and safetensors"
        )
    return _read_object(folder / CONFIG)


def read_shards(folder: Path) -> tuple[Shard, ...]:
    """The model's shards, in the order of their names; other safetensors in the folder are not the model's."""
    if (folder / INDEX).is_file():
        weights = _read_object(folder / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
            raise ModelError(f"{INDEX} has no weight_map", remedy="Download the model again")
        names = sorted(set(weights.values()))
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if strange:
            raise ModelError(f"{INDEX} names {strange[0]!r}, which is no file beside it", remedy="Repair the index")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ModelError(f"{folder.name} lacks {absent[0]}", remedy="Download it again, completely")
    elif (folder / SINGLE).is_file():
        weights, names = None, [SINGLE]
    else:
        weights, names = None, sorted(path.name for path in folder.glob("*.safetensors"))
        if len(names) != 1:
            what = "no safetensors" if not names else f"{len(names)} safetensors, but no {INDEX}"
            raise ModelError(f"{folder.name} holds {what}", remedy="Give a folder with model.safetensors or an index")
    shards = tuple(_read_shard(folder / name) for name in names)
    found = [tensor.name for shard in shards for tensor in shard.tensors]
    if len(set(found)) < len(found):
        raise ModelError(f"{folder.name} holds a tensor twice", remedy="Download the model again")
    missing = sorted(set(weights or {}) - set(found))
    if missing:
        raise ModelError(f"{folder.name} lacks {missing[0]}, which its index names", remedy="Download the model again")
    return shards


def _read_shard(path: Path) -> Shard:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(LONGEST_HEADER, size - 8):
                raise ModelError(f"{path.name} is no safetensors file, or cut short", remedy="Download it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"can't read {path.name}: {error.strerror}", remedy="Check the folder") from error
    except ValueError as error:
        raise ModelError(f"{path.name} has a broken header", remedy="Download it again") from error
    tensors = []
    for name, entry in header.items() if isinstance(header, dict) else []:
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(int(axis) for axis in entry["shape"])
            start, end = (8 + length + int(place) for place in entry["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(f"{path.name} describes {name} wrongly", remedy="Download it again") from error
        bits = _SIZES.get(dtype)
        if end > size or start > end or (bits is not None and (end - start) * 8 != math.prod(shape) * bits):
            raise ModelError(f"{path.name} is cut short, or describes {name} wrongly", remedy="Download it again")
        tensors.append(Stored(name, dtype, shape, start, end - start))
    if not tensors:
        raise ModelError(f"{path.name} holds no tensors", remedy="Download it again")
    tensors.sort(key=lambda tensor: tensor.start)
    if any(after.start < before.start + before.size for before, after in pairwise(tensors)):
        raise ModelError(f"{path.name} holds tensors that overlap", remedy="Download it again")
    return Shard(path, size, tuple(tensors))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"can't read {path.name}: {error.strerror}", remedy="Check the folder") from error
    except ValueError as error:
        raise ModelError(f"can't read {path.name}: it is no JSON ({error})", remedy="Download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} holds no JSON object", remedy="Download it again")
    return found
