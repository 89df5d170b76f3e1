"""The whole story on a model that came in parts: measured, edited and asked again, into one file or into parts."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from abliterate.contract.messages import Task
from abliterate.contract.recipe import Run, recipe_from_table
from abliterated.pipeline.loading import load
from abliterated.pipeline.run import run
from abliterated.pipeline.source import open_source
from abliterated.pipeline.watch import Watch
from pipeline.planted import Planted, plant


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Planted, Path]:
    """A model that refuses, and the first of its parts."""
    whole = plant(tmp_path)
    (tmp_path / "parts").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=15))
        plant(tmp_path / "parts")
    first = next((tmp_path / "parts").glob("*-00001-of-*.gguf"))
    assert len(open_source(first).parts) == 3
    return whole, first


def task(model: Planted, source: Path, out: Path, **tables: Any) -> Task:
    table = {
        "model": str(source),
        "name": "made",
        "prompts": {"harmful": str(model.harmful), "harmless": str(model.harmless)},
        "evaluate": {"tokens": 8},
        "search": {"trials": 0},
        **tables,
    }
    return Task(
        recipe=recipe_from_table(table), base="planted", source=str(source), work=str(out / "work"), output=str(out)
    )


def test_one_file_is_made_where_an_engine_shall_take_it(split: tuple[Planted, Path], tmp_path: Path) -> None:
    model, first = split
    result = run(task(model, first, tmp_path / "one"), lambda _: None, lambda: False)
    whole = run(task(model, model.path, tmp_path / "whole"), lambda _: None, lambda: False)
    assert (result.product, result.content, result.coverage) == ("made.gguf", whole.content, 1.0)
    assert (result.metrics["refusal_before"], result.metrics["refusal_after"]) == (1.0, 0.0)


def test_parts_stay_parts_where_files_are_wanted(split: tuple[Planted, Path], tmp_path: Path) -> None:
    model, first = split
    out = tmp_path / "out"
    asked = task(model, first, out, export={"register": False})
    result = run(asked, lambda _: None, lambda: False)
    assert (result.product, result.metrics["refusal_after"]) == ("made", 0.0)
    names = {path.name for path in (out / "made").glob("*.gguf")}
    assert names == {f"made-0000{n}-of-00003.gguf" for n in (1, 2, 3)}
    assert any("give llama.cpp made/made-00001-of-00003.gguf" in note for note in result.notes)
    assert open_source(out / "made").path.name == "made-00001-of-00003.gguf"
    again = run(asked, lambda _: None, lambda: False)
    assert (again.content, again.digest, again.notes) == (result.content, result.digest, result.notes)
    shutil.rmtree(out / "made")


def test_whole_or_layer_by_layer_the_parts_are_the_model(split: tuple[Planted, Path]) -> None:
    import torch

    model, first = split
    prompt = torch.tensor([[1, 2, 3, 4]])
    found = []
    for path in (model.path, first):
        loaded = load(open_source(path), Run(device="cpu", dtype="float32"), Watch(), "whole")
        with torch.no_grad():
            found.append(loaded.model(prompt).logits)
    assert torch.equal(*found)
    assert load(open_source(first), Run(device="cpu"), Watch()).engine is not None
