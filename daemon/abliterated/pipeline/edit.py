"""The edit's arithmetic: closed forms on matrices that write to the residual stream, and the strengths by layer.

float32 numpy; a matrix is W (d_out, d_in) with d_out the residual stream, directions are V (k, d_out) with orthonormal
rows, a = V W is their share in each column. Never a d x d projector: the cost is a few passes over W. A matrix is
handled in blocks of rows, in two passes: `partial` of every block and `add`, `finish`, then `apply` to every block.

Does not know files, types, names or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import Edit

Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
Norm: TypeAlias = Literal["columns", "rows", "none"]
Each: TypeAlias = Callable[[Callable[[slice], Any], Iterable[slice]], Iterable[Any]]

# A column (or row) of which less than this share of its squared length would remain is not scaled back up:
# nothing but rounding noise is left there to scale.
NOTHING_LEFT: Final = 1e-5

BLOCK: Final = 1 << 20  # numbers handled at a time: fewer, and Python costs more than the arithmetic
MOST_ROWS: Final = 256


class LayerStrength(NamedTuple):
    """λ for one layer's attention-like and MLP-like writers; negative where the edit strengthens the refusal."""

    attention: float
    mlp: float


def strengths(edit: Edit, layers: int) -> tuple[LayerStrength, ...]:
    """λ by layer, as `[edit]` says. RecipeError if it selects no layer of this model."""
    chosen = selected_layers(edit.layers, layers)
    sign = -1.0 if edit.invert else 1.0
    found = []
    for layer in range(layers):
        depth = layer / (layers - 1) if layers > 1 else edit.center
        weight = sign * edit.strength * kernel(edit, depth) if layer in chosen else 0.0
        found.append(LayerStrength(weight * edit.attention, weight * edit.mlp))
    return tuple(found)


def kernel(edit: Edit, depth: float) -> float:
    """The kernel's value, 1 at `center` and `floor` far from it; `depth` is 0 at the first layer and 1 at the last.

    `width` is how far from the center the floor is reached (linear, trapezoid; the trapezoid's top is half as wide)
    or two standard deviations (gaussian).
    """
    away = abs(depth - edit.center) / edit.width
    match edit.kernel:
        case "constant":
            return 1.0
        case "linear":
            shape = max(0.0, 1.0 - away)
        case "gaussian":
            shape = math.exp(-2.0 * away * away)
        case "trapezoid":
            shape = min(1.0, max(0.0, 2.0 - 2.0 * away))
    return edit.floor + (1.0 - edit.floor) * shape


def selected_layers(selection: str | list[int], layers: int) -> frozenset[int]:
    """The layers "all", "2-30" (both ends included), "1-", "-30", "7" or a list name. RecipeError for none."""
    if isinstance(selection, list):
        beyond = [layer for layer in selection if layer >= layers]
        if beyond:
            raise RecipeError(
                f"edit.layers names layer {beyond[0]}, but the model has {layers} layers",
                remedy=f"Layers count from 0 to {layers - 1}",
            )
        chosen = frozenset(selection)
    elif selection.strip() == "all":
        chosen = frozenset(range(layers))
    else:
        low, dash, high = selection.strip().partition("-")
        first = int(low or 0)
        last = int(high or layers - 1) if dash else first
        chosen = frozenset(range(first, min(last, layers - 1) + 1))
    if not chosen:
        raise RecipeError(
            f"edit.layers = {selection!r} selects none of the model's {layers} layers",
            remedy=f"Layers count from 0 to {layers - 1}",
        )
    return chosen


def seen_through_norms(vectors: Float32, gains: tuple[Float32, ...], *, centred: bool = False) -> Float32:
    """The directions to remove in a writer whose output passes norms with these gains before it joins the stream.

    The stream gets γ ⊙ o/‖o‖, so v·(γ ⊙ o) = (γ ⊙ v)·o must vanish. A norm that subtracts the mean (LayerNorm)
    sees o − mean(o): the direction is `centred` likewise.
    """
    if not gains and not centred:
        return vectors
    seen = vectors.astype(np.float64)
    for gain in gains:
        seen = seen * gain
    if centred:
        seen = seen - seen.mean(axis=1, keepdims=True)
    if not np.isfinite(seen).all() or (np.linalg.norm(seen, axis=1) < 1e-12).any():
        return vectors  # a gain of nil along it: nothing of it passes
    basis, _ = np.linalg.qr(seen.T)
    signs = np.sign(np.einsum("hk,kh->k", basis, seen))
    return np.ascontiguousarray((basis * np.where(signs == 0, 1, signs)).T, dtype=np.float32)


class Sums(NamedTuple):
    """What one block of rows adds to the sums over the matrix."""

    share: Float32
    squares: Float32
    scaled: Float32 | None


