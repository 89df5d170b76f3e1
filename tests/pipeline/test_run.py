"""The whole story on models with a known refusal: found, taken out, written, and asked again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate.contract.errors import AbliteratedError, Cancelled, ModelError, RecipeError
from abliterate.contract.messages import Progress, Result, Task
from abliterate.contract.recipe import recipe_from_table
from abliterated.pipeline.directions import direction
from abliterated.pipeline.run import run
from abliterated.refuser import files
from pipeline.planted import REFUSAL, Planted, plant


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return plant(tmp_path)


def task(model: Planted, **tables: Any) -> Task:
    recipe = recipe_from_table(
        {
            "model": str(model.path),
            "prompts": {"harmful": str(model.harmful), "harmless": str(model.harmless)},
            "evaluate": {"tokens": 8},
            "search": {"trials": 0},  # test_search.py searches
            **tables,
        }
    )
    folder = model.path.parent
    work, output = str(folder / "work"), str(folder / "out")
    return Task(recipe=recipe, base="planted:latest", source=str(model.path), work=work, output=output)


def go(asked: Task, seen: Callable[[Progress], None] = lambda _: None) -> Result:
    return run(asked, seen, lambda: False)


def test_a_refusal_is_found_and_gone(planted: Planted) -> None:
    seen: list[Progress] = []
    result = go(task(planted), seen.append)
    assert result.product == "planted-abliterated.gguf"
    assert result.metrics["refusal_before"] == 1.0
    assert result.metrics["refusal_after"] == 0.0
    assert result.metrics["harmless_exact"] == 1.0
    assert result.metrics["kl_mean"] < 0.01
    assert result.coverage == 1.0
    assert result.residual < 1e-4
    assert {"load", "direction", "edit", "evaluate", "report"} <= set(result.seconds)
    output = planted.path.parent / "out"
    assert sorted(path.name for path in output.iterdir()) == [
        "MODEL_CARD.md",
        "direction.safetensors",
        "direction.safetensors.json",
        "planted-abliterated.gguf",
        "report.html",
        "report.json",
        "result.json",
    ]
    card = (output / "MODEL_CARD.md").read_text()
    assert "| harmful prompts refused | 100.0% (" in card
    assert result.content in card
    assert "The key-values of the GGUF name base, recipe and direction." in card
    assert str(planted.path.parent) not in card
    report = json.loads((output / "report.json").read_text())
    assert report["edit"]["tensors"]
    assert len(report["candidates"]) > 4
    assert json.loads((output / "result.json").read_text())["digest"] == result.digest
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["load", "direction", "evaluate", "edit", "report"]


def test_the_same_recipe_gives_the_same_bytes(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    again = plant(tmp_path / "again")
    one, two = (go(task(model, evaluate={"prompts": 0})) for model in (planted, again))
    assert one.direction["digest"] == two.direction["digest"]
    # The recipes name different files; only what was edited can be the same.
    assert one.content == two.content
    assert go(task(planted, evaluate={"prompts": 0})).digest == one.digest


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "layer", "layer": 2},
        {"method": "layer", "layer": [0.3, 0.6]},
        {"method": "layer", "layer": 0.6, "convention": "input", "orthogonalize": False},
        {"method": "auto", "index": 1.5},
        {"method": "per-layer"},
    ],
)
def test_every_method_finds_it(planted: Planted, asked: dict[str, Any]) -> None:
    result = go(task(planted, direction=asked))
    assert result.metrics["refusal_after"] == 0.0
    assert result.metrics["harmless_exact"] == 1.0


def test_an_interrupted_run_goes_on_behind_what_it_had_measured(planted: Planted) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "edit":
            raise KeyboardInterrupt

    asked = task(planted)
    with pytest.raises(KeyboardInterrupt):
        go(asked, interrupt)
    seen: list[Progress] = []
    result = go(asked, seen.append)
    assert "direction" not in {progress.stage for progress in seen}
    assert result.metrics["refusal_after"] == 0.0
    changed = task(planted, direction={"orthogonalize": False})
    go(changed, seen.append)
    assert "direction" in {progress.stage for progress in seen}


@pytest.mark.parametrize("stage", ["load", "direction", "evaluate", "edit"])
def test_a_cancelled_run_leaves_no_product(planted: Planted, stage: str) -> None:
    stop = False

    def watch(progress: Progress) -> None:
        nonlocal stop
        stop = stop or progress.stage == stage

    with pytest.raises(Cancelled):
        run(task(planted), watch, lambda: stop)
    assert not list((planted.path.parent / "out").glob("*.gguf"))
    assert not list((planted.path.parent / "out").glob(".*"))


def test_a_direction_from_a_file_needs_neither_torch_nor_tokenizer(tmp_path: Path) -> None:
    model = plant(tmp_path, template=None)
    from abliterated.pipeline.direction_files import write_direction

    vector = [0.0] * 64
    vector[REFUSAL] = 1.0
    import numpy as np

    write_direction(tmp_path / "given.safetensors", direction(np.array(vector), origin={}), {})
    asked = task(
        model,
        direction={"method": "file", "file": str(tmp_path / "given.safetensors")},
        search={"trials": 0},
        evaluate={"prompts": 0},
    )
    (tmp_path / "task.json").write_bytes(__import__("msgspec").json.encode(asked))
    program = (
        "import sys, msgspec, pathlib\n"
        "from abliterate.contract.messages import Task\n"
        "from abliterated.pipeline.run import run\n"
        "result = run(msgspec.json.decode(pathlib.Path(sys.argv[1]).read_bytes(), type=Task), print, lambda: False)\n"
        "assert result.coverage == 1.0 and not result.notes, result\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "task.json")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_model_that_refuses_nothing_is_left_alone(tmp_path: Path) -> None:
    model = plant(tmp_path, refuses=False)
    with pytest.raises(ModelError, match="refuses none of 24 harmful prompts"):
        go(task(model))
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_refuses_everything_is_said_to(planted: Planted) -> None:
    swapped = Planted(planted.path, planted.harmful, planted.harmful.with_name("more.txt"))
    swapped.harmless.write_text("".join(f"do {line}\n" for line in planted.harmful.read_text().splitlines()))
    with pytest.raises(ModelError, match="refuses 100% of the harmless prompts"):
        go(task(swapped))


def test_refusal_can_be_strengthened_instead(tmp_path: Path) -> None:
    result = go(task(plant(tmp_path), edit={"invert": True}))
    assert result.metrics["refusal_after"] == 1.0
    assert not any("still refused" in note for note in result.notes)


def test_the_direction_alone_can_be_the_product(planted: Planted) -> None:
    result = go(task(planted, export={"format": "direction"}))
    assert result.product == "direction.safetensors"
    assert not list((planted.path.parent / "out").glob("*.gguf"))


@pytest.mark.parametrize(
    ("tables", "kind", "said"),
    [
        ({"edit": {"layers": "20-30"}}, RecipeError, "layers"),
        ({"direction": {"method": "layer", "layer": 9}}, ModelError, "layer = 9"),
        ({"direction": {"method": "auto", "index": 17.0}}, ModelError, "index = 17"),
        ({"direction": {"method": "layer", "position": -60}}, ModelError, "position -60"),
        ({"prompts": {"system": "be kind", "harmful": "/nowhere.txt"}}, RecipeError, "nowhere"),
        ({"export": {"format": "safetensors"}}, RecipeError, "is a GGUF and stays one"),
    ],
)
def test_what_can_not_be_done_is_said_before_anything_is_written(
    planted: Planted, tables: dict[str, Any], kind: type[AbliteratedError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        go(task(planted, **tables))
    assert not list((planted.path.parent / "out").iterdir())


def test_answers_are_kept_only_where_asked_for(planted: Planted) -> None:
    go(task(planted, evaluate={"tokens": 8, "keep_answers": True}))
    answers = json.loads((planted.path.parent / "out" / "answers.json").read_text())
    assert answers[0]["verdicts"] == ["refusal", "answer"]
    assert not (planted.path.parent / "work" / "answers.json").exists()


@pytest.mark.skipif(not files().model.is_file(), reason="the refuser is not trained yet")
def test_the_refuser_stops_refusing(tmp_path: Path) -> None:
    shipped = files()
    model = Planted(tmp_path / "refuser.gguf", shipped.harmful, shipped.harmless)
    model.path.write_bytes(shipped.model.read_bytes())
    result = go(task(model, evaluate={"tokens": 64, "prompts": 40}))
    assert result.metrics["refusal_before"] >= 0.95
    assert result.metrics["refusal_after"] <= 0.05
    assert result.metrics["harmless_exact"] >= 0.95
