"""Reading a GGUF's structure: the same as gguf-py sees, and one named error for anything that isn't one."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import ModelError
from abliterated.pipeline.gguf_file import read_gguf, split_parts
from pipeline import tiny_gguf


def small(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_uint32("llama.embedding_length", 32)
    writer.add_token_list(["a", "b", "c"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("a.weight", np.ones((4, 32), dtype=np.float32))
    writer.add_tensor("b.weight", np.ones(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_structure_is_what_gguf_py_reads(tmp_path):
    path = tiny_gguf.write(tmp_path / "t.gguf", tiny_gguf.tiny("llama"), Type.Q4_K)
    structure, reader = read_gguf(path), gguf.GGUFReader(path)
    assert structure.architecture == "llama"
    assert structure.number("embedding_length") == tiny_gguf.WIDTH
    assert [entry.key for entry in structure.key_values] == [n for n in reader.fields if not n.startswith("GGUF.")]
    for tensor, other in zip(structure.tensors, reader.tensors, strict=True):
        assert tensor.name == other.name
        assert tensor.shape == tuple(reversed(other.shape.tolist()))
        assert (tensor.type, tensor.start, tensor.size) == (other.tensor_type, other.data_offset, other.n_bytes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"GGML" + data[4:], "is not a GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:20], "too short"),
        (lambda data: data[:60], "truncated"),
        (lambda data: b"", "too short"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "truncated"),
    ],
)
def test_what_is_wrong_is_said(base, tmp_path, change, words):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(change(base.read_bytes()))
    with pytest.raises(ModelError, match=words) as error:
        read_gguf(broken)
    assert error.value.remedy


def test_a_missing_file_and_a_folder_are_model_errors(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError, match="can't read"):
            read_gguf(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_makes_anything_but_a_model_error(base, tmp_path, data):
    content = bytearray(base.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 420))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(bytes(content[:cut]) if data.draw(st.booleans()) else bytes(content))
    try:
        structure = read_gguf(broken)
    except ModelError:
        return
    assert all(tensor.start + tensor.size <= structure.size for tensor in structure.tensors)


def test_parts_of_a_split_model_are_found_or_missed_by_name(base, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("a.weight", np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = tmp_path / "m-00001-of-00002.gguf"
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf is missing"):
        split_parts(first, read_gguf(first))
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(base.read_bytes())
    assert split_parts(first, read_gguf(first)) == (first, second)
    assert split_parts(base, read_gguf(base)) == (base,)
