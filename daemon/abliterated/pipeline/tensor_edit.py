"""One writer's edit, from its bytes to its bytes: decode, project, round to its own type, cancel what rounding left,
and measure the result from the bytes that will be written.

Memory: the bytes before and after, and a few blocks of float32. Shared by the GGUF and the safetensors editor. Does
not know files or names.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterate.contract.errors import ModelError
from abliterated.pipeline.edit import Norm, Projection, Sums, along, edit_bias, row_blocks
from abliterated.pipeline.gguf_file import row_bytes
from abliterated.pipeline.lattice import LAYOUTS, Lattice, close_lattice, open_lattice
from abliterated.pipeline.null_rounding import FloatLattice, cancel, join, walk
from abliterated.pipeline.quantize import FLOATS, dequantize, quantize
from abliterated.pipeline.safe_write import Room

Bytes: TypeAlias = NDArray[np.uint8]
Float32: TypeAlias = NDArray[np.float32]
TINY: Final = float(np.finfo(np.float32).tiny)
T = TypeVar("T")
U = TypeVar("U")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as mallopt(3) numbers them

TURNS: Final = 2  # how often a thread comes back for more

TOLERANCE: Final = 0.01  # a type whose rounding leaves more than this share cannot hold the edit
GOAL: Final = 0.001  # null rounding stops here,
FLOAT_GOAL: Final = 0.002  # and for floats here, about what rounding a number to bfloat16 changes


@dataclass(frozen=True)
class Attempt:
    """A way to write a tensor: its type, and whether ggml chooses new scales or the tensor's own stay."""

    kind: Type
    fresh: bool


@dataclass(frozen=True)
class Outcome:
    """What was written and what it left: lengths of V W' and of V (W' written − W' exact), and of V W before."""

    raw: Bytes
    after: float
    rounding: float
    before: float


def attempts(kind: Type, columns: int, wanted: Type | None = None) -> Iterator[Attempt]:
    """The ways to write an edited tensor, in order: the type wanted, else the tensor's own, first.

    Its own scales come first: the lattice the model was made on fits the edited matrix as well, no number the edit
    does not touch changes, and nothing is quantised twice.
    """
    own, kind = kind, wanted or kind
    if kind in LAYOUTS and kind is own:
        yield Attempt(kind, fresh=False)
    if kind in FLOATS or kind in LAYOUTS:
        yield Attempt(kind, fresh=True)
    if kind is not Type.Q8_0 and kind not in FLOATS and columns % GGML_QUANT_SIZES[Type.Q8_0][0] == 0:
        yield Attempt(Type.Q8_0, fresh=True)
    if kind not in FLOATS:
        yield Attempt(Type.F16, fresh=True)


def edit_rows(
    raw: Bytes, kind: Type, attempt: Attempt, vectors: Float32, strength: float, norm: Norm, room: Room | None = None
) -> Outcome:
    """Edit a matrix given as rows of bytes (d_out, bytes); the result lies in `room`, where one is given.

    ModelError for NaN and Inf.
    """
    projection = Projection(vectors, strength, norm)
    blocks = measure_rows(raw, kind, projection)
    columns = projection.share.shape[1]
    ideal = projection.remains()
    size = row_bytes(attempt.kind, columns)
    written = (room or Room()).take(len(raw) * size).reshape(len(raw), size)

    def write(at: slice) -> tuple[Float32, Float32 | None]:
        target = _rounded(raw[at], kind, attempt, projection, at, written[at])
        part = projection.vectors[:, at]
        # What stays along the directions is read from the very bytes that will be written.
        found = along(part, dequantize(written[at], attempt.kind))
        return found, along(part, target) if ideal is None else None

    after, exact = np.zeros(projection.share.shape), np.zeros(projection.share.shape)
    for found, wanted in _parallel(write, blocks, many=kind in FLOATS and attempt.kind in FLOATS):
        after += found
        exact += 0.0 if wanted is None else wanted
    exact = exact if ideal is None else ideal
    if attempt.kind is not Type.F32:
        goal = (FLOAT_GOAL if attempt.kind in FLOATS else GOAL) * projection.size
        rows = _OpenRows(raw, kind, attempt, projection, written)
        cancel(rows, projection.vectors, (after - exact).astype(np.float32), rows, goal)
        rows.close()
        after += rows.moved
    return Outcome(written, float(np.linalg.norm(after)), float(np.linalg.norm(after - exact)), projection.size)


