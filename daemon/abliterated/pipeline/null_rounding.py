"""Null rounding: after a matrix is rounded to its type's lattice, move some codes by one step so that what rounding
left along the refusal direction cancels.

r_j = Vᵀ(W_q − W')_j is what is left in column j. Rows are walked from the largest |v_i| to the smallest; in each, a
code moves one step where that shrinks |r_j|, never further than one step from its target. Deterministic.

Does not know files, models or how W' came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterated.pipeline.quantize import dequantize, to_bfloat16

Float32: TypeAlias = NDArray[np.float32]
Signs: TypeAlias = NDArray[np.int8]

CHECK_EVERY: Final = 16  # rows between two looks at whether enough is cancelled
FEW: Final = 128  # a row helps few columns where it helps fewer than one in this many
FINER: Final = 0.99  # of |v_i|², to go on with then


class Steppable(Protocol):
    """Codes of which each can move a step."""

    def steps(self, row: int, upwards: NDArray[np.bool_]) -> tuple[Float32, Signs]: ...

    def shift(self, row: int, move: Signs) -> None: ...


class Errors(Protocol):
    """The signs of W_q − W', row by row; an array of them is one."""

    def __getitem__(self, row: int, /) -> Any: ...


@dataclass
class FloatLattice:
    """F16 and BF16 as a lattice: neighbouring numbers are one step apart. `codes` are bit patterns (rows, columns)."""

    kind: Type
    codes: NDArray[np.uint16]

    @classmethod
    def of(cls, values: Float32, kind: Type) -> FloatLattice:
        """The nearest codes."""
        return cls(kind, values.astype(np.float16).view(np.uint16) if kind is Type.F16 else to_bfloat16(values))

    def raw(self) -> NDArray[np.uint8]:
        """The rows' bytes."""
        return np.ascontiguousarray(self.codes).view(np.uint8)

    def steps(self, row: int, upwards: NDArray[np.bool_]) -> tuple[Float32, Signs]:
        codes = self.codes[row]
        # Away from zero is the next bit pattern, towards it the one before; zero itself stays.
        move = signs(upwards ^ (codes.view(np.int16) < 0))
        there = codes.view(np.int16) + move
        change = dequantize(there.view(np.uint8), self.kind) - dequantize(codes.view(np.uint8), self.kind)
        change[((codes & 0x7FFF) == 0) | ~np.isfinite(change)] = 0
        return change, move

    def shift(self, row: int, move: Signs) -> None:
        codes = self.codes[row].view(np.int16)
        codes += move


def signs(upwards: NDArray[np.bool_]) -> Signs:
    """1 where it is true, −1 where not."""
    found = upwards.view(np.int8) * np.int8(2)
    found -= np.int8(1)
    return found


def walk(vectors: Float32) -> NDArray[np.intp]:
    """The rows in the order in which they are tried: those first that lie most along the directions."""
    return np.argsort(-np.einsum("kr,kr->r", vectors, vectors), kind="stable")


def cancel(lattice: Steppable, vectors: Float32, left: Float32, errors: Errors, goal: float) -> int:
    """Move codes until ‖left‖ ≤ goal or no row can help; how many moved.

    `left` is Vᵀ(W_q − W'), (k, columns), and is updated; `errors` gives the signs of a row of W_q − W'.
    """
    weights = np.einsum("kr,kr->r", vectors, vectors)
    order = walk(vectors)
    falling = -weights[order]
    if float(np.linalg.norm(left)) <= goal:
        return 0
    few = left.shape[1] // FEW
    moved = at = walked = 0
    while at < len(order) and falling[at] < 0:
        row = int(order[at])
        along = vectors[:, row]
        # A change by d changes ‖left_j‖² by 2 d pull + d² weight; it may not go past zero.
        pull = np.einsum("k,kj->j", along, left) if len(left) > 1 else along[0] * left[0]
        upwards = pull < 0
        change, move = lattice.steps(row, upwards)
        gain = np.abs(pull) >= np.abs(change) * weights[row]
        gain &= signs(upwards) != errors[row]
        gain &= change != 0
        count = int(np.count_nonzero(gain))
        if count:
            change *= gain
            move *= gain
            lattice.shift(row, move)
            left += along[:, None] * change
            moved += count
        walked += 1
        if walked % CHECK_EVERY == 0 and float(np.linalg.norm(left)) <= goal:
            break
        # Where a row helped few columns, steps are too coarse by now: on to rows of a smaller |v_i|.
        at = at + 1 if count > few else max(at + 1, int(np.searchsorted(falling, falling[at] * FINER)))
    return moved


def join(parts: list[Any]) -> Any:
    """Blocks of rows put together."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
