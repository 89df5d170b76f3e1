"""Numbers out of ggml's types and back into them: gguf-py decodes, ggml's own quantisers encode.

The quantisers are C functions of the xllamacpp wheel, called through ctypes and tried on a known block when loaded.
Does not know directions; null rounding, which works on what comes out of here, is `null_rounding`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

import gguf.quants
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterate.contract.errors import AbliteratedError, ModelError
from abliterated.pipeline.lattice import LAYOUTS, open_lattice

Bytes: TypeAlias = NDArray[np.uint8]
Float32: TypeAlias = NDArray[np.float32]

FLOATS: Final = (Type.F32, Type.F16, Type.BF16)


class QuantiserError(AbliteratedError):
    """ggml's quantisers can't be used."""

    exit_code = 1


def dequantize(raw: Bytes, kind: Type) -> Float32:
    """Rows of bytes (rows, bytes) as numbers (rows, columns)."""
    if kind is Type.F32:
        return raw.view(np.float32)
    if kind is Type.F16:
        return raw.view(np.float16).astype(np.float32)
    if kind is Type.BF16:
        return from_bfloat16(raw.view(np.uint16))
    if kind in LAYOUTS:
        return open_lattice(raw, kind).values()
    try:
        found: Float32 = gguf.quants.dequantize(raw, kind).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise ModelError(
            f"tensors of type {kind.name} can't be decoded", remedy="Take another quantisation of the model"
        ) from error
    return found


def quantize(values: Float32, kind: Type, out: Bytes | None = None) -> Bytes:
    """Rows of numbers (rows, columns) as bytes (rows, bytes), in `out` where that is given."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, columns = values.shape
    block, size = GGML_QUANT_SIZES[kind]
    assert columns % block == 0, "who chooses a type looks whether the rows fit it"
    raw = np.empty((rows, columns // block * size), dtype=np.uint8) if out is None else out
    if kind is Type.F32:
        raw.view(np.float32)[...] = values
    elif kind is Type.F16:
        raw.view(np.float16)[...] = values
    elif kind is Type.BF16:
        to_bfloat16(values, raw.view(np.uint16))
    else:
        assert raw.flags.c_contiguous, "rows of their own"
        library = _library()
        library.ggml_quantize_init(kind.value)
        written = library.ggml_quantize_chunk(kind.value, values.ctypes.data, raw.ctypes.data, 0, rows, columns, None)
        assert written == raw.nbytes, "this library was tried, and writes as many bytes as it should"
    return raw


def to_bfloat16(values: Float32, out: NDArray[np.uint16] | None = None) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; finite numbers only."""
    found = np.empty(values.shape, dtype=np.uint16) if out is None else out
    narrow = _loop("ggml_cpu_fp32_to_bf16")
    if narrow is not None and values.flags.c_contiguous and found.flags.c_contiguous:
        narrow(values.ctypes.data, found.ctypes.data, values.size)
    else:
        _narrow(values, found)
    return found


def from_bfloat16(bits: NDArray[np.uint16]) -> Float32:
    """The same numbers as float32."""
    widen = _loop("ggml_cpu_bf16_to_fp32")
    if widen is None or not bits.flags.c_contiguous:
        return _widen(bits)
    values = np.empty(bits.shape, dtype=np.float32)
    widen(bits.ctypes.data, values.ctypes.data, bits.size)
    return values


def _narrow(values: Float32, out: NDArray[np.uint16]) -> None:
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    out[...] = rounded


def _widen(bits: NDArray[np.uint16]) -> Float32:
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


@cache
def _loop(name: str) -> Callable[[int, int, int], None] | None:
    """ggml's loop between float32 and bfloat16, one pass where numpy needs several; None where this build has none, or
    one that does not do to the last bit what numpy does here."""
    try:
        found = getattr(_library(), name)
    except (QuantiserError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[np.isfinite(_widen(every))]
    if name == "ggml_cpu_bf16_to_fp32":
        got, wanted = np.empty(every.size, dtype=np.float32), _widen(every)
        found(every.ctypes.data, got.ctypes.data, every.size)
        return found if np.array_equal(got.view(np.uint32), wanted.view(np.uint32)) else None
    # On, halfway between and to both sides of every number there is.
    halves = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (_widen(every).view(np.uint32)[:, None] | halves).view(np.float32)
    rounded, expected = np.empty(values.shape, dtype=np.uint16), np.empty(values.shape, dtype=np.uint16)
    found(values.ctypes.data, rounded.ctypes.data, values.size)
    _narrow(values, expected)
    return found if np.array_equal(rounded, expected) else None


@cache
def _library() -> ctypes.CDLL:
    """ggml within xllamacpp's extension module, loaded as a plain library and tried once."""
    remedy = "Install the pipeline: pip install 'abliterated[pipeline]'"
    found = importlib.util.find_spec("xllamacpp")
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not files:
        raise QuantiserError("xllamacpp, which brings ggml's quantisers, is not installed", remedy=remedy)
    try:
        library = ctypes.CDLL(str(files[0]))
        chunk = library.ggml_quantize_chunk
        start = library.ggml_quantize_init
        matrix = library.ggml_quantize_requires_imatrix
    except (OSError, AttributeError) as error:
        raise QuantiserError("this xllamacpp does not offer ggml's quantisers", remedy=remedy) from error
    chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    start.argtypes, start.restype = [ctypes.c_int], None
    matrix.argtypes, matrix.restype = [ctypes.c_int], ctypes.c_bool
    _try_known_block(library)
    return library


def _try_known_block(library: ctypes.CDLL) -> None:
    """A ramp as Q8_0, byte for byte, and as Q4_K, back again: a wrong ABI must not write a model."""
    ramp = np.arange(-127, 129, dtype=np.float32)
    ramp[-1] = 0
    for kind, bound in ((Type.Q8_0, 0.51), (Type.Q4_K, 6.0)):
        raw = np.zeros((1, 256 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        library.ggml_quantize_init(kind.value)
        written = library.ggml_quantize_chunk(kind.value, ramp.ctypes.data, raw.ctypes.data, 0, 1, 256, None)
        if written != raw.nbytes or np.abs(dequantize(raw, kind)[0] - ramp).max() > bound:
            raise QuantiserError(
                f"xllamacpp's quantiser of {kind.name} does not do what ggml's does", remedy="Reinstall xllamacpp"
            )