class Projection:
    """One writer's edit: V, λ and what is kept (`norm`), with the sums two passes over the matrix need."""

    share: Float32  # V W, (k, d_in)

    def __init__(self, vectors: Float32, strength: float, norm: Norm) -> None:
        self.vectors, self.strength, self.norm = np.ascontiguousarray(vectors, dtype=np.float32), strength, norm

    def start(self, columns: int) -> None:
        """Forget what was measured."""
        rank, rows = self.vectors.shape
        self._share = np.zeros((rank, columns))
        self._squares = np.zeros(columns)
        self._scaled = np.zeros((rank, columns))  # V Ŵ, Ŵ the matrix with unit rows; for "rows" alone
        self._lengths = np.ones(rows, dtype=np.float32)  # ‖w_i‖
        self._columns: Float32 | None = None  # what each column is multiplied with

    def partial(self, first: int, block: Float32) -> Sums:
        """The first pass: what the rows `first` … of W add. Safe in threads, a block each."""
        part = self.vectors[:, first : first + len(block)]
        scaled = None
        if self.norm == "rows":
            lengths = np.sqrt(np.einsum("ij,ij->i", block, block))
            lengths[lengths == 0] = 1
            self._lengths[first : first + len(block)] = lengths
            scaled = along(part / lengths, block)
        return Sums(along(part, block), np.einsum("ij,ij->j", block, block), scaled)

    def add(self, sums: Sums) -> None:
        """Take a block's sums in; always in the blocks' order, so that the result never depends on threads."""
        self._share += sums.share
        self._squares += sums.squares
        if sums.scaled is not None:
            self._scaled += sums.scaled

    def finish(self) -> None:
        """Between the passes: work out what the second needs."""
        self.share = self._share.astype(np.float32)
        self._toward = self._scaled.astype(np.float32)
        self._gram = (self._scaled @ self._scaled.T).astype(np.float32)
        if self.norm == "columns":
            lost = (2.0 * self.strength - self.strength**2) * np.einsum("kj,kj->j", self._share, self._share)
            rest = 1.0 - lost / np.where(self._squares > 0, self._squares, 1.0)
            self._columns = _inverse_root(rest)

    def apply(self, at: slice | NDArray[np.intp], block: Float32) -> Float32:
        """The second pass: the rows `at` of W'."""
        part = self.vectors[:, at]
        strength = np.float32(self.strength)
        if self.norm != "rows":
            edited = _without(block, strength * part, self.share)
            if self._columns is not None:
                edited *= self._columns
            return edited
        lengths = self._lengths[at]
        seen = np.einsum("ij,kj->ik", block, self._toward) / lengths[:, None]  # b = Ŵ aᵀ, (rows, k)
        rest = 1.0 - 2.0 * strength * np.einsum("ki,ik->i", part, seen)
        rest += strength**2 * np.einsum("ki,km,mi->i", part, self._gram, part)
        edited = _without(block, strength * (part * lengths), self._toward)
        edited *= _inverse_root(rest)[:, None]
        return edited

    def remains(self) -> Float64 | None:
        """V W', known without W' from the sums alone; None where rows keep their lengths, which mixes the columns."""
        if self.norm == "rows":
            return None
        rows = self.vectors.astype(np.float64)
        left: Float64 = self._share - self.strength * (rows @ rows.T) @ self.share
        return left if self._columns is None else left * self._columns

    @property
    def finite(self) -> bool:
        """Whether all the numbers measured were: every one is in a sum of squares."""
        return bool(np.isfinite(self._squares).all())

    @property
    def size(self) -> float:
        """‖VW‖, what the residual is relative to; never nil, so that an already edited matrix divides well."""
        floor = 1e-7 * math.sqrt(float(self._squares.sum()))
        return max(float(np.linalg.norm(self._share)), floor, float(np.finfo(np.float32).tiny))


def along(vectors: Float32, block: Float32) -> Float32:
    """V W for a block of rows. Not `@`: the blocks run in threads of ours, where BLAS's own only get in the way."""
    found: Float32 = np.einsum("ki,ij->kj", vectors, block)
    return found


def _without(block: Float32, vectors: Float32, share: Float32) -> Float32:
    """W - Vᵀ a, one outer product a direction."""
    rest: Float32 = vectors[0][:, None] * share[0]
    np.subtract(block, rest, out=rest)
    for row, part in zip(vectors[1:], share[1:], strict=True):
        rest -= row[:, None] * part
    return rest


def _inverse_root(rest: Float64 | Float32) -> Float32:
    """rest^(−1/2), and 1 where nothing is left."""
    left = rest > NOTHING_LEFT
    return np.where(left, np.where(left, rest, 1.0) ** -0.5, 1.0).astype(np.float32)


def edit_matrix(
    matrix: Float32,
    vectors: Float32,
    strength: float,
    norm: Norm,
    *,
    out: Float32 | None = None,
    each: Each = map,
) -> Float32:
    """W' of a whole matrix in memory, in `out` if given (not `matrix` itself). `each`: how the blocks are gone through,
    in order; a pool's `map` takes threads."""
    projection = Projection(vectors, strength, norm)
    projection.start(matrix.shape[1])
    blocks = row_blocks(*matrix.shape)
    for sums in each(lambda at: projection.partial(at.start, matrix[at]), blocks):
        projection.add(sums)
    projection.finish()
    edited = np.empty_like(matrix) if out is None else out

    def write(at: slice) -> None:
        edited[at] = projection.apply(at, matrix[at])

    for _ in each(write, blocks):
        pass
    return edited


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Rows in blocks of at most `BLOCK` numbers, in order; short ones, so that float32 sums over a block stay exact."""
    count = max(1, min(MOST_ROWS, BLOCK // max(1, columns)))
    return [slice(first, min(first + count, rows)) for first in range(0, rows, count)]


def edit_bias(bias: Float32, vectors: Float32, strength: float) -> Float32:
    """b' of a writer's bias, or of rows of biases, (…, d_out): always the plain projection.

    A bias is added whole, whatever the input: what stays of it should stay as it is, not be stretched to keep a length.
    """
    wide = bias.astype(np.float64)
    edited: Float64 = wide - strength * (wide @ vectors.T.astype(np.float64)) @ vectors
    rounded: Float32 = edited.astype(np.float32)
    return rounded
