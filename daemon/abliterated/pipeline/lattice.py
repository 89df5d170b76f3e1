"""The lattices quantised types lay over the numbers: which codes a tensor's bytes hold, and what one step of a code
changes. Codes are taken out of the bytes, moved, and put back; scales, minima and padding stay as they are.

The layouts are ggml's block formats (facts of the format, written down here in our own terms). Does not know
directions or files; does not choose scales (`quantize` lets ggml do that).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Float32: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """How one type's blocks are made: codes bottom … top in sub-blocks of `sub` numbers, value = step * level + offset.

    `levels` is None where the level is the code itself. Functions work on blocks (n, type size).
    """

    sub: int
    top: int
    unpack: Callable[[Bytes], Bytes]  # blocks -> codes (n, block size)
    pack: Callable[[Bytes, Bytes], None]  # (blocks, codes): writes the codes' bits into the blocks
    scales: Callable[[Bytes], tuple[Float32, Float32 | None]]  # blocks -> step, offset (n, block size / sub)
    levels: tuple[int, ...] | None = None
    bottom: int = 0


@dataclass
class Lattice:
    """Some rows' codes and what they stand for. `step`, `offset`: (rows, columns / sub)."""

    layout: Layout
    codes: Bytes
    step: Float32
    offset: Float32 | None

    def wide(self, narrow: NDArray[Any]) -> NDArray[Any]:
        """One number a sub-block, repeated for its numbers."""
        return np.repeat(narrow, self.layout.sub, axis=-1)

    def values(self) -> Float32:
        """What the codes stand for."""
        found = self.codes.astype(np.float32) if self.layout.levels is None else _levels(self.layout)[self.codes]
        found *= self.wide(self.step)
        if self.offset is not None:
            found += self.wide(self.offset)
        return found

    def snap(self, target: Float32) -> Float32:
        """Set every code to the one nearest `target`; the error made, value - target."""
        self.nearest(target)
        error = self.values()
        error -= target
        return error

    def nearest(self, target: Float32) -> None:
        """Set every code to the one nearest `target`."""
        with np.errstate(divide="ignore"):
            inverse = np.where(self.step != 0, np.float32(1) / self.step, np.float32(0))
        # Whole rows at a time: a loop over a sub-block's few numbers costs more than what it does.
        place = self.wide(inverse)
        place *= target
        if self.offset is not None:
            place -= self.wide(self.offset * inverse)
        if self.layout.levels is None:
            np.rint(place, out=place)
            np.clip(place, self.layout.bottom, self.layout.top, out=place)
            codes = place.astype(np.uint8)
        else:
            levels = _levels(self.layout)
            codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, place).astype(np.uint8)
        # A sub-block of scale 0 holds one value only: its codes say nothing, and stay.
        dead = self.step == 0
        if dead.any():
            codes = np.where(self.wide(dead), self.codes, codes)
        self.codes = codes

    def steps(self, row: int, upwards: NDArray[np.bool_]) -> tuple[Float32, NDArray[np.int8]]:
        """For one row: how much each value changes by one step up or down (0 where there is none), and in codes."""
        step = np.repeat(self.step[row], self.layout.sub)
        codes = self.codes[row]
        move = np.where(upwards == (step > 0), np.int8(1), np.int8(-1))
        beyond = np.where(move > 0, codes >= self.layout.top, codes <= self.layout.bottom)
        if self.layout.levels is None:
            change = step * move
        else:
            levels = _levels(self.layout)
            change = step * (levels[np.clip(codes.astype(np.int16) + move, 0, self.layout.top)] - levels[codes])
        change[beyond] = 0
        return change, move

    def shift(self, row: int, move: NDArray[np.int8]) -> None:
        """Move one row's codes."""
        self.codes[row] = (self.codes[row].astype(np.int16) + move).astype(np.uint8)


def open_lattice(raw: Bytes, kind: Type) -> Lattice:
    """The lattice of rows (rows, bytes)."""
    layout = LAYOUTS[kind]
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1])
    step, offset = layout.scales(blocks)
    rows = len(raw)
    return Lattice(
        layout,
        layout.unpack(blocks).reshape(rows, -1),
        step.reshape(rows, -1),
        None if offset is None else offset.reshape(rows, -1),
    )


def close_lattice(raw: Bytes, kind: Type, codes: Bytes) -> Bytes:
    """The rows' bytes with other codes."""
    block, size = GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, size).copy()
    LAYOUTS[kind].pack(blocks, codes.reshape(-1, block))
    return blocks.reshape(raw.shape)


def _levels(layout: Layout) -> Float32:
    return np.array(layout.levels, dtype=np.float32)


# -- pieces the layouts are made of ----------------------------------------------------------------------------


