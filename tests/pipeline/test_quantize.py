"""ggml's types: layouts against gguf-py's decoder, null rounding against its bar, floats against torch."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize as gguf_dequantize

from abliterate.contract.errors import ModelError
from abliterated.pipeline import quantize as ggml
from abliterated.pipeline.edit import edit_matrix
from abliterated.pipeline.lattice import LAYOUTS, close_lattice, open_lattice
from abliterated.pipeline.tensor_edit import TOLERANCE, Attempt, attempts, edit_rows, edit_turned

KEPT = (Type.F16, Type.BF16, *LAYOUTS)


def _matrix(rows=512, columns=512, seed=0):
    random = np.random.default_rng(seed)
    vector = random.standard_normal((1, rows)).astype(np.float32)
    vector /= np.linalg.norm(vector)
    return vector, (random.standard_normal((rows, columns)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_a_lattice_reads_and_writes_the_bytes_ggml_made(kind):
    _, matrix = _matrix(32, 1024)
    raw = ggml.quantize(matrix, kind)
    lattice = open_lattice(raw, kind)
    np.testing.assert_array_equal(lattice.values(), gguf_dequantize(raw, kind))
    np.testing.assert_array_equal(close_lattice(raw, kind, lattice.codes), raw)
    random = np.random.default_rng(1)
    codes = random.integers(lattice.layout.bottom, lattice.layout.top + 1, lattice.codes.shape).astype(np.uint8)
    np.testing.assert_array_equal(open_lattice(close_lattice(raw, kind, codes), kind).codes, codes)


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_snapping_finds_the_nearest_code_and_tells_the_error(kind):
    _, matrix = _matrix(8, 256)
    lattice = open_lattice(ggml.quantize(matrix, kind), kind)
    before = np.abs(lattice.values() - matrix)
    error = lattice.snap(matrix)
    np.testing.assert_allclose(lattice.values() - matrix, error, atol=1e-7)
    assert (np.abs(error) <= before + 1e-7).all()


@pytest.mark.parametrize(
    ("kind", "fresh"), [(kind, fresh) for kind in KEPT for fresh in (False, True) if fresh or kind in LAYOUTS]
)
@pytest.mark.parametrize("norm", ["columns", "none"])
def test_null_rounding_leaves_less_than_a_hundredth_in_every_type_kept(kind, fresh, norm):
    vector, matrix = _matrix()
    raw = ggml.quantize(matrix, kind)
    outcome = edit_rows(raw, kind, Attempt(kind, fresh), vector, 1.0, norm)
    written = ggml.dequantize(outcome.raw, kind)
    after = np.linalg.norm(vector.astype(np.float64) @ written)
    before = np.linalg.norm(vector.astype(np.float64) @ ggml.dequantize(raw, kind))
    assert after / before == pytest.approx(outcome.after / outcome.before, rel=0.02, abs=1e-5)
    assert after <= TOLERANCE * before
    exact = edit_matrix(ggml.dequantize(raw, kind), vector, 1.0, norm)
    if not fresh:
        # Codes go no further than a step from their target (but where the lattice ends before it): the noise stays of
        # the lattice's own size.
        layout, codes = LAYOUTS[kind], open_lattice(outcome.raw, kind).codes
        inside = (codes > layout.bottom) & (codes < layout.top)
        step = np.repeat(np.abs(open_lattice(raw, kind).step), LAYOUTS[kind].sub, axis=1)
        widest = 1 if LAYOUTS[kind].levels is None else np.diff(LAYOUTS[kind].levels).max()
        assert (np.abs(written - exact) <= step * widest * 1.01 + 1e-7)[inside].all()


def test_without_null_rounding_the_edit_would_drown_in_coarse_types():
    vector, matrix = _matrix()
    raw = ggml.quantize(matrix, Type.Q4_0)
    exact = edit_matrix(ggml.dequantize(raw, Type.Q4_0), vector, 1.0, "none")
    lattice = open_lattice(raw, Type.Q4_0)
    lattice.snap(exact)
    naive = np.linalg.norm(vector @ lattice.values()) / np.linalg.norm(vector @ ggml.dequantize(raw, Type.Q4_0))
    assert naive > 0.2


def test_three_directions_cancel_at_once():
    random = np.random.default_rng(4)
    vectors = np.ascontiguousarray(np.linalg.qr(random.standard_normal((512, 3)))[0].T.astype(np.float32))
    raw = ggml.quantize(_matrix(seed=5)[1], Type.Q4_K)
    outcome = edit_rows(raw, Type.Q4_K, Attempt(Type.Q4_K, False), vectors, 1.0, "columns")
    assert outcome.after <= TOLERANCE * outcome.before


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q6_K, Type.Q4_0], ids=lambda kind: kind.name)
def test_embeddings_are_edited_along_their_rows(kind):
    vector, matrix = _matrix(300, 512)
    vector = _matrix(512, 8, seed=3)[0]
    raw = ggml.quantize(matrix, kind)
    outcome = edit_turned(raw, kind, next(attempts(kind, 512)), vector, 1.0, "columns")
    written = ggml.dequantize(outcome.raw, kind)
    before = np.linalg.norm(ggml.dequantize(raw, kind) @ vector.T)
    assert np.linalg.norm(written @ vector.T) <= TOLERANCE * before
    exact = edit_matrix(np.ascontiguousarray(ggml.dequantize(raw, kind).T), vector, 1.0, "columns").T
    assert np.linalg.norm(written - exact) <= (0.1 if kind is Type.Q4_0 else 0.04) * np.linalg.norm(exact)


def test_the_same_bytes_come_out_twice():
    vector, matrix = _matrix()
    raw = ggml.quantize(matrix, Type.Q4_K)
    first, second = (edit_rows(raw, Type.Q4_K, Attempt(Type.Q4_K, False), vector, 1.0, "columns") for _ in range(2))
    np.testing.assert_array_equal(first.raw, second.raw)


def test_nan_and_infinity_are_found():
    vector, matrix = _matrix(64, 64)
    for wrong in (np.nan, np.inf):
        matrix[5, 7] = wrong
        with pytest.raises(ModelError, match="NaN or Inf"):
            edit_rows(ggml.quantize(matrix, Type.F32), Type.F32, Attempt(Type.F32, True), vector, 1.0, "columns")


def test_types_go_from_their_own_to_wider_ones():
    assert [way.kind for way in attempts(Type.Q4_K, 256)] == [Type.Q4_K, Type.Q4_K, Type.Q8_0, Type.F16]
    assert [way.kind for way in attempts(Type.IQ2_XS, 256)] == [Type.Q8_0, Type.F16]
    assert [way.kind for way in attempts(Type.BF16, 100)] == [Type.BF16]


def test_bfloat16_rounds_to_nearest_even():
    import torch

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ggml.to_bfloat16(values), wanted)


@pytest.fixture
def untried():
    """The library is looked for anew, and again behind the test."""
    for tried in (ggml._library, ggml._loop):
        tried.cache_clear()
    yield
    for tried in (ggml._library, ggml._loop):
        tried.cache_clear()


@pytest.mark.usefixtures("untried")
def test_bfloat16_is_the_same_to_the_last_bit_without_ggml(monkeypatch):
    values = np.random.default_rng(0).integers(0, 1 << 32, (100, 1000), dtype=np.uint32).view(np.float32)
    values = np.ascontiguousarray(np.where(np.isfinite(values), values, np.float32(0)))
    turned = values[:, ::2].T  # numpy's way, where rows are not in one piece
    narrow, apart = ggml.to_bfloat16(values), ggml.to_bfloat16(turned)
    wide = ggml.from_bfloat16(narrow)
    ggml._library.cache_clear()
    ggml._loop.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as where it is not installed
    assert ggml._loop("ggml_cpu_fp32_to_bf16") is None
    np.testing.assert_array_equal(ggml.to_bfloat16(values), narrow)
    np.testing.assert_array_equal(apart, narrow[:, ::2].T)
    np.testing.assert_array_equal(ggml.from_bfloat16(narrow).view(np.uint32), wide.view(np.uint32))


def test_ggml_s_loops_are_those_taken():
    for name in ("ggml_cpu_fp32_to_bf16", "ggml_cpu_bf16_to_fp32"):
        assert ggml._loop(name) is not None
    assert ggml._loop("ggml_no_such_loop") is None


def useless(said, remedy):
    """What is found is not used, and that is what is said."""
    with pytest.raises(ggml.QuantiserError, match=said) as raised:
        ggml.quantize(np.zeros((1, 256), dtype=np.float32), Type.Q8_0)
    assert remedy in raised.value.remedy


@pytest.mark.usefixtures("untried")
def test_quantisers_that_are_not_there_or_not_ggml_s_are_not_used(tmp_path, monkeypatch):
    remedy = "pip install 'abliterated[pipeline]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "xllamacpp", None)  # as where it is not installed
        useless("xllamacpp, which brings ggml's quantisers, is not installed", remedy)
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").touch()
    library = tmp_path / "xllamacpp" / "xllamacpp.so"
    library.write_bytes(b"no library")
    useless("this xllamacpp does not offer ggml's quantisers", remedy)
    if not (compiler := shutil.which("cc")):
        return
    source = tmp_path / "zeros.c"
    source.write_text(
        "#include <stddef.h>\nvoid ggml_quantize_init(int kind) {}\n"
        "_Bool ggml_quantize_requires_imatrix(int kind) { return 0; }\n"
        "size_t ggml_quantize_chunk() { return 272; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
    useless("xllamacpp's quantiser of Q8_0 does not do what ggml's does", "Reinstall xllamacpp")
