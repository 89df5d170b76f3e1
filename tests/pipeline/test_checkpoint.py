"""Folders of safetensors, edited: every architecture's stream no longer moves along the direction, and bad folders."""

from __future__ import annotations

import json
import shutil
import struct
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.contract.errors import Cancelled, ConflictError, ModelError
from abliterate.contract.recipe import Edit, Run
from abliterated.pipeline.checkpoint import edit_checkpoint
from abliterated.pipeline.checkpoint_writers import checkpoint_census
from abliterated.pipeline.contributions import find_contributions
from abliterated.pipeline.directions import direction
from abliterated.pipeline.edit import edit_matrix
from abliterated.pipeline.loading import Loaded, load_model
from abliterated.pipeline.safetensors_file import read_config, read_shards
from abliterated.pipeline.source import open_source
from abliterated.pipeline.watch import Watch
from abliterated.pipeline.writers import gguf_census
from pipeline import architectures
from pipeline.gguf_names import architecture_of, gguf_names

DIRECTION = direction(np.random.default_rng(0).standard_normal(architectures.WIDTH), origin={"method": "test"})


def edit(folder, target, *, what=None, cancelled=lambda: False, allow_partial=False, along=DIRECTION):
    seen = []
    report = edit_checkpoint(
        folder,
        target,
        along,
        what or Edit(),
        allow_partial=allow_partial,
        progress=lambda done, total: seen.append((done, total)),
        cancelled=cancelled,
    )
    assert seen[-1][0] == seen[-1][1]
    return report


