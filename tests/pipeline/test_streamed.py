"""Layer by layer is the same as all at once: streams, logits, ablation, answers, and the direction that is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from abliterate.contract.errors import Cancelled, ModelError
from abliterate.contract.recipe import Prompts, Run, recipe_from_table
from abliterated.pipeline.activations import read_streams, streams_alone, tail_logits
from abliterated.pipeline.choose import find_direction
from abliterated.pipeline.contributions import Ablation, Addition, find_contributions
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.loading import Loaded, load, load_model, open_engine
from abliterated.pipeline.passes import Pass, run_pass
from abliterated.pipeline.prompts import read_prompts
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.source import Source, open_source
from abliterated.pipeline.taps import decoder_layers
from abliterated.pipeline.watch import Watch
from abliterated.refuser import files
from pipeline import architectures, tiny_gguf
from pipeline.planted import plant

BEGINNING = tuple(range(40, 52))
# A common beginning, ends of many lengths.
ROWS = [BEGINNING + tuple(range(5 + length, 5 + 2 * length)) for length in (9, 4, 7, 7, 12, 3)]
CPU = torch.device("cpu")
FOLDERS = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "bamba",
    "glm4",
    "jetmoe",
    "longcat_flash",
)
Written = Callable[[str], Source]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Tiny random models as files, each written once."""
    made: dict[str, Source] = {}
    folder = tmp_path_factory.mktemp("models")

    def source(name: str) -> Source:
        if name not in made:
            kind, _, family = name.partition(":")
            path = folder / f"{kind}-{family}"
            if kind == "gguf":
                tiny_gguf.write(path.with_suffix(".gguf"), tiny_gguf.tiny(family), Type.Q8_0)
                path = path.with_suffix(".gguf")
            else:
                architectures.tiny(family).save_pretrained(path)
            made[name] = open_source(path)
        return made[name]

    return source


def both(source: Source) -> tuple[Loaded, Loaded]:
    """The same model, whole and streamed."""
    run = Run(dtype="float32")
    named = type("None", (), {"eos_token_id": 2, "get_vocab": dict})
    engine = open_engine(source, run)
    whole = Loaded(source, load_model(source, run, Watch()), named, CPU)
    return whole, Loaded(source, engine.skeleton.model, named, CPU, engine)


def streams(loaded: Loaded, convention: str = "output") -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's streams and next-token log probabilities."""
    found: list[Any] = [None] * len(ROWS)
    for reading in read_streams(loaded, ROWS, (-1, -3), convention, Watch(), ""):
        for number, row in enumerate(reading.rows):
            found[row] = (reading.streams[number], reading.next_token[number])
    kept, following = zip(*found, strict=True)
    return torch.stack(kept), torch.stack(following)


