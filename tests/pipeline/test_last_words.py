"""What goes wrong in the middle of a run, or with a model nobody foresaw: named, on what, and what to do next."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from abliterate.contract.errors import (
    AbliteratedError,
    DiskError,
    ModelError,
    OutOfHostMemory,
    OutOfMemory,
    RecipeError,
)
from abliterate.contract.messages import Progress
from abliterate.contract.recipe import Edit, Run
from abliterated.pipeline import gguf_file, loading
from abliterated.pipeline.activations import tail_logits
from abliterated.pipeline.checkpoint import edit_checkpoint
from abliterated.pipeline.contributions import find_contributions
from abliterated.pipeline.directions import direction
from abliterated.pipeline.gguf_edit import edit_gguf
from abliterated.pipeline.loading import Loaded, load, load_model, open_engine
from abliterated.pipeline.run import run
from abliterated.pipeline.source import open_source
from abliterated.pipeline.talking import Talker
from abliterated.pipeline.watch import Watch
from pipeline import architectures, tiny_gguf
from pipeline.folders import CONVERTER, listed, task
from pipeline.forked import forked
from pipeline.planted import Planted, plant

CPU = torch.device("cpu")
ALONG = direction(np.random.default_rng(0).standard_normal(architectures.WIDTH), origin={})
ALONG_GGUF = direction(np.random.default_rng(0).standard_normal(tiny_gguf.WIDTH), origin={})


@contextmanager
def told(kind: type[AbliteratedError], said: str, remedy: str) -> Iterator[None]:
    """An error of that kind, whose words and remedy are these."""
    with pytest.raises(kind, match=said) as raised:
        yield
    assert remedy in raised.value.remedy


def quick(model: Planted, **tables: Any) -> Any:
    """A task that measures nothing: the direction is a file."""
    given = model.path.parent / "given.pt"
    torch.save(torch.eye(64)[60], given)
    settings = {"direction": {"method": "file", "file": str(given)}, "evaluate": {"prompts": 0}, **tables}
    return task(model, **settings)


def go(asked: Any, emit: Callable[[Progress], None] = lambda _: None) -> None:
    run(asked, emit, lambda: False)


# Folders a run works in and delivers into.


def test_a_folder_that_can_not_be_one_is_told_at_once(tmp_path: Path) -> None:
    model = plant(tmp_path)
    (tmp_path / "out").write_text("a file")
    with told(DiskError, r"/out: can't be written \(File exists\)", "Check the path, its rights and its disk"):
        go(quick(model))


def test_where_no_temporary_file_can_be_written_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = quick(plant(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # as in a process that has not asked yet
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    with told(DiskError, "no folder for temporary files can be written", "set TMPDIR to another folder"):
        go(asked)


@pytest.mark.parametrize(
    ("change", "said", "remedy"),
    [
        (shutil.rmtree, r"can't write into out/: No such file or directory", "run it again"),
        (lambda out: (out / "result.json").mkdir(), r"can't write into out/: Is a directory", "Check that folder"),
    ],
)
def test_an_output_folder_that_changes_under_a_run_is_named(
    tmp_path: Path, change: Callable[[Path], None], said: str, remedy: str
) -> None:
    changed: list[str] = []

    def emit(progress: Progress) -> None:
        if progress.stage == "report" and not changed:
            changed.append(progress.stage)
            change(tmp_path / "out")

    with told(DiskError, said, remedy):
        go(quick(plant(tmp_path)), emit)
    assert changed


def test_a_direction_that_is_not_there_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    asked = quick(plant(tmp_path))
    (tmp_path / "given.pt").unlink()
    with told(RecipeError, r"direction\.file: there is no .*given\.pt", "Check the path"):
        go(asked)
    assert listed(tmp_path / "out") == []


# Folders of safetensors.


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder in shards."""
    architectures.tiny("llama").save_pretrained(tmp_path / "base", max_shard_size="100KB")
    return tmp_path / "base"


def edit(folder: Path, target: Path, cancelled: Callable[[], bool] = lambda: False) -> None:
    edit_checkpoint(folder, target, ALONG, Edit(), allow_partial=False, progress=lambda *_: None, cancelled=cancelled)


def test_a_folder_that_can_not_be_written_is_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with told(DiskError, "can't write edited: Not a directory", "Check the path"):
        edit(llama, tmp_path / "file" / "edited")
    with told(DiskError, "can't write into nowhere/: No such file or directory", "Check the folder"):
        edit(llama, tmp_path / "nowhere" / "edited")

    def taken() -> bool:
        (tmp_path / "edited").mkdir(exist_ok=True)
        (tmp_path / "edited" / "mine").touch()
        return False

    with told(DiskError, "can't write edited: Directory not empty", "Check the folder it is to stand in"):
        edit(llama, tmp_path / "edited", taken)
    assert listed(tmp_path) == ["base", "edited", "file"]