def saved(family, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architectures.tiny(family).save_pretrained(folder)
    return folder


def movement(folder):
    """How far the stream moves along the direction within the model: by layer, over a few positions."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == architectures.LAYERS
    )
    stream = []

    def before(module, given, named):
        if not stream:
            stream.append(given[0] if given else named["hidden_states"])

    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: stream.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.arange(3, 20)[None], use_cache=False)
    vector = torch.from_numpy(DIRECTION.for_layer(0)[0].copy())
    along = [hidden.reshape(-1, architectures.WIDTH) @ vector for hidden in stream]
    return np.array([float((later - along[0]).norm()) for later in along[1:]])


@pytest.mark.parametrize("family", architectures.SPECIAL)
def test_no_writer_moves_the_stream_along_the_direction(family, tmp_path):
    saved(family, tmp_path / "base")
    report = edit(tmp_path / "base", tmp_path / "edited")
    assert report.coverage == 1.0
    assert (movement(tmp_path / "edited") <= 1e-5 * movement(tmp_path / "base")).all()
    same_writers_by_their_gguf_names(family, tmp_path / "base")


@pytest.mark.parametrize("family", architectures.NORMED)
def test_the_norms_behind_writers_are_those_a_forward_pass_shows(family, tmp_path):
    """What a layer adds to its input, looked at from outside, names the same norms as the census does."""
    source = open_source(saved(family, tmp_path / "base"))
    writers = census_of(source.path).writers
    named = {writer.gains[0].removesuffix(".weight") for writer in writers if writer.gains}
    assert named
    model = load_model(source, Run(dtype="float32"), Watch())
    names = {module: name for name, module in model.named_modules()}
    loaded = Loaded(source, model, None, torch.device("cpu"))
    seen = find_contributions(loaded, tuple(range(3, 20))).layers
    assert {names[part.module] for layer in seen for part in layer if part.gain is not None} == named


def census_of(folder):
    shapes = {tensor.name: tensor.shape for shard in read_shards(folder) for tensor in shard.tensors}
    return checkpoint_census(read_config(folder), shapes).census


def same_writers_by_their_gguf_names(family, folder):
    """The census of the GGUF llama.cpp would make finds the same tensors, behind the same norms."""
    ours = {writer.name: writer for writer in census_of(folder).writers}
    assert any(writer.gains for writer in ours.values()) is (family in architectures.NORMED)
    architecture = architecture_of(family)
    if not architecture:
        return
    shapes = {tensor.name: tensor.shape for shard in read_shards(folder) for tensor in shard.tensors}
    names = gguf_names(architecture, shapes, frozenset(name for name, writer in ours.items() if writer.turned))
    theirs = gguf_census(architecture, architectures.WIDTH, architectures.LAYERS, dict(names.values())).writers
    assert {names[name][0] for name in ours} == {writer.name for writer in theirs}
    gains = {names[name][0]: {names[gain][0] for gain in writer.gains} for name, writer in ours.items()}
    assert gains == {writer.name: set(writer.gains) for writer in theirs}


def test_architectures_named_alike_in_both_worlds_are_many():
    families = [family for family in architectures.SPECIAL if architecture_of(family)]
    assert len(architectures.SPECIAL) >= 75
    assert len(families) >= 60


def test_post_norms_left_out_leave_a_share(tmp_path):
    saved("olmo2", tmp_path / "base")
    report = edit(tmp_path / "base", tmp_path / "edited", what=Edit(post_norm=False))
    assert (movement(tmp_path / "edited") > 0.05 * movement(tmp_path / "base")).all()
    # And the report tells how much, writer by writer, as the stream sees it.
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "edited"))
    for tensor in report.tensors:
        norm = "post_attention_layernorm" if tensor.kind == "attention" else "post_feedforward_layernorm"
        gain = old[f"model.layers.{tensor.layer}.{norm}.weight"].double().numpy()
        through = gain * DIRECTION.for_layer(0)[0]
        share = np.linalg.norm(through @ new[tensor.name].numpy()) / np.linalg.norm(through @ old[tensor.name].numpy())
        assert tensor.uncorrected
        assert tensor.residual == pytest.approx(share, rel=1e-3)
    assert report.let_through == report.residual > 0.05
    heeded = edit(tmp_path / "base", tmp_path / "heeded")
    assert heeded.let_through == 0.0
    assert heeded.residual < 1e-5


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A sharded bfloat16 folder with everything a real one has."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architectures.tiny("llama").to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    (folder / "LICENSE").write_text("as the base has it")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    (folder / "consolidated.safetensors").write_bytes(b"old weights")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_shards_index_and_small_files_stay_and_only_writers_change(llama, tmp_path):
    report = edit(llama, tmp_path / "edited")
    kept = {path.name for path in llama.iterdir()} - {"pytorch_model.bin", "consolidated.safetensors"}
    assert {path.name for path in (tmp_path / "edited").iterdir()} == kept
    for name in kept:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "edited" / name).read_bytes() == (llama / name).read_bytes()
    edited = {tensor.name for tensor in report.tensors}
    assert len(edited) == 2 * architectures.LAYERS
    for shard in llama.glob("model-*.safetensors"):
        old, new = load_file(shard), load_file(tmp_path / "edited" / shard.name)
        assert list(old) == list(new)
        for name in old:
            assert torch.equal(old[name], new[name]) is (name not in edited)
            assert old[name].dtype == new[name].dtype
    assert report.residual <= 0.002
    assert {tensor.type for tensor in report.tensors} == {"BF16"}


def test_turned_matrices_are_edited_as_their_transposes(tmp_path):
    saved("gpt2", tmp_path / "base")
    for norm in ("none", "columns", "rows"):
        edit(tmp_path / "base", tmp_path / norm, what=Edit(norm=norm))
        name = "transformer.h.1.mlp.c_proj.weight"
        old, new = (load_file(tmp_path / folder / "model.safetensors")[name].numpy() for folder in ("base", norm))
        wanted = edit_matrix(np.ascontiguousarray(old.T), DIRECTION.for_layer(0), 1.0, norm).T
        np.testing.assert_allclose(new, wanted, atol=1e-6)


def test_the_same_edit_gives_the_same_bytes(llama, tmp_path):
    first, second = edit(llama, tmp_path / "one"), edit(llama, tmp_path / "two")
    assert first == second
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_cancelled_run_leaves_nothing(llama, tmp_path):
    for looks in (0, 3, 10, 30):
        remaining = iter(range(looks))
        with pytest.raises(Cancelled):
            edit(llama, tmp_path / "edited", cancelled=lambda: next(remaining, None) is None)  # noqa: B023
        assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_there_is_not_touched(llama, tmp_path):
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "mine").write_text("mine")
    with pytest.raises(ConflictError):
        edit(llama, tmp_path / "edited")
    assert (tmp_path / "edited" / "mine").read_text() == "mine"


def _without_config(folder):
    (folder / "config.json").unlink()


def _cut(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])


def _missing_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def _outside(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _garbage(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(struct.pack("<Q", 20) + b"not json at all, no." + b"\0" * 100)


def _no_weights(folder):
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()


def _unknown(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    tensors["model.layers.0.novel_mixer.weight"] = torch.ones(architectures.WIDTH, 8)
    save_file(tensors, shard)


def _eight_bits(folder):
    for shard in folder.glob("model-*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("layers.1.mlp.down_proj.weight"):
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, shard)


def _nan(folder):
    for shard in folder.glob("model-*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("layers.1.mlp.down_proj.weight"):
                tensors[name][2, 3] = float("nan")
        save_file(tensors, shard)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without_config, "config.json"),
        (_cut, "cut short"),
        (_missing_shard, "lacks model-00001"),
        (_outside, "no file beside it"),
        (_garbage, "broken header"),
        (_no_weights, "no safetensors"),
        (_unknown, "novel_mixer"),
        (_eight_bits, r"layers.1.mlp.down_proj.weight holds F8_E4M3"),
        (_nan, r"layers.1.mlp.down_proj.weight: NaN or Inf"),
    ],
)
def test_bad_folders_get_one_named_error_and_nothing_is_written(llama, tmp_path, damage, words):
    shutil.copytree(llama, tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(ModelError, match=words) as error:
        edit(tmp_path / "base", tmp_path / "edited")
    assert error.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_identity_experts_give_to_the_stream_what_no_edit_reaches(tmp_path, monkeypatch):
    settings = architectures.SPECIAL["longcat_flash"] | {"zero_expert_num": 2}
    monkeypatch.setitem(architectures.SPECIAL, "longcat_flash", settings)
    saved("longcat_flash", tmp_path / "base")
    with pytest.raises(ModelError, match="2 identity experts"):
        edit(tmp_path / "base", tmp_path / "edited")
    assert edit(tmp_path / "base", tmp_path / "edited", allow_partial=True).tensors


@pytest.mark.parametrize(
    ("family", "reason"),
    [("minimax", "norms act on the stream"), ("rwkv", "gate acts behind"), ("gemma3n_text", "several streams")],
)
def test_what_no_edit_of_writers_could_do_is_refused_with_the_reason(llama, tmp_path, family, reason):
    shutil.copytree(llama, tmp_path / "base")
    config = json.loads((llama / "config.json").read_text()) | {"model_type": family}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{family} can't be edited: .*{reason}"):
        edit(tmp_path / "base", tmp_path / "edited", allow_partial=True)
