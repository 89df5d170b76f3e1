"""What each base gives in each format: one product beside the reports, with its papers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from abliterate.contract.errors import AbliteratedError, ConflictError, ModelError, RecipeError
from abliterate.contract.messages import Result, Task
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.run import run
from pipeline.folders import CONVERTER, listed, planted_folder, read_json, task
from pipeline.planted import Planted, plant

REPORTS = ["direction.safetensors", "direction.safetensors.json", "report.html", "report.json", "result.json"]


def go(asked: Task) -> Result:
    return run(asked, lambda _: None, lambda: False)


@pytest.fixture(scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("planted"), shards=True).path.parent


@pytest.fixture
def whole(_whole: Path, tmp_path: Path) -> Planted:
    """A folder of one's own, in shards."""
    shutil.copytree(_whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "planted.gguf").unlink()
    return Planted(tmp_path / "whole", tmp_path / "harmful.txt", tmp_path / "harmless.txt")


def gone(result: Result) -> None:
    assert result.metrics["refusal_before"] == 1.0
    assert result.metrics["refusal_after"] == 0.0
    assert result.metrics["harmless_exact"] == 1.0
    assert result.coverage == 1.0


def test_a_folder_gives_a_folder_with_its_papers(whole: Planted, tmp_path: Path) -> None:
    result = go(task(whole, export={"format": "safetensors"}))
    gone(result)
    assert (result.product, result.format) == ("whole-abliterated", "safetensors")
    assert listed(tmp_path / "out") == sorted([*REPORTS, "whole-abliterated"])
    product = tmp_path / "out" / "whole-abliterated"
    assert set(listed(whole.path)) | {"abliterated.json", "MODEL_CARD.md"} == set(listed(product))
    assert len(list(product.glob("*.safetensors"))) > 3
    assert (product / "LICENSE").read_text() == (whole.path / "LICENSE").read_text()
    told = read_json(product / "abliterated.json")
    assert told["abliterated.coverage"] == 1.0
    assert told["abliterated.content"] == result.content
    assert told["abliterated.direction.digest"] == result.direction["digest"]
    card = (product / "MODEL_CARD.md").read_text()
    refused = "| harmful prompts refused | 100.0% ("
    for said in ("whole", "apache-2.0", "`LICENSE`", result.direction["digest"], refused, "undo"):
        assert said in card
    for text in (card, json.dumps(told)):
        assert str(tmp_path) not in text
        assert "harmful.txt" not in text


def test_a_folder_becomes_a_gguf_through_the_converter(whole: Planted, tmp_path: Path) -> None:
    result = go(task(whole, CONVERTER))
    gone(result)
    assert (result.product, result.format) == ("whole-abliterated.gguf", "gguf")
    assert listed(tmp_path / "out") == sorted([*REPORTS, "MODEL_CARD.md", "whole-abliterated.gguf"])
    values = read_gguf(tmp_path / "out" / result.product).values
    assert values["abliterated.content"] == result.content
    assert values["abliterated.coverage"] == 1.0
    assert values["abliterated.direction.digest"] == result.direction["digest"]
    assert not any(isinstance(value, str) and str(tmp_path) in value for value in values.values())
    assert result.notes == []


def test_a_converted_folder_is_quantised_where_asked(whole: Planted, tmp_path: Path) -> None:
    result = go(task(whole, CONVERTER, export={"quantize": "Q8_0"}))
    assert result.metrics["refusal_after"] == 0.0
    found = read_gguf(tmp_path / "out" / result.product)
    assert {tensor.type.name for tensor in found.tensors if len(tensor.shape) > 1} == {"Q8_0"}
    assert found.values["general.file_type"] == 7


def test_without_a_converter_the_folder_is_the_product_and_the_next_step_is_said(
    whole: Planted, tmp_path: Path
) -> None:
    result = go(task(whole))
    gone(result)
    assert (result.product, result.format) == ("whole-abliterated", "safetensors")
    assert listed(tmp_path / "out") == sorted([*REPORTS, "whole-abliterated"])
    (note,) = result.notes
    assert "[tools] converter" in note
    assert "run.from_checkpoint" in note


def test_what_the_note_says_can_be_done(whole: Planted, tmp_path: Path) -> None:
    folder = go(task(whole))
    kept = tmp_path / "kept"
    (tmp_path / "out" / folder.product).rename(kept)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "work")
    result = go(task(whole, CONVERTER, run={"from_checkpoint": str(kept)}))
    gone(result)
    assert result.product == "whole-abliterated.gguf"
    assert result.content == folder.content
    assert result.direction["digest"] == folder.direction["digest"]
    assert listed(tmp_path / "out") == ["report.html", "report.json", "result.json", "whole-abliterated.gguf"]
    values = read_gguf(tmp_path / "out" / result.product).values
    assert values["abliterated.content"] == folder.content


def test_a_converter_that_fails_leaves_the_folder_and_its_last_words(whole: Planted, tmp_path: Path) -> None:
    config = read_json(whole.path / "config.json")
    (whole.path / "config.json").write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
    result = go(task(whole, CONVERTER))
    assert result.format == "safetensors"
    assert any("NewForCausalLM is not supported" in note for note in result.notes)
    assert listed(tmp_path / "out") == sorted([*REPORTS, "whole-abliterated"])


def test_a_gguf_gives_a_gguf_without_places_in_it(tmp_path: Path) -> None:
    result = go(task(plant(tmp_path)))
    gone(result)
    assert (result.product, result.format) == ("planted-abliterated.gguf", "gguf")
    told = (tmp_path / "out" / result.product).read_bytes()
    for place in (str(tmp_path), "harmful.txt", tmp_path.name):
        assert place.encode() not in told


