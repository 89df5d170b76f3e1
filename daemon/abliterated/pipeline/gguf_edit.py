"""Edits a GGUF into another GGUF: streaming, tensor by tensor, everything that is not edited byte for byte as it was.

The header's place is kept free while the data are written, because types, offsets and digests are known only then.
Nothing is visible under the target's name until it is whole and on the disk. Does not know how a direction was found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Edit
from abliterated.pipeline import gguf_header
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.edit import Float32
from abliterated.pipeline.edit_report import EditReport, TensorEdit
from abliterated.pipeline.gguf_file import GgufFile, Tensor, padded, read_gguf, row_bytes, split_parts
from abliterated.pipeline.lattice import LAYOUTS
from abliterated.pipeline.mixes import MIXES, known_mix, wanted_type
from abliterated.pipeline.quantize import FLOATS, dequantize
from abliterated.pipeline.safe_write import CHUNK, Output, Source, check, need_space
from abliterated.pipeline.streamed_edit import Plan, StreamedEdit, check_direction, make_plan
from abliterated.pipeline.tensor_edit import requantise
from abliterated.pipeline.writers import gguf_census

HEADER_SLACK: Final = 1 << 20


def plan_edit(structure: GgufFile, direction: RefusalDirection, edit: Edit, *, allow_partial: bool) -> Plan:
    """What an edit of this file would touch. ModelError where it can't be done whole."""
    width, blocks = structure.number("embedding_length"), structure.number("block_count")
    extra = structure.values.get(f"{structure.architecture}.nextn_predict_layers", 0)
    layers = blocks - (extra if isinstance(extra, int) and extra < blocks else 0)
    check_direction(structure.path.name, width, layers, direction)
    census = gguf_census(
        structure.architecture,
        width,
        layers,
        {tensor.name: tensor.shape for tensor in structure.tensors},
        embeddings=edit.embeddings,
        post_norm=edit.post_norm,
        allow_partial=allow_partial,
    )
    return make_plan(structure.path.name, width, layers, census, direction, edit)


def edit_gguf(
    source: Path,
    target: Path,
    direction: RefusalDirection,
    edit: Edit,
    *,
    allow_partial: bool,
    quantize: str = "keep",
    metadata: Mapping[str, Any] | None,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> EditReport:
    """Write `target`, the model of `source` with its writers edited. Progress is in bytes of the source.

    Raises ModelError, DiskError, Cancelled; then no trace of the target is left.
    """
    mix = known_mix(quantize)
    structure = read_gguf(source)
    if len(split_parts(source, structure)) > 1:
        raise ModelError(
            f"{source.name} is the first of several parts, which can't be edited yet",
            remedy="Merge them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )
    plan = plan_edit(structure, direction, edit, allow_partial=allow_partial)
    check(cancelled)
    keys = dict(metadata or {})
    if mix:
        keys["general.file_type"] = int(MIXES[mix][2])
    types = {tensor.name: wanted_type(mix, tensor, len(plan.strengths)) for tensor in structure.tensors}
    need_space(target, _most(structure, plan, types))
    with Source(source, cancelled) as stored, Output(target) as output:
        return _write(structure, plan, types, keys, stored, output, progress)


def _rows(stored: Source, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """A tensor some rows at a time."""
    size = max(1, CHUNK // tensor.row_size) * tensor.row_size
    for first in range(tensor.start, tensor.start + tensor.size, size):
        count = min(size, tensor.start + tensor.size - first)
        yield stored.array(first, count).reshape(-1, tensor.row_size)


def _most(structure: GgufFile, plan: Plan, types: Mapping[str, Type]) -> int:
    """The most bytes the target can need: every writer whose type may have to change, in the larger one."""
    chosen = plan.chosen()
    total = structure.data_start + HEADER_SLACK
    for tensor in structure.tensors:
        kind = types[tensor.name]
        if tensor.name in chosen and kind not in FLOATS and kind not in LAYOUTS:
            kind = Type.Q8_0
        total += padded(row_bytes(kind, math.prod(tensor.shape)), structure.alignment)
    return total


def _write(
    structure: GgufFile,
    plan: Plan,
    types: Mapping[str, Type],
    keys: Mapping[str, Any],
    stored: Source,
    output: Output,
    progress: Callable[[int, int], None],
) -> EditReport:
    """Data first, then the header before them."""
    tensors = {tensor.name: tensor for tensor in structure.tensors}
    done, total = 0, sum(tensor.size for tensor in structure.tensors)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    def gain(name: str) -> Float32:
        tensor = tensors[name]
        return dequantize(stored.array(tensor.start, tensor.size).reshape(1, -1), tensor.type).reshape(-1)

    raw = stored.array(0, structure.data_start).tobytes()
    start = gguf_header.header_size(structure, keys, raw)
    output.seek(start)
    editor, chosen, content = StreamedEdit(plan, output, gain, advance), plan.chosen(), hashlib.sha256()
    edits: list[TensorEdit] = []
    placed: list[tuple[Tensor, Type, int]] = []
    for tensor in structure.tensors:
        offset, kind = output.at - start, tensor.type
        if writer := chosen.get(tensor.name):
            made, digest = editor.edit(stored, tensor, writer, types[tensor.name])
            edits.append(made)
            content.update(f"{tensor.name} {made.type} {digest}\n".encode())
            kind = Type[made.type]
        elif kind is not types[tensor.name]:
            kind = types[tensor.name]
            for raw_rows in _rows(stored, tensor):
                output.write(requantise(raw_rows, tensor.type, kind))
                advance(raw_rows.size)
        else:
            for chunk in stored.chunks(tensor.start, tensor.size):
                output.write(chunk)
                advance(len(chunk))
        placed.append((tensor, kind, offset))
        output.write(bytes(padded(output.at - start, structure.alignment) - (output.at - start)))
    unknown = plan.census.unknown
    report = EditReport(tuple(edits), len(chosen) + len(unknown), output.at, content.hexdigest(), unknown)
    front = gguf_header.header(structure, gguf_header.with_results(keys, report), raw, placed)
    assert len(front) == start, "the header's length may not depend on the results"
    output.seek(0)
    output.write(front)
    return report
