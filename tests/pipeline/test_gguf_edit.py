"""A GGUF in, a GGUF out: what is edited, what stays byte for byte, what the engine and torch say of it."""

from __future__ import annotations

import hashlib
import resource
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from abliterate.contract.errors import Cancelled, DiskError, ModelError, RecipeError
from abliterate.contract.recipe import Edit, Recipe
from abliterated.pipeline.directions import direction
from abliterated.pipeline.edit import strengths
from abliterated.pipeline.gguf_edit import edit_gguf
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.provenance import provenance
from pipeline import tiny_gguf

DIRECTION = direction(np.random.default_rng(0).standard_normal(tiny_gguf.WIDTH), origin={"method": "test"})
PROMPT = list(b"a quiet morning")
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "mixtral": {"num_local_experts": 4},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 64},
}


def edit(source, target, *, what=None, along=DIRECTION, metadata=None, cancelled=lambda: False, **options):
    seen = []
    report = edit_gguf(
        source,
        target,
        along,
        what or Edit(),
        allow_partial=options.pop("allow_partial", False),
        metadata=metadata,
        progress=lambda done, total: seen.append((done, total)),
        cancelled=cancelled,
        **options,
    )
    assert seen[-1][0] == seen[-1][1]
    return report


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("llama") / "llama.gguf", tiny_gguf.tiny("llama"))


