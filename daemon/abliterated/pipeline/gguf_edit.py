"""Edits a GGUF into another GGUF: streaming, tensor by tensor, everything that is not edited byte for byte as it was.

The header's place is kept free while the data are written, because types, offsets and digests are known only then.
Nothing is visible under the target's name until it is whole and on the disk. Does not know how a direction was found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterate.contract.recipe import Edit
from abliterated.pipeline import gguf_header
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.edit import Float32
from abliterated.pipeline.edit_report import EditReport, TensorEdit
from abliterated.pipeline.gguf_file import GgufFile, Tensor, padded, row_bytes
from abliterated.pipeline.lattice import LAYOUTS
from abliterated.pipeline.mixes import MIXES, known_mix, wanted_type
from abliterated.pipeline.quantize import FLOATS, dequantize
from abliterated.pipeline.safe_write import CHUNK, Output, Source, check, need_space
from abliterated.pipeline.split_gguf import Model, SplitSource, all_outputs, part_paths, read_model
from abliterated.pipeline.streamed_edit import Plan, StreamedEdit, check_direction, make_plan
from abliterated.pipeline.tensor_edit import requantise
from abliterated.pipeline.write_behind import Digest
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
    keep_split: bool = False,
) -> EditReport:
    """Write `target`, the model of `source` with its writers edited. Progress is in bytes of the source.

    A split source becomes one file, or with `keep_split` as many parts as it has, named as `part_paths` says.

    Raises ModelError, DiskError, Cancelled; then no trace of the target is left.
    """
    mix = known_mix(quantize)
    model = read_model(source)
    plan = plan_edit(model.whole, direction, edit, allow_partial=allow_partial)
    check(cancelled)
    keys = dict(metadata or {})
    if mix:
        keys["general.file_type"] = int(MIXES[mix][2])
    types = {tensor.name: wanted_type(mix, tensor, len(plan.strengths)) for tensor in model.whole.tensors}
    need_space(target, _most(model.whole, plan, types))
    targets = part_paths(target, len(model.parts)) if keep_split and model.is_split else (target,)
    with SplitSource(model, cancelled) as stored, all_outputs(targets) as outputs:
        return _write(model, plan, types, keys, stored, outputs, progress)


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


@dataclass
class _Draft:
    """A file being written: its place for the header is free until all tensors are placed."""

    structure: GgufFile
    keys: dict[str, Any]
    raw: bytes
    output: Output
    placed: list[tuple[Tensor, Type, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = gguf_header.header_size(self.structure, self.keys, self.raw)
        self.output.seek(self.start)

    def place(self, tensor: Tensor, kind: Type, offset: int) -> None:
        """What was written from `offset` on is that tensor."""
        self.placed.append((tensor, kind, offset - self.start))
        end = self.output.at - self.start
        self.output.write(bytes(padded(end, self.structure.alignment) - end))

    def finish(self, report: EditReport) -> None:
        """The header, now that everything it tells is known."""
        keys = gguf_header.with_results(self.keys, report)
        front = gguf_header.header(self.structure, keys, self.raw, self.placed)
        assert len(front) == self.start, "the header's length may not depend on the results"
        self.output.seek(0)
        self.output.write(front)


def _write(
    model: Model,
    plan: Plan,
    types: Mapping[str, Type],
    keys: dict[str, Any],
    stored: Source,
    outputs: Sequence[Output],
    progress: Callable[[int, int], None],
) -> EditReport:
    """Data first, then the headers before them; into one output, or into as many as the model has parts."""
    tensors = {tensor.name: tensor for tensor in model.whole.tensors}
    done, total = 0, sum(tensor.size for tensor in tensors.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    def gain(name: str) -> Float32:
        tensor = tensors[name]
        return dequantize(stored.array(tensor.start, tensor.size).reshape(1, -1), tensor.type).reshape(-1)

    chosen, content = plan.chosen(), hashlib.sha256()
    edits: list[TensorEdit] = []
    drafts: list[_Draft] = []
    files = [(model.whole, 0)] if len(outputs) == 1 else list(zip(model.parts, model.starts, strict=True))
    for (structure, begin), output in zip(files, outputs, strict=True):
        raw = stored.array(begin, structure.data_start).tobytes()
        draft = _Draft(structure, keys if not drafts else {}, raw, output)
        with StreamedEdit(plan, output, gain, advance) as editor:
            made: list[tuple[TensorEdit, Digest]] = []
            for tensor in structure.tensors:
                offset, kind = output.at, types[tensor.name]
                if writer := chosen.get(tensor.name):
                    made.append(editor.edit(stored, tensor, writer, kind))
                    kind = Type[made[-1][0].type]
                elif kind is not tensor.type:
                    for raw_rows in _rows(stored, tensor):
                        output.write(requantise(tensor.name, raw_rows, tensor.type, kind))
                        advance(raw_rows.size)
                else:
                    editor.behind.copy(stored, tensor.start, tensor.size, offset)
                    output.seek(offset + tensor.size)
                draft.place(tensor, kind, offset)
                advance(editor.behind.copied())
            editor.behind.wait(advance)
        for edited, digest in made:
            edits.append(edited)
            content.update(f"{edited.name} {edited.type} {digest.hexdigest()}\n".encode())
        drafts.append(draft)
    unknown = plan.census.unknown
    written = sum(output.at for output in outputs)
    report = EditReport(tuple(edits), len(chosen) + len(unknown), written, content.hexdigest(), unknown)
    for draft in drafts:
        draft.finish(report)
    return report