def measure_rows(raw: Bytes, kind: Type, projection: Projection) -> list[slice]:
    """The projection's first pass, over a matrix given as rows of bytes; the blocks it went through. ModelError for
    NaN and Inf."""
    columns = raw.shape[1] // GGML_QUANT_SIZES[kind][1] * GGML_QUANT_SIZES[kind][0]
    blocks = row_blocks(len(raw), columns)
    projection.start(columns)

    def measure(at: slice) -> Sums:
        return projection.partial(at.start, dequantize(raw[at], kind))

    for sums in _parallel(measure, blocks, many=kind in FLOATS):
        projection.add(sums)
    if not projection.finite:
        raise ModelError("NaN or Inf among the weights", remedy="Download or pull the model again")
    projection.finish()
    return blocks


def requantise(name: str, raw: Bytes, kind: Type, wanted: Type) -> Bytes:
    """The same rows in another type. ModelError for NaN and Inf, with the name of the tensor they are of."""

    def convert(at: slice) -> Bytes:
        values = dequantize(raw[at], kind)
        if not np.isfinite(values).all():
            raise ModelError(f"{name}: NaN or Inf among the weights", remedy="Download or pull the model again")
        return quantize(values, wanted)

    columns = raw.shape[1] // GGML_QUANT_SIZES[kind][1] * GGML_QUANT_SIZES[kind][0]
    found: Bytes = join(list(_parallel(convert, row_blocks(len(raw), columns))))
    return found


def edit_turned(raw: Bytes, kind: Type, attempt: Attempt, vectors: Float32, strength: float, norm: Norm) -> Outcome:
    """Edit rows that are themselves points of the stream, (d_in, bytes): embeddings, or a matrix stored turned.

    The rows are the columns of W.
    """
    values = dequantize(raw, kind)
    projection = Projection(vectors, strength, norm)
    projection.start(len(values))
    turned = np.ascontiguousarray(values.T)
    for at in row_blocks(*turned.shape):
        projection.add(projection.partial(at.start, turned[at]))
    if not projection.finite:
        raise ModelError("NaN or Inf among the weights", remedy="Download or pull the model again")
    projection.finish()
    exact = projection.apply(slice(None), turned)
    lattice: Lattice | FloatLattice | None = None
    if attempt.kind in (Type.F16, Type.BF16):
        lattice = FloatLattice.of(exact, attempt.kind)
        written = np.ascontiguousarray(lattice.codes.T).view(np.uint8)
    elif attempt.kind in LAYOUTS:
        written = raw if not attempt.fresh else quantize(np.ascontiguousarray(exact.T), attempt.kind)
        flat = open_lattice(written, attempt.kind)
        flat.snap(np.ascontiguousarray(exact.T))
        single = replace(flat.layout, sub=1)
        lattice = Lattice(single, flat.codes.T.copy(), np.ascontiguousarray(flat.wide(flat.step).T), None)
        written = close_lattice(written, attempt.kind, flat.codes)
    else:
        written = quantize(np.ascontiguousarray(exact.T), attempt.kind)
    if lattice is not None:
        error = np.ascontiguousarray(dequantize(written, attempt.kind).T) - exact
        left = along(projection.vectors, error)
        cancel(lattice, projection.vectors, left, _signs(error), GOAL * projection.size)
        codes: NDArray[Any] = np.ascontiguousarray(lattice.codes.T)
        written = (
            codes.view(np.uint8) if isinstance(lattice, FloatLattice) else close_lattice(written, attempt.kind, codes)
        )
    after = along(projection.vectors, np.ascontiguousarray(dequantize(written, attempt.kind).T))
    ideal = along(projection.vectors, exact)
    return Outcome(written, float(np.linalg.norm(after)), float(np.linalg.norm(after - ideal)), projection.size)