def test_a_shard_that_goes_away_while_others_are_edited_is_named(llama: Path, tmp_path: Path) -> None:
    last = max(llama.glob("*.safetensors"))

    def away() -> bool:
        last.unlink(missing_ok=True)
        return False

    with told(ModelError, rf"can't read {last.name}: No such file", "Check the path and its rights"):
        edit(llama, tmp_path / "edited", away)
    assert listed(tmp_path) == ["base"]


@pytest.mark.parametrize(
    ("change", "said", "remedy"),
    [
        ({"num_hidden_layers": 6}, "llama: nothing is known to write to the stream in block 4 of 6", "allow_partial"),
        ({"llm_config": {"model_type": "llama"}}, r"config\.json has no hidden_size", "Give a language model's folder"),
    ],
)
def test_a_configuration_that_its_weights_are_not_of_is_told_before_anything_is_measured(
    llama: Path, change: dict[str, Any], said: str, remedy: str
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    with told(ModelError, said, remedy):
        go(task(Planted(llama, llama, llama), export={"format": "safetensors"}))


def test_a_folder_edited_before_belongs_to_its_model_and_must_be_converted(llama: Path, tmp_path: Path) -> None:
    other = plant(tmp_path)
    shutil.copytree(llama, tmp_path / "edited")
    config = json.loads((llama / "config.json").read_text())
    asked = {"run": {"from_checkpoint": str(llama)}, "evaluate": {"prompts": 0}}
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with told(ModelError, r"base is 64 wide and 4 layers deep, edited 64 and 5", "Set `model` to what the folder was"):
        go(task(Planted(tmp_path / "edited", other.harmful, other.harmless), CONVERTER, **asked))
    (llama / "config.json").write_text(json.dumps(config | {"architectures": ["NewForCausalLM"]}))
    said = (
        r"converter\.py could not convert the folder \(exit 1\): ERROR: Model NewForCausalLM is not supported\. Update"
    )
    with told(ModelError, said, "Update llama.cpp, or convert the folder by hand"):
        go(task(Planted(llama, other.harmful, other.harmless), CONVERTER, **asked))
    assert listed(tmp_path / "out") == []


# Numbers that are none, and types nobody reads.


@pytest.mark.parametrize(
    ("tensor", "settings", "what", "said"),
    [
        ("token_embd.weight", {}, {"what": Edit(embeddings=True)}, "token_embd.weight: NaN or Inf among the weights"),
        ("blk.1.attn_output.bias", {}, {}, "blk.1.attn_output.bias: NaN or Inf among the biases"),
        ("blk.1.ffn_up.weight", {}, {"quantize": "Q8_0"}, "blk.1.ffn_up.weight: NaN or Inf among the weights"),
    ],
)
def test_a_number_that_is_none_is_named_with_its_tensor_wherever_it_lies(
    tmp_path: Path, tensor: str, settings: dict[str, Any], what: dict[str, Any], said: str
) -> None:
    tiny = tiny_gguf.tiny("llama", **settings)
    values = tiny.tensors.setdefault(tensor, np.ones(tiny_gguf.WIDTH, dtype=np.float32))
    values.flat[3] = np.nan
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    with told(ModelError, said, "Download or pull the model again"):
        edit_gguf(
            source,
            tmp_path / "edited.gguf",
            ALONG_GGUF,
            what.get("what", Edit()),
            allow_partial=False,
            quantize=what.get("quantize", "keep"),
            metadata=None,
            progress=lambda *_: None,
            cancelled=lambda: False,
        )
    assert listed(tmp_path) == ["base.gguf"]


def test_a_type_that_nobody_reads_is_named_by_the_edit_and_by_the_measuring(tmp_path: Path) -> None:
    """The second layer's tensor becomes one of bytes, as it stands in the header."""
    tiny = tiny_gguf.tiny("llama")
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    name = b"blk.1.ffn_down.weight"
    data = bytearray(source.read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    data[at : at + 4] = struct.pack("<I", Type.I8)
    source.write_bytes(data)
    assert {tensor.type for tensor in gguf_file.read_gguf(source).tensors} == {Type.F32, Type.I8}
    with told(ModelError, r"ffn_down\.weight: tensors of type I8 can't be decoded", "Take another quantisation"):
        edit_gguf(
            source,
            tmp_path / "edited.gguf",
            ALONG_GGUF,
            Edit(),
            allow_partial=False,
            metadata=None,
            progress=lambda *_: None,
            cancelled=lambda: False,
        )
    opened = open_source(source)
    engine = open_engine(opened, Run())
    said = r"base\.gguf holds blk\.1\.ffn_down\.weight in I8, which can't be read for measuring"
    with told(ModelError, said, "Take the model in another quantisation"):
        tail_logits(Loaded(opened, engine.skeleton.model, None, CPU, engine), [(1, 2, 3)], 1)


# Models that can't be measured.


def test_a_gguf_without_a_tokenizer_can_not_be_asked(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "base.gguf", tiny_gguf.tiny("llama"))
    data = (tmp_path / "base.gguf").read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.none.tokens")
    (tmp_path / "base.gguf").write_bytes(data)
    with told(ModelError, r"base\.gguf carries no tokenizer", "Give a complete GGUF"):
        load(open_source(tmp_path / "base.gguf"), Run(), Watch())


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    architectures.tiny("llama").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    held[name] = held[name].T.contiguous()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    engine = open_engine(source, Run())
    with told(ModelError, f"holds {name} in an unexpected shape", "Download it again"):
        tail_logits(Loaded(source, engine.skeleton.model, None, CPU, engine), [(1, 2, 3)], 1)


def saved(family: str, folder: Path, **settings: Any) -> Path:
    """A random model of a family our tests know nothing of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(architectures._COMMON | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def test_a_layer_that_does_more_than_add_is_not_taken_for_one_that_adds(tmp_path: Path) -> None:
    """Doge multiplies the stream by a vector of its own before it adds to it."""
    source = open_source(saved("doge", tmp_path / "doge"))
    loaded = Loaded(source, load_model(source, Run(dtype="float32"), Watch()), None, CPU)
    said = "can't tell what layer 0 of a doge model adds to the residual stream"
    with told(ModelError, said, 'Set direction.method = "layer", or give a direction file'):
        find_contributions(loaded, tuple(range(3, 20)))


def test_a_model_whose_layers_are_not_where_it_says_is_named(tmp_path: Path) -> None:
    """A decoder whose configuration counts the encoder's layers, of which there are none here."""
    depth = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 4, "decoder_attention_heads": 4}
    folder = saved("blenderbot", tmp_path / "bot", **depth, decoder_ffn_dim=96, num_hidden_layers=2, n_layer=4)
    with told(ModelError, "can't find the layers of a blenderbot model", "Give a direction from a file"):
        source = open_source(folder)
        loaded = Loaded(source, load_model(source, Run(dtype="float32"), Watch()), None, CPU)
        find_contributions(loaded, tuple(range(3, 20)))


def test_a_model_that_refuses_nothing_in_no_words_it_has_can_not_be_made_to(tmp_path: Path) -> None:
    model = plant(tmp_path, refuses=False)
    data, end = model.path.read_bytes(), gguf_file.read_gguf(model.path).data_start
    letter, space, other = struct.pack("<Q", 1), "Ġ".encode(), "é".encode()
    model.path.write_bytes(data[:end].replace(letter + b"I", letter + b"@").replace(space, other) + data[end:])
    said = r"planted\.gguf refuses nothing, and its tokenizer knows no word a refusal begins with"
    with told(ModelError, said, "Give harmful prompts it refuses"):
        go(task(model, edit={"invert": True}, direction={"method": "layer", "layer": 1}))


def test_a_talk_needs_the_whole_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda _: 0)
    said = r"planted\.gguf is too large for this machine's memory to talk to it here"
    with told(ModelError, said, "let Ollama serve the result"):
        Talker(open_source(plant(tmp_path).path), Run(), None, Watch())


