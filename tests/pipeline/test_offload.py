"""A model larger than the memory it may have: accelerate leaves a part on disk, and the answers are the same."""

from __future__ import annotations

import pytest
import torch

from abliterate.contract.recipe import Run, recipe_from_table
from abliterated.pipeline import loading
from abliterated.pipeline.activations import next_logits
from abliterated.pipeline.choose import find_direction
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.loading import Loaded, load
from abliterated.pipeline.prompts import read_prompts
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.room import Placement, place, place_offloaded
from abliterated.pipeline.source import Source, open_source
from abliterated.pipeline.watch import Watch
from abliterated.pipeline.weights import Unstreamable
from pipeline.folders import planted_folder, table
from pipeline.planted import Planted

RUN = Run(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_folder(tmp_path_factory.mktemp("model"))


def half(source: Source) -> Placement:
    return Placement("offloaded", 0, (source.size // 2,))


def on_disk(loaded: Loaded) -> int:
    return sum(value.numel() * 4 for value in loaded.model.parameters() if value.is_meta)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_with_half_the_memory_it_answers_as_with_all_of_it(model: Planted, form: str) -> None:
    source = open_source(model.path if form == "folder" else model.path.with_name("planted.gguf"))
    whole, part = load(source, RUN, Watch(), "whole"), load(source, RUN, Watch(), half(source))
    assert on_disk(whole) == 0
    assert on_disk(part) >= source.size // 2
    assert any("accelerate placed it" in note for note in part.notes)
    lines = [*model.harmful.read_text().splitlines()[:6], *model.harmless.read_text().splitlines()[:6]]
    rows = renderer(whole.tokenizer, source.context, "").all_tokens(lines)
    assert greedy(part, rows, 6, Watch(), "") == greedy(whole, rows, 6, Watch(), "")
    assert torch.equal(next_logits(part, rows), next_logits(whole, rows))
    assert on_disk(part) >= source.size // 2  # what was fetched was let go again


@pytest.mark.parametrize("method", ["auto", "layer"])
def test_the_direction_found_is_the_same_to_the_bit(model: Planted, method: str) -> None:
    recipe = recipe_from_table(table(model, direction={"method": method}, run={"device": "cpu", "dtype": "float32"}))
    source, prompts = open_source(model.path), read_prompts(recipe.prompts)
    found = []
    for how in ("whole", half(source)):
        loaded = load(source, RUN, Watch(), how)
        asked = renderer(loaded.tokenizer, source.context, prompts.system)
        found.append(find_direction(loaded, asked, prompts, recipe, Watch()).direction.digest())
    assert found[0] == found[1]


def test_what_can_neither_fit_nor_be_streamed_is_left_on_disk_in_part(
    model: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise Unstreamable("its layers hold hands")

    monkeypatch.setattr(loading, "open_engine", never)
    monkeypatch.setattr(loading, "free_memory", lambda _: 300_000)
    loaded = load(open_source(model.path), RUN, Watch())
    assert loaded.engine is None
    assert on_disk(loaded) > 0
    assert "its layers hold hands" in loaded.notes[0]
    assert "offloaded" in loaded.notes[-1]


def test_several_devices_are_given_their_shares_and_a_gpu_box_its_main_memory() -> None:
    """What accelerate is told, for devices that need not be there."""
    pair = [torch.device("cuda", 0), torch.device("cuda", 1)]
    told = loading._placed(place(60 << 30, [40 << 30, 70 << 30], 0), pair, pair[0])
    assert told["device_map"] == "auto"
    assert set(told["max_memory"]) == {0, 1, "cpu"}
    assert told["max_memory"]["cpu"] == 0
    assert told["max_memory"][0] + told["max_memory"][1] >= 60 << 30
    told = loading._placed(place_offloaded([10 << 30], 24 << 30), pair[:1], pair[0])
    assert told["max_memory"]["cpu"] == 16 << 30
    assert loading._placed(Placement("whole"), pair, pair[0]) == {"device_map": {"": pair[0]}}
    assert loading._placed(None, [torch.device("cpu")], torch.device("cpu")) == {}