def projected_apart(model, family, vector):
    """The same edit, done the slow and obvious way on the torch model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in parameters.items():
            if "o_proj.weight" not in name and "down_proj" not in name:
                continue
            along = torch.from_numpy(vector.astype(np.float64))
            if family == "gemma2":
                layer = name.split(".mlp")[0].split(".self_attn")[0]
                norm = "post_attention_layernorm" if "o_proj" in name else "post_feedforward_layernorm"
                along = along * (1 + parameters[f"{layer}.{norm}.weight"].double())
            along = along / along.norm()
            wide = weight.double()
            weight.copy_(
                (wide - torch.einsum("i,...j->...ij", along, torch.einsum("i,...ij->...j", along, wide))).float()
            )
        # The biases of these families' writers are nil; nothing else writes.


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_and_a_torch_model_edited_apart_agree(family, tmp_path):
    tiny = tiny_gguf.tiny(family, **FAMILIES[family])
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    report = edit(source, tmp_path / "edited.gguf", what=Edit(norm="none"))
    assert report.coverage == 1.0
    assert report.residual < 1e-5

    def logprobs():
        with torch.no_grad():
            return torch.log_softmax(tiny.model(torch.tensor([PROMPT])).logits[0, -1].double(), -1).numpy()

    before = logprobs()
    projected_apart(tiny.model, family, DIRECTION.for_layer(0)[0])
    wanted = logprobs()
    found = tiny_gguf.llama_cpp_logprobs(tmp_path / "edited.gguf", PROMPT)
    assert len(found) == tiny_gguf.VOCABULARY
    worst = max(abs(value - wanted[token]) for token, value in found.items())
    assert worst < 0.01  # llama.cpp keeps its cache in float16
    assert np.abs(before - wanted).max() > 10 * worst


@pytest.mark.parametrize("kind", ["Q4_K", "MXFP4", "IQ3_S"])
def test_quantised_models_keep_their_type_or_say_so_and_still_answer(kind, tmp_path):
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny_gguf.tiny("mixtral", num_local_experts=4), Type[kind])
    report = edit(source, tmp_path / "edited.gguf")
    assert report.residual <= 0.01
    if kind == "IQ3_S":
        assert {(tensor.type, tensor.promoted_from) for tensor in report.tensors} == {("Q8_0", "IQ3_S")}
    else:
        assert {(tensor.type, tensor.promoted_from) for tensor in report.tensors} == {(kind, "")}
    types = {tensor.name: tensor.type.name for tensor in read_gguf(tmp_path / "edited.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == kind
    assert types["blk.0.ffn_down_exps.weight"] == report.tensors[0].type
    assert len(tiny_gguf.llama_cpp_logprobs(tmp_path / "edited.gguf", PROMPT)) == tiny_gguf.VOCABULARY


def test_everything_that_is_not_a_writer_stays_byte_for_byte(llama, tmp_path):
    target = tmp_path / "edited.gguf"
    report = edit(llama, target)
    base, made = read_gguf(llama), read_gguf(target)
    assert llama.read_bytes()[: base.data_start] == target.read_bytes()[: made.data_start]
    edited = {tensor.name for tensor in report.tensors}
    assert edited == {f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn_output", "ffn_down")}
    old, new = llama.read_bytes(), target.read_bytes()
    for before, after in zip(base.tensors, made.tensors, strict=True):
        assert (before.name, before.shape, before.type) == (after.name, after.shape, after.type)
        same = old[before.start : before.start + before.size] == new[after.start : after.start + after.size]
        assert same is (before.name not in edited)
    assert report.bytes_written == len(new)


def test_provenance_is_appended_and_gguf_py_reads_it(llama, tmp_path):
    recipe = Recipe(model="ollama:tiny")
    keys = provenance(
        version="1.2.3",
        recipe=recipe,
        base="ollama:tiny",
        base_digest="sha256:" + "a" * 64,
        direction_digest=DIRECTION.digest(),
        direction_origin=DIRECTION.origin,
        strengths=strengths(recipe.edit, 2),
        metrics={"refusal_before": 1.0},
    )
    report = edit(llama, tmp_path / "edited.gguf", metadata=keys | {"general.name": "tiny, abliterated"})
    fields = gguf.GGUFReader(tmp_path / "edited.gguf").fields
    names = [name for name in fields if not name.startswith("GGUF.")]
    before = [name for name in gguf.GGUFReader(llama).fields if not name.startswith("GGUF.")]
    assert names[: len(before)] == before
    assert fields["general.name"].contents() == "tiny, abliterated"
    assert fields["abliterated.version"].contents() == "1.2.3"
    assert fields["abliterated.content"].contents() == report.content
    assert fields["abliterated.coverage"].contents() == 1.0
    assert fields["abliterated.residual"].contents() == np.float32(report.residual)
    assert fields["abliterated.edit.strength.mlp"].contents() == [1.0, 1.0]
    again = edit(tmp_path / "edited.gguf", tmp_path / "twice.gguf", metadata={"abliterated.version": "9"})
    fields = gguf.GGUFReader(tmp_path / "twice.gguf").fields
    assert [name for name in fields if name.startswith("abliterated.")] == ["abliterated.version"]
    assert again.coverage == 1.0


def test_the_same_edit_gives_the_same_bytes(llama, tmp_path):
    digests = set()
    for name in ("one.gguf", "two.gguf"):
        edit(llama, tmp_path / name, metadata={"abliterated.content": "0" * 64})
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_strength_by_layer_and_part_decides_what_is_touched(llama, tmp_path):
    report = edit(llama, tmp_path / "edited.gguf", what=Edit(layers="1-", attention=0.0, mlp=0.5, norm="none"))
    assert [tensor.name for tensor in report.tensors] == ["blk.1.ffn_down.weight"]
    assert report.coverage == 1.0
    assert report.residual == pytest.approx(0.5, abs=1e-3)
    assert report.rounding < 1e-5


def test_embeddings_only_on_request(llama, tmp_path):
    report = edit(llama, tmp_path / "edited.gguf", what=Edit(embeddings=True))
    assert "token_embd.weight" in {tensor.name for tensor in report.tensors}
    rows = tiny_gguf.read(tmp_path / "edited.gguf")["token_embd.weight"]
    assert np.abs(rows @ DIRECTION.for_layer(0)[0]).max() < 1e-6


def test_a_strengthened_direction_is_doubled_in_the_embeddings_too(llama, tmp_path):
    edit(llama, tmp_path / "edited.gguf", what=Edit(embeddings=True, invert=True, norm="none"))
    before, after = (tiny_gguf.read(path)["token_embd.weight"] for path in (llama, tmp_path / "edited.gguf"))
    vector = DIRECTION.for_layer(0)[0]
    np.testing.assert_allclose(after @ vector, 2 * (before @ vector), atol=1e-5)


def test_a_type_too_coarse_for_the_edit_gives_way_to_a_finer_one(tmp_path):
    """A direction of two numbers: two rows must cancel, and on their lattices they can't."""
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny_gguf.tiny("llama"), Type.Q3_K)
    along = direction(np.eye(tiny_gguf.WIDTH)[3] + 0.6 * np.eye(tiny_gguf.WIDTH)[70], origin={"method": "test"})
    report = edit(source, tmp_path / "edited.gguf", along=along)
    assert {(tensor.type, tensor.promoted_from) for tensor in report.tensors} == {("Q8_0", "Q3_K")}
    assert report.promoted == tuple(tensor.name for tensor in report.tensors)
    assert report.rounding <= 0.01
    types = {tensor.name: tensor.type.name for tensor in read_gguf(tmp_path / "edited.gguf").tensors}
    assert all(types[tensor.name] == tensor.type for tensor in report.tensors)
    assert len(tiny_gguf.llama_cpp_logprobs(tmp_path / "edited.gguf", PROMPT)) == tiny_gguf.VOCABULARY


def test_biases_of_writers_are_edited_too(tmp_path):
    tiny = tiny_gguf.tiny("llama")
    bias = np.random.default_rng(2).standard_normal(tiny_gguf.WIDTH).astype(np.float32)
    tiny.tensors["blk.0.attn_output.bias"] = bias
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    report = edit(source, tmp_path / "edited.gguf")
    assert "blk.0.attn_output.bias" in {tensor.name for tensor in report.tensors}
    after = tiny_gguf.read(tmp_path / "edited.gguf")["blk.0.attn_output.bias"]
    vector = DIRECTION.for_layer(0)[0]
    np.testing.assert_allclose(after, bias - vector * (vector @ bias), atol=1e-5)


