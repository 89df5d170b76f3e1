"""The plain edit as an adapter: W' = W − λ v (vᵀW) is a LoRA of the directions' rank, A = vᵀW and B = −λ v for every
writer, exactly. A file beside the model, a thousandth of its size, which llama.cpp adds to the base while it runs.

Only what a LoRA can hold: matrices, plainly projected. Kept lengths, biases and embeddings are refused by name.
Nothing is visible under the target's name until it is whole. Does not know how a direction was found, or engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType as Type

from abliterate.contract.errors import ModelError, RecipeError
from abliterate.contract.recipe import Edit
from abliterated.pipeline import gguf_header
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.edit import Float32, Projection
from abliterated.pipeline.edit_report import EditReport, TensorEdit
from abliterated.pipeline.gguf_edit import plan_edit
from abliterated.pipeline.gguf_file import DEFAULT_ALIGNMENT, GgufFile, Tensor, padded
from abliterated.pipeline.quantize import dequantize, quantize
from abliterated.pipeline.safe_write import Output, Room, Source, check, need_space
from abliterated.pipeline.split_gguf import SplitSource, read_model
from abliterated.pipeline.streamed_edit import Plan
from abliterated.pipeline.tensor_edit import measure_rows
from abliterated.pipeline.writers import Writer

# Kept as F32, which is exact, while that makes no more than this share of the model; else as F16.
SMALL: Final = 0.001


@dataclass(frozen=True)
class _Pair:
    """One writer's two matrices as they are written, rows first: A (…, k, d_in) and B (…, d_out, k)."""

    writer: Writer
    a: Float32
    b: Float32
    report: TensorEdit


def check_adapter(edit: Edit) -> None:
    """RecipeError where the edit is none that an adapter can hold."""
    if edit.norm != "none":
        raise RecipeError(
            f'edit.norm = "{edit.norm}" keeps lengths, which no adapter can: it holds the plain edit alone',
            remedy='Set edit.norm = "none", or export.format = "gguf"',
        )
    if edit.embeddings:
        raise RecipeError(
            "edit.embeddings can't go into an adapter: an output that shares them would be changed too",
            remedy='Set edit.embeddings = false, or export.format = "gguf"',
        )