def test_a_device_that_is_full_is_told_as_a_full_machine_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full GPU is what no machine without one can have: torch's word for it is said in its stead."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", full)
    said = r"planted\.gguf does not fit into the device's memory"
    with told(OutOfMemory, said, 'Set run.device = "cpu" or run.dtype = "bfloat16"'):
        load_model(open_source(plant(tmp_path).path), Run(), Watch())


def vast(folder: Path) -> Path:
    """A model of 1 GB, all of it holes."""
    inner, width = 1_300_000, 64
    shapes = {
        "model.embed_tokens.weight": (99, width), "lm_head.weight": (99, width), "model.norm.weight": (width,),
        **{f"model.layers.0.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")},
        **{f"model.layers.0.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"},
        **{f"model.layers.0.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (width, inner),
    }  # fmt: skip
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    words = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(file.tell() + at)
    settings = {"model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 99, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": ["LlamaForCausalLM"]}))
    return folder


def load_within(folder: Path, room: int) -> None:
    """Load it in this process, which may take so many bytes more than it has."""
    source = open_source(folder)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
    try:
        load_model(source, Run(dtype="bfloat16"), Watch())
    except OutOfHostMemory as error:
        sys.exit(str(error))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="such a limit is Linux's")
@pytest.mark.parametrize("room", [500 << 20, 1200 << 20], ids=["to map it", "to map it twice"])
def test_a_model_that_does_not_fit_is_told_and_no_crash(tmp_path: Path, room: int) -> None:
    folder = vast(tmp_path / "vast")
    assert forked(load_within, folder, room, errors=tmp_path / "errors.txt") == 1
    last = (tmp_path / "errors.txt").read_text().strip()
    assert last.startswith("vast does not fit into this machine's memory. Free some memory")