def test_where_the_files_lie_changes_no_byte(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        digests.append(go(task(plant(tmp_path / name), evaluate={"prompts": 0})).digest)
    assert digests[0] == digests[1]


def test_the_direction_alone_comes_from_either(whole: Planted, tmp_path: Path) -> None:
    digests = []
    (tmp_path / "g").mkdir()
    for model in (whole, plant(tmp_path / "g")):
        result = go(task(model, export={"format": "direction"}))
        assert (result.product, result.format) == ("direction.safetensors", "direction")
        assert listed(model.path.parent / "out") == REPORTS
        digests.append(result.direction["digest"])
    assert digests[0] == digests[1], "the same model in two formats refuses along the same direction"


def test_an_adapter_is_the_product_and_who_takes_it_is_said(tmp_path: Path) -> None:
    asked = task(plant(tmp_path), export={"format": "adapter"}, edit={"norm": "none"})
    result = go(asked)
    assert (result.product, result.format, result.coverage) == ("planted-abliterated-adapter.gguf", "adapter", 1.0)
    assert listed(tmp_path / "out") == sorted([*REPORTS, result.product])
    assert any("Ollama before 0.34.1" in note for note in result.notes)
    assert go(asked).digest == result.digest


@pytest.mark.parametrize(
    ("kind", "converter", "tables", "error", "said"),
    [
        ("gguf", None, {"export": {"format": "safetensors"}}, RecipeError, "is a GGUF and stays one"),
        ("gguf", None, {"export": {"quantize": "Q9"}}, RecipeError, "Q9"),
        ("folder", None, {"export": {"format": "safetensors", "quantize": "Q8_0"}}, RecipeError, "not quantised"),
        ("folder", "/nowhere/convert.py", {}, RecipeError, "there is no /nowhere/convert.py"),
        ("folder", "convert.py", {}, RecipeError, "is relative"),
        (
            "folder",
            None,
            {"export": {"format": "adapter"}, "edit": {"norm": "none"}},
            RecipeError,
            "an adapter belongs to a GGUF",
        ),
        ("folder", None, {"run": {"from_checkpoint": "SELF"}}, RecipeError, "needs a converter"),
        (
            "folder",
            str(CONVERTER),
            {"run": {"from_checkpoint": "SELF"}, "export": {"format": "safetensors"}},
            RecipeError,
            "can't give",
        ),
        ("gguf", str(CONVERTER), {"run": {"from_checkpoint": "SELF"}}, RecipeError, "is a GGUF already"),
        ("folder", str(CONVERTER), {"run": {"from_checkpoint": "/nowhere"}}, ModelError, "no model at /nowhere"),
    ],
)
def test_what_can_not_come_out_is_said_at_once(
    whole: Planted,
    tmp_path: Path,
    kind: str,
    converter: str | None,
    tables: dict[str, Any],
    error: type[AbliteratedError],
    said: str,
) -> None:
    model = whole if kind == "folder" else plant(tmp_path)
    if tables.get("run") == {"from_checkpoint": "SELF"}:
        tables = {**tables, "run": {"from_checkpoint": str(model.path)}}
    with pytest.raises(error, match=said):
        go(task(model, Path(converter) if converter else None, **tables))
    assert listed(tmp_path / "out") == []


def test_a_product_of_ours_is_replaced_and_only_once_the_new_one_is_whole(whole: Planted, tmp_path: Path) -> None:
    first = go(task(whole, evaluate={"prompts": 0}))
    product = tmp_path / "out" / first.product
    (product / "mark").write_text("of the first")
    shutil.rmtree(tmp_path / "work")
    second = go(task(whole, evaluate={"prompts": 0}, edit={"strength": 0.5}))
    assert second.content != first.content
    assert not (product / "mark").exists()
    assert listed(tmp_path / "out") == sorted([*REPORTS, "whole-abliterated"])


@pytest.mark.parametrize(
    "name", ["planted-abliterated.gguf", "direction.safetensors", "report.json", "report.html", "MODEL_CARD.md"]
)
def test_what_is_not_ours_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    taken = tmp_path / "out" / name
    taken.write_bytes(b"mine")
    with pytest.raises(ConflictError, match=f"{name} in out/ is there already"):
        go(task(plant(tmp_path)))
    assert taken.read_bytes() == b"mine"
    assert listed(tmp_path / "out") == [name]


def test_a_folder_gets_one_product_of_ours(tmp_path: Path) -> None:
    model = plant(tmp_path)
    go(task(model, evaluate={"prompts": 0}))
    with pytest.raises(ConflictError, match=r"holds another product already, planted-abliterated\.gguf"):
        go(task(model, evaluate={"prompts": 0}, name="other"))
    (tmp_path / "out" / "somebody-elses.gguf").write_bytes(b"GGUF")
    go(task(model, evaluate={"prompts": 0}))
    assert (tmp_path / "out" / "somebody-elses.gguf").exists()


def test_the_base_is_not_its_own_product(tmp_path: Path) -> None:
    model = plant(tmp_path)
    asked = task(model, evaluate={"prompts": 0}, name="planted")
    from msgspec.structs import replace

    with pytest.raises(ConflictError, match="is the base itself"):
        go(replace(asked, output=str(tmp_path)))


def test_a_direction_may_be_read_from_where_it_would_be_written(tmp_path: Path) -> None:
    model = plant(tmp_path)
    go(task(model, export={"format": "direction"}))
    given = tmp_path / "out" / "direction.safetensors"
    (tmp_path / "out" / "direction.safetensors.json").unlink()
    (tmp_path / "out" / "result.json").unlink()
    before = given.read_bytes()
    result = go(task(model, direction={"method": "file", "file": str(given)}, evaluate={"prompts": 0}))
    assert result.coverage == 1.0
    assert given.read_bytes() == before