def export_adapter(
    source: Path,
    target: Path,
    direction: RefusalDirection,
    edit: Edit,
    *,
    allow_partial: bool,
    metadata: Mapping[str, Any] | None,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> EditReport:
    """Write `target`, the LoRA that makes the model of `source` the plainly edited one. Progress is in bytes read.

    Raises RecipeError for an edit no adapter can hold, ModelError, DiskError, Cancelled; then nothing is left of it.
    """
    check_adapter(edit)
    model = read_model(source)
    whole = model.whole
    plan = plan_edit(whole, direction, edit, allow_partial=allow_partial)
    chosen = plan.chosen()
    tensors = {tensor.name: tensor for tensor in whole.tensors}
    matrices = [(tensors[name], writer) for name, writer in chosen.items() if not writer.bias]
    numbers = sum(_numbers(tensor, direction.rank) for tensor, _ in matrices)
    kind = Type.F32 if 4 * numbers <= SMALL * whole.size else Type.F16
    need_space(target, numbers * (4 if kind is Type.F32 else 2) + len(matrices) * 256)
    with SplitSource(model, cancelled) as stored:
        biases = _biases(plan, tensors, stored, allow_partial)
        pairs = _pairs(plan, matrices, tensors, stored, kind, progress, cancelled)
        with Output(target) as output:
            return _write(whole, plan, list(pairs), kind, biases, dict(metadata or {}), output)


def _pairs(
    plan: Plan,
    matrices: list[tuple[Tensor, Writer]],
    tensors: Mapping[str, Tensor],
    stored: Source,
    kind: Type,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Iterator[_Pair]:
    """A and B of every writer, an expert after another."""
    done, total, room = 0, sum(tensor.size for tensor, _ in matrices), Room()

    def gain(name: str) -> Float32:
        return _values(tensors[name], stored).reshape(-1)

    for tensor, writer in matrices:
        vectors, seen = plan.vectors(writer, gain), plan.seen(writer, gain) if writer.unheeded else None
        strength = plan.strength(writer)
        outer = quantize((-np.float32(strength) * vectors.T).astype(np.float32), kind)
        b = dequantize(outer, kind)
        shares: list[Float32] = []
        sums = np.zeros(4)
        size = tensor.shape[-2] * tensor.row_size
        for start in range(tensor.start, tensor.start + tensor.size, size):
            check(cancelled)
            raw = stored.array(start, size, room).reshape(-1, tensor.row_size)
            projection = Projection(vectors, strength, "none")
            try:
                measure_rows(raw, tensor.type, projection)
            except ModelError as error:
                raise ModelError(f"{tensor.name}: {error.message}", remedy=error.remedy) from error
            a = dequantize(quantize(projection.share, kind), kind)
            shares.append(a)
            # V W' and what of it is due to rounding, both from the numbers that will be written.
            wide, along = vectors.astype(np.float64), projection.share.astype(np.float64)
            after, ideal = along + wide @ b @ a, along - strength * (wide @ wide.T) @ along
            left, reached = float(np.linalg.norm(after)), projection.size
            if seen is not None:
                through = Projection(seen, strength, "none")
                measure_rows(raw, tensor.type, through)
                left, reached = float(np.linalg.norm(through.share + seen @ b @ a)), through.size
            sums += np.square([float(np.linalg.norm(after - ideal)), projection.size, left, reached])
            done += size
            progress(done, total)
        rounding, before, left, reached = (float(length) for length in np.sqrt(sums))
        report = TensorEdit(
            name=tensor.name,
            type=kind.name,
            kind=writer.kind,
            layer=writer.layer,
            residual=left / reached,
            rounding=rounding / before,
            uncorrected=writer.unheeded,
        )
        experts, rank = tensor.shape[:-2], len(vectors)
        yield _Pair(
            writer,
            np.stack(shares).reshape((*experts, rank, tensor.shape[-1])),
            np.broadcast_to(b, (*experts, len(b), rank)),
            report,
        )


def _biases(plan: Plan, tensors: Mapping[str, Tensor], stored: Source, allow_partial: bool) -> tuple[str, ...]:
    """Writers' biases that would have to change, and that no LoRA can; ModelError unless that is allowed."""
    left = []
    for name, writer in plan.chosen().items():
        if writer.bias:
            values = _values(tensors[name], stored)
            vectors = plan.direction.for_layer(max(writer.layer, 0))
            if float(np.linalg.norm(values @ vectors.T)) > 1e-6 * float(np.linalg.norm(values)):
                left.append(name)
    if left and not allow_partial:
        raise ModelError(
            f"{left[0]} is a bias, and an adapter holds matrices only"
            + (f" (and {len(left) - 1} more)" if len(left) > 1 else ""),
            remedy='Set export.format = "gguf", or export.allow_partial = true to leave the biases as they are',
        )
    return tuple(left)


def _values(tensor: Tensor, stored: Source) -> Float32:
    return dequantize(stored.array(tensor.start, tensor.size).reshape(-1, tensor.row_size), tensor.type)


def _numbers(tensor: Tensor, rank: int) -> int:
    """How many numbers A and B of a writer hold."""
    *experts, rows, columns = tensor.shape
    return int(np.prod(experts)) * rank * (rows + columns)


def _write(
    structure: GgufFile,
    plan: Plan,
    pairs: list[_Pair],
    kind: Type,
    biases: tuple[str, ...],
    metadata: dict[str, Any],
    output: Output,
) -> EditReport:
    """The header, then A and B of every writer in the model's order."""
    placed: list[tuple[Tensor, Type, int]] = []
    parts: list[bytes] = []
    content, at = hashlib.sha256(), 0
    for pair in pairs:
        for suffix, values in (("lora_a", pair.a), ("lora_b", pair.b)):
            name = f"{pair.writer.name}.{suffix}"
            data = quantize(values.reshape(-1, values.shape[-1]), kind).tobytes()
            content.update(f"{name} {kind.name} {hashlib.sha256(data).hexdigest()}\n".encode())
            placed.append((Tensor(name, values.shape, kind, 0, len(data)), kind, at))
            parts.append(data.ljust(padded(len(data), DEFAULT_ALIGNMENT), b"\0"))
            at += len(parts[-1])
    left = (*plan.census.unknown, *biases)
    keys: dict[str, Any] = {
        "general.type": "adapter",
        "general.architecture": structure.architecture,
        "adapter.type": "lora",
        # llama.cpp scales by alpha / rank: this makes it 1.
        "adapter.lora.alpha": float(plan.direction.rank),
        "general.file_type": 0 if kind is Type.F32 else 1,
    }
    empty = GgufFile(structure.path, 3, 0, DEFAULT_ALIGNMENT, (), (), 0)
    size = len(gguf_header.header(empty, keys | metadata, b"", placed)) + at
    reports = tuple(pair.report for pair in pairs)
    report = EditReport(reports, len(pairs) + len(left), size, content.hexdigest(), left)
    keys |= gguf_header.with_results(metadata, report)
    output.write(gguf_header.header(empty, keys, b"", placed))
    for part in parts:
        output.write(part)
    return report
