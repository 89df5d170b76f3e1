"""What a run refuses before or while it measures: named, with a way out, and nothing of it visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from abliterate.contract.errors import AbliteratedError, ModelError, RecipeError
from abliterated.pipeline.run import run
from pipeline import planted as planted_model
from pipeline.folders import listed, task
from pipeline.planted import CONTEXT, Planted, plant


def refused(asked: Any, kind: type[AbliteratedError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        run(asked, lambda _: None, lambda: False)
    assert caught.value.remedy
    assert listed(Path(asked.output)) == []


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return plant(tmp_path)


@pytest.mark.parametrize("method", ["auto", "layer"])
def test_a_prompt_longer_than_the_context(planted: Planted, method: str) -> None:
    with planted.harmful.open("a") as file:
        file.write("how glimp " + "bread " * CONTEXT + "\n")
    asked = task(planted, direction={"method": method}, prompts={"harmful": str(planted.harmful), "count": 500})
    refused(asked, ModelError, rf"the prompt 'how glimp.* tokens, the model's context {CONTEXT}")


def test_a_system_prompt_longer_than_the_context(planted: Planted) -> None:
    prompts = {"harmful": str(planted.harmful), "harmless": str(planted.harmless), "system": "bread " * CONTEXT}
    refused(task(planted, prompts=prompts), ModelError, f"the model's context {CONTEXT}")


def test_two_classes_that_are_the_same(planted: Planted) -> None:
    prompts = {"harmful": str(planted.harmful), "harmless": str(planted.harmful)}
    refused(task(planted, prompts=prompts), RecipeError, "have 128 prompts in common: nothing tells them apart")


def test_two_classes_that_make_no_difference_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that looks at nothing but the last token."""
    known = planted_model.weights(refuses=False)
    deaf = {name: values * (0 if "attn" in name else 1) for name, values in known.items()}
    monkeypatch.setattr(planted_model, "weights", lambda _: deaf)
    for method in ({"method": "layer", "layer": 2}, {"method": "per-layer"}):
        asked = task(plant(tmp_path), direction=method, edit={"invert": True})
        refused(asked, ModelError, "Give prompts of two different kinds")


def test_a_tensor_nobody_knows_is_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = planted_model.weights(refuses=True)
    novel = {"blk.1.novel_mixer.weight": np.ones((64, 7))}
    monkeypatch.setattr(planted_model, "weights", lambda _: known | novel)
    asked, stages = task(plant(tmp_path)), []
    with pytest.raises(ModelError, match=r"llama holds blk\.1\.novel_mixer\.weight \(64, 7\)"):
        run(asked, lambda progress: stages.append(progress.stage), lambda: False)
    assert set(stages) <= {"load"}


def test_a_refusal_to_be_strengthened_in_a_model_that_knows_few_of_the_usual_words(planted: Planted) -> None:
    more = planted.harmless.with_name("more.txt")
    more.write_text("".join(f"do {line}\n" for line in planted.harmless.read_text().splitlines()))
    prompts = {"harmful": str(planted.harmless), "harmless": str(more), "count": 8}
    asked = task(planted, prompts=prompts, edit={"invert": True}, direction={"method": "layer", "layer": 1})
    assert run(asked, lambda _: None, lambda: False).direction["refused_harmful"] == 0.0


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_a_direction_of_another_width(tmp_path: Path, form: str) -> None:
    from pipeline.folders import planted_folder

    model = plant(tmp_path) if form == "gguf" else planted_folder(tmp_path)
    save_file({"direction": np.ones(65, dtype=np.float32)}, tmp_path / "given.safetensors")
    asked = task(model, direction={"method": "file", "file": str(tmp_path / "given.safetensors")})
    refused(asked, ModelError, r"given\.safetensors holds a direction of shape \(65,\), the model needs \(64,\)")


def test_directions_of_another_depth(planted: Planted, tmp_path: Path) -> None:
    torch.save({"per_layer": True, "directions": torch.eye(64)[:5]}, tmp_path / "given.pt")
    asked = task(planted, direction={"method": "file", "file": str(tmp_path / "given.pt")})
    refused(asked, ModelError, r"shape \(5, 64\), the model needs \(4, 64\)")
