"""The GGUF header reader against good, cut and damaged files."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import ModelError
from abliterated.engine.header import TENSOR_TYPES, read_header
from engine.scripted_gguf import Model, write

FIXTURE = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("header") / "m.gguf", Model(extra={"test.flag": True})).read_bytes()


def test_it_reads_what_gguf_py_wrote(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", Model(extra={"test.flag": True, "test.number": 7, "test.real": 0.5}))
    header = read_header(path)
    reference = gguf.GGUFReader(path)
    assert [t.name for t in header.tensors] == [t.name for t in reference.tensors]
    assert [t.shape for t in header.tensors] == [tuple(int(n) for n in t.shape) for t in reference.tensors]
    assert [t.kind for t in header.tensors] == [t.tensor_type.name for t in reference.tensors]
    assert header.parameters == sum(int(t.n_elements) for t in reference.tensors)
    assert (
        header.values["test.flag"] is True and header.values["test.number"] == 7 and header.values["test.real"] == 0.5
    )
    assert header.architecture == "llama" and header.file_type == "F32" and header.number("context_length") == 4096
    assert header.values["tokenizer.ggml.tokens"] is None
    assert read_header(path, keep=1 << 40).values["tokenizer.ggml.tokens"][256] == "<|im_start|>"


def test_the_sizes_of_the_types_are_ggufs_own() -> None:
    for number, (name, elements, width) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (elements, width))


@FIXTURE
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, small: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(small) - 33) | st.integers(0, 6000))
    path = tmp_path / "cut.gguf"
    path.write_bytes(small[:length])
    with pytest.raises(ModelError):
        read_header(path)


@FIXTURE
@given(data=st.data())
def test_damage_never_raises_anything_else_nor_costs_memory(tmp_path: Path, small: bytes, data: st.DataObject) -> None:
    damaged = bytearray(small[:12_000])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(4, 11_999))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    os.truncate(path, len(small))
    try:
        read_header(path)
    except ModelError as error:
        assert error.message


@FIXTURE
@given(content=st.binary(max_size=200))
def test_anything_after_the_magic_is_an_error_in_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + content)
    try:
        header = read_header(path)
    except ModelError:
        return
    assert header.tensors == ()


def test_a_file_that_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"can't read nothing.gguf"):
        read_header(tmp_path / "nothing.gguf")
