"""Models that are none: each is named with what is wrong, before anything is loaded."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from abliterate.contract.errors import ModelError
from abliterated.pipeline.safetensors_file import INDEX
from abliterated.pipeline.source import check_unchanged, open_source
from pipeline.planted import plant


def test_a_gguf_is_known_by_its_header(tmp_path: Path) -> None:
    source = open_source(plant(tmp_path).path)
    assert (source.kind, source.architecture, source.layers, source.hidden_size) == ("gguf", "llama", 4, 64)
    assert source.context == 64


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    whole = plant(tmp_path).path.read_bytes()
    for name, data, said in (
        ("magic.gguf", b"PK\x03\x04" + whole[4:], "not a GGUF file"),
        ("empty.gguf", b"", "too short"),
        ("short.gguf", whole[: len(whole) // 2], "truncated"),
        ("header.gguf", whole[:200], "truncated"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ModelError, match=said) as raised:
            open_source(path)
        assert name in raised.value.message
        assert raised.value.remedy
    with pytest.raises(ModelError, match="no model at"):
        open_source(tmp_path / "nothing.gguf")


def write(path: Path, architecture: str, tensor: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(8)
    writer.add_tensor(tensor, np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a language model but clip"):
        open_source(write(tmp_path / "mmproj.gguf", "clip", "v.patch_embd.weight"))
    with pytest.raises(ModelError, match="no token embedding"):
        open_source(write(tmp_path / "odd.gguf", "llama", "blk.0.attn_q.weight"))


def test_an_adapter_is_named_as_what_it_is(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"lora\.gguf.*not a language model but an adapter \(LoRA\) for llama"):
        open_source(tmp_path / "lora.gguf")


def test_a_model_that_changes_under_our_hands_is_noticed(tmp_path: Path) -> None:
    path = plant(tmp_path).path
    source = open_source(path)
    check_unchanged(source)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match=r"planted\.gguf changed while it was read"):
        check_unchanged(source)
    path.unlink()
    with pytest.raises(ModelError, match=r"planted\.gguf changed"):
        check_unchanged(source)


def folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def test_a_folder_is_known_by_its_config(tmp_path: Path) -> None:
    path = folder(tmp_path / "one", num_hidden_layers=2, hidden_size=8, max_position_embeddings=16)
    save_file({"x": np.zeros(1, dtype=np.float32)}, path / "model.safetensors")
    source = open_source(path)
    assert (source.kind, source.layers, source.hidden_size, source.context) == ("safetensors", 2, 8, 16)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks model-00002\.safetensors"):
        open_source(path)


def test_a_shard_that_is_shorter_than_its_header_says_is_named_before_it_is_mapped(tmp_path: Path) -> None:
    path = folder(tmp_path / "one", num_hidden_layers=2, hidden_size=8)
    save_file({"x": np.zeros(99, dtype=np.float32)}, path / "model.safetensors")
    assert open_source(path).parts == (path / "model.safetensors",)
    os.truncate(path / "model.safetensors", 300)
    with pytest.raises(ModelError, match=r"model\.safetensors is cut short, or describes x wrongly") as raised:
        open_source(path)
    assert raised.value.remedy == "Download it again"


def test_weights_of_another_format_in_the_folder_are_none_of_the_models(tmp_path: Path) -> None:
    path = folder(tmp_path / "one", num_hidden_layers=2, hidden_size=8)
    for name in ("model.safetensors", "consolidated.safetensors"):
        save_file({"x": np.zeros(99, dtype=np.float32)}, path / name)
    source = open_source(path)
    assert [part.name for part in source.parts] == ["model.safetensors"]
    assert source.size == (path / "model.safetensors").stat().st_size


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_source(tmp_path / "empty")
    path = folder(tmp_path / "pickled", num_hidden_layers=2, hidden_size=8)
    (path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="no safetensors"):
        open_source(path)
    save_file({"x": np.zeros(1, dtype=np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ModelError, match="num_hidden_layers"):
        open_source(path)


def indexed(index: dict[str, object] | bytes) -> dict[str, bytes]:
    """A good shard, and that index beside it."""
    told = index if isinstance(index, bytes) else json.dumps(index).encode()
    return {"model-1.safetensors": save({"x": np.zeros(4)}), INDEX: told}


def shard(header: object) -> dict[str, bytes]:
    """A model of that header, and zeros."""
    told = json.dumps(header).encode()
    return {"model.safetensors": struct.pack("<Q", len(told)) + told + bytes(64)}


def place(at: int) -> dict[str, object]:
    """Four numbers there."""
    return {"dtype": "F32", "shape": [4], "data_offsets": [at, at + 16]}


@pytest.mark.parametrize(
    ("files", "said", "remedy"),
    [
        ({"config.json": b"["}, r"can't read config\.json: it is no JSON", "Download it again"),
        ({"config.json": b"[]"}, r"config\.json holds no JSON object", "Download it again"),
        ({"config.json": None}, r"can't read config\.json: Is a directory", "Check the folder"),
        ({"weights.safetensors": None}, r"can't read weights\.safetensors: Is a directory", "Check the folder"),
        (indexed(b"{"), r"can't read model\.safetensors\.index\.json: it is no JSON", "Download it again"),
        (indexed({}), r"index\.json has no weight_map", "Download the model again"),
        (indexed({"weight_map": {"y": "model-1.safetensors"}}), "model lacks y, which its index names", "Download"),
        (
            {
                **indexed({"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}),
                "model-2.safetensors": save({"x": np.zeros(4)}),
            },
            "model holds a tensor twice",
            "Download the model again",
        ),
        ({"model.safetensors": b"<html>"}, r"model\.safetensors is no safetensors file, or cut short", "Download"),
        (shard({"__metadata__": {"format": "pt"}}), r"model\.safetensors holds no tensors", "Download it again"),
        (shard({"x": {"dtype": "F32", "shape": [4]}}), r"model\.safetensors describes x wrongly", "Download it again"),
        (
            shard({"x": place(0), "y": place(8)}),
            r"model\.safetensors holds tensors that overlap",
            "Download it again",
        ),
    ],
)
def test_a_folder_that_is_not_whole_or_not_true_is_named_before_anything_is_loaded(
    tmp_path: Path, files: dict[str, bytes | None], said: str, remedy: str
) -> None:
    path = folder(tmp_path / "model", num_hidden_layers=2, hidden_size=8)
    if all(name == "config.json" for name in files):
        (path / "model.safetensors").write_bytes(save({"x": np.zeros(4)}))
    for name, data in files.items():
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir() if data is None else (path / name).write_bytes(data)
    with pytest.raises(ModelError, match=said) as raised:
        open_source(path)
    assert raised.value.remedy.startswith(remedy)


def test_looking_at_a_model_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, abliterated.pipeline.source, abliterated.pipeline.run; "
    program += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
