"""One writer's edit, from its bytes to its bytes: decode, project, round to its own type, cancel what rounding left,
and measure the result from the bytes that will be written.

Memory: the bytes, one byte a number for codes, one for the error's sign, and a few blocks of float32. Shared by the
GGUF and the safetensors editor. Does not know files or names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterate.contract.errors import ModelError
from abliterated.pipeline.edit import Norm, Projection, along, edit_bias, row_blocks
from abliterated.pipeline.lattice import LAYOUTS, Lattice, close_lattice, open_lattice
from abliterated.pipeline.null_rounding import FloatLattice, cancel, join
from abliterated.pipeline.quantize import FLOATS, dequantize, quantize

Bytes: TypeAlias = NDArray[np.uint8]
Float32: TypeAlias = NDArray[np.float32]
TINY: Final = float(np.finfo(np.float32).tiny)
T = TypeVar("T")
U = TypeVar("U")

TOLERANCE: Final = 0.01  # a type whose rounding leaves more than this share cannot hold the edit
GOAL: Final = 0.001  # null rounding stops here


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


def edit_rows(raw: Bytes, kind: Type, attempt: Attempt, vectors: Float32, strength: float, norm: Norm) -> Outcome:
    """Edit a matrix given as rows of bytes (d_out, bytes). ModelError for NaN and Inf."""
    projection = Projection(vectors, strength, norm)
    columns = raw.shape[1] // GGML_QUANT_SIZES[kind][1] * GGML_QUANT_SIZES[kind][0]
    blocks = row_blocks(len(raw), columns)
    projection.start(columns)
    for sums in _parallel(lambda at: projection.partial(at.start, dequantize(raw[at], kind)), blocks):
        projection.add(sums)
    if not projection.finite:
        raise ModelError("NaN or Inf among the weights", remedy="Download or pull the model again")
    projection.finish()
    exact = np.zeros(projection.share.shape)
    left = np.zeros(projection.share.shape)
    pieces = []
    for piece in _parallel(lambda at: _round(raw[at], kind, attempt, projection, at.start), blocks):
        exact += piece.exact
        left += piece.left
        pieces.append(piece)
    goal = GOAL * projection.size
    if attempt.kind is Type.F32:
        written = join([piece.raw for piece in pieces])
    else:
        errors = join([piece.errors for piece in pieces])
        written = _cancelled(pieces, attempt.kind, projection.vectors, left.astype(np.float32), errors, goal)
    after = np.zeros(projection.share.shape)
    for part in _parallel(lambda at: along(projection.vectors[:, at], dequantize(written[at], attempt.kind)), blocks):
        after += part
    return Outcome(written, float(np.linalg.norm(after)), float(np.linalg.norm(after - exact)), projection.size)


def requantise(raw: Bytes, kind: Type, wanted: Type) -> Bytes:
    """The same rows in another type. ModelError for NaN and Inf."""

    def convert(at: slice) -> Bytes:
        values = dequantize(raw[at], kind)
        if not np.isfinite(values).all():
            raise ModelError("NaN or Inf among the weights", remedy="Download or pull the model again")
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
    exact = projection.apply(0, turned)
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


@dataclass(frozen=True)
class _Piece:
    """A block of rounded rows."""

    lattice: Lattice | FloatLattice | None
    raw: Bytes
    errors: NDArray[np.int8]
    exact: Float32
    left: Float32


def _round(raw: Bytes, kind: Type, attempt: Attempt, projection: Projection, first: int) -> _Piece:
    """Project a block of rows and round it to the nearest of its lattice."""
    lattice: Lattice | FloatLattice | None = None
    if attempt.fresh:
        target = projection.apply(first, dequantize(raw, kind))
        if attempt.kind in (Type.F16, Type.BF16):
            lattice = FloatLattice.of(target, attempt.kind)
            raw = lattice.raw()
        else:
            raw = quantize(target, attempt.kind)
        error = dequantize(raw, attempt.kind) - target
        if attempt.kind in LAYOUTS:
            lattice = open_lattice(raw, attempt.kind)
    else:
        lattice = open_lattice(raw, kind)
        target = projection.apply(first, lattice.values())
        error = lattice.snap(target)
    if isinstance(lattice, Lattice):
        lattice.offset = None
    part = projection.vectors[:, first : first + len(raw)]
    return _Piece(lattice, raw, _signs(error), along(part, target), along(part, error))


def _signs(error: Float32) -> NDArray[np.int8]:
    """Cheaper than np.sign, which makes float32 first."""
    return (error > 0).view(np.int8) - (error < 0).view(np.int8)


def _cancelled(
    pieces: list[_Piece], kind: Type, vectors: Float32, left: Float32, errors: NDArray[np.int8], goal: float
) -> Bytes:
    """Null rounding over the whole matrix, and its bytes."""
    first = pieces[0].lattice
    if isinstance(first, FloatLattice):
        numbers = FloatLattice(kind, join([piece.lattice.codes for piece in pieces if piece.lattice]))
        cancel(numbers, vectors, left, errors, goal)
        return numbers.raw()
    assert first is not None
    lattices = [piece.lattice for piece in pieces if isinstance(piece.lattice, Lattice)]
    whole = Lattice(first.layout, join([part.codes for part in lattices]), join([part.step for part in lattices]), None)
    cancel(whole, vectors, left, errors, goal)
    return close_lattice(join([piece.raw for piece in pieces]), kind, whole.codes)


def _parallel(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """The function over the items, by threads (numpy and ggml release the interpreter), results in their order."""
    return _pool().map(function, items)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
