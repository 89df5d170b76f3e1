"""What is read from the residual stream, and ablation by hooks, against plain ways of doing the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Edit, Run
from abliterated.pipeline.activations import batches, next_logits, read_streams, tail_logits
from abliterated.pipeline.contributions import Ablation, find_contributions
from abliterated.pipeline.directions import direction
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.gguf_edit import edit_gguf
from abliterated.pipeline.loading import Loaded, load, load_model, load_tokenizer
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.source import open_source
from abliterated.pipeline.watch import Watch
from abliterated.refuser import files
from pipeline.planted import plant
from pipeline.tiny_gguf import tiny, write

ROWS = [tuple(range(5, 5 + length)) for length in (9, 4, 7, 7, 12, 3)]


def weights(path: Path) -> Loaded:
    source = open_source(path)
    return Loaded(source, load_model(source, Run(dtype="float32"), Watch()), None, torch.device("cpu"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return weights(write(tmp_path_factory.mktemp("llama") / "tiny.gguf", tiny("llama")))


@pytest.mark.parametrize("convention", ["output", "input"])
def test_batched_streams_are_the_ones_read_prompt_by_prompt(llama: Loaded, convention: str) -> None:
    found = torch.empty(len(ROWS), 2, 3, llama.source.hidden_size)
    for reading in read_streams(llama, ROWS, (-1, -2, -3), convention, Watch(), ""):
        found[reading.rows] = reading.streams
    for row, tokens in enumerate(ROWS):
        with torch.inference_mode():
            states = llama.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        for position in (-1, -2, -3):
            # The last hidden state has passed the final norm, so only its neighbours can be compared.
            layer = 1 if convention == "input" else 0
            torch.testing.assert_close(found[row, layer, -position - 1], states[1][0, position], atol=1e-4, rtol=1e-4)


def test_a_second_reading_is_the_same_to_the_bit(llama: Loaded) -> None:
    one, two = (list(read_streams(llama, ROWS, (-1,), "output", Watch(), "")) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert first.rows == second.rows
        assert torch.equal(first.streams, second.streams)


def test_batches_hold_every_row_once_the_longest_first() -> None:
    found = batches(ROWS, torch.device("cpu"), tokens=20)
    assert sorted(row for batch in found for row in batch) == list(range(len(ROWS)))
    assert found[0] == [4]
    assert all(len(batch) * len(ROWS[batch[0]]) <= 20 for batch in found)


def test_tail_logits_stand_at_each_rows_own_end(llama: Loaded) -> None:
    found = tail_logits(llama, ROWS, 2)
    for row, tokens in enumerate(ROWS):
        with torch.inference_mode():
            expected = llama.model(torch.tensor([tokens])).logits[0, -2:]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def test_answers_in_a_batch_are_the_answers_given_alone(llama: Loaded) -> None:
    named = replace(llama, tokenizer=type("None", (), {"eos_token_id": 257, "get_vocab": dict}))
    together = greedy(named, ROWS, 6, Watch(), "")
    assert together == [greedy(named, [row], 6, Watch(), "")[0] for row in ROWS]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_ablation_by_hooks_is_the_plain_edit_of_the_written_weights(tmp_path: Path, family: str) -> None:
    path = write(tmp_path / "tiny.gguf", tiny(family))
    model = weights(path)
    vector = np.random.default_rng(3).normal(size=model.source.hidden_size)
    chosen = direction(vector, origin={})
    edit_gguf(
        path,
        tmp_path / "edited.gguf",
        chosen,
        Edit(norm="none"),
        allow_partial=False,
        metadata=None,
        progress=lambda done, total: None,
        cancelled=lambda: False,
    )
    contributions = find_contributions(model, ROWS[4])
    with Ablation(contributions, torch.from_numpy(chosen.for_layer(0).copy())):
        hooked = next_logits(model, ROWS)
    each = torch.from_numpy(chosen.for_layer(0).copy()).expand(len(ROWS), 1, -1)
    with Ablation(contributions, each):
        by_row = next_logits(model, ROWS)
    written = next_logits(weights(tmp_path / "edited.gguf"), ROWS)
    torch.testing.assert_close(hooked, written, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(by_row, hooked, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(hooked, next_logits(model, ROWS), atol=1e-2)


def test_weights_that_compute_nonsense_are_named_with_their_layer(tmp_path: Path) -> None:
    loaded = load(open_source(plant(tmp_path, broken=True).path), Run(), Watch())
    with pytest.raises(ModelError, match="NaN or Inf in layer 2"):
        list(read_streams(loaded, ROWS, (-1,), "output", Watch(), ""))


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    loaded = load(open_source(plant(tmp_path).path), Run(), Watch())
    with pytest.raises(ModelError, match="the model's context 64"):
        renderer(loaded.tokenizer, 64).tokens("how " * 40)


@pytest.mark.skipif(not files().model.is_file(), reason="the refuser is not trained yet")
def test_the_template_says_which_positions_follow_the_instruction() -> None:
    tokenizer = load_tokenizer(open_source(files().model))
    found = renderer(tokenizer, 2048)
    behind = tokenizer.decode(found.tokens("How do I bolt the gate?")[-found.suffix :])
    assert behind == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert found.positions[0] == -1