def test_an_unknown_matrix_on_the_stream_is_named(tmp_path):
    tiny = tiny_gguf.tiny("llama")
    tiny.tensors["blk.1.novel_mixer.weight"] = np.ones((tiny_gguf.WIDTH, 64), dtype=np.float32)
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    with pytest.raises(ModelError, match=r"blk\.1\.novel_mixer\.weight"):
        edit(source, tmp_path / "edited.gguf")
    report = edit(source, tmp_path / "edited.gguf", allow_partial=True)
    assert report.unknown == ("blk.1.novel_mixer.weight",)
    assert report.coverage == pytest.approx(4 / 5)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_cancelled_run_leaves_nothing(llama, tmp_path):
    for looks in range(0, 22, 3):
        remaining = iter(range(looks))
        with pytest.raises(Cancelled):
            edit(llama, tmp_path / "edited.gguf", cancelled=lambda: next(remaining, None) is None)  # noqa: B023
        assert left(tmp_path) == []


def test_a_full_disk_leaves_nothing(llama, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskError, match=r"can't write edited\.gguf"):
            edit(llama, tmp_path / "edited.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left(tmp_path) == []


def test_too_small_a_disk_is_found_before_anything_is_written(llama, tmp_path, monkeypatch):
    class Small:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr("os.statvfs", lambda path: Small)
    with pytest.raises(DiskError, match=r"needs .* MB, and its disk has 0\.0 MB free"):
        edit(llama, tmp_path / "edited.gguf")
    assert left(tmp_path) == []


def test_a_direction_of_another_model_is_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="64 wide"):
        edit(llama, tmp_path / "x.gguf", along=direction(np.ones(64), origin={}))
    short = direction(np.random.default_rng(0).standard_normal((1, tiny_gguf.WIDTH)), origin={}, per_layer=True)
    with pytest.raises(ModelError, match="1 layers"):
        edit(llama, tmp_path / "x.gguf", along=short)
    with pytest.raises(RecipeError, match="Q17_Z"):
        edit(llama, tmp_path / "x.gguf", quantize="Q17_Z")


@pytest.mark.parametrize("mix", ["Q4_K_M", "q8_0", "BF16"])
def test_another_quantisation_is_made_tensor_by_tensor(mix, llama, tmp_path):
    report = edit(llama, tmp_path / "edited.gguf", quantize=mix)
    assert report.residual <= 0.01
    assert report.coverage == 1.0
    assert not report.promoted
    structure = read_gguf(tmp_path / "edited.gguf")
    wanted = {"Q4_K_M": {"Q4_K", "Q6_K", "F32"}, "q8_0": {"Q8_0", "F32"}, "BF16": {"BF16", "F32"}}[mix]
    assert {tensor.type.name for tensor in structure.tensors} == wanted
    assert structure.values["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{mix.upper()}"]
    assert len(tiny_gguf.llama_cpp_logprobs(tmp_path / "edited.gguf", PROMPT)) == tiny_gguf.VOCABULARY


def test_nan_is_named_with_its_tensor(tmp_path):
    tiny = tiny_gguf.tiny("llama")
    tiny.tensors["blk.1.ffn_down.weight"][3, 4] = np.nan
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight: NaN or Inf"):
        edit(source, tmp_path / "edited.gguf")
    assert left(tmp_path) == ["base.gguf"]


def test_an_encoder_is_refused_by_name(tmp_path):
    tiny = tiny_gguf.tiny("llama")
    tiny.architecture = "nomic-bert"
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    with pytest.raises(ModelError, match="nomic-bert"):
        edit(source, tmp_path / "edited.gguf")


def test_the_tensor_named_in_the_header_must_lie_in_the_file(llama, tmp_path):
    data = llama.read_bytes()
    structure = read_gguf(llama)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data[: structure.tensors[-1].start + 100])
    with pytest.raises(ModelError, match="truncated"):
        edit(broken, tmp_path / "edited.gguf")
    name = structure.tensors[-1].name.encode()
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    broken.write_bytes(data[:at] + struct.pack("<I", 5) + data[at + 4 :])
    with pytest.raises(ModelError, match="unknown type 5"):
        edit(broken, tmp_path / "edited.gguf")


def test_norms_left_out_of_account_let_a_share_through_that_is_told(tmp_path):
    tiny = tiny_gguf.tiny("gemma2", **FAMILIES["gemma2"])
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny, Type.Q8_0)
    report = edit(source, tmp_path / "edited.gguf", what=Edit(post_norm=False))
    old, new = tiny_gguf.read(source), tiny_gguf.read(tmp_path / "edited.gguf")
    for tensor in report.tensors:
        norm = "post_attention_norm" if tensor.kind == "attention" else "post_ffw_norm"
        through = old[f"blk.{tensor.layer}.{norm}.weight"] * DIRECTION.for_layer(0)[0]
        share = np.linalg.norm(through @ new[tensor.name]) / np.linalg.norm(through @ old[tensor.name])
        assert tensor.residual == pytest.approx(share, rel=1e-2)
    assert report.let_through > 0.05
    assert report.rounding < 0.01
    assert edit(source, tmp_path / "heeded.gguf").residual < 0.01