def alone(loaded: Loaded, row: tuple[int, ...]) -> torch.Tensor:
    """A row's next-token log probabilities, in the plainest way."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([row]), use_cache=False).logits
    return torch.log_softmax(logits[0, -1].float(), dim=-1)


@pytest.mark.parametrize(
    "name", [*(f"folder:{family}" for family in FOLDERS), "gguf:llama", "gguf:qwen2", "gguf:gemma2"]
)
def test_streamed_is_whole(written: Written, name: str) -> None:
    whole, streamed = both(written(name))
    expected = torch.stack([alone(whole, row) for row in ROWS])
    kept, following = streams(whole)
    torch.testing.assert_close(following, expected, atol=2e-4, rtol=2e-4)
    again, after = streams(streamed)
    torch.testing.assert_close(again, kept, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=2e-4)
    assert streamed.engine is not None
    assert all(value.is_meta for layer in streamed.engine.skeleton.layers for value in layer.parameters())


def test_experts_of_a_gguf_are_merged_as_the_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in ("q_norm", "k_norm"):
        monkeypatch.setitem(tiny_gguf._LLAMA, f"self_attn.{norm}", f"attn_{norm}")
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    model = tiny_gguf.tiny("qwen3_moe", **changes)
    model.architecture = "qwen3moe"
    model.keys |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
    model.keys |= {"attention.key_length": 64, "attention.value_length": 64}
    path = tiny_gguf.write(tmp_path / "tiny.gguf", model)
    whole, streamed = both(open_source(path))
    torch.testing.assert_close(streams(streamed)[0], streams(whole)[0], atol=1e-4, rtol=1e-4)
    # transformers alone would have taken the experts to be 768 wide, whatever the file says.
    for row in ROWS[:2]:
        ours = alone(whole, row)
        for token, value in tiny_gguf.llama_cpp_logprobs(path, list(row)).items():
            assert abs(float(ours[token]) - value) < 0.02


@pytest.mark.parametrize("convention", ["output", "input"])
def test_both_sides_of_a_layer_are_read(written: Written, convention: str) -> None:
    whole, streamed = both(written("folder:llama"))
    torch.testing.assert_close(streams(streamed, convention), streams(whole, convention), atol=1e-4, rtol=1e-4)


def test_a_second_reading_is_the_same_to_the_bit(written: Written) -> None:
    _, streamed = both(written("folder:qwen3"))
    one, two = streams(streamed), streams(streamed)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("how", [0, 1])
def test_nothing_is_computed_behind_the_last_layer_needed(written: Written, how: int) -> None:
    loaded = both(written("folder:llama"))[how]
    called: list[int] = []
    for number, layer in enumerate(decoder_layers(loaded.model)):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    found = dict.fromkeys(range(len(ROWS)), 0)
    for rows, kept in streams_alone(loaded, ROWS, (-1,), ("output", 2), Watch(), ""):
        assert kept.shape[1] == 2
        found |= dict.fromkeys(rows, 1)
    assert all(found.values())
    # The beginning that all share may run through every layer of a whole model; the rows don't.
    assert called.count(1) == 2
    assert called.count(3) == (0 if loaded.engine else called.count(3)) <= 1
    if loaded.engine:
        assert loaded.engine.layers_read == 2


def test_every_layer_is_read_once_whatever_goes_through(written: Written) -> None:
    _, streamed = both(written("folder:llama"))
    assert streamed.engine is not None
    tail_logits(streamed, [row * 4 for row in ROWS] * 12, 2)
    assert streamed.engine.layers_read == architectures.LAYERS


def test_what_does_not_fit_together_goes_in_waves(written: Written) -> None:
    _, streamed = both(written("folder:llama"))
    assert streamed.engine is not None
    expected = tail_logits(streamed, ROWS * 40, 1)
    streamed.engine.limit, streamed.engine.layers_read = 1, 0
    torch.testing.assert_close(tail_logits(streamed, ROWS * 40, 1), expected, atol=1e-4, rtol=1e-4)
    assert streamed.engine.layers_read > architectures.LAYERS


@pytest.mark.parametrize(
    "name", ["folder:llama", "folder:gemma2", "folder:mixtral", "folder:jetmoe", "folder:longcat_flash"]
)
def test_changes_run_together_each_with_its_own_rows(written: Written, name: str) -> None:
    whole, streamed = both(written(name))
    vectors = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).normal(size=(architectures.WIDTH, 3)))[0].T)
    vectors = vectors.float()[:, None, :]
    pairs = [(number, row) for row in range(len(ROWS)) for number in range(3)]
    found = []
    for loaded in (whole, streamed):
        contributions = find_contributions(loaded, ROWS[0])
        asked = Pass(
            [ROWS[row] for _, row in pairs],
            variants=tuple(number for number, _ in pairs),
            changing=lambda numbers, known=contributions: Ablation(known, vectors[numbers]),
        )
        logits = torch.empty(len(pairs), 99)
        for part in run_pass(loaded, asked, Watch()):
            logits[part.rows] = part.logits[:, 0]
        found.append(logits)
    contributions = find_contributions(whole, ROWS[0])
    for (number, row), logits in zip(pairs, found[0], strict=True):
        with Ablation(contributions, vectors[number]):
            expected = alone(whole, ROWS[row])
        torch.testing.assert_close(torch.log_softmax(logits, -1), expected, atol=5e-4, rtol=5e-4)
    torch.testing.assert_close(found[1], found[0], atol=5e-4, rtol=5e-4)


def test_what_is_added_behind_a_layer_is_added_when_streamed(written: Written) -> None:
    whole, streamed = both(written("folder:llama"))
    vectors = torch.randn(2, architectures.WIDTH, generator=torch.Generator().manual_seed(2))
    behind = torch.tensor([0, 2])
    found = []
    for loaded in (whole, streamed):
        layers = decoder_layers(loaded.model)
        variants = tuple(row % 2 for row in range(len(ROWS)))
        asked = Pass(
            ROWS,
            variants=variants,
            changing=lambda numbers, layers=layers: Addition(layers, vectors[numbers], behind[numbers]),
        )
        logits = torch.empty(len(ROWS), 99)
        for part in run_pass(loaded, asked, Watch()):
            logits[part.rows] = part.logits[:, 0]
        found.append(logits)
    torch.testing.assert_close(found[1], found[0], atol=2e-4, rtol=2e-4)
    assert not torch.allclose(found[0][1], tail_logits(whole, [ROWS[1]], 1)[0, 0], atol=1e-2)


@pytest.mark.parametrize("name", ["folder:llama", "folder:gemma3_text", "folder:qwen3_next", "gguf:qwen2"])
def test_streamed_answers_are_the_whole_models(written: Written, name: str) -> None:
    whole, streamed = both(written(name))
    assert greedy(streamed, ROWS, 5, Watch(), "") == greedy(whole, ROWS, 5, Watch(), "")


def test_a_cancelled_pass_stops_and_leaves_no_weights(written: Written) -> None:
    _, streamed = both(written("folder:llama"))
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        tail_logits(streamed, ROWS, 1, Watch(cancelled=lambda: next(asked) > 3))
    assert streamed.engine is not None
    assert all(value.is_meta for layer in streamed.engine.skeleton.layers for value in layer.parameters())


def test_weights_that_compute_nonsense_are_named_with_their_layer(tmp_path: Path) -> None:
    loaded = load(open_source(plant(tmp_path, broken=True).path), Run(), Watch(), "streamed")
    with pytest.raises(ModelError, match="NaN or Inf in layer 2"):
        list(read_streams(loaded, [tuple(range(9))], (-1,), "output", Watch(), ""))


def test_a_layer_without_its_weights_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    architectures.tiny("llama").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.2.mlp.down_proj.weight"]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\.mlp\.down_proj\.weight"):
        load_model(source, Run(), Watch())
    engine = open_engine(source, Run())
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\.mlp\.down_proj\.weight"):
        tail_logits(Loaded(source, engine.skeleton.model, None, CPU, engine), ROWS, 1)


def test_the_same_direction_is_found(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    prompts = read_prompts(Prompts(harmful=str(planted.harmful), harmless=str(planted.harmless)))
    recipe = recipe_from_table({"model": str(planted.path)})
    found = []
    for how in ("whole", "streamed"):
        loaded = load(open_source(planted.path), Run(), Watch(), how)
        assert (loaded.engine is None) == (how == "whole")
        rendering = renderer(loaded.tokenizer, loaded.source.context)
        found.append(find_direction(loaded, rendering, prompts, recipe, Watch()))
    whole, streamed = found
    assert streamed.candidates[0].layer == whole.candidates[0].layer
    assert float(np.abs(streamed.direction.for_layer(0) @ whole.direction.for_layer(0).T).min()) > 0.9999


@pytest.mark.skipif(not files().model.is_file(), reason="the refuser is not trained yet")
def test_the_refuser_answers_the_same() -> None:
    source = open_source(files().model)
    whole, streamed = (load(source, Run(), Watch(), how) for how in ("whole", "streamed"))
    rendering = renderer(whole.tokenizer, source.context)
    rows = rendering.all_tokens(files().harmful.read_text().splitlines()[:6])
    assert greedy(replace(streamed), rows, 12, Watch(), "") == greedy(whole, rows, 12, Watch(), "")
    torch.testing.assert_close(tail_logits(streamed, rows, 3), tail_logits(whole, rows, 3), atol=1e-3, rtol=1e-3)


def test_a_whole_run_on_a_model_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate.contract.messages import Task
    from abliterated.pipeline import loading
    from abliterated.pipeline.run import run

    monkeypatch.setattr(loading, "free_memory", lambda _: 0)
    planted = plant(tmp_path)
    prompts = {"harmful": str(planted.harmful), "harmless": str(planted.harmless)}
    recipe = recipe_from_table(
        {
            "model": str(planted.path),
            "prompts": prompts,
            "search": {"trials": 6},
            "evaluate": {"tokens": 4, "prompts": 12},
        }
    )
    work, output = str(tmp_path / "work"), str(tmp_path / "out")
    task = Task(recipe=recipe, base="planted:latest", source=str(planted.path), work=work, output=output)
    result = run(task, lambda _: None, lambda: False)
    assert result.metrics["refusal_before"] == 1.0
    assert result.metrics["refusal_after"] == 0.0


def test_what_cannot_be_streamed_is_loaded_whole_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterated.pipeline import loading
    from abliterated.pipeline.skeleton import Skeleton
    from abliterated.pipeline.weights import Unstreamable

    def unlike(_: Skeleton) -> None:
        raise Unstreamable("the model changes the stream between two layers")

    monkeypatch.setattr(loading, "free_memory", lambda _: 0)
    monkeypatch.setattr(Skeleton, "tried", unlike)
    loaded = load(open_source(plant(tmp_path).path), Run(), Watch())
    assert loaded.engine is None
    assert "between two layers" in loaded.notes[0]
