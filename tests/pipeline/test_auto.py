"""`auto`, step by step, where every weight is known: which prompts count, what is tried, why one is chosen, what atoms
protect, and how many directions may be asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abliterate.contract.messages import Result, Task
from abliterate.contract.recipe import Prompts, recipe_from_table
from abliterated.pipeline.direction_files import read_direction
from abliterated.pipeline.prompts import read_prompts
from abliterated.pipeline.run import run
from pipeline.planted import FRAMES, GOOD, HIDDEN, LAYERS, REFUSAL, THINGS, TOKENS, Planted, plant


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return plant(tmp_path)


def go(model: Planted, **tables: Any) -> tuple[Result, np.ndarray, dict[str, Any]]:
    """The direction alone, with the report of how it was found."""
    recipe = recipe_from_table(
        {
            "model": str(model.path),
            "prompts": {"harmful": str(model.harmful), "harmless": str(model.harmless)},
            "export": {"format": "direction"},
            **tables,
        }
    )
    folder = model.path.parent
    task = Task(
        recipe=recipe,
        base="planted:latest",
        source=str(model.path),
        work=str(folder / "work"),
        output=str(folder / "out"),
    )
    result = run(task, lambda _: None, lambda: False)
    found = read_direction(folder / "out" / "direction.safetensors", HIDDEN, LAYERS)
    return result, found.vectors[0], json.loads((folder / "out" / "report.json").read_text())


def test_prompts_the_model_treats_against_their_class_are_left_out(planted: Planted) -> None:
    _, clean, _ = go(planted)
    # A third of the harmful prompts are of a kind that this model answers.
    lines = planted.harmful.read_text().splitlines()
    mixed = [f"do {GOOD[0]} {thing} {frame}" for thing in THINGS for frame in FRAMES] + lines[: 2 * len(lines) // 3]
    planted.harmful.write_text("\n".join(mixed) + "\n")
    result, found, _ = go(planted)
    drawn = read_prompts(Prompts(harmful=str(planted.harmful), harmless=str(planted.harmless))).harmful.training
    refused = [prompt for prompt in drawn if GOOD[0] not in prompt]
    assert result.direction["harmful_prompts"] == len(refused) < len(drawn)
    assert result.direction["refused_harmful"] < 0.9
    # What is found is what was found without them: they pull it nowhere.
    assert abs(float(found[0] @ clean[0])) > 0.99


def test_every_position_and_layer_is_tried_and_the_chosen_one_passes_the_three_tests(planted: Planted) -> None:
    result, _, report = go(planted)
    tried = {(one["layer"], one["position"]) for one in report["candidates"]}
    positions = {position for _, position in tried}
    assert positions == set(range(-len(positions), 0))
    assert len(positions) > 1
    assert tried == {
        (float(layer), position) for layer in range(LAYERS) if layer < 0.8 * LAYERS for position in positions
    }
    chosen = result.direction
    assert chosen["bypass"] < 0
    assert chosen["kl"] < 0.1
    assert chosen["induce"] > 0
    assert chosen["refused"] == 0.0
    best = min(report["candidates"], key=lambda one: one["bypass"] if (one["induce"] or 0) > 0 else 99)
    assert (chosen["layer"], chosen["position"]) == (best["layer"], best["position"])
    # At the instruction's end the refusal is not written yet: the choice of the place matters.
    assert max(one["bypass"] for one in report["candidates"]) > chosen["bypass"] + 1


def test_it_is_found_by_prefill_but_for_a_few_openings(planted: Planted) -> None:
    result, _, _ = go(planted)
    # 24 openings of each class, the planted model's answers being three words and an end; nothing else is decoded
    # than what the trials compare, the harmless answers.
    assert result.metrics["tokens_decoded_run"] <= (24 + 24 + 96) * 4
    assert result.metrics["tokens_prefilled_run"] > 1000


def test_atoms_are_protected(planted: Planted) -> None:
    # The harmful prompts all speak of socks, and the harmless ones of bread, so that the difference does too.
    for path, thing in ((planted.harmful, "socks"), (planted.harmless, "bread")):
        beginnings = dict.fromkeys(line.rsplit(" ", 1)[0] for line in path.read_text().splitlines())
        lines = [f"{beginning} {thing} {frame}" for beginning in beginnings for frame in FRAMES]
        path.write_text("\n".join(lines) + "\n")
    at = {"method": "layer", "layer": 2, "position": -7}  # the thing's own place
    _, plain, _ = go(planted, direction=at)
    atoms = planted.path.parent / "atoms.txt"
    atoms.write_text("\n".join(f"do {verb} socks {frame}" for verb in GOOD for frame in FRAMES) + "\n")
    prompts = {"harmful": str(planted.harmful), "harmless": str(planted.harmless), "atoms": [str(atoms)]}
    result, protected, report = go(planted, direction=at, prompts=prompts)
    assert result.direction["atoms"] == len(GOOD) * len(FRAMES)
    socks = TOKENS.index("socks")
    assert abs(plain[0, socks]) > 0.1
    assert abs(protected[0, socks]) < abs(plain[0, socks]) / 2  # softly: it is a ridge
    assert abs(protected[0, REFUSAL]) > abs(plain[0, REFUSAL])
    assert {source["kind"] for source in report["prompts"]} == {"harmful", "harmless", "atoms"}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_so_many_directions_as_asked_for_stand_at_right_angles(planted: Planted, rank: int) -> None:
    result, found, _ = go(planted, direction={"method": "layer", "layer": 2, "rank": rank})
    assert result.direction["rank"] == rank
    assert found.shape == (rank, HIDDEN)
    np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-5)
    assert abs(found[0, REFUSAL]) > 0.9