def _half(blocks: Bytes, at: int) -> Float32:
    """The float16 at that byte of each block, (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _split(packed: Bytes, bits: int) -> Bytes:
    """(…, m) bytes to (…, 8/bits, m) fields, the lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed[..., None, :] >> shifts
    fields &= np.uint8((1 << bits) - 1)
    return fields


def _join(fields: Bytes, bits: int) -> Bytes:
    """The inverse of `_split`."""
    packed = fields[..., 0, :].copy()
    for place in range(1, 8 // bits):
        packed |= fields[..., place, :] << np.uint8(place * bits)
    return packed


def _fields(blocks: Bytes, at: int, groups: int, width: int, bits: int) -> Bytes:
    """Fields of `bits` from `groups` runs of `width` bytes; within a run all lowest fields come first."""
    return _split(blocks[:, at : at + groups * width].reshape(len(blocks), groups, width), bits).reshape(
        len(blocks), -1
    )


def _set_fields(blocks: Bytes, codes: Bytes, at: int, groups: int, width: int, bits: int) -> None:
    packed = _join(codes.reshape(len(blocks), groups, 8 // bits, width), bits)
    blocks[:, at : at + groups * width] = packed.reshape(len(blocks), -1)


def _bit_rows(blocks: Bytes, at: int) -> Bytes:
    """32 bytes whose bit b belongs to number 32 b + byte."""
    return _fields(blocks, at, 1, 32, 1)


def _set_bit_rows(blocks: Bytes, bits: Bytes, at: int) -> None:
    _set_fields(blocks, bits, at, 1, 32, 1)


def _bits(blocks: Bytes, at: int) -> Bytes:
    """4 bytes whose bit j, counted through, belongs to number j."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")


def _set_bits(blocks: Bytes, bits: Bytes, at: int) -> None:
    blocks[:, at : at + 4] = np.packbits(bits, axis=1, bitorder="little")


def _scales_of_eight(blocks: Bytes, at: int) -> tuple[Float32, Float32]:
    """Q4_K's and Q5_K's eight 6-bit scales and minima in 12 bytes."""
    first, second, third = (blocks[:, at + 4 * i : at + 4 * i + 4] for i in range(3))
    scale = np.concatenate(
        [first & np.uint8(63), (third & np.uint8(15)) | (first >> np.uint8(6) << np.uint8(4))], axis=1
    )
    minimum = np.concatenate(
        [second & np.uint8(63), (third >> np.uint8(4)) | (second >> np.uint8(6) << np.uint8(4))], axis=1
    )
    return scale.astype(np.float32), minimum.astype(np.float32)


def _scales_of_sixteen(blocks: Bytes, at: int) -> Float32:
    """Q3_K's sixteen 6-bit scales in 12 bytes, less 32."""
    low = _fields(blocks, at, 1, 8, 4)
    high = _fields(blocks, at + 8, 1, 4, 2)
    return (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)


# -- the layouts -----------------------------------------------------------------------------------------------


def _simple(at: int, high: int | None, minimum: bool, zero: int) -> Layout:
    """Q4_0, Q4_1, Q5_0, Q5_1: a scale, perhaps a minimum, perhaps fifth bits, sixteen bytes of half-bytes."""

    def unpack(blocks: Bytes) -> Bytes:
        codes = _fields(blocks, at, 1, 16, 4)
        return codes if high is None else codes | (_bits(blocks, high) << np.uint8(4))

    def pack(blocks: Bytes, codes: Bytes) -> None:
        _set_fields(blocks, codes & np.uint8(15), at, 1, 16, 4)
        if high is not None:
            _set_bits(blocks, codes >> np.uint8(4), high)

    def scales(blocks: Bytes) -> tuple[Float32, Float32 | None]:
        step = _half(blocks, 0)
        return step, _half(blocks, 2) if minimum else step * np.float32(-zero)

    return Layout(32, 15 if high is None else 31, unpack, pack, scales)


def _q8_unpack(blocks: Bytes) -> Bytes:
    return blocks[:, 2:] ^ np.uint8(128)


def _q8_pack(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = codes ^ np.uint8(128)


def _q8_scales(blocks: Bytes) -> tuple[Float32, Float32]:
    step = _half(blocks, 0)
    return step, step * np.float32(-128)


def _q2k_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, codes, 16, 2, 32, 2)


def _q2k_scales(blocks: Bytes) -> tuple[Float32, Float32]:
    step = _half(blocks, 80) * (blocks[:, :16] & np.uint8(15)).astype(np.float32)
    return step, -_half(blocks, 82) * (blocks[:, :16] >> np.uint8(4)).astype(np.float32)


def _q3k_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, codes & np.uint8(3), 32, 2, 32, 2)
    _set_bit_rows(blocks, codes >> np.uint8(2), 0)


def _q3k_scales(blocks: Bytes) -> tuple[Float32, Float32]:
    step = _half(blocks, 108) * _scales_of_sixteen(blocks, 96)
    return step, step * np.float32(-4)


def _q4k_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, codes, 16, 4, 32, 4)


def _q45k_scales(blocks: Bytes) -> tuple[Float32, Float32]:
    scale, minimum = _scales_of_eight(blocks, 4)
    return _half(blocks, 0) * scale, -_half(blocks, 2) * minimum


def _q5k_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, codes & np.uint8(15), 48, 4, 32, 4)
    _set_bit_rows(blocks, codes >> np.uint8(4), 16)


