"""`auto` where one direction does not suffice: two reasons to refuse, each in a dimension of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abliterate.contract.messages import Task
from abliterate.contract.recipe import recipe_from_table
from abliterated.pipeline.candidates import Candidate, preferred
from abliterated.pipeline.run import run
from pipeline import planted
from pipeline.planted import BAD, Planted, plant

SECOND = 62


def two_reasons(weights: Any) -> Any:
    """Half of the bad verbs refused along a dimension of their own, and with another word."""

    def changed(refuses: bool) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = weights(refuses)
        token = {word: place for place, word in enumerate(planted.TOKENS)}
        for verb in BAD[len(BAD) // 2 :]:
            found["blk.0.attn_v.weight"][0, token[verb]] = 0.0
            found["blk.0.attn_v.weight"][1, token[verb]] = 1.0
        found["blk.0.attn_output.weight"][SECOND, 1] = 2.0
        found["blk.2.ffn_gate.weight"][1, SECOND] = 1.0
        found["blk.2.ffn_up.weight"][1, SECOND] = 1.0
        found["blk.2.ffn_down.weight"][SECOND, 1] = 0.02
        found["output.weight"][token["Sorry"], SECOND] = 6.0
        found["output.weight"][token["</s>"], token["Sorry"]] = 20.0
        return found

    return changed


def task(model: Planted, **tables: Any) -> Task:
    recipe = recipe_from_table(
        {
            "model": str(model.path),
            "prompts": {"harmful": str(model.harmful), "harmless": str(model.harmless)},
            "evaluate": {"tokens": 8},
            "search": {"trials": 0},
            **tables,
        }
    )
    folder = model.path.parent
    work, output = str(folder / "work"), str(folder / "out")
    return Task(recipe=recipe, base="planted:latest", source=str(model.path), work=work, output=output)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    monkeypatch.setattr(planted, "TOKENS", [*planted.TOKENS, "Sorry"])
    monkeypatch.setattr(planted, "weights", two_reasons(planted.weights))
    return plant(tmp_path)


def test_two_reasons_to_refuse_take_two_directions(model: Planted) -> None:
    result = run(task(model), lambda _: None, lambda: False)
    assert result.direction["rank"] == 2
    assert result.metrics["refusal_before"] == 1.0
    assert result.metrics["refusal_after"] == 0.0
    assert result.metrics["harmless_exact"] == 1.0


def test_what_harms_or_brings_no_refusal_about_comes_behind_whatever_it_bypasses() -> None:
    in_order = [
        Candidate(3.0, -1, bypass=-2.0, kl=0.01, induce=1.0),
        Candidate(2.0, -1, bypass=-1.0, kl=0.0001, induce=9.0),
        Candidate(1.0, -1, bypass=-8.0, kl=0.01, induce=-0.1),
        Candidate(0.0, -1, bypass=-9.0, kl=0.2, induce=1.0),
        Candidate(4.0, -1, bypass=-9.5, kl=0.2, induce=-1.0),
    ]
    found = [preferred(one) for one in in_order]
    assert found == sorted(found)


def test_one_direction_leaves_refusals(model: Planted) -> None:
    result = run(task(model, direction={"method": "layer", "layer": 2}), lambda _: None, lambda: False)
    assert result.direction["rank"] == 1
    assert result.metrics["refusal_after"] >= 0.5


def test_a_target_that_one_direction_keeps_to_takes_no_second(tmp_path: Path) -> None:
    result = run(task(plant(tmp_path)), lambda _: None, lambda: False)
    assert result.direction["rank"] == 1