def length_along(raw: Bytes, kind: Type, vectors: Float32, *, turned: bool) -> float:
    """‖V W‖ of a matrix as it lies in its bytes, some rows at a time."""
    blocks = row_blocks(len(raw), raw.shape[1] // GGML_QUANT_SIZES[kind][1] * GGML_QUANT_SIZES[kind][0])
    if turned:
        squares = _parallel(lambda at: float(np.square(dequantize(raw[at], kind) @ vectors.T).sum()), blocks)
        return float(np.sqrt(sum(squares)))
    total: Any = sum(_parallel(lambda at: along(vectors[:, at], dequantize(raw[at], kind)), blocks))
    return float(np.linalg.norm(total))


def edit_bias_rows(raw: Bytes, kind: Type, vectors: Float32, strength: float) -> Outcome:
    """Edit a bias, or one a row: plain projection, whatever is kept elsewhere."""
    values = dequantize(raw, kind)
    if not np.isfinite(values).all():
        raise ModelError("NaN or Inf among the biases", remedy="Download or pull the model again")
    exact = edit_bias(values, vectors, strength)
    written = quantize(exact, kind)
    after = dequantize(written, kind) @ vectors.T
    before = max(float(np.linalg.norm(values @ vectors.T)), 1e-7 * float(np.linalg.norm(values)), TINY)
    return Outcome(written, float(np.linalg.norm(after)), float(np.linalg.norm(after - exact @ vectors.T)), before)


def _rounded(raw: Bytes, kind: Type, attempt: Attempt, projection: Projection, at: slice, written: Bytes) -> Float32:
    """Project some rows and round them to the nearest of their lattice, in `written`; the exact numbers."""
    if attempt.fresh:
        target = projection.apply(at, dequantize(raw, kind))
        quantize(target, attempt.kind, written)
        return target
    lattice = open_lattice(raw, kind)
    target = projection.apply(at, lattice.values())
    lattice.nearest(target)
    written[...] = close_lattice(raw, kind, lattice.codes)
    return target


class _OpenRows:
    """Written rows as null rounding needs them: opened some at a time in the order it walks, closed into their bytes.

    Most rows are never walked, so what a step would need to know of them is not kept, but worked out again for a few.
    """

    AT_ONCE: Final = 16

    def __init__(self, raw: Bytes, kind: Type, attempt: Attempt, projection: Projection, written: Bytes) -> None:
        self._source, self._kind, self._attempt, self._projection = raw, kind, attempt, projection
        self._written = written
        self._order = walk(projection.vectors)
        self._place = np.empty_like(self._order)
        self._place[self._order] = np.arange(len(self._order))
        self._first, self._rows = 0, self._order[:0]
        self.moved = np.zeros(projection.share.shape)  # how far the steps taken changed V W', by the bytes

    def steps(self, row: int, upwards: NDArray[np.bool_]) -> tuple[Float32, NDArray[np.int8]]:
        """How much each value of the row changes by one step, and in codes."""
        place = self._open(row)
        return self._lattice.steps(place, upwards)

    def shift(self, row: int, move: NDArray[np.int8]) -> None:
        """Move the row's codes."""
        place = self._open(row)
        self._lattice.shift(place, move)

    def __getitem__(self, row: int) -> NDArray[np.int8]:
        """The signs of the row's rounding errors."""
        place = self._open(row)
        found: NDArray[np.int8] = self._errors[place]
        return found

    def close(self) -> None:
        """Put the open rows' codes back into their bytes."""
        if not len(self._rows):
            return
        before, kind = self._written[self._rows], self._attempt.kind
        if isinstance(self._lattice, FloatLattice):
            after = self._lattice.raw()
        else:
            after = close_lattice(before, kind, self._lattice.codes)
        self._written[self._rows] = after
        change = dequantize(after, kind) - dequantize(before, kind)
        self.moved += along(self._projection.vectors[:, self._rows], change)
        self._rows = self._order[:0]

    def _open(self, row: int) -> int:
        """The row's place among the open ones."""
        place = int(self._place[row])
        if not self._first <= place < self._first + len(self._rows):
            self.close()
            self._first, self._rows = place, self._order[place : place + self.AT_ONCE]
            raw, kind = self._source[self._rows], self._attempt.kind
            target = self._projection.apply(self._rows, dequantize(raw, self._kind))
            written = self._written[self._rows]
            self._lattice: Lattice | FloatLattice = (
                FloatLattice(kind, written.view(np.uint16)) if kind in FLOATS else open_lattice(written, kind)
            )
            error = dequantize(written, kind) - target
            self._errors = _signs(error)
        return place - self._first


def _signs(error: Float32) -> NDArray[np.int8]:
    """Cheaper than np.sign, which makes float32 first."""
    return (error > 0).view(np.int8) - (error < 0).view(np.int8)


def _parallel(function: Callable[[T], U], items: Iterable[T], *, many: bool = False) -> Iterator[U]:
    """The function over the items, by threads (numpy and ggml release the interpreter), results in their order. `many`:
    a thread takes many items at a time, where one costs hardly more than to hand it over."""
    items = list(items)
    count = -(-len(items) // (TURNS * _threads())) if many else 1
    stripes = [items[first : first + count] for first in range(0, len(items), max(1, count))]
    for found in _pool().map(lambda stripe: [function(item) for item in stripe], stripes):
        yield from found


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


@cache
def _pool() -> ThreadPoolExecutor:
    _keep_memory()
    return ThreadPoolExecutor(_threads())


def _keep_memory() -> None:
    """Tell glibc to keep what arrays give back: asked of the system anew, a block costs more than the arithmetic on it.

    For this process alone; elsewhere than on glibc nothing is done.
    """
    with suppress(AttributeError, OSError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_MMAP_THRESHOLD, 32 << 20)
        allocator.mallopt(_TRIM_THRESHOLD, 128 << 20)