def _q6k_unpack(blocks: Bytes) -> Bytes:
    return _fields(blocks, 0, 2, 64, 4) | (_fields(blocks, 128, 2, 32, 2) << np.uint8(4))


def _q6k_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, codes & np.uint8(15), 0, 2, 64, 4)
    _set_fields(blocks, codes >> np.uint8(4), 128, 2, 32, 2)


def _q6k_scales(blocks: Bytes) -> tuple[Float32, Float32]:
    step = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return step, step * np.float32(-32)


# E2M1 numbers, doubled; the format has two zeros, of which the plain one is written.
_MXFP4_LEVELS: Final = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
_MXFP4_TO_RANK: Final = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0], dtype=np.uint8)
_MXFP4_FROM_RANK: Final = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=np.uint8)
_IQ4_LEVELS: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _mxfp4_unpack(blocks: Bytes) -> Bytes:
    return _MXFP4_TO_RANK[_fields(blocks, 1, 1, 16, 4)]


def _mxfp4_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, _MXFP4_FROM_RANK[codes], 1, 1, 16, 4)


def _mxfp4_scales(blocks: Bytes) -> tuple[Float32, None]:
    # 2^(e - 128): half of the E8M0 exponent's power, because the levels are doubled.
    return np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128).astype(np.float32), None


def _iq4nl_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, codes, 2, 1, 16, 4)


def _iq4xs_pack(blocks: Bytes, codes: Bytes) -> None:
    _set_fields(blocks, codes, 8, 8, 16, 4)


def _iq4xs_scales(blocks: Bytes) -> tuple[Float32, None]:
    low = np.stack([blocks[:, 4:8] & np.uint8(15), blocks[:, 4:8] >> np.uint8(4)], axis=2).reshape(len(blocks), 8)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    return _half(blocks, 0) * ((low | (high.astype(np.uint8) << np.uint8(4))).astype(np.float32) - np.float32(32)), None


LAYOUTS: Final[dict[Type, Layout]] = {
    Type.Q4_0: _simple(2, None, False, 8),
    Type.Q4_1: _simple(4, None, True, 0),
    Type.Q5_0: _simple(6, 2, False, 16),
    Type.Q5_1: _simple(8, 4, True, 0),
    Type.Q8_0: Layout(32, 255, _q8_unpack, _q8_pack, _q8_scales, bottom=1),
    Type.Q2_K: Layout(16, 3, lambda blocks: _fields(blocks, 16, 2, 32, 2), _q2k_pack, _q2k_scales),
    Type.Q3_K: Layout(
        16,
        7,
        lambda blocks: _fields(blocks, 32, 2, 32, 2) | (_bit_rows(blocks, 0) << np.uint8(2)),
        _q3k_pack,
        _q3k_scales,
    ),
    Type.Q4_K: Layout(32, 15, lambda blocks: _fields(blocks, 16, 4, 32, 4), _q4k_pack, _q45k_scales),
    Type.Q5_K: Layout(
        32,
        31,
        lambda blocks: _fields(blocks, 48, 4, 32, 4) | (_bit_rows(blocks, 16) << np.uint8(4)),
        _q5k_pack,
        _q45k_scales,
    ),
    Type.Q6_K: Layout(16, 63, _q6k_unpack, _q6k_pack, _q6k_scales),
    Type.MXFP4: Layout(32, 14, _mxfp4_unpack, _mxfp4_pack, _mxfp4_scales, _MXFP4_LEVELS),
    Type.IQ4_NL: Layout(
        32, 15, lambda blocks: _fields(blocks, 2, 1, 16, 4), _iq4nl_pack, lambda b: (_half(b, 0), None), _IQ4_LEVELS
    ),
    Type.IQ4_XS: Layout(32, 15, lambda blocks: _fields(blocks, 8, 8, 16, 4), _iq4xs_pack, _iq4xs_scales, _IQ4_LEVELS),
}
