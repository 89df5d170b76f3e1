"""The pipeline's steps in the foreground: direction, apply, export, as a person calls them one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from abliterated import refuser
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.source import open_source
from e2e.daemons import BIN
from engines import free_port
from pipeline.folders import CONVERTER, listed, planted_folder
from pipeline.planted import Planted

pytestmark = pytest.mark.e2e
DATA = refuser.files()
PROMPTS = ["--harmful", str(DATA.harmful), "--harmless", str(DATA.harmless)]


def call(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    told = subprocess.run(
        [str(BIN / "abliterated"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OLLAMA_HOST": f"127.0.0.1:{free_port()}"} | environment,
    )
    assert told.returncode == code, (told.returncode, told.stdout, told.stderr)
    return told


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The refuser's direction, and what was said of it."""
    path = tmp_path_factory.mktemp("direction") / "refusal.pt"
    told = call("direction", DATA.model, *PROMPTS, "--count", 48, "-o", path, "--layer-fracs", "0.4", "0.6")
    assert told.stdout.count("\n") == 1
    assert "direction" in told.stderr, "progress is told"
    return path, json.loads(told.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_folder(tmp_path_factory.mktemp("folder"))


def test_the_direction_is_one_vector_with_its_story_in_one_line(found: tuple[Path, dict[str, object]]) -> None:
    path, said = found
    assert {"layer_frac", "layer_index", "gap_norm"} <= set(said)
    assert (said["layer_index"], said["layer_frac"]) in {(2, 0.3333), (3, 0.5)}
    assert isinstance(said["gap_norm"], float)
    assert said["gap_norm"] > 1
    vector = torch.load(path, weights_only=True)
    assert (vector.dtype, vector.dim(), vector.device.type) == (torch.float32, 1, "cpu")
    assert abs(float(vector.norm()) - 1) < 1e-5
    assert listed(path.parent) == ["refusal.pt", "refusal.pt.json"]
    assert json.loads((path.parent / "refusal.pt.json").read_text())["layer"] == said["layer_index"]


def test_applied_it_no_longer_refuses_and_the_copy_in_another_type_neither(
    found: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    product = Path(
        call("apply", DATA.model, "--direction", found[0], "--out", tmp_path / "out", "--name", "free").stdout.strip()
    )
    assert product == tmp_path / "out" / "free.gguf"
    assert read_gguf(product).values["abliterated.coverage"] == 1.0
    copy = tmp_path / "copy.gguf"
    assert call("export", product, "-o", copy, "--quantize", "F16").stdout.strip() == str(copy)
    assert {tensor.type.name for tensor in read_gguf(copy).tensors} <= {"F16", "F32"}
    assert read_gguf(copy).values["abliterated.content"] == read_gguf(product).values["abliterated.content"]
    for model in (product, copy):
        told = call("evaluate", model, *PROMPTS, "--prompts", 12, "--tokens", 24, "--json")
        assert json.loads(told.stdout)["refusal_rate"] <= 0.1
    refused = call("export", product, "-o", copy, code=6)
    assert "--force" in refused.stderr
    call("export", product, "-o", copy, "--force")
    assert copy.read_bytes()[:4] == b"GGUF"
    # A strength of nothing is the base's answers.
    kept = call("apply", DATA.model, "--direction", found[0], "--out", tmp_path / "no", "--strength", 0).stdout.strip()
    told = call("evaluate", kept, *PROMPTS, "--prompts", 12, "--tokens", 24, "--json")
    assert json.loads(told.stdout)["refusal_rate"] >= 0.9


def test_a_folder_is_edited_and_exported_by_the_converter(folder: Planted, tmp_path: Path) -> None:
    prompts = ["--harmful-dir", folder.harmful, "--harmless-dir", folder.harmless]
    call("direction", folder.path, *prompts, "-o", tmp_path / "refusal.safetensors", "--per-layer")
    edited = call("apply", folder.path, "--direction", tmp_path / "refusal.safetensors", "--out", tmp_path / "out")
    made = Path(edited.stdout.strip())
    assert open_source(made).kind == "safetensors"
    call("export", made, "-o", tmp_path / "made.gguf", "--converter", CONVERTER, "--quantize", "Q8_0")
    structure = read_gguf(tmp_path / "made.gguf")
    assert structure.values["abliterated.coverage"] == 1.0
    assert "Q8_0" in {tensor.type.name for tensor in structure.tensors}
    assert listed(tmp_path) == ["made.gguf", "out", "refusal.safetensors", "refusal.safetensors.json"]
    refused = call("export", made, "-o", tmp_path / "none.gguf", code=2)
    assert "needs a converter" in refused.stderr
    assert not (tmp_path / "none.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["direction", "missing.gguf", "-o", "x.pt"], 3, "no such file"),
        (["direction", DATA.model, "-o", "x.bin"], 2, "Name it .pt or .safetensors"),
        (["direction", DATA.model, "-o", "x.pt", "--layer", "deep"], 2, "--layer deep: no number"),
        (["direction", DATA.model, "-o", "x.pt", "--harmful", "nowhere.txt"], 2, "nowhere.txt"),
        (["direction", DATA.model, "-o", "x.pt", "--rank", "0"], 2, "direction.rank"),
        (["direction", "llama3:8b", "-o", "x.pt"], 75, "no engine answers"),
        (["apply", DATA.model, "--direction", "none.pt", "--out", "out"], 2, "there is no"),
        (["apply", DATA.model, "--direction", DATA.harmful, "--out", "out"], 2, "is no direction file"),
        (["apply", DATA.model, "--direction", "none.pt", "--out", "out", "--format", "adapter"], 2, "plain edit"),
        (["export", DATA.model, "-o", "x.bin"], 2, "an export is a GGUF"),
        (["export", DATA.model, "-o", "x.gguf", "--quantize", "Q9"], 2, "Q9"),
        (["export", "hf:some/model", "-o", "x.gguf"], 2, "Give a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = call(*arguments, code=code)
    assert said in told.stderr
    assert "  → " in told.stderr
    assert "Traceback" not in told.stderr
    assert told.stdout == ""
    assert [name for name in listed(tmp_path) if name != "out"] == []
    assert listed(tmp_path / "out") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["direction", "FOLDER", *PROMPTS, "-o", "OUT/x.pt"],
        ["apply", "FOLDER", "--direction", "DIRECTION", "--out", "OUT"],
        ["export", "FOLDER", "-o", "OUT/x.gguf", "--converter", str(CONVERTER)],
        ["evaluate", "FOLDER", *PROMPTS, "--prompts", "4"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_cut_short_is_named_as_that(folder: Planted, tmp_path: Path, arguments: list[str]) -> None:
    cut = shutil.copytree(folder.path, tmp_path / "cut")
    weights = cut / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 3)
    torch.save(torch.eye(64)[60], tmp_path / "given.pt")
    places = {"FOLDER": str(cut), "DIRECTION": str(tmp_path / "given.pt"), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    told = call(*arguments, code=3)
    assert "model.safetensors is cut short" in told.stderr
    assert "  → Download it again" in told.stderr
    assert told.stdout == ""
    assert listed(tmp_path / "out") == []


@pytest.mark.parametrize("verb", ["direction", "apply", "export"])
def test_the_help_teaches_by_examples(verb: str) -> None:
    told = call(verb, "--help").stdout
    assert told.count(f"abliterated {verb} ") >= 4
    assert "exit codes:" in told
