"""One writer after another, from a file being read to a file being written: strength, directions, type and report of
each. What the GGUF and the safetensors editor share. Does not know either format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np
from gguf import GGMLQuantizationType as Type

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Edit
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.edit import Float32, LayerStrength, Norm, seen_through_norms, strengths
from abliterated.pipeline.edit_report import TensorEdit
from abliterated.pipeline.gguf_file import Tensor
from abliterated.pipeline.safe_write import Output, Source
from abliterated.pipeline.tensor_edit import (
    TINY,
    TOLERANCE,
    Attempt,
    Outcome,
    attempts,
    edit_bias_rows,
    edit_rows,
    edit_turned,
    length_along,
)
from abliterated.pipeline.write_behind import Digest, WriteBehind
from abliterated.pipeline.writers import Census, Writer

EMBEDDINGS: Final = 1024  # rows of an embedding edited at a time


@dataclass(frozen=True)
class Plan:
    """What is edited, along what, and how strongly."""

    census: Census
    strengths: tuple[LayerStrength, ...]
    direction: RefusalDirection
    edit: Edit

    def strength(self, writer: Writer) -> float:
        """λ for one writer; the embeddings, which stand before all layers, take the recipe's own."""
        if writer.kind == "embedding":
            return -self.edit.strength if self.edit.invert else self.edit.strength
        layer = self.strengths[writer.layer]
        return layer.attention if writer.kind == "attention" else layer.mlp

    def vectors(self, writer: Writer, gain: Callable[[str], Float32]) -> Float32:
        """The directions to remove in this writer: the layer's, as seen through the norms behind it."""
        return self.seen(writer, gain) if writer.corrected else self.direction.for_layer(max(writer.layer, 0))

    def seen(self, writer: Writer, gain: Callable[[str], Float32]) -> Float32:
        """What of its output moves the stream along the layer's directions, whether the edit heeds the norms or not."""
        vectors = self.direction.for_layer(max(writer.layer, 0))
        return seen_through_norms(vectors, tuple(map(gain, writer.gains)), centred=writer.centred)

    def chosen(self) -> dict[str, Writer]:
        """The writers the recipe edits, by name."""
        return {writer.name: writer for writer in self.census.writers if self.strength(writer) != 0.0}


def make_plan(model: str, width: int, layers: int, census: Census, direction: RefusalDirection, edit: Edit) -> Plan:
    """A plan for a model so wide and deep. ModelError if the direction is another model's."""
    check_direction(model, width, layers, direction)
    by_layer = tuple(LayerStrength(*one) for one in direction.strengths) or strengths(edit, layers)
    return Plan(census, by_layer, direction, edit)


def check_direction(model: str, width: int, layers: int, direction: RefusalDirection) -> None:
    """ModelError if the direction is another model's."""
    remedy = "Measure the direction on this model"
    if direction.hidden_size != width:
        wide = direction.hidden_size
        raise ModelError(f"the direction is {wide} wide, the residual stream of {model} {width}", remedy=remedy)
    if direction.per_layer and len(direction.vectors) < layers:
        deep = len(direction.vectors)
        raise ModelError(f"the direction has {deep} layers, {model} has {layers}", remedy=remedy)


class StreamedEdit:
    """Edits writers one by one, while another thread writes what is edited already. `gain` reads a norm's gain by
    name; `advance` is told the bytes done. Leaving it waits for the writes; only then may the output be closed."""

    def __init__(
        self, plan: Plan, output: Output, gain: Callable[[str], Float32], advance: Callable[[int], None]
    ) -> None:
        self.plan, self.output, self.gain, self.advance = plan, output, gain, advance
        self.behind = WriteBehind(output)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.behind.close(failed=kind is not None)

    def edit(
        self, stored: Source, tensor: Tensor, writer: Writer, wanted: Type | None = None
    ) -> tuple[TensorEdit, Digest]:
        """Edit the tensor to the output's position, in the first type that holds the edit; and its sha256 to come."""
        start, wanted = self.output.at, wanted or tensor.type
        ways = list(attempts(tensor.type, tensor.shape[-1], wanted))
        if writer.bias:
            ways = [Attempt(tensor.type, fresh=True)]
        for way in ways:
            self.output.seek(start)
            sums, digest, done = np.zeros(4), Digest(), 0
            try:
                for outcome, ends, count in self._outcomes(stored, tensor, writer, way):
                    self.behind.put(outcome.raw, digest)
                    sums += np.square([outcome.rounding, outcome.before, *ends])
                    self.advance(count)
                    done += count
            except ModelError as error:
                raise ModelError(f"{tensor.name}: {error.message}", remedy=error.remedy) from error
            rounding, before, after, reached = (float(length) for length in np.sqrt(sums))
            if rounding <= TOLERANCE * before:
                break
            if way is not ways[-1]:
                self.advance(-done)
        if way is not ways[0]:
            self.behind.wait(self.advance)
            self.output.truncate()
        report = TensorEdit(
            name=tensor.name,
            type=way.kind.name,
            kind=writer.kind,
            layer=writer.layer,
            residual=after / max(reached, TINY),
            rounding=rounding / before,
            promoted_from="" if way.kind is wanted else wanted.name,
            uncorrected=writer.unheeded,
        )
        return report, digest

    def _outcomes(
        self, stored: Source, tensor: Tensor, writer: Writer, way: Attempt
    ) -> Iterator[tuple[Outcome, tuple[float, float], int]]:
        """The tensor's matrices, edited one by one (an expert each, or some embeddings); how much of each moved the
        stream along the directions after and before; and their bytes."""
        vectors, strength = self.plan.vectors(writer, self.gain), self.plan.strength(writer)
        seen = self.plan.seen(writer, self.gain) if writer.unheeded else None
        norm: Norm = self.plan.edit.norm
        rows = 1 if len(tensor.shape) == 1 else tensor.shape[-2]
        if writer.kind == "embedding":
            # They come some at a time, and a row of W goes through all of them: they keep their own lengths instead.
            rows, norm = EMBEDDINGS, "columns" if norm == "rows" else norm
        size = tensor.size if writer.bias else min(tensor.size, rows * tensor.row_size)
        for first in range(tensor.start, tensor.start + tensor.size, size):
            count = min(size, tensor.start + tensor.size - first)
            read, written = self.behind.rooms()
            raw = stored.array(first, count, read).reshape(-1, tensor.row_size)
            if writer.bias:
                outcome = edit_bias_rows(raw, tensor.type, vectors, strength)
            elif writer.turned:
                outcome = edit_turned(raw, tensor.type, way, vectors, strength, norm)
            else:
                outcome = edit_rows(raw, tensor.type, way, vectors, strength, norm, written)
            ends = (
                (outcome.after, outcome.before)
                if seen is None
                else (
                    length_along(outcome.raw, way.kind, seen, turned=writer.turned),
                    length_along(raw, tensor.type, seen, turned=writer.turned),
                )
            )
            yield outcome, ends, count
