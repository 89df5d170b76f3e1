"""The front of a GGUF file we write: its old key-values byte for byte and in order, ours behind them, and where the
tensors lie now. Pure: structures in, bytes out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGMLQuantizationType as Type

from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.gguf_file import MAGIC, GgufFile, Tensor, padded
from abliterated.pipeline.provenance import CONTENT, COVERAGE, PREFIX, RESIDUAL


def header_size(structure: GgufFile, keys: Mapping[str, Any], raw: bytes) -> int:
    """Where the data begin, alignment included. `raw`: the source's own first bytes, up to its data."""
    placed = [(tensor, tensor.type, 0) for tensor in structure.tensors]
    return len(header(structure, keys, raw, placed))


def header(
    structure: GgufFile,
    keys: Mapping[str, Any],
    raw: bytes,
    placed: Sequence[tuple[Tensor, Type, int]],
    *,
    edited: bool = True,
) -> bytes:
    """Everything before the data. `placed`: each tensor with its type and offset now.

    A key of `keys` that the file has already is replaced in its place; `abliterated.*` keys of an earlier edit go
    where the file is `edited` again.
    """
    entries = [
        _entry(entry.key, keys[entry.key]) if entry.key in keys else raw[entry.start : entry.end]
        for entry in structure.key_values
        if entry.key in keys or not (edited and entry.key.startswith(PREFIX))
    ]
    known = {entry.key for entry in structure.key_values}
    entries += [_entry(key, value) for key, value in keys.items() if key not in known]
    parts = [MAGIC, struct.pack("<IQQ", structure.version, len(placed), len(entries)), *entries]
    for tensor, kind, offset in placed:
        shape = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        parts += [_text(tensor.name), struct.pack("<I", len(tensor.shape)), shape, struct.pack("<IQ", kind, offset)]
    found = b"".join(parts)
    return found.ljust(padded(len(found), structure.alignment), b"\0")


def with_results(keys: Mapping[str, Any], report: EditReport) -> dict[str, Any]:
    """The keys that waited for the tensors, filled in; no key changes its length."""
    results = {CONTENT: report.content, COVERAGE: report.coverage, RESIDUAL: report.residual}
    return {key: results.get(key, value) for key, value in keys.items()}


def _entry(key: str, value: Any) -> bytes:
    kind, data = _value(key, value)
    return _text(key) + struct.pack("<I", kind) + data


def _value(key: str, value: Any) -> tuple[int, bytes]:
    match value:
        case str():
            return 8, _text(value)
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return (4, struct.pack("<I", value)) if 0 <= value < 1 << 32 else (11, struct.pack("<q", value))
        case float():
            return 6, struct.pack("<f", value)
        case list() | tuple():
            items = [_value(key, item) for item in value]
            kind = items[0][0] if items else 8
            if all(item[0] == kind for item in items):
                return 9, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)
    raise TypeError(f"{key} holds {type(value).__name__}, which no GGUF key can")


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
